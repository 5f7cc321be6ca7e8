"""What every reader yields: the records of one site, ready to train on."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Facts about a site's data that stay at the site: exact counts and what was left out, and why."""

    content_sha256: str
    reader: str
    records: int
    patients: int
    positives: int
    # reason code -> records left out; a code never holds a cell's value.
    quarantined: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class SiteDataset:
    """One site's records.

    Attributes:
        features: (records, features) float32, scaled by declared ranges.
        texts: one sentence a record, or empty where the task has none.
        images: (records, channels, size, size) float32 from 0 (black) to 1 (white), or empty.
        sounds: (records, clips, samples) float32 from -1 to 1, or empty.
        labels: (records,) float32 of 0 and 1.
        patients: (records,) int64, the same number for all records of a patient.
        test: (records,) bool; all records of a patient fall on one side.
        pseudonyms: a keyed hash for each patient, by `patients`' number, where the reader was given a key and the
            data names patients. They stay at the site.
    """

    site: str
    features: NDArray[np.float32]
    texts: list[str]
    labels: NDArray[np.float32]
    patients: NDArray[np.int64]
    test: NDArray[np.bool_]
    manifest: Manifest
    images: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0, 0, 0), dtype=np.float32))
    sounds: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0, 0), dtype=np.float32))
    pseudonyms: tuple[bytes, ...] = field(default=(), repr=False)

    def part(self, *, test: bool) -> NDArray[np.int64]:
        """The indices of the test or the training records."""
        return np.flatnonzero(self.test if test else ~self.test)


def site_folders(path: str | None, marker: str, expected: str) -> list[Path]:
    """The folders below `path` in which there is a file of that name, one a site, by name.

    Raises:
        DataError: no such folder.
    """
    folder = Path(path or "").expanduser()
    try:
        return sorted(
            folder / one.name for one in os.scandir(folder) if os.path.isfile(Path(one.path, marker))
        )
    except OSError as error:
        raise DataError(f"task.path={path}: {error.strerror}; expected {expected}") from None


def check_parts(
    site: str, labels: NDArray[np.float32], test: NDArray[np.bool_], *, units: str, maybe_empty: bool
) -> list[str]:
    """What should be known of a site's training and test part.

    Args:
        labels: (records,) 0 or 1.
        units: how many of what the site has in all, e.g. "3 usable patients".
        maybe_empty: a part may be without records, as in `read_site`.

    Raises:
        DataError: one of the parts has no record.
    """
    warnings = []
    for part, mask in (("training", ~test), ("test", test)):
        if len(set(labels[mask].tolist())) == 1:
            warnings.append(f"{part} part has one class")
        if not (mask.any() or maybe_empty):
            raise DataError(f"site '{site}' has no {part} record; it has {units} in all")
    return warnings
