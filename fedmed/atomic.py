"""Files that are either whole or absent."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step and make it last: a crash leaves the old file or the new one."""
    write_parts(path, [content])


def write_parts(path: Path, parts: Iterable[bytes | memoryview], *, lasting: bool = True) -> None:
    """`write_bytes` of parts that need not be in memory together.

    Args:
        lasting: False: whole or absent if this process dies, but not if the machine does.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            if lasting:
                os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Write JSON atomically; NaN is refused, since no other program reads it."""
    write_bytes(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def sync_folder(path: Path) -> None:
    """Make the names in a folder last."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
