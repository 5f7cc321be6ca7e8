"""Lower bounds on epsilon from how many guesses of one training run were right.

Source: Steinke, Nasr and Jagielski (2023), Privacy Auditing with One (1) Training Run.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

# Beyond it no number of guesses in one run tells two epsilons apart.
LARGEST = 50.0


def p_value(*, canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """At most this probable is it that `right` or more of the guesses are right, of an (epsilon, delta)-DP
    mechanism with `canaries` examples of which each was included by a fair coin (Theorem 3.1, Appendix D)."""
    chance = 1 / (1 + math.exp(-epsilon))
    tail = float(stats.binom.sf(right - 1, guesses, chance))
    below = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, chance))
    steepest = float((below / np.arange(1, right + 1)).max()) if right else 0.0
    return min(1.0, tail + 2 * canaries * delta * steepest)


@lru_cache(maxsize=1024)
def lower_bound(*, canaries: int, guesses: int, right: int, delta: float, confidence: float) -> float:
    """An epsilon that the mechanism's epsilon at `delta` exceeds with at least this confidence; 0 where
    nothing can be said."""

    def rejected(epsilon: float) -> bool:
        value = p_value(canaries=canaries, guesses=guesses, right=right, epsilon=epsilon, delta=delta)
        return value < 1 - confidence

    low, high = 0.0, LARGEST
    if not rejected(low):
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def right_guesses(scores: NDArray[np.float64], included: NDArray[np.bool_], *, guesses: int) -> int:
    """How many are right when the `guesses` / 2 highest scores are guessed to be included and as many of the
    lowest to be left out, and all others are abstained from (Algorithm 1).

    Args:
        scores: (canaries,), not NaN.
        included: (canaries,), the secret coins.
    """
    order = np.argsort(scores, kind="stable")
    half = guesses // 2
    return int((~included[order[:half]]).sum() + included[order[len(order) - half :]].sum())
