"""No byte of what identifies survives; what reads pixels does."""

import copy
import itertools
import re
import warnings
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import DataElement, Dataset, Sequence, dcmread
from pydicom.config import IGNORE
from pydicom.data import get_testdata_files
from pydicom.datadict import DicomDictionary
from pydicom.uid import ImplicitVRLittleEndian

from fedmed.dicom.deid import attributes, deidentify, pixel_data
from fedmed.dicom.deid.attributes import KEPT_TEXT, MAX_DEPTH
from fedmed.dicom.deid.deidentify import Deidentifier, DeidentifyOptions
from fedmed.dicom.hashes import keyed_hash
from fedmed.dicom.reasons import Quarantined
from tests.fedmed.dicom.deidentification import (
    CANARY,
    KEY,
    PATIENT,
    UID,
    deidentified,
    instance,
    read,
    value_of,
    written,
)

# Read from any value: text, bytes and UIDs; numbers are looked at in their own tests.
SEEDS = [seed.encode() for seed in (CANARY, PATIENT, UID, "20240229", "101112.131415")]
WORDS = CANARY.encode()


def full(depth: int = 5) -> Dataset:
    """Every attribute of the dictionary with a value, private ones, a curve and an overlay; again `depth` deep."""
    dataset = Dataset()
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        first = vr.split(" ")[0]
        if tag >> 16 < 8 or not keyword or first in ("NONE", "SQ") or keyword in KEPT_TEXT:
            continue
        # How the pixels are to be read is said by `instance`.
        if tag >> 16 == 0x0028 and first in ("US", "IS", "CS"):
            continue
        # A coded string of capitals would stay: CONFIDENTIALITY.md says so.
        value = CANARY if first == "CS" else value_of(first)
        dataset.add(DataElement(tag, first, value, validation_mode=IGNORE))
    for tag in (0x00091001, 0x50003000, 0x60003000, 0x60004000, 0x00290010, 0x0040FFF1, 0xFFFCFFFC):
        dataset.add(DataElement(tag, "OB", WORDS + b"\0"))
    # Terms that a hospital made up.
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = CANARY, "99SITE", f"{CANARY}'s view"
    code.LongCodeValue, code.URNCodeValue = CANARY * 4, f"urn:{CANARY}"
    dataset.ViewCodeSequence = Sequence([code])
    if depth:
        inner = full(0)
        inner.add(DataElement(0x00091002, "SQ", Sequence([copy.deepcopy(code)])))
        for _ in range(depth):
            outer = Dataset()
            outer.PatientName = f"{CANARY}^Outer"
            outer.ReferencedSeriesSequence = Sequence([inner])
            inner = outer
        dataset.ReferencedSeriesSequence = Sequence([inner])
    return dataset


def dirty() -> Dataset:
    dataset = full()
    dataset.update(instance(BurnedInAnnotation="NO", ImageType=["ORIGINAL", "PRIMARY"]))
    dataset.file_meta = instance().file_meta
    dataset.PixelData += WORDS + b"\0"
    dataset.file_meta.MediaStorageSOPInstanceUID = f"{UID}.3"
    dataset.file_meta.SourceApplicationEntityTitle = CANARY
    dataset.file_meta.SendingApplicationEntityTitle = CANARY
    dataset.file_meta.ImplementationVersionName = CANARY
    dataset.file_meta.ImplementationClassUID = f"{UID}.6"
    dataset.file_meta.PrivateInformationCreatorUID = f"{UID}.7"
    dataset.file_meta.PrivateInformation = WORDS
    dataset.preamble = (WORDS * 10)[:128]
    return dataset


def leaks(content: bytes) -> list[bytes]:
    return [seed for seed in SEEDS if seed in content]


@pytest.fixture(scope="module")
def dirty_file() -> bytes:
    content = (
        written(dirty()) + b"\xfc\xff\xfc\xffOB\0\0" + (len(WORDS) + 1).to_bytes(4, "little") + WORDS + b"\0"
    )
    assert leaks(content) == SEEDS, "the canaries are not in the file: the test would prove nothing"
    return content


@pytest.mark.parametrize("modified_dates", [False, True])
def test_no_canary_in_the_written_file(dirty_file: bytes, modified_dates: bool) -> None:
    result = deidentified(read(dirty_file), modified_dates=modified_dates)
    seeds = set(leaks(written(result)))
    # Times of day stay where dates are kept.
    assert seeds == ({b"101112.131415"} if modified_dates else set())
    assert len(result) > 100


