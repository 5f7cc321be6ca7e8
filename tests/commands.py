"""Runs the `fedmed` command in forks of one process that has imported what it needs: seconds become tenths.

As a script it is that process: it reads requests from standard input, one JSON object a line, and answers each
with two lines, the process id of the fork and how it ended.
"""

import atexit
import functools
import importlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent
# All that `fedmed run` imports before it has checked every setting.
LIGHT = (
    "fedmed.cli.main strategies.cli strategies.folder fedmed.compose fedmed.data.describe fedmed.data.table"
)
# And the rest.
HEAVY = f"{LIGHT} strategies.server_app strategies.sweep strategies.forecast clients.client_app"
# The settings of a run that takes a second.
FAST = ["model=logistic", "tracking=none"]


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    # Whether torch had been imported when it ended.
    torch: bool


class Commands:
    """The process whose forks are commands. A fork has a process group of its own, as in a terminal."""

    def __init__(self, modules: str, folder: Path, *, warm: str = "") -> None:
        """Start it.

        Args:
            warm: Python that it executes first: what is computed there, every fork has.
        """
        self._folder = folder
        environment = os.environ | {"PYTHONPATH": str(ROOT), "FEDMED_HOME": str(folder / "home")}
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, warm, *modules.split()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment,
        )  # fmt: skip

    def __call__(
        self,
        *arguments: str,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        before: str = "",
        during: Callable[[int, Path], None] | None = None,
    ) -> Ended:
        """Run `fedmed ARGUMENTS`.

        Args:
            before: Python that the fork executes first, e.g. to break something.
            during: called with the fork's process id and the file of its standard output.
        """
        out, err = self._folder / "stdout", self._folder / "stderr"
        request = {
            "arguments": arguments, "cwd": str(cwd or self._folder), "env": env or {}, "before": before,
            "out": str(out), "err": str(err),
        }  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        if during:
            during(pid, out)
        ended = json.loads(self._process.stdout.readline())
        return Ended(ended["code"], out.read_text(), err.read_text(), ended["torch"])

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


@functools.cache
def light() -> Commands:
    """Commands in a process that has not imported torch; one for all tests. It has composed a run."""
    return _started(LIGHT, "fedmed = __import__('fedmed.compose'); fedmed.compose.compose([])")


@functools.cache
def heavy() -> Commands:
    """Commands in a process that has imported all that a run needs, and has made a plan; one for all tests."""
    plan = "__import__('strategies.forecast').forecast.forecast"
    return _started(HEAVY, f"{plan}(__import__('fedmed.compose').compose.compose({FAST}))")


def _started(modules: str, warm: str) -> Commands:
    folder = tempfile.TemporaryDirectory(prefix="fedmed-commands-")
    atexit.register(folder.cleanup)
    started = Commands(modules, Path(folder.name), warm=warm)
    atexit.register(started.close)
    return started


def same_key(size: int) -> bytes:
    """The key of every site, the same each time: it says who is held out, and of few patients it could be nobody."""
    return random.Random(0).randbytes(size)


def wait_for(what: Callable[[], Any], *, seconds: float = 120) -> Any:
    """What `what` returns, as soon as that is true."""
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


def _serve(warm: str, modules: list[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    importlib.import_module("tests.kept").keep()
    keys = SimpleNamespace(token_bytes=same_key, token_hex=secrets.token_hex)
    importlib.import_module("fedmed.data.split").secrets = keys
    exec(warm, {})
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _run(request, writing)
        os.close(writing)
        print(pid, file=answers, flush=True)
        os.waitpid(pid, 0)
        # Not to the end of the pipe, which a process that is left behind would keep open.
        os.set_blocking(reading, False)
        try:
            ended = os.read(reading, 1000).decode()
        except BlockingIOError:
            ended = ""
        os.close(reading)
        print(ended or '{"code": -1, "torch": false}', file=answers, flush=True)


def _run(request: dict[str, Any], writing: int) -> None:
    os.setpgid(0, 0)
    # A parent in the background ignores it, and its children would too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["fedmed", *request["arguments"]]
    try:
        exec(request["before"], {})
        importlib.import_module("fedmed.cli.main").main()
        code: Any = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(writing, json.dumps({"code": code or 0, "torch": "torch" in sys.modules}).encode())
    os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2:])
