"""Which files an export holds: a folder tree, or what a DICOMDIR names."""

import os
from dataclasses import dataclass
from pathlib import Path

from fedmed.dicom.reasons import Reason
from fedmed.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Found:
    """The files of an export.

    Attributes:
        root: the folder that `files` are relative to.
        files: relative path -> (size in bytes, time of change in ns), in order of their names.
        unread: relative path -> why it was not even looked at.
    """

    root: Path
    files: dict[str, tuple[int, int]]
    unread: dict[str, Reason]


def discover(source: Path, *, leave_out: Path | None = None) -> Found:
    """The files below a folder, or those that a DICOMDIR names.

    Links to folders are not followed: a loop would never end.

    Args:
        leave_out: a folder below `source` that is none of its data, such as the one that ingestion writes.

    Raises:
        DataError: there is nothing, or it may not be read.
    """
    try:
        found = _named_by(source) if source.is_file() else _below(source, leave_out)
    except PermissionError:
        raise DataError(f"{source}: no permission to read it; run as an account that may") from None
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror})") from None
    if not found.files:
        more = f" ({len(found.unread)} may not be read)" if found.unread else ""
        raise DataError(f"{source}: no file in it{more}; expected the folder of a PACS export")
    return found


def _below(source: Path, leave_out: Path | None) -> Found:
    files: dict[str, tuple[int, int]] = {}
    unread: dict[str, Reason] = {}
    skipped = leave_out.resolve() if leave_out else None
    folders = [source]
    while folders:
        folder = folders.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except PermissionError:
            if folder == source:
                raise
            unread[os.path.relpath(folder, source)] = Reason.NO_PERMISSION
            continue
        for entry in entries:
            name = os.path.relpath(entry.path, source)
            try:
                if entry.is_dir(follow_symlinks=False):
                    if skipped is None or Path(entry.path).resolve() != skipped:
                        folders.append(Path(entry.path))
                elif entry.is_file():
                    status = entry.stat()
                    files[name] = status.st_size, status.st_mtime_ns
            except PermissionError:
                unread[name] = Reason.NO_PERMISSION
    return Found(root=source, files=dict(sorted(files.items())), unread=unread)


def _named_by(index: Path) -> Found:
    """What a DICOMDIR names; each name below the DICOMDIR's own folder."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    files: dict[str, tuple[int, int]] = {}
    unread: dict[str, Reason] = {}
    try:
        records = pydicom.dcmread(index).get("DirectoryRecordSequence")
    except (InvalidDicomError, ValueError, KeyError, AttributeError, EOFError):
        records = None
    if records is None:
        raise DataError(
            f"{index}: a file and no DICOMDIR; expected the folder of a PACS export, or its DICOMDIR"
        )
    for record in records:
        named = record.get("ReferencedFileID")
        if not named:
            continue
        parts = [named] if isinstance(named, str) else [str(part) for part in named]
        name = os.path.join(*parts)
        if any(part in ("", ".", "..") or "/" in part or "\0" in part for part in parts):
            # Out of the folder: an export names its own files.
            unread[name.replace("\0", "")] = Reason.MISSING_FILE
            continue
        try:
            status = (index.parent / name).stat()
            files[name] = status.st_size, status.st_mtime_ns
        except OSError as error:
            denied = isinstance(error, PermissionError)
            unread[name] = Reason.NO_PERMISSION if denied else Reason.MISSING_FILE
    return Found(root=index.parent, files=dict(sorted(files.items())), unread=unread)
