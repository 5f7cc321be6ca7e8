"""The arrays become hospitals: DICOM files, ingested as a site ingests its own. What is there already is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

from experiments.shared.commands import fedmed

CLASSES = "normal,pneumonia"
# A draw of the skewed split that leaves a hospital with fewer patients is passed over: see README.md.
FEWEST = 100


def arrays() -> Path:
    """The file that FEDMED_DATA holds."""
    folder = os.environ.get("FEDMED_DATA")
    path = Path(folder or "") / "pneumoniamnist.npz"
    if not folder or not path.is_file():
        sys.exit(f"FEDMED_DATA={folder}: expected a folder with pneumoniamnist.npz, as README.md says")
    return path


def training_hospitals(work: Path, *, seed: int, label_skew: float | None) -> tuple[Path, dict[str, int]]:
    """Four hospitals of the official training images.

    Returns:
        the folder of ingested data, and each hospital's number of patients.
    """
    skew = [] if label_skew is None else ["--label-skew", f"{label_skew:g}"]
    name = f"{'even' if label_skew is None else 'skew'}-{seed}"
    found = _make(work / name, "--hospitals", "4", "--split", "train", "--seed", str(seed), *skew)
    sizes = _sizes(work / name)
    if label_skew is not None and min(sizes.values()) < FEWEST:
        sys.exit(f"seed={seed}: leaves a hospital with {min(sizes.values())} patients; expected {FEWEST}")
    return found, sizes


def held_out_hospital(work: Path, split: str) -> Path:
    """The official `val` or `test` images as one hospital more, which takes part in no training."""
    return _make(work / split, "--hospitals", "1", "--name", split, "--split", split) / split


def _make(folder: Path, *options: str) -> Path:
    export, ingested = folder / "export", folder / "ingested"
    if not (export / "hospitals.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Scanners differ in encoding alone: pixels are those of the arrays.
        fixed = ["--class-names", CLASSES, "--scanner-shift", "0"]
        _run("task", "from-npz", str(arrays()), str(export), *fixed, *options)
    for hospital in _sizes(folder):
        target = ingested / hospital
        if not (target / "manifest.json").exists():
            source = export / hospital
            labels = str(source / "labels.csv")
            _run("site", "ingest", str(source / "dicom"), str(target), "--labels", labels, "--name", hospital)
    return ingested


def _sizes(folder: Path) -> dict[str, int]:
    made = json.loads((folder / "export" / "hospitals.json").read_text())
    return {hospital["name"]: hospital["patients"] for hospital in made["hospitals"]}


def _run(*arguments: str) -> None:
    print(f"fedmed {' '.join(arguments)}", flush=True)
    done = subprocess.run([fedmed(), *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"exit code {done.returncode}: {done.stderr.strip()}")
