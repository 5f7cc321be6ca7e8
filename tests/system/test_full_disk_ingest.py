"""A disk that fills up while an export is ingested: one line, nothing half-written is used, and it goes on once there
is room. Needs root, for its mounts."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedmed.dicom.store import ImageStore
from fedmed.errors import DataError
from tests.fedmed.dicom.files import image, write
from tests.system.test_full_disk import mounted

ROOT = Path(__file__).parents[2]
FILES, SIDE = 24, 256
# What the workers keep, and the data set as much again.
PIXELS = FILES * SIDE * SIDE * 2


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Images of 128 KiB each."""
    for number in range(FILES):
        write(
            tmp_path / "src" / f"{number:02}.dcm", image(SIDE, level=1000 + number), PatientID=f"id-{number % 5}",
            StudyInstanceUID=f"1.2.{number % 5}", SeriesInstanceUID=f"1.2.{number % 5}.1",
            SOPInstanceUID=f"1.2.3.{number}",
        )  # fmt: skip
    return tmp_path / "src"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    resize(place, 1, first=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True, timeout=30)


def resize(place: Path, size: int, *, first: bool = False) -> None:
    mounted("-t", "tmpfs", "-o", f"{'' if first else 'remount,'}size={size}", "tmpfs", str(place))


def command(source: Path, destination: Path, *more: str) -> tuple[int, str, str]:
    words = ["site", "ingest", source, destination, "--name", "a", "--size", "0", "--workers", "2", *more]
    done = subprocess.run(
        [sys.executable, "-c", "from fedmed.cli.main import main; main()", *map(str, words)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def refused(answer: tuple[int, str, str], destination: Path) -> None:
    code, out, err = answer
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {destination}: cannot be written (No space left on device)"), err
    assert err.count("\n") == 1
    assert "make room" in err
    assert "start the same command again" in err
    with pytest.raises(DataError, match="not finished"):
        ImageStore.open(destination)


@pytest.fixture(scope="module")
def manifests() -> dict[tuple[str, ...], dict[str, Any]]:
    """Of undisturbed runs, by what was asked for besides."""
    return {}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _one_key(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose runs can be compared."""
    monkeypatch.setenv("FEDMED_HOME", str(home))


# Bytes of the disk: the pixels of some files; those of all, and no data set; those, and all but the end of it.
SIZES = {
    "a few files": PIXELS // 4,
    "most files": PIXELS * 9 // 10,
    "all files": PIXELS + 200_000,
    "half a data set": PIXELS * 3 // 2,
    "all but the last image": 2 * PIXELS - 8_000,
}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *((name, ()) for name in SIZES),
        *((name, ("--deidentify",)) for name in ("a few files", "half a data set")),
    ],
)
def test_a_disk_that_fills_up_costs_nothing_but_time(
    name: str, more: tuple[str, ...], source: Path, disk: Path, tmp_path: Path, manifests: dict[Any, Any]
) -> None:
    if more not in manifests:
        assert command(source, tmp_path / "whole", *more)[0] == 0
        manifests[more] = manifest(tmp_path / "whole")
    destination = disk / "dst"
    # De-identified files take as much room as the pixels, once.
    room = PIXELS if more and name != "a few files" else 0
    resize(disk, SIZES[name] + room)
    refused(command(source, destination, *more), destination)
    if name == "half a data set":
        # No better without room.
        refused(command(source, destination, *more), destination)
    resize(disk, 8 * PIXELS)
    code, out, err = command(source, destination, *more)
    assert (code, err) == (0, "")
    assert out.startswith(f"{destination}: {FILES} records of 5 patients\n")
    assert ImageStore.open(destination, verify=True).manifest == manifests[more]
    assert len(list(destination.rglob("*.dcm"))) == (FILES if more else 0)
    left = {
        "manifest.json",
        "pixels.npy",
        "records.csv",
        "quarantine.csv",
        "unmatched.csv",
        "contact-sheet.png",
    }
    assert {path.name for path in destination.iterdir()} == left | ({"dicom"} if more else set())


def test_what_was_read_before_the_disk_filled_up_is_kept(source: Path, disk: Path) -> None:
    destination = disk / "dst"
    resize(disk, PIXELS // 2)
    refused(command(source, destination), destination)
    entries = [
        json.loads(line) for line in (destination / ".ingest" / "journal.jsonl").read_text().splitlines()[1:]
    ]
    assert 4 < len(entries) < FILES
    # None of them speaks of pixels that were not written.
    for entry in entries:
        outcome = entry["outcome"]
        part = destination / ".ingest" / outcome["part"]
        assert part.stat().st_size >= outcome["offset"] + outcome["bytes"]


def test_a_disk_without_a_byte_is_one_line(source: Path, disk: Path) -> None:
    resize(disk, 1 << 20)
    with (disk / "ballast").open("wb", buffering=0) as file:
        for size in (4096, 1):
            while True:
                try:
                    file.write(b"x" * size)
                except OSError:
                    break
    code, out, err = command(source, disk / "dst")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "No space left on device" in err
    assert "make room" in err


def test_a_disk_that_takes_no_more_files_is_one_line(source: Path, tmp_path: Path) -> None:
    place = tmp_path / "few"
    place.mkdir()
    mounted("-t", "tmpfs", "-o", "nr_inodes=5", "tmpfs", str(place))
    try:
        code, out, err = command(source, place / "dst")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "No space left on device" in err
        mounted("-o", "remount,nr_inodes=1000", str(place))
        assert command(source, place / "dst")[0] == 0
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True, timeout=30)


def test_a_disk_that_becomes_read_only_is_one_line(source: Path, disk: Path) -> None:
    resize(disk, PIXELS // 2)
    refused(command(source, disk / "dst"), disk / "dst")
    mounted("-o", "remount,ro", str(disk))
    code, out, err = command(source, disk / "dst")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "Read-only file system" in err


def test_an_older_data_set_stays_until_the_new_one_is_read(source: Path, disk: Path) -> None:
    destination = disk / "dst"
    resize(disk, 8 * PIXELS)
    assert command(source, destination)[0] == 0
    before = manifest(destination)
    used = sum(path.stat().st_size for path in destination.iterdir())
    shutil.copy(source / "00.dcm", source / "copy.dcm")
    resize(disk, used + PIXELS // 2)
    code, _, err = command(source, destination, "--replace")
    assert (code, err.count("\n")) == (2, 1)
    assert ImageStore.open(destination, verify=True).manifest == before
    resize(disk, 8 * PIXELS)
    assert command(source, destination, "--replace")[0] == 0
    assert manifest(destination)["quarantine"] == {"duplicate": 1}
