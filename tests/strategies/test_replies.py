"""Which updates are used: what is wrong with a reply is found by looking at it, not by trusting it."""

from typing import Any

import numpy as np
import pytest

from fedmed.records import Receipt
from strategies.base import Arrays
from strategies.replies import Checks, norm

EXPECTED = {"w": np.zeros((2, 3), np.float32), "b": np.zeros((), np.float32)}
WEIGHTS = {"a": 100, "b": 50}


def receipt(site: str = "a", **changes: int) -> Receipt:
    values = {"round": 4, "declared_size": WEIGHTS[site], "noise_draws": 2} | changes
    return Receipt(site=site, **values)


def delta(**changes: np.ndarray) -> Arrays:
    return {"w": np.ones((2, 3), np.float32), "b": np.float32(1).reshape(()), **changes}


def filled(value: float) -> np.ndarray:
    values = np.ones((2, 3), np.float32)
    values[1, 2] = value
    return values


def without(name: str) -> Arrays:
    return {key: values for key, values in delta().items() if key != name}


BAD: dict[str, tuple[Receipt, Arrays, str]] = {
    "one NaN": (receipt(), delta(w=filled(np.nan)), "non-finite"),
    "one infinity": (receipt(), delta(w=filled(np.inf)), "non-finite"),
    "one minus infinity": (receipt(), delta(w=filled(-np.inf)), "non-finite"),
    "transposed": (receipt(), delta(w=np.ones((3, 2), np.float32)), "misshapen"),
    "one axis more": (receipt(), delta(w=np.ones((1, 2, 3), np.float32)), "misshapen"),
    "would broadcast": (receipt(), delta(w=np.ones((1, 3), np.float32)), "misshapen"),
    "empty": (receipt(), delta(w=np.ones((0, 3), np.float32)), "misshapen"),
    "a vector for a scalar": (receipt(), delta(b=np.ones(1, np.float32)), "misshapen"),
    "an array missing": (receipt(), without("w"), "misnamed"),
    "an array more": (receipt(), delta(other=np.ones(1, np.float32)), "misnamed"),
    "no array at all": (receipt(), {}, "misnamed"),
    "another name": (receipt(), {"W": delta()["w"], "b": delta()["b"]}, "misnamed"),
    "float64": (receipt(), delta(w=np.ones((2, 3))), "another type"),
    "float16": (receipt(), delta(w=np.ones((2, 3), np.float16)), "another type"),
    "whole numbers": (receipt(), delta(w=np.ones((2, 3), np.int32)), "another type"),
    "complex numbers": (receipt(), delta(w=np.ones((2, 3), np.complex64)), "another type"),
    "text": (receipt(), delta(w=np.full((2, 3), "1")), "another type"),
    "the other byte order": (receipt(), delta(w=np.ones((2, 3), ">f4")), "another type"),
    "the last round": (receipt(round=3), delta(), "an answer to round 3"),
    "a round to come": (receipt(round=5), delta(), "an answer to round 5"),
    "an inflated size": (receipt(declared_size=100_000), delta(), "another declared size"),
    "a smaller size": (receipt(declared_size=99), delta(), "another declared size"),
    "half of the noise": (receipt(noise_draws=1), delta(), "1 noise draws instead of 2"),
    "noise that was not asked for": (receipt(noise_draws=3), delta(), "3 noise draws instead of 2"),
    "too large": (receipt(), delta(w=filled(1e6)), "norm 1e+06 above 10 (strategy.norm_bound"),
    "too large for float32's square": (receipt(), delta(w=filled(3e38)), "norm 3e+38 above"),
}


def checks(**changes: Any) -> Checks:
    values = {"expected": EXPECTED, "round": 4, "weights": WEIGHTS, "norm_bounds": {}} | changes
    return Checks(**values)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reply_is_dropped_and_the_others_are_used(name: str) -> None:
    bad, sent, reason = BAD[name]
    held = checks(norm_bounds=dict.fromkeys(WEIGHTS, 10.0), noise_draws=2)
    assert held.reason("b", receipt("b"), delta()) is None
    assert reason in (held.reason("a", bad, sent) or "")


def test_a_site_without_a_bound_has_none() -> None:
    for bounds, kept in (({}, True), ({"b": 1.0}, True), ({"a": 1.0}, False)):
        found = checks(norm_bounds=bounds).reason("a", receipt(), delta(w=filled(1e6)))
        assert (found is None) is kept


def test_the_bound_is_on_the_norm_of_the_whole_update() -> None:
    """Each array lies below the bound, together they lie above it."""
    sent = {"w": np.full((2, 3), 1, np.float32), "b": np.float32(2).reshape(())}
    assert norm(sent) == pytest.approx(10**0.5)
    for bound, kept in ((3.2, True), (3.1, False)):
        found = checks(norm_bounds={"a": bound}).reason("a", receipt(), sent)
        assert (found is None) is kept
