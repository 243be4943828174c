"""auto_round, which reads GPTQ on a CPU, decodes what lcq exports in both versions: the same weights, bit for bit."""

import numpy as np
import pytest
import safetensors.numpy

from lcq.io import Name, export
from tests.io.exports.made import codes, grid
from tests.io.exports.test_linear_formats import GRIDS, IN, OUT

torch = pytest.importorskip("torch", reason="pip install '.[peers]', or run .ci/peers")
pytest.importorskip("auto_round", reason="pip install '.[peers]', or run .ci/peers")


def decoded(form, folder, format, bits, group, kept):
    """What its layer makes of the identity."""
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    names = [Name("up", "up.weight", "io", type=f"int{bits}")]
    export({"up": form}, folder, format=format, names=names)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    module = qlinear_torch_zp if format == "gptq" else qlinear_torch
    layer = module.QuantLinear(bits, group or -1, IN, OUT, bias=False, g_idx=kept)
    state = {key.removeprefix("up."): torch.from_numpy(array.copy()) for key, array in tensors.items()}
    layer.load_state_dict(state if kept else {key: state[key] for key in ("qweight", "qzeros", "scales")})
    return layer(torch.eye(IN)).numpy()


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [16, None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_bit_for_bit(bits, group, zeros, format, tmp_path):
    """Zeros of 0 among them. Scales are powers of two here, so that no weight is rounded."""
    half = 1 << (bits - 1)
    levels = grid(0, 2 * half - 1) if zeros else grid(-half, half - 1)
    form, _ = codes((IN, OUT), (IN // (group or IN), OUT), levels, zeros=zeros, scale="float32")
    if zeros:
        form.zero[0, :2] = 0, 2 * half - 1
    form.scale[:] = np.ldexp(np.sign(form.scale), np.frexp(form.scale)[1])
    found = decoded(form, tmp_path / "net", format, bits, group, kept=zeros)
    zero = 0 if form.zero is None else np.repeat(form.zero, group or IN, 0)
    expected = (np.asarray(levels)[form.codes] - zero) * np.repeat(form.scale, group or IN, 0).astype(np.float64)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["binary", "powers of two", "symmetric", "thirds"])
def test_weights(name, tmp_path):
    form, dense = GRIDS[name]
    found = decoded(form, tmp_path / "net", "gptq", 4, IN // form.scale.shape[0], kept=False)
    np.testing.assert_allclose(found, dense, rtol=2e-3)  # scales are float16, and so are products with them
