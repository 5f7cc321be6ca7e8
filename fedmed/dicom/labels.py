"""labels.csv: which class a study, an instance or a patient has."""

import csv
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fedmed.dicom.hashes import keyed_hash
from fedmed.errors import DataError, nearest

# The column that names what a row is about -> the kind of its keyed hash.
KEYS = {"StudyInstanceUID": "study", "SOPInstanceUID": "instance", "PatientID": "patient"}


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What labels.csv says, its keys hashed as those of the files are.

    Attributes:
        kind: study, instance or patient.
        classes: hash -> class, '' where the row's cell is empty.
        lines: hash -> where in the file its row stands.
    """

    kind: str
    classes: dict[str, str]
    lines: dict[str, int]


def read_labels(
    path: Path, *, key: bytes, label_column: str = "label", classes: tuple[str, ...] = ()
) -> Labels:
    """The labels of a CSV file with a column StudyInstanceUID, SOPInstanceUID or PatientID, and one of classes.

    Args:
        classes: those that may occur; empty: any.

    Raises:
        DataError: no such file or column, a key that stands twice, a row without key, or a class not among `classes`.
            Lines are named, cells are not.
    """
    header, rows = _rows(path)
    named = [name for name in KEYS if name in header]
    if len(named) != 1:
        found = " and ".join(named) or "none"
        raise DataError(f"{path}: expected exactly one of the columns {', '.join(KEYS)}; it has {found}")
    if label_column not in header:
        raise DataError(
            f"{path}: no column '{label_column}'; {nearest(label_column, header)} (--label-column)"
        )
    key_at, label_at = header.index(named[0]), header.index(label_column)
    keys = [row[key_at].strip() for _, row in rows]
    values = [row[label_at].strip() for _, row in rows]
    _refuse(path, rows, [not value for value in keys], f"have no {named[0]}")
    counts = Counter(keys)
    _refuse(path, rows, [counts[value] > 1 for value in keys], f"share their {named[0]} with another row")
    if classes:
        unknown = [bool(value) and value not in classes for value in values]
        _refuse(path, rows, unknown, f"have a class that is none of {', '.join(classes)} (--class)")
    kind = KEYS[named[0]]
    hashed = [keyed_hash(key, kind, value) for value in keys]
    return Labels(
        kind=kind,
        classes=dict(zip(hashed, values, strict=True)),
        lines=dict(zip(hashed, (line for line, _ in rows), strict=True)),
    )


def _rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and each row with its line."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [re.sub(r"[\s_]", "", name) if name.replace(" ", "") in KEYS else name.strip()
                      for name in next(reader, [])]  # fmt: skip
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not text in UTF-8; save the table as CSV in UTF-8") from None
    except csv.Error:
        raise DataError(f"{path}: not a comma-separated table") from None
    if not rows:
        raise DataError(
            f"{path}: no row; expected a header line and one row for each study, instance or patient"
        )
    _refuse(
        path, rows, [len(row) != len(header) for _, row in rows], f"have not the header's {len(header)} cells"
    )
    return header, rows


def _refuse(path: Path, rows: list[tuple[int, list[str]]], wrong: list[bool], what: str) -> None:
    lines = [line for (line, _), bad in zip(rows, wrong, strict=True) if bad]
    if lines:
        shown = ", ".join(map(str, lines[:5])) + (", …" if len(lines) > 5 else "")
        raise DataError(f"{path}: {len(lines)} row(s) {what}: line {shown}")
