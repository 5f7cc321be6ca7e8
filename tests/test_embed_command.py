"""`fedmed embed` as a person types it."""

import json
from pathlib import Path

import numpy as np
import pytest

from fedmed.embeddings import Embeddings
from tests.commands import heavy, light
from tests.conftest import sha256
from tests.fedmed.models.encoders import image_encoder, image_overrides
from tests.fedmed.models.test_sound import hear
from tests.recordings import recordings
from tests.stores import hospital


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embed")
    hospital(path / "data" / "a", patients=6)
    image_encoder(path / "vit", "vit")
    (path / "empty.txt").write_text("\n \n")
    (path / "bytes.txt").write_bytes(b"\xff\xfe")
    (path / "prompts.txt").write_text("a lung\n")
    (path / "short").write_bytes(b"k")
    (path / "full").mkdir()
    (path / "full" / "x").write_text("")
    return path


def settings(folder: Path, *more: str) -> list[str]:
    return image_overrides(folder / "vit", "vit", folder / "data", *more)


def test_a_site_is_embedded(folder: Path, tmp_path: Path) -> None:
    ended = heavy()("embed", *settings(folder), "--site", "a", "--output", str(tmp_path / "out"), "--json")
    assert ended.code == 0, ended.err
    said = json.loads(ended.out)
    found = Embeddings.open(tmp_path / "out")
    assert said["shape"] == list(found.rows.shape) == [12, 32]
    assert said["data"]["records"] == 12
    assert np.load(tmp_path / "out" / "embeddings.npy", mmap_mode="r").dtype == np.float32
    again = heavy()("embed", *settings(folder), "--site", "a", "--output", str(tmp_path / "out"))
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "is there already" in again.err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--output", "new"], "Missing option '--site'"),
        (["--site", "a"], "Missing option '--output'"),
        (["model=cnn", "adapter=full", "--site", "a", "--output", "new"], "model=cnn: starts from nothing"),
        (["--site", "b", "--output", "new"], "b"),
        (["--site", "a", "--output", "full"], "--output full: is there already"),
        (["--site", "a", "--output", "prompts.txt/x"], "--output prompts.txt/x: cannot be written"),
        (["--site", "a", "--output", "new", "--texts", "none.txt"], "--texts none.txt: No such file"),
        (["--site", "a", "--output", "new", "--texts", "empty.txt"], "no prompt in it; expected one a line"),
        (["--site", "a", "--output", "new", "--texts", "bytes.txt"], "not UTF-8"),
        (["--site", "a", "--output", "new", "--key", "short"], "--key short: expected a file of 32 bytes"),
        (["--site", "a", "--output", "new", f"model.sha256={'0' * 64}"], "model.sha256=000000000000…"),
        (
            ["--site", "a", "--output", "new", "--device", "gpu"],
            "--device gpu: expected auto, cpu, cuda or cuda:N",
        ),
        (["--site", "a", "--output", "new", "modle=x"], "no setting 'modle'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_torch_is_loaded(
    folder: Path, typed: list[str], said: str
) -> None:
    # Another model has no settings of this one.
    base = [text for text in settings(folder) if "model=cnn" not in typed or not text.startswith("model")]
    ended = light()("embed", *base, *typed, cwd=folder)
    assert ended.code == 2, ended.err
    assert ended.err.count("\n") == 1
    assert ended.err.startswith("error: ")
    assert said in ended.err
    assert not ended.torch
    assert not (folder / "new").exists()


def test_an_accelerator_that_is_not_there_is_said(folder: Path, tmp_path: Path) -> None:
    given = ["--site", "a", "--output", str(tmp_path / "out"), "--device", "cuda:99"]
    ended = heavy()("embed", *settings(folder), *given)
    assert ended.code == 2
    assert ended.err.splitlines()[-1].startswith("error: device=cuda:99: PyTorch ")
    assert not (tmp_path / "out").exists()


def test_help_has_examples() -> None:
    ended = light()("embed", "--help")
    assert ended.code == 0
    assert ended.out.count("fedmed embed ") >= 4
    assert "as private as the records" in " ".join(ended.out.split())


def test_ctrl_c_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    # While the files are written.
    before = (
        "import fedmed.embeddings as e, os, signal\n"
        "def stop(*_): os.kill(os.getpid(), signal.SIGINT)\n"
        "e._npy = stop"
    )
    ended = heavy()(
        "embed", *settings(folder), "--site", "a", "--output", str(tmp_path / "out"), before=before
    )
    assert ended.code == 130
    assert ended.err.splitlines()[-1] == "error: interrupted; nothing was kept"
    assert list(tmp_path.iterdir()) == []


def test_sounds_are_embedded_and_not_run(tmp_path: Path) -> None:
    recordings(tmp_path / "data" / "a")
    hear(tmp_path / "hear")
    given = [
        "task=sound", f"task.path={tmp_path / 'data'}", "task.positive=[cough]", "task.negative=[breath]",
        "task.declared_sizes={a: 6}", "model=hear", "model.hub=null", f"model.path={tmp_path / 'hear'}",
        f"model.sha256={sha256(tmp_path / 'hear' / 'model.safetensors')}",
    ]  # fmt: skip
    ended = heavy()("embed", *given, "--site", "a", "--output", str(tmp_path / "out"), "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["shape"] == [12, 24]
    for command in ("run", "plan"):
        ended = light()(command, *given, "tracking=none")
        assert (ended.code, ended.out, ended.torch) == (2, "", False)
        assert ended.err == (
            "error: task=sound: sounds are not trained on; their embeddings: fedmed embed task=sound model=hear …\n"
        )
