"""`fedmed site ingest` and `fedmed site data show`, as a person at the site meets them."""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset

from clients.folder import SiteFolder
from fedmed.data.split import pseudonym, site_key
from fedmed.dicom.store import ImageStore
from tests.fedmed.dicom.files import export, image, write

ROOT = Path(__file__).parents[2]
SMALL = ("--workers", 1, "--size", 0)


@pytest.fixture
def ingest(command: Any) -> Callable[..., tuple[int, str, str]]:
    return lambda *arguments: command("site", "ingest", *arguments, *SMALL)


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return export(tmp_path / "src", patients=2, images=1)


def labels(path: Path, *rows: str, header: str = "PatientID,label") -> Path:
    path.write_text("\n".join([header, *rows, ""]))
    return path


def refused(answer: tuple[int, str, str], *told: str) -> None:
    """One line, exit code 2, and in it what is wrong and what to do."""
    code, out, err = answer
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "internal" not in err
    for words in told:
        assert words in err, err


@pytest.mark.parametrize("words", [["ingest"], ["data"], ["data", "show"]])
def test_help_has_examples_and_a_line_for_every_option(command: Any, words: list[str]) -> None:
    code, out, err = command("site", *words, "--help")
    assert (code, err) == (0, "")
    assert f"fedmed site {' '.join(words)} " in out.split("Examples:")[1]
    if words == ["ingest"]:
        for option in (
            "--labels", "--label-column", "--class", "--site", "--name", "--size", "--modality", "--window",
            "--replace", "--deidentify", "--modified-dates", "--keep-uids", "--burned-in", "--regions", "--workers",
            "--json",
        ):  # fmt: skip
            assert re.search(rf"^ +{option}\b.*\S", out, re.MULTILINE), option
        assert "goes on" in out


def test_an_export_is_ingested_and_shown_in_the_same_words(command: Any, ingest: Any, src: Path) -> None:
    table = labels(src.parent / "labels.csv", "id-0,sick", "id-1,well", "id-9,well")
    (src / "notes.txt").write_text("x")
    dst = src.parent / "dst"
    code, out, err = ingest(src, dst, "--labels", table, "--name", "mercy")
    assert (code, err) == (0, "")
    assert out.startswith(f"{dst}: 2 records of 2 patients\n")
    for line in (
        "by label: sick 1, well 1", "by modality: DX 2", "by manufacturer: ACME 2", "by year: 2024 2",
        "labels: 1 row fits no image; see unmatched.csv", "in quarantine: 1 file, listed in quarantine.csv",
        "1  not-dicom  the file does not begin as DICOM does",
    ):  # fmt: skip
        assert f" {line}\n" in out, out
    assert command("site", "data", "show", dst) == (0, out, "")
    code, checked, err = command("site", "data", "show", dst, "--check")
    assert (code, err) == (0, "")
    assert checked.startswith(out)
    assert "every byte" in checked
    code, shown, _ = command("site", "data", "show", dst, "--json")
    assert json.loads(shown) == json.loads((dst / "manifest.json").read_text())


