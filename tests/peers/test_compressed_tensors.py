"""compressed-tensors unpacks and decompresses what lcq exports: the same weights."""

import json

import numpy as np
import pytest
import safetensors.numpy

from lcq.io import export
from tests.io.exports.test_linear_formats import GRIDS

torch = pytest.importorskip("torch", reason="pip install '.[peers]', or run .ci/peers")
pytest.importorskip("compressed_tensors", reason="pip install '.[peers]', or run .ci/peers")


@pytest.mark.parametrize("name", GRIDS)
def test_weights(name, tmp_path):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    form, dense = GRIDS[name]
    export({"up": {"kernel": form}}, tmp_path / "net", format="compressed-tensors")
    said = json.loads((tmp_path / "net" / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(said)
    scheme = config.config_groups["group_0"]
    assert isinstance(scheme, QuantizationScheme) and isinstance(scheme.weights, QuantizationArgs)
    tensors = safetensors.numpy.load_file(tmp_path / "net" / "model.safetensors")
    state = {key.removeprefix("up."): as_torch(array) for key, array in tensors.items()}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    found = compressor.decompress(state, scheme)["weight"].float().numpy()
    wide = {"float16": 1e-3, "bfloat16": 8e-3}.get(str(tensors["up.weight_scale"].dtype), 1e-6)
    np.testing.assert_allclose(found, dense.T, rtol=wide)  # weights are rounded to the scales' dtype


def as_torch(array):
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
