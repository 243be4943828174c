"""Rounding to nearest is the projection of the scheme."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lcq.ptq.rounding.rtn import RTN
from tests.ptq.rounding.oracles import SCHEMES, standard


@pytest.mark.parametrize("name", SCHEMES)
def test_rtn_is_the_projection(name):
    (w, _, _), statistics = standard()
    form = SCHEMES[name].project(jnp.asarray(w))
    again = RTN().codes(jnp.asarray(w), statistics, dataclasses.replace(form, codes=form.codes * 0))
    np.testing.assert_array_equal(again.codes, form.codes)
