"""A sweep: runs one after the other, and what they cost together."""

import contextlib
import itertools
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedmed.atomic import write_json
from fedmed.config import RunConfig
from fedmed.errors import FedmedError, Interrupted, RunError, internal
from fedmed.privacy.in_words import round_up
from strategies.console import plain_console
from strategies.joint import joint_costs, planned

NOT_STARTED = "not started"
RELEASES = {
    "exact": "* exact, on held-out patients: not covered by epsilon",
    "private": "* private, on held-out patients: in epsilon",
    "none": "* not evaluated (privacy.metrics=none)",
}
Job = tuple[list[str], RunConfig]


def run_sweep(jobs: list[Job], run: Callable[[RunConfig, list[str]], None]) -> None:
    """Do every job in `sweeps/<time>/<n>/`, then say what each gave and what all cost.

    A job that fails does not stop the others. Every job that was started counts as spent.

    Raises:
        RunError: at the end, when any job failed.
        Interrupted: Ctrl-C, which ends the sweep.
    """
    console = plain_console()
    root = _new_folder()
    failed: dict[int, str] = {}
    interrupted: Interrupted | None = None
    for index, (overrides, config) in enumerate(jobs):
        console.print(f"\n[{index + 1}/{len(jobs)}] {' '.join(overrides)}", style="bold", soft_wrap=True)
        try:
            run(config, [*overrides, f"run_dir={root / str(index)}"])
        except (KeyboardInterrupt, Interrupted) as error:
            if not any(root.iterdir()):
                root.rmdir()
                raise
            # An interrupted run's own message tells how to continue it.
            own = isinstance(error, Interrupted)
            interrupted = Interrupted(str(error) if own else f"interrupted; finished jobs are kept: {root}")
            failed |= {index: "interrupted"} | dict.fromkeys(range(index + 1, len(jobs)), NOT_STARTED)
            break
        except Exception as error:
            failed[index] = _why(error)
            console.print(f"error: {failed[index]}", style="red", soft_wrap=True)
    rows = [
        _row(root / str(index), overrides, failed.get(index)) for index, (overrides, _) in enumerate(jobs)
    ]
    total = _composed([config for index, (_, config) in enumerate(jobs) if failed.get(index) != NOT_STARTED])
    write_json(root / "sweep.json", {"jobs": rows, "epsilon_of_all_jobs": total})
    _print(console, rows, total)
    console.print(str(root / "sweep.json"), soft_wrap=True)
    if interrupted:
        raise interrupted
    if failed:
        raise RunError(f"{len(failed)} of {len(jobs)} jobs failed; why is in {root / 'sweep.json'}")


def _new_folder() -> Path:
    """A folder of this sweep's own, also when several start in one second."""
    stem = time.strftime("%Y%m%d-%H%M%S")
    for suffix in itertools.chain([""], (f"-{number}" for number in itertools.count(2))):
        root = Path("sweeps") / (stem + suffix)
        with contextlib.suppress(FileExistsError):
            root.mkdir(parents=True)
            return root
    raise AssertionError("unreachable: the count has no end")


def _why(error: Exception) -> str:
    if isinstance(error, FedmedError):
        return str(error)
    if os.environ.get("FEDMED_DEBUG"):
        traceback.print_exception(error)
    return internal(error)


def _row(folder: Path, overrides: list[str], error: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {"overrides": overrides, "folder": str(folder), "error": error}
    if (folder / "summary.json").exists():
        summary = json.loads((folder / "summary.json").read_text())
        spent = [site["epsilon"] for site in summary["privacy"]["sites"].values()]
        row |= {
            "release": summary["test"]["release"],
            "auc": summary["test"]["auc"],
            "accuracy": summary["test"]["accuracy"],
            "epsilon": max(spent) if summary["privacy"]["private"] else None,
            "claim": _claim(summary["privacy"]),
        }
    return row


def _claim(privacy: dict[str, Any]) -> str | None:
    """What must stand beside an epsilon."""
    if not privacy["private"]:
        return None
    return f"{privacy['adjacency']}; delta {privacy['delta']:g}; {privacy['accountant'].upper()} accountant"


def _composed(configs: list[RunConfig]) -> float | None:
    """What the sweep spent at one site, winner and losers together (privacy.md, rule 14): of all sites the
    largest. None if any job was not private, or a patient is the unit of one and a record that of another."""
    if not all(config.private for config in configs) or len({config.task.unit for config in configs}) != 1:
        return None
    return max(cost.epsilon_pld or 0.0 for cost in joint_costs(planned(configs)).values())


def _print(console: Console, rows: list[dict[str, Any]], total: float | None) -> None:
    table = Table(title="sweep")
    for name in ("job", "epsilon (PLD)", "AUC*", "accuracy*"):
        table.add_column(name, justify="left" if name == "job" else "right")
    for row in rows:
        if row["error"] is not None or "auc" not in row:
            failure = row["error"] if row["error"] in ("interrupted", NOT_STARTED) else "failed"
            table.add_row(" ".join(row["overrides"]), failure, "", "")
            continue
        epsilon = "NOT PRIVATE" if row["epsilon"] is None else f"{round_up(row['epsilon']):.2f}"
        missing = {"exact": "one class", "private": "too few", "none": "none"}[row["release"]]
        figures = [missing if row[name] is None else f"{row[name]:.3f}" for name in ("auc", "accuracy")]
        table.add_row(" ".join(row["overrides"]), epsilon, *figures)
    console.print(table)
    for release in sorted({row["release"] for row in rows if "release" in row} or {"exact"}):
        console.print(RELEASES[release])
    for claim in sorted({row["claim"] for row in rows if row.get("claim")}):
        console.print(f"epsilon: {claim}", soft_wrap=True)
    if total is not None:
        console.print(
            f"all jobs together: epsilon {round_up(total):.2f} (PLD) at a site: a sweep spends what all its runs spend",
            soft_wrap=True,
        )
    else:
        console.print(
            "NOT PRIVATE as a whole: a job of the sweep is not private, or the jobs protect different units",
            style="bold red",
            soft_wrap=True,
        )
