"""The process of one run: `python -m strategies.coordinator.worker`, told what to do on standard input.

It prints what a person should see; the process that started it watches over it and starts it again.
"""

import json
import os
import sys
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import IO

from fedmed.errors import FedmedError, internal
from fedmed.schema import from_dict


class Exit(IntEnum):
    """How a run's process ended. A negative code, of a signal, is a crash too."""

    FINISHED = 0
    # It could not go on, and may later: the quorum was lost.
    FAILED = 1
    # It would be refused again: a wrong setting, a site that says no.
    REFUSED = 2
    CRASHED = 70
    # The SuperLink was away too long, or took the run for ended.
    LOST = 75
    INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a run's process is told. Not on its command line, which everybody on the machine can read.

    Attributes:
        coordinator: the coordinator's folder.
        token: of the run's task at the SuperLink.
        run: the run's number there.
        overrides: the settings, with the run's own folder.
    """

    coordinator: str
    insecure: bool
    token: str
    run: int
    overrides: list[str]


def main() -> None:
    """Do the run that standard input describes."""
    # Read when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(work(sys.stdin))


def work(source: IO[str]) -> Exit:
    """Do a run, print what became of it, and say it by a code."""
    from fedmed.flower.line import LinkError

    try:
        _run(from_dict(Assignment, json.load(source)))
    except FedmedError as error:
        for line in error.lines:
            print(f"error: {' '.join(line.split())}", flush=True)
        if isinstance(error, LinkError):
            return Exit.LOST
        codes = {Exit.FAILED, Exit.REFUSED, Exit.INTERRUPTED}
        return Exit(error.exit_code) if error.exit_code in codes else Exit.FAILED
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    # Its text may hold anything; what kind it was and where does not.
    except Exception as error:
        if os.environ.get("FEDMED_DEBUG"):
            raise
        print(f"error: {internal(error)}", flush=True)
        return Exit.CRASHED
    return Exit.FINISHED


def _run(assignment: Assignment) -> None:
    from fedmed.compose import compose
    from fedmed.flower.server import NetworkGrid
    from strategies.coordinator.folder import CoordinatorFolder
    from strategies.run import run

    folder = CoordinatorFolder.open(Path(assignment.coordinator))
    grid = NetworkGrid(
        folder.address,
        ca=None if assignment.insecure else folder.trusted,
        secret=folder.control_secret,
        token=assignment.token,
        run=assignment.run,
    )
    try:
        run(compose(assignment.overrides), grid)
    finally:
        grid.close()


if __name__ == "__main__":
    main()
