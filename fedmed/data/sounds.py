"""Recordings: WAV files beside an index, cut into clips as encoders of sound read them.

A site's folder holds index.csv with the columns file, patient and label, and the files that it names. A recording that
cannot be used is left out and counted with a reason; no message holds a name of a file, a label or any other cell.
"""

import hashlib
import math
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedmed.data.dataset import Manifest, SiteDataset, check_parts, site_folders
from fedmed.data.split import held_out, pseudonym
from fedmed.data.table import blank_cells, read_csv
from fedmed.errors import DataError
from fedmed.task import SoundTaskConfig

READER = "sounds/1"
INDEX = "index.csv"
COLUMNS = ("file", "patient", "label")
# Of what encoders read: samples a second, and of a clip.
RATE = 16_000
SAMPLES = 2 * RATE
# What a recording may be sampled at.
RATES = range(4_000, 200_001)


def locate(task: SoundTaskConfig, site: str) -> Path:
    """A site's folder: `path` itself, where an index is in it, else the folder of the site's name in it."""
    folder = Path(task.path or "").expanduser()
    return folder if (folder / INDEX).exists() else folder / site


def version_of(task: SoundTaskConfig, site: str) -> tuple[int, ...]:
    """What changes when the index or a file that it names is written or replaced.

    Raises:
        DataError: there is no index, or it is none.
    """
    folder = locate(task, site)
    table = _index(folder)
    found = hashlib.sha256()
    for name in table["file"].dropna():
        try:
            status = (folder / str(name)).stat()
            found.update(f"{status.st_ino} {status.st_size} {status.st_mtime_ns}\n".encode())
        except (OSError, ValueError):
            found.update(b"absent\n")
    status = (folder / INDEX).stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, int.from_bytes(found.digest()[:8])


def sites_in(task: SoundTaskConfig) -> Counter[str]:
    """Recordings by site, of the folders below `path` that have an index.

    Raises:
        DataError: no such folder.
    """
    folders = site_folders(task.path, INDEX, f"a folder of recordings with {INDEX}")
    return Counter({folder.name: len(_index(folder)) for folder in folders})


def read_site(
    task: SoundTaskConfig, site: str, *, seed: int, key: bytes | None = None, maybe_empty: bool = False
) -> SiteDataset:
    """The recordings of one site; arguments as in `fedmed.data.readers.read_site`.

    Raises:
        DataError: there is no index, or no recording that can be used to train or to test on.
    """
    folder = locate(task, site)
    table, reasons, content = _index(folder), Counter[str](), hashlib.sha256()
    content.update((folder / INDEX).read_bytes())
    kept, sounds = [], []
    declared = [*task.positive, *task.negative]
    blank = {name: blank_cells(table[name], declared=declared if name == "label" else ()) for name in COLUMNS}
    for row, (file, label) in enumerate(zip(table["file"], table["label"], strict=True)):
        reason = next((f"{name}-blank" for name in COLUMNS if blank[name][row]), None)
        if reason is None and label not in declared:
            reason = "label-not-declared"
        try:
            if reason is None:
                sounds.append(_clips(folder, str(file), task.clips, content))
                kept.append(row)
        except _Unusable as error:
            reason = str(error)
        if reason is not None:
            reasons[reason] += 1
    if not (kept or maybe_empty):
        listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
        raise DataError(f"site '{site}' has no usable recording ({listed}); check {INDEX} and its files")
    ids = table["patient"].iloc[kept].tolist()
    names = list(dict.fromkeys(ids))
    codes = {name: code for code, name in enumerate(names)}
    patients = np.array([codes[name] for name in ids], dtype=np.int64)
    test = held_out(task, site, names, seed=seed, key=key)[patients]
    labels = table["label"].iloc[kept].isin(task.positive).to_numpy(dtype=bool).astype(np.float32)
    units = f"{len(names)} usable patients"
    return SiteDataset(
        site=site,
        features=np.zeros((len(kept), 0), dtype=np.float32),
        texts=[],
        sounds=np.stack(sounds) if sounds else np.zeros((0, task.clips, SAMPLES), dtype=np.float32),
        labels=labels,
        patients=patients,
        test=test,
        pseudonyms=tuple(pseudonym(key, name) for name in names) if key is not None else (),
        manifest=Manifest(
            content_sha256=content.hexdigest(),
            reader=READER,
            records=len(kept),
            patients=len(names),
            positives=int(labels.sum()),
            quarantined=dict(reasons),
            warnings=check_parts(site, labels, test, units=units, maybe_empty=maybe_empty),
        ),
    )


