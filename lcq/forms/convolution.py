"""Which integers may come next: a convolutional code, driven by one bit of each.

A state s of m bits holds the last m bits u. A parity of some of them says whether an even integer comes or an odd
one; the integer's next bit, with another parity, is the new u:

    c_i mod 2 = parity(s_i & a)      u_i = parity(s_i & b) xor (c_i div 2) mod 2      s_{i+1} = (2 s_i + u_i) mod 2^m

and s_0 = 0. So integers fall into four sets, c mod 4; a state leaves two of them, which together are every other
integer, and paths that part are far from each other until they meet again: of codes of as many states those of largest
distance are taken. a and b are the polynomials h1(D) and h0(D) without D^0.

Source: Ungerboeck, IEEE Trans. IT 28 (1982), table I, and IEEE Comm. Mag. 25 (1987); for quantization: Marcellin &
Fischer, IEEE Trans. Comm. 38 (1990).
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Integer

POLYNOMIALS = {
    2: (0o5, 0o2),
    3: (0o13, 0o4),
    4: (0o23, 0o4),
    5: (0o45, 0o10),
    6: (0o103, 0o24),
    7: (0o235, 0o126),
    8: (0o515, 0o362),
}
"""h0 and h1, by the bits of a state: the coefficient of D^i is bit i."""


def is_odd(states: Int[Array, "*s"], memory: int) -> Int[Array, "*s"]:
    """Whether an odd integer comes after each state: 1 or 0.

    Example:
        >>> is_odd(jnp.arange(4), 2).tolist()
        [0, 1, 0, 1]
    """
    return lax.population_count(states & (POLYNOMIALS[memory][1] >> 1)) & 1


def flips(states: Int[Array, "*s"], memory: int) -> Int[Array, "*s"]:
    """What the second bit of the next integer is added to: 1 or 0.

    Example:
        >>> flips(jnp.arange(4), 2).tolist()
        [0, 0, 1, 1]
    """
    return lax.population_count(states & (POLYNOMIALS[memory][0] >> 1)) & 1


def next_states(states: Int[Array, "*s"], codes: Int[Array, "*s"], memory: int) -> Int[Array, "*s"]:
    """The states behind some integers.

    Example:
        >>> next_states(jnp.array([0, 0, 3]), jnp.array([0, 2, 1]), 2).tolist()
        [0, 1, 3]
    """
    bit = flips(states, memory) ^ (codes >> 1 & 1)
    return (2 * states + bit) & ((1 << memory) - 1)


def merged(
    even: Integer[Array, " e"], odd: Integer[Array, " o"], length: int, paths: int, memory: int
) -> Int[Array, "length paths"]:
    """Integers out of their halves, c div 2, the even ones and the odd ones apart; paths go side by side, and of every
    row the first path comes first.

    Args:
        even: halves of even integers.
        odd: of odd ones.
        length: integers of a path.
        paths: how many there are.
        memory: bits of a state.

    Example:
        >>> merged(jnp.array([1, 5]), jnp.array([2]), 3, 1, 2)[:, 0].tolist()
        [2, 5, 10]
    """
    streams = [jnp.pad(a.astype(jnp.int32), (0, 1)) for a in (even, odd)]  # one more: a path may have no odd integer

    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        states, taken = carry
        kind = is_odd(states, memory)
        before = jnp.cumsum(kind)
        places = (taken[0] + jnp.arange(1, paths + 1) - before - 1, taken[1] + before - 1)
        codes = jnp.where(kind == 1, 2 * streams[1][places[1]] + 1, 2 * streams[0][places[0]])
        return (next_states(states, codes, memory), taken + jnp.stack([paths - before[-1], before[-1]])), codes

    start = jnp.zeros(paths, jnp.int32), jnp.zeros(2, jnp.int32)
    return lax.scan(step, start, length=length)[1]


def branches(memory: int) -> tuple[np.ndarray, np.ndarray]:
    """`is_odd` and `flips` of all states, in numpy."""
    states, (flip, odd) = np.arange(1 << memory), POLYNOMIALS[memory]
    found = [np.bitwise_count(states & (polynomial >> 1)) & 1 for polynomial in (odd, flip)]
    return found[0], found[1]
