"""The ledger's file: entries, each of which names the hash of the one before it."""

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmed.errors import FedmedError

VERSION = 1
# "fmLg": a file that is none of ours is not taken for an empty ledger.
APPLICATION = 0x666D4C67
# How long one process waits for another one's entry.
BUSY_SECONDS = 60.0
# Bytes: SQLite's index of a write-ahead log, and a few entries.
LEAST_ROOM = 65_536


class LedgerError(FedmedError):
    """The ledger cannot be used; nothing may be trained. The message says what to do."""


@dataclass(frozen=True)
class Entry:
    """One line of the ledger, as it is stored."""

    number: int
    body: str
    hash: str
    signature: bytes

    @property
    def values(self) -> dict[str, Any]:
        """The body, parsed."""
        parsed: dict[str, Any] = json.loads(self.body)
        return parsed


# What the first entry follows.
START = Entry(0, "{}", "0" * 64, b"")


def canonical(values: dict[str, Any]) -> str:
    """The one text of an entry's body."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def hash_of(number: int, body: str) -> str:
    """An entry's hash: over its place and its body, which holds the hash before it."""
    return hashlib.sha256(f"{number}\n{body}".encode()).hexdigest()


def follows(entry: Entry, last: Entry) -> bool:
    """Whether an entry is whole and stands where it was written."""
    return (
        entry.number == last.number + 1
        and entry.hash == hash_of(entry.number, entry.body)
        and entry.values.get("previous") == last.hash
    )


def stored_entries(connection: sqlite3.Connection, after: int = 0) -> Iterator[Entry]:
    """The entries of an open file, oldest first, as they are."""
    rows = connection.execute(
        "SELECT number, body, hash, signature FROM entries WHERE number > ? ORDER BY number", (after,)
    )
    for number, body, digest, signature in rows:
        yield Entry(number, body, digest, bytes(signature))


def chained(connection: sqlite3.Connection, last: Entry, *, path: Path) -> Iterator[Entry]:
    """The entries after `last`, each of which follows the one before it.

    Raises:
        LedgerError: at the first that does not.
    """
    for entry in stored_entries(connection, last.number):
        if not follows(entry, last):
            raise LedgerError(
                f"{path}: entry {entry.number} does not follow the one before it; nothing is trained on "
                "a damaged ledger: run fedmed privacy verify, and restore the file from a backup"
            )
        yield entry
        last = entry


def check_version(connection: sqlite3.Connection, *, path: Path) -> None:
    """Return if the file is a ledger that this version reads.

    Raises:
        LedgerError: it is something else, or of another version.
        sqlite3.DatabaseError: it is damaged.
    """
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION:
        raise LedgerError(f"{path}: is no ledger of fedmed; restore it from a backup")
    if version != VERSION:
        raise LedgerError(
            f"{path}: has format {version}, this fedmed reads {VERSION}; install the fedmed that wrote it"
        )
    if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
        raise sqlite3.DatabaseError("damaged")


def connect(path: Path) -> sqlite3.Connection:
    """The open file: whatever is committed lasts."""
    # No implicit transactions: each begins and ends where the code says so.
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    connection.execute("PRAGMA synchronous=FULL")
    return connection


def _without_room(path: Path) -> bool:
    try:
        return shutil.disk_usage(path.parent).free < LEAST_ROOM
    except OSError:
        return False


def advice(error: Exception, path: Path) -> str:
    """What is wrong with the file and what to do about it, in words."""
    text = str(error)
    if "readonly" in text or "read-only" in text or "unable to open" in text:
        return "cannot be written to; mount its disk read-write and give this user access to the file and its folder"
    # Where there is no room for the log's index, SQLite says no more than that the disk failed.
    if "full" in text or ("I/O error" in text and _without_room(path)):
        return "the disk is full; free some space on it"
    if "locked" in text:
        return f"another process has held it for {BUSY_SECONDS:.0f} s; see which with fuser, or wait"
    if isinstance(error, sqlite3.OperationalError):
        return f"cannot be used ({text})"
    return "is damaged; run fedmed privacy verify, and restore it from a backup"
