"""The report of a run: one HTML file that loads nothing, for who decides on a run and who checks it."""

import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fedmed.atomic import write_bytes
from fedmed.errors import PrivacyError
from fedmed.report import page, plots
from fedmed.report.units import auc_text, belief, bound_text, cost_sentence, units_compared


def write_report(summary: dict[str, Any], history: list[dict[str, Any]], path: Path) -> None:
    """Write a run's report to `path`, which then holds the whole report or what it held before.

    The file makes no request and runs no script. Beside every epsilon stand its unit, adjacency, delta and
    accountant; a run that is not private shows no epsilon, whatever the summary holds.

    Args:
        summary: the content of summary.json.
        history: one entry a round, as in history.json.

    Raises:
        PrivacyError: a private run without unit, adjacency, delta or accountant; nothing is written.
        jinja2.UndefinedError: the summary lacks a key; nothing is written.
    """
    privacy = summary["privacy"]
    if privacy["private"]:
        missing = [key for key in ("unit", "adjacency", "delta", "accountant") if not privacy.get(key)]
        if missing:
            raise PrivacyError(f"privacy.{missing[0]} is missing: no epsilon is printed without it; set it")
    runs = _runs(summary)
    environment = page.environment()
    environment.filters |= {"figure": figure_text}
    environment.filters |= {"auc": auc_text, "bound": bound_text, "belief": belief, "cost": cost_sentence}
    environment.filters |= {"private_rows": private_rows, "shown": lambda value: f"{value:.3f}"}
    figures = plots.draw(privacy, history, runs, claim=claim(privacy) if privacy["private"] else "")
    text = environment.get_template("report.html.j2").render(
        summary=summary,
        privacy=privacy,
        history=history,
        created=datetime.fromisoformat(summary["created"]).strftime("%d %B %Y, %H:%M %Z").strip(),
        figures=[(figure, page.inline(figure.svg, f"f{index}-")) for index, figure in enumerate(figures)],
        runs=runs,
        answered={site: _answered(site, history) for site in privacy["sites"]},
        claim=lambda delta=None: claim(privacy, delta),
        compared=units_compared(summary),
        mlflow=shlex.quote(summary["mlflow"]["uri"]) if summary["mlflow"] else None,
    )
    write_bytes(path, text.encode())


def claim(privacy: Mapping[str, Any], delta: float | None = None) -> str:
    """What stands beside an epsilon: unit, adjacency, delta (default: the run's) and accountant."""
    accountant = f"{privacy['accountant'].upper()} accountant"
    shown = privacy["delta"] if delta is None else delta
    return page.claim(
        unit=privacy["unit"], adjacency=privacy["adjacency"], delta=shown, accountant=accountant
    )


def figure_text(result: Mapping[str, Any] | None, name: str) -> str:
    """A metric as printed. An AUC needs records of both classes, a private figure more patients than noise; a site that
    sent nothing gave no answer."""
    if result is None:
        return "no answer"
    missing = "one class" if name == "auc" else "no records"
    # A site's result stands without its release; only a private one has intervals.
    if "auc_interval" in result or result.get("release") == "private":
        missing = "too few"
    if result.get("release") == "none":
        missing = "not evaluated"
    return missing if result[name] is None else f"{result[name]:.3f}"


def private_rows(test: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """The figures of a private result that have an interval, by title; what is within the noise is left out."""
    rows: list[tuple[str, Mapping[str, float] | None]] = []
    for title, name in (("AUC", "auc"), ("accuracy", "accuracy")):
        if test[name] is not None:
            low, high = test[f"{name}_interval"]
            rows.append((title, {"value": test[name], "low": low, "high": high}))
    rows += [("Brier score", test["brier"]), ("fraction of positive patients", test["prevalence"])]
    at = test["at_specificity"]
    if at:
        rows += [
            (f"{name} at threshold {at['threshold']:g}", at[name]) for name in ("sensitivity", "specificity")
        ]
    for cell in test["calibration"]:
        rows.append((f"positive, of scores {cell['from']:g} to {cell['to']:g}", cell["positive"]))
    return [(title, value) for title, value in rows if value is not None]


def _runs(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The federated result first, then the references that there are, by the name of their column."""
    references = summary["references"] or {}
    names = {"local_only": "local only", "non_private": "non-private", "image_level": "image-level"}
    found = {title: references[key] for key, title in names.items() if references.get(key)}
    return {"federated": summary["test"], **found}


def _answered(site: str, history: Sequence[Mapping[str, Any]]) -> str:
    """The rounds in which a site's update was used, as ranges: "1–3, 5"."""
    return page.ranges(entry["round"] for entry in history if site in entry["sites"])
