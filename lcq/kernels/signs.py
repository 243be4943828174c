"""Signs: weights of +1 and -1, prepacked for products with packed signs."""

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from lcq.forms.column_words import pack_columns, pack_signs
from lcq.forms.dtypes import own_promotion
from lcq.forms.serialization import register_node
from lcq.kernels import xnor_xla

Platform = Literal["xla", "tpu", "gpu"]


@functools.partial(register_node, static=("size", "count", "platform"))
@functools.partial(jax.tree_util.register_dataclass, data_fields=["words"], meta_fields=["size", "count", "platform"])
@dataclasses.dataclass(frozen=True)
class Signs:
    """A matrix of signs as one platform reads it. Made by `signs`.

    Attributes:
        words: The bits: tiles of `xnor_xla` for "xla", else words that run down the columns.
        size: The rows of the matrix, K.
        count: The columns of the matrix, n.
        platform: The platform that the words are laid out for.
    """

    words: Any
    size: int
    count: int
    platform: Platform


@own_promotion()
def signs(w: Shaped[Array, "k n"], platform: Platform | None = None) -> Signs:
    """Prepacks the signs of a matrix, +1 where w >= 0, once when a net is loaded.

    Args:
        w: weights.
        platform: the platform they are for; None is the one that JAX runs on.

    Raises:
        ValueError: w that are no matrix, another platform.

    Example:
        >>> signs(jnp.array([[1.0, -1.0], [-1.0, -1.0], [1.0, 1.0]]), "gpu").words
        Array([[5, 4]], dtype=uint32)
    """
    here: dict[str, Platform] = {"tpu": "tpu", "gpu": "gpu"}
    platform = here.get(jax.default_backend(), "xla") if platform is None else platform
    if w.ndim != 2 or platform not in get_args(Platform):
        raise ValueError(
            f"expected a matrix [K, n], and a platform of {', '.join(get_args(Platform))} or None, "
            f"got {list(w.shape)} and {platform!r}"
        )
    words = xnor_xla.tile(pack_signs(w.T)) if platform == "xla" else pack_columns((w >= 0).astype(jnp.uint8), 1)
    return Signs(words, w.shape[0], w.shape[1], platform)