def test_json_is_the_manifest(ingest: Any, src: Path) -> None:
    code, out, err = ingest(src, src.parent / "dst", "--name", "mercy", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == ImageStore.open(src.parent / "dst", verify=True).manifest


def test_pseudonyms_are_those_of_the_site(ingest: Any, src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named, by --site or by FEDMED_SITE; a name that somebody wrote comes before the variable."""
    site = SiteFolder.init(src.parent / "site", name="mercy")
    keys = {"site": site.split_key, "variable": site.split_key, "name": site_key("mercy")}
    assert ingest(src, src.parent / "site-dst", "--site", site.path)[0] == 0
    monkeypatch.setenv("FEDMED_SITE", str(site.path))
    assert ingest(src, src.parent / "variable-dst")[0] == 0
    assert ingest(src, src.parent / "name-dst", "--name", "mercy")[0] == 0
    for how, key in keys.items():
        found = ImageStore.open(src.parent / f"{how}-dst").records["patient"].tolist()
        assert found == [pseudonym(key, f"id-{patient}").hex() for patient in range(2)]


def ultrasound(path: Path, **attributes: Any) -> Path:
    """A picture with a bright line of text above the region that shows the patient."""
    region = Dataset()
    region.RegionSpatialFormat, region.RegionDataType, region.RegionFlags = 1, 1, 0
    region.RegionLocationMinX0, region.RegionLocationMinY0 = 0, 8
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = 15, 15
    pixels = image()
    pixels[:4] = 60_000
    return write(
        path, pixels, Modality="US", BurnedInAnnotation="YES", SequenceOfUltrasoundRegions=[region], **attributes
    )  # fmt: skip


def test_what_is_asked_for_is_done(ingest: Any, tmp_path: Path) -> None:
    """--deidentify --modified-dates, and masks by the file's own regions and by the site's table."""
    src, dst = tmp_path / "src", tmp_path / "dst"
    ultrasound(src / "us.dcm", SOPInstanceUID="1.2.3.5")
    written = image()
    written[:4] = 60_000
    write(src / "dx.dcm", written, BurnedInAnnotation="YES", ManufacturerModelName="X1")
    regions = tmp_path / "regions.csv"
    regions.write_text(
        "manufacturer,model,modality,rows,columns,top,left,bottom,right\nACME,X1,DX,16,16,0,0,4,16\n"
    )
    options = ("--name", "mercy", "--deidentify", "--modified-dates")
    refused(ingest(src, dst, *options), "no image can be used", "2 x burned-in-text", "quarantine.csv")
    code, out, err = ingest(src, dst, *options, "--burned-in", "mask", "--regions", regions)
    assert (code, err) == (0, "")
    assert "de-identified files beside them" in out
    store = ImageStore.open(dst, verify=True)
    for record in range(2):
        assert (store.image(record)[0][:4] == 0).all()
        assert store.image(record)[0][8:].any()
    assert len(list((dst / "dicom").rglob("*.dcm"))) == 2
    import pydicom

    for path in (dst / "dicom").rglob("*.dcm"):
        made = pydicom.dcmread(path)
        assert made.StudyDate != "20240317"
        assert (made.pixel_array[:4] == 0).all()
        assert "Doe" not in str(made)


def test_one_modality_and_one_window(ingest: Any, tmp_path: Path) -> None:
    src = export(tmp_path / "src", patients=1, images=1)
    write(
        src / "ct.dcm", np.tile(np.arange(16, dtype=np.int16) * 10, (16, 1)), Modality="CT", PatientID="id-7",
        SOPInstanceUID="1.9", SeriesInstanceUID="1.9.1", RescaleSlope=1, RescaleIntercept=-100,
    )  # fmt: skip
    code, out, err = ingest(
        src, tmp_path / "dst", "--modality", "CT", "--window", "-50,2", "--name", "a", "--class", "x",
        "--labels", labels(tmp_path / "l.csv", "id-7,x"),
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "1  modality-not-read  its modality is not among" in out
    shown = ImageStore.open(tmp_path / "dst").image(0)
    assert set(np.unique(shown[..., :5])) == {0}
    assert set(np.unique(shown[..., 7:])) == {65535}


def test_an_existing_data_set_is_made_anew_only_when_asked(ingest: Any, src: Path) -> None:
    dst = src.parent / "dst"
    assert ingest(src, dst, "--name", "a")[0] == 0
    before = (dst / "manifest.json").read_bytes()
    refused(ingest(src, dst, "--name", "a"), str(dst), "--replace")
    assert (dst / "manifest.json").read_bytes() == before
    write(
        src / "more.dcm",
        PatientID="id-9",
        SOPInstanceUID="1.9.9",
        SeriesInstanceUID="1.9",
        StudyInstanceUID="1.8",
    )
    code, out, _ = ingest(src, dst, "--name", "a", "--replace")
    assert (code, out.splitlines()[0]) == (0, f"{dst}: 3 records of 3 patients")


def test_one_of_each_is_not_told_in_the_plural(ingest: Any, tmp_path: Path) -> None:
    export(tmp_path / "src", patients=1, images=1)
    out = ingest(tmp_path / "src", tmp_path / "dst", "--name", "a")[1]
    assert out.startswith(f"{tmp_path / 'dst'}: 1 record of 1 patient\n")


LABELS: dict[str, tuple[list[str], str, list[str], tuple[str, ...]]] = {
    "a key twice": (
        ["id-0,sick", "id-0,well"], "PatientID,label", [], ("2 row(s)", "share their PatientID", "line 2, 3"),
    ),
    "no key": (["id-0,sick", ",well"], "PatientID,label", [], ("1 row(s)", "no PatientID", "line 3")),
    "an unknown class": (
        ["id-0,sick", "id-1,wel"], "PatientID,label", ["--class", "sick", "--class", "well"],
        ("1 row(s)", "none of sick, well (--class)", "line 3"),
    ),
    "another column": (["id-0,sick"], "PatientID,lable", [], ("no column 'label'", "'lable'", "--label-column")),
    "no column of keys": (["id-0,sick"], "patient,label", [], ("StudyInstanceUID, SOPInstanceUID, PatientID", "none")),
    "two columns of keys": (
        ["a,b,c"], "PatientID,StudyInstanceUID,label", [], ("exactly one", "StudyInstanceUID and PatientID")),
    "no rows": ([], "PatientID,label", [], ("no row", "expected a header line")),
    "a surplus cell": (["id-0,sick,x"], "PatientID,label", [], ("2 cells", "line 2")),
}  # fmt: skip


@pytest.mark.parametrize("name", LABELS)
def test_mistakes_in_labels_are_one_line(ingest: Any, src: Path, name: str) -> None:
    rows, header, options, told = LABELS[name]
    path = labels(src.parent / "labels.csv", *rows, header=header)
    answer = ingest(src, src.parent / "dst", "--labels", path, "--name", "a", *options)
    refused(answer, str(path), *told)
    # Lines are named, cells are not.
    assert "id-0" not in answer[2]
    assert "wel," not in answer[2]
    assert not (src.parent / "dst").exists()


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00P", b"folder"])
def test_labels_that_are_no_table_are_one_line(ingest: Any, src: Path, content: bytes | None) -> None:
    path = src.parent / "labels.csv"
    if content == b"folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    refused(ingest(src, src.parent / "dst", "--labels", path, "--name", "a"), str(path))


OPTIONS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "an unknown modality": (["--modality", "XX"], ("--modality=XX", "CR, DX, CT, MR, US, MG")),
    "a window without width": (["--window", "40"], ("--window=40", "CENTRE,WIDTH", "e.g. -600,1500")),
    "a window of width 0": (["--window", "40,0"], ("--window=40,0", "WIDTH > 0")),
    "a window that is no number": (["--window", "nan,100"], ("--window=nan,100", "CENTRE,WIDTH")),
    "a window without end": (["--window", "0,inf"], ("--window=0,inf", "CENTRE,WIDTH")),
    "keep-uids alone": (["--keep-uids"], ("--keep-uids", "--deidentify")),
    "modified-dates alone": (["--modified-dates"], ("--modified-dates", "--deidentify")),
    "keep with deidentify": (["--burned-in", "keep", "--deidentify"], ("--burned-in=keep", "refuse or mask")),
    "an unknown burned-in": (["--burned-in", "ask"], ("--burned-in=ask", "refuse | mask | keep")),
    "no regions": (["--regions", "none.csv"], ("none.csv",)),
    "regions that are kept": (["--regions", "REGIONS", "--burned-in", "keep"], ("--regions", "refuse or mask")),
    "classes without labels": (["--class", "sick"], ("--class", "--labels")),
    "a word for a number": (["--workers", "many"], ("--workers", "--help")),
    "too many workers": (["--workers", "1000"], ("--workers=1000", "256")),
    "too little memory": (["--memory", "1"], ("--memory=1", "200")),
    "no time": (["--seconds", "0"], ("--seconds=0", "> 0")),
    "an unknown option": (["--label", "x"], ("--label", "--help")),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_mistakes_in_options_are_one_line(command: Any, src: Path, name: str) -> None:
    options, told = OPTIONS[name]
    regions = src.parent / "regions.csv"
    regions.write_text("manufacturer,model,modality,rows,columns,top,left,bottom,right\nA,B,DX,9,9,0,0,1,9\n")
    options = [str(regions) if option == "REGIONS" else option for option in options]
    refused(command("site", "ingest", src, src.parent / "dst", "--name", "a", *options), *told)
    assert not (src.parent / "dst").exists()


def test_mistakes_in_places_are_one_line(ingest: Any, src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDMED_SITE", raising=False)
    at, name = src.parent, ("--name", "a")
    (at / "empty").mkdir()
    (at / "full").mkdir()
    (at / "full" / "thesis.txt").write_text("x")
    refused(ingest(at / "gone", at / "dst", *name), f"{at / 'gone'}", "no such folder")
    refused(ingest(at / "empty", at / "dst", *name), "no file in it", "PACS export")
    refused(ingest(src / "p0" / "0.dcm", at / "dst", *name), "DICOMDIR", "folder of a PACS export")
    refused(ingest(src, at / "full", *name), "holds other files", "empty folder")
    refused(ingest(src, at / "full" / "thesis.txt", *name), "expected a folder")
    refused(ingest(src, src, *name), "holds other files")
    refused(ingest(src, at / "dst"), "--site DIR", "--name NAME")
    refused(ingest(src, at / "dst", "--site", at / "empty"), str(at / "empty"), "fedmed site init")
    refused(ingest(src, at / "dst", "--site", at / "gone"), str(at / "gone"), "fedmed site init")
    refused(ingest(src), "DST", "--help")
    work = at / "dst" / ".ingest"
    work.mkdir(parents=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(ingest(src, at / "dst", *name), "another ingestion")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    # A digit of the last record's spacing, or a pixel: nothing but a digest would notice.
    at = -3
    content[at] ^= 1
    path.write_bytes(content)


def damaged_manifest(folder: Path, **values: Any) -> None:
    known = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(known | values))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "not finished": (lambda folder: (folder / "manifest.json").unlink(), "ingestion was not finished"),
    "no manifest": (lambda folder: (folder / "manifest.json").write_text("{"), "damaged"),
    "a list": (lambda folder: damaged_manifest(folder, by_label=[1]), "damaged"),
    "a word for a count": (lambda folder: damaged_manifest(folder, quarantine={"not-dicom": "x"}), "damaged"),
    "a reason that nobody knows": (
        lambda folder: damaged_manifest(folder, quarantine={"bored": 1}),
        "damaged",
    ),
    "no counts of labels": (lambda folder: damaged_manifest(folder, labels={}), "damaged"),
    "no note": (lambda folder: damaged_manifest(folder, warnings=3), "damaged"),
    "no size": (lambda folder: damaged_manifest(folder, size=None), "damaged"),
    "another format": (lambda folder: damaged_manifest(folder, format="fedmed-images/9"), "another version"),
    "no pixels": (lambda folder: (folder / "pixels.npy").unlink(), "damaged"),
    "cut pixels": (lambda folder: os.truncate(folder / "pixels.npy", 300), "damaged"),
    "no records": (lambda folder: (folder / "records.csv").unlink(), "damaged"),
}


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A data set's files."""
    from fedmed.dicom.ingest import ingest
    from fedmed.dicom.options import Options

    folder = tmp_path_factory.mktemp("ingested")
    ingest(
        export(folder / "src", patients=2), folder / "dst", key=bytes(32), options=Options(workers=1, size=0)
    )
    return {path.name: path.read_bytes() for path in (folder / "dst").iterdir()}


@pytest.fixture
def dst(ingested: dict[str, bytes], tmp_path: Path) -> Path:
    folder = tmp_path / "dst"
    folder.mkdir()
    for name, content in ingested.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_data_set_is_one_line(command: Any, dst: Path, name: str) -> None:
    damage, told = DAMAGE[name]
    damage(dst)
    refused(command("site", "data", "show", dst), str(dst), told, "ingest")


def test_a_folder_that_is_none_is_one_line(command: Any, tmp_path: Path) -> None:
    refused(command("site", "data", "show", tmp_path / "gone"), "no such folder", "fedmed site ingest")


@pytest.mark.parametrize("name", ["pixels.npy", "records.csv"])
def test_one_flipped_bit_is_found_when_asked(command: Any, dst: Path, name: str) -> None:
    flip(dst / name)
    assert command("site", "data", "show", dst)[0] == 0
    refused(command("site", "data", "show", dst, "--check"), str(dst), "damaged", "ingest it again")


def test_what_files_say_cannot_write_on_the_terminal(ingest: Any, tmp_path: Path) -> None:
    write(tmp_path / "src" / "a.dcm", Manufacturer="AC\x07\x9bME")
    code, out, err = ingest(tmp_path / "src", tmp_path / "dst", "--name", "a")
    assert (code, err) == (0, "")
    assert "AC ME 1\n" in out


def test_long_lists_name_the_most_frequent(command: Any, dst: Path) -> None:
    counts = {f"maker {number:02}": number + 1 for number in range(20)}
    damaged_manifest(dst, by_manufacturer=counts)
    out = command("site", "data", "show", dst)[1]
    line = next(line for line in out.splitlines() if "by manufacturer" in line)
    assert line.startswith("  by manufacturer: maker 19 20, maker 18 19")
    assert line.endswith(f"and 8 more with {sum(range(1, 9))}")


# --- A process of its own, that can be interrupted ---


def arguments(src: Path, dst: Path) -> list[str]:
    words = ["site", "ingest", src, dst, "--name", "a", "--size", 0, "--workers", 2]
    # A shell that started the tests in the background had them ignore the signal, and so would this process.
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    return [sys.executable, "-c", f"{heeds}; from fedmed.cli.main import main; main()", *map(str, words)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def children(pid: int) -> set[int]:
    """The processes whose parent it is."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.add(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def journalled(dst: Path) -> int:
    with contextlib.suppress(OSError):
        return (dst / ".ingest" / "journal.jsonl").read_bytes().count(b"\n") - 1
    return 0


MANY = 120


def many(folder: Path) -> Path:
    pixels = image(32)
    for number in range(MANY):
        write(
            folder / f"{number:03}.dcm", pixels, PatientID=f"id-{number % 20}", StudyInstanceUID=f"1.2.{number % 20}",
            SeriesInstanceUID=f"1.2.{number % 20}.1", SOPInstanceUID=f"1.2.3.{number}",
        )  # fmt: skip
    return folder


# Imported by every Python process that finds it: a file takes long enough to read for a signal to come before the last.
SLOW = """
import pathlib, sys, time
if "fedmed.dicom.worker" in sys.orig_argv:
    read = pathlib.Path.read_bytes
    pathlib.Path.read_bytes = lambda self: (time.sleep(0.3), read(self))[1]
"""


def interrupted(src: Path, dst: Path, number: signal.Signals) -> tuple[int, str, str, set[int]]:
    """Send a signal once some files are read; also the workers that there were."""
    slow = src.with_name("slow")
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(SLOW)
    paths = {"PYTHONPATH": f"{slow}{os.pathsep}{ROOT}"}
    process = subprocess.Popen(
        arguments(src, dst),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment() | paths,
    )
    until = time.monotonic() + 120
    while journalled(dst) < 10 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    workers = children(process.pid)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err, workers


def test_ctrl_c_leaves_one_line_no_process_and_work_that_goes_on(tmp_path: Path, command: Any) -> None:
    src, dst = many(tmp_path / "src"), tmp_path / "dst"
    code, out, err, workers = interrupted(src, dst, signal.SIGINT)
    assert (code, out) == (130, ""), err
    assert err == f"error: {dst}: interrupted; the same command goes on from here\n"
    assert len(workers) == 2
    assert not any(alive(pid) for pid in workers)
    assert 10 <= journalled(dst) < MANY
    refused(command("site", "data", "show", dst), "not finished")
    read = journalled(dst)
    done = subprocess.run(arguments(src, dst), capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{dst}: {MANY} records of 20 patients\n")
    assert not (dst / ".ingest").exists()
    assert read >= 10


def test_a_terminated_ingestion_leaves_no_process_for_long(tmp_path: Path) -> None:
    src, dst = many(tmp_path / "src"), tmp_path / "dst"
    code, _, _, workers = interrupted(src, dst, signal.SIGTERM)
    assert code != 0
    assert len(workers) == 2
    until = time.monotonic() + 60
    while any(alive(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in workers)
    assert not (dst / "manifest.json").exists()


def test_a_terminal_sees_a_bar_and_a_file_sees_none(tmp_path: Path) -> None:
    src = export(tmp_path / "src", patients=10, images=1)
    (src / "notes.txt").write_text("x")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        arguments(src, tmp_path / "dst"), stdout=subprocess.PIPE, stderr=theirs, text=True,
        env=environment() | {"TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(theirs)
    drawn = b""
    # A terminal whose other end is closed ends in an error, not in an empty read.
    with contextlib.suppress(OSError):
        while chunk := os.read(ours, 4096):
            drawn += chunk
    out, _ = process.communicate(timeout=120)
    os.close(ours)
    assert process.returncode == 0
    assert b"reading" in drawn
    assert b"11/11" in drawn
    assert b"1 in quarantine" in drawn
    assert "reading" not in out
    assert out.startswith(f"{tmp_path / 'dst'}: 10 records of 10 patients\n")
