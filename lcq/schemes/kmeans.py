"""Learned codebooks: one-dimensional k-means."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lcq.base import Cut, Form, Per, Scheme, block_counts, cut
from lcq.forms import Codes
from lcq.schemes.histogram import summarise
from lcq.schemes.lloyd import Centres, Points, descend, lloyd_pass

_COLD = 100
"""Lloyd passes over the histogram."""

_WARM = 3
"""Lloyd passes over the data, between a first one that looks for empty cells and a last one that gives the codes."""
