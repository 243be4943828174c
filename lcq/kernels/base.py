"""`Kernel`: one way to multiply activations with a form; and the registry of all."""

import abc

from jaxtyping import Array, Num

from lcq.forms.base import Form
from lcq.forms.registry import Registry


class Kernel(abc.ABC):
    """One way to compute y = x Delta(form), x [M, K], of forms [K, n].

    A subclass is one file. It is registered by a name, under which `matmul(x, form, kernel=name)` takes it; and taken
    without one for the forms that it `suits`.

    Example:
        >>> import jax.numpy as jnp, lcq
        >>> @KERNELS.register("in bfloat16")
        ... class Rounded(Kernel):
        ...     def check(self, form):
        ...         if not isinstance(form, lcq.forms.Factors):
        ...             raise ValueError(f"expected factors, got {type(form).__name__}; leave kernel= out")
        ...     def product(self, x, form):
        ...         return x.astype("bfloat16") @ form.dense().astype("bfloat16")
        >>> lcq.kernels.matmul(jnp.ones(3), lcq.LowRank(1).project(jnp.ones((3, 2))), kernel="in bfloat16")
        Array([3., 3.], dtype=float32)
        >>> KERNELS.unregister("in bfloat16")
    """

    def suits(self, form: Form) -> bool:
        """Whether `matmul` takes it for a form, prepacked if it can be; the newest kernel that says so is taken."""
        del form
        return False

    def way(self, form: Form, rows: int) -> str:
        """The name, for reports, of how it multiplies so many rows: of another kernel if it leaves them to one."""
        del form, rows
        return KERNELS.name_of(type(self)) or type(self).__name__

    @abc.abstractmethod
    def check(self, form: Form) -> None:
        """Raises ValueError, with a remedy, unless it can multiply this form."""

    @abc.abstractmethod
    def product(self, x: Num[Array, "m k"], form: Form) -> Num[Array, "m n"]:
        """x Delta(form), of real x and at least one row, in any dtype; for stacked forms it is mapped."""


KERNELS: Registry[type[Kernel]] = Registry("kernels", "leave kernel= out to have one chosen", group="lcq.kernels")
"""How forms are multiplied, and when a product takes which; installed packages add theirs by entry points of the group
`lcq.kernels`:

codes        all codes: the best of these for the rows and the platform
words        at most 2 rows, of equal steps or at most 16 levels, in whatever blocks: to read the weights is most of the
             work, and packed ones are fewer bytes
tiles        all else: dense for one tile of columns after another, which costs little beside a product of many rows
pallas_tpu   one bit, on TPU: bits are unpacked beside the matrix unit, which waits for fewer bytes
pallas_gpu   one bit, on GPU: likewise
ell          few weights, prepacked
trellis      weights on a trellis, prepacked: at most 2 rows word by word, more by places of a word
dense        any form that has no better way; and, by name, as a measure of the others
"""


def chosen(form: Form) -> Kernel | None:
    """The newest kernel that suits a form."""
    kernels = (KERNELS[name]() for name in reversed(list(KERNELS)))
    return next((kernel for kernel in kernels if kernel.suits(form)), None)
