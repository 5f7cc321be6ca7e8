"""The checked replies of a round, each in a file until the round is over: at most one is in memory.

The files outlive a killed process, so that nobody is asked again who had answered.
"""

import contextlib
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmed.atomic import write_parts
from strategies.base import Arrays, Update, blocks
from strategies.tensors import TensorFile, bytes_of, tensor_parts

Deltas = dict[str, Mapping[str, NDArray[np.float32]]]


class Spool:
    """The updates of one round, by site.

    Args:
        path: a folder for this round's files; None: updates stay in memory.
        asked: digest of what the round asks for. Files that answer something else are not used.
        sites: whose answers may be found in `path`.
    """

    def __init__(self, path: Path | None, asked: str, sites: Sequence[str]) -> None:
        self._path, self._asked = path, asked
        # A site's name may hold anything, a file's may not; a tracker leaves out those that begin with a dot.
        self._places = {site: index for index, site in enumerate(sorted(sites))}
        self._deltas: Deltas = {}
        if path is not None:
            self._deltas = {site: file for site in sites if (file := self._found(site)) is not None}

    @property
    def sites(self) -> list[str]:
        """Whose updates are here, in the order of their names."""
        return sorted(self._deltas)

    def add(self, site: str, delta: Arrays) -> None:
        """Keep a checked update."""
        if self._path is None:
            self._deltas[site] = delta
            return
        self._path.mkdir(parents=True, exist_ok=True)
        metadata = {"asked": self._asked, "site": site, "checksum": checksum(delta)}
        # Not made to last: after a power failure the site is asked again, and repeats itself.
        write_parts(self._file(site), tensor_parts(delta, metadata), lasting=False)
        self._deltas[site] = TensorFile(self._file(site))

    def updates(self, weights: Mapping[str, float]) -> dict[str, Update]:
        """The updates with their sites' weights."""
        return {site: Update(self._deltas[site], weights[site]) for site in self.sites}

    def clear(self) -> None:
        """Remove the files: the round is over."""
        self._deltas = {}
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)

    def _file(self, site: str) -> Path:
        assert self._path is not None
        return self._path / f".{self._places[site]}.safetensors"

    def _found(self, site: str) -> TensorFile | None:
        """The update that an earlier process kept, if it is whole and answers the same."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            file = TensorFile(self._file(site))
            same = (file.metadata["asked"], file.metadata["site"]) == (self._asked, site)
            if same and file.metadata["checksum"] == checksum(file):
                return file
        return None


def checksum(delta: Mapping[str, NDArray[np.float32]]) -> str:
    """Of names and bytes, against what a power failure leaves of a file."""
    found = 0
    for name in delta:
        flat = delta[name].reshape(-1)
        found = zlib.crc32(name.encode(), found)
        for block in blocks(flat.size):
            found = zlib.crc32(bytes_of(flat[block]), found)
    return f"{found:08x}"
