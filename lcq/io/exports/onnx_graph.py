"""An ONNX model of the dense function, as bytes: where its weights are used, and nodes that take codes instead.

Source: onnx.proto3 of onnx 1.19, and ContribOperators.md of onnxruntime 1.32, com.microsoft.MatMulNBits.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lcq.io.layouts.protobuf import Field, field, fields, read_varint

GRAPH, OPSETS = 7, 8
NODE, INITIALIZER, INPUT = 1, 5, 11
MICROSOFT = "com.microsoft"


class Node(NamedTuple):
    """A node of a graph.

    Attributes:
        inputs: names; "" for one that is left out.
        outputs: names.
        op: its type.
        attributes: whole numbers, floating-point ones and texts by name.
        inner: names that its inner graphs use.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    op: str
    attributes: dict[str, int | float | str]
    inner: frozenset[str]


def text(value: int | memoryview) -> str:
    """A string field.

    Raises:
        ValueError: a number, or bytes that are no text.
    """
    if isinstance(value, int):
        raise ValueError(f"expected a text, got the number {value}: damaged")
    return bytes(value).decode()


def node_of(message: memoryview) -> Node:
    """A NodeProto."""
    found = list(fields(message))
    attributes: dict[str, int | float | str] = {}
    inner: set[str] = set()
    for each in (list(fields(_bytes(f))) for f in found if f.number == 5):
        name = next(text(f.value) for f in each if f.number == 1)
        for f in each:
            if f.number == 2:
                attributes[name] = float(memoryview(_bytes(f)).cast("B").cast("f")[0])
            elif f.number == 3 and isinstance(f.value, int):
                attributes[name] = f.value
            elif f.number == 4:
                attributes[name] = text(f.value)
            elif f.number in (6, 11):
                inner |= {name for node in nodes_of(_bytes(f)) for name in (*node.inputs, *node.inner)}
    inputs, outputs = (tuple(text(f.value) for f in found if f.number == number) for number in (1, 2))
    op = next((text(f.value) for f in found if f.number == 4), "")
    return Node(inputs, outputs, op, attributes, frozenset(inner))


def nodes_of(graph: memoryview) -> Iterator[Node]:
    """The nodes of a GraphProto."""
    return (node_of(_bytes(f)) for f in fields(graph) if f.number == NODE)


class Holder(NamedTuple):
    """What a model says of an array that an initializer holds, or an input is.

    Attributes:
        type: number of its elements' type; 0 if it says none.
        shape: None if it says none; of an axis whose length is not said, None.
        outside: whether its numbers are in another file.
    """

    type: int
    shape: tuple[int | None, ...] | None
    outside: bool = False


def holder_of(entry: Field) -> Holder:
    """What an initializer or an input is."""
    found = list(fields(_bytes(entry)))
    if entry.number == INITIALIZER:
        shape = tuple(n for f in found if f.number == 1 for n in _numbers(f))
        return Holder(_number(found, 2), shape, _number(found, 14) == 1)
    inner = next((list(fields(_bytes(f))) for f in found if f.number == 2), [])
    tensor = next((list(fields(_bytes(f))) for f in inner if f.number == 1), [])
    axes = next(
        ([list(fields(_bytes(a))) for a in fields(_bytes(f)) if a.number == 1] for f in tensor if f.number == 2), None
    )
    return Holder(_number(tensor, 1), None if axes is None else tuple(_number(axis, 1) or None for axis in axes))


def _number(message: Sequence[Field], number: int) -> int:
    return next((f.value for f in message if f.number == number and isinstance(f.value, int)), 0)


def _numbers(entry: Field) -> Iterator[int]:
    """Of a repeated field, whose numbers are fields or lie packed in one."""
    if isinstance(entry.value, int):
        yield entry.value
        return
    at = 0
    while at < len(entry.value):
        number, at = read_varint(entry.value, at)
        yield number


def name_of(entry: Field) -> str:
    """The name of an initializer or an input."""
    number = 8 if entry.number == INITIALIZER else 1
    return next((text(f.value) for f in fields(_bytes(entry)) if f.number == number), "")


def _bytes(entry: Field) -> memoryview:
    if isinstance(entry.value, int):
        raise ValueError(f"expected bytes of field {entry.number}, got the number {entry.value}: damaged")
    return entry.value


def opset_of(model: Sequence[Field]) -> int:
    """The version of ONNX's own operators that a ModelProto uses; 1 if it says none."""
    for entry in (list(fields(_bytes(f))) for f in model if f.number == OPSETS):
        if not any(f.number == 1 and text(f.value) for f in entry):
            return next((f.value for f in entry if f.number == 2 and isinstance(f.value, int)), 1)
    return 1


def is_product(node: Node, name: str) -> bool:
    """Whether a node is x W for a weight of a name, W [in, out], or of Gemm [out, in], and x [.., in]."""
    if node.inputs[1:2] != (name,) or node.inputs.count(name) > 1 or name in node.inner:
        return False
    if node.op == "Gemm":
        return not node.attributes.get("transA", 0) and all(node.attributes.get(k, 1) == 1 for k in ("alpha", "beta"))
    if node.op == "Einsum":
        found = re.fullmatch(r"(\w*)(\w),\2(\w)->\1\3", str(node.attributes.get("equation", "")).replace(" ", ""))
        return found is not None and len(set("".join(found.groups()))) == len(found[1]) + 2
    return node.op == "MatMul"


def is_turned(node: Node) -> bool:
    """Whether a product has its weight as [out, in]."""
    return node.op == "Gemm" and bool(node.attributes.get("transB", 0))


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: int) -> bytes:
    """A field of a graph with a node."""
    parts = [field(1, name) for name in inputs] + [field(2, name) for name in outputs] + [field(4, op)]
    parts += [field(5, field(1, key) + field(3, value) + field(20, 2)) for key, value in attributes.items()]
    return field(NODE, b"".join(parts) + (field(7, domain) if domain else b""))
