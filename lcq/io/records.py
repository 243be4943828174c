"""Trees of forms <-> named streams and a JSON record per leaf.

A leaf's record is one of

    {"path": ["layers", 0, "b"], "kinds": "asd", "array": "layers/0/b"}
    {"path": .., "kinds": .., "form": "Codes", "static": {"dtype": ..}, "arrays": {"codes": "layers/0/w.codes", ..}}
    {"path": .., "kinds": .., "empty": null}

`kinds` has a letter per key: d a dict's key, s a place in a sequence, a an attribute. "empty" keeps what holds nothing:
null, [] or {}. Of a form's fields,

    those marked `static()` are JSON values, a grid of consecutive whole numbers its two ends;
    an array is the name of a stream, or [name, shape] if another leaf stored it in another shape;
    a tuple is {"tuple": [..]}, a form in a form a record without path, and None is left out.

Leaves of a joint task name the same streams, except for fields of their own.
"""

import dataclasses
import functools
import math
import reprlib
import types
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lcq.forms.base import FORMS, Form, is_form
from lcq.forms.validate import named
from lcq.io.container import Json
from lcq.io.tree_paths import DEPTH, Leaf, is_empty

_NESTED = 8  # forms inside each other
_FAR = 1 << 31
_KEYS: dict[str, tuple[type, ...]] = {"d": (str, int), "s": (int,), "a": (str,)}


ReadStream = Callable[[str], jax.Array | np.ndarray | jax.ShapeDtypeStruct]
"""The array of a stream, or its shape and dtype, by name."""


class Encoder:
    """Turns leaves into records and collects their streams.

    Attributes:
        streams: arrays by name, in the order in which they came.
        codes: of the streams that are packed codes: among how many levels, and how many codes.
    """

    def __init__(self) -> None:
        self.streams: dict[str, np.ndarray] = {}
        self.codes: dict[str, tuple[int, int]] = {}
        self._names = {"__metadata__"}
        self._shared: dict[tuple[str, ...], tuple[str, Json, np.ndarray | None]] = {}

    def encode(self, leaf: Leaf) -> dict[str, Json]:
        """The record of a leaf: a host array, a stored form of host arrays, or an empty container.

        Raises:
            ValueError: a form that is not well-formed, a NaN or an infinity in a form, or leaves of a joint task that
                disagree in what they share; names the leaf.
        """
        where: dict[str, Json] = {"path": list(leaf.keys), "kinds": leaf.kinds}
        if is_form(leaf.value):
            with named(leaf.path):
                check_form(leaf.value)
            return where | self._form(leaf.path, "", leaf.value)
        if is_empty(leaf):
            empty: Json = None if leaf.value is None else [] if isinstance(leaf.value, list | tuple) else {}
            return where | {"empty": empty}
        return where | {"array": self._add(leaf.path, leaf.value)}

    def take(self) -> dict[str, np.ndarray]:
        """The streams that came since they were last taken, which are then no longer held; their names stay taken."""
        streams, self.streams = self.streams, {}
        return streams

    def _form(self, path: str, inside: str, form: Form) -> dict[str, Json]:
        if (kind := FORMS.name_of(type(form))) is None:
            raise ValueError(
                f"{path}: expected a form that files have a name for, got {type(form).__name__}; decorate its class by "
                "lcq.forms.register_form"
            )
        static, arrays = {}, {}
        shared = getattr(form, "shared", None)
        for field in dataclasses.fields(form):
            value, name = getattr(form, field.name), f"{inside}.{field.name}"
            if field.metadata.get("static"):
                if value is not None:
                    static[field.name] = _to_json(value)
                continue
            own = field.metadata.get("own") or not isinstance(value, np.ndarray | None)
            if shared is None or own:
                written = self._value(path, name, value)
            else:
                written = self._common(path, name, value, shared)
            if written is not None:
                arrays[field.name] = written
            if isinstance(written, str) and field.name in form.alphabets and form.alphabets[field.name][0] > 1:
                self.codes[written] = form.alphabets[field.name]
        return {"form": kind, "static": static, "arrays": arrays}

    def _value(self, path: str, name: str, value: PyTree) -> Json:
        if value is None:
            return None
        if is_form(value):
            return self._form(path, name, value)
        if isinstance(value, tuple):
            return {"tuple": [self._value(path, f"{name}.{i}", v) for i, v in enumerate(value)]}
        return self._add(path + name, value)

    def _common(self, path: str, name: str, value: np.ndarray | None, shared: str) -> Json:
        """What a joint task has in common: stored at the first of its leaves."""
        if (shared, name) not in self._shared:
            self._shared[shared, name] = (path, self._value(path, name, value), value)
        owner, written, first = self._shared[shared, name]
        if value is None or first is None:
            same = value is first
        else:
            same = value.dtype == first.dtype and value.tobytes() == first.tobytes()
        if not same:
            raise ValueError(
                f"{path}: expected the {name[1:]} of {owner}, which shares it (shared={shared!r}), got another; "
                "compress both leaves in one joint task, or set shared=None"
            )
        return written if value is None or first is None or value.shape == first.shape else [written, [*value.shape]]

    def _add(self, name: str, array: np.ndarray) -> str:
        while name in self._names:
            name += "'"
        self._names.add(name)
        self.streams[name] = array
        return name


