"""A pulled model as one file, for machines without internet: a plain tar, its pin first, then the files by name.

It is read by fewer rules than a tar has: just the members that the pin names, in that order, as regular files, with
zeros between them. Whatever else stands in a file is no reason to look further.
"""

import contextlib
import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from fedmed.errors import ModelError
from fedmed.models.pins import (
    Pin,
    PinnedFile,
    Progress,
    check_replaces,
    differences,
    drafting,
    find,
    install,
)
from fedmed.schema import to_dict

MANIFEST = "pin.json"
_BLOCK = 512
_LARGEST_MANIFEST = 1 << 16
_CHUNK = 1 << 20


def export(pin: Pin, path: Path, *, force: bool = False, progress: Progress | None = None) -> None:
    """Write a pulled model to `path`: the same bytes for the same model. What is not as pinned is not written.

    Raises:
        ModelError: the file exists, a file of the model was changed, or the disk is full.
    """
    if path.exists() and not force:
        raise ModelError(f"{path}: exists already; replace it with --force")
    if not path.absolute().parent.is_dir():
        raise ModelError(f"{path}: no folder '{path.parent}'")
    values = to_dict(pin)
    manifest = (json.dumps({"pin": values, "sha256": _sha256(values)}, indent=2) + "\n").encode()
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.absolute().parent, prefix=f".{path.name}.", delete=False
        ) as draft:
            try:
                draft.write(_header(MANIFEST, len(manifest)) + manifest + _padding(len(manifest)))
                for name, file in sorted(pin.files.items()):
                    draft.write(_header(name, file.size))
                    with (pin.folder / name).open("rb") as source:
                        _copy(source, draft, name, file, progress)
                    draft.write(_padding(file.size))
                draft.write(bytes(2 * _BLOCK))
                draft.flush()
                os.fsync(draft.fileno())
                os.chmod(draft.name, 0o644)
                os.replace(draft.name, path)
            finally:
                Path(draft.name).unlink(missing_ok=True)
    except _Differs as error:
        raise ModelError(f"{pin.folder}: {error}; run: fedmed models pull {pin.hub}") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be written ({error.strerror})") from None


def import_(
    path: Path,
    *,
    sha256: str = "",
    pinned: Mapping[str, str] | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> Pin:
    """Unpack what `export` wrote. Nothing is seen of the model before every file has the size and digest of the pin.

    Args:
        sha256: what the weights must have; empty: whatever the file's pin says.
        pinned: what the weights of some models must have in any case, by hub id.
        replace: put it in place of another version.

    Raises:
        ModelError: the file is no such tar, was cut off or changed; another version is here; or the disk is full.
    """
    try:
        with path.open("rb") as source:
            pin = _manifest(source, path)
            for expected in (sha256, (pinned or {}).get(pin.hub, "")):
                if expected and pin.sha256 != expected:
                    raise ModelError(f"{path}: holds {pin.hub} with sha256 {pin.sha256}, expected {expected}")
            _check_length(source, path, pin)
            check_replaces(pin, replace=replace)
            if find_unchanged(pin):
                return pin
            with drafting(pin.total_bytes) as draft:
                for name, file in sorted(pin.files.items()):
                    _expect_header(source, path, name, file.size)
                    with (draft / name).open("wb") as target:
                        _copy(source, target, name, file, progress)
                    _expect_zeros(source, path, -file.size % _BLOCK)
                install(draft, pin, replace=replace)
    except _Differs as error:
        raise ModelError(f"{path}: {error}; nothing was kept") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    return pin


def find_unchanged(pin: Pin) -> bool:
    """Whether exactly this model is here already, undamaged."""
    with contextlib.suppress(ModelError):
        return find(pin.hub) == pin and not differences(pin)
    return False


class _Differs(Exception):
    """A file is not what the pin says."""


def _copy(
    source: IO[bytes], target: IO[bytes], name: str, file: PinnedFile, progress: Progress | None
) -> None:
    hasher, left = hashlib.sha256(), file.size
    while left and (chunk := source.read(min(left, _CHUNK))):
        hasher.update(chunk)
        target.write(chunk)
        left -= len(chunk)
        if progress:
            progress(name, file.size - left, file.size)
    if left or hasher.hexdigest() != file.sha256:
        raise _Differs(f"{name} {'was cut off' if left else 'was changed'}")


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    # Of 8 GB and more the size is written in base 256, which GNU tar reads too.
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK)


def _manifest(source: IO[bytes], path: Path) -> Pin:
    size = _read_header(source, path, MANIFEST)
    if not 0 < size <= _LARGEST_MANIFEST:
        raise ModelError(f"{path}: its {MANIFEST} has {size} bytes, expected at most {_LARGEST_MANIFEST}")
    try:
        read = json.loads(source.read(size))
        values, intact = read["pin"], read["sha256"] == _sha256(read["pin"])
    except (ValueError, RecursionError, TypeError, KeyError):
        intact = False
    if not intact:
        raise ModelError(f"{path}: its {MANIFEST} is damaged; copy it again")
    _expect_zeros(source, path, -size % _BLOCK)
    return Pin.of(values, where=f"{path}: {MANIFEST}")


def _sha256(values: dict[str, Any]) -> str:
    """Of a pin: the digests in it see no damage to the rest of it, such as its commit."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _read_header(source: IO[bytes], path: Path, name: str) -> int:
    """The size of the next member, which must be the regular file `name`."""
    try:
        member = tarfile.TarInfo.frombuf(source.read(_BLOCK), "utf-8", "strict")
    except (tarfile.HeaderError, ValueError):
        raise ModelError(f"{path}: no {name} where expected; is it a file of fedmed models export?") from None
    if member.name != name or member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.size < 0:
        raise ModelError(f"{path}: expected the file {name} next, found another member; nothing was kept")
    return member.size


def _expect_header(source: IO[bytes], path: Path, name: str, size: int) -> None:
    if _read_header(source, path, name) != size:
        raise ModelError(f"{path}: {name} has not the size that its {MANIFEST} says; nothing was kept")


def _expect_zeros(source: IO[bytes], path: Path, count: int) -> None:
    if source.read(count) != bytes(count):
        raise ModelError(f"{path}: damaged between its files; nothing was kept")


def _check_length(source: IO[bytes], path: Path, pin: Pin) -> None:
    """Whether the file can hold what its pin says: seen at once, not after gigabytes."""
    here = source.tell()
    needed = sum(_BLOCK + file.size + -file.size % _BLOCK for file in pin.files.values()) + 2 * _BLOCK
    if (found := os.fstat(source.fileno()).st_size - here) < needed:
        raise ModelError(f"{path}: cut off, {needed - found} bytes are missing; copy it again")
    source.seek(here)
