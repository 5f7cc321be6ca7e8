"""What a mechanism costs, as text that stays exact: dp-accounting's events to JSON and back.

Only events that every accountant here can compose are known; any other is refused, never treated as free.
"""

import json
import math
from typing import Any

from dp_accounting import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)

from fedmed.errors import PrivacyError


def to_json(event: DpEvent) -> str:
    """The event as one line that is the same for equal events; floats keep every bit.

    Raises:
        PrivacyError: an event of another kind.
    """
    return json.dumps(_plain(event), sort_keys=True, separators=(",", ":"), allow_nan=False)


def from_json(text: str) -> DpEvent:
    """The event that `to_json` wrote.

    Raises:
        PrivacyError: an unknown event, or a number out of its range.
    """
    try:
        return _event(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PrivacyError("a privacy event is damaged; it cannot be accounted") from None


def _plain(event: DpEvent) -> dict[str, Any]:
    if isinstance(event, GaussianDpEvent):
        return {"gaussian": float(event.noise_multiplier)}
    if isinstance(event, PoissonSampledDpEvent):
        return {"poisson": float(event.sampling_probability), "of": _plain(event.event)}
    if isinstance(event, SelfComposedDpEvent):
        return {"times": int(event.count), "of": _plain(event.event)}
    if isinstance(event, ComposedDpEvent):
        return {"all": [_plain(part) for part in event.events]}
    if isinstance(event, NoOpDpEvent):
        return {"nothing": True}
    if isinstance(event, NonPrivateDpEvent):
        return {"non_private": True}
    raise PrivacyError(f"{type(event).__name__} cannot be accounted; refused")


def _event(plain: dict[str, Any]) -> DpEvent:
    keys = set(plain)
    if keys == {"gaussian"}:
        return GaussianDpEvent(_number(plain["gaussian"], 0.0, math.inf))
    if keys == {"poisson", "of"}:
        return PoissonSampledDpEvent(_number(plain["poisson"], 0.0, 1.0), _event(plain["of"]))
    if keys == {"times", "of"} and type(plain["times"]) is int and plain["times"] >= 1:
        return SelfComposedDpEvent(_event(plain["of"]), plain["times"])
    if keys == {"all"} and isinstance(plain["all"], list):
        return ComposedDpEvent([_event(part) for part in plain["all"]])
    if keys == {"nothing"}:
        return NoOpDpEvent()
    if keys == {"non_private"}:
        return NonPrivateDpEvent()
    raise ValueError


def _number(value: object, low: float, high: float) -> float:
    if type(value) is not float or not low < value <= high or not math.isfinite(value):
        raise ValueError
    return value
