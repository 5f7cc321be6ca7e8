"""Slices of one series to volumes, by where they lie in the patient (PS3.3 C.7.6.2.1.1), never by instance number."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations

import numpy as np
from numpy.typing import NDArray

from fedmed.dicom.reasons import Reason

ORIENTATION_TOLERANCE = 1e-3
"""Difference of direction cosines, about 0.06 degrees, up to which slices are parallel."""
SPACING_TOLERANCE = 0.01
"""Relative difference of pixel spacings up to which slices have the same grid."""
GAP_TOLERANCE = 0.1
"""Difference of a distance between slices from the usual one, as a part of that one, beyond which it is irregular."""
SAME_PLACE = 0.01
"""Distance in mm up to which two slices lie at the same place."""
TILT_TOLERANCE = 1.0
"""Angle in degrees between the stack and the slices' normal beyond which the stack is sheared."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One slice or frame. `index` is the caller's.

    `position`: centre of the first pixel in mm, patient coordinates, (3,); `orientation`: direction cosines of a row
    and a column, (6,); `spacing`: mm between rows and between columns. None where the file has none that is usable.
    `acquisition`: what may tell slices at one place apart, see `dicom_slices`; None for what a file does not say.
    """

    index: int
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    rows: int
    columns: int
    spacing: tuple[float, float] | None
    acquisition: tuple[float | None, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Slices of one grid in order along the normal. `indices`: the slices' own, (slices,).

    `slice_spacing`: median distance in mm between neighbours along the normal, None for a single slice.
    `warnings`: sentences with counts and sizes only.
    """

    indices: tuple[int, ...]
    slice_spacing: float | None
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """What became of a series: every slice is in exactly one volume or among `leftovers`, (index, reason)."""

    volumes: tuple[Volume, ...]
    leftovers: tuple[tuple[int, Reason], ...]
    warnings: tuple[str, ...]


def assemble(slices: Iterable[Slice]) -> Assembly:
    """The volumes of one series.

    Slices go together that are parallel and have one grid; slices at one place are told apart by acquisition where
    that gives stacks of the same places, else the first (by `index`) stays. The result does not depend on the order
    of `slices`; volumes are ordered by their smallest index. Every index must occur once.
    """
    ordered = sorted(slices, key=lambda one: one.index)
    usable = [one for one in ordered if _usable(one)]
    leftovers = [(one.index, Reason.GEOMETRY_MISSING) for one in ordered if not _usable(one)]
    groups = _grids(usable)
    volumes: list[Volume] = []
    for group in groups:
        stacks, repeated = _separate(group)
        leftovers += [(one.index, Reason.SLICE_REPEATED) for one in repeated]
        volumes += [_volume(stack) for stack in stacks]
    volumes.sort(key=lambda volume: min(volume.indices))
    return Assembly(
        volumes=tuple(volumes),
        leftovers=tuple(sorted(leftovers)),
        warnings=_series_warnings(groups, leftovers),
    )


def _usable(one: Slice) -> bool:
    if one.position is None or one.orientation is None or one.spacing is None:
        return False
    if len(one.position) != 3 or len(one.orientation) != 6:
        return False
    if not all(math.isfinite(value) for value in (*one.position, *one.orientation, *one.spacing)):
        return False
    row, column = np.asarray(one.orientation).reshape(2, 3)
    # Unit vectors at a right angle (C.7.6.2.1.1); 1% for the digits that files leave out.
    lengths = abs(np.linalg.norm(row) - 1) < 0.01 and abs(np.linalg.norm(column) - 1) < 0.01
    return bool(lengths and abs(row @ column) < 0.01 and min(one.spacing) > 0)


