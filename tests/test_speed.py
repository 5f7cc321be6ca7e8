"""The scripts of experiments/speed at tiny counts: they run, and what they compare is the same work."""

import csv
import importlib
import itertools
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from fedmed.privacy.grid import Grid
from tests.commands import heavy
from tests.evidence import FULL

SPEED = Path(__file__).resolve().parents[1] / "experiments" / "speed"


def run(script: str, *arguments: str, **environment: str) -> str:
    ended = subprocess.run(
        [sys.executable, str(SPEED / script), *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SPEED.parents[1]), **environment},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def step() -> ModuleType:
    sys.path.insert(0, str(SPEED))
    try:
        return importlib.import_module("step")
    finally:
        sys.path.remove(str(SPEED))


@pytest.mark.parametrize("family", ["cnn", "suffix", "head", "mlp"])
def test_both_sides_take_the_same_step_but_for_noise(
    step: ModuleType, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without noise they go the same way, up to the clipping of long gradients."""
    monkeypatch.setattr(Grid, "noise", lambda _, count, __: np.zeros(count, dtype=np.int64))
    options = {"size": 32, "width": 64, "layers": 3, "adapter": "lora" if family == "suffix" else "full"}
    changes = []
    for side in ("plain", "private"):
        sides = step.Sides(step.Setting("tiny", family, 4, images=2, **options))
        model = sides.models[side]
        before = [p.detach().clone() for p in model.parameters()]
        getattr(sides, side)()
        changes.append(
            torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
        )
    plain, private = changes
    assert plain.norm() > 0
    assert torch.nn.functional.cosine_similarity(plain, private, dim=0) > 0.9


def test_a_setting_is_measured_in_all_its_parts(step: ModuleType) -> None:
    found = step.measured(step.Setting("tiny", "cnn", 4, size=16), 2)
    assert found["ratio"] == pytest.approx(found["private_ms"] / found["plain_ms"])
    assert all(found[name] > 0 for name in ("network_ms", "clip_ms", "noise_ms"))
    assert found.keys() <= set(step.COLUMNS)


def test_the_gpu_script_goes_the_same_way_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        "gpu.py", "--device", "cpu", "--batch", "2", "--size", "32", "--width", "64", "--layers", "2", "--steps", "1",
        "--results", str(tmp_path / "gpu.csv"),
    ]  # fmt: skip
    monkeypatch.syspath_prepend(str(SPEED))
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(SPEED / "gpu.py"), run_name="__main__")
    with (tmp_path / "gpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    told = [(row["adapter"], row["precision"], row["side"]) for row in rows]
    assert told == list(itertools.product(("head", "lora", "full"), ("fp32", "bf16"), ("plain", "private")))
    assert all(float(row["images_per_second"]) > 0 and float(row["peak_mb"]) > 0 for row in rows)


def here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The script in this process, of two sites, its commands in forks: each would import torch or pydicom anew."""
    monkeypatch.syspath_prepend(str(SPEED))
    federation = importlib.import_module("federation")

    def fedmed(*words: str, folder: Path) -> None:
        no_plots = "import strategies.run; strategies.run.write_report = lambda *_: None"
        ended = heavy()(*words, cwd=folder, before=no_plots if words[0] == "run" else "")
        assert ended.code == 0, ended.err

    monkeypatch.setattr(federation, "fedmed", fedmed)
    monkeypatch.setattr(federation, "SITES", 2)
    monkeypatch.setattr(federation, "NAMES", federation.NAMES[:2])
    monkeypatch.setenv("FEDMED_DATA", "")
    monkeypatch.setattr(sys, "argv", ["federation.py", *arguments])
    federation.main()


def test_a_federation_and_the_bare_loop_do_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From made-up images through DICOM and ingestion; the epsilon is that of the work."""
    results = tmp_path / "federation.csv"
    arguments = [
        "--repetitions", "1", "--rounds", "1", "--steps", "2", "--images", "120", "--threads", "1",
        "--folder", str(tmp_path), "--results", str(results),
    ]  # fmt: skip
    if FULL:
        run("federation.py", *arguments, FEDMED_DATA="")
    else:
        here(monkeypatch, *arguments)
    with results.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["side"] for row in rows] == ["fedmed", "bare loop"]
    assert 0.5 < float(rows[0]["epsilon"]) < 3
    assert all(
        math.isfinite(float(row[name])) for row in rows for name in ("seconds", "cpu_seconds", "peak_mb")
    )
