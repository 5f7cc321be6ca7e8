"""labels.csv: each mistake is told by its lines, and no cell is shown."""

from pathlib import Path

import pytest

from fedmed.dicom.hashes import keyed_hash
from fedmed.dicom.labels import read_labels
from fedmed.errors import DataError

KEY = bytes(range(32))


def written(folder: Path, text: str) -> Path:
    path = folder / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("column", "kind"),
    [("StudyInstanceUID", "study"), ("SOPInstanceUID", "instance"), ("PatientID", "patient")],
)
def test_rows_are_found_by_the_hash_of_their_key(tmp_path: Path, column: str, kind: str) -> None:
    labels = read_labels(written(tmp_path, f"{column},label\n 1.2.3 ,sick\n4,\n"), key=KEY)
    assert labels.kind == kind
    assert list(labels.lines.values()) == [2, 3]
    assert labels.classes == {keyed_hash(KEY, kind, "1.2.3"): "sick", keyed_hash(KEY, kind, "4"): ""}


def test_a_patient_has_the_pseudonym_that_tables_give() -> None:
    from fedmed.data.split import pseudonym

    assert keyed_hash(KEY, "patient", "Jö-12") == pseudonym(KEY, "Jö-12").hex()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no row"),
        ("PatientID,label\n", "no row"),
        ("id,label\nsecret,sick\n", "exactly one of the columns"),
        ("PatientID,StudyInstanceUID,label\nsecret,2,sick\n", "exactly one of the columns"),
        ("PatientID,finding\nsecret,sick\n", "no column 'label'"),
        (
            "PatientID,label\nsecret,sick\nb,well\nsecret,well\n",
            "2 row(s) share their PatientID with another row: line 2, 4",
        ),
        ("PatientID,label\n ,sick\n", "have no PatientID: line 2"),
        ("PatientID,label\nsecret\n", "have not the header's 2 cells: line 2"),
        ("PatientID,label\nsecret,sic\n", "1 row(s) have a class that is none of sick, well (--class): line 2"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_by_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(DataError, match=r"labels\.csv") as caught:
        read_labels(written(tmp_path, text), key=KEY, classes=("sick", "well"))
    assert told in str(caught.value)
    assert "secret" not in str(caught.value)


def test_files_that_are_no_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_labels(tmp_path / "none.csv", key=KEY)
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(tmp_path, key=KEY)
    (tmp_path / "latin.csv").write_bytes("PatientID,label\nJö,ja\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        read_labels(tmp_path / "latin.csv", key=KEY)
