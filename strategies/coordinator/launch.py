"""`fedmed run federation=consortium`: hand a checked run to the coordinator, and watch it."""

import contextlib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fedmed.config import RunConfig
from fedmed.errors import ConfigError, Interrupted, RunError
from strategies.coordinator.folder import CoordinatorFolder
from strategies.coordinator.link import control
from strategies.coordinator.records import ENDED, OPEN, RunPlace, RunPlaces, setting

LOOK = 0.2


def launch(config: RunConfig, overrides: Sequence[str]) -> None:
    """Start a run at the coordinator that its configuration names, and show what it prints until it ends.

    Ctrl-C, or a terminal that is closed, ends the showing alone.

    Raises:
        CoordinatorError: there is no coordinator, or it does not run.
        RunError, ConfigError: the run did not finish.
    """
    folder = coordinator_of(config)
    operator = control(folder)
    if config.resume:
        place = resumable(folder, Path(config.resume))
        print(f"run '{place.name}' goes on", file=sys.stderr, flush=True)
    else:
        if config.run_dir:
            raise ConfigError(
                f"run_dir={config.run_dir}: expected null with federation=consortium, whose runs lie in {folder.runs}"
            )
        # As seen from anywhere: the run's own process and a later `resume` start elsewhere.
        where = setting("federation.coordinator", str(folder.path))
        settings = [*overrides, where, *tracked(folder, overrides)]
        place = RunPlaces(folder.runs).new(config.name, settings, Path.cwd())
        print(
            f"run '{place.name}' is handed to coordinator '{folder.config.name}'", file=sys.stderr, flush=True
        )
    shown = place.output.stat().st_size if place.output.exists() else 0
    operator.start_run(place.settings())
    operator.close()
    watch(folder, place, since=shown)


def coordinator_of(config: RunConfig) -> CoordinatorFolder:
    """The coordinator that a run names."""
    return CoordinatorFolder.open(Path(config.federation.coordinator or "."))


def resumable(folder: CoordinatorFolder, path: Path) -> RunPlace:
    """A run of this coordinator, written down as one that goes on.

    Raises:
        ConfigError: it is another one's, or it is under way, or has finished.
    """
    place = RunPlace(path.absolute())
    if place.path.parent.resolve() != folder.runs.resolve():
        raise ConfigError(f"resume={path}: no run of the coordinator in {folder.path}")
    state = place.read().state
    if state in OPEN:
        raise ConfigError(
            f"run '{place.name}': {state} already; look at it with: {show_command(folder, place)}"
        )
    if state == "finished":
        raise ConfigError(f"run '{place.name}': finished; nothing is left to do")
    place.resume()
    # Nobody else writes it: it is not under way.
    place.change(state="pending", detail="")
    return RunPlace(folder.runs / place.name)


def tracked(folder: CoordinatorFolder, overrides: Sequence[str]) -> list[str]:
    """The settings that send figures to the coordinator's own MLflow, where nothing else was asked for."""
    if any(text.startswith(("tracking=", "tracking.")) for text in overrides):
        return []
    running = folder.running() or {}
    if running.get("mlflow"):
        return [setting("tracking.uri", running["mlflow"])]
    print("warning: this coordinator has no MLflow: figures stay in the run's folder", file=sys.stderr)
    return ["tracking=none"]


def watch(folder: CoordinatorFolder, place: RunPlace, *, since: int = 0) -> None:
    """Show what a run prints, from a byte on, until it ends.

    Raises:
        Interrupted: Ctrl-C; the run goes on.
        RunError, ConfigError: it did not finish.
    """
    try:
        while True:
            # Before the output is read: what was printed until then has been shown.
            record = place.read()
            since = _show(place.output, since)
            if record.state in ENDED:
                break
            time.sleep(LOOK)
    except KeyboardInterrupt:
        raise Interrupted(
            f"the run goes on without this terminal; look again: {show_command(folder, place)}; "
            f"stop it: {runs_command('stop', folder, place)}"
        ) from None
    if record.state == "finished":
        return
    text = f"run '{place.name}' {record.state}: {record.detail}"
    if record.state == "refused":
        raise ConfigError(text)
    raise RunError(f"{text}; go on with: {runs_command('resume', folder, place)}")


def _show(output: Path, since: int) -> int:
    """Print what is new in a file; where it ends."""
    with contextlib.suppress(FileNotFoundError), output.open("rb") as file:
        file.seek(since)
        new = file.read()
        # A line or a letter that is not whole yet comes with the next look.
        whole = new[: new.rfind(b"\n") + 1]
        sys.stdout.write(whole.decode("utf-8", "replace"))
        sys.stdout.flush()
        return since + len(whole)
    return since


def show_command(folder: CoordinatorFolder, place: RunPlace) -> str:
    """The command line that shows a run as it goes on."""
    return f"{runs_command('show', folder, place)} --follow"


def runs_command(verb: str, folder: CoordinatorFolder, place: RunPlace) -> str:
    """The command line of `fedmed runs VERB RUN`."""
    return shlex.join(["fedmed", "runs", verb, place.name, "--coordinator", str(folder.path)])
