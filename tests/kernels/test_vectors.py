"""That XLA makes vectors of the loops over words: looked for in the compiled program, as a time depends on more.

What may go wrong is seen in what XLA prints: a gather, a word that is written to memory before it is used, or a step of
the loop in several passes over the columns.
"""

import re

import jax
import jax.numpy as jnp
import pytest

from lcq.forms import Columns
from lcq.kernels.api import matmul

ROWS, COLUMNS = 256, 512
CASES = {  # width of a code, rows of a block, levels or None for equal steps
    "1 bit": (1, ROWS, None),
    "2 bits in groups": (2, 32, None),
    "4 bits": (4, ROWS, None),
    "4 bits in groups": (4, 32, None),
    "8 bits in groups": (8, 32, None),
    "codebooks of 4": (2, ROWS, 4),
    "codebooks of 16": (4, ROWS, 16),
    "codebooks of 16 in groups": (4, 128, 16),
}


def prepacked(width, block, levels):
    blocks = ROWS // block
    words = jnp.zeros((blocks, block * width // 32, COLUMNS), jnp.uint32)
    own = {"step": jnp.ones((blocks, COLUMNS)), "zero": jnp.ones((blocks, COLUMNS), jnp.uint8), "lowest": 0.0}
    if levels:
        own = {"levels": jnp.ones((blocks, levels, COLUMNS))}
    return Columns(words=words, width=width, tail=(ROWS, COLUMNS), axes=(0, 1), **own)


def body_of(text):
    """The lines of the one loop's body."""
    (name,) = set(re.findall(r" while\(.*body=%([\w.-]+)", text))
    return re.search(rf"^%{re.escape(name)} .*?^}}", text, re.MULTILINE | re.DOTALL).group().splitlines()


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_the_loop_is_one_fusion_over_all_columns(case):
    text = jax.jit(matmul).lower(jnp.zeros((1, ROWS)), prepacked(*CASES[case])).compile().as_text()
    assert " gather(" not in text
    wide = [line for line in body_of(text) if re.search(rf"= \w+\[(1,)?{COLUMNS}\]", line)]
    passes = [line for line in wide if not re.search(r" (get-tuple-element|bitcast|parameter)\(", line)]
    assert len(passes) == 1 and " fusion(" in passes[0]
