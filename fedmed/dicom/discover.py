"""Which files an export holds: a folder tree, or what a DICOMDIR names."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    above = len(os.path.join(source, ""))
    while folders:
        folder = folders.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if folder == source:
                raise
            unread[os.fspath(folder)[above:]] = _why(error)
            continue
        for entry in entries:
            name = entry.path[above:]
            try:
                if entry.is_dir(follow_symlinks=False):
                    if skipped is None or Path(entry.path).resolve() != skipped:
                        folders.append(Path(entry.path))
                elif entry.is_file():
                    status = entry.stat()
                    files[name] = status.st_size, status.st_mtime_ns
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    unread[name] = Reason.MISSING_FILE
            except OSError as error:
                unread[name] = _why(error)
    return Found(root=source, files=dict(sorted(files.items())), unread=unread)


def _why(error: OSError) -> Reason:
    return Reason.NO_PERMISSION if isinstance(error, PermissionError) else Reason.UNREADABLE


def _named_by(index: Path) -> Found:
    """What a DICOMDIR names; each name below the DICOMDIR's own folder."""
    files: dict[str, tuple[int, int]] = {}
    unread: dict[str, Reason] = {}
    for number, parts in enumerate(_names(index), start=1):
        if parts is None:
            unread[f"{index.name}, record {number}"] = Reason.UNREADABLE
            continue
        if not parts:
            continue
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


def _names(index: Path) -> list[list[str] | None]:
    """The parts of the file name in each directory record, [] where it names none; None for a damaged record.

    What pydicom says of a damaged one quotes it, so that nothing of that is let through.
    """
    import pydicom

    from fedmed.dicom.deid.quiet import quiet

    with quiet():
        try:
            records = pydicom.dcmread(index).get("DirectoryRecordSequence")
            found = [_parts(record) for record in records] if records is not None else None
        except Exception as error:
            # An error number is the system's; whatever else is raised is the parser's.
            if isinstance(error, OSError) and error.errno:
                raise
            found = None
    if found is None:
        raise DataError(
            f"{index}: a file and no DICOMDIR; expected the folder of a PACS export, or its DICOMDIR"
        )
    return found


def _parts(record: Any) -> list[str] | None:
    try:
        named = record.get("ReferencedFileID")
        return [] if not named else [named] if isinstance(named, str) else [str(part) for part in named]
    except Exception:
        return None
