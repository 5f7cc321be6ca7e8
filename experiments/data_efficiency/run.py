"""AUC against the number of labelled patients: linear probe, LoRA, from scratch; with and without privacy.

Each point is one federated run of `experiment=data_efficiency` at two hospitals; its adapter is scored on a common test
set of 400 other patients. Rows that results.csv already holds are not run again: the same command continues.

Examples:
  python experiments/data_efficiency/run.py                        everything on phantoms
  python experiments/data_efficiency/run.py --data pneumoniamnist  needs FEDMED_DATA, a folder with the .npz file
  python experiments/data_efficiency/run.py --minutes 5            no new run after five minutes
  python experiments/data_efficiency/run.py --quick --output /tmp/quick
"""

import argparse
import contextlib
import dataclasses
import io
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).resolve().parents[2]))  # the root of the repository, where experiments is

import torch

from clients.client_app import app
from experiments.data_efficiency.figure import draw_figure
from experiments.data_efficiency.hospitals import NAMES, TEST_SEED, cut, pool
from experiments.data_efficiency.results import (
    COLUMNS,
    DATA,
    FOLDER,
    METHODS,
    SEEDS,
    SIZES,
    Point,
    key,
    order,
    points,
    table,
)
from experiments.shared.commands import benchmark_parser, fill
from experiments.shared.rows import Row, commit_mark, read_rows, write_rows
from fedmed.compose import compose
from fedmed.config import RunConfig
from fedmed.data.readers import read_site
from fedmed.flower.in_process import InProcessGrid
from fedmed.metrics import ScoreCounts
from fedmed.models.build import build
from fedmed.training import LocalData, logits
from strategies.folder import RunFolder
from strategies.run import run

TESTED_ON = 200


def overrides_of(point: Point, path: Path, run_dir: Path) -> list[str]:
    """The settings of one run."""
    each = point.patients // len(NAMES)
    method = next(one for one in METHODS if one.name == point.method)
    privacy = ["privacy=off"] if point.epsilon == "off" else [f"privacy.epsilon={point.epsilon}"]
    sizes = ", ".join(f"{name}: {each + 1}" for name in NAMES)
    return [
        "experiment=data_efficiency", *method.overrides, *privacy, f"task.path={path}",
        f"task.declared_sizes={{{sizes}}}", f"task.test_fraction={1 / (each + 1):.6f}", f"seed={point.seed}",
        "reference=false", "privacy.metrics=none", f"run_dir={run_dir}",
    ]  # fmt: skip


class Tests:
    """The common test set, prepared once for each method."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: dict[str, list[LocalData]] = {}

    def auc(self, method: str, config: RunConfig, arrays: Any) -> float:
        """Of all records of the test hospitals together."""
        task = dataclasses.replace(config.task, path=str(self.folder))
        model = build(task, config.model, config.adapter)
        model.initialise(config.seed)
        if method not in self._parts:
            sites = [read_site(task, name, seed=0, maybe_empty=True) for name in NAMES]
            self._parts[method] = [
                LocalData(model.prepare(data), torch.from_numpy(data.labels), []) for data in sites
            ]
        counts = [
            ScoreCounts.of(logits(model, part, arrays), part.labels.numpy()) for part in self._parts[method]
        ]
        found = (counts[0] + counts[1]).auc()
        assert found is not None
        return found


def measure(point: Point, path: Path, tests: Tests, commit: str) -> Row:
    """Do one run in a temporary folder, and score what it released."""
    began = time.process_time()
    with tempfile.TemporaryDirectory(prefix="fedmed-point-") as folder:
        config = compose(overrides_of(point, path, Path(folder, "run")))
        each = point.patients // len(NAMES)
        assert all(config.task.declared_train(name) == each for name in NAMES)
        grid = InProcessGrid(app, nodes=len(NAMES), workers=1)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                made = RunFolder(run(config, grid))
        finally:
            grid.close()
        progress = made.load()
        assert progress is not None
        spent = max(plan.epsilon() for plan in made.plans().values()) if config.private else None
        auc = tests.auc(point.method, config, progress.released())
    values = (
        *point.key, f"{auc:.4f}", "off" if spent is None else f"{spent:.4f}",
        f"{time.process_time() - began:.1f}", commit,
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def run_missing(asked: argparse.Namespace, path: Path, work: Path) -> None:
    """Fill results.csv with what it lacks."""
    rows, commit, end = read_rows(path), commit_mark(), time.monotonic() + 60 * asked.minutes
    sizes, seeds = (SIZES[:2], range(1)) if asked.quick else (SIZES, SEEDS)
    have = {key(row) for row in rows}
    work = work / asked.data
    tests = Tests(pool(work / "test", asked.data, patients=40 if asked.quick else TESTED_ON, seed=TEST_SEED))
    for point in points(asked.data, sizes, seeds):
        if point.key in have:
            continue
        if time.monotonic() > end:
            print("out of time: the same command continues", flush=True)
            return
        seed = work / f"seed-{point.seed}"
        whole = pool(seed / "all", asked.data, patients=max(sizes) // 2 + 1, seed=point.seed)
        folder = cut(whole, seed / str(point.patients), patients=point.patients // 2 + 1)
        row = measure(point, folder, tests, commit)
        rows = [*rows, row]
        write_rows(path, rows, COLUMNS, order)
        print(" ".join(f"{name}={row[name]}" for name in COLUMNS[1:8]), flush=True)


def main() -> int:
    """Run what is missing, then write table and figure."""
    parser = benchmark_parser(__doc__, FOLDER, quick="two sizes of one seed, 80 test patients")
    parser.add_argument("--data", choices=DATA, default=DATA[0])
    parser.add_argument("--work", type=Path, help="where hospitals are kept between calls; default: nowhere")
    parser.add_argument(
        "--minutes", type=float, default=1e6, help="no new run after as many; default: no end"
    )
    asked = parser.parse_args()
    if asked.data == "pneumoniamnist" and not os.environ.get("FEDMED_DATA"):
        parser.error("--data pneumoniamnist: set FEDMED_DATA to the folder that holds pneumoniamnist.npz")
    if asked.quick and asked.output == FOLDER:
        parser.error("--quick: add --output FOLDER: its rows are no part of the curve")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="fedmed-curve-") as temporary:
        work = asked.work or Path(temporary)
        return fill(asked.output, lambda path: run_missing(asked, path, work), table, draw_figure)


if __name__ == "__main__":
    sys.exit(main())
