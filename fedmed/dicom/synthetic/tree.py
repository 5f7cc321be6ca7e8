"""The folder of hospitals: for each a tree of DICOM files, as an archive keeps them, and a table of labels."""

import contextlib
import csv
import functools
import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.dicom.synthetic.allot import Integers
from fedmed.dicom.synthetic.facts import Facts
from fedmed.dicom.synthetic.next_commands import commands
from fedmed.dicom.synthetic.people import Visit, draw_visits
from fedmed.dicom.synthetic.scanners import Scanner
from fedmed.dicom.synthetic.write import dicom_bytes
from fedmed.errors import ConfigError, require

FORMAT = "fedmed-hospitals/1"
KEYS = ("StudyInstanceUID", "SOPInstanceUID", "PatientID")
# Written last, and gone with the rest where writing ended early.
DECLARATION = "hospitals.json"
# Images that are scanned at once.
BATCH = 256
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Hospital:
    """What was written of one hospital. All of it is public: it was made up."""

    name: str
    patients: int
    images: int
    # Class -> patients.
    by_label: dict[str, int]
    scanner: str


@dataclass(frozen=True, kw_only=True)
class Written:
    """A folder of hospitals, and what a run on them declares."""

    path: str
    hospitals: list[Hospital]
    positive: list[str]
    negative: list[str]
    # The most that one patient has.
    images_per_patient: int
    # Patients and images for whom the prevalences had no room.
    left_out: dict[str, int]
    seed: int

    def commands(self, *, ingested: str = "ingested", folder: str | None = None) -> list[str]:
        """What comes next: ingestion of each hospital, then the run. `folder`: where this is; else `path`."""
        return commands(
            folder=self.path if folder is None else folder, ingested=ingested,
            sizes={hospital.name: hospital.patients for hospital in self.hospitals},
            positive=self.positive, negative=self.negative, images_per_patient=self.images_per_patient,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Allotted:
    """All that `_write` needs. Arrays are by image; `hospital` is -1 for one that is left out."""

    images: NDArray[np.uint8]
    labels: Integers
    patients: Integers
    hospital: Integers
    names: Sequence[str]
    classes: Sequence[str]
    positive: Sequence[str]
    scanners: Sequence[Scanner]
    shift: float
    key: str
    seed: int

    @functools.cached_property
    def content(self) -> bytes:
        """Tells two folders apart: UIDs follow from it."""
        digest = hashlib.blake2b(self.images.tobytes(), digest_size=16)
        for values in (self.labels, self.patients, self.hospital):
            digest.update(values.tobytes())
        digest.update(f"{self.names} {self.shift} {self.seed}".encode())
        return digest.digest()

    def uid(self, *parts: object) -> str:
        """A UID under 2.25 (PS3.5 B.2): the same for the same content and parts."""
        drawn = hashlib.blake2b(repr(parts).encode(), key=self.content, digest_size=16).digest()
        # Version 8 of RFC 9562, which this UUID library does not make by itself.
        whole = int.from_bytes(drawn) & ~(0xF << 76) & ~(0x3 << 62) | (8 << 76) | (2 << 62)
        return f"2.25.{uuid.UUID(int=whole).int}"


def write_tree(allotted: Allotted, out: Path, progress: Progress | None) -> Written:
    # Killed at once, a process leaves this folder behind: hidden, and without a declaration.
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, draft, ignore_errors=True)
            draft.mkdir()
            written = _write_all(allotted, draft, out, progress)
            os.rename(draft, out)
            undo.pop_all()
    except OSError as error:
        raise ConfigError(f"OUT={out}: cannot be written ({error.strerror}); nothing was kept") from None
    return written


def _write_all(allotted: Allotted, draft: Path, out: Path, progress: Progress | None) -> Written:
    done, total = 0, int((allotted.hospital >= 0).sum())
    found = []
    for index in range(len(allotted.names)):
        for count in _write_hospital(allotted, index, draft):
            done += count
            if progress:
                progress(done, total)
        found.append(_summary(allotted, index))
    left = allotted.hospital < 0
    written = Written(
        path=str(out), hospitals=found, positive=list(allotted.positive),
        negative=[name for name in allotted.classes if name not in allotted.positive],
        images_per_patient=int(np.bincount(allotted.patients).max()), seed=allotted.seed,
        left_out={"patients": len(np.unique(allotted.patients[left])), "images": int(left.sum())},
    )  # fmt: skip
    # Without the place, which is not the same on the next machine.
    values = {"format": FORMAT} | {name: value for name, value in asdict(written).items() if name != "path"}
    (draft / "README.md").write_text(_readme(written))
    (draft / DECLARATION).write_text(json.dumps(values, indent=2) + "\n")
    return written


