"""What `make test-full` leaves behind: which counts were run, which figures were measured, on which commit."""

import os
import platform
import subprocess
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

Case = TypeVar("Case")

FOLDER = Path(__file__).parents[1] / "docs" / "evidence"
FULL = bool(os.environ.get("FEDMED_TEST_FULL"))
_began = time.monotonic()
_counts: dict[str, set[str]] = {}
_figures: dict[str, str] = {}


def _test() -> str:
    """The test that is running, without its parameters."""
    return os.environ.get("PYTEST_CURRENT_TEST", "collection").partition(" ")[0].partition("[")[0]


def count(reduced: int, full: int) -> int:
    """How often to repeat: the reduced count in `make test`, the full one in `make test-full`."""
    chosen = full if FULL else reduced
    _counts.setdefault(_test(), set()).add(f"{chosen:,}")
    return chosen


def some(cases: Iterable[Case], one_of: int) -> list[Case]:
    """Every so many-th case in `make test`, beginning with the first; all of them in `make test-full`."""
    return list(cases)[:: 1 if FULL else one_of]


def figure(name: str, value: str) -> None:
    """Keep what a test measured, for the summary."""
    _figures[f"{_test()}: {name}"] = value


def collected() -> dict[str, dict[str, list[str]]]:
    """What this process has counted and measured, to be sent to another."""
    return {
        "counts": {test: sorted(chosen) for test, chosen in _counts.items()},
        "figures": {name: [value] for name, value in _figures.items()},
    }


def merge(other: dict[str, dict[str, list[str]]]) -> None:
    """Add what another process has `collected`."""
    for test, chosen in other["counts"].items():
        _counts.setdefault(test, set()).update(chosen)
    _figures.update({name: value for name, (value,) in other["figures"].items()})


def write(outcomes: dict[str, int], part: str) -> Path:
    """The summary of a part of a full run as docs/evidence/<date>-<commit><part>.md.

    Args:
        outcomes: number of tests by outcome.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=FOLDER, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    FOLDER.mkdir(parents=True, exist_ok=True)
    commit = git("rev-parse", "--short=10", "HEAD") or "unknown"
    changed = " with changes not committed" if git("status", "--porcelain", "--untracked-files=no") else ""
    lines = [
        f"# Tests at full counts, commit {commit}{changed}",
        "",
        f"`make test-full`{part and f', {part[1:]} tests'}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, "
        f"{(time.monotonic() - _began) / 60:.1f} minutes, {os.cpu_count()} cores, {platform.machine()}, "
        f"Python {platform.python_version()}.",
        "",
        ", ".join(f"{number:,} {name}" for name, number in sorted(outcomes.items())) + ".",
        "",
        "| test | repetitions |",
        "|---|---|",
        *(f"| `{test}` | {', '.join(sorted(chosen))} |" for test, chosen in sorted(_counts.items())),
        "",
        "| figure | measured |",
        "|---|---|",
        *(f"| `{name}` | {value} |" for name, value in sorted(_figures.items())),
        "",
    ]
    path = FOLDER / f"{datetime.now(UTC):%Y-%m-%d}-{commit}{part}.md"
    path.write_text("\n".join(lines))
    return path
