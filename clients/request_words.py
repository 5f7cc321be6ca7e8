"""A run that was asked for, in lines for the person who decides. Entries of an older fedmed hold less."""

from collections.abc import Mapping
from typing import Any

from clients.asked import shown


def in_words(run: str, what: Mapping[str, Any]) -> list[str]:
    """What was asked, what became of it (`decision`), and what it would leave of the budget (`forecast`)."""
    asks = what.get("coordinator")
    model, sha256 = shown(what["model"]), what.get("model_sha256")
    lines = [
        f"{run}: {what['decision']}",
        f"  asked by    {asks or 'a process on this machine'}",
        # Names and titles are the coordinator's own text.
        f"  task        {shown(what['task'])}{_in_brackets(what.get('task_digest'))}",
        f"  model       {model}{_in_brackets(sha256 and f'sha256 {sha256}')}, {what['adapter']} adapter",
        f"  cost        {_cost(what)}",
        *_forecast(what.get("forecast")),
    ]
    lines += [
        f"  {'releases' if not index else '':<11} {one}" for index, one in enumerate(what.get("releases", ()))
    ]
    return [*lines, f"  digest      {what['digest']}"]


def _in_brackets(text: str | None) -> str:
    return f" ({text})" if text else ""


def _cost(what: Mapping[str, Any]) -> str:
    rounds = f"{what['rounds']} rounds; metrics: {what['metrics']}"
    if what["not_private"]:
        return f"NOT PRIVATE ({what['not_private']}); {rounds}"
    return f"epsilon {what['epsilon']:.2f} at delta {what['delta']:g}; {rounds}"


def _forecast(forecast: Mapping[str, float] | None) -> list[str]:
    if forecast is None:
        return []
    before, after = forecast["left_before"], forecast["left_after"]
    fits = "" if after >= 0 else "; it does not fit, and will be refused"
    left = f"{before:.2f} left before, {max(0.0, after):.2f} after"
    return [f"  budget      epsilon {forecast['budget']:g}, of it {left}{fits}"]
