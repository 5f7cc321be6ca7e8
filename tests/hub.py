"""A Hugging Face hub on loopback: what huggingface_hub asks of the real one to fetch a model, and ways to fail."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee00" * 5


@dataclass
class Hub:
    """One repository at one commit, which is also its `main`."""

    url: str
    files: dict[str, bytes]
    repository: str = "org/model"
    commit: str = COMMIT
    # Another answer than the file: gated, missing, broken; short, changed (of the weights); stall.
    fault: str = ""
    # What was asked for, and the tokens that came with it.
    asked: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)

    def digest(self, name: str = "model.safetensors") -> str:
        return hashlib.sha256(self.files[name]).hexdigest()


@contextlib.contextmanager
def serving(folder: Path, *, extra: dict[str, bytes] | None = None) -> Iterator[Hub]:
    """A hub with the files of `folder`, and more."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | (extra or {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = Hub(url=f"http://127.0.0.1:{server.server_port}", files=files)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        hub.asked.append(f"{self.command} {self.path.partition('?')[0]}")
        hub.tokens.add(self.headers.get("Authorization") or "")
        path = self.path.partition("?")[0].lstrip("/")
        about, resolve = f"api/models/{hub.repository}", f"{hub.repository}/resolve/{hub.commit}/"
        if hub.fault == "broken":
            self._answer(503, b"")
        elif hub.fault == "missing" or not path.startswith((about, resolve)):
            self._answer(404, b"", **{"X-Error-Code": "RepoNotFound"})
        elif path.startswith(about):
            revision = path.removeprefix(about).removeprefix("/revision/").replace("%2F", "/")
            if revision in ("", "main", "refs/pr/1", hub.commit):
                self._answer(200, json.dumps(_about(hub)).encode(), **{"Content-Type": "application/json"})
            else:
                self._answer(404, b"", **{"X-Error-Code": "RevisionNotFound"})
        elif hub.fault == "gated":
            self._answer(401, b"", **{"X-Error-Code": "GatedRepo"})
        else:
            self._file(hub, path.removeprefix(resolve))

    def _file(self, hub: Hub, name: str) -> None:
        content = hub.files[name]
        digest = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": hub.commit, "X-Linked-Size": str(len(content))}
        if name == "model.safetensors" and self.command == "GET":
            if hub.fault == "short":
                content = content[:-7]
            elif hub.fault == "changed":
                content = content[:-1] + bytes([content[-1] ^ 1])
            elif hub.fault == "stall":
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                threading.Event().wait(60)
                return
        self._answer(200, content, **headers)

    def _answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(content)


def _about(hub: Hub) -> dict[str, Any]:
    siblings = []
    for name, content in hub.files.items():
        sibling: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": "0" * 40}
        if name.endswith(".safetensors"):
            sibling["lfs"] = {"sha256": hub.digest(name), "size": len(content), "pointerSize": 134}
        siblings.append(sibling)
    return {"id": hub.repository, "modelId": hub.repository, "sha": hub.commit, "siblings": siblings}
