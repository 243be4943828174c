"""How far a run of `lc` or `hemp` is: scalars for a logger."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lcq.training.collapse import NEARLY_ALL, warn_of_lost
from lcq.training.given import RESTORED
from lcq.training.hemp import find_hemp, hemp_states
from lcq.training.lc import find_lagrangian, lagrangians
from lcq.tree.aliases import OptState


def metrics(opt_state: OptState) -> dict[str, Array | np.ndarray]:
    """Scalars for a logger, of the last C step of `lc` (of direct compression before the first) or update of `hemp`.

    Args:
        opt_state: an optimizer state with one LC state anywhere inside, or one of `hemp`, or one of each.

    Returns:
        Of `lc`:

        gap: ||w - Delta(Theta)||^2 / ||w||^2 over the selected leaves, the measure of convergence.
        distortion: ||x - Delta(Theta)||^2 with x = w - lambda/mu, what the C step minimised.
        multiplier_norm: ||lambda||.
        kept_back: projections dropped because they were farther from x than the Theta before.
        skipped: C steps not made because weights were not finite.
        penalty_weight: mu of the current L step.
        c_steps: C steps made.

        Of `hemp`, at the parameters that its last update was given:

        entropy: H_n in bits per weight; before the first update its bound.
        largest_share: the worst leaf's share of weights nearest to one level, or of blocks of n weights that are alike.
        collapsed: how many leaves have a share of more than 99 %.

    Raises:
        ValueError: no state of either, several of one, or one that was restored without its types.

    Warns:
        UserWarning: more than 99 % of a leaf's weights are nearest to one level, or of its blocks alike; names it. Not
            in a trace.

    Example:
        >>> import lcq, optax
        >>> w = {"kernel": jnp.array([0.0, 0.1, 0.9, 1.0])}
        >>> tx = lcq.hemp(optax.sgd(0.1), [lcq.Rule("kernel", lcq.KMeans(2))], order=1, small=0)
        >>> _, state = tx.update(w, tx.init(w), w)
        >>> {name: float(value) for name, value in metrics(state).items() if name != "entropy"}
        {'largest_share': 0.5, 'collapsed': 0.0}
    """
    found: dict[str, Array | np.ndarray] = {}
    with_hemp = bool(hemp_states(opt_state))
    with_lc = bool(lagrangians(opt_state))
    if not with_lc and not with_hemp:
        raise ValueError(
            "expected a state of lc or hemp in the optimizer state, got none: was the optimizer made by lcq.lc or "
            f"lcq.hemp? {RESTORED}"
        )
    if with_lc:
        state = find_lagrangian(opt_state)
        weight = state.problem.mu.at(state.c_steps)
        found |= {**state.info._asdict(), "penalty_weight": weight, "c_steps": state.c_steps}
    if with_hemp:
        entropies = find_hemp(opt_state)
        shares = {
            path: share
            for task, of_task in zip(entropies.tasks, entropies.shares, strict=True)
            for path, share in zip(task.paths, of_task, strict=True)
        }
        warn_of_lost(shares, stacklevel=3)
        each = jnp.stack(list(map(jnp.asarray, shares.values())))
        largest, collapsed = each.max(0), jnp.sum(each > NEARLY_ALL, 0, dtype=jnp.int32)
        found |= {"entropy": entropies.entropy, "largest_share": largest, "collapsed": collapsed}
    return found
