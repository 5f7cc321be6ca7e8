"""Files that are either whole or absent."""

import json
import os
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step and make it last: a crash leaves the old file or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Write JSON atomically; NaN is refused, since no other program reads it."""
    write_bytes(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())