def _readme(written: Written) -> str:
    lines = "\n".join(written.commands(folder="."))
    return (
        "# Hospitals that were made up\n\n"
        "Nobody's data: patients, names and dates are invented, and so are the makes of scanners. hospitals.json says\n"
        "how many patients and images each hospital has. From this folder:\n\n"
        f"```\n{lines}\n```\n"
    )


def _summary(allotted: Allotted, index: int) -> Hospital:
    here = allotted.hospital == index
    patients, first = np.unique(allotted.patients[here], return_index=True)
    counts = Counter(allotted.labels[here][first].tolist())
    return Hospital(
        name=allotted.names[index], patients=len(patients), images=int(here.sum()),
        by_label={name: counts[number] for number, name in enumerate(allotted.classes)},
        scanner=allotted.scanners[index].name,
    )  # fmt: skip


def _write_hospital(allotted: Allotted, index: int, draft: Path) -> Iterator[int]:
    """Write one hospital; yields how many images were added."""
    root = draft / allotted.names[index]
    mine = np.flatnonzero(allotted.hospital == index)
    mine = mine[np.argsort(allotted.patients[mine], kind="stable")]
    rng = np.random.default_rng([allotted.seed, 4, index])
    visits = draw_visits(allotted.patients[mine], hospital=index, rng=rng)
    scanner, made = allotted.scanners[index], set[Path]()
    rows: dict[str, str] = {}
    for begin in range(0, len(mine), BATCH):
        part = mine[begin : begin + BATCH]
        for image, visit, pixels in zip(
            part, visits[begin : begin + BATCH], scanner.scan(allotted.images[part], shift=allotted.shift, rng=rng),
            strict=True,
        ):  # fmt: skip
            folder = root / "dicom" / visit.folder
            if folder not in made:
                folder.mkdir(parents=True)
                made.add(folder)
            facts = _facts(allotted, index, visit, pixels)
            syntax = scanner.syntax_for(*pixels.shape[:2])
            (folder / f"IM{visit.instance:04d}.dcm").write_bytes(dicom_bytes(pixels, facts, syntax=syntax))
            which = {"StudyInstanceUID": facts.study_uid, "SOPInstanceUID": facts.instance_uid}
            rows[which.get(allotted.key, visit.patient_id)] = allotted.classes[allotted.labels[image]]
        yield len(part)
    with (root / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((allotted.key, "label"))
        writer.writerows(rows.items())


def _facts(allotted: Allotted, index: int, visit: Visit, pixels: NDArray[Any]) -> Facts:

    scanner, colour = allotted.scanners[index], pixels.ndim == 3
    return Facts(
        instance_uid=allotted.uid(index, visit.study, visit.instance), study_uid=allotted.uid(index, visit.study),
        series_uid=allotted.uid(index, visit.study, "series"), study_id=str(visit.study),
        patient_id=visit.patient_id, patient_name=visit.patient_name, birth_date=visit.birth_date, sex=visit.sex,
        study_time=visit.time, instance_number=visit.instance, institution=allotted.names[index],
        modality="US" if colour else scanner.modality, manufacturer=scanner.manufacturer, model=scanner.name,
        comment="made-up patient", pixel_spacing=scanner.pixel_spacing,
        bits_stored=8 if colour else scanner.bits_stored,
        photometric="RGB" if colour else scanner.photometric, window=scanner.window(scanner.bits_stored),
    )  # fmt: skip


def check_out(out: str | Path) -> Path:
    """The folder to make, absolute.

    Raises:
        ConfigError: it holds something, is a file, is the current folder, or has no parent.
    """
    path = Path(out).expanduser()
    try:
        whole = path.resolve()
        if not whole.parent.is_dir():
            raise ConfigError(f"OUT={out}: no folder '{whole.parent}'; make it first")
        if whole.exists() and not whole.is_dir():
            raise ConfigError(f"OUT={out}: a file; expected a new or an empty folder")
        if whole.is_dir() and any(whole.iterdir()):
            raise ConfigError(f"OUT={out}: not empty; expected a new or an empty folder")
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"OUT={out}: cannot be used ({getattr(error, 'strerror', error)})") from None
    require(whole != Path.cwd(), "OUT", out, "another folder than the current one")
    return whole
