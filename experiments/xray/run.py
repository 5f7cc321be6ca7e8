"""The chest X-ray benchmark: hospitals of DICOM files, `fedmed run` for every setting and seed, then table and figure.

Needs the environment variable FEDMED_DATA, a folder with pneumoniamnist.npz, and the extra `xray`. Rows that
results.csv already holds are not run again: the same command continues an interrupted benchmark, and deleting rows
repeats them.

Examples:
  python experiments/xray/run.py                            everything
  python experiments/xray/run.py --only even-fedavg-8       one cell of the table
  python experiments/xray/run.py --quick                    smoke test: one seed, two rounds, nothing kept
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the root of the repository, where experiments is

from experiments.shared.commands import benchmark_parser, fedmed, fill
from experiments.shared.rows import Row, commit_mark, epsilon_spent, read_rows, write_rows
from experiments.xray.encoder import taken_in
from experiments.xray.figure import draw_figure
from experiments.xray.hospitals import held_out_hospital, training_hospitals
from experiments.xray.results import COLUMNS, FOLDER, LABEL_SKEW, SEEDS, SETTINGS, Setting, order, table
from experiments.xray.score import score


def run_one(setting: Setting, seed: int, work: Path, extra: list[str]) -> Row | None:
    """Train in a temporary folder and score the official test images; None where the run failed."""
    label_skew = LABEL_SKEW if setting.split == "skew" else None
    data, sizes = training_hospitals(work, seed=seed, label_skew=label_skew)
    declared = ", ".join(f"{name}: {size}" for name, size in sizes.items())
    overrides = [*setting.overrides.split(), f"seed={seed}", *extra]
    print(f"fedmed run {' '.join(overrides)} # {setting.split} split", flush=True)
    with tempfile.TemporaryDirectory(prefix="fedmed-xray-") as folder:
        run, log, before = Path(folder) / "run", Path(folder) / "log", _cpu_seconds()
        places = [f'task.path="{data}"', f"task.declared_sizes={{{declared}}}", f'run_dir="{run}"']
        with log.open("wb") as output:
            command = [fedmed(), "run", *overrides, *places]
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            print("".join(log.read_text(errors="replace").splitlines(keepends=True)[-20:]), file=sys.stderr)
            return None
        cpu = _cpu_seconds() - before
        auc, accuracy = score(run, held_out_hospital(work, "test"))
        summary = json.loads((run / "summary.json").read_text())
    print(f"  AUC {auc:.4f}, accuracy {accuracy:.4f}, {cpu:.0f} s of processor", flush=True)
    return _row(setting, summary, auc=auc, accuracy=accuracy, cpu=cpu)


def _row(setting: Setting, summary: dict[str, Any], *, auc: float, accuracy: float, cpu: float) -> Row:
    values = (
        setting.split,
        setting.strategy,
        setting.epsilon,
        epsilon_spent(summary),
        summary["seed"],
        f"{auc:.4f}",
        f"{accuracy:.4f}",
        f"{summary['seconds']['total']:.1f}",
        f"{cpu:.1f}",
        commit_mark(),
    )
    return {name: str(value) for name, value in zip(COLUMNS, values, strict=True)}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_missing(arguments: argparse.Namespace, path: Path) -> int:
    """Fill results.csv row by row; 1 at the first run that fails, else 0."""
    seeds = SEEDS[:1] if arguments.quick else SEEDS
    extra = ["rounds=2", "strategy.average_last=1"] if arguments.quick else []
    for setting in SETTINGS:
        if arguments.only and setting.name not in arguments.only:
            continue
        for seed in seeds:
            rows = read_rows(path)
            if any(row["seed"] == str(seed) for row in setting.rows(rows)):
                continue
            row = run_one(setting, seed, arguments.work.resolve(), extra)
            if row is None:
                return 1
            write_rows(path, [*rows, row], COLUMNS, order)
    return 0


def main() -> int:
    """Run what is missing, then write table and figure; exit code 0, 1 where a run failed, 130 after Ctrl-C."""
    parser = benchmark_parser(
        __doc__, FOLDER, quick="one seed, two rounds, in a temporary folder", names=(s.name for s in SETTINGS)
    )
    parser.add_argument(
        "--work", type=Path, default=FOLDER / "data", help="folder of the hospitals; default: data, here"
    )
    asked = parser.parse_args()
    taken_in()
    folder = None if asked.quick else asked.output
    return fill(folder, lambda path: run_missing(asked, path), table, draw_figure)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
