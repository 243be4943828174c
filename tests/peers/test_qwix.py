"""qwix runs a net on the arrays that lcq makes, and lcq takes them back."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.io import from_qwix, to_qwix

qwix = pytest.importorskip("qwix", reason="pip install '.[peers]', or run .ci/peers")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16)(nn.relu(nn.Dense(64)(x)))


@pytest.mark.parametrize(("bits", "per", "qtype", "tile"), [(4, 32, "int4", 32), (8, "channel", "int8", None)])
def test_a_net_on_codes(bits, per, qtype, tile):
    net, x = Net(), jax.random.normal(jax.random.key(0), (4, 128))
    params = net.init(jax.random.key(1), x)["params"]
    rule = lcq.Rule(".*kernel", lcq.Uniform(bits, per=per, scale_dtype="float32"))
    forms = lcq.compress(params, [rule])
    wanted = [qwix.QuantizationRule(module_path=".*", weight_qtype=qtype, tile_size=tile)]
    quantized = qwix.quantize_model(net, qwix.PtqProvider(wanted))
    abstract = jax.eval_shape(lambda: quantized.init(jax.random.key(1), x))["params"]
    arrays = map(jnp.asarray, jax.tree.leaves(to_qwix(forms)))
    made = jax.tree.unflatten(jax.tree.structure(abstract), arrays)
    y, expected = quantized.apply({"params": made}, x), net.apply({"params": lcq.decompress(forms)}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    back = lcq.decompress(from_qwix(made))
    jax.tree.map(np.testing.assert_array_equal, back, lcq.decompress(forms))
