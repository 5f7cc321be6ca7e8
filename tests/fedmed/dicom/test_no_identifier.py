"""No identifier of an export reaches a line, a log, an exception or a file that ingestion leaves, quarantine.csv apart.

Names, ids, UIDs, dates, places, private elements, file names, keys of labels.csv and text in pixels are canaries. They
are searched for, also encoded and hashed, in everything that an ingestion of whole and of broken files says and
writes. `Manufacturer` is kept on purpose and holds none.
"""

import base64
import contextlib
import hashlib
import io
import json
import logging
import random
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset

import fedmed.dicom.ingest
from clients.data_words import in_words
from fedmed.dicom.ingest import ingest
from fedmed.dicom.journal import Journal
from fedmed.dicom.options import Options
from fedmed.dicom.store import ImageStore
from fedmed.errors import DataError
from tests.fedmed.dicom.files import write
from tests.fedmed.dicom.mutations import MUTATIONS

# They name files for the site's engineer, and stay there.
NAMING = ("quarantine.csv", "unmatched.csv")
KEY = bytes(range(100, 132))
ROOT = "1.2.826.0.1.73918273"
TEXT = b"ZXQ^DOE^JANE 4711"
VALUES: dict[str, Any] = {
    "PatientName": "Zxqname^Jane", "OtherPatientIDs": "zxqotherid", "PatientBirthDate": "19470823",
    "PatientBirthTime": "031415", "PatientAddress": "7 Zxqstreet", "PatientTelephoneNumbers": "zxq-555",
    "PatientMotherBirthName": "Zxqmother", "PatientComments": "zxqcomment", "AdditionalPatientHistory": "zxqhistory",
    "AccessionNumber": "ZXQ8842", "StudyID": "zxqstudy", "StudyDate": "20170919", "StudyTime": "214753.918273",
    "AcquisitionDate": "20170919", "ContentDate": "20170919", "SeriesDate": "20170919",
    "AcquisitionDateTime": "20170919214753.918273", "ReferringPhysicianName": "Zxqreferring^Dr",
    "PerformingPhysicianName": "Zxqperforming^Dr", "OperatorsName": "Zxqoperator", "InstitutionName": "Zxqhospital",
    "InstitutionAddress": "Zxqtown", "InstitutionalDepartmentName": "zxqward", "StationName": "ZXQSTATION",
    "DeviceSerialNumber": "zxqserial", "DeviceUID": f"{ROOT}.9", "FrameOfReferenceUID": f"{ROOT}.8",
    "StudyDescription": "zxqdescription", "SeriesDescription": "zxqseries", "ProtocolName": "zxqprotocol",
    "ImageComments": "zxqimage", "RequestedProcedureDescription": "zxqrequested",
}  # fmt: skip
# Of the files' own, not of the values above.
PLACES = ("zxqfolder", "zxqfile", "zxqunmatched", "zxqclass")


def values(number: int) -> dict[str, Any]:
    """All identifying elements, those that must differ with a number."""
    nested = Dataset()
    nested.PatientName, nested.RequestedProcedureID = "Zxqnested^Jane", "zxqprocedure"
    nested.ReferencedSOPInstanceUID, nested.StudyDate = f"{ROOT}.7.{number}", "20170919"
    deeper = Dataset()
    deeper.PatientID, deeper.ReferencedStudySequence = "zxqdeep", [nested]
    return VALUES | {
        "PatientID": f"zxqid-{number}", "StudyInstanceUID": f"{ROOT}.1.{number}",
        "SeriesInstanceUID": f"{ROOT}.2.{number}", "SOPInstanceUID": f"{ROOT}.3.{number}",
        "RequestAttributesSequence": [nested], "ReferencedStudySequence": [deeper],
    }  # fmt: skip


def lettered() -> NDArray[np.uint8]:
    """A picture of all greys with a name in its first row; at full range and of this size it is shown unchanged."""
    made = np.arange(64 * 64).reshape(64, 64).astype(np.uint8)
    made[:8] = 0
    made[0, : len(TEXT)] = np.frombuffer(TEXT, np.uint8)
    return made


