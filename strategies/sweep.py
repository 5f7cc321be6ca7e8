"""A sweep: runs one after the other, and what they cost together."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedmed.atomic import write_json
from fedmed.config import RunConfig
from fedmed.errors import FedmedError, RunError
from fedmed.privacy.accounting import composed_epsilon, round_up
from fedmed.privacy.plan import make_plan

Job = tuple[list[str], RunConfig]


def run_sweep(jobs: list[Job], run: Callable[[RunConfig, list[str]], None]) -> None:
    """Do every job in `sweeps/<time>/<n>/`, then say what each gave and what all cost.

    A job that fails does not stop the others.

    Raises:
        RunError: at the end, when any job failed.
    """
    console = Console(highlight=False)
    root = Path("sweeps") / time.strftime("%Y%m%d-%H%M%S")
    failed: dict[int, str] = {}
    for index, (overrides, config) in enumerate(jobs):
        console.print(f"\n[{index + 1}/{len(jobs)}] {' '.join(overrides)}", style="bold", markup=False)
        try:
            run(config, [*overrides, f"run_dir={root / str(index)}"])
        except FedmedError as error:
            failed[index] = str(error)
            console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
    rows = [
        _row(root / str(index), overrides, failed.get(index)) for index, (overrides, _) in enumerate(jobs)
    ]
    total = _composed([config for _, config in jobs])
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / "sweep.json", {"jobs": rows, "epsilon_of_all_jobs": total})
    _print(console, rows, total)
    console.print(str(root / "sweep.json"), soft_wrap=True)
    if failed:
        raise RunError(f"{len(failed)} of {len(jobs)} jobs failed")


def _row(folder: Path, overrides: list[str], error: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {"overrides": overrides, "folder": str(folder), "error": error}
    if (folder / "summary.json").exists():
        summary = json.loads((folder / "summary.json").read_text())
        spent = [site["epsilon"] for site in summary["privacy"]["sites"].values()]
        row |= {
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
    """What the sweep spent at one site, winner and losers together (privacy.md, rule 14); None if any job was
    not private or the jobs trained on different sites."""
    sites = {tuple(config.task.declared_sizes) for config in configs}
    if len(sites) != 1 or not all(config.private for config in configs):
        return None
    largest = 0.0
    for site in next(iter(sites)):
        plans = [make_plan(config, site) for config in configs]
        delta = max(plan.delta for plan in plans)
        largest = max(largest, composed_epsilon([plan.event() for plan in plans], delta=delta))
    return largest


def _print(console: Console, rows: list[dict[str, Any]], total: float | None) -> None:
    table = Table(title="sweep")
    for name in ("job", "epsilon (PLD)", "AUC*", "accuracy*"):
        table.add_column(name, justify="left" if name == "job" else "right")
    for row in rows:
        if row["error"] is not None or "auc" not in row:
            table.add_row(" ".join(row["overrides"]), "failed", "", "")
            continue
        epsilon = "NOT PRIVATE" if row["epsilon"] is None else f"{round_up(row['epsilon']):.2f}"
        figures = ["one class" if row[name] is None else f"{row[name]:.3f}" for name in ("auc", "accuracy")]
        table.add_row(" ".join(row["overrides"]), epsilon, *figures)
    console.print(table)
    console.print("* exact, on held-out patients: not covered by epsilon")
    for claim in sorted({row["claim"] for row in rows if row.get("claim")}):
        console.print(f"epsilon: {claim}", soft_wrap=True)
    if total is not None:
        console.print(
            f"all jobs together: epsilon {round_up(total):.2f} (PLD) at a site: a sweep spends what all its runs spend",
            soft_wrap=True,
        )
