"""Small folders of ingested images, as `fedmed site ingest` would leave them."""

from pathlib import Path
from typing import Any

import numpy as np

from fedmed.data.split import pseudonym
from fedmed.dicom.store import StoredImage, write_store

KEY = b"k" * 32
CLASSES = ("clear", "opacity")


def hospital(
    path: Path, *, patients: int = 40, most: int = 3, key: bytes = KEY, name: str = "p", seed: int = 0
) -> list[StoredImage]:
    """A hospital's images, written to a store: a bright spot in those of half of the patients."""
    made = images(patients=patients, most=most, key=key, name=name, seed=seed)
    write_store(path, images=made)
    return made


def images(*, patients: int, most: int, key: bytes, name: str, seed: int) -> list[StoredImage]:
    """1 to `most` images of each patient, of two shapes."""
    draws = np.random.default_rng(seed)
    made = []
    for patient in range(patients):
        sick = patient % 2
        for number in range(1 + patient % most):
            pixels = draws.integers(0, 20_000, size=(1, 40, 32 if number % 2 else 40), dtype=np.uint16)
            row, column = draws.integers(4, 24, size=2)
            pixels[0, row : row + 10, column : column + 8] += np.uint16(30_000 * sick)
            made.append(
                StoredImage(
                    pixels=pixels, patient=pseudonym(key, f"{name}-{patient}").hex(), label=CLASSES[sick],
                    modality="DX", manufacturer="Acme",
                )
            )  # fmt: skip
    return made


def settings(path: Path | str, *overrides: str) -> list[str]:
    """A private run of the small network on the images of two sites."""
    return [
        "task=dicom", "task.title=spots", f"task.path={path}", "task.positive=[opacity]", "task.negative=[clear]",
        "task.image_size=16", "task.declared_sizes={a: 60, b: 60}", "task.images_per_patient=3", "model=cnn",
        "adapter=full", "tracking=none", "rounds=2", "training.sample_rate=0.5", "training.steps_per_round=2",
        "privacy.epsilon=null", "privacy.noise_multiplier=2", "privacy.records_per_patient=3",
        "privacy.metrics=none", "federation.approval_timeout=0", *overrides,
    ]  # fmt: skip


def changed(image: StoredImage, **values: Any) -> StoredImage:
    """The image with other facts."""
    import dataclasses

    return dataclasses.replace(image, **values)
