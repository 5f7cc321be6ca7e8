"""What has been read of an export so far, so that a killed ingestion goes on where it was."""

import json
import os
from pathlib import Path
from typing import Any

from fedmed.errors import DataError


def unwritable(folder: Path, why: str | None) -> DataError:
    """What is said where an ingestion cannot write on, of which nothing is lost."""
    return DataError(
        f"{folder}: cannot be written ({why}); what was read is kept: make room and start the same command again"
    )


class Journal:
    """Lines of JSON in the working folder: what the ingestion is, then an outcome for each file that was read.

    A line counts once it is whole, and only for a file that has not changed since.
    """

    def __init__(self, folder: Path, *, about: dict[str, Any]) -> None:
        """Open the journal; one of other settings or of a damaged head is begun anew.

        Args:
            about: what outcomes depend on besides the files.

        Raises:
            DataError: it cannot be read or written.
        """
        try:
            self._open(folder, about)
        except OSError as error:
            raise unwritable(folder.parent, error.strerror) from None

    def _open(self, folder: Path, about: dict[str, Any]) -> None:
        self.path = folder / "journal.jsonl"
        self.outcomes: dict[str, dict[str, Any]] = {}
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        whole = lines and _parsed(lines[0]) == about
        if whole:
            for line in lines[1:]:
                entry = _parsed(line)
                if isinstance(entry, dict) and "file" in entry:
                    self.outcomes[entry["file"]] = entry
        # Unbuffered: what a killed process had read is not read again.
        self._file = self.path.open("ab" if whole else "wb", buffering=0)
        if whole:
            # A line that was cut off by a kill must not swallow the next.
            size = sum(len(line) + 1 for line in lines)
            os.truncate(self.path, size)
        else:
            self._write(about)

    def known(self, file: str, status: tuple[int, int]) -> dict[str, Any] | None:
        """The outcome of a file that has still this size and time."""
        entry = self.outcomes.get(file)
        return entry["outcome"] if entry and tuple(entry["status"]) == status else None

    def add(self, file: str, status: tuple[int, int], outcome: dict[str, Any]) -> None:
        """Keep an outcome."""
        entry = {"file": file, "status": list(status), "outcome": outcome}
        self.outcomes[file] = entry
        self._write(entry)

    def close(self) -> None:
        """End writing."""
        self._file.close()

    def _write(self, entry: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(entry, ensure_ascii=True).encode() + b"\n")
        except OSError as error:
            raise unwritable(self.path.parent.parent, error.strerror) from None


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
