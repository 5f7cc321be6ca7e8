"""The coordinator's log: JSON, one object a line, in files of 10 MB of which five are kept."""

import json
import logging
import subprocess
import threading
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

NAME = "coordinator.jsonl"
BYTES, FILES = 10_000_000, 5
log = logging.getLogger("fedmed.supervisor")


class JsonLine(logging.Formatter):
    """A record as one JSON object: when, how grave, by which process, what."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever the text holds."""
        return json.dumps(
            {
                "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
                "level": record.levelname.lower(),
                "process": getattr(record, "source", "coordinator"),
                "text": record.getMessage(),
            },
            ensure_ascii=False,
        )


def write_to(folder: Path) -> logging.Handler:
    """Have the log written into a folder, for its owner's eyes; remove the handler to end it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    handler = RotatingFileHandler(folder / NAME, maxBytes=BYTES, backupCount=FILES - 1, encoding="utf-8")
    handler.setFormatter(JsonLine())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    return handler


def follow(process: subprocess.Popen[bytes], name: str) -> None:
    """Take what a process prints into the log, until it ends."""
    stream = process.stdout
    assert stream is not None

    def read() -> None:
        with stream:
            for line in stream:
                text = line.decode("utf-8", "replace").rstrip()
                if text:
                    log.info("%s", text, extra={"source": name})

    threading.Thread(target=read, name=f"log of {name}", daemon=True).start()
