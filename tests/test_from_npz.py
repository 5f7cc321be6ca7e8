"""`fedmed task from-npz` and `fedmed task phantoms` as a person meets them."""

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.commands import Commands, light, wait_for
from tests.evidence import some


@pytest.fixture(scope="module", name="light")
def light_commands() -> Commands:
    """Commands in a process that has not imported torch."""
    return light()


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of PneumoniaMNIST's shape."""
    path = tmp_path_factory.mktemp("npz") / "mnist.npz"
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 60), ("val", 20), ("test", 20)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 2).astype(np.uint8)[:, None]
    np.savez_compressed(path, **arrays)
    return path


def test_hospitals_and_the_next_commands(npz: Path, light: Commands, tmp_path: Path) -> None:
    ended = light(
        "task", "from-npz", str(npz), "out", "--class-names", "normal,pneumonia", "--images-per-patient", "1-4",
        cwd=tmp_path,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert re.search(
        r"^hospital-1: \d+ patients \(\d+ normal, \d+ pneumonia\), \d+ images, scanner Lumen 2$",
        ended.out,
        re.M,
    )
    assert ended.out.endswith("folder: out\n")
    assert (
        "  fedmed site ingest out/hospital-3/dicom ingested/hospital-3 --labels out/hospital-3/labels.csv "
        "--name hospital-3\n" in ended.err
    )
    assert (
        "fedmed run task=dicom model=cnn adapter=full task.path=ingested 'task.positive=[pneumonia]'"
        in ended.err
    )
    assert not ended.torch
    assert len(list((tmp_path / "out").rglob("*.dcm"))) == 60
    assert os.listdir(tmp_path) == ["out"]


def test_json_says_the_same(npz: Path, light: Commands, tmp_path: Path) -> None:
    ended = light(
        "task", "from-npz", str(npz), "out", "--split", "all", "--hospitals", "2", "--json", cwd=tmp_path
    )
    said = json.loads(ended.out)
    assert [hospital["name"] for hospital in said["hospitals"]] == ["hospital-1", "hospital-2"]
    assert sum(hospital["images"] for hospital in said["hospitals"]) == 100
    assert (len(said["next"]), said["positive"], ended.err) == (3, ["1"], "")


def test_phantoms(light: Commands, tmp_path: Path) -> None:
    ended = light(
        "task", "phantoms", "out", "--patients", "10", "--size", "32", "--name", "A", "--json", cwd=tmp_path
    )
    assert ended.code == 0, ended.err
    said = json.loads(ended.out)
    assert said["hospitals"][0]["by_label"] == {"clear": 7, "opacity": 3}
    assert not ended.torch


WRONG = [
    ("from-npz none.npz out", "FILE=none.npz: no such file"),
    ("from-npz . out", "FILE=.: a folder"),
    ("from-npz text.npz out", "not an .npz file"),
    ("from-npz FILE out --split valid", "--split=valid: expected train, val, test or all"),
    ("from-npz FILE out --hospitals 100", "hospitals=100: expected at most 60: an image each"),
    ("from-npz FILE out --hospitals many", "Invalid value for '--hospitals'"),
    (
        "from-npz FILE out --images-per-patient some",
        "--images-per-patient=some: expected a number, or two as in 1-4",
    ),
    ("from-npz FILE out --prevalences half", "--prevalences=half: expected numbers as in 0.2,0.4"),
    ("from-npz FILE out --label-skew -1", "label_skew=-1.0: expected Dirichlet's alpha"),
    ("from-npz FILE out --class-names one", "class_names=one"),
    ("from-npz FILE out --positive ill", "positive=ill: expected one of the classes 0, 1"),
    ("from-npz FILE out --key Name", "key=Name: expected StudyInstanceUID"),
    ("from-npz FILE full", "OUT=full: not empty; expected a new or an empty folder"),
    ("from-npz FILE text.npz", "OUT=text.npz: a file"),
    ("from-npz FILE none/out", "no folder"),
    ("from-npz FILE .", "OUT=.: "),
    ("phantoms full", "OUT=full: not empty"),
    ("phantoms out --patients 0", "patients=0: expected 2 to 100,000"),
    ("phantoms out --difficulty 0", "difficulty=0.0: expected > 0"),
    ("phantoms out --size 4", "size=4: expected 16 to 1024"),
]


@pytest.mark.parametrize(("typed", "says"), some(WRONG, 2))
def test_a_wrong_input_is_one_line_and_leaves_nothing(
    typed: str, says: str, npz: Path, light: Commands, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "text.npz").write_text("no arrays")
    before = sorted(tmp_path.rglob("*"))
    ended = light("task", *(str(npz) if word == "FILE" else word for word in typed.split()), cwd=tmp_path)
    assert re.fullmatch(r"error: [^\n]+\n", ended.err), ended.err
    assert says in ended.err
    assert (ended.code, ended.out, ended.torch) == (2, "", False)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_not_installed_is_said(npz: Path, light: Commands, tmp_path: Path) -> None:
    missing = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'pydicom' else find(name, *rest)"
    )
    ended = light("task", "from-npz", str(npz), "out", cwd=tmp_path, before=missing)
    assert ended.err == "error: 'pydicom' is not installed; install it with: pip install 'fedmed[dicom]'\n"
    assert ended.code == 2


def test_ctrl_c_leaves_nothing(light: Commands, tmp_path: Path) -> None:
    def interrupt(pid: int, _: Path) -> None:
        wait_for(lambda: next(tmp_path.rglob("*.dcm"), None))
        os.killpg(pid, signal.SIGINT)

    ended = light(
        "task", "phantoms", "out", "--patients", "6000", "--size", "16", cwd=tmp_path, during=interrupt
    )
    assert (ended.code, ended.err) == (130, "error: interrupted; nothing was kept\n")
    assert not os.listdir(tmp_path)
