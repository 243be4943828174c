"""Every Pallas kernel through the real compilers of its targets: Mosaic and LLO for TPU, Triton and ptxas for GPU.

This proves that they compile, with legal alignments and within the memory a kernel may have. Nothing is run.
"""

import functools

import jax
import pytest

from lcq.kernels import pallas_gpu, pallas_tpu

TARGETS = ["v5e", "v6e", "v5p", "sm_80", "sm_90a"]

# m, k, n: decoding, a small and a large batch, ragged everywhere, smaller than any tile
SHAPES = [(1, 4096, 4096), (16, 4096, 4096), (256, 4096, 4096), (300, 1000, 700), (7, 40, 10)]


def kernels_of(target):
    return pallas_gpu if target.startswith("sm") else pallas_tpu


def has_a_kernel(executable):
    return any(name in executable.as_text() for name in ("tpu_custom_call", "__gpu$xla.gpu.triton"))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("unit", ["matrix", "popcount"])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_xnor_compiles(compiled, target, unit, m, k, n):
    f = functools.partial(kernels_of(target).xnor, k=k, unit=unit)
    executable = compiled(target, f, ("uint32", m, -(-k // 32)), ("uint32", -(-k // 32), n))
    assert has_a_kernel(executable)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_bit_product_compiles(compiled, target, dtype, m, k, n):
    words = ("uint32", -(-k // 32), n)
    assert has_a_kernel(compiled(target, kernels_of(target).bit_product, (dtype, m, k), words))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["uint32", "float32", "bfloat16"])
def test_kernels_compile_at_any_precision_a_user_has_chosen(compiled, target, dtype):
    kernels, words = kernels_of(target), ("uint32", 8, 128)
    f = functools.partial(kernels.xnor, k=256, unit="matrix") if dtype == "uint32" else kernels.bit_product
    with jax.default_matmul_precision("highest"):
        assert has_a_kernel(compiled(target, f, (dtype, 16, 8 if dtype == "uint32" else 256), words))


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    ("unit", "m", "instructions"), [("popcount", 8, ["popc.b32"]), ("matrix", 64, ["wgmma.mma_async", "mma.sync"])]
)
def test_gpu_code_has_the_instruction_it_is_written_for(compiled, target, unit, m, instructions, tmp_path):
    f = functools.partial(pallas_gpu.xnor, k=1024, unit=unit)
    compiled(target, f, ("uint32", m, 32), ("uint32", 32, 256), xla_dump_to=str(tmp_path))
    code = "".join(path.read_text() for path in tmp_path.glob("*.ptx"))
    assert any(name in code for name in instructions)
