"""The largest weight of a term that a net bears, found by short runs: which lambda_H for which net."""

import math
from collections.abc import Callable
from typing import NamedTuple


class Trial(NamedTuple):
    """A short run: the weight, and its score."""

    weight: float
    score: float


class Weighed(NamedTuple):
    """What `largest_weight` found.

    Attributes:
        weight: The largest weight of a run whose score was not above the limit.
        trials: Every run, in order.
    """

    weight: float
    trials: tuple[Trial, ...]


def largest_weight(
    score: Callable[[float], float], limit: float, *, start: float = 1.0, factor: float = 1.2, most: int = 12
) -> Weighed:
    """Doubles a weight while the score stays within the limit, halves it while it does not, then goes between.

        max weight  s.t.  score(weight) <= limit,    to within `factor`

    For `hemp`'s lambda_H, whose right value differs between nets by orders of magnitude and has an edge, above which
    all weights of a leaf go to one level: there score is the error on held-back data of the net compressed by
    `lcq.extract` after a few epochs, which is enough to see the edge. The score should rise with the weight; where it
    is noisy, limit and `factor` say how much that matters.

    Args:
        score: weight -> a number, smaller is better; a short run. NaN counts as above the limit.
        limit: the largest score that will do.
        start: the first weight, > 0.
        factor: > 1; ends when a weight that will do and one that will not are as near as this.
        most: runs at most.

    Raises:
        ValueError: settings out of range; no weight will do in `most` runs, halved each time.

    Example:
        >>> found = largest_weight(lambda weight: weight**2, 10.0)
        >>> round(found.weight, 2), [round(trial.weight, 2) for trial in found.trials]
        (2.83, [1.0, 2.0, 4.0, 2.83, 3.36])

    Source: the bracketing of backtracking line searches, Nocedal & Wright, Numerical Optimization, section 3.1.
    """
    if not (0 < start < math.inf and 1 < factor < math.inf and most >= 1):
        raise ValueError(f"expected start > 0, factor > 1 and most >= 1, got {start}, {factor}, {most}")
    if math.isnan(limit):
        raise ValueError("expected a limit, got NaN, which no score stays within; look at what it is made of")
    trials: list[Trial] = []
    good, bad = 0.0, math.inf
    weight = float(start)
    while len(trials) < most and bad > factor * good:
        trials.append(Trial(weight, float(score(weight))))
        if trials[-1].score <= limit:
            good = weight
        else:
            bad = weight
        weight = 2 * good if bad == math.inf else bad / 2 if good == 0 else math.sqrt(good * bad)
    if good == 0:
        tried = ", ".join(f"{trial.weight:g}: {trial.score:g}" for trial in trials)
        raise ValueError(
            f"expected a weight with a score of at most {limit:g}, got none in {most} runs ({tried}); raise the limit, "
            "which score(0) should be well below, or take a smaller start"
        )
    return Weighed(good, tuple(trials))
