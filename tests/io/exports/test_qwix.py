"""qwix's arrays: codes of the form in int4 and int8, the same weights, and what is refused."""

import numpy as np
import pytest

import lcq
from lcq.io import to_qwix
from tests.io.exports.made import codes, grid


def dense(array):
    """(qvalue - zero_point) scale, tile by tile."""
    whole = array["qvalue"].astype(np.float64)
    for name in ("zero_point", "scale"):
        if name in array:
            number = array[name].astype(np.float64)
            for axis, n in enumerate(whole.shape):
                number = np.repeat(number, n // number.shape[axis], axis)
            whole = whole - number if name == "zero_point" else whole * number
    return whole


@pytest.mark.parametrize(
    ("values", "zeros", "dtype"),
    [
        (grid(-8, 7), False, "int4"),
        (grid(-4, 3), False, "int4"),
        (grid(0, 15), True, "int4"),
        (grid(-128, 127), False, "int8"),
        (grid(0, 255), True, "int8"),
        (grid(0, 3), True, "int4"),
        (grid(0, 31), True, "int8"),
        (grid(-2, 1), False, "int4"),
        (grid(-16, 15), False, "int8"),
        ((-1.0, 1.0), False, "int4"),
        (grid(-1, 2), False, "int4"),
    ],
)
def test_arrays_are_the_same_weights(values, zeros, dtype):
    form, wanted = codes((3, 64, 8), (3, 2, 8), values, zeros=zeros)
    made = to_qwix({"layers": {"kernel": form.pack()}, "bias": np.ones(3), "cast": lcq.forms.Cast(np.ones(2, "f2"))})
    array = made["layers"]["kernel"]["array"]
    assert str(array["qvalue"].dtype) == dtype and array["scale"].shape == (3, 2, 8)
    np.testing.assert_allclose(dense(array), wanted, rtol=1e-6)
    assert (made["cast"] == 1).all() and (made["bias"] == 1).all()


def test_what_is_refused():
    with pytest.raises(ValueError, match="kernel: expected codes of at most 8 bits, got 9"):
        to_qwix({"kernel": codes((64, 8), (1, 1), grid(-256, 255))[0]})
    with pytest.raises(
        ValueError, match=r"kernel: expected codes on a grid .* call lcq.decompress on it first, 16 bytes"
    ):
        to_qwix({"kernel": lcq.forms.Sparse(np.eye(2) > 0, np.ones((2, 2), np.float32))})
    table = lcq.forms.Codes(np.uint8([[0, 1, 2]]), levels=np.float32([[[-1, 0.3, 2]]]))
    with pytest.raises(ValueError, match=r"kernel: expected levels .* of their norm: compress with lcq.Uniform$"):
        to_qwix({"kernel": table})
