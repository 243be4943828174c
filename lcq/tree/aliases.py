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

OptState = TypeAliasType("OptState", Any)
"""The state of an optimizer, with those of wrappers anywhere inside."""

Function = TypeAliasType("Function", Callable[[Any, Any], Any])
"""A function of (params, batch)."""
