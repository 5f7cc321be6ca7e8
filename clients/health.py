"""How a started site is: kept by the daemon, told on the loopback to whoever runs the machine."""

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clients.pause import is_paused
from fedmed.errors import ConfigError

# States: `connecting` at first, `online` or `working` in contact, `unreachable` or `refused` without, `stopping`.
IN_CONTACT = ("online", "working")


@dataclass
class Health:
    """What the daemon's thread writes and others read. Nothing in it is of a record."""

    site: str
    folder: Path
    coordinator: str
    state: str = "connecting"
    # Why there is no contact, in words; and which of `LinkRefused.reason`, where the coordinator refuses.
    reason: str = ""
    refusal: str = ""
    since: float = field(default_factory=time.time)
    # Unix time of the coordinator's last answer.
    last_contact: float | None = None
    # The run that was worked on last, and its round; 0 is the quote.
    run: str | None = None
    round: int | None = None

    def now(self, state: str, reason: str = "", refusal: str = "") -> bool:
        """Take over a state; whether it, or its reason, is another one."""
        if (state, reason) == (self.state, self.reason):
            return False
        self.state, self.reason, self.refusal, self.since = state, reason, refusal, time.time()
        return True

    def values(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "site": self.site, "coordinator": self.coordinator, "state": self.state, "reason": self.reason,
            "refusal": self.refusal, "since": self.since, "last_contact": self.last_contact,
            "run": self.run, "round": self.round, "paused": is_paused(self.folder),
        }  # fmt: skip


@contextlib.contextmanager
def served(values: Callable[[], dict[str, Any]], port: int | None) -> Iterator[int]:
    """Answer GET /health on 127.0.0.1 while entered; yields the port, 0 where there is none.

    Args:
        port: as `health_port` of site.yaml.

    Raises:
        ConfigError: the port is taken.
    """
    if port == 0:
        yield 0
        return
    try:
        server = _Server(("127.0.0.1", port or 0), _Handler)
    except OSError as error:
        raise ConfigError(
            f"health_port={port}: {error.strerror}; expected a free port, or null for any free one"
        ) from None
    server.values = values
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    values: Callable[[], dict[str, Any]]
    daemon_threads = True


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    # Seconds that a client may take for its request.
    timeout = 5

    def do_GET(self) -> None:
        # A web page can make a browser ask by another name that points here; it must not read the answer.
        host = self.headers.get("Host", "").partition(":")[0]
        if self.path != "/health" or host not in ("127.0.0.1", "localhost"):
            self.send_error(404)
            return
        body = json.dumps(self.server.values()).encode() + b"\n"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "fedmed"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a monitor asks every few seconds."""
