"""Bad replies are dropped before they can end a run or spoil the model."""

from collections.abc import Mapping

import numpy as np

from fedmed.records import Receipt
from strategies.base import Arrays, Update


def problem(delta: Arrays, expected: Arrays) -> str | None:
    """Why an update cannot be used, or None."""
    if delta.keys() != expected.keys():
        return "misnamed arrays"
    if any(delta[name].shape != values.shape for name, values in expected.items()):
        return "misshapen arrays"
    if any(delta[name].dtype != np.float32 for name in expected):
        return "arrays of another type than float32"
    if not all(np.isfinite(values).all() for values in delta.values()):
        return "non-finite values"
    return None


def norm(delta: Arrays) -> float:
    """The L2 norm of a whole update, in float64."""
    return float(np.sqrt(sum(np.sum(values.astype(np.float64) ** 2) for values in delta.values())))


def good_updates(
    replies: Mapping[str, tuple[Receipt, Arrays]],
    expected: Arrays,
    *,
    round: int,
    weights: Mapping[str, int],
    norm_bound: float = 0.0,
    noise_draws: int | None = None,
) -> tuple[dict[str, Update], dict[str, str]]:
    """The usable updates, and why each other site's reply was dropped.

    Args:
        weights: declared sizes; a receipt that says otherwise is dropped, so that no site can weigh itself.
        norm_bound: drop updates with a larger L2 norm; 0: no bound.
        noise_draws: how often a round adds noise; a receipt that says otherwise is dropped.
    """
    good: dict[str, Update] = {}
    dropped: dict[str, str] = {}
    for site, (receipt, delta) in sorted(replies.items()):
        reason = problem(delta, expected)
        if reason is None and receipt.round != round:
            reason = f"an answer to round {receipt.round}"
        if reason is None and receipt.declared_size != weights[site]:
            reason = "another declared size than the run's"
        if reason is None and noise_draws is not None and receipt.noise_draws != noise_draws:
            reason = f"{receipt.noise_draws} noise draws instead of {noise_draws}"
        if reason is None and norm_bound and norm(delta) > norm_bound:
            reason = f"norm {norm(delta):.3g} above strategy.norm_bound={norm_bound:g}"
        if reason is None:
            good[site] = Update(delta, weights[site])
        else:
            dropped[site] = reason
    return good, dropped