@dataclass
class Planted:
    """An export full of canaries, and which they are."""

    source: Path
    labels: Path
    canaries: set[bytes] = field(default_factory=set)


def _values_of(dataset: dict[str, Any]) -> Iterator[str]:
    for value in dataset.values():
        if isinstance(value, str):
            yield value


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    folder = tmp_path_factory.mktemp("export")
    made = Planted(folder / "src", folder / "labels.csv")
    place = made.source / "zxqfolder Doe Jane"
    for number in range(4):
        write(place / f"zxqfile{number}.dcm", **values(number))
    picture = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelData": lettered().tobytes()}
    region = Dataset()
    region.RegionSpatialFormat = region.RegionDataType = 1
    region.RegionLocationMinX0, region.RegionLocationMinY0 = 0, 8
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = 63, 63
    write(place / "zxqfile-text.dcm", lettered(), BurnedInAnnotation="YES", **picture, **values(4))
    write(
        place / "zxqfile-us.dcm", lettered(), Modality="US", SequenceOfUltrasoundRegions=[region],
        BurnedInAnnotation=None, **picture, **values(5),
    )  # fmt: skip
    # Slices with a gap and one that leans, for notes.
    for number, (height, row) in enumerate(
        [(0, [1, 0, 0]), (1, [1, 0, 0]), (4, [1, 0, 0]), (5, [0.8, 0.6, 0])]
    ):
        write(
            place / f"zxqfile-ct{number}.dcm", np.full((8, 8), height, np.int16), Modality="CT", RescaleSlope=1,
            RescaleIntercept=0, ImagePositionPatient=[0, 0, height], ImageOrientationPatient=[*row, 0, 0, -1][:6],
            **values(6) | {"SOPInstanceUID": f"{ROOT}.3.6.{number}"},
        )  # fmt: skip
    private(place / "zxqfile-private.dcm")
    broken(place)
    rows = [f"zxqid-{number},{'sick' if number % 2 else 'well'}" for number in range(6)]
    made.labels.write_text("\n".join(["PatientID,label", *rows, "zxqunmatched,sick", ""]))
    pixels = hashlib.sha256(lettered().tobytes()).hexdigest(), hashlib.md5(lettered().tobytes()).hexdigest()
    texts = {text for number in range(7) for text in _values_of(values(number))}
    texts |= {*PLACES, "zxq", ROOT, "zxqunmatched", "2017-09-19", "1947-08-23", "214753", KEY.hex(), *pixels}
    # The files' digests: whoever has a file could look for it.
    texts |= {hashlib.sha256(path.read_bytes()).hexdigest() for path in made.source.rglob("*.dcm")}
    made.canaries = {text.encode() for text in texts}
    return made


def private(path: Path) -> None:
    import pydicom

    write(path, **values(8))
    made = pydicom.dcmread(path)
    block = made.private_block(0x0099, "ZXQ PRIVATE", create=True)
    block.add_new(1, "LO", "zxqprivate")
    block.add_new(2, "UN", b"zxqunknown")
    made.save_as(path)


def broken(folder: Path) -> None:
    """Each way to break a file, several times; also values that a parser complains of, and quotes."""
    content, draw = (folder / "zxqfile0.dcm").read_bytes(), random.Random(11)
    for mutate in MUTATIONS:
        # A bomb holds nothing of the file, and takes seconds to make.
        for number in range(0 if mutate.__name__ == "_bomb" else 4):
            (folder / f"zxqfile{mutate.__name__}{number}.dcm").write_bytes(mutate(content, draw))
    for number, (old, new) in enumerate([
        (b"19470823", b"zxqbirth"), (b"20170919", b"zxqdate!"), (b"MONOCHROME2 ", b"zxqcolours  "),
        (b"DX", b"ZX"), (f"{ROOT}.3.0".encode(), b"zxquid.".ljust(len(f"{ROOT}.3.0"), b"x")),
        (b"0.5\\0.5 ", b"zxq\\zxq "),
    ]):  # fmt: skip
        assert old in content
        (folder / f"zxqfile-quoted{number}.dcm").write_bytes(content.replace(old, new))


