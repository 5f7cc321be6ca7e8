"""Becomes another program that does not outlive its parent: `python -m strategies.coordinator.child PARENT SIGNAL …`.

The kernel sends the signal when the parent ends, however it ends. Set here and not between fork and exec in the
parent, which has threads.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1


def spawn(
    command: Sequence[str],
    *,
    dies_by: signal.Signals,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    **streams: Any,
) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, so that Ctrl-C reaches its parent alone.

    Call it in the main thread: for the kernel, the thread that starts a process is its parent.

    Args:
        dies_by: what the kernel sends it when this process ends.
        env: on top of this process's own.
    """
    wrapper = [sys.executable, "-P", "-m", __name__, str(os.getpid()), str(int(dies_by))]
    return subprocess.Popen(
        [*wrapper, *command], env={**os.environ, **(env or {})}, cwd=cwd, start_new_session=True, **streams
    )


def main() -> None:
    """Ask the kernel, then become the command."""
    parent, number, *command = sys.argv[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number)) != 0:
        sys.exit(f"error: prctl failed ({os.strerror(ctypes.get_errno())})")
    # It may have ended before the kernel was asked.
    if os.getppid() != int(parent):
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
