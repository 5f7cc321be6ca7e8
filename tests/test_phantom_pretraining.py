"""The script that made the shipped encoder: it runs, repeats itself, and draws what it says."""

import contextlib
import io
import multiprocessing
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel

from experiments.phantom_encoder import pictures
from tests.evidence import FULL, count

SCRIPTS = Path(__file__).resolve().parents[1] / "experiments" / "phantom_encoder"


def _here(*words: str) -> None:
    sys.path.insert(0, str(SCRIPTS))
    sys.argv = list(words)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        runpy.run_path(words[0], run_name="__main__")
    assert said.getvalue().count("step 2 of 2") == 1


def pretrained(*outs: Path) -> list[bytes]:
    """The weights after two steps, of the script run once for each folder in a process of its own."""
    arguments = ["--steps", "2", "--reference", str(count(64, 128)), "--seed", "3"]
    script = str(SCRIPTS / "pretrain.py")
    for out in outs:
        if FULL:
            ended = subprocess.run(
                [sys.executable, script, str(out), *arguments], capture_output=True, text=True
            )
            assert ended.returncode == 0, ended.stderr
            assert ended.stdout.count("step 2 of 2") == 1
        else:
            # To import transformers takes longer than two steps.
            fork = multiprocessing.get_context("fork").Process(
                target=_here, args=(script, str(out), *arguments)
            )
            fork.start()
            fork.join()
            assert fork.exitcode == 0
    return [(out / "model.safetensors").read_bytes() for out in outs]


def test_equal_seeds_give_equal_files_that_transformers_loads(tmp_path: Path) -> None:
    one, other = pretrained(tmp_path / "a", tmp_path / "b")
    assert one == other
    encoder = AutoModel.from_pretrained(tmp_path / "a", local_files_only=True)
    with torch.no_grad():
        pooled = encoder.eval()(torch.randn(5, 3, 64, 64)).pooler_output
    assert pooled.shape == (5, encoder.config.hidden_sizes[-1])
    assert pooled.std(0).min() > 0


def test_pictures_are_as_they_are_described() -> None:
    made = pictures.draw(200, np.random.default_rng(1))
    assert made.images.shape == (200, pictures.SIDE, pictures.SIDE)
    assert made.images.dtype == np.float32
    assert made.images.min() >= 0
    assert made.images.max() <= 1
    well = made.kinds.sum(axis=1) == 0
    assert 0.3 < well.mean() < 0.5
    # Where there is no finding nothing is added; what a finding adds lies in the map and in its zone's measures.
    assert not made.maps[well].any()
    assert not made.measures[well, -12:].any()
    visible = np.abs(made.maps).max(axis=(1, 2)) > 0.01
    assert visible[~well].mean() > 0.8
    assert made.measures[visible, -12:].any(axis=1).all()


def test_a_brighter_map_is_a_brighter_picture() -> None:
    """Of one patient, told apart by the findings alone: maps and pictures are of the same place."""
    rng = np.random.default_rng(2)
    well = pictures.draw_patients(rng, np.zeros(50, np.int64), 1.0)
    ill, kinds = pictures._with_findings(rng, well)
    pose = pictures.draw_poses(rng, 50)
    added = pictures.render(ill, pose, 64) - pictures.render(well, pose, 64)
    cells = added.reshape(50, 16, 4, 16, 4).mean(axis=(2, 4))
    coarse = pictures.render(ill, pose, 16) - pictures.render(well, pose, 16)
    assert kinds.any()
    assert np.corrcoef(cells.ravel(), coarse.ravel())[0, 1] > 0.9
    # A bulla takes brightness away, and alone among the kinds.
    bulla = np.flatnonzero((kinds == np.eye(6)[3]).all(axis=1))
    assert len(bulla) > 0
    assert added[bulla].sum() < 0
