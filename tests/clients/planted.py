"""Data full of canaries, one planter for each kind of task, and the search for them in whatever left a site."""

import base64
import contextlib
import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedmed.dicom.store import StoredImage, write_store
from tests.stores import images, settings

MARK = "zxqcanary"
HASH = hashlib.sha256(MARK.encode()).hexdigest()
NUMBER = "73.918273645"
ID = f"{MARK}-id"
COLUMNS = ["site", "id", "name", "scan", "digest", f"{MARK}-header", "age", "sex", "sick"]


@dataclass
class Planted:
    """Where the data is, how a run reads it, and what must not be seen outside."""

    path: Path
    settings: list[str]
    rows: list[list[str]]
    # Besides those in the cells: digests of what is in them.
    more: set[str] = field(default_factory=set)

    def write(self, *, header: list[str] | None = None) -> None:
        """Write the rows as they are now."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header or COLUMNS, *self.rows])
        self.path.write_text(text.getvalue())
        self.remember()

    def remember(self) -> None:
        """Whoever knows the digest of a file or of an id can test a guess."""
        if self.path.is_file():
            self.more.add(hashlib.sha256(self.path.read_bytes()).hexdigest())

    def put(self, column: str, value: str, *, only: int | None = None) -> None:
        """Put a value into a column of every row, or of the first few of each site."""
        for row in self.rows:
            if only is None or int(row[1].rpartition("-")[2]) < only:
                row[COLUMNS.index(column)] = value
        self.write()

    @property
    def canaries(self) -> set[bytes]:
        """What is searched for, in lower case."""
        return {text.lower().encode() for text in {MARK, HASH, NUMBER, *self.more}}


def table(folder: Path) -> Planted:
    """Forty patients a site: names, ids, paths of scans, digests, a measured number."""
    draws = np.random.default_rng(7)
    rows = [
        [site, f"{ID}-{site}-{patient}", f"{MARK} Ada {patient}", f"/data/{MARK}/scan{patient}.dcm", HASH,
         f"{MARK} note", NUMBER if patient % 5 == 0 else str(draws.integers(20, 90)),
         str(draws.choice(["f", "m"])), str(draws.integers(2))]
        for site in ("a", "b")
        for patient in range(40)
    ]  # fmt: skip
    settings = [
        "task=csv", "task.title=a small table", f"task.path={folder / 'patients.csv'}", "task.site_column=site",
        "task.label=sick", "task.patient_column=id", "task.declared_sizes={a: 600, b: 600}",
        "task.columns={age: {kind: numeric, low: 0, high: 100}, sex: {kind: categorical, categories: [f, m]}}",
        "model=logistic", "rounds=2", "training.sample_rate=0.5", "training.steps_per_round=2",
        "privacy.epsilon=null", "privacy.noise_multiplier=2", 
        "privacy.metrics=private", "privacy.metrics_epsilon=8", "federation.approval_timeout=0",
    ]  # fmt: skip
    made = Planted(folder / "patients.csv", settings, rows)
    made.more = {hashlib.sha256(row[1].encode()).hexdigest() for row in rows}
    made.write()
    return made


@dataclass
class PlantedImages:
    """As `Planted`, of ingested images: the store of site a lies in the folder `path`."""

    path: Path
    settings: list[str]
    images: list[StoredImage]
    more: set[str] = field(default_factory=set)

    def write(self) -> None:
        """Write the images as they are now."""
        write_store(self.path / "a", images=self.images)
        self.remember()

    def remember(self) -> None:
        """Whoever knows the digest of a file, or a pseudonym, can test a guess."""
        for file in (self.path / "a").iterdir():
            if file.is_file():
                self.more.add(hashlib.sha256(file.read_bytes()).hexdigest())
        manifest = self.path / "a" / "manifest.json"
        if manifest.exists():
            with contextlib.suppress(ValueError, KeyError):
                self.more.add(json.loads(manifest.read_text())["content_sha256"])

    def put(self, *, only: int | None = None, **values: str) -> None:
        """Put values into every image, or into the first few."""
        for index, image in enumerate(self.images[:only]):
            self.images[index] = dataclasses.replace(image, **values)
        self.write()

    @property
    def canaries(self) -> set[bytes]:
        """What is searched for, in lower case."""
        return {text.lower().encode() for text in {MARK, HASH, *self.more}}


def ingested(folder: Path) -> PlantedImages:
    """Forty patients' images: labels, manufacturers, the folder's name and the ids behind the pseudonyms."""
    path = folder / f"{MARK}-ingested"
    made = images(patients=40, most=2, key=bytes(32), name=ID, seed=7)
    planted = [dataclasses.replace(image, manufacturer=f"{MARK} scanners", year=HASH) for image in made]
    for index in range(0, 6, 2):
        # Left out by its label, which names the patient.
        planted[index] = dataclasses.replace(planted[index], label=f"{MARK} Ada {index}")
    # The title that the sites of the tests list.
    options = settings(
        path, "task.title=a small table", "task.declared_sizes={a: 600, b: 600}", *PRIVATE_METRICS
    )
    found = PlantedImages(path, options, planted)
    found.more = {image.patient for image in planted}
    found.write()
    return found


PRIVATE_METRICS = ["privacy.metrics=private", "privacy.metrics_epsilon=8"]
# A kind of task that is registered and not here fails the suite.
PLANTERS: dict[str, Callable[[Path], Planted | PlantedImages]] = {"table": table, "image": ingested}


def forms(canary: bytes) -> Iterator[bytes]:
    """How it might travel: as it is, in UTF-16, as hex digits."""
    yield canary
    yield canary.decode().encode("utf-16-le")
    yield canary.hex().encode()


def leaks(seen: bytes, canaries: set[bytes]) -> list[bytes]:
    """Which canaries are in it, whatever the case; also as base64."""
    lower = seen.lower()
    found = [canary for canary in canaries if any(form in lower for form in forms(canary))]
    # At each of the three places where it may begin within a group of base64.
    for shift in range(3):
        mark = base64.b64encode(b"x" * shift + MARK.encode())[4 if shift else 0 : -4]
        found += [mark] if mark in seen else []
    return found


def all_bytes(folder: Path) -> bytes:
    """Every file below a folder, and its name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return b"\n".join(str(path.relative_to(folder)).encode() + b"\n" + path.read_bytes() for path in files)
