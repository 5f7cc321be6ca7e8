"""An export becomes a data set, whatever is in it; what is left out is told, and what is half-done is not used."""

import csv
import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmed.data.split import pseudonym
from fedmed.dicom.discover import discover
from fedmed.dicom.ingest import WORK, ingest
from fedmed.dicom.options import Options
from fedmed.dicom.reasons import Reason
from fedmed.dicom.store import ImageStore
from fedmed.errors import ConfigError, DataError
from tests.conftest import count
from tests.fedmed.dicom.files import export, image, write

KEY = bytes(range(32))
ONE = Options(workers=1, size=0)


def run(source: Path, destination: Path, **options: Any) -> ImageStore:
    ingest(source, destination, key=KEY, **{"options": ONE} | options)
    return ImageStore.open(destination, verify=True)


def quarantined(destination: Path) -> dict[str, str]:
    with (destination / "quarantine.csv").open(newline="") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def labels(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(["PatientID,label", *rows, ""]))
    return path


def test_an_export_becomes_records_with_their_patients_and_labels(tmp_path: Path) -> None:
    written = labels(tmp_path / "labels.csv", "id-0,sick", "id-1,well", "id-2,", "nobody,sick")
    store = run(export(tmp_path / "src"), tmp_path / "dst", labels=written)
    assert store.records["patient"].tolist() == [
        pseudonym(KEY, f"id-{p}").hex() for p in range(4) for _ in range(2)
    ]
    assert store.records["label"].tolist() == ["sick"] * 2 + ["well"] * 2 + [""] * 4
    assert store.manifest["labels"] == {"unmatched_rows": 1, "unmatched_images": 2}
    told = (tmp_path / "dst" / "unmatched.csv").read_text().splitlines()
    assert told == ["what,where", "row of the labels,line 5", "image,p3/0.dcm", "image,p3/1.dcm"]
    assert store.manifest["by_year"] == {"2024": 8}
    assert store.manifest["quarantine"] == {}
    # Each image's range is its own: from black to white.
    for record in range(8):
        shown = store.image(record)[0]
        assert shown.shape == (16, 16)
        assert (shown[:, 0] == 0).all()
        assert (shown[:, -1] == 65535).all()
    assert not (tmp_path / "dst" / WORK).exists()
    assert (tmp_path / "dst").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "dst" / "contact-sheet.png").read_bytes().startswith(b"\x89PNG")


def test_the_result_does_not_depend_on_how_many_read(tmp_path: Path) -> None:
    source = export(tmp_path / "src", patients=6)
    one = run(source, tmp_path / "one")
    many = run(source, tmp_path / "many", options=Options(workers=3, size=0))
    assert one.manifest == many.manifest


def volume(folder: Path, order: list[int], **attributes: Any) -> None:
    """Ten slices 2 mm apart, numbered as it pleases the scanner."""
    for number, place in enumerate(order):
        write(
            folder / f"{number}.dcm", np.full((8, 8), place * 10, np.int16), Modality="CT",
            SOPInstanceUID=f"1.9.{number}", InstanceNumber=number,
            ImagePositionPatient=[0, 0, 2.0 * place], ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            RescaleSlope=1, RescaleIntercept=-100, WindowCenter=-50, WindowWidth=101, **attributes,
        )  # fmt: skip


def test_slices_become_a_volume_in_the_order_of_their_places(tmp_path: Path) -> None:
    order = list(range(10))
    random.Random(3).shuffle(order)
    volume(tmp_path / "src", order)
    store = run(tmp_path / "src", tmp_path / "dst")
    assert len(store.records) == 1
    assert store.records["frames"].tolist() == [10]
    assert store.records["slice_spacing"].tolist() == [2.0]
    # Hounsfield units -100 to -10 under a window from -100 to 0, one for all slices.
    shown = store.image(0)[:, 0, 0] / 65535
    assert np.allclose(shown, [place / 10 for place in range(10)], atol=0.006)


def test_a_missing_slice_is_told(tmp_path: Path) -> None:
    volume(tmp_path / "src", [0, 1, 2, 3, 5, 6])
    store = run(tmp_path / "src", tmp_path / "dst")
    assert any("missing" in warning for warning in store.manifest["warnings"])


def test_a_window_may_be_given_for_all_ct(tmp_path: Path) -> None:
    volume(tmp_path / "src", list(range(10)))
    store = run(tmp_path / "src", tmp_path / "dst", options=Options(workers=1, size=0, window=(-100.0, 2.0)))
    assert set(np.unique(store.image(0)[2:])) == {65535}


