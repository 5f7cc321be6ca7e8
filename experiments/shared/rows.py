"""results.csv of an experiment: one row a run, with the commit that it was run on."""

import csv
import io
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fedmed.atomic import write_bytes

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, str]


def read_rows(path: Path) -> list[Row]:
    """The rows of results.csv; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(
    path: Path, rows: Iterable[Row], columns: Sequence[str], order: Callable[[Row], tuple[Any, ...]]
) -> None:
    """Replace results.csv in one step; `order` is the key by which rows are sorted."""
    text, in_order = io.StringIO(), sorted(rows, key=order)
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(in_order)
    write_bytes(path, text.getvalue().encode())


def epsilon_spent(summary: dict[str, Any]) -> str:
    """The largest of all sites by a run's summary.json; "off" without privacy."""
    privacy = summary["privacy"]
    spent = (site["epsilon"] for site in privacy["sites"].values())
    return f"{max(spent):.4f}" if privacy["private"] else "off"


def commit_mark() -> str:
    """The checkout's short hash, marked where the packages or the configuration differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "fedmed", "strategies", "clients", "configs")
    return (git("rev-parse", "--short=7", "HEAD") or "unknown") + ("-dirty" if changed else "")
