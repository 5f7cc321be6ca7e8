"""The privacy officer's page: what a site's ledger says, on paper that a person can sign."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fedmed.atomic import write_bytes
from fedmed.report import page, plots


def write_statement(statement: Mapping[str, Any], path: Path) -> None:
    """Write the page to `path`, which then holds the whole page or what it held before.

    The file makes no request and runs no script. Every figure on it stands in the statement; beside every epsilon
    stand its unit, adjacency, delta and accountant.

    Args:
        statement: from `fedmed.privacy.statement`.
    """
    environment = page.environment()
    environment.filters |= {"day": day, "time": moment}
    drawn = plots.spent_over_time(statement)
    text = environment.get_template("officer.html.j2").render(
        **statement,
        claims={name: claim(statement, cohort) for name, cohort in statement["cohorts"].items()},
        figure=drawn and (drawn, page.inline(drawn.svg, "f0-")),
    )
    write_bytes(path, text.encode())


def claim(statement: Mapping[str, Any], cohort: Mapping[str, Any]) -> str:
    """What stands beside a cohort's epsilon; nothing where there is no budget, and so no epsilon."""
    if cohort["budget"] is None:
        return ""
    return page.claim(
        unit=statement["unit"],
        adjacency=statement["adjacency"],
        delta=cohort["budget"]["delta"],
        accountant=cohort["accountant"],
    )


def day(time: str) -> str:
    """A day as printed: 22 Nov 2026."""
    return f"{datetime.fromisoformat(time):%d %b %Y}".removeprefix("0")


def moment(time: str) -> str:
    """A time as printed, in UTC: 2026-11-22 10:15."""
    return f"{datetime.fromisoformat(time):%Y-%m-%d %H:%M}"