def check_form(form: Form) -> None:
    """Raises ValueError unless a form is well-formed in the stored layout and its numbers are finite."""
    form.check_stored()
    for path, array in jax.tree_util.tree_flatten_with_path(form)[0]:
        if isinstance(array, np.ndarray) and jnp.issubdtype(array.dtype, jnp.floating):
            finite = np.isfinite(array.astype(np.float32) if array.dtype.itemsize < 4 else array)
            if not finite.all():
                name = jax.tree_util.keystr(path).lstrip(".")
                raise ValueError(f"{name}: expected finite numbers, got {int((~finite).sum())} NaN or infinite")


def count_streams(value: PyTree, seen: set[str], inside: str = "") -> int:
    """How many streams a leaf will take, as far as can be said before it is packed.

    Args:
        value: of the leaf, in either layout.
        seen: what joint leaves have in common and was counted; what is counted here is added.
        inside: of a form in a form, where.
    """
    if isinstance(value, tuple):
        return sum(count_streams(part, seen, f"{inside}.{i}") for i, part in enumerate(value))
    if not is_form(value):
        return int(value is not None)
    total = 0
    for field in dataclasses.fields(value):
        part, name = getattr(value, field.name), f"{inside}.{field.name}"
        whole = isinstance(part, tuple) or is_form(part)
        common = value.shared is not None and not (field.metadata.get("own") or whole)
        if field.metadata.get("static") or (common and value.shared + name in seen):
            continue
        if common:
            seen.add(value.shared + name)
        total += count_streams(part, seen, name)
    return total


def code_streams(record: Json, form: PyTree) -> dict[str, tuple[np.ndarray, int, int]]:
    """Of a leaf's record and value the streams that are packed codes: these, of how many levels, and how many codes."""
    if isinstance(form, tuple):
        parts = zip(record["tuple"], form, strict=True)
        return {name: codes for part in parts for name, codes in code_streams(*part).items()}
    found: dict[str, tuple[np.ndarray, int, int]] = {}
    for field, written in record["arrays"].items() if is_form(form) else ():
        value, (levels, count) = getattr(form, field), form.alphabets.get(field, (1, 0))
        if isinstance(written, str) and levels > 1:
            found[written] = (value, levels, count)
        elif isinstance(written, dict):
            found |= code_streams(written, value)
    return found


