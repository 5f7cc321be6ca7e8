"""Arrays with labels, or phantoms, become hospitals: for each a tree of DICOM files and a table of labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.dicom.synthetic.allot import Integers, allot, group_patients
from fedmed.dicom.synthetic.phantoms import make_phantoms
from fedmed.dicom.synthetic.scanners import Scanner, scanners
from fedmed.dicom.synthetic.tree import KEYS, Allotted, Progress, Written, check_out, write_tree
from fedmed.errors import require

PHANTOM_NAMES = ("Northside", "Riverbank", "Lakeview")
# Of phantoms, which are drawn before they are written.
MOST_PIXELS = 2**32
PHANTOM_CLASSES = ("clear", "opacity")


def make_hospitals(
    images: NDArray[np.uint8],
    labels: NDArray[Any],
    out: str | Path,
    *,
    hospitals: int = 3,
    names: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    positive: Sequence[str] | None = None,
    patients: Integers | None = None,
    label_skew: float | None = None,
    prevalences: Sequence[float] | None = None,
    images_per_patient: tuple[int, int] = (1, 1),
    scanner_shift: float = 0.5,
    makes: Sequence[Scanner] | None = None,
    key: str = "StudyInstanceUID",
    seed: int = 0,
    progress: Progress | None = None,
) -> Written:
    """Write `out`/<hospital>/dicom/**.dcm and `out`/<hospital>/labels.csv of arrays, and what a run declares.

    `out` is there as a whole or not at all. Equal arguments and versions give equal bytes.

    Args:
        images: (images, rows, columns) or (images, rows, columns, 3) uint8, 0 black. Colour is written as US, the one
            modality of the six that has it.
        labels: (images,) or (images, 1) whole numbers.
        out: a new or an empty folder.
        names: of the hospitals; else hospital-1 and so on.
        class_names: of the labels 0, 1, …; else the numbers.
        positive: class names; else the last one.
        patients: (images,) whose each image is; else made up by class, with `images_per_patient` (fewest, most).
        label_skew, prevalences: see `allot`.
        scanner_shift: 0 (pictures as they are, written in different ways) to 3; see `Scanner.scan`.
        makes: a scanner for each hospital; else `scanners`.
        key: the column of labels.csv: StudyInstanceUID, SOPInstanceUID or PatientID.
        progress: called with the images done and all images.

    Raises:
        ConfigError: an argument out of range, or `out` cannot be written.
    """
    out = check_out(out)
    numbers = _checked(images, labels)
    require(0 <= scanner_shift <= 3, "scanner_shift", scanner_shift, "0 to 3")
    require(key in KEYS, "key", key, " or ".join(KEYS))
    require(0 <= seed < 2**63, "seed", seed, "0 <= seed < 2^63")
    classes = _classes(numbers, class_names)
    positives = [classes[-1]] if positive is None else list(positive)
    for name in positives:
        require(name in classes, "positive", name, f"one of the classes {', '.join(classes)}")
    require(len(positives) < len(classes), "positive", ", ".join(positives), "at least one class less")
    rng = np.random.default_rng([seed, 2])
    if patients is None:
        require(hospitals <= len(numbers), "hospitals", hospitals, f"at most {len(numbers)}: an image each")
        patients = group_patients(numbers, images_per_patient, rng)
    _, first, whose = np.unique(patients, return_index=True, return_inverse=True)
    one = bool(np.all(numbers == numbers[first][whose]))
    require(one, "patients", "some with images of several classes", "one label a patient")
    ones = [index for index, name in enumerate(classes) if name in positives]
    placed = allot(
        numbers[first], hospitals, label_skew=label_skew, prevalences=prevalences, positive=ones, rng=rng
    )
    allotted = Allotted(
        images=images, labels=numbers, patients=whose, hospital=placed[whose], names=_names(names, hospitals),
        classes=classes, positive=positives, shift=scanner_shift, key=key, seed=seed,
        scanners=makes or scanners(hospitals, *images.shape[1:3]),
    )  # fmt: skip
    require(
        len(allotted.scanners) == hospitals, "makes", len(allotted.scanners), f"{hospitals}, one a hospital"
    )
    return write_tree(allotted, out, progress)


def write_phantom_hospitals(
    out: str | Path,
    *,
    names: Sequence[str] = PHANTOM_NAMES,
    patients: int = 300,
    prevalences: Sequence[float] | None = None,
    images_per_patient: tuple[int, int] = (1, 4),
    size: int = 64,
    difficulty: float = 1.0,
    scanner_shift: float = 0.5,
    key: str = "StudyInstanceUID",
    seed: int = 0,
    progress: Progress | None = None,
) -> Written:
    """Write hospitals of phantoms: classes `clear` and `opacity`, several images a patient.

    Args:
        names: of the hospitals.
        patients: of each hospital.
        prevalences: of opacity, one each; else spread from 0.3 to 0.5.
        size, difficulty: see `make_phantoms`.
        the others: see `make_hospitals`.

    Raises:
        ConfigError: an argument out of range, or `out` cannot be written.
    """
    check_out(out)
    require(len(names) >= 1, "names", list(names), "at least one hospital")
    low, high = images_per_patient
    require(2 <= patients <= 100_000, "patients", patients, "2 to 100,000")
    require(1 <= low <= high <= 1000, "images_per_patient", f"{low}-{high}", "1 <= fewest <= most <= 1000")
    pixels = len(names) * patients * high * size**2
    require(pixels <= MOST_PIXELS, "patients", patients, f"fewer: {pixels:.1e} pixels do not fit into memory")
    wanted = list(np.linspace(0.3, 0.5, len(names))) if prevalences is None else list(prevalences)
    require(len(wanted) == len(names), "prevalences", wanted, f"{len(names)}, one each hospital")
    for value in wanted:
        require(0 <= value <= 1, "prevalences", value, "0 to 1")
    ill = [round(value * patients) for value in wanted]
    rng = np.random.default_rng([seed, 3])
    labels = rng.permutation(np.concatenate([np.arange(patients) < count for count in ill])).astype(np.int64)
    counts = rng.integers(low, high + 1, len(labels))
    made = make_phantoms(labels, counts, size=size, difficulty=difficulty, seed=seed)
    return make_hospitals(
        made.images, made.labels, out, hospitals=len(names), names=names, class_names=PHANTOM_CLASSES,
        patients=made.patients, prevalences=[count / patients for count in ill], scanner_shift=scanner_shift,
        key=key, seed=seed, progress=progress,
    )  # fmt: skip


def _checked(images: NDArray[Any], labels: NDArray[Any]) -> Integers:
    """The labels as (images,) int64."""
    shape = images.shape
    fits = len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)
    expected = "(images, rows, columns) or (images, rows, columns, 3), none of them 0"
    require(fits and min(shape) > 0 and max(shape[1:3]) < 2**15, "images.shape", shape, expected)
    require(images.dtype == np.uint8, "images.dtype", images.dtype, "uint8")
    one = labels.shape in ((shape[0],), (shape[0], 1))
    require(one, "labels.shape", labels.shape, f"({shape[0]},) or ({shape[0]}, 1): one label an image")
    require(labels.dtype.kind in "iub", "labels.dtype", labels.dtype, "whole numbers")
    return labels.reshape(-1).astype(np.int64)


def _classes(labels: Integers, names: Sequence[str] | None) -> list[str]:
    """The class of each number; `labels` is changed in place where the numbers have gaps."""
    values = np.unique(labels)
    require(len(values) >= 2, "labels", "all the same", "at least two classes")
    require(len(values) <= 1000, "labels", f"{len(values)} classes", "at most 1000")
    if names is None:
        labels[:] = np.searchsorted(values, labels)
        return [str(value) for value in values]
    known = values[0] >= 0 and values[-1] < len(names)
    require(bool(known), "class_names", ", ".join(names), "a name for each of the labels 0, 1, … that occur")
    plain = all(name and name == name.strip() and name.isprintable() for name in names)
    require(plain and len(set(names)) == len(names), "class_names", ", ".join(names), "different words")
    return list(names)


def _names(names: Sequence[str] | None, hospitals: int) -> list[str]:
    found = [f"hospital-{index + 1}" for index in range(hospitals)] if names is None else list(names)
    require(
        len(found) == hospitals and len(set(found)) == hospitals,
        "names",
        found,
        f"{hospitals} different ones",
    )
    for name in found:
        # A folder, an institution's name, and a key of a setting.
        plain = (
            0 < len(name) <= 60
            and name.isprintable()
            and not set(name) & set("/\\:{},\"'")
            and name[0] != "."
        )
        require(
            plain, "names", name, "names of folders of at most 60 characters, without / \\ : { } , and quotes"
        )
    return found
