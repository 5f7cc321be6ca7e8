"""What a coordinator looks like at one instant: for `status`, for the view of `start`, for `runs`."""

import contextlib
import socket
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedmed.privacy.in_words import round_up
from strategies.coordinator.admissions import Admissions
from strategies.coordinator.folder import CoordinatorFolder
from strategies.coordinator.records import OPEN, RunPlace, RunPlaces

if TYPE_CHECKING:
    from fedmed.flower.control import Node

# Shorter, and everybody at a site is warned in time.
SOON_DAYS = 30


def site_rows(folder: CoordinatorFolder, nodes: "Sequence[Node] | None") -> list[dict[str, Any]]:
    """Every admitted site: `online`, `offline`, `never seen`, or `unknown` while no SuperLink answers."""
    seen = {node.name: node for node in nodes or () if node.status != "unregistered"}
    rows = []
    for name, admission in sorted(Admissions(folder.path).read().items()):
        node = seen.get(name)
        status = {"registered": "never seen"}.get(node.status, node.status) if node else "never seen"
        rows.append(
            {
                "name": name,
                "status": "unknown" if nodes is None else status,
                "last_seen": (node.last_seen or None) if node else None,
                "admitted_at": admission.admitted_at,
            }
        )
    return rows


def run_row(place: RunPlace) -> dict[str, Any]:
    """One run, as it stands."""
    record, figures = place.read(), place.figures()
    return {
        "name": place.name,
        "state": "stopping" if record.state in OPEN and place.stop_wanted else record.state,
        "round": figures.round,
        "rounds": figures.rounds,
        "epsilon": figures.epsilon,
        "private": figures.private,
        "launched_at": record.launched_at,
        "detail": record.detail,
        "folder": str(place.path),
    }


def snapshot(folder: CoordinatorFolder, nodes: "Sequence[Node] | None") -> dict[str, Any]:
    """The coordinator as one JSON object.

    Args:
        nodes: what the SuperLink says; None: it does not answer.
    """
    running = folder.running()
    until, _ = folder.certificate()
    uri = (running or {}).get("mlflow")
    return {
        "name": folder.config.name,
        "folder": str(folder.path),
        "running": running is not None,
        "pid": (running or {}).get("pid"),
        "address": folder.address,
        "insecure": bool((running or {}).get("insecure")),
        "superlink": "up" if nodes is not None else "down",
        "mlflow": {"uri": uri, "up": answers(uri)} if uri else None,
        "certificate_valid_until": until.isoformat(),
        "certificate_days": int((until.timestamp() - time.time()) // 86400),
        "sites": site_rows(folder, nodes),
        "runs": [run_row(place) for place in RunPlaces(folder.runs).all()],
    }


def answers(uri: str) -> bool:
    """Whether somebody listens there."""
    place = urlsplit(uri)
    with contextlib.suppress(OSError, ValueError):
        socket.create_connection((place.hostname or "", place.port or 80), timeout=1).close()
        return True
    return False


def remarks(values: dict[str, Any]) -> list[str]:
    """What a person should do something about."""
    lines = []
    if not values["running"]:
        lines.append(f"not running; start it with: fedmed coordinator start {values['folder']}")
    elif values["superlink"] == "down":
        lines.append(
            "the SuperLink does not answer; it is started again by itself: see logs/coordinator.jsonl"
        )
    if values["mlflow"] and not values["mlflow"]["up"]:
        lines.append("MLflow does not answer: figures are kept with the runs, and sent later")
    if values["certificate_days"] < SOON_DAYS:
        lines.append(
            f"the server's certificate ends in {max(0, values['certificate_days'])} days; run: "
            f"fedmed coordinator rotate {values['folder']}"
        )
    if values["insecure"]:
        lines.append("NOT ENCRYPTED: for tests on this machine only")
    return lines


def sites_table(rows: Iterable[dict[str, Any]]) -> Table:
    """Who is there."""
    table = _table("site", "status", "last seen")
    for row in rows:
        style = {"online": "green", "offline": "red"}.get(row["status"], "")
        table.add_row(row["name"], Text(row["status"], style), ago(row["last_seen"]))
    return table


def runs_table(rows: Iterable[dict[str, Any]]) -> Table:
    """What is under way and what was."""
    table = _table("run", "state", "round", "epsilon", "")
    for row in rows:
        table.add_row(row["name"], row["state"], of_rounds(row), spent(row), row["detail"])
    return table


def view(values: dict[str, Any]) -> Group:
    """All of it, for a terminal."""
    where = f"coordinator '{values['name']}' at {values['address']}, SuperLink {values['superlink']}"
    if values["mlflow"]:
        where += f", MLflow {values['mlflow']['uri']} {'up' if values['mlflow']['up'] else 'down'}"
    warnings = [Text(line, style="yellow") for line in remarks(values)]
    # The latest: a terminal has only so many lines.
    return Group(Text(where), *warnings, sites_table(values["sites"]), runs_table(values["runs"][-10:]))


def changes(before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """What is new, one line each: for a log, where there is no terminal."""
    lines = []
    old_sites = {row["name"]: row["status"] for row in before["sites"]} if before else {}
    old_runs = {row["name"]: (row["state"], row["round"]) for row in before["runs"]} if before else {}
    if before is not None and before["superlink"] != now["superlink"]:
        lines.append(f"SuperLink {now['superlink']}")
    for row in now["sites"]:
        if old_sites.get(row["name"]) != row["status"]:
            lines.append(f"site '{row['name']}': {row['status']}")
    for row in now["runs"]:
        if old_runs.get(row["name"]) != (row["state"], row["round"]):
            lines.append(f"run '{row['name']}': {row['state']}, round {of_rounds(row)}{_comma(spent(row))}"
                         f"{_comma(row['detail'])}")  # fmt: skip
    return lines


def of_rounds(row: dict[str, Any]) -> str:
    """`3/20`."""
    return f"{row['round']}/{'?' if row['rounds'] is None else row['rounds']}"


def spent(row: dict[str, Any]) -> str:
    """A run's epsilon in words, or that it has none."""
    if row["private"] is None:
        return ""
    return f"epsilon {round_up(row['epsilon']):.2f}" if row["private"] else "NOT PRIVATE"


def ago(when: float | None) -> str:
    """A time as people say it."""
    if when is None:
        return "never"
    seconds = max(0, int(time.time() - when))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"


def _comma(text: str) -> str:
    return f", {text}" if text else ""


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, overflow="fold")
    return table
