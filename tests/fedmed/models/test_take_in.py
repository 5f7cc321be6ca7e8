"""A folder of converted weights is copied and pinned; what is no part of a model stays behind."""

from pathlib import Path

import pytest

from fedmed.errors import ConfigError, ModelError
from fedmed.models.pins import find, models_folder
from fedmed.models.take_in import take_in
from tests.fedmed.models.test_archive import FILES


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    folder = tmp_path / "converted"
    folder.mkdir()
    for name, content in (FILES | {"pytorch_model.bin": b"a pickle", "modeling.py": b"import os"}).items():
        (folder / name).write_bytes(content)
    return folder


def test_a_folder_is_copied_and_pinned_by_its_files_alone(converted: Path) -> None:
    pin = take_in(converted, "mine")
    assert (pin.hub, find("local/mine")) == ("local/mine", pin)
    assert {path.name: path.read_bytes() for path in pin.folder.iterdir()} == FILES
    assert take_in(converted, "mine") == pin
    (converted / "vocab.txt").write_bytes(b"other")
    with pytest.raises(ModelError, match=r"^local/mine: here already at .* --replace$"):
        take_in(converted, "mine")
    other = take_in(converted, "mine", replace=True)
    assert other.revision != pin.revision
    assert other.sha256 == pin.sha256
    assert not pin.folder.exists()


def test_a_folder_without_weights_or_settings_is_refused(converted: Path) -> None:
    (converted / "model.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"converted: no model\.safetensors in it; write it with save_pretrained"
    ):
        take_in(converted, "mine")
    assert not models_folder().exists()


@pytest.mark.parametrize("name", ["", "a/b", "..", "a--b", "a b", "é"])
def test_what_is_no_name_is_refused(converted: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^--name="):
        take_in(converted, name)
