"""Epsilon as people read it: never less than it is."""

import math


def round_up(epsilon: float, digits: int = 2) -> float:
    """Epsilon as printed: never less than what was spent.

    >>> round_up(2.9912)
    3.0
    """
    scale = 10**digits
    # The small slack keeps 3.0 (stored as 3.0000000000000004) from being printed as 3.01.
    return math.ceil(epsilon * scale - 1e-9) / scale if math.isfinite(epsilon) else epsilon


def belief_in_words(epsilon: float, unit: str) -> str:
    """Epsilon as what an attacker can learn: from even odds to at most e^epsilon / (1 + e^epsilon)."""
    percent, article = belief_percent(epsilon), "an" if unit == "image" else "a"
    return f"Someone half sure that {article} {unit} took part can become at most {percent:g}% sure (up to delta)."


def belief_percent(epsilon: float) -> float:
    """e^epsilon / (1 + e^epsilon) in percent, rounded up: never less than the bound."""
    # Written so that a large epsilon does not overflow.
    odds = 100 / (1 + math.exp(-epsilon))
    scale = 10 if odds < 99 else 100
    return math.ceil(odds * scale) / scale