def check_site(task: SoundTaskConfig, site: str, *, seed: int) -> Manifest:
    """What `read_site` would say of the data and refuse.

    Raises:
        DataError: as `read_site`.
    """
    return read_site(task, site, seed=seed).manifest


def made_up(task: SoundTaskConfig, records: int) -> dict[str, NDArray[np.float32]]:
    """Recordings of no patient."""
    shape = (records, task.clips, SAMPLES)
    return {"sounds": np.random.default_rng(0).uniform(-1, 1, size=shape).astype(np.float32)}


def _index(folder: Path) -> pd.DataFrame:
    table, _ = read_csv(str(folder / INDEX))
    absent = [name for name in COLUMNS if name not in table.columns]
    if absent:
        raise DataError(f"{folder / INDEX}: no column '{absent[0]}'; expected {', '.join(COLUMNS)}")
    return table


class _Unusable(Exception):
    """Why a recording is left out: a code."""


@dataclass(frozen=True)
class _Recording:
    """Samples as they are in a file, and what they are divided by."""

    rate: int
    samples: NDArray[np.generic]
    middle: float
    white: float

    def clip(self, first: float) -> NDArray[np.float32]:
        """(SAMPLES,) from that second on, at `RATE`; silence after the end."""
        # scipy.signal takes a third of a second to load, which only who hears needs.
        from scipy.signal import resample_poly

        start = round(first * self.rate)
        part = self.samples[start : start + math.ceil(SAMPLES / RATE * self.rate)].astype(np.float64)
        if part.ndim == 2:
            part = part.mean(axis=1)
        part = (part - self.middle) / self.white
        common = math.gcd(RATE, self.rate)
        found = np.zeros(SAMPLES, dtype=np.float32)
        heard = resample_poly(part, RATE // common, self.rate // common)[:SAMPLES]
        found[: len(heard)] = heard
        if not np.isfinite(found).all():
            raise _Unusable("not-finite")
        return found


def _clips(folder: Path, name: str, count: int, content: "hashlib._Hash") -> NDArray[np.float32]:
    """(count, SAMPLES): clips in the middle of as many equal parts of a recording."""
    recording = _opened(folder, name, content)
    beyond = max(0.0, len(recording.samples) / recording.rate - SAMPLES / RATE)
    return np.stack([recording.clip(beyond * (index + 0.5) / count) for index in range(count)])


def _opened(folder: Path, name: str, content: "hashlib._Hash") -> _Recording:
    from scipy.io import wavfile

    try:
        path = (folder / name).resolve()
        # An index could name any file of the machine.
        if not path.is_relative_to(folder.resolve()):
            raise _Unusable("outside-the-folder")
        if not path.is_file():
            raise _Unusable("no-such-file")
        with path.open("rb") as file:
            content.update(hashlib.file_digest(file, "sha256").digest())
            file.seek(0)
            with warnings.catch_warnings():
                # Of chunks that it does not know.
                warnings.simplefilter("ignore")
                rate, samples = wavfile.read(file)
    except _Unusable:
        raise
    # What a damaged file raises is anything.
    except Exception:
        raise _Unusable("not-a-wav") from None
    if rate not in RATES:
        raise _Unusable("rate-not-allowed")
    if not len(samples):
        raise _Unusable("empty")
    if samples.dtype == np.uint8:
        return _Recording(rate, samples, 128.0, 128.0)
    white = float(np.iinfo(samples.dtype).max) + 1 if samples.dtype.kind == "i" else 1.0
    return _Recording(rate, samples, 0.0, white)
