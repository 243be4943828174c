"""compressed-tensors unpacks and decompresses what lcq exports: the same codes, the same weights, bit for bit."""

import json

import numpy as np
import pytest
import safetensors.numpy

from lcq.io import Name, export
from tests.io.exports.made import codes, grid
from tests.io.exports.test_linear_formats import GRIDS, IN, OUT

torch = pytest.importorskip("torch", reason="pip install '.[peers]', or run .ci/peers")
pytest.importorskip("compressed_tensors", reason="pip install '.[peers]', or run .ci/peers")


def decompressed(form, folder, type=None):
    """The library's weight, its tensors, and the number of bits."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    export({"up": form}, folder, format="compressed-tensors", names=[Name("up", "up.weight", "io", type=type)])
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    scheme = config.config_groups["group_0"]
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    state = {key.removeprefix("up."): as_torch(array) for key, array in tensors.items()}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    return compressor.decompress(dict(state), scheme)["weight"].float().numpy(), state, scheme.weights.num_bits


def as_torch(array):
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


@pytest.mark.parametrize("name", GRIDS)
def test_weights(name, tmp_path):
    form, dense = GRIDS[name]
    found, state, _ = decompressed(form, tmp_path / "net")
    wide = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(state["weight_scale"].dtype, 1e-6)
    np.testing.assert_allclose(found, dense.T, rtol=wide)  # weights are rounded to the scales' dtype


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [16, None])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_bit_for_bit(bits, group, zeros, tmp_path):
    """Scales are powers of two here, so that no weight is rounded."""
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    half = 1 << (bits - 1)
    levels = grid(0, 2 * half - 1) if zeros else grid(-half, half - 1)
    form, _ = codes((IN, OUT), (IN // (group or IN), OUT), levels, zeros=zeros, scale="float32")
    form.scale[:] = np.ldexp(np.sign(form.scale), np.frexp(form.scale)[1])
    found, state, said = decompressed(form, tmp_path / "net", f"int{bits}")
    unpacked = unpack_from_int32(state["weight_packed"], bits, torch.Size((OUT, IN))).numpy()
    np.testing.assert_array_equal(unpacked, form.codes.T.astype(np.int32) - half)
    expected = np.repeat(form.scale, group or IN, 0).astype(np.float64)
    zero = 0 if form.zero is None else np.repeat(form.zero, group or IN, 0)
    np.testing.assert_array_equal(found, ((np.asarray(levels)[form.codes] - zero) * expected).T)
    assert said == bits
