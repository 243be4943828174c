"""Forms and trees to save, what compares them bit for bit, and files that are forged."""

import copy
import json
import struct

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from lcq.forms import Cast, Codes
from lcq.forms.base import is_form
from lcq.io import container


def same(a, b):
    """Bit for bit: class, dtype, shape, bytes, and every static field."""
    if is_form(a):
        assert type(a) is type(b)
        a_fields, b_fields = vars(a), vars(b)
        assert a_fields.keys() == b_fields.keys()
        for name in a_fields:
            same(a_fields[name], b_fields[name])
    elif hasattr(a, "dtype"):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert type(a) is type(b) and a == b and str(a) == str(b)


@st.composite
def codes_fields(draw):
    """Fields of `Codes` of every shape: learned or fixed tables, blocks, scales, zeros, dtypes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    k = draw(st.one_of(st.integers(1, 9), st.integers(1, 300)))
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=4)))
    counts = tuple(draw(st.sampled_from([c for c in range(1, n + 1) if n % c == 0])) for n in shape)
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    fields = {"codes": rng.integers(0, k, shape).astype(np.uint8 if k <= 256 else np.uint16), "dtype": dtype}
    if draw(st.booleans()):
        fields["levels"] = np.sort(rng.normal(size=(*counts, k)), axis=-1).astype(jnp.dtype(dtype))
    else:
        first = draw(st.sampled_from([-3.0, 0.0, 0.25, -0.0]))
        fields["values"] = tuple(first + i for i in range(k))
    for name in ("scale", "zero"):
        if draw(st.booleans()):
            fields[name] = rng.normal(size=counts).astype(np.float32)
    return fields


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(3, 5)).astype(np.float32)
    table = jnp.array([[[-1.0, 0.0, 2.0]]])
    return {
        "dense0": {
            "kernel": Codes(jnp.asarray(rng.integers(0, 3, (6, 4)), jnp.uint8), table, shared="dense0/kernel"),
            "bias": Cast(jnp.asarray(w[0], jnp.bfloat16)),
        },
        "dense1": Codes(jnp.asarray(rng.integers(0, 3, (9,)), jnp.uint8), table.reshape(1, 3), shared="dense0/kernel"),
        "plain": [w, (jnp.asarray(w, jnp.bfloat16), None), ()],
        "step": jnp.int32(7),
    }


def parts_of(data):
    """Header, index and streams of a file."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["index"]), data[8 + length :]


def forge(header, index, streams):
    """A file with right digests of the header and, where the header points into the streams, of these."""
    index = copy.deepcopy(index)
    for name, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            index["digests"][name] = container.digest(streams[begin:end])
        except (KeyError, TypeError, ValueError):
            pass
    metadata = header["__metadata__"] | {"index": json.dumps(index), "digest": "0" * 32}
    raw = json.dumps(header | {"__metadata__": metadata})
    raw = (raw + " " * (-len(raw) % 8)).encode()
    raw = raw.replace(b"0" * 32, container.digest(raw).encode())
    return struct.pack("<Q", len(raw)) + raw + streams
