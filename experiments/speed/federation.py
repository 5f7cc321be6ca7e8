"""A federated run of four sites beside a bare loop of the same work, on the same cores.

    python experiments/speed/federation.py [--rounds N] [--folder DIR]

The work: `model=cnn` on chest X-rays of 28 pixels, split evenly, sample rate 1/16, 160 steps a site over 10 rounds,
noise 1.0, clip 1.0, delta 1e-5. Both sides are commands, and their whole time counts, start-up included. Before, the
images become hospitals of DICOM files and are ingested, once; that is not in the time. The images are
`$FEDMED_DATA/pneumoniamnist.npz`; where FEDMED_DATA is not set, made-up ones of the same shape.
"""

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE / "federation.csv"
COLUMNS = ("side", "round", "seconds", "cpu_seconds", "peak_mb", "epsilon")
SITES, HELD_OUT, RATE = 4, 0.2, 1 / 16
NAMES = [f"site-{number + 1}" for number in range(SITES)]


def images(folder: Path, count: int) -> Path:
    """The file of images: the real one, or made-up ones of its shape."""
    given = os.environ.get("FEDMED_DATA")
    if given:
        return Path(given) / "pneumoniamnist.npz"
    made, draws = folder / "made-up.npz", np.random.default_rng(0)
    values = draws.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = (np.arange(count) % 2).astype(np.uint8)[:, None]
    np.savez(made, train_images=values, train_labels=labels)
    return made


def fedmed(*arguments: str, folder: Path) -> None:
    """A command of this installation."""
    command = [sys.executable, "-c", "from fedmed.cli.main import main; main()", *arguments]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"fedmed {' '.join(arguments)}: {ended.stderr[-1000:]}")


def timed(action: Callable[[], None]) -> dict[str, float]:
    """Seconds on the clock, and of all cores, from before a command's process starts until it has ended."""
    began, before = time.monotonic(), os.times()
    action()
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": time.monotonic() - began, "cpu_seconds": cpu}


def prepare(folder: Path, source: Path) -> None:
    """Hospitals of DICOM files, ingested: `folder`/data."""
    if (folder / "data" / NAMES[-1]).exists():
        return
    names = [word for name in NAMES for word in ("--name", name)]
    fedmed(
        "task", "from-npz", str(source), "export", "--hospitals", str(SITES), *names, "--class-names",
        "normal,pneumonia", "--scanner-shift", "0", folder=folder,
    )  # fmt: skip
    for name in NAMES:
        fedmed(
            "site", "ingest", f"export/{name}/dicom", f"data/{name}", "--labels", f"export/{name}/labels.csv",
            "--name", name, folder=folder,
        )  # fmt: skip


def settings(patients: int, rounds: int, steps: int) -> list[str]:
    """Of the run; `patients` of each site, with those that are held out."""
    sizes = ", ".join(f"{name}: {patients}" for name in NAMES)
    return [
        "task=dicom", "task.title=pneumonia", "task.path=data", "task.positive=[pneumonia]",
        "task.negative=[normal]", "task.image_size=28", f"task.declared_sizes={{{sizes}}}",
        "task.images_per_patient=1", f"task.test_fraction={HELD_OUT}", "model=cnn", "adapter=full", "privacy=dp",
        "privacy.epsilon=null", "privacy.noise_multiplier=1.0", "privacy.max_grad_norm=1.0", "privacy.delta=1e-5",
        "privacy.metrics=none", "tracking=none", "federation.workers=2", f"rounds={rounds}",
        f"training.steps_per_round={steps}", f"training.sample_rate={RATE}", "training.learning_rate=0.1",
        "training.optimizer=sgd",
    ]  # fmt: skip


def run_federation(folder: Path, overrides: list[str], number: int) -> dict[str, float]:
    """Seconds of `fedmed run`, from before the process starts until it has ended, and what it says of itself."""
    # Of an earlier call in the same folder.
    shutil.rmtree(folder / f"run-{number}", ignore_errors=True)
    seconds = timed(lambda: fedmed("run", *overrides, f"run_dir=run-{number}", folder=folder))
    summary = json.loads((folder / f"run-{number}" / "summary.json").read_text())
    epsilon = summary["privacy"]["consortium"]["one_site"]["epsilon"]
    return seconds | {"peak_mb": summary["peak_rss_mb"], "epsilon": epsilon}


def run_bare(source: Path, patients: int, rounds: int, steps: int, threads: int) -> dict[str, float]:
    """Seconds of the bare loop, likewise, on as many threads as asked."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [
        sys.executable, str(HERE / "bare.py"), str(source), "--sites", str(SITES), "--rounds", str(rounds),
        "--steps", str(steps), "--patients", str(patients), "--rate", str(RATE),
    ]  # fmt: skip
    said: list[str] = []

    def run() -> None:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        said.append(ended.stdout)

    seconds = timed(run)
    return seconds | {"peak_mb": json.loads(said[0])["peak_mb"]}


def measure(
    folder: Path, *, repetitions: int, rounds: int, steps: int, count: int, threads: int
) -> list[dict[str, object]]:
    """Rows of both sides, alternating."""
    source = images(folder, count)
    prepare(folder, source)
    with np.load(source) as file:
        patients = len(file["train_images"]) // SITES
    rows: list[dict[str, object]] = []
    for number in range(repetitions):
        found = {
            "fedmed": run_federation(folder, settings(patients, rounds, steps), number),
            "bare loop": run_bare(source, round((1 - HELD_OUT) * patients), rounds, steps, threads),
        }
        rows += [{"side": side, "round": number} | values for side, values in found.items()]
        print(*(f"{side}: {values['seconds']:.1f} s" for side, values in found.items()), sep=", ", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=16, help="of each site in a round")
    parser.add_argument("--images", type=int, default=3882, help="made-up ones, where FEDMED_DATA is not set")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the bare loop")
    parser.add_argument("--folder", help="where the ingested images are kept; else a temporary one")
    parser.add_argument("--results", default=str(RESULTS))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(asked.folder or temporary).resolve()
        rows = measure(
            folder, repetitions=asked.repetitions, rounds=asked.rounds, steps=asked.steps, count=asked.images,
            threads=asked.threads,
        )  # fmt: skip
    with open(asked.results, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    sides = {side: [row for row in rows if row["side"] == side] for side in ("fedmed", "bare loop")}
    seconds, cpu, peaks = (
        {side: statistics.median(float(str(row[name])) for row in own) for side, own in sides.items()}
        for name in ("seconds", "cpu_seconds", "peak_mb")
    )
    for side in sides:
        print(f"{side:<10} {seconds[side]:>6.1f} s {cpu[side]:>6.1f} CPU s {peaks[side]:>6.0f} MB")
    clock, work = (values["fedmed"] / values["bare loop"] for values in (seconds, cpu))
    print(f"ratio {clock:.2f} (CPU {work:.2f}), epsilon {sides['fedmed'][0]['epsilon']:.4f}")


if __name__ == "__main__":
    main()
