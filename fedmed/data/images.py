"""Images: what ingestion left behind (`fedmed/dicom/store.py`), read as declared.

Patients are the pseudonyms that ingestion made with the site's own key. A record that the task does not allow is left
out and counted with a reason; no message holds a label or any other cell.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmed.data.dataset import Manifest, SiteDataset, check_parts, site_folders
from fedmed.data.split import held_out
from fedmed.data.table import blank_cells
from fedmed.dicom.store import MANIFEST, ImageStore, read_manifest
from fedmed.errors import DataError
from fedmed.task import ImageTaskConfig

READER = "images/1"

WHITE = np.float32(65535)
# Rec. 601: how bright red, green and blue look.
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def locate(task: ImageTaskConfig, site: str) -> Path:
    """The ingested folder of a site: `path` itself, where it is one, else the folder of the site's name in it."""
    folder = Path(task.path or "").expanduser()
    return folder if (folder / MANIFEST).exists() else folder / site


def version_of(task: ImageTaskConfig, site: str) -> tuple[int, ...]:
    """What changes when a site's data is ingested again: its manifest's inode, size and time.

    Raises:
        DataError: there is no ingested data.
    """
    folder = locate(task, site)
    try:
        status = (folder / MANIFEST).stat()
    except OSError:
        # Says which of the ways to be absent it is.
        read_manifest(folder)
        raise DataError(f"{folder}: cannot be read") from None
    return status.st_ino, status.st_size, status.st_mtime_ns


def sites_in(task: ImageTaskConfig) -> Counter[str]:
    """Records by site: what was ingested below `path`; none where `path` is one site's own folder.

    Raises:
        DataError: no such folder.
    """
    folders = site_folders(task.path, MANIFEST, "the folder of ingested data")
    return Counter({folder.name: int(read_manifest(folder)["records"]) for folder in folders})


def read_site(
    task: ImageTaskConfig, site: str, *, seed: int, key: bytes | None = None, maybe_empty: bool = False
) -> SiteDataset:
    """The records of one site; arguments as in `fedmed.data.readers.read_site`.

    Raises:
        DataError: there is no ingested data, it is damaged, or the site has no usable record to train or to test on.
    """
    store = ImageStore.open(locate(task, site))
    facts = _facts(task, site, store, seed=seed, key=key, maybe_empty=maybe_empty)
    images = np.zeros((len(facts.records), task.slices, task.image_size, task.image_size), dtype=np.float32)
    for index, record in enumerate(facts.records):
        images[index] = prepared(task, store.image(record))
    return SiteDataset(
        site=site,
        features=np.zeros((len(images), 0), dtype=np.float32),
        texts=[],
        images=images,
        labels=facts.labels,
        patients=facts.patients,
        test=facts.test,
        # The image as the unit is for benchmarks: no ledger enrols it.
        pseudonyms=facts.pseudonyms if key is not None and task.unit == "patient" else (),
        manifest=facts.manifest,
    )


def check_site(task: ImageTaskConfig, site: str, *, seed: int) -> Manifest:
    """What `read_site` would say of the data and refuse, without a look at the pixels.

    Raises:
        DataError: as `read_site`.
    """
    return _facts(
        task, site, ImageStore.open(locate(task, site)), seed=seed, key=None, maybe_empty=False
    ).manifest


def made_up(task: ImageTaskConfig, records: int) -> dict[str, NDArray[np.float32]]:
    """Images of no patient, as many and as large as a site's would be: to time a step with."""
    shape = (records, task.slices, task.image_size, task.image_size)
    return {"images": np.random.default_rng(0).uniform(size=shape).astype(np.float32)}


@dataclass(frozen=True)
class _Facts:
    """Which records are used, and all that is known of them besides their pixels."""

    records: NDArray[np.int64]
    labels: NDArray[np.float32]
    patients: NDArray[np.int64]
    test: NDArray[np.bool_]
    pseudonyms: tuple[bytes, ...]
    manifest: Manifest


