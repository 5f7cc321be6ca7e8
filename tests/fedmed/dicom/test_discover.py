"""Which files an export holds, whatever stands in its folders and in its DICOMDIR."""

import random
import warnings
from pathlib import Path

import pytest
from pydicom.fileset import FileSet

from fedmed.dicom.discover import discover
from fedmed.dicom.reasons import Reason
from fedmed.errors import DataError
from tests.conftest import count
from tests.fedmed.dicom.files import export


@pytest.fixture
def disc(tmp_path: Path) -> Path:
    """The DICOMDIR of four files."""
    made = FileSet()
    for path in sorted(export(tmp_path / "src", patients=2).rglob("*.dcm")):
        made.add(path)
    made.write(tmp_path / "disc")
    return tmp_path / "disc" / "DICOMDIR"


def test_links_that_lead_nowhere_are_told(tmp_path: Path) -> None:
    folder = export(tmp_path / "src", patients=1)
    (folder / "gone").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    (folder / "up").symlink_to("..")
    (folder / "another").symlink_to(folder / "p0" / "0.dcm")
    found = discover(folder)
    assert list(found.files) == ["another", "p0/0.dcm", "p0/1.dcm"]
    assert found.unread == {"gone": Reason.MISSING_FILE, "loop": Reason.UNREADABLE}


def test_a_dicomdir_names_its_files_and_none_outside(disc: Path) -> None:
    found = discover(disc)
    assert len(found.files) == 4
    assert (found.root, found.unread) == (disc.parent, {})


def test_a_broken_dicomdir_ends_in_files_or_in_one_line_that_quotes_nothing(disc: Path) -> None:
    whole, draw = disc.read_bytes(), random.Random(1)
    refused: list[str] = []
    damaged = 0
    for number in range(count(300, 3000)):
        broken = bytearray(whole)
        for _ in range(draw.choice((1, 4, 40))):
            broken[draw.randrange(132, len(broken))] = draw.randrange(256)
        disc.write_bytes(broken[: draw.randrange(len(broken))] if number % 5 == 0 else broken)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                damaged += bool(discover(disc).unread)
            except DataError as error:
                refused.append(str(error))
    assert refused
    assert all("expected the folder of a PACS export" in error for error in refused)
    assert damaged
