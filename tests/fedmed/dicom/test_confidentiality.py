"""Every row of Table E.1-1, at the top and in a sequence, under every combination of options."""

import itertools
from collections import Counter
from typing import Any

import pytest
from pydicom import DataElement, Dataset, Sequence
from pydicom.config import IGNORE
from pydicom.datadict import dictionary_has_tag, dictionary_VR

from fedmed.dicom.deid import attributes, confidentiality
from fedmed.dicom.deid.confidentiality import resolve, table
from fedmed.dicom.hashes import keyed_hash
from tests.evidence import FULL, some
from tests.fedmed.dicom.deidentification import (
    CANARY,
    KEY,
    PATIENT,
    UID,
    deidentified,
    instance,
    value_of,
    written,
)

ROWS = list(table())
REPEATING = {
    "50XXXXXX": ["50000005", "50003000", "50AA3000", "50FE0010"],
    "60XX3000": ["60003000", "60023000", "601E3000", "60FE3000"],
    "60XX4000": ["60004000", "60FE4000"],
    "PRIVATE": ["00091001", "00111001", "7FE11010", "00290010"],
}
OPTIONS = [
    {"modified_dates": dates, "retain_uids": uids}
    for dates, uids in itertools.product((False, True), repeat=2)
]


def test_the_table_is_the_standards() -> None:
    """The numbers of edition 2026d, so that a lost or added row shows."""
    counts = Counter(row["basic"] for row in table().values())
    assert counts == {
        "X": 417, "D": 93, "U": 55, "Z": 42, "X/D": 23, "X/Z": 11, "X/Z/D": 8, "Z/D": 6, "X/Z/U*": 2,
    }  # fmt: skip
    assert sum(bool(row["retain_uids"]) for row in table().values()) == 60
    assert sum(bool(row["retain_longitudinal_modified_dates"]) for row in table().values()) == 169
    assert len(table()) == 657


def test_no_conditional_action_keeps_a_value() -> None:
    for code, action in confidentiality.CONDITIONAL.items():
        assert action in "DZU"
        assert action in code
    with pytest.raises(ValueError, match="action=Q: expected one of D, Z, X"):
        resolve("Q")


def code_for(row: dict[str, str], options: dict[str, bool]) -> str:
    """Read from the row itself, not through what is tested."""
    code = row["basic"]
    if options["retain_uids"] and row["retain_uids"]:
        code = row["retain_uids"]
    if options["modified_dates"] and row["retain_longitudinal_modified_dates"]:
        code = row["retain_longitudinal_modified_dates"]
    return code


def vr_of(tag: int) -> str:
    return dictionary_VR(tag).split(" ")[0] if dictionary_has_tag(tag) else "LO"


def put(dataset: Dataset, tag: int) -> None:
    dataset.add(DataElement(tag, vr_of(tag), value_of(vr_of(tag)), validation_mode=IGNORE))


def check(result: Dataset, tag: int, row: Any, options: dict[str, bool], *, nested: bool) -> None:
    """`result` holds what the row's action leaves of `value_of`."""
    vr, code = vr_of(tag), code_for(row, options)
    original = Dataset()
    put(original, tag)
    if code == "C" and vr not in ("DA", "DT", "TM"):
        code = row["basic"]
    if code == "X":
        assert tag not in result
        return
    value = result[tag].value
    if tag in (0x00100010, 0x00100020):
        if nested and tag == 0x00100010:
            assert not value
        else:
            assert value == keyed_hash(KEY, "patient", PATIENT if tag == 0x00100010 else value_of(vr))
    elif code in ("Z", "X/Z"):
        assert result[tag].is_empty
    elif code in ("D", "Z/D", "X/D", "X/Z/D"):
        assert not result[tag].is_empty
        assert value == ([Dataset()] if vr == "SQ" else value)
        assert value != original[tag].value
    elif vr == "SQ":
        assert code in ("K", "X/Z/U*")
        (item,) = value
        assert not item.PatientName
        assert item.ReferencedSOPClassUID == original[tag].value[0].ReferencedSOPClassUID
        assert (item.ReferencedSOPInstanceUID == f"{UID}.2") == options["retain_uids"]
    elif code == "U":
        assert value.startswith("2.25.")
    elif code == "K":
        assert value == original[tag].value
    elif code == "C":
        assert len(value) == len(original[tag].value)
        assert (value == original[tag].value) == (vr == "TM")
    else:
        pytest.fail(f"no rule for {code}")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_row_at_the_top(options: dict[str, bool]) -> None:
    """One file a row: nothing else in it can make up for a wrong action."""
    # In `make test` each row with both values of each option: half of the rows with each combination.
    rows = some(ROWS[0 if FULL else (0, 1, 1, 0)[OPTIONS.index(options)] :], 2)
    assert walk(rows, options) == len(rows) >= len(ROWS) // 2


def walk(rows: list[str], options: dict[str, bool]) -> int:
    """Check these rows at the top; how many there were."""
    walked = 0
    for name in rows:
        for digits in REPEATING.get(name, [name]):
            tag = int(digits, 16)
            dataset = instance()
            # Commands, file meta and directories cannot be in a file's dataset.
            if tag >> 16 < 8:
                continue
            put(dataset, tag)
            result = deidentified(dataset, **options)
            check(result, tag, table()[name], options, nested=False)
            assert CANARY.encode() not in written(result)
        walked += 1
    return walked


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_row_in_a_sequence(options: dict[str, bool]) -> None:
    """Three deep, inside sequences that the table does not name."""
    walked = 0
    # In `make test` other rows with each combination of options.
    rows = some(ROWS[0 if FULL else OPTIONS.index(options) :], 4)
    for name in rows:
        for digits in REPEATING.get(name, [name]):
            tag = int(digits, 16)
            item = Dataset()
            put(item, tag)
            deeper = Dataset()
            deeper.ReferencedSeriesSequence = Sequence([item])
            dataset = instance(SharedFunctionalGroupsSequence=Sequence([Dataset()]))
            dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence = Sequence([deeper])
            result = deidentified(dataset, **options)
            inner = result.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
            check(inner.ReferencedSeriesSequence[0], tag, table()[name], options, nested=True)
            assert CANARY not in str(result)
        walked += 1
    assert walked == len(rows) >= len(ROWS) // 4


@pytest.mark.parametrize("name", ["00080090", "00080020", "0020000D", "0040A730", "00080050"])
def test_a_lost_row_would_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk finds a table that keeps an attribute: it would not pass for any code."""
    lost = {tag: action for tag, action in confidentiality.actions().items() if tag != int(name, 16)}
    monkeypatch.setattr("fedmed.dicom.deid.deidentify.actions", lambda option=None: {} if option else lost)
    monkeypatch.setattr(attributes, "actions", lambda: lost)
    monkeypatch.setattr(attributes.Attributes, "_outside", lambda *arguments: arguments[1][arguments[2]])
    with pytest.raises(AssertionError):
        walk(ROWS if FULL else [name], OPTIONS[0])
