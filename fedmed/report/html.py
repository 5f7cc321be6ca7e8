"""The report of a run: one HTML file that loads nothing, for who decides on a run and who checks it."""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import ROUND_UP, Decimal
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fedmed.atomic import write_bytes
from fedmed.errors import PrivacyError
from fedmed.privacy.accounting import round_up
from fedmed.report import plots

MINUS = "\N{MINUS SIGN}"


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
    # Autoescape keeps a site's name from becoming markup, StrictUndefined a claim from going missing.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedmed.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"epsilon": epsilon_text, "delta": delta_text, "figure": figure_text}
    environment.filters |= {"private_rows": private_rows, "shown": lambda value: f"{value:.3f}"}
    figures = plots.draw(privacy, history, runs, claim=claim(privacy) if privacy["private"] else "")
    text = environment.get_template("report.html.j2").render(
        summary=summary,
        privacy=privacy,
        history=history,
        created=datetime.fromisoformat(summary["created"]).strftime("%d %B %Y, %H:%M %Z").strip(),
        figures=[(figure, _inline(figure.svg, f"f{index}-")) for index, figure in enumerate(figures)],
        runs=runs,
        answered={site: _answered(site, history) for site in privacy["sites"]},
        claim=lambda delta=None: claim(privacy, delta),
        mlflow=shlex.quote(summary["mlflow"]["uri"]) if summary["mlflow"] else None,
    )
    write_bytes(path, text.encode())


def claim(privacy: Mapping[str, Any], delta: float | None = None) -> str:
    """What stands beside an epsilon: unit, adjacency, delta (default: the run's) and accountant."""
    shown = delta_text(privacy["delta"] if delta is None else delta)
    return (
        f"unit: one {privacy['unit']}; adjacency: {privacy['adjacency']}; delta {shown}; "
        f"{privacy['accountant'].upper()} accountant"
    )


def epsilon_text(epsilon: float | None) -> str:
    """An epsilon as printed: rounded up, never less than was spent.

    >>> epsilon_text(2.9912), epsilon_text(3.0), epsilon_text(None)
    ('3.00', '3.00', 'not stated')
    """
    if epsilon is None:
        return "not stated"
    return f"{round_up(epsilon):.2f}" if math.isfinite(epsilon) else "infinite"


def delta_text(delta: float) -> str:
    """A delta as printed: two significant digits, rounded up.

    >>> delta_text(1e-4), delta_text(4.9751e-05)
    ('1e−4', '5e−5')
    """
    exact = Decimal(repr(delta))
    rounded = exact.quantize(Decimal(1).scaleb(exact.adjusted() - 1), rounding=ROUND_UP)
    digits, _, exponent = f"{rounded:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{exponent.replace('-', MINUS)}"


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
    names = {"local_only": "local only", "non_private": "non-private"}
    found = {title: references[key] for key, title in names.items() if references.get(key)}
    return {"federated": summary["test"], **found}


def _answered(site: str, history: Sequence[Mapping[str, Any]]) -> str:
    """The rounds in which a site's update was used, as ranges: "1–3, 5"."""
    ranges: list[list[int]] = []
    for number in [entry["round"] for entry in history if site in entry["sites"]]:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{a}\N{EN DASH}{b}" if b > a else f"{a}" for a, b in ranges) or "none"


def _inline(svg: str, prefix: str) -> Markup:
    """An SVG document as an element of the page: its own ids, colours that the page's theme can replace."""
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}", svg)
    return Markup(re.sub(r"(fill|stroke): #([0-9a-f]{6})\b", r"\1: var(--c\2, #\2)", svg))
