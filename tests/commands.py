"""Runs the `fedmed` command in forks of a process that has imported what it needs: seconds become tenths.

As a script it is such a process: it reads requests from standard input, one JSON object a line, and answers each
with two lines, the process id of the fork and how it ended.
"""

import atexit
import contextlib
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
FULL = bool(os.environ.get("FEDMED_TEST_FULL"))
# All that `fedmed run` imports before it has checked every setting.
LIGHT = (
    "fedmed.cli.main strategies.cli strategies.folder fedmed.compose fedmed.data.describe fedmed.data.table"
)
# And the rest.
HEAVY = f"{LIGHT} strategies.server_app strategies.sweep strategies.forecast clients.client_app"
# What every command does first; kept by `tests.kept`.
TREE = "import typer; from fedmed.cli.main import build_app; typer.main.get_command(build_app())"
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
    """Commands in forks of a process. A fork has a process group of its own, as in a terminal."""

    def __init__(self, process: "Server | Here", folder: Path) -> None:
        self._process, self._folder = process, folder

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
        home = {"FEDMED_HOME": str(self._folder / "home")}
        pid = self._process.begin(
            {
                "arguments": arguments, "cwd": str(cwd or self._folder), "env": home | (env or {}), "before": before,
                "out": str(out), "err": str(err),
            }
        )  # fmt: skip
        if during:
            during(pid, out)
        ended = json.loads(self._process.end())
        return Ended(ended["code"], out.read_text(), err.read_text(), ended["torch"])


class Server:
    """A process that has imported these modules."""

    def __init__(self, modules: str, folder: Path, *, warm: str) -> None:
        """Start it.

        Args:
            warm: Python that it executes first: what is computed there, every fork has.
        """
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, warm, *modules.split()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment,
        )  # fmt: skip
        atexit.register(self._process.communicate)

    def begin(self, request: dict[str, Any]) -> int:
        """The process id of the fork."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._answer())

    def end(self) -> str:
        """How it ended."""
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


class Here:
    """This process."""

    def begin(self, request: dict[str, Any]) -> int:
        """The process id of the fork."""
        self._reading, writing = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._reading)
            _run(request, writing)
        os.close(writing)
        return self._pid

    def end(self) -> str:
        """How it ended."""
        os.waitpid(self._pid, 0)
        # Not to the end of the pipe, which a process that is left behind would keep open.
        os.set_blocking(self._reading, False)
        with contextlib.suppress(BlockingIOError), os.fdopen(self._reading, "rb", buffering=0) as pipe:
            return (pipe.read(1000) or b"").decode() or KILLED
        return KILLED


KILLED = '{"code": -1, "torch": false}'


@functools.cache
def light() -> Commands:
    """Commands in a process that has not imported torch; one for all tests. It has composed the quick run."""
    warm = f"{TREE}; from fedmed.compose import compose; compose([]); compose({FAST})"
    return Commands(Server(LIGHT, _folder(), warm=warm), _folder())


@functools.cache
def heavy() -> Commands:
    """Commands in forks of this process, which has imported all that a run needs; in `make test-full` of another."""
    if FULL:
        return Commands(Server(HEAVY, _folder(), warm=""), _folder())
    for module in HEAVY.split():
        importlib.import_module(module)
    exec(TREE, {})
    return Commands(Here(), _folder())


def _folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="fedmed-commands-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


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
    exec(warm, {})
    answers = os.fdopen(os.dup(1), "w")
    here = Here()
    for line in sys.stdin:
        print(here.begin(json.loads(line)), file=answers, flush=True)
        print(here.end(), file=answers, flush=True)


def _run(request: dict[str, Any], writing: int) -> None:
    os.setpgid(0, 0)
    # A parent in the background ignores it, and its children would too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # Those of pytest lead elsewhere.
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    keys = SimpleNamespace(token_bytes=same_key, token_hex=secrets.token_hex)
    importlib.import_module("fedmed.data.split").secrets = keys
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