def test_no_canary_in_a_file_of_implicit_vr() -> None:
    dataset = dirty()
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    content = written(dataset)
    assert leaks(content) == SEEDS
    assert leaks(written(deidentified(read(content)))) == []


def skip_nested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attributes.Attributes, "_sequence", lambda *arguments: arguments[1][arguments[2]])


def trust_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attributes.Attributes, "_outside", lambda *arguments: arguments[1][arguments[2]])


def keep_uids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attributes.Attributes, "_uid", lambda *arguments: arguments[1])


def trust_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attributes, "_term", lambda *arguments: getattr(*arguments))


def forget_pixel_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_data, "clean", lambda *_: None)


def keep_file_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deidentify, "_file_meta", lambda *_: dirty().file_meta)


def no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deidentify, "actions", lambda *_: {})
    monkeypatch.setattr(attributes, "actions", dict)
    trust_text(monkeypatch)


@pytest.mark.parametrize(
    "broken", [skip_nested, trust_text, keep_uids, trust_codes, forget_pixel_data, keep_file_meta, no_table]
)
def test_broken_variants_are_caught(dirty_file: bytes, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for canaries fails for code with one part missing."""
    broken(monkeypatch)
    assert leaks(written(deidentified(read(dirty_file))))


def test_the_kept_text_is_what_the_page_says() -> None:
    """Text that stays is in a documented list, beside terms of the standard."""
    page = (Path(deidentify.__file__).parent / "CONFIDENTIALITY.md").read_text()
    for name in KEPT_TEXT:
        assert f"`{name}`" in page, name


def test_coded_strings_outside_the_table_are_capitals_of_sixteen() -> None:
    result = deidentified(instance(BodyPartExamined="Kanarie", PatientPosition="HFS", ViewPosition="A" * 17))
    assert (result.BodyPartExamined, result.PatientPosition, result.ViewPosition) == ("", "HFS", "")


def test_nesting_ends() -> None:
    """Sequences below `MAX_DEPTH` are removed with all they hold."""
    dataset = top = instance()
    for _ in range(200):
        item = Dataset()
        item.PatientName = CANARY
        item.Rows = 3
        dataset.ReferencedSeriesSequence = Sequence([item])
        dataset = item
    result, depth = deidentified(top), 0
    while "ReferencedSeriesSequence" in result:
        (result,), depth = result.ReferencedSeriesSequence, depth + 1
        assert result.Rows == 3
        assert not result.PatientName
    assert depth == MAX_DEPTH


def test_the_input_is_not_changed(dirty_file: bytes) -> None:
    dataset = read(dirty_file)
    elements = dict(dataset._dict)
    before = copy.deepcopy(dataset)
    deidentified(dataset, modified_dates=True)
    assert all(dataset._dict[tag] is element for tag, element in elements.items())
    assert dataset == before
    assert dataset.file_meta == before.file_meta
    assert dataset.preamble == before.preamble


def test_file_meta_is_rewritten() -> None:
    result = read(written(deidentified(dirty())))
    assert result.preamble == b"\0" * 128
    assert {element.keyword for element in result.file_meta} == {
        "FileMetaInformationGroupLength",
        "FileMetaInformationVersion",
        "MediaStorageSOPClassUID",
        "MediaStorageSOPInstanceUID",
        "TransferSyntaxUID",
        "ImplementationClassUID",
        "ImplementationVersionName",
    }
    assert result.file_meta.MediaStorageSOPInstanceUID == result.SOPInstanceUID
    assert result.file_meta.ImplementationClassUID == deidentify.IMPLEMENTATION_CLASS_UID


@pytest.mark.parametrize(
    ("options", "codes"),
    [
        ({}, ["113100"]),
        ({"modified_dates": True}, ["113100", "113107"]),
        ({"retain_uids": True}, ["113100", "113110"]),
        ({"retain_uids": True, "modified_dates": True}, ["113100", "113107", "113110"]),
    ],
)
def test_what_was_done_stands_in_the_file(options: dict[str, bool], codes: list[str]) -> None:
    result = deidentified(instance(PatientIdentityRemoved="NO"), **options)
    assert [item.CodeValue for item in result.DeidentificationMethodCodeSequence] == codes
    assert {item.CodingSchemeDesignator for item in result.DeidentificationMethodCodeSequence} == {"DCM"}
    assert result.PatientIdentityRemoved == "YES"
    assert result.DeidentificationMethod == "fedmed PS3.15 2026d"
    modified = options.get("modified_dates", False)
    assert result.LongitudinalTemporalInformationModified == ("MODIFIED" if modified else "REMOVED")
    assert "BurnedInAnnotation" not in result


def test_the_patient_is_the_sites_pseudonym() -> None:
    result = deidentified(instance())
    assert result.PatientID == result.PatientName == keyed_hash(KEY, "patient", PATIENT)
    assert re.fullmatch("[0-9a-f]{32}", result.PatientID)
    assert deidentified(instance(PatientID=f" {PATIENT}  ")).PatientID == result.PatientID
    assert deidentified(instance(), key=bytes(32)).PatientID != result.PatientID


def study() -> list[Dataset]:
    """Three files of two series in one frame of reference that refer to one another."""
    files = []
    for number, series in ((1, 1), (2, 1), (3, 2)):
        reference = Dataset()
        reference.ReferencedSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        reference.ReferencedSOPInstanceUID = f"{UID}.9.{number % 3 + 1}"
        related = Dataset()
        related.SeriesInstanceUID = f"{UID}.8.{3 - series}"
        related.ReferencedSOPSequence = Sequence([copy.deepcopy(reference)])
        files.append(
            instance(
                SOPInstanceUID=f"{UID}.9.{number}",
                SeriesInstanceUID=f"{UID}.8.{series}",
                FrameOfReferenceUID=f"{UID}.7",
                ReferencedImageSequence=Sequence([reference]),
                SourceImageSequence=Sequence([copy.deepcopy(reference)]),
                ReferencedSeriesSequence=Sequence([related]),
                RelatedFrameOfReferenceUID=f"{UID}.7",
            )
        )
    return files


def uids(files: list[Dataset]) -> list[list[str]]:
    found = []
    for file in files:
        own = [str(element.value) for element in file.iterall() if element.VR == "UI"]
        found.append([uid for uid in own if not uid.startswith("1.2.840.10008.")])
    return found


def test_uids_stay_consistent_across_a_study() -> None:
    before = uids(study())
    after = uids([deidentified(file) for file in study()])
    mapping = {}
    for old, new in zip(itertools.chain(*before), itertools.chain(*after), strict=True):
        assert mapping.setdefault(old, new) == new
        assert re.fullmatch(r"2\.25\.[1-9][0-9]{0,38}", new)
    assert len(mapping) == len(set(mapping.values())) == 7
    assert not set(mapping) & set(mapping.values())


def test_uids_cannot_be_linked_without_the_key() -> None:
    one = uids([deidentified(file) for file in study()])
    other = uids([deidentified(file, key=bytes(32)) for file in study()])
    assert not set(itertools.chain(*one)) & set(itertools.chain(*other))


def test_uids_of_the_standard_stay() -> None:
    result = deidentified(
        instance(CodingSchemeUID="2.16.840.1.113883.6.96", MappingResourceUID="1.2.840.10008.8.1.1")
    )
    assert result.SOPClassUID == "1.2.840.10008.5.1.4.1.1.2"
    assert result.CodingSchemeUID == "2.16.840.1.113883.6.96"
    assert result.MappingResourceUID == "1.2.840.10008.8.1.1"
    # Only looks like one of the standard's.
    assert deidentified(instance(CodingSchemeUID="1.2.840.10008.4711")).CodingSchemeUID.startswith("2.25.")


def test_a_malformed_uid_is_replaced_also_where_uids_are_retained() -> None:
    result = deidentified(
        instance(StudyInstanceUID=f"1.2.{CANARY}", SeriesInstanceUID="1.2.3"), retain_uids=True
    )
    assert result.StudyInstanceUID.startswith("2.25.")
    assert result.SeriesInstanceUID == "1.2.3"


def day(text: str) -> date:
    return date(int(text[:4]), int(text[4:6]), int(text[6:8]))


def test_intervals_of_a_patient_are_kept() -> None:
    """Across files and attributes, and no day stays what it was."""
    days = ["20231231", "20240101", "20240229", "20240301"]
    moved = [
        deidentified(instance(StudyDate=text, AcquisitionDateTime=f"{text}235959.5"), modified_dates=True)
        for text in days
    ]
    shifts = {day(text) - day(file.StudyDate) for text, file in zip(days, moved, strict=True)}
    assert len(shifts) == 1
    assert 1 <= shifts.pop().days <= 3652
    for file in moved:
        assert file.AcquisitionDateTime == f"{file.StudyDate}235959.5"
    other = deidentified(instance(StudyDate=days[0], PatientID="another"), modified_dates=True)
    assert other.StudyDate != moved[0].StudyDate


def test_a_date_that_cannot_be_moved_becomes_a_placeholder() -> None:
    file = instance(
        StudyDate="last Tuesday", AcquisitionDate="20240230", ContentDate="0", PatientBirthDate="19500101"
    )
    result = deidentified(file, modified_dates=True)
    assert (result.StudyDate, result.AcquisitionDate, result.ContentDate) == (None, None, "19000101")
    assert result.PatientBirthDate is None


def test_a_second_pass_is_refused() -> None:
    once = read(written(deidentified(instance())))
    with pytest.raises(Quarantined, match="already-deidentified"):
        deidentified(once)


def test_a_file_that_others_deidentified_is_taken() -> None:
    file = instance(PatientIdentityRemoved="YES", DeidentificationMethod=f"by {CANARY}")
    assert deidentified(file).DeidentificationMethod == "fedmed PS3.15 2026d"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"PatientID": ""}, "patient-id-missing"),
        ({"PatientID": " \0"}, "patient-id-missing"),
        ({"SOPInstanceUID": ""}, "uid-missing"),
        ({"SOPClassUID": ""}, "uid-missing"),
        ({"Rows": 9999}, "unreadable"),
    ],
)
def test_refusals_hold_a_reason_and_nothing_of_the_file(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(Quarantined) as caught:
        deidentified(instance(**change))
    assert (str(caught.value), caught.value.reason) == (reason, reason)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_nothing_is_warned_of(dirty_file: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """pydicom's warnings quote values."""
    dataset = read(dirty_file)
    caplog.clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        deidentified(dataset, modified_dates=True)
    assert not found
    assert not caplog.text


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="key of 3 bytes: expected at least 16"):
        Deidentifier(b"abc")
    with pytest.raises(ValueError, match="burned_in=ignore: expected refuse or mask"):
        DeidentifyOptions(burned_in="ignore")  # type: ignore[arg-type]


