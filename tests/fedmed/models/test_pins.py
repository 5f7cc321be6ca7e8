"""A model is there whole or not at all, whatever interrupts; what is no id of the hub names no file."""

import os
import threading
import time
from pathlib import Path

import pytest

from fedmed.errors import ModelError
from fedmed.models import pins
from fedmed.models.pins import Pin, differences, drafting, find, held, is_hub_id, located, models_folder
from tests.fedmed.models.test_archive import FILES, placed

OTHER = FILES | {"config.json": b'{"model_type": "vit"}'}


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("step", ["fsync", "rename", "write_json"])
def test_a_process_killed_while_it_replaces_a_model_leaves_the_old_one(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = placed()

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(pins if step == "write_json" else pins.os, step, killed)
        with pytest.raises(Killed):
            placed(OTHER, revision="b" * 40)
    assert find("org/model") == before
    assert differences(before) == []
    assert [path for path in models_folder().iterdir() if path.name.startswith(".draft")] == []
    after = placed(OTHER, revision="b" * 40)
    assert (find("org/model"), differences(after)) == (after, [])


def test_two_processes_at_once_leave_one_whole_model() -> None:
    versions = [placed(FILES, revision="a" * 40), placed(OTHER, revision="b" * 40)]
    start = threading.Barrier(4)

    def again(number: int) -> None:
        start.wait()
        for _ in range(10):
            placed((FILES, OTHER)[number % 2], revision="ab"[number % 2] * 40)

    threads = [threading.Thread(target=again, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left = find("org/model")
    assert left in versions
    assert differences(left) == []
    assert sorted(path.name for path in models_folder().iterdir()) == [
        ".lock",
        "org--model.json",
        left.folder.name,
    ]


def test_a_commit_that_was_pulled_is_located_and_no_other() -> None:
    pin = placed()
    assert located("org/model", "a" * 40) == pin.folder
    assert located("org/model", "b" * 40) is None
    assert located("org/other", "a" * 40) is None


@pytest.mark.parametrize("name", ["config.json", "vocab.txt"])
def test_what_is_read_beside_the_weights_is_held_to_the_pin_each_time(name: str) -> None:
    """Also where its size is the same: a site with another vocabulary would train on something else."""
    pin = placed()
    content = (pin.folder / name).read_bytes()
    (pin.folder / name).write_bytes(content[:-1] + b"?")
    with pytest.raises(ModelError, match=rf"{name} was changed; run: fedmed models pull org/model$"):
        located("org/model", "a" * 40)
    (pin.folder / name).unlink()
    (pin.folder / name).symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match=rf"{name} is missing"):
        located("org/model", "a" * 40)


def test_a_file_that_was_added_is_refused() -> None:
    """transformers would read adapter_config.json, and a .py or .bin that stands there."""
    pin = placed()
    (pin.folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapter_config\.json was added"):
        located("org/model", "a" * 40)


def test_an_id_of_the_hub_is_one_file_beside_the_others() -> None:
    good = ["a", "a/b", "org/model", "a.b/c_d-e", "facebook/dinov2-base", "A/b", "a/b.json"]
    bad = [
        "",
        ".",
        "..",
        "a/..",
        "../a",
        "a/b/c",
        "/a",
        "a/",
        "a--b",
        "a/b--c",
        "a-/b",
        "a\\b",
        "a b",
        "a\n",
        "á/b",
    ]
    assert [is_hub_id(text) for text in good] == [True] * len(good)
    assert [is_hub_id(text) for text in bad] == [False] * len(bad)
    folders = set()
    for hub in good:
        pin = placed(hub=hub)
        assert pin.folder.parent == models_folder()
        folders.add(pin.folder)
    assert len(folders) == len(good)
    assert held() == sorted(good)
    (models_folder() / "not a pin.json").write_text("{}")
    assert held() == sorted(good)


def test_what_a_killed_process_left_is_removed_later() -> None:
    root = models_folder()
    for name, age in ((".draft-old", 2 * 24 * 3600), (".draft-young", 60)):
        (root / name).mkdir(parents=True)
        (root / name / "model.safetensors").write_bytes(b"x")
        os.utime(root / name, (time.time() - age,) * 2)
    placed()
    assert sorted(path.name for path in root.glob(".draft-*")) == [".draft-young"]


def test_a_models_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDMED_HOME", str(tmp_path / "file"))
    with (
        pytest.raises(ModelError, match=r"cannot be written \(Not a directory\); set FEDMED_HOME to another"),
        drafting(0),
    ):
        pass


def test_others_on_the_machine_may_read_a_model() -> None:
    """A site's process often runs under another account than the person who pulled."""
    pin: Pin = placed()
    mask = os.umask(0)
    os.umask(mask)
    assert pin.folder.stat().st_mode & 0o777 == 0o777 & ~mask
