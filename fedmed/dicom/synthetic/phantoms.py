"""Chest-like phantoms: body, lungs, heart, ribs, and in half of them something that does not belong there.

Made pictures for demos and tests, in numpy alone. They are no model of a radiograph; what they share with one
is what matters to training on it: a patient's images have the patient's anatomy in common, the finding is faint
beside what differs between patients, and a finding lies where the lung is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import require

# float32 wherever there is a picture.
Floats = NDArray[np.floating[Any]]
# Images rendered at once: their arrays stay within a few MB.
BATCH = 64
# How much brighter a finding of difficulty 1 is than the lung around it, from the faintest to the clearest.
CONTRAST = (0.10, 0.36)
RIBS = 8


@dataclass(frozen=True, kw_only=True)
class Phantoms:
    """Phantoms of several images a patient."""

    # (images, size, size) uint8: 0 black (air) … 255 white (bone).
    images: NDArray[np.uint8]
    # (images,) int64: 1 with a finding, else 0; one and the same for all images of a patient.
    labels: NDArray[np.int64]
    # (images,) int64: 0 … patients - 1, ascending.
    patients: NDArray[np.int64]


def make_phantoms(
    labels: NDArray[np.int64],
    images_per_patient: NDArray[np.int64],
    *,
    size: int = 64,
    difficulty: float = 1.0,
    seed: int = 0,
) -> Phantoms:
    """Draw patients and the images of each.

    A patient's images share anatomy and finding, and differ in pose, breath, exposure and noise. Equal arguments
    give equal images.

    Args:
        labels: (patients,) 1 with a finding, else 0.
        images_per_patient: (patients,) at least 1 each.
        size: rows and columns in pixels.
        difficulty: divides the contrast of every finding; 0.5 is easy, 1 about what a small CNN tells apart with an
            AUC of 0.95 after 1,500 images, 3 hopeless.
        seed: of everything random.

    Raises:
        ConfigError: a size under 16 or over 1024, a difficulty that is not positive.
    """
    require(16 <= size <= 1024, "size", size, "16 to 1024")
    require(difficulty > 0, "difficulty", difficulty, "> 0")
    rng = np.random.default_rng([seed, 1])
    anatomy = draw_patients(rng, labels, difficulty)
    owner = np.repeat(np.arange(len(labels)), images_per_patient)
    pose = draw_poses(rng, len(owner))
    images = np.empty((len(owner), size, size), np.uint8)
    for part in _parts(len(owner)):
        views = {name: values[owner[part]] for name, values in anatomy.items()}
        drawn = render(views, {name: values[part] for name, values in pose.items()}, size)
        drawn += rng.standard_normal(drawn.shape, np.float32) * pose["noise"][part, None, None]
        images[part] = np.rint(np.clip(drawn, 0, 1) * 255)
    return Phantoms(images=images, labels=labels[owner], patients=owner)


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, min(start + BATCH, count)) for start in range(0, count, BATCH))


def draw_patients(
    rng: np.random.Generator, labels: NDArray[np.int64], difficulty: float
) -> dict[str, NDArray]:
    """What belongs to a patient, by name: (patients,) each, or a column a lung, a vessel, a finding.

    Lengths are in half widths of the image; x to the right, y down. What adds brightness is in parts of the range from
    black to white. A finding that is not there has no contrast.
    """
    count = len(labels)

    def normal(mean: float, deviation: float, *shape: int) -> Floats:
        return rng.normal(mean, deviation, (count, *shape)).astype(np.float32)

    def uniform(low: float, high: float, *shape: int) -> Floats:
        return rng.uniform(low, high, (count, *shape)).astype(np.float32)

    anatomy = {
        "body_width": uniform(0.84, 1.0), "body": uniform(0.50, 0.62),
        "lung_x": uniform(0.38, 0.46), "lung_y": normal(-0.08, 0.04, 2),
        "lung_width": uniform(0.25, 0.33, 2), "lung_height": uniform(0.60, 0.74, 2),
        "lung_depth": uniform(0.34, 0.44), "dome": uniform(0.38, 0.56, 2),
        "heart_x": normal(0.14, 0.04), "heart_y": normal(0.32, 0.05),
        "heart_width": uniform(0.24, 0.36), "heart_height": uniform(0.24, 0.34), "heart": uniform(0.22, 0.30),
        "rib_space": uniform(0.20, 0.26), "rib_phase": uniform(0, 1), "rib_bend": uniform(0.25, 0.5),
        "rib": uniform(0.03, 0.08), "spine": uniform(0.08, 0.14),
        # Vessels around the hilum: what a finding can be mistaken for.
        "vessel_x": normal(0.0, 0.10, 6), "vessel_y": normal(0.0, 0.16, 6),
        "vessel_radius": uniform(0.03, 0.08, 6), "vessel": uniform(0.02, 0.10, 6),
    }  # fmt: skip
    # One to three findings, in one lung or both; the rest of the three have no contrast.
    present = (np.arange(3) < rng.integers(1, 4, (count, 1))) & (labels[:, None] == 1)
    side = rng.choice(np.array([-1, 1], np.float32), (count, 3))
    angle, reach = uniform(0, 2 * np.pi, 3), np.sqrt(uniform(0, 0.5, 3))
    anatomy |= {
        "finding_x": side * anatomy["lung_x"][:, None] + reach * np.cos(angle) * 0.26,
        "finding_y": 0.08 + reach * np.sin(angle) * 0.5,
        "finding_radius": uniform(0.10, 0.30, 3),
        "finding": np.where(present, uniform(*CONTRAST, 3), 0).astype(np.float32) / np.float32(difficulty),
    }
    return anatomy


def draw_poses(rng: np.random.Generator, count: int) -> dict[str, Floats]:
    """What differs between two images of one patient, by name: (count,) each."""
    drawn = {
        "x": rng.normal(0, 0.03, count), "y": rng.normal(0, 0.04, count), "turn": rng.normal(0, 0.035, count),
        "zoom": rng.normal(1, 0.03, count), "breath": rng.normal(0, 0.04, count),
        "gain": rng.normal(1, 0.05, count), "offset": rng.normal(0, 0.02, count),
        "noise": rng.uniform(0.02, 0.04, count),
    }  # fmt: skip
    return {name: values.astype(np.float32) for name, values in drawn.items()}


def _ellipse(x: Floats, y: Floats, centre: tuple, radii: tuple, soft: float) -> Floats:
    """(images, size, size): 1 inside, 0 outside, and a slope of relative width `soft` between the two."""
    distance = np.square((x - _wide(centre[0])) / _wide(radii[0]))
    distance += np.square((y - _wide(centre[1])) / _wide(radii[1]))
    edge = np.clip((1 + soft - distance) / (2 * soft), 0, 1, out=distance)
    return edge * edge * (3 - 2 * edge)


def _wide(values: Floats | float) -> Floats | float:
    return values[:, None, None] if isinstance(values, np.ndarray) else values


def render(anatomy: dict[str, NDArray], pose: dict[str, Floats], size: int) -> Floats:
    """(images, size, size), about 0 to 1, without noise: a patient of `draw_patients` and a pose for each image."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    across, down = line[None, None, :] - _wide(pose["x"]), line[None, :, None] - _wide(pose["y"])
    cosine, sine = np.cos(pose["turn"]) / pose["zoom"], np.sin(pose["turn"]) / pose["zoom"]
    x = _wide(cosine) * across + _wide(sine) * down
    y = _wide(cosine) * down - _wide(sine) * across
    body = _ellipse(x, y, (0.0, 0.15), (anatomy["body_width"], 1.45), 0.06)
    image = body * _wide(anatomy["body"])
    lungs = _lungs(anatomy, pose, x, y)
    image -= lungs * _wide(anatomy["lung_depth"])
    image += _ribs(anatomy, x, y) * body
    image += np.clip(1 - np.abs(x) / 0.11, 0, 1) * body * _wide(anatomy["spine"])
    heart = (anatomy["heart_x"], anatomy["heart_y"]), (anatomy["heart_width"], anatomy["heart_height"])
    image += _ellipse(x, y, *heart, 0.15) * lungs * _wide(anatomy["heart"])
    for index in range(anatomy["vessel"].shape[1]):
        side = 0.26 if index % 2 else -0.26
        centre = anatomy["vessel_x"][:, index] + np.float32(side), anatomy["vessel_y"][:, index]
        radius = anatomy["vessel_radius"][:, index]
        image += _blob(x, y, centre, radius) * _wide(anatomy["vessel"][:, index])
    for index in range(anatomy["finding"].shape[1]):
        centre = anatomy["finding_x"][:, index], anatomy["finding_y"][:, index]
        spot = _blob(x, y, centre, anatomy["finding_radius"][:, index])
        # It fills lung; beside the lung it would be no finding.
        image += spot * lungs * _wide(anatomy["finding"][:, index])
    return image * _wide(pose["gain"]) + _wide(pose["offset"])


