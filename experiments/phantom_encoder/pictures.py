"""Made-up chest pictures with what a report would say of them: what an encoder is pretrained on.

Anatomy and pose are those of `fedmed.dicom.synthetic.phantoms`; the findings are of more kinds, sizes, places and
contrasts than the demo's, and every picture comes from a scanner of its own.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.data.images import squared
from fedmed.dicom.synthetic.phantoms import draw_patients, draw_poses, render
from fedmed.dicom.synthetic.scanners import Scanner

Floats = NDArray[np.floating[Any]]
Anatomy = dict[str, NDArray[Any]]

# Pixels a side.
SIDE = 64
# Cells a side of the map that says where findings are.
CELLS = 16
KINDS = ("opacity", "nodule", "cavity", "bulla", "effusion", "large heart")
# Spots that each kind may put into a patient; a cavity is a bright one with a dark one in its middle.
SPOTS = {"opacity": 3, "nodule": 2, "bulla": 1}
ANATOMY = (
    "body_width", "lung_x", "lung_width", "lung_height", "lung_depth", "heart_x", "heart_y", "heart_width",
    "heart_height", "heart", "rib_space", "rib_bend", "rib", "spine", "dome",
)  # fmt: skip
POSE = ("x", "y", "turn", "zoom", "breath")
# Rows of cells of the upper, middle and lower zone of a lung.
ZONES = ((1, 6), (6, 10), (10, 15))


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures of a patient each, and what is known of them. All float32.

    Attributes:
        images: (count, SIDE, SIDE) of 0 black to 1 white, as `fedmed.data.images.prepared` gives an ingested image.
        kinds: (count, len(KINDS)) 1 where the patient has a finding of the kind.
        measures: (count, measures) lengths, brightnesses and pose, and how much findings add and take in each zone.
        maps: (count, CELLS, CELLS) brightness that findings add, before the scanner.
    """

    images: Floats
    kinds: Floats
    measures: Floats
    maps: Floats


def draw(count: int, rng: np.random.Generator, *, pictures_per_scanner: int = 8) -> Pictures:
    """Draw patients, a picture of each."""
    well = draw_patients(rng, np.zeros(count, np.int64), 1.0)
    ill, kinds = _with_findings(rng, well)
    pose = draw_poses(rng, count)
    images = render(ill, pose, SIDE)
    images += rng.standard_normal(images.shape, np.float32) * pose["noise"][:, None, None]
    images = np.clip(images, 0, 1, out=images)
    maps = render(ill, pose, CELLS) - render(well, pose, CELLS)
    for start in range(0, count, pictures_per_scanner):
        part = slice(start, start + pictures_per_scanner)
        images[part] = _scanned(images[part], rng)
    measures = [ill[name].reshape(count, -1) for name in ANATOMY]
    measures += [pose[name][:, None] for name in POSE]
    measures.append(_zones(maps))
    return Pictures(
        images=images, kinds=kinds, measures=np.concatenate(measures, axis=1, dtype=np.float32), maps=maps
    )


