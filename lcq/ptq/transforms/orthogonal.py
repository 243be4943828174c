"""Random orthogonal matrices: Hadamard's with random signs where there are, else any."""

import math

import jax
import numpy as np


def orthogonal(size: int, key: jax.Array) -> tuple[np.ndarray, str]:
    """A random orthogonal matrix, float64, and its kind.

        R = diag(signs) H / sqrt(size)

    H is Hadamard's: of Sylvester's doubling and of Paley's constructions, so of a power of two times 1 or 12, 20, 28,
    36, .. Of another size R is the Q of a Gaussian matrix.

    Args:
        size: of the matrix.
        key: of jax; the same gives the same matrix.

    Example:
        >>> matrix, kind = orthogonal(12, jax.random.key(0))
        >>> kind, bool(np.allclose(matrix @ matrix.T, np.eye(12))), len(np.unique(np.abs(matrix).round(12)))
        ('hadamard', True, 1)
        >>> orthogonal(7, jax.random.key(0))[1]
        'gaussian'

    Source: Ashkboos et al., arXiv 2404.00456, section 3; Paley, "On orthogonal matrices", 1933.
    """
    base = _hadamard(size)
    if base is not None:
        signs = np.where(np.asarray(jax.random.bernoulli(key, shape=(size,))), 1.0, -1.0)
        return signs[:, None] * base / math.sqrt(size), "hadamard"
    normal = np.asarray(jax.random.normal(key, (size, size)), np.float64)
    q, r = np.linalg.qr(normal)
    return q * np.sign(np.diag(r)), "gaussian"


def _hadamard(size: int) -> np.ndarray | None:
    """A small one doubled, as often as that is possible; None if there is none."""
    for power in range((size & -size).bit_length() - 1, -1, -1):
        small = _small(size >> power)
        if small is not None:
            for _ in range(power):
                small = np.block([[small, small], [small, -small]])
            return small
    return None


def _small(size: int) -> np.ndarray | None:
    """A Hadamard matrix of size 1, q + 1 or 2 (q + 1), q a prime of the right kind; None if there is none."""
    if size == 1:
        return np.ones((1, 1))
    if size % 4:
        return None
    if _is_prime(size - 1):  # then it is 3 modulo 4
        s = _with_border(_residues(size - 1), -1)
        return np.eye(size) + s
    q = size // 2 - 1
    if size % 2 == 0 and q % 4 == 1 and _is_prime(q):
        c = _with_border(_residues(q), 1)
        one = np.eye(q + 1)
        return np.block([[c + one, c - one], [c - one, -c - one]])
    return None


def _residues(q: int) -> np.ndarray:
    """Q_ij = 1 where i - j is a square modulo q, 0 where it is 0, else -1."""
    kinds = -np.ones(q)
    kinds[np.arange(1, q) ** 2 % q] = 1
    kinds[0] = 0
    return kinds[np.subtract.outer(np.arange(q), np.arange(q)) % q]


def _with_border(q: np.ndarray, sign: int) -> np.ndarray:
    made = np.zeros((len(q) + 1, len(q) + 1))
    made[0, 1:], made[1:, 0], made[1:, 1:] = 1, sign, q
    return made


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