def test_files_that_cannot_be_used_are_told_and_end_nothing(tmp_path: Path) -> None:
    source = export(tmp_path / "src", patients=1)
    (source / "notes.txt").write_text("hello")
    (source / "empty.dcm").write_bytes(b"")
    (source / "cut.dcm").write_bytes((source / "p0" / "0.dcm").read_bytes()[:700])
    write(source / "nobody.dcm", PatientID=None, SOPInstanceUID="1.7.1")
    write(source / "blank.dcm", PatientID="  ", SOPInstanceUID="1.7.2")
    write(source / "again.dcm", SOPInstanceUID="1.2.0.1.0", PatientID="id-0")
    write(source / "unknown.dcm", Modality="OT", SOPInstanceUID="1.7.3")
    write(source / "nameless.dcm", StudyInstanceUID=None, SOPInstanceUID="1.7.4")
    store = run(source, tmp_path / "dst")
    assert quarantined(tmp_path / "dst") == {
        "notes.txt": Reason.NOT_DICOM, "empty.dcm": Reason.NOT_DICOM, "cut.dcm": Reason.PIXEL_LENGTH,
        "nobody.dcm": Reason.PATIENT_ID_MISSING, "blank.dcm": Reason.PATIENT_ID_MISSING,
        "p0/0.dcm": Reason.DUPLICATE, "unknown.dcm": Reason.MODALITY, "nameless.dcm": Reason.UID_MISSING,
    }  # fmt: skip
    # Every file is in a record or in quarantine.
    assert sum(store.manifest["quarantine"].values()) + len(store.records) == len(list(source.rglob("*.*")))


def test_one_id_of_two_people_is_nobodys(tmp_path: Path) -> None:
    source = export(tmp_path / "src", patients=2)
    write(source / "other.dcm", PatientID="id-1", PatientBirthDate="19990909", SOPInstanceUID="1.8.1")
    store = run(source, tmp_path / "dst")
    assert store.manifest["quarantine"] == {Reason.PATIENT_ID_CONFLICT: 3}
    assert set(store.records["patient"]) == {pseudonym(KEY, "id-0").hex()}


def test_slices_with_different_labels_are_put_aside(tmp_path: Path) -> None:
    volume(tmp_path / "src", [0, 1, 2])
    export(tmp_path / "src", patients=1)
    written = tmp_path / "labels.csv"
    written.write_text("SOPInstanceUID,label\n1.9.0,sick\n1.9.1,well\n1.9.2,well\n")
    store = run(tmp_path / "src", tmp_path / "dst", labels=written)
    assert store.manifest["quarantine"] == {Reason.LABEL_CONFLICT: 3}


