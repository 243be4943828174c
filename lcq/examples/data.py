"""Images to train on: the bundled 8x8 digits, and readers for MNIST, CIFAR-10 and pretrained weights.

`digits` needs nothing: `digits.npz` lies beside this file. It is the test set of "Optical Recognition of
Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, doi:10.24432/C50P49,
CC BY 4.0) with the values of scikit-learn's `load_digits`: x uint8 (1797, 8, 8), 0..16, and y uint8 (1797,).

Everything larger is read from a folder: the argument `folder`, or the environment variable `LCQ_DATA`.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Num, Shaped, UInt8

CIFAR10_MEAN = (0.485, 0.456, 0.406)
CIFAR10_STD = (0.229, 0.224, 0.225)

_SOURCES = {
    "mnist.npz": "MNIST as uint8 arrays x_train (60000, 28, 28), y_train, x_test (10000, 28, 28), y_test"
    " in the original order; made from the four IDX files of http://yann.lecun.com/exdb/mnist",
    "cifar10": "CIFAR-10 (https://www.cs.toronto.edu/~kriz/cifar.html) as lossless WebP mosaics"
    " cifar10_train0..4.webp and cifar10_test0.webp of 100 x 100 images each, row by row, and"
    " cifar10_labels.npz with uint8 arrays y_train and y_test",
    "lenet300_tanh_mnist.npz": "the LeNet300 reference net of the LC toolkit"
    " (https://github.com/UCMerced-ML/LC-model-compression, BSD) as arrays dense{0,1,2}/{kernel,bias}",
    "resnet20_cifar10.npz": "ResNet-20 of https://github.com/akamaster/pytorch_resnet_cifar10 (BSD-2-Clause):"
    " its state_dict, one array a key",
}


class Split(NamedTuple):
    """Images and labels of a training and a test set."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def digits(*, seed: int = 0) -> Split:
    """The bundled handwritten digits, split into 1437 training and 360 test images.

    Args:
        seed: which split; the same seed gives the same split on every machine.

    Returns:
        Images float32 (n, 8, 8) in [0, 1], labels int32 (n,).

    Example:
        >>> split = digits()
        >>> split.x_train.shape, split.x_test.shape
        ((1437, 8, 8), (360, 8, 8))
    """
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        x, y = file["x"].astype(np.float32) / 16, file["y"].astype(np.int32)
    order = np.random.default_rng(seed).permutation(len(x))
    train, test = order[:1437], order[1437:]
    return Split(x[train], y[train], x[test], y[test])


def mnist(folder: str | Path | None = None) -> Split:
    """MNIST: uint8 images (60000, 28, 28) and (10000, 28, 28), int32 labels.

    Args:
        folder: where `mnist.npz` is; default the environment variable LCQ_DATA.

    Raises:
        FileNotFoundError: the folder or the file is not there.
    """
    with np.load(_find("mnist.npz", folder)) as file:
        y_train, y_test = file["y_train"].astype(np.int32), file["y_test"].astype(np.int32)
        return Split(file["x_train"], y_train, file["x_test"], y_test)


def cifar10(
    split: str, folder: str | Path | None = None
) -> tuple[UInt8[np.ndarray, "n 32 32 3"], Shaped[np.ndarray, " n"]]:
    """CIFAR-10: uint8 RGB images (n, 32, 32, 3) and int32 labels.

    Args:
        split: "train" (50000 images) or "test" (10000).
        folder: where the `cifar10_*` files are; default the environment variable LCQ_DATA.

    Raises:
        FileNotFoundError: the folder or a file is not there.
    """
    if split not in ("train", "test"):
        raise ValueError(f"cifar10 wants split 'train' or 'test', got {split!r}; choose one of the two")
    from PIL import Image  # comes with matplotlib; only this reader needs it

    with np.load(_find("cifar10_labels.npz", folder, "cifar10")) as file:
        y = file[f"y_{split}"].astype(np.int32)
    parts = []
    for i in range(len(y) // 10_000):
        with Image.open(_find(f"cifar10_{split}{i}.webp", folder, "cifar10")) as image:
            mosaic = np.asarray(image.convert("RGB"))
        tiles = mosaic.reshape(100, 32, 100, 32, 3).transpose(0, 2, 1, 3, 4)
        parts.append(tiles.reshape(10_000, 32, 32, 3))
    return np.concatenate(parts), y


def pretrained(name: str, folder: str | Path | None = None) -> dict[str, Any]:
    """Pretrained weights as nested dicts of arrays: the key "dense0/kernel" becomes ["dense0"]["kernel"].

    Args:
        name: "lenet300_tanh_mnist" (the params of `models.lenet300()`; its input is x/255 minus the mean
            training image), "resnet20_cifar10" (for `models.resnet_from_torch`; its input is normalized by
            CIFAR10_MEAN and CIFAR10_STD), or the name of any other .npz file.
        folder: where NAME.npz is; default the environment variable LCQ_DATA.

    Raises:
        FileNotFoundError: the folder or the file is not there.
    """
    tree: dict[str, Any] = {}
    with np.load(_find(f"{name}.npz", folder)) as file:
        for key in file.files:
            *parents, leaf = key.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = file[key]
    return tree


def normalize(x: UInt8[np.ndarray, "n ..."], mean: Any, std: Any = 1.0) -> Float[np.ndarray, "n ..."]:
    """(x/255 - mean) / std in float32, what nets on images with values 0..255 are given.

    Args:
        x: images.
        mean: what to take away, on the scale 0..1: a number, one per channel, or an image.
        std: what to divide by, likewise.

    Example:
        >>> normalize(np.full((1, 2), 255, np.uint8), mean=0.5, std=0.25)
        array([[2., 2.]], dtype=float32)
    """
    return (x.astype(np.float32) / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def batches(
    x: Num[np.ndarray, "n ..."], y: Shaped[np.ndarray, "n ..."], size: int, *, seed: int, epoch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One epoch of shuffled mini-batches, all of the same size; what does not fill a batch is left out.

    Args:
        x: inputs.
        y: targets.
        size: examples a batch.
        seed: of the whole run.
        epoch: number of this epoch; (seed, epoch) decides the order, so a resumed run sees the same batches.

    Yields:
        (x, y) of `size` examples.

    Example:
        >>> [len(x) for x, _ in batches(np.zeros((10, 3)), np.zeros(10), 4, seed=0, epoch=0)]
        [4, 4]
    """
    if not 0 < size <= len(x):
        raise ValueError(f"batches wants a size of 1 to {len(x)}, the number of examples, got {size}; lower it")
    order = np.random.default_rng((seed, epoch)).permutation(len(x))
    for start in range(0, len(x) - size + 1, size):
        chosen = order[start : start + size]
        yield x[chosen], y[chosen]


def _find(file: str, folder: str | Path | None, source: str | None = None) -> Path:
    """The path of a data file, or an error that says what to set and where the file comes from."""
    chosen = os.getenv("LCQ_DATA") if folder is None else folder
    if chosen and (path := Path(chosen) / file).is_file():
        return path
    if chosen:
        got = f"{str(chosen)!r} has no such file" if Path(chosen).is_dir() else f"{str(chosen)!r} is not a folder"
    else:
        got = "neither `folder` nor LCQ_DATA is set"
    about = _SOURCES.get(source or file, "a file of that name has to be made first")
    raise FileNotFoundError(
        f"expected the data file {file!r}, got no folder with it: {got}; set the environment variable LCQ_DATA"
        f" (or the argument `folder`) to the folder that holds it. What it is: {about}."
    )
