"""A daemon's log: one JSON object a line."""

import json
import logging
import logging.handlers
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from fedmed.errors import ConfigError, internal


class JsonLines(logging.Formatter):
    """Time (UTC), level, logger and message; of an exception its type and place, since its text may hold data."""

    def format(self, record: logging.LogRecord) -> str:
        values = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info and record.exc_info[1] is not None:
            values["error"] = internal(record.exc_info[1])
        return json.dumps(values, ensure_ascii=False)


def log_to(path: Path | None) -> None:
    """Send this process's whole log to a file, which may be rotated away, or to standard error.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None:
        handler: logging.Handler = logging.StreamHandler(sys.stderr)
    else:
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
            handler = logging.handlers.WatchedFileHandler(path, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--log {path}: cannot be written ({error.strerror})") from None
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("fedmed").setLevel(logging.INFO)
    # Flower prints in a format of its own.
    flower = logging.getLogger("flwr")
    flower.handlers.clear()
    flower.propagate = True
    logging.captureWarnings(True)