def test_pixels_of_the_bundled_files_stay() -> None:
    """Written and read again, every file that pydicom can decode gives the same pixels; geometry and window stay."""
    kept = """Rows Columns BitsStored PhotometricInterpretation RescaleSlope RescaleIntercept WindowCenter
    WindowWidth PixelSpacing ImagePositionPatient ImageOrientationPatient NumberOfFrames Manufacturer Modality"""
    outcomes: Counter[str] = Counter()
    for path in sorted(map(str, get_testdata_files())):
        if Path(path).stat().st_size > 1 << 20:
            outcomes["left out for time"] += 1
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                dataset = dcmread(path, force=True)
                before = dataset.pixel_array
            except Exception:
                outcomes["not decodable"] += 1
                continue
            dataset.PatientID = dataset.get("PatientID") or PATIENT
            dataset.SOPInstanceUID = dataset.get("SOPInstanceUID") or f"{UID}.1"
            dataset.SOPClassUID = dataset.get("SOPClassUID") or "1.2.840.10008.5.1.4.1.1.7"
            dataset.BurnedInAnnotation = "NO"
            # Some of the files say so by mistake of their makers.
            dataset.ImageType = [value for value in dataset.get("ImageType") or [] if "SCREEN" not in value]
            after = read(written(deidentified(dataset)))
            np.testing.assert_array_equal(after.pixel_array, before, err_msg=Path(path).name)
            assert after.file_meta.TransferSyntaxUID == dataset.file_meta.TransferSyntaxUID
            for name in kept.split():
                assert after.get(name) == dataset.get(name), (Path(path).name, name)
            outcomes["same"] += 1
    assert outcomes["same"] > 100, outcomes


def test_damaged_files_end_in_a_file_or_a_reason() -> None:
    """Flipped bytes and lost ends: nothing but `Quarantined` is raised, and what comes out can be written."""
    rng = np.random.default_rng(0)
    found = [Path(path) for path in get_testdata_files()]
    paths = sorted(path for path in found if path.is_file() and 1000 < path.stat().st_size < 50_000)
    outcomes: Counter[str] = Counter()
    for _ in range(300):
        content = np.frombuffer(paths[rng.integers(len(paths))].read_bytes(), np.uint8).copy()
        places = rng.integers(132, len(content), rng.integers(1, 20))
        content[places] = rng.integers(0, 256, len(places))
        if rng.random() < 0.3:
            content = content[: rng.integers(200, len(content))]
        try:
            dataset = read(content.tobytes())
            dataset.BurnedInAnnotation = "NO"
        except Exception:
            outcomes["not read"] += 1
            continue
        try:
            result = deidentified(dataset, modified_dates=True)
        except Quarantined as error:
            outcomes[error.reason] += 1
        else:
            outcomes["written"] += bool(written(result))
    assert outcomes["written"] > 30, outcomes
    assert len(outcomes) > 3, outcomes
