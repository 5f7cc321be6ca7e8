"""What the frozen part of a model makes of a site's records, kept in memory-mapped files between rounds and runs.

An entry is found by everything that its values depend on: the weights, what is done before them, how far they are
run, and the records themselves. Nothing else finds it, so that a wrong entry is never read. The files hold what was
computed from patients' records: they belong where the records are, and are as private.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmed.data.dataset import SiteDataset
from fedmed.data.split import fedmed_home
from fedmed.devices import CPU, in_words

log = logging.getLogger("fedmed.cache")

# The folder's name in a site's own.
ACTIVATIONS = "activations"
SUFFIX = ".activations"
_MAGIC = b"fedmed activations 1\n"
# Payloads begin at a multiple of it.
_PAGE = 4096
_DRAFT = ".part"
# Another process may still be writing to a younger one.
_STALE_SECONDS = 24 * 3600
HOME_BYTES = 20 * 10**9
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Pieces = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class ActivationCache:
    """Entries in a folder, the longest unused removed where they would take more than `max_bytes` together.

    Attributes:
        folder: private to its owner; made when it is first written to.
        max_bytes: of all entries; one that is larger by itself is computed and not kept.
    """

    folder: Path
    max_bytes: int

    def tensor(
        self,
        key: dict[str, Any],
        *,
        source: "Source",
        records: str,
        rows: int,
        dtype: torch.dtype,
        pieces: Pieces,
    ) -> Tensor:
        """(rows, …) of `dtype`: the entry, or what `pieces` compute, which is then kept.

        Where it cannot be kept (it is too large, the disk is full or cannot be written) it is computed in memory: the
        values are the same.

        Args:
            key: all that the values depend on besides the records, as JSON.
            source: which data the records are of, and its content: entries of an earlier content are removed.
            records: a digest of the records, in their order.
            pieces: yields the rows in order, some at a time; may be called more than once.
        """
        path = self.folder / (_digest(key, source, records) + SUFFIX)
        found = _read(path)
        if found is not None:
            return found
        try:
            self._write(path, source, rows=rows, dtype=dtype, pieces=pieces)
            found = _read(path)
        except _TooLarge as error:
            log.info("activations of %.1f GB are not kept: the cache holds %.1f", *error.args)
        except OSError as error:
            log.warning(
                "activations are computed anew in every process: the cache cannot be written (%s)",
                error.strerror,
            )
        if found is not None:
            return found
        return _computed(pieces, dtype)

    def entries(self) -> list[Path]:
        """The files of all entries, the longest unused first."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for path in self.folder.glob(f"*{SUFFIX}"):
                # Another process may have removed it.
                with contextlib.suppress(FileNotFoundError):
                    found.append((path.stat().st_mtime_ns, path))
        return [path for _, path in sorted(found)]

    def clear(self) -> int:
        """Remove every entry, also what was not written to its end, and return the bytes that they took."""
        return sum(map(_remove, (*self.entries(), *self._drafts())))

    def forget(self, source: "Source") -> None:
        """Remove what was computed of an earlier content of this data.

        A patient who was taken out of the data is taken out of what was computed from it.
        """
        for path in self.entries():
            about = _parse(path)
            if about is not None and about["data"] == source.data and about["content"] != source.content:
                _remove(path)
        for path in self._drafts():
            # A process that was killed has left it: nobody knows of what.
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    _remove(path)

    def _drafts(self) -> list[Path]:
        return list(self.folder.glob(f".*{_DRAFT}"))

    def _write(self, path: Path, source: "Source", *, rows: int, dtype: torch.dtype, pieces: Pieces) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.forget(source)
        descriptor, name = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=_DRAFT)
        try:
            with os.fdopen(descriptor, "wb") as file:
                about: dict[str, Any] = {}
                checksum, done = 0, 0
                for piece in pieces():
                    if not about:
                        shape = [rows, *piece.shape[1:]]
                        about = vars(source) | {"shape": shape, "dtype": _name(dtype)}
                        checksum = _checksum(about)
                        self._make_room(_size(about))
                        file.seek(_PAGE)
                    content = _bytes(saturated(piece, dtype))
                    checksum = zlib.crc32(content, checksum)
                    file.write(content)
                    done += len(piece)
                if done != rows:
                    raise ValueError(f"{done} rows of {rows} were computed")
                file.seek(0)
                file.write((_MAGIC + json.dumps(about | {"checksum": checksum}).encode()).ljust(_PAGE))
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise

    def _make_room(self, size: int) -> None:
        if size > self.max_bytes:
            raise _TooLarge(size / 1e9, self.max_bytes / 1e9)
        sizes = {}
        for path in self.entries():
            with contextlib.suppress(FileNotFoundError):
                sizes[path] = path.stat().st_size
        total = sum(sizes.values())
        for path in sizes:
            if total + size <= self.max_bytes:
                return
            total -= sizes[path]
            # Whoever has it mapped keeps it until it is done.
            _remove(path)