def forms(canary: bytes) -> Iterator[bytes]:
    """How it might travel, in lower case where case does not matter."""
    text = canary.decode()
    for word in {text, text.lower(), text.upper()}:
        yield word.lower().encode()
        yield word.lower().encode("utf-16-le")
        yield word.lower().encode("utf-16-be")
        yield word.encode().hex().encode()
        for name in ("md5", "sha1", "sha256", "sha512", "blake2b"):
            digest = hashlib.new(name, word.encode()).digest()
            # Also cut to 8 bytes.
            yield digest[:8].hex().encode()


def exact_forms(canary: bytes) -> Iterator[bytes]:
    """Those in which case matters."""
    text = canary.decode()
    for word in {text, text.lower(), text.upper()}:
        raw = word.encode()
        yield hashlib.sha256(raw).digest()[:8]
        yield base64.b64encode(hashlib.sha256(raw).digest())[:16]
        if len(raw) >= 6:
            # At each of the three places where it may begin within a group of base64.
            for shift in range(3):
                yield base64.b64encode(b"x" * shift + raw)[4 if shift else 0 :].rstrip(b"=")[:-2]


def found(seen: bytes, canaries: set[bytes]) -> set[bytes]:
    """The canaries that are in it."""
    lower = seen.lower()
    return {
        canary
        for canary in canaries
        if any(form in lower for form in forms(canary)) or any(form in seen for form in exact_forms(canary))
    }


@dataclass
class Seen:
    """Whatever a process says."""

    caplog: pytest.LogCaptureFixture
    capfd: pytest.CaptureFixture[str]
    raised: list[warnings.WarningMessage]
    errors: list[str] = field(default_factory=list)

    def text(self) -> bytes:
        out, err = self.capfd.readouterr()
        logs = "\n".join(
            f"{record.getMessage()} {record.args} {record.exc_info}" for record in self.caplog.records
        )
        told = "\n".join(str(warning.message) for warning in self.raised)
        return "\n".join([out, err, logs, told, *self.errors]).encode(errors="surrogateescape")


@pytest.fixture
def seen(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[Seen]:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("pydicom").setLevel(logging.DEBUG)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        yield Seen(caplog, capfd, raised)


def run(planted: Planted, destination: Path, seen: Seen, **options: Any) -> list[dict[str, Any]]:
    """Ingest, and say it as the command does; the journal's last state."""
    lines: list[bytes] = []

    def keep(*_: int) -> None:
        lines[:] = (destination / ".ingest" / "journal.jsonl").read_bytes().splitlines()

    manifest = ingest(
        planted.source, destination, key=KEY, labels=planted.labels, classes=("sick", "well"), progress=keep,
        options=Options(workers=2, size=0, seconds=10.0, memory_mb=500, **options),
    )  # fmt: skip
    print(json.dumps(manifest))
    print(in_words(destination, ImageStore.open(destination, verify=True).manifest))
    seen.errors.append(repr(ImageStore.open(destination)).split("path=")[0])
    return [json.loads(line) for line in lines]


def left(destination: Path) -> bytes:
    """Every file and its name, the list of quarantined paths apart; pictures also as their grey values."""
    parts = []
    for path in sorted(destination.rglob("*")):
        if path.is_file() and path.name not in NAMING:
            parts += [str(path.relative_to(destination)).encode(), path.read_bytes()]
    sheet = Image.open(io.BytesIO((destination / "contact-sheet.png").read_bytes()))
    parts.append(sheet.convert("L").tobytes())
    parts.append((ImageStore.open(destination).pixels >> 8).astype(np.uint8).tobytes())
    return b"\n".join(parts)


RUNS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "masked": {"burned_in": "mask"},
    "de-identified": {"deidentify": True, "burned_in": "mask"},
    "with moved dates": {"deidentify": True, "burned_in": "mask", "modified_dates": True},
}


