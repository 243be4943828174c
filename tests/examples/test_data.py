import jaxtyping
import numpy as np
import pytest

from lcq.examples import data


def test_digits_are_all_there_and_scaled():
    split = data.digits()
    assert split.x_train.shape == (1437, 8, 8) and split.x_test.shape == (360, 8, 8)
    assert split.x_train.dtype == np.float32 and split.y_train.dtype == np.int32
    x = np.concatenate([split.x_train, split.x_test])
    assert x.min() == 0 and x.max() == 1 and np.array_equal(x * 16, np.round(x * 16))
    counts = np.bincount(np.concatenate([split.y_train, split.y_test]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as UCI documents them


def test_digits_split_follows_the_seed():
    first, again, other = data.digits(), data.digits(), data.digits(seed=1)
    assert np.array_equal(first.x_train, again.x_train)
    assert not np.array_equal(first.x_train, other.x_train)
    # The split itself is part of every published number: it must not change with numpy's version.
    assert first.y_test[:12].tolist() == [0, 8, 8, 9, 8, 3, 7, 5, 0, 6, 6, 3]


def test_batches_visit_each_example_once_an_epoch():
    x, y = np.arange(10.0), np.arange(10)
    epoch = list(data.batches(x, y, 5, seed=0, epoch=0))
    assert all(np.array_equal(a, b) for a, b in epoch)
    assert sorted(np.concatenate([b for _, b in epoch])) == list(range(10))


def test_batches_are_a_function_of_seed_and_epoch():
    x = np.arange(12)

    def order(seed, epoch):
        return np.concatenate([b for b, _ in data.batches(x, x, 4, seed=seed, epoch=epoch)]).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize("size", [0, 11])
def test_batches_refuse_an_impossible_size(size):
    with pytest.raises(ValueError, match="size of 1 to 10"):
        next(data.batches(np.zeros(10), np.zeros(10), size, seed=0, epoch=0))


def test_normalize_undoes_by_hand():
    x = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)
    z = data.normalize(x, data.CIFAR10_MEAN, data.CIFAR10_STD)
    assert z.dtype == np.float32
    expected = (x / 255 - np.array(data.CIFAR10_MEAN)) / np.array(data.CIFAR10_STD)
    np.testing.assert_allclose(z, expected, atol=1e-6)


def test_shapes_and_types_are_checked_in_the_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        data.normalize(np.zeros((2, 3)), mean=0.5)  # float64, not uint8


READERS = {
    "mnist": data.mnist,
    "cifar10": lambda folder=None: data.cifar10("test", folder),
    "pretrained": lambda folder=None: data.pretrained("lenet300_tanh_mnist", folder),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_missing_data_says_what_to_do(reader, tmp_path, monkeypatch):
    monkeypatch.delenv("LCQ_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"LCQ_DATA is set; set .*LCQ_DATA.*https?://"):
        reader()
    with pytest.raises(FileNotFoundError, match="has no such file"):
        reader(tmp_path)
    monkeypatch.setenv("LCQ_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        reader()


def test_mnist_reads_an_npz(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (3, 28, 28)),
        "y_train": [1, 2, 3],
        "x_test": [[[7]]],
        "y_test": [4],
    }
    np.savez(tmp_path / "mnist.npz", **{k: np.asarray(v, np.uint8) for k, v in arrays.items()})
    split = data.mnist(tmp_path)
    assert split.x_train.dtype == np.uint8 and np.array_equal(split.x_train, arrays["x_train"])
    assert split.y_test.dtype == np.int32 and split.y_test.tolist() == [4]


def test_pretrained_nests_by_slash(tmp_path):
    np.savez(tmp_path / "net.npz", **{"a/kernel": np.ones(2), "a/b/c": np.zeros(1), "conv.weight": np.ones(3)})
    tree = data.pretrained("net", tmp_path)
    assert set(tree) == {"a", "conv.weight"} and set(tree["a"]) == {"kernel", "b"} and set(tree["a"]["b"]) == {"c"}


def test_cifar10_cuts_the_mosaic(tmp_path):
    image = pytest.importorskip("PIL.Image")
    tiles = np.random.default_rng(0).integers(0, 256, (10_000, 32, 32, 3), np.uint8)
    tiles[:, 1:] = tiles[:, :1]  # smaller to store
    mosaic = tiles.reshape(100, 100, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(3200, 3200, 3)
    image.fromarray(mosaic).save(tmp_path / "cifar10_test0.webp", lossless=True, method=0, quality=0)
    np.savez(tmp_path / "cifar10_labels.npz", y_test=np.arange(10_000).astype(np.uint8))
    x, y = data.cifar10("test", tmp_path)
    assert np.array_equal(x, tiles) and y.dtype == np.int32


def test_cifar10_knows_two_splits(tmp_path):
    with pytest.raises(ValueError, match="'train' or 'test'"):
        data.cifar10("validation", tmp_path)
