"""The one door to products with forms: chooses how by the form, the shape and the platform."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Num, UInt32

from lcq.forms.base import Form
from lcq.forms.dtypes import native, own_promotion, wider
from lcq.forms.meshes import by_compiler, explicit_mesh, placed_on, spec_of, varied
from lcq.forms.prepacked import Prepacked
from lcq.kernels import code_product, xnor_xla
from lcq.kernels.base import KERNELS, Kernel, chosen
from lcq.kernels.shards import sharding_of
from lcq.kernels.signs import Signs


@KERNELS.register("dense")
class Dense(Kernel):
    """The dense array at once."""

    def check(self, form: Form) -> None:
        del form

    def product(self, x: Array, form: Form) -> Array:
        dtype = wider(x.dtype, form.dtype)
        return jnp.matmul(x.astype(dtype), form.dense().astype(dtype))


@own_promotion()
def matmul(x: Num[Array, "*rows k"], form: Form, *, kernel: str | None = None) -> Num[Array, "*rows n"]:
    """y = x Delta(form), with no dense array of the form where there is a better way.

    Codes are prepacked for products first, see `Form.prepack`: as much work as reading a dense matrix, so weights that
    are used again and again are prepacked once. Few weights are multiplied as what `prepack` makes of them, once, and
    dense without. Factors are multiplied one after the other, a sum part by part, and forms of other packages by their
    `product`. Any other form is made dense. Products with codes are exact up to the rounding of float32 sums, of finite
    activations: with an infinite one a row is not finite, but may be NaN where the dense product is infinite. NaN stays
    NaN.

    Args:
        x: activations [.., k]; for stacked forms [G, .., k].
        form: of shape (k, n) or (G, k, n).
        kernel: the name of one of `KERNELS`; None chooses.

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
    if isinstance(form, Prepacked) and not form.is_matrix:
        raise ValueError(f"expected a form prepacked as the matrix it is, got axes {form.axes} of {list(form.shape)}")
    x = native(x)
    x, form = varied((x, form), x, form)
    if (mesh := explicit_mesh(x, form)) is not None:
        shapes = (
            (a.shape, jnp.float32, there) for a, there in ((x, placed_on(mesh, spec_of(x))), (form, sharding_of(form)))
        )
        spec = jax.eval_shape(jnp.matmul, *(jax.ShapeDtypeStruct(*a[:2], sharding=a[2]) for a in shapes)).sharding.spec
        return by_compiler(functools.partial(matmul, kernel=kernel), placed_on(mesh, spec), x, form)
    form = form.prepack(traced=True)
    how = chosen(form) if kernel is None else KERNELS[kernel]()
    dtype = wider(x.dtype, form.dtype)
    if how is not None:
        how.check(form)
        product = functools.partial(_by_rows, how)
        product = jax.vmap(product) if stacked else product
        if jnp.iscomplexobj(x):
            return jax.lax.complex(product(x.real, form), product(x.imag, form)).astype(dtype)
        return product(x, form).astype(dtype)
    y = form.product(x, matmul)
    return jnp.matmul(x.astype(dtype), form.dense().astype(dtype)) if y is None else y.astype(dtype)


def way(form: Form, rows: int) -> str:
    """The name of the kernel that multiplies so many rows with a form, see `KERNELS`; "" where the form does it itself.

    Args:
        form: of arrays, or of their shapes.
        rows: of the activations; of each, with stacked forms.

    Example:
        >>> import lcq
        >>> form = lcq.Binary().project(jnp.ones((64, 8)))
        >>> way(form, 1), way(form, 64)
        ('words', 'tiles')
    """
    ready = jax.eval_shape(lambda form: form.prepack(traced=True), form)
    how = chosen(ready)
    return "" if how is None else how.way(ready, rows)


def _by_rows(kernel: Kernel, x: Num[Array, "*rows k"], form: Form) -> Num[Array, "*rows n"]:
    n = form.shape[-1]
    if 0 in x.shape:
        return jnp.zeros((*x.shape[:-1], n), x.dtype)
    return kernel.product(x.reshape(-1, x.shape[-1]), form).reshape(*x.shape[:-1], n)


@own_promotion()
def binary_matmul(a: UInt32[Array, "*rows w"], weights: Signs) -> Int32[Array, "*rows n"]:
    """y = sum_k s_k t_k, the product of two matrices of signs +-1, both packed.

    By XNOR and popcount everywhere, but for many rows on TPU and GPU, where their matrix units multiply int8.

    Args:
        a: signs of the activations, see `pack_signs`.
        weights: prepacked by `signs`.

    Raises:
        ValueError: words of another number of signs.

    Example:
        >>> from lcq.forms.column_words import pack_signs
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
    a, weights = varied((a, weights), a, weights)
    y = _signs(weights.size, weights.platform)(a.reshape(-1, a.shape[-1]), weights.words)
    return y[:, : weights.count].reshape(*a.shape[:-1], weights.count)


@functools.cache
def _signs(size: int, platform: str) -> Callable[[Array, Array], Array]:
    mapped = code_product.mapped_over_rows
    if platform == "xla":
        return mapped(lambda a, words: xnor_xla.xnor(a, words, size))
    tpu, gpu = (pallas.xnor for pallas in code_product.pallas_kernels())
    return mapped(lambda a, words: (tpu if platform == "tpu" else gpu)(a, words, size))
