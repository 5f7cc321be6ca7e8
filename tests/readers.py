"""Reading processes that are forks of one which has imported the decoders: half a second becomes hundredths.

As a script it is that process: each connection to its socket brings two files, which become a fork's standard input and
output, and is told the fork's process id. `make test-full` starts every reading process anew, as an ingestion does.
"""

import atexit
import contextlib
import importlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent


class Fork:
    """What `fedmed.dicom.workers` uses of a `subprocess.Popen`."""

    def __init__(self, _words: list[str], *, env: dict[str, str], **_how: Any) -> None:
        theirs_in, ours_in = os.pipe()
        ours_out, theirs_out = os.pipe()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(_started(env))
            socket.send_fds(connection, [os.getcwd().encode()], [theirs_in, theirs_out])
            self.pid = int(connection.recv(100))
        os.close(theirs_in)
        os.close(theirs_out)
        self.stdin, self.stdout = os.fdopen(ours_in, "wb"), os.fdopen(ours_out, "rb")

    def kill(self) -> None:
        """End it, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        """Until nothing is left of it."""
        with contextlib.suppress(ProcessLookupError):
            ended = os.pidfd_open(self.pid)
            select.select([ended], [], [])
            os.close(ended)
        while Path(f"/proc/{self.pid}").exists():
            time.sleep(0.001)


# In the place of the module `subprocess`.
FORKS = SimpleNamespace(Popen=Fork, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL)


_sockets: list[str] = []


def _started(environment: dict[str, str]) -> str:
    """The socket of the process, which has the environment of the first fork that was asked for."""
    if _sockets:
        return _sockets[0]
    folder = tempfile.TemporaryDirectory(prefix="fedmed-readers-")
    atexit.register(folder.cleanup)
    path = f"{folder.name}/socket"
    server = subprocess.Popen(
        [sys.executable, "-P", __file__, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    atexit.register(server.communicate)
    _sockets.append(path)
    return path


def _serve(path: str) -> None:
    worker = importlib.import_module("fedmed.dicom.worker")
    importlib.import_module("fedmed.dicom.reader")
    signal.signal(signal.SIGCHLD, _take_away)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(100)
        os.write(1, b"ready\n")
        while True:
            ready, _, _ = select.select([listening, 0], [], [])
            if 0 in ready:
                # Who started it has ended.
                return
            connection, _ = listening.accept()
            where, files, _, _ = socket.recv_fds(connection, 4096, 2)
            pid = os.fork()
            if not pid:
                listening.close()
                connection.close()
                os.chdir(where)
                _read(worker, files)
            connection.sendall(str(pid).encode())
            connection.close()
            for file in files:
                os.close(file)


def _take_away(*_: object) -> None:
    """The forks that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _read(worker: Any, files: list[int]) -> None:
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        worker.main()
        code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1])