def test_a_dicomdir_names_its_files(tmp_path: Path) -> None:
    from pydicom.fileset import FileSet

    source = export(tmp_path / "src", patients=2)
    disc = FileSet()
    for path in sorted(source.rglob("*.dcm")):
        disc.add(path)
    disc.write(tmp_path / "disc")
    (tmp_path / "disc" / "stray.dcm").write_bytes((source / "p0" / "0.dcm").read_bytes())
    named = sorted(
        path for path in (tmp_path / "disc").rglob("*") if path.is_file() and path.parent != tmp_path / "disc"
    )
    named[0].unlink()
    store = run(tmp_path / "disc" / "DICOMDIR", tmp_path / "dst")
    assert len(store.records) == 3
    assert store.manifest["quarantine"] == {Reason.MISSING_FILE: 1}


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: folder, "no such folder"),
        (lambda folder: folder.mkdir() or folder, "no file in it"),
        (lambda folder: folder.write_text("x") and folder, "no DICOMDIR"),
    ],
)
def test_nothing_to_read_is_refused(tmp_path: Path, make: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        run(make(tmp_path / "src"), tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_nothing_usable_is_refused_with_the_reasons(tmp_path: Path) -> None:
    write(tmp_path / "src" / "a.dcm", PatientID=None)
    with pytest.raises(DataError, match=r"no image can be used \(1 x patient-id-missing\)"):
        run(tmp_path / "src", tmp_path / "dst")
    with pytest.raises(DataError, match="not finished"):
        ImageStore.open(tmp_path / "dst")


def test_a_destination_in_use_is_not_touched(tmp_path: Path) -> None:
    source = export(tmp_path / "src", patients=1)
    run(source, tmp_path / "dst")
    with pytest.raises(DataError, match="--replace"):
        run(source, tmp_path / "dst")
    run(source, tmp_path / "dst", replace=True)
    # Also where a second ingestion was begun and given up.
    (tmp_path / "dst" / WORK).mkdir()
    with pytest.raises(DataError, match="--replace"):
        run(source, tmp_path / "dst")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="other files"):
        run(source, tmp_path / "mine")
    with pytest.raises(DataError, match="a file"):
        run(source, tmp_path / "mine" / "thesis.txt")


def test_a_source_may_lie_around_its_destination(tmp_path: Path) -> None:
    source = export(tmp_path / "src", patients=1)
    run(source, source / "dst")
    assert run(source, source / "dst", replace=True).manifest["quarantine"] == {}


COMMAND = """
import sys
from tests.fedmed.dicom.test_ingest import KEY
from fedmed.dicom.ingest import ingest
from fedmed.dicom.options import Options
print("begun", flush=True)
told = lambda done, total, quarantined: print(done, flush=True)
ingest(sys.argv[1], sys.argv[2], key=KEY, options=Options(workers=2, size=0), progress=told)
"""


def test_killed_at_any_instant_it_goes_on(tmp_path: Path) -> None:
    source = export(tmp_path / "src", patients=20, images=2)
    whole = run(source, tmp_path / "whole").manifest
    draws, going_on, writing = random.Random(5), 0, 0
    for attempt in range(count(1, 20)):
        destination = tmp_path / f"dst{attempt}"
        for told in (draws.randrange(1, 20), draws.randrange(1, 20), 1_000):
            process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, str(source), str(destination)],
                stdout=subprocess.PIPE,
                text=True,
            )
            assert process.stdout is not None
            lines = list(
                itertools.takewhile(lambda line: line != "40\n", itertools.islice(process.stdout, told))
            )
            # While files are read, or while the data set is written.
            time.sleep(draws.uniform(0, 0.05 if told == 1_000 else 0.005))
            process.kill()
            process.wait()
            going_on += len(lines) > 1 and int(lines[1]) > 1
            writing += told == 1_000
            if not (destination / "manifest.json").exists():
                with pytest.raises(DataError):
                    ImageStore.open(destination)
        if not (destination / "manifest.json").exists():
            run(source, destination)
        assert ImageStore.open(destination, verify=True).manifest == whole
    assert going_on
    assert writing


def test_what_was_read_before_a_kill_is_not_read_again(tmp_path: Path) -> None:
    source, seen = export(tmp_path / "src", patients=3), []

    def stop(done: int, *_: int) -> None:
        seen.append(done)
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "dst", progress=stop)
    again: list[int] = []
    # A file that has changed since, and one that is new, are read.
    write(source / "p0" / "0.dcm", image(level=7), PatientID="id-0", SOPInstanceUID="1.2.0.1.0")
    write(source / "p9.dcm", PatientID="id-9", SOPInstanceUID="1.2.9.1.0")
    store = run(source, tmp_path / "dst", progress=lambda done, *_: again.append(done))
    assert again[0] == 4, "3 of the 4 files were known"
    assert len(store.records) == 7
    assert not (tmp_path / "dst" / WORK).exists()


def test_other_settings_begin_anew(tmp_path: Path) -> None:
    source = export(tmp_path / "src", patients=2)

    def stop(done: int, *_: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "dst", progress=stop)
    store = run(source, tmp_path / "dst", options=Options(workers=1, size=8))
    assert store.records["rows"].tolist() == [8] * 4


def test_two_at_once_do_not_mix(tmp_path: Path) -> None:
    source = export(tmp_path / "src", patients=2)

    def second(done: int, *_: int) -> None:
        if done == 1:
            with pytest.raises(DataError, match="another ingestion"):
                run(source, tmp_path / "dst")

    assert len(run(source, tmp_path / "dst", progress=second).records) == 4


def test_folders_without_permission_are_told() -> None:
    # pytest's own folders are closed to other accounts; root may read everything, and is somebody else meanwhile.
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        export(folder / "src", patients=1)
        (folder / "src" / "closed").mkdir(mode=0o000)
        try:
            if root:
                os.seteuid(65534)
            found = discover(folder / "src")
            with pytest.raises(DataError, match="no permission to read it"):
                discover(folder / "src" / "closed")
        finally:
            if root:
                os.seteuid(0)
    assert found.unread == {"closed": Reason.NO_PERMISSION}
    assert list(found.files) == ["p0/0.dcm", "p0/1.dcm"]


@pytest.mark.parametrize(
    "wrong",
    [{"size": -1}, {"modalities": ()}, {"modalities": ("XX",)}, {"window": (0.0, 0.0)}, {"burned_in": "hope"},
     {"keep_uids": True}, {"modified_dates": True}, {"workers": -1}, {"seconds": 0.0}, {"memory_mb": 1}],
)  # fmt: skip
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"expected|only with"):
        Options(**wrong)
