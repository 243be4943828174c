"""Names of what public functions take and return, so that their signatures can be read.

Each is any tree of jax; what is in it, the name says.
"""

from collections.abc import Callable
from typing import Any

from typing_extensions import TypeAliasType

Params = TypeAliasType("Params", Any)
"""A tree of arrays, the parameters of a function."""

Forms = TypeAliasType("Forms", Any)
"""A tree of parameters with forms in place of some arrays."""

Batch = TypeAliasType("Batch", Any)
"""A tree of arrays, one batch of a function's data."""

Leaves = TypeAliasType("Leaves", dict[str, Any])
"""What is at the leaves of a tree, by path: arrays, forms, or what stands for them."""

OptState = TypeAliasType("OptState", Any)
"""The state of an optimizer, with those of wrappers anywhere inside."""

ExtraArgs = TypeAliasType("ExtraArgs", dict[str, Any])
"""What an optimizer's `update` is given beside gradients, state and parameters, by name."""

Function = TypeAliasType("Function", Callable[[Any, Any], Any])
"""A function of (params, batch)."""