@dataclass(frozen=True)
class Source:
    """Which data records are of: digests of its name and of its content."""

    data: str
    content: str

    @classmethod
    def of(cls, *, data: str, content: str) -> "Source":
        """By any words for the data, and its manifest's content hash."""
        return cls(hashlib.sha256(data.encode()).hexdigest(), hashlib.sha256(content.encode()).hexdigest())


@dataclass(frozen=True)
class Asked:
    """What is asked of a cache for one site's records, or, without a cache, computed.

    Attributes:
        depends: what activations depend on besides the records and how far the model is run, as JSON.
        inputs: the records as the model reads them.
        where: the data's place.
        device: where it is computed; what comes of it is on the host.
    """

    cache: ActivationCache | None
    data: SiteDataset
    where: str | None
    depends: dict[str, Any]
    inputs: dict[str, Tensor]
    device: torch.device = CPU

    def features(self, pieces: Pieces) -> Tensor:
        """What the head reads, in full precision: it is small."""
        return self._tensor({"of": "features"}, torch.float32, pieces)

    def state(self, cut: int, pieces: Pieces, dtype: str) -> Tensor:
        """What enters block `cut`, as one of `DTYPES`."""
        return self._tensor({"of": "state", "cut": cut}, DTYPES[dtype], pieces)

    def forget_earlier(self) -> None:
        """Where nobody is left in the data, nothing is computed that would take the place of what was."""
        if self.cache is not None:
            self.cache.forget(self._source)

    @property
    def _source(self) -> Source:
        return Source.of(data=f"{self.data.site} {self.where}", content=self.data.manifest.content_sha256)

    def _tensor(self, of: dict[str, Any], dtype: torch.dtype, pieces: Pieces) -> Tensor:
        if self.cache is None:
            return _computed(pieces, dtype)
        versions = {name: version(name) for name in ("torch", "transformers")}
        return self.cache.tensor(
            self.depends | of | versions | {"dtype": _name(dtype), "device": in_words(self.device)},
            source=self._source,
            records=digest_of(self.inputs),
            rows=len(self.data.labels),
            dtype=dtype,
            pieces=pieces,
        )


def _computed(pieces: Pieces, dtype: torch.dtype) -> Tensor:
    return torch.cat([saturated(piece, dtype) for piece in pieces()])


class _TooLarge(Exception):
    pass


def at_home() -> ActivationCache:
    """That of simulated sites: one person plays them all."""
    return ActivationCache(fedmed_home() / ACTIVATIONS, HOME_BYTES)


def saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` as `dtype`, each by itself: one that is too large becomes the largest there is and not infinite.

    Were a wider type taken for all where one does not fit, one patient's record would change every other's values.
    """
    if dtype == torch.float16:
        largest = torch.finfo(dtype).max
        values = values.clamp(-largest, largest)
    return values.to(dtype)


def digest_of(tensors: dict[str, Tensor]) -> str:
    """Of the records as the model reads them: names, types, shapes and every byte."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _digest(key: dict[str, Any], source: Source, records: str) -> str:
    return hashlib.sha256(json.dumps([key, source.data, records], sort_keys=True).encode()).hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checksum(about: dict[str, Any]) -> int:
    """Of what an entry says of itself, which that of its values goes on from."""
    return zlib.crc32(
        json.dumps({name: value for name, value in about.items() if name != "checksum"}).encode()
    )


def _bytes(values: Tensor) -> memoryview:
    # NumPy has no bfloat16.
    whole = values.detach().cpu().contiguous()
    return whole.flatten().view(torch.uint8).numpy().data


def _parse(path: Path) -> dict[str, Any] | None:
    """What an entry says of itself; None where it says nothing, or its file has another size."""
    try:
        with path.open("rb") as file:
            head = file.read(_PAGE)
            size = os.fstat(file.fileno()).st_size
        about: dict[str, Any] = json.loads(head.removeprefix(_MAGIC).rstrip())
        whole = head.startswith(_MAGIC) and size == _PAGE + _size(about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return about if whole else None


def _size(about: dict[str, Any]) -> int:
    return int(np.prod(about["shape"], dtype=np.int64)) * getattr(torch, about["dtype"]).itemsize


def _read(path: Path) -> Tensor | None:
    about = _parse(path)
    if about is None:
        return None
    try:
        size = _size(about)
        mapped = (
            np.memmap(path, np.uint8, "c", offset=_PAGE, shape=(size,)) if size else np.zeros(0, np.uint8)
        )
        # Now is the time to be used: see `entries`.
        os.utime(path)
    except OSError:
        return None
    if zlib.crc32(mapped.data, _checksum(about)) != about["checksum"]:
        log.warning("%s is damaged: computed anew", path.name)
        return None
    return torch.from_numpy(mapped).view(getattr(torch, about["dtype"])).reshape(about["shape"])


def _remove(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        size = path.stat().st_size
        path.unlink()
        return size
    return 0
