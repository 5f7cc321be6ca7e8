"""The chest X-ray benchmark: hospitals of DICOM files, `fedmed run` for every setting and seed, then table and figure.

Needs the environment variable FEDMED_DATA: a folder with pneumoniamnist.npz. Rows that results.csv already holds are
not run again: the same command continues an interrupted benchmark, and deleting rows repeats them.

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

from figure import draw_figure
from hospitals import fedmed, held_out_hospital, training_hospitals
from results import (
    BEGIN,
    COLUMNS,
    END,
    FOLDER,
    LABEL_SKEW,
    SEEDS,
    SETTINGS,
    Row,
    Setting,
    read_rows,
    replace,
    table,
    write_rows,
)
from score import score


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
    privacy = summary["privacy"]
    spent = [site["epsilon"] for site in privacy["sites"].values()]
    values = (
        setting.split,
        setting.strategy,
        setting.epsilon,
        f"{max(spent):.4f}" if privacy["private"] else "off",
        summary["seed"],
        f"{auc:.4f}",
        f"{accuracy:.4f}",
        f"{summary['seconds']['total']:.1f}",
        f"{cpu:.1f}",
        _commit(),
    )
    return {name: str(value) for name, value in zip(COLUMNS, values, strict=True)}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _commit() -> str:
    """The checkout's short hash, marked where the packages or the configuration differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=FOLDER.parents[1], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "fedmed", "strategies", "clients", "configs")
    return (git("rev-parse", "--short=7", "HEAD") or "unknown") + ("-dirty" if changed else "")


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
            write_rows(path, [*rows, row])
    return 0


def write_pages(folder: Path) -> None:
    """Write README's table (where the folder has a README) and the figure from results.csv."""
    rows = read_rows(folder / "results.csv")
    if not rows:
        return
    print(table(rows))
    draw_figure(rows, folder)
    readme = folder / "README.md"
    if readme.exists():
        before, _, rest = readme.read_text().partition(BEGIN)
        replace(readme, f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [setting.name for setting in SETTINGS]
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="SETTING", help=f"of {', '.join(names)}; default: all"
    )
    parser.add_argument(
        "--work", type=Path, default=FOLDER / "data", help="folder of the hospitals; default: data, here"
    )
    parser.add_argument(
        "--output", type=Path, default=FOLDER, help="folder of results.csv and the figure; default: here"
    )
    parser.add_argument("--quick", action="store_true", help="one seed, two rounds, in a temporary folder")
    return parser.parse_args()


def main() -> int:
    """Run what is missing, then write table and figure; exit code 0, 1 where a run failed, 130 after Ctrl-C."""
    arguments = _arguments()
    if arguments.quick:
        with tempfile.TemporaryDirectory(prefix="fedmed-quick-") as folder:
            code = run_missing(arguments, Path(folder) / "results.csv")
            write_pages(Path(folder))
        return code
    arguments.output.mkdir(parents=True, exist_ok=True)
    try:
        return run_missing(arguments, arguments.output / "results.csv")
    except KeyboardInterrupt:
        return 130
    finally:
        write_pages(arguments.output)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