def _grids(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Groups of parallel slices of one grid: each joins the first group whose first slice it matches."""
    groups: list[list[Slice]] = []
    for one in slices:
        home = next((group for group in groups if _same_grid(group[0], one)), None)
        if home is None:
            groups.append([one])
        else:
            home.append(one)
    return groups


def _same_grid(one: Slice, other: Slice) -> bool:
    assert one.orientation is not None
    assert other.orientation is not None
    assert one.spacing is not None
    assert other.spacing is not None
    return (
        (one.rows, one.columns) == (other.rows, other.columns)
        and _close(one.orientation, other.orientation, ORIENTATION_TOLERANCE)
        and all(abs(a - b) <= SPACING_TOLERANCE * a for a, b in zip(one.spacing, other.spacing, strict=True))
    )


def _close(one: Sequence[float], other: Sequence[float], tolerance: float) -> bool:
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) <= tolerance


def _positions(stack: Sequence[Slice]) -> NDArray[np.float64]:
    return np.asarray([one.position for one in stack], np.float64)


def _normal(stack: Sequence[Slice]) -> NDArray[np.float64]:
    row, column = np.asarray(stack[0].orientation, np.float64).reshape(2, 3)
    normal = np.cross(row, column)
    return normal / np.linalg.norm(normal)


def _separate(group: Sequence[Slice]) -> tuple[list[list[Slice]], list[Slice]]:
    """Stacks that hold each place once, and the slices left over."""
    places = _places(group)
    most = max(Counter(places).values())
    if most == 1:
        return [list(group)], []
    width = min(len(one.acquisition) for one in group)
    # Few parts of the key before many: fewer assumptions about what the scanner meant.
    for parts in chain.from_iterable(combinations(range(width), count) for count in range(1, width + 1)):
        stacks = _stacks(group, places, parts)
        if stacks is not None:
            return stacks, []
    kept: dict[int, Slice] = {}
    repeated = []
    for one, place in zip(group, places, strict=True):
        if kept.setdefault(place, one) is not one:
            repeated.append(one)
    return [list(kept.values())], repeated


def _stacks(
    group: Sequence[Slice], places: Sequence[int], parts: tuple[int, ...]
) -> list[list[Slice]] | None:
    """The group split by these parts of the acquisition key; None unless every stack holds every place once."""
    stacks: dict[tuple[float | None, ...], list[tuple[int, Slice]]] = defaultdict(list)
    for one, place in zip(group, places, strict=True):
        stacks[tuple(one.acquisition[part] for part in parts)].append((place, one))
    every = sorted(set(places))
    even = len(stacks) > 1 and all(sorted(place for place, _ in stack) == every for stack in stacks.values())
    return [[one for _, one in stack] for stack in stacks.values()] if even else None


def _places(group: Sequence[Slice]) -> list[int]:
    """The number of each slice's place along the normal: slices nearer than `SAME_PLACE` share one."""
    along = _positions(group) @ _normal(group)
    order = np.argsort(along, kind="stable")
    steps = np.diff(along[order]) > SAME_PLACE
    numbers = np.empty(len(group), np.int64)
    numbers[order] = np.concatenate([[0], np.cumsum(steps)])
    return numbers.tolist()


def _volume(stack: Sequence[Slice]) -> Volume:
    positions, normal = _positions(stack), _normal(stack)
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    indices = tuple(stack[place].index for place in order)
    if len(stack) == 1:
        return Volume(indices=indices, slice_spacing=None, warnings=())
    distances = np.diff(along[order])
    spacing = float(np.median(distances))
    warnings = _gap_warnings(distances, spacing) + _shear_warnings(positions[order], normal)
    return Volume(indices=indices, slice_spacing=spacing, warnings=tuple(warnings))


def _gap_warnings(distances: NDArray[np.float64], spacing: float) -> list[str]:
    steps = distances / spacing
    irregular = np.abs(steps - 1) > GAP_TOLERANCE
    if not irregular.any():
        return []
    # A distance of a whole number of steps is what missing slices leave.
    whole = irregular & (steps > 1.5) & (np.abs(steps - np.rint(steps)) <= GAP_TOLERANCE)
    warnings = []
    if whole.any():
        missing = int(np.rint(steps[whole]).sum() - whole.sum())
        warnings.append(
            f"{_counted(missing, 'slice')} missing in {_counted(int(whole.sum()), 'gap')} of a volume of "
            f"{len(distances) + 1}"
        )
    other = int((irregular & ~whole).sum())
    if other:
        warnings.append(f"{other} of {len(distances)} distances between slices irregular")
    return warnings


def _shear_warnings(positions: NDArray[np.float64], normal: NDArray[np.float64]) -> list[str]:
    """Gantry tilt: the stack leans, so that its slices do not make a box."""
    direction = positions[-1] - positions[0]
    length = float(np.linalg.norm(direction))
    angle = math.degrees(math.acos(min(1.0, abs(float(direction @ normal)) / length))) if length else 0.0
    return (
        [f"stack of {len(positions)} slices sheared by {angle:.0f} degrees"] if angle > TILT_TOLERANCE else []
    )


def _series_warnings(
    groups: Sequence[Sequence[Slice]], leftovers: Sequence[tuple[int, Reason]]
) -> tuple[str, ...]:
    warnings = []
    orientations: list[tuple[float, ...]] = []
    for group in groups:
        orientation = group[0].orientation
        assert orientation is not None
        if not any(_close(orientation, known, ORIENTATION_TOLERANCE) for known in orientations):
            orientations.append(orientation)
    if len(orientations) > 1:
        warnings.append(f"{len(orientations)} orientations in one series")
    if len(groups) > len(orientations):
        warnings.append(f"{len(groups)} grids of rows, columns and spacing in one series")
    for reason, count in sorted(Counter(reason for _, reason in leftovers).items()):
        warnings.append(f"{_counted(count, 'slice')} left out: {reason}")
    return tuple(warnings)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
