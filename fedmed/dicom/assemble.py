"""From what was read of the single files to records: people, duplicates, volumes, labels."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.dicom.image import geometry
from fedmed.dicom.image.pixels import Window, to_display
from fedmed.dicom.labels import Labels
from fedmed.dicom.reasons import Reason
from fedmed.dicom.store import StoredImage

Facts = dict[str, Any]
# A file, and which of its frames.
Plane = tuple[str, int]


@dataclass(kw_only=True)
class PendingImage:
    """A record whose pixels are still in the workers' files.

    Attributes:
        facts: of its files.
        planes: its frames in order; of one file all of them, of a volume one from each slice.
        slice_spacing: millimetres between the slices of a volume.
    """

    work: Path
    facts: dict[str, Facts]
    planes: list[Plane]
    slice_spacing: float | None = None
    label: str = ""

    def load(self) -> StoredImage:
        """The record with its pixels, as they are shown."""
        first = self.facts[self.planes[0][0]]
        window = self._window()
        frames = [self._frame(file, index, window) for file, index in self.planes]
        rows, columns = first["spacing"]
        return StoredImage(
            pixels=np.stack(frames),
            patient=first["patient"],
            label=self.label,
            modality=first["modality"],
            manufacturer=first["manufacturer"],
            year="" if first["year"] is None else str(first["year"]),
            row_spacing=rows,
            column_spacing=columns,
            slice_spacing=self.slice_spacing,
        )

    def _window(self) -> Window | None:
        """One window for the whole volume, or tissue would change its grey from slice to slice.

        The middle slice's own; of slices without one, the range over all of them.
        """
        known = [self.facts[file]["window"] for file, _ in self.planes if self.facts[file].get("window")]
        if not known:
            return None
        windows = [Window(**window) for window in known]
        if any(window.function == "range" for window in windows):
            low = min(window.center - window.width / 2 for window in windows)
            high = max(window.center + window.width / 2 for window in windows)
            return Window.of_range(low, high)
        return windows[len(windows) // 2]

    def _frame(self, file: str, index: int, window: Window | None) -> NDArray[np.uint16]:
        facts = self.facts[file]
        stored = np.memmap(
            self.work / facts["part"], facts["type"], "r", offset=facts["offset"], shape=tuple(facts["shape"])
        )[index]
        if stored.dtype == np.uint16:
            return np.asarray(stored)
        assert window is not None
        return to_display(np.asarray(stored), window, inverted=facts["inverted"])


@dataclass(kw_only=True)
class Assembled:
    """What an export comes to.

    Attributes:
        quarantine: file -> why it is in no record.
        unmatched_rows: lines of labels.csv that no record has.
        unmatched_images: the first file of each record that no row of labels.csv speaks of.
        told: of each series what its geometry is short of.
    """

    images: list[PendingImage]
    quarantine: dict[str, Reason]
    unmatched_rows: list[int] = field(default_factory=list)
    unmatched_images: list[str] = field(default_factory=list)
    told: list[list[str]] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        """What series are short of, each kind once, in the words of the first one and with the number of the others."""
        kinds: dict[str, list[str]] = defaultdict(list)
        for texts in self.told:
            # Of one kind are those that differ in numbers only: `1 slice …`, `2 slices …`.
            for kind, text in {re.sub(r"\d+|s\b", "", text): text for text in reversed(texts)}.items():
                kinds[kind].append(text)
        return sorted(
            text if not others else f"{text}; the like in {len(others)} other series"
            for text, *others in kinds.values()
        )


def assemble(outcomes: dict[str, Facts], labels: Labels | None, *, work: Path) -> Assembled:
    """Records out of the files' outcomes, in order of the files' names. Every file is in a record or in quarantine."""
    quarantine = {file: Reason(found["reason"]) for file, found in outcomes.items() if "reason" in found}
    facts = {file: found for file, found in outcomes.items() if "reason" not in found}
    for refuse in (_conflicts, _duplicates):
        refused = refuse(facts)
        quarantine |= refused
        facts = {file: found for file, found in facts.items() if file not in refused}
    made = Assembled(images=[], quarantine=quarantine)
    for files in _series(facts):
        _add(made, {file: facts[file] for file in files}, work)
    if labels is not None:
        _label(made, labels)
    return made


def _series(facts: dict[str, Facts]) -> list[list[str]]:
    """Files that make volumes together: a patient's single slices of one series; every other file is by itself."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for file, found in facts.items():
        single = len(found.get("slices", ())) == 1
        groups[found["patient"], found["series"] if single else found["instance"]].append(file)
    return list(groups.values())


def _add(made: Assembled, facts: dict[str, Facts], work: Path) -> None:
    """Add the records of one group of files."""
    planes = [(file, index) for file, found in facts.items() for index in range(found["shape"][0])]
    slices = [one for found in facts.values() for one in found.get("slices", ())]
    alone = len(slices) < 2 or (len(facts) == 1 and all(one["position"] is None for one in slices))
    if alone:
        # An image, or a clip in the order of its file.
        made.images.append(PendingImage(work=work, facts=facts, planes=planes))
        return
    found = geometry.assemble(
        geometry.Slice(**_tuples(one) | {"index": number}) for number, one in enumerate(slices)
    )
    made.told.append([*found.warnings, *(text for volume in found.volumes for text in volume.warnings)])
    for volume in found.volumes:
        chosen = [planes[index] for index in volume.indices]
        used = {file: facts[file] for file, _ in chosen}
        made.images.append(
            PendingImage(work=work, facts=used, planes=chosen, slice_spacing=volume.slice_spacing)
        )
    kept = {planes[index][0] for volume in found.volumes for index in volume.indices}
    for index, reason in found.leftovers:
        if planes[index][0] not in kept:
            made.quarantine[planes[index][0]] = reason


def _tuples(values: Facts) -> Facts:
    """As JSON has lists where a `Slice` has tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _conflicts(facts: dict[str, Facts]) -> dict[str, Reason]:
    """Files of a patient id under which several birth dates stand: nobody knows how many people these are."""
    births: dict[str, set[str]] = defaultdict(set)
    for found in facts.values():
        if found["birth"]:
            births[found["patient"]].add(found["birth"])
    return {
        file: Reason.PATIENT_ID_CONFLICT for file, found in facts.items() if len(births[found["patient"]]) > 1
    }


def _duplicates(facts: dict[str, Facts]) -> dict[str, Reason]:
    seen: set[str] = set()
    repeated = {}
    for file, found in facts.items():
        if found["instance"] in seen:
            repeated[file] = Reason.DUPLICATE
        seen.add(found["instance"])
    return repeated


def _label(made: Assembled, labels: Labels) -> None:
    """Give each record its class; a volume whose slices have different ones goes into quarantine."""
    used: set[str] = set()
    kept = []
    for image in made.images:
        hashes = {found[labels.kind] for found in image.facts.values()} & labels.classes.keys()
        used |= hashes
        found = {labels.classes[name] for name in hashes}
        if len(found) > 1:
            made.quarantine |= {file: Reason.LABEL_CONFLICT for file in image.facts}
            continue
        image.label = found.pop() if found else ""
        if not hashes:
            made.unmatched_images.append(next(iter(image.facts)))
        kept.append(image)
    made.images = kept
    made.unmatched_rows = sorted(line for name, line in labels.lines.items() if name not in used)
