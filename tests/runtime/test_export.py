"""`packed` functions are exported: with forms as arguments, with a symbolic batch, for other platforms."""

import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax import lax

import lcq
import lcq.runtime.uses
from lcq.runtime.packed import packed
from tests.runtime.functions import CASES, W, close, coded, convolution, normal, stored


@pytest.fixture(autouse=True)
def patches(monkeypatch):
    """Convolutions of any size on patches of their images, so that small ones show that they are right."""
    monkeypatch.setattr(lcq.runtime.uses, "_PLACES", 1 << 30)


@pytest.mark.parametrize("ready", [False, True], ids=["forms", "prepacked"])
@pytest.mark.parametrize("scheme", [lcq.Uniform(4, per="channel"), lcq.KMeans(2), lcq.Prune(count=9)], ids=repr)
def test_exported_with_forms_as_arguments(scheme, ready):
    net, x = packed(lambda p, x: x @ p["kernel"]), normal(3, 8)
    forms = {"kernel": scheme.project(W)}
    tree = net.prepack(forms, x) if ready else forms
    exported = jax.export.deserialize(jax.export.export(jax.jit(net))(tree, x).serialize())
    close(exported.call(tree, x), net(tree, x))


@pytest.fixture
def unchecked():
    """To the checks of the tests a symbolic dimension is no int."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


SYMBOLIC = {  # fn, w, stacked, x without its batch
    "product": (lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, normal(8, 6), 0, (8,)),
    "rows": (lambda p, x: p["w"][x[:, 0].astype(int)].sum(1), normal(8, 32), 0, (1,)),
    "experts looked up": (
        lambda p, x: jnp.einsum("bi,bio->bo", x, p["w"][x[:, 0].astype(int)]),
        normal(3, 8, 8),
        1,
        (8,),
    ),
    "window": (lambda p, x: convolution({"kernel": p["w"]}, x), normal(3, 2, 2, 6), 0, (4, 4, 2)),
    "pointwise": (lambda p, x: convolution({"kernel": p["w"]}, x), normal(1, 1, 2, 6), 0, (4, 4, 2)),
    "scan": (lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0], normal(3, 8, 8), 1, (8,)),
}


@pytest.mark.parametrize("case", SYMBOLIC)
@pytest.mark.parametrize("scheme", [lcq.Uniform(4, per="channel"), lcq.KMeans(2), lcq.Prune(count=9)], ids=repr)
def test_exported_with_a_symbolic_batch(scheme, case, unchecked):
    fn, w, stacked, rest = SYMBOLIC[case]
    net, forms = packed(fn), stored(lcq.compress({"w": w}, [lcq.Rule("w", scheme, stacked=stacked)]))
    (batch,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, *rest), jnp.float32)
    for tree in (forms, net.prepack(forms, shape)):
        exported = jax.export.export(jax.jit(lambda x, tree=tree: net(tree, x)))(shape)
        for count in (1, 5):
            x = abs(normal(count, *rest))
            close(exported.call(x), fn(lcq.decompress(forms), x), 1e-4)


WITHOUT_LCQ = """
import sys
import jax, numpy as np
from jax import export
net = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
np.save(sys.argv[2], net.call(np.load(sys.argv[3])))
assert "lcq" not in sys.modules
"""


def test_an_exported_net_runs_in_a_process_without_lcq(tmp_path):
    fn, params, (x, *_), stacked, _ = CASES["net"]
    net, forms = packed(fn), coded(params, stacked)
    ready = net.prepack(forms, x)
    exported = jax.export.export(jax.jit(lambda x: net(ready, x)))(x)
    (tmp_path / "net").write_bytes(exported.serialize())
    np.save(tmp_path / "x.npy", x)
    files = [tmp_path / "net", tmp_path / "y.npy", tmp_path / "x.npy"]
    subprocess.run([sys.executable, "-c", WITHOUT_LCQ, *files], check=True, cwd=tmp_path)
    close(np.load(tmp_path / "y.npy"), np.asarray(net(ready, x)))


def test_a_product_of_one_bit_is_exported_with_the_kernel_of_the_platform():
    product, x = packed(lambda p, x: x @ p["w"]), jnp.ones((2, 64))
    ready = product.prepack({"w": lcq.KMeans(2).project(normal(64, 128))}, x)
    net = jax.jit(lambda x: product(ready, x))
    triton = "__gpu$xla.gpu.triton"
    allowed = [jax.export.DisabledSafetyCheck.custom_call(triton)]
    # newer JAX wants to know which GPU, where there is none
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    for platform, kernel in (("tpu", "tpu_custom_call"), ("cuda", triton), ("cpu", None)):
        mesh = jax.sharding.AbstractMesh((), (), abstract_device=gpu if platform == "cuda" else None)
        with jax.sharding.use_abstract_mesh(mesh):
            exported = jax.export.export(net, platforms=[platform], disabled_checks=allowed)(x)
        module = exported.mlir_module()
        assert [name for name in ("tpu_custom_call", triton) if name in module] == [kernel] * (kernel is not None)
        assert jax.export.deserialize(exported.serialize()).platforms == (platform,)