def _lungs(anatomy: dict[str, NDArray], pose: dict[str, Floats], x: Floats, y: Floats) -> Floats:
    """Two ellipses, cut off below by the dome of the diaphragm, which breath moves."""
    lungs = np.zeros_like(x)
    for index, side in enumerate((-1, 1)):
        centre = side * anatomy["lung_x"], anatomy["lung_y"][:, index]
        lung = _ellipse(
            x, y, centre, (anatomy["lung_width"][:, index], anatomy["lung_height"][:, index]), 0.12
        )
        dome = _wide(anatomy["dome"][:, index] + pose["breath"])
        floor = dome + 1.6 * np.square(x - _wide(centre[0]))
        lung *= np.clip((floor - y) / 0.08 + 0.5, 0, 1)
        lungs += lung
    return lungs


def _ribs(anatomy: dict[str, NDArray], x: Floats, y: Floats) -> Floats:
    """Bands that bend down towards the sides, a triangle wave of the height."""
    height = (y - _wide(anatomy["rib_bend"]) * np.square(x)) / _wide(anatomy["rib_space"])
    wave = np.abs((height + _wide(anatomy["rib_phase"])) % 1 - 0.5) * 2
    return np.clip((wave - 0.6) / 0.2, 0, 1) * _wide(anatomy["rib"])


def _blob(x: Floats, y: Floats, centre: tuple, radius: Floats) -> Floats:
    """Bright in the middle, nothing beyond `radius`."""
    distance = np.square(x - _wide(centre[0])) + np.square(y - _wide(centre[1]))
    distance /= -_wide(np.square(radius))
    distance += 1
    return np.square(np.maximum(distance, 0, out=distance))
