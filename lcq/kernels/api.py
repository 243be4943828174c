"""The one door to products with forms: chooses how by the form, the shape and the platform."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Num, UInt32

from lcq.forms import Codes, Factors, Sum
from lcq.forms.base import Form
from lcq.forms.dtypes import native, own_promotion, wider
from lcq.kernels import codes_xla, xnor_xla
from lcq.kernels.base import Laid
from lcq.kernels.columns import Columns, columns
from lcq.kernels.ell import Lists, list_product
from lcq.kernels.meshes import by_compiler, explicit_mesh, is_shared, laid_on, spec_of
from lcq.kernels.shards import sharding_of
from lcq.kernels.signs import Signs
from lcq.tracing import jaxpr

KERNELS = ("words", "tiles", "pallas_tpu", "pallas_gpu", "dense")
"""How codes are multiplied, and when the door does so:

words        at most 2 rows and equal steps: to read the weights is most of the work, and packed ones are fewer bytes
tiles        all else: dense for one tile of columns after another, which costs little beside a product of many rows
pallas_tpu   one bit, on TPU: bits are unpacked beside the matrix unit, which waits for fewer bytes
pallas_gpu   one bit, on GPU: likewise
dense        never: dense at once, as a measure of the others
"""


@own_promotion()
def matmul(x: Num[Array, "*rows k"], form: Form, *, kernel: str | None = None) -> Num[Array, "*rows n"]:
    """y = x Delta(form), with no dense array of the form where there is a better way.

    Codes are laid out for products first, see `columns`: as much work as reading a dense matrix, so weights that are
    used again and again are laid out once. Few weights are multiplied as what `lists` makes of them, once, and dense
    without. Factors are multiplied one after the other, a sum part by part. Any other form is made dense. Products with
    codes are exact up to the rounding of float32 sums, of finite activations: with an infinite one a row is not finite,
    but may be NaN where the dense product is infinite. NaN stays NaN.

    Args:
        x: activations [.., k]; for stacked forms [G, .., k].
        form: of shape (k, n) or (G, k, n).
        kernel: one of `KERNELS` for codes; None chooses.

    Returns:
        [.., n] in the dtype that a product of x with the dense array has.

    Raises:
        ValueError: shapes that do not fit, a kernel that cannot multiply this form, or not on this platform.

    Example:
        >>> import lcq
        >>> form = lcq.Binary().project(jnp.array([[-1.0, -3.0], [1.0, 3.0]]))
        >>> matmul(jnp.array([2.0, 5.0]), form)
        Array([6., 6.], dtype=float32)
    """
    stacked = len(form.shape) - 2
    if (stacked, x.shape[:stacked], x.shape[-1:]) not in ((n, form.shape[:n], form.shape[-2:-1]) for n in (0, 1)):
        raise ValueError(
            f"expected x [.., k] and a form (k, n), or x [G, .., k] and a form (G, k, n), got {list(x.shape)} and "
            f"{list(form.shape)}"
        )
    if isinstance(form, Laid) and form.axes != (0, 1):
        raise ValueError(f"expected a form laid out as the matrix it is, got axes {form.axes} of {list(form.shape)}")
    x = native(x)
    if (mesh := explicit_mesh(x, form)) is not None:
        shapes = (
            (a.shape, jnp.float32, lies) for a, lies in ((x, laid_on(mesh, spec_of(x))), (form, sharding_of(form)))
        )
        spec = jax.eval_shape(jnp.matmul, *(jax.ShapeDtypeStruct(*a[:2], sharding=a[2]) for a in shapes)).sharding.spec
        return by_compiler(functools.partial(matmul, kernel=kernel), laid_on(mesh, spec), x, form)
    if isinstance(form, Codes):
        form = columns(form)
    if kernel is not None:
        _check(kernel, form)
    dtype = wider(x.dtype, form.dtype)
    if isinstance(form, Laid) and jnp.iscomplexobj(x):
        return jax.lax.complex(*(matmul(part, form, kernel=kernel) for part in (x.real, x.imag))).astype(dtype)
    if isinstance(form, Sum):
        return functools.reduce(
            jnp.add, [matmul(x, part).astype(wider(dtype, jnp.float32)) for part in form.parts]
        ).astype(dtype)
    if isinstance(form, Factors) and form.right is not None and not form.separable:
        return jnp.matmul(jnp.matmul(x.astype(wider(x.dtype, form.left.dtype)), form.left), form.right).astype(dtype)
    if isinstance(form, Laid) and kernel != "dense":
        product = functools.partial(_laid, kernel=kernel)
        return (jax.vmap(product) if stacked else product)(x, form).astype(dtype)
    return jnp.matmul(x.astype(dtype), form.dense().astype(dtype))


@own_promotion()
def binary_matmul(a: UInt32[Array, "*rows w"], weights: Signs) -> Int32[Array, "*rows n"]:
    """y = sum_k s_k t_k, the product of two matrices of signs +-1, both packed.

    By XNOR and popcount everywhere, but for many rows on TPU and GPU, where their matrix units multiply int8.

    Args:
        a: signs of the activations, see `pack_signs`.
        weights: laid out by `signs`.

    Raises:
        ValueError: words of another number of signs.

    Example:
        >>> from lcq.kernels.columns import pack_signs
        >>> from lcq.kernels.signs import signs
        >>> w = jnp.array([[1.0, -1.0], [-1.0, -1.0], [1.0, 1.0]])
        >>> binary_matmul(pack_signs(jnp.array([0.5, -2.0, 3.0])), signs(w))
        Array([3, 1], dtype=int32)

    Source: Rastegari et al., arXiv 1603.05279.
    """
    if a.shape[-1] != -(-weights.size // 32):
        raise ValueError(f"expected {-(-weights.size // 32)} words of {weights.size} signs, got {list(a.shape)}")
    if 0 in a.shape:
        return jnp.zeros((*a.shape[:-1], weights.count), jnp.int32)
    y = _signs(weights.size, weights.layout)(a.reshape(-1, a.shape[-1]), weights.words)
    return y[:, : weights.count].reshape(*a.shape[:-1], weights.count)


def _check(kernel: str, form: Form) -> None:
    if kernel not in KERNELS:
        raise ValueError(f"expected a kernel of {', '.join(KERNELS)}, got {kernel!r}")
    if not isinstance(form, Columns):
        raise ValueError(f"the kernel {kernel!r} multiplies codes, got {type(form).__name__}; leave kernel= out")
    if kernel not in ("tiles", "dense") and form.levels is not None:
        raise ValueError(
            f"the kernel {kernel!r} wants levels with equal steps, got a codebook of {form.levels.shape[-1]}; "
            "leave kernel= out"
        )
    if kernel.startswith("pallas") and form.width != 1:
        raise ValueError(f"the kernel {kernel!r} wants codes of 1 bit, got {form.width} bits; leave kernel= out")


def _laid(x: Float[Array, "*rows k"], form: Laid, kernel: str | None) -> Float[Array, "*rows n"]:
    if 0 in x.shape:
        return jnp.zeros((*x.shape[:-1], form.columns), x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(form, Lists):
        return list_product(rows, form).reshape(*x.shape[:-1], -1)
    assert isinstance(form, Columns)
    equal = form.levels is None and (form.width == 1 or jaxpr.at_most(rows.shape[0], codes_xla.FEW))
    by_code = equal if kernel is None else kernel not in ("tiles", "dense")
    y = _by_codes(rows, form, kernel) if by_code else codes_xla.matrix_product(rows, form)
    return y.reshape(*x.shape[:-1], -1)


def _by_codes(x: Float[Array, "m k"], form: Columns, kernel: str | None) -> Float[Array, "m n"]:
    """sum over blocks b of first[b] sum(x[b]) + step[b] (x[b].code[b])."""

    def block(y: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
        x, words, first, step = part
        total = x.sum(1, keepdims=True, dtype=jnp.float32)
        return y + first * total + step * code_product(x, words, form.width, kernel), None

    cut = x.reshape(x.shape[0], -1, form.block).swapaxes(0, 1)
    nothing = jnp.zeros((x.shape[0], form.words.shape[-1]), jnp.float32)
    return jax.lax.scan(block, nothing, (cut, form.words, *form.lines()))[0]


def code_product(
    x: Float[Array, "m k"], words: UInt32[Array, "w n"], width: int, kernel: str | None = None
) -> Float[Array, "m n"]:
    """y[m, n] = sum_k x[m, k] code[k, n] in float32; under vmap over x alone, the rows of all are one product."""
    if kernel is None and is_shared():
        kernel = _anywhere(x)
    return _PRODUCT.bind(x, words, width=width, kernel=kernel)


def _anywhere(x: Array) -> str:
    return "words" if jaxpr.at_most(x.shape[0], codes_xla.FEW) else "tiles"


def _code_product(x: Array, words: Array, *, width: int, kernel: str | None) -> Array:
    by_name: dict[str | None, Callable[..., Array]] = {
        "words": functools.partial(codes_xla.word_by_word, width=width),
        "tiles": functools.partial(codes_xla.in_tiles, width=width),
    }
    anywhere = by_name[_anywhere(x)]
    if kernel in by_name:
        return by_name[kernel](x, words)
    taken = width == 1 and x.dtype in (jnp.float32, jnp.bfloat16) and jaxpr.is_known(x.shape)
    if kernel is None and not taken:
        return anywhere(x, words)  # what the Pallas kernels do not take
    tpu, gpu = (pallas.bit_product for pallas in _pallas())
    if kernel is not None:
        return (tpu if kernel == "pallas_tpu" else gpu)(x, words)
    return jax.lax.platform_dependent(x, words, tpu=tpu, cuda=gpu, default=anywhere)


def _mapped_product(operands: Any, axes: Any, **how: Any) -> Any:
    return jax.vmap(_mapped(functools.partial(code_product, **how)), axes)(*operands), 0


_PRODUCT = jaxpr.primitive(
    "code_product",
    _code_product,
    lambda x, words: ((x.shape[0], words.shape[1]), jnp.float32),
    (lambda tangent, _, words, width, kernel: codes_xla.in_tiles(tangent, words, width), None),
    _mapped_product,
)


@functools.cache
def _signs(size: int, layout: str) -> Any:
    if layout == "xla":
        return _mapped(lambda a, words: xnor_xla.xnor(a, words, size))
    tpu, gpu = (pallas.xnor for pallas in _pallas())
    return _mapped(lambda a, words: (tpu if layout == "tpu" else gpu)(a, words, size))


def _pallas() -> tuple[Any, Any]:
    """The kernels for TPU and GPU."""
    from lcq.kernels import pallas_gpu, pallas_tpu  # here, as they take a sixth of the time of `import lcq`

    return pallas_tpu, pallas_gpu


def _mapped(product: Any) -> Any:
    """A product of rows and words; mapped over rows alone it has more rows."""
    mapped = jax.custom_batching.custom_vmap(product)

    @mapped.def_vmap
    def _(size: int, batched: Any, rows: Any, words: Any) -> Any:
        if batched[1]:
            rows = rows if batched[0] else jnp.broadcast_to(rows, (size, *rows.shape))
            return jax.lax.map(lambda one: mapped(*one), (rows, words)), True
        y = mapped(rows.reshape(-1, rows.shape[-1]), words)
        return y.reshape(size, -1, y.shape[-1]), True

    return mapped
