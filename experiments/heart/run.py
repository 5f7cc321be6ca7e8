"""The heart-disease benchmark: `fedmed run -m` for every setting, then results.csv, README's table, the figure.

Every figure is read from the `summary.json` of a run of the command line. Rows that results.csv already holds
are not run again: the same command continues an interrupted benchmark, and deleting rows repeats them.

Examples:
  python experiments/heart/run.py                       everything, five minutes on two cores; LoRA half an hour
  python experiments/heart/run.py --quick               smoke test: seed 0, two rounds, nothing kept
  python experiments/heart/run.py --only head-eps3 head-off
  python experiments/heart/run.py --draws 1 --output /tmp/again
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the root of the repository, where experiments is

from experiments.heart.figure import draw_figure
from experiments.heart.results import COLUMNS, FOLDER, SEEDS, SETTINGS, Setting, missing, order, table
from experiments.shared.commands import benchmark_parser, fedmed, fill
from experiments.shared.rows import Row, commit_mark, epsilon_spent, read_rows, write_rows

# One process a sweep: the encoder's frozen part is computed once for all of its seeds.
COMMON = ("tracking=none", "reference=false", "federation.workers=1")


def sweep(
    setting: Setting, draws: list[int], seeds: list[int], extra: list[str], commit: str
) -> tuple[list[Row], int]:
    """Run one sweep over draws and seeds in a temporary folder.

    Noise comes from the operating system: a draw is a repetition, whose number is nothing but the run's name.

    Returns:
        the rows of those runs that finished, and the command's exit code (130: Ctrl-C).
    """
    grid = [f"seed={','.join(map(str, seeds))}", f"name={','.join(f'draw-{draw}' for draw in draws)}"]
    overrides = [*setting.overrides.split(), *COMMON, *extra, *grid]
    print(f"fedmed run -m {' '.join(overrides)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="fedmed-heart-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [fedmed(), "run", "-m", *overrides], cwd=folder, stdout=output, stderr=subprocess.STDOUT
            )
            code = _wait(process)
        if code not in (0, 130):
            print(f"the sweep ended with exit code {code}:", file=sys.stderr)
            print("".join(log.read_text(errors="replace").splitlines(keepends=True)[-20:]), file=sys.stderr)
        # A folder with a summary is a finished run, whatever became of the others.
        finished = sorted(Path(folder).glob("sweeps/*/*/summary.json"))
        rows = [_row(setting, json.loads(path.read_text()), commit) for path in finished]
    for row in rows:
        print(
            f"  seed {row['seed']}, draw {row['draw']}: {' '.join(f'{name}={row[name]}' for name in COLUMNS[5:9])}",
            flush=True,
        )
    return rows, code


def _wait(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait()
    except KeyboardInterrupt:
        # The terminal sent Ctrl-C to the sweep as well; once it has ended, its finished runs are collected.
        process.wait()
        return 130


def _row(setting: Setting, summary: dict[str, Any], commit: str) -> Row:
    target, test = summary["privacy"]["target_epsilon"], summary["test"]
    values = (
        setting.name,
        "off" if target is None else f"{target:g}",
        epsilon_spent(summary),
        summary["seed"],
        summary["name"].removeprefix("draw-"),
        f"{test['auc']:.4f}",
        f"{test['accuracy']:.4f}",
        f"{statistics.fmean(site['accuracy'] for site in test['sites'].values()):.4f}",
        f"{summary['seconds']['total']:.1f}",
        commit,
    )
    return {name: str(value) for name, value in zip(COLUMNS, values, strict=True)}


def run_missing(arguments: argparse.Namespace, path: Path) -> int:
    """Fill results.csv; the exit code of the first sweep that did not end well, else 0."""
    seeds = range(1) if arguments.quick else SEEDS
    extra = ["rounds=2", "strategy.average_last=1"] if arguments.quick else []
    commit, rows = commit_mark(), read_rows(path)
    for setting in SETTINGS:
        if arguments.only and setting.name not in arguments.only:
            continue
        draws = range(1 if arguments.quick else min(arguments.draws, setting.draws))
        for left, alike in groupby(missing(setting, rows, seeds, draws), key=itemgetter(1)):
            new, code = sweep(setting, [draw for draw, _ in alike], left, extra, commit)
            if new:
                rows = [*rows, *new]
                write_rows(path, rows, COLUMNS, order)
            if code:
                return code
    return 0


def main() -> int:
    """Run what is missing, then write table and figure; exit code 0, or that of a sweep that failed."""
    parser = benchmark_parser(
        __doc__, FOLDER, quick="seed 0, two rounds, in a temporary folder", names=(s.name for s in SETTINGS)
    )
    parser.add_argument(
        "--draws", type=int, default=3, help="repetitions of each seed under privacy, at most 3 (default)"
    )
    asked = parser.parse_args()
    folder = None if asked.quick else asked.output
    return fill(folder, lambda path: run_missing(asked, path), table, draw_figure)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