def _with_findings(rng: np.random.Generator, well: Anatomy) -> tuple[Anatomy, Floats]:
    """The same patients, four in ten of them still well, and (patients, len(KINDS)) who has what."""
    count = len(well["body"])
    chance = np.array([0.4, 0.3, 0.2, 0.2, 0.2, 0.2])
    has = (rng.random((count, len(KINDS))) < chance) & (rng.random((count, 1)) < 0.7)
    present = dict(zip(KINDS, has.T, strict=True))
    spots: list[tuple[Floats, Floats, Floats, Floats]] = []
    for kind, most in SPOTS.items():
        number = rng.integers(1, most + 1, count)
        spots += [_spot(rng, well, kind, present[kind] & (nth < number)) for nth in range(most)]
    outer = _spot(rng, well, "cavity", present["cavity"])
    inner = (
        outer[0],
        outer[1],
        outer[2] * rng.uniform(0.5, 0.8, count),
        outer[3] * rng.uniform(-1.2, -0.8, count),
    )
    names = ("finding_x", "finding_y", "finding_radius", "finding")
    columns = zip(*spots, outer, inner, strict=True)
    ill = well | {n: np.stack(c, axis=1).astype(np.float32) for n, c in zip(names, columns, strict=True)}
    # Fluid stands at the foot of one lung and hides it.
    fluid = present["effusion"][:, None] & (np.arange(2) == rng.integers(0, 2, (count, 1)))
    ill["dome"] = np.where(fluid, well["dome"] - rng.uniform(0.1, 0.5, (count, 2)), well["dome"]).astype(
        np.float32
    )
    wider = rng.uniform(1.15, 1.5, count)
    ill["heart_width"] = (well["heart_width"] * np.where(present["large heart"], wider, 1)).astype(np.float32)
    return ill, has.astype(np.float32)


def _spot(
    rng: np.random.Generator, well: Anatomy, kind: str, there: NDArray[np.bool_]
) -> tuple[Floats, Floats, Floats, Floats]:
    """Where one spot of each patient is, its radius and its contrast: (patients,) each."""
    count = len(there)
    low, high = {
        "opacity": (0.10, 0.36),
        "nodule": (0.04, 0.11),
        "cavity": (0.10, 0.26),
        "bulla": (0.10, 0.30),
    }[kind]
    side = rng.integers(0, 2, count)
    angle, reach = rng.uniform(0, 2 * np.pi, count), 0.9 * np.sqrt(rng.random(count))
    rows = np.arange(count)
    x = (2 * side - 1) * well["lung_x"] + reach * np.cos(angle) * well["lung_width"][rows, side]
    y = well["lung_y"][rows, side] + reach * np.sin(angle) * well["lung_height"][rows, side]
    # From what noise hides to what none overlooks, evenly by ratio.
    contrast = np.exp(rng.uniform(np.log(0.05), np.log(0.6), count))
    if kind == "bulla":
        contrast = -0.4 * contrast
    return x, y, rng.uniform(low, high, count), np.where(there, contrast, 0)


def _zones(maps: Floats) -> Floats:
    """(count, 12): roots of what is added and of what is taken in the three zones of both halves."""
    halves = maps[:, :, : CELLS // 2], maps[:, :, CELLS // 2 :]
    sums = [
        np.maximum(sign * half[:, first:last], 0).sum(axis=(1, 2))
        for sign in (1, -1)
        for half in halves
        for first, last in ZONES
    ]
    return np.sqrt(np.stack(sums, axis=1))


def _scanned(images: Floats, rng: np.random.Generator) -> Floats:
    """What is read of pictures that one more scanner took: stored in its way, shown through its window."""
    pixels = round(SIDE * rng.choice([0.75, 1.0, 1.25, 1.5, 2.0]))
    low = rng.uniform(0, 0.15)
    scanner = Scanner(
        name="made-up", manufacturer="made-up", rows=pixels, columns=pixels,
        bits_stored=int(rng.choice([8, 10, 12, 14, 16])),
        photometric=str(rng.choice(["MONOCHROME1", "MONOCHROME2"])),
        levels=(low, rng.uniform(0.75, 1)), gain=rng.uniform(0.75, 1.25), offset=rng.uniform(-0.08, 0.08),
        noise=rng.uniform(0, 0.03), blur=rng.uniform(0, 0.01),
    )  # fmt: skip
    stored = scanner.scan(np.rint(images * 255).astype(np.uint8), shift=1.0, rng=rng)
    centre, width = scanner.window(scanner.bits_stored)
    shown = (stored.astype(np.float32) - np.float32(centre - 0.5)) / np.float32(width - 1) + np.float32(0.5)
    if scanner.photometric == "MONOCHROME1":
        shown = 1 - shown
    return np.stack([squared(frame, SIDE) for frame in shown])