@pytest.mark.parametrize("name", RUNS)
def test_no_identifier_is_said_or_written(name: str, planted: Planted, tmp_path: Path, seen: Seen) -> None:
    destination = tmp_path / "dst"
    journal = run(planted, destination, seen, **RUNS[name])
    manifest = ImageStore.open(destination).manifest
    # The breaks reached the readers, and notes were made.
    assert len(manifest["quarantine"]) >= 5
    assert manifest["warnings"]
    assert manifest["labels"]["unmatched_rows"]
    assert manifest["records"] >= 6
    assert bool(list(destination.rglob("*.dcm"))) == RUNS[name].get("deidentify", False)
    assert not found(seen.text(), planted.canaries)
    # The option keeps the time of the day (PS3.15 E.3.6).
    kept = {b"214753", b"214753.918273"} if "modified_dates" in RUNS[name] else set()
    assert not found(left(destination), planted.canaries - kept)
    assert TEXT not in left(destination)
    # The journal knows the files' names, and nothing else of them.
    about, *entries = journal
    assert len(entries) == len(list(planted.source.rglob("*.dcm")))
    assert found(json.dumps([entry.pop("file") for entry in entries]).encode(), {b"zxqfile"})
    assert not found(json.dumps([about, entries]).encode(), planted.canaries)
    for name in NAMING:
        assert not found((destination / name).read_bytes(), planted.canaries - names(planted))
    private_modes(destination)


def names(planted: Planted) -> set[bytes]:
    """The canaries of file names, which quarantine.csv may hold."""
    listed = "\n".join(str(path.relative_to(planted.source)) for path in planted.source.rglob("*")).encode()
    return {canary for canary in planted.canaries if canary.lower() in listed.lower()}


def private_modes(destination: Path) -> None:
    assert destination.stat().st_mode & 0o777 == 0o700
    for name in (*NAMING, "contact-sheet.png", "pixels.npy", "records.csv"):
        assert (destination / name).stat().st_mode & 0o777 == 0o600, name


def dicomdir(folder: Path, draw: random.Random) -> Path:
    """A broken DICOMDIR that names people."""
    from pydicom.fileset import FileSet

    made = FileSet()
    for number in range(3):
        made.add(write(folder / "in" / f"{number}.dcm", **values(number)))
    made.write(folder / "disc")
    index = folder / "disc" / "DICOMDIR"
    content = bytearray(index.read_bytes())
    for _ in range(draw.choice((1, 8, 64))):
        content[draw.randrange(132, len(content))] = draw.randrange(256)
    index.write_bytes(content)
    return index


def test_no_error_quotes_an_identifier(planted: Planted, tmp_path: Path, seen: Seen) -> None:
    """What a library call raises, with its traceback and its causes."""
    only = tmp_path / "only"
    write(only / "zxqfile.dcm", **values(0) | {"PatientID": None})
    table = planted.labels.read_text()
    labels: dict[str, str] = {
        "a key twice": table + "zxqid-1,sick\n",
        "an unknown class": table + "zxqid-9,zxqclass\n",
        "no key": table + ",zxqclass\n",
        "a surplus cell": table + "zxqid-9,zxqclass,1\n",
        "another column": table.replace("label", "class"),
        "no header": table.partition("\n")[2],
        "a quote without end": table + '"zxqid-9,sick\n',
        "no text": table + "\udcff\n",
    }
    calls: list[Callable[[], object]] = [lambda: ingest(only, tmp_path / "none", key=KEY)]
    for number, text in enumerate(labels.values()):
        path = tmp_path / f"labels{number}.csv"
        path.write_text(text, errors="surrogateescape")
        calls.append(
            lambda path=path: ingest(only, tmp_path / "none", key=KEY, labels=path, classes=("sick", "well"))
        )
    calls.append(lambda: ingest(planted.source / "gone", tmp_path / "none", key=KEY))
    draw = random.Random(3)
    for number in range(30):
        index = dicomdir(tmp_path / str(number), draw)
        calls.append(lambda index=index: fedmed.dicom.ingest.discover(index))
    for call in calls:
        try:
            call()
        except DataError as error:
            seen.errors += [*traceback.format_exception(error), repr(error)]
    assert len(seen.errors) > 20
    said = seen.text().replace(str(planted.source).encode(), b"")
    assert b"DataError" in said
    assert not found(said, planted.canaries)