def decode(record: Json, stream: ReadStream) -> Leaf:
    """The leaf of a record.

    Args:
        record: what `encode` returned, or anything else that JSON can hold.
        stream: the array of a name, or its shape struct; raises ValueError if there is none.

    Raises:
        ValueError: anything that is not as the module says; names the leaf.
    """
    match record:
        case {"path": [*keys], "kinds": str(kinds), **body} if len(keys) == len(kinds) <= DEPTH:
            pass
        case _:
            raise ValueError(f"expected a leaf with its path and kinds, got {reprlib.repr(record)}")
    leaf = Leaf(tuple(keys), kinds, None)
    with named(leaf.path[:200]):
        if not all(type(key) in _KEYS.get(kind, ()) for key, kind in zip(keys, kinds, strict=True)):
            raise ValueError(f"expected keys of the kinds {kinds!r}, got {keys}")
        match body:
            case {"array": str(name), **rest} if not rest:
                return leaf._replace(value=stream(name))
            case {"empty": None | [] | {} as value, **rest} if not (rest or value):
                return leaf._replace(value=value)
        form = _decode_form(body, stream, _NESTED)
        check_form(form)
    return leaf._replace(value=form)


def _decode_form(record: Json, stream: ReadStream, depth: int) -> Form:
    match record:
        case {"form": str(name), "static": dict(static), "arrays": dict(arrays), **rest} if not rest and depth:
            static, arrays = dict(static), dict(arrays)
        case _:
            raise ValueError(f"expected a form with its static fields and arrays, got {reprlib.repr(record)}")
    cls, values = FORMS[name], dict[str, Any]()
    for field in dataclasses.fields(cls):
        is_static = field.metadata.get("static", False)
        written = (static if is_static else arrays).pop(field.name, None)
        if written is None and field.default is dataclasses.MISSING:
            raise ValueError(f"{name}: {field.name} is missing")
        if written is not None:
            value = _from_json(written) if is_static else _decode_value(written, stream, depth)
            if not _matches(value, hint := _hints(cls)[field.name]):
                raise ValueError(f"{name}: {field.name}: expected {hint}, got {reprlib.repr(value)}")
            values[field.name] = value
    if static or arrays:
        raise ValueError(f"{name}: expected its fields only, got {reprlib.repr([*static, *arrays])}")
    return cls(**values)


def _decode_value(written: Json, stream: ReadStream, depth: int) -> PyTree:
    match written:
        case str(name):
            return stream(name)
        case [str(name), [*shape]] if len(shape) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in shape):
            array = stream(name)
            if math.prod(shape) != math.prod(array.shape):
                raise ValueError(f"{name}: expected a stream that fits {shape}, got {list(array.shape)}")
            if isinstance(array, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(tuple(shape), array.dtype)
            return array.reshape(shape)
        case {"tuple": [*items], **rest} if not rest and depth:
            return tuple(_decode_value(item, stream, depth - 1) for item in items)
    return _decode_form(written, stream, depth - 1 if depth else 0)


def _to_json(value: Json) -> Json:
    if not isinstance(value, tuple):
        return value
    if len(value) > 2 and isinstance(value[0], float) and abs(value[0]) < _FAR and value[0].is_integer():
        first = int(value[0])
        if str(value) == str(tuple(float(first + i) for i in range(len(value)))):  # -0.0 == 0.0, but not as text
            return {"first": first, "last": first + len(value) - 1}
    return [_to_json(v) for v in value]


def _from_json(written: Json) -> Json:
    match written:
        case {"first": int(first), "last": int(last), **rest} if (
            not rest and abs(first) < _FAR and 0 <= last - first < 65536
        ):
            return tuple(float(v) for v in range(first, last + 1))
        case float() if not math.isfinite(written):
            raise ValueError(f"expected finite numbers, got {written}")
        case [*items]:
            return tuple(_from_json(item) for item in items)
    return written


@functools.cache
def _hints(cls: type) -> dict[str, object]:
    return typing.get_type_hints(cls)


def _matches(value: object, hint: object) -> bool:
    """Whether a value from a file has the type that a form's field is annotated with; Any means an array."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_matches(value, one) for one in arguments)
    if typing.get_origin(hint) is tuple and isinstance(value, tuple):
        each = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(each) == len(value) and all(map(_matches, value, each))
    if hint in (Any, jax.Array):
        return isinstance(value, np.ndarray | jax.Array | jax.ShapeDtypeStruct)
    return type(value) is hint or (hint is Form and is_form(value))