def _facts(
    task: ImageTaskConfig, site: str, store: ImageStore, *, seed: int, key: bytes | None, maybe_empty: bool
) -> _Facts:
    usable, reasons = _usable(task, store)
    if not (usable.any() or maybe_empty):
        listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
        raise DataError(
            f"site '{site}' has no usable image ({listed}); check the task's classes and modalities"
        )
    kept = np.flatnonzero(usable)
    table = store.records.iloc[kept]
    ids = table["patient"].tolist()
    names = list(dict.fromkeys(ids))
    codes = {name: code for code, name in enumerate(names)}
    patients = np.array([codes[name] for name in ids], dtype=np.int64)
    # By patient, also where the image is the unit: no patient is on both sides.
    test = held_out(task, site, names, seed=seed, key=key)[patients]
    labels = table["label"].isin(task.positive).to_numpy(dtype=bool).astype(np.float32)
    manifest = Manifest(
        content_sha256=store.manifest["content_sha256"],
        reader=READER,
        records=len(kept),
        patients=len(names),
        positives=int(labels.sum()),
        quarantined=dict(reasons),
        warnings=check_parts(
            site, labels, test, units=f"{len(names)} usable patients", maybe_empty=maybe_empty
        ),
    )
    units = patients if task.unit == "patient" else np.arange(len(kept))
    return _Facts(kept, labels, units, test, tuple(map(bytes.fromhex, names)), manifest)


def _usable(task: ImageTaskConfig, store: ImageStore) -> tuple[NDArray[np.bool_], Counter[str]]:
    """Which records the task allows, and how many are left out for which reason."""
    table, reasons = store.records, Counter[str]()
    usable = np.ones(len(table), dtype=bool)

    def refuse(mask: NDArray[np.bool_], reason: str) -> None:
        count = int((mask & usable).sum())
        if count:
            reasons[reason] += count
        usable[mask] = False

    declared = [*task.positive, *task.negative]
    labels = table["label"].mask(table["label"] == "")
    refuse(blank_cells(labels, declared=declared), "label-blank")
    refuse(~labels.isin(declared).to_numpy(dtype=bool), "label-not-declared")
    refuse(~table["modality"].isin(task.modalities).to_numpy(dtype=bool), "modality-not-allowed")
    if task.images_per_patient is not None:
        # Which of a patient's images these are depends on that patient alone.
        nth = _nth(table["patient"].tolist(), usable)
        refuse(nth >= task.images_per_patient, "more-images-than-declared")
    return usable, reasons


def _nth(patients: list[str], usable: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each usable record, how many of the same patient's come before it."""
    seen: Counter[str] = Counter()
    numbers = np.zeros(len(patients), dtype=np.int64)
    for index in np.flatnonzero(usable):
        numbers[index] = seen[patients[index]]
        seen[patients[index]] += 1
    return numbers


def prepared(task: ImageTaskConfig, pixels: NDArray[np.uint16]) -> NDArray[np.float32]:
    """A record as the model reads it: (slices, image_size, image_size) of 0 to 1. It depends on these pixels alone.

    Args:
        pixels: (frames, rows, columns) or (frames, rows, columns, 3); colours become grey.
    """
    chosen = pixels[[int((index + 0.5) * len(pixels) / task.slices) for index in range(task.slices)]]
    grey = chosen.astype(np.float32) if chosen.ndim == 3 else chosen.astype(np.float32) @ LUMA
    grey /= WHITE
    return np.stack([squared(frame, task.image_size) for frame in grey])


def squared(frame: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """A frame resampled by area, so that its longer side is `size`, in the middle of a black square."""
    rows, columns = frame.shape
    height, width = (max(1, round(side * size / max(rows, columns))) for side in (rows, columns))
    small = _areas(rows, height) @ frame @ _areas(columns, width).T
    square = np.zeros((size, size), dtype=np.float32)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = small
    return square.clip(0, 1)


@lru_cache(maxsize=256)
def _areas(pixels: int, size: int) -> NDArray[np.float32]:
    """(size, pixels): how much each of `pixels` covers of each of `size` cells; rows add up to 1."""
    edges = np.arange(size + 1) * (pixels / size)
    low, high = np.arange(pixels), np.arange(pixels) + 1
    covered = np.minimum(edges[1:, None], high) - np.maximum(edges[:-1, None], low)
    return (covered.clip(0) * (size / pixels)).astype(np.float32)
