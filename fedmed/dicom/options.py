"""What a person chooses for an ingestion. No pydicom here: a wrong choice is reported before anything is loaded."""

import math
from dataclasses import dataclass
from typing import Any

from fedmed.errors import require

MODALITIES = ("CR", "DX", "CT", "MR", "US", "MG")
BURNED_IN = ("refuse", "mask", "keep")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of one ingestion.

    Attributes:
        size: the longest side that a stored image has in pixels; larger ones are resampled; 0: as they are.
        modalities: those that are read; files of others are quarantined.
        window: centre and width in Hounsfield units for all CT images; None: each file's own.
        deidentify: also write the files without what identifies a person (PS3.15 Annex E).
        modified_dates: with `deidentify`: shift dates by a secret number of days a patient instead of removing them.
        keep_uids: with `deidentify`: keep UIDs, which lead back to the original files.
        burned_in: what becomes of images in whose pixels text may stand.
        regions: where devices of this site write text, by hand: the fields of a `burned_in.KnownRegion`, each.
        workers: processes that decode; 0: one a core.
        seconds: a worker's longest time on one file.
        memory_mb: the address space of a worker, in MiB.
    """

    size: int = 256
    modalities: tuple[str, ...] = MODALITIES
    window: tuple[float, float] | None = None
    deidentify: bool = False
    modified_dates: bool = False
    keep_uids: bool = False
    burned_in: str = "refuse"
    regions: tuple[dict[str, Any], ...] = ()
    workers: int = 0
    seconds: float = 60.0
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        require(0 <= self.size <= 8192, "--size", self.size, "0 (as they are) to 8192 pixels")
        require(
            bool(self.modalities) and set(self.modalities) <= set(MODALITIES),
            "--modality",
            ",".join(self.modalities) or "''",
            f"one or more of {', '.join(MODALITIES)}",
        )
        if self.window is not None:
            centre, width = self.window
            require(
                math.isfinite(centre) and 0 < width < math.inf,
                "--window",
                f"{centre:g},{width:g}",
                "CENTRE,WIDTH with WIDTH > 0",
            )
        require(self.burned_in in BURNED_IN, "--burned-in", self.burned_in, " | ".join(BURNED_IN))
        require(
            self.burned_in != "keep" or not self.deidentify,
            "--burned-in",
            self.burned_in,
            "refuse or mask with --deidentify: a name in the pixels is a name",
        )
        require(
            self.burned_in != "keep" or not self.regions,
            "--burned-in",
            self.burned_in,
            "refuse or mask with --regions: they say where text stands",
        )
        for name in ("modified_dates", "keep_uids"):
            option = f"--{name.replace('_', '-')}"
            require(self.deidentify or not getattr(self, name), option, "true", "only with --deidentify")
        require(0 <= self.workers <= 256, "--workers", self.workers, "0 (one a core) to 256")
        require(0 < self.seconds <= 3600, "--seconds", self.seconds, "> 0, at most 3600")
        require(200 <= self.memory_mb <= 65_536, "--memory", self.memory_mb, "200 to 65,536 MiB")