# --- The search finds what it should ---


@pytest.mark.parametrize(
    "encoded",
    [
        str.encode, lambda text: text.upper().encode(), lambda text: text.encode("utf-16"),
        lambda text: text.encode("utf-16-be"), lambda text: text.encode().hex().encode(),
        lambda text: text.encode().hex().upper().encode(), lambda text: base64.b64encode(text.encode()),
        lambda text: base64.b64encode(b"a" + text.encode() + b"b"),
        lambda text: base64.b64encode(b"ab" + text.encode() + b"b"),
        lambda text: hashlib.sha256(text.encode()).hexdigest().encode(),
        lambda text: hashlib.sha256(text.lower().encode()).digest(),
        lambda text: hashlib.md5(text.encode()).hexdigest().upper().encode(),
        lambda text: hashlib.blake2b(text.encode()).hexdigest()[:16].encode(),
        lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()),
    ],
)  # fmt: skip
@pytest.mark.parametrize("text", ["Zxqname^Jane", "20170919", f"{ROOT}.3.0"])
def test_the_search_sees_through_encodings(encoded: Callable[[str], bytes], text: str) -> None:
    assert found(b"...." + encoded(text) + b"....", {text.encode()})
    assert not found(b"...." + encoded("innocent words") + b"....", {text.encode()})


def test_the_search_finds_text_that_is_kept_in_pixels(planted: Planted, tmp_path: Path, seen: Seen) -> None:
    run(planted, tmp_path / "dst", seen, burned_in="keep")
    # In the pixels of both, in the sheet, and in the values.
    assert left(tmp_path / "dst").count(TEXT) >= 4


def test_the_search_finds_uids_that_are_kept(planted: Planted, tmp_path: Path, seen: Seen) -> None:
    run(planted, tmp_path / "dst", seen, deidentify=True, keep_uids=True)
    assert f"{ROOT}.3.0".encode() in found(left(tmp_path / "dst"), planted.canaries)


@pytest.mark.parametrize("how", ["a note", "a hashed label", "a log line", "a warning", "print"])
def test_a_reader_that_tells_is_caught(
    how: str, planted: Planted, tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deliberately broken: each tells the files' names, or the digest of an id, in its own way."""
    assemble, add = fedmed.dicom.ingest.assemble, Journal.add

    def telling(outcomes: Any, *rest: Any, **more: Any) -> Any:
        made = assemble(outcomes, *rest, **more)
        if how == "a note":
            made.told.append([f"look at {next(iter(outcomes))}"])
        if how == "a hashed label":
            made.images[0].label = hashlib.sha256(b"zxqid-1").hexdigest()
        return made

    def adding(self: Journal, file: str, *rest: Any) -> None:
        if how == "a log line":
            logging.getLogger("fedmed").debug("%s", file)
        if how == "a warning":
            warnings.warn(file, stacklevel=1)
        if how == "print":
            print(file)
        add(self, file, *rest)

    monkeypatch.setattr(fedmed.dicom.ingest, "assemble", telling)
    monkeypatch.setattr(Journal, "add", adding)
    with contextlib.suppress(DataError):
        run(planted, tmp_path / "dst", seen)
    assert found(seen.text() + left(tmp_path / "dst"), planted.canaries)
