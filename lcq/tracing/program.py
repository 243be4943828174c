"""A traced function, and how its products stand out.

With `jaxpr` the only file that uses names inside JAX.
"""

import dataclasses
from collections.abc import Sequence

from jax.extend import core  # noqa: TID251

from lcq.tracing.biases import BiasSite
from lcq.tracing.contraction import Product, Unit
from lcq.tracing.equation import Body, Content, Equation


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A traced function: flat equations over numbered variables.

    Attributes:
        jaxpr: The function as one list of equations; inputs are the parameters' leaves, then the leaves of the batch.
        consts: Values of its constants.
        paths: Paths of the parameters, in order.
        products: Products with a followed parameter, in order of their equations.
        units: Weights that are rounded together, in the order of their first products.
        bias_sites: By product, the bias or mean that can take a constant added to its result.
    """

    jaxpr: Body
    consts: Sequence[Content]
    paths: tuple[str, ...]
    products: tuple[Product, ...]
    units: tuple[Unit, ...]
    bias_sites: dict[int, BiasSite]

    @property
    def first(self) -> frozenset[int]:
        """Numbers of the products that are the first to use their weights."""
        return frozenset(unit.uses[0] for unit in self.units)

    @staticmethod
    def product_of(eqn: Equation) -> int | None:
        """The number of the product that an equation stands for."""
        return eqn.params["number"] if eqn.primitive is product_p else None


product_p = core.Primitive("lcq_product")
"""A product with a followed parameter, as one equation."""
product_p.def_abstract_eval(lambda x, w, *rest, number, aval, extras: aval)
