"""Reads a site's records, whatever kind of task they belong to.

A kind has a module with the functions of `Reader`; they are looked up when they are called.
"""

from collections import Counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedmed.data import images, sounds, table
from fedmed.data.dataset import Manifest, SiteDataset
from fedmed.task import TaskConfig


class Reader(Protocol):
    """What a kind of task can do with its data; `task` is of the kind's own class."""

    def read_site(
        self, task: Any, site: str, *, seed: int, key: bytes | None = None, maybe_empty: bool = False
    ) -> SiteDataset: ...

    def check_site(self, task: Any, site: str, *, seed: int) -> Manifest: ...

    def version_of(self, task: Any, site: str) -> tuple[int, ...]: ...

    def sites_in(self, task: Any) -> Counter[str]: ...

    def made_up(self, task: Any, records: int) -> dict[str, Any]: ...


READERS: dict[str, Reader] = {"table": table, "image": images, "sound": sounds}


def read_site(
    task: TaskConfig, site: str, *, seed: int, key: bytes | None = None, maybe_empty: bool = False
) -> SiteDataset:
    """The records of one site.

    Args:
        seed: of a `split: shuffle` (public benchmarks); a `hash` split uses the site's own key.
        key: of a `split: hash`, where the site keeps its key in a folder of its own; None: that of `site_key`.
        maybe_empty: read a site without a usable record, or with none in one part, like any other. Where the reply is
            private it must not tell: a declaration that leaves one patient's records would ask for that patient.

    Raises:
        DataError: the data is absent, damaged or not as declared, or nothing usable is left to train or to test on.
    """
    return READERS[task.kind].read_site(task, site, seed=seed, key=key, maybe_empty=maybe_empty)


def check_site(task: TaskConfig, site: str, *, seed: int) -> Manifest:
    """What `read_site` would say of the data and refuse.

    Raises:
        DataError: as `read_site`.
    """
    return READERS[task.kind].check_site(task, site, seed=seed)


def version_of(task: TaskConfig, site: str) -> tuple[int, ...]:
    """What changes when a site's data is written or replaced.

    Raises:
        DataError: there is none.
    """
    return READERS[task.kind].version_of(task, site)


def sites_in(task: TaskConfig) -> Counter[str]:
    """Records by site, of all sites that the data names.

    Raises:
        DataError: there is no data.
    """
    return READERS[task.kind].sites_in(task)


def made_up(task: TaskConfig, records: int) -> SiteDataset:
    """Records of no patient, to time a step with."""
    draws = np.random.default_rng(0)
    nothing: NDArray[np.float32] = np.zeros((records, 0), dtype=np.float32)
    inputs: dict[str, Any] = {"features": nothing, "texts": []}
    return SiteDataset(
        site="made up",
        labels=draws.integers(0, 2, size=records).astype(np.float32),
        patients=np.arange(records),
        test=np.zeros(records, dtype=bool),
        manifest=Manifest(
            content_sha256="", reader="made up", records=records, patients=records, positives=0
        ),
        **inputs | READERS[task.kind].made_up(task, records),
    )
