"""`fedmed runs`: the runs of a coordinator. Heavy imports wait until a command runs."""

import json
from typing import Annotated

import typer

from strategies.coordinator.cli import HERE, Coordinator

RUNS_HELP = """List, show, stop and resume the runs of a coordinator. Without a command: list.

RUN is a run's name, or how it alone begins.

\b
Examples:
  fedmed runs --coordinator /srv/hub
  fedmed runs show 20261122-1015 --follow
  fedmed runs stop 20261122-101500-demo
  fedmed runs resume 20261122-101500-demo
"""

LIST_HELP = """List all runs: state, round, epsilon so far.

\b
Examples:
  fedmed runs list --coordinator /srv/hub
  fedmed runs list --json
"""

SHOW_HELP = """Show what a run printed, and how it stands.

\b
Examples:
  fedmed runs show 20261122-101500-demo
  fedmed runs show 20261122-101500-demo --follow      until it ends; Ctrl-C ends the showing alone
  fedmed runs show 20261122-101500-demo --json
"""

STOP_HELP = """Stop a run. Finished rounds are kept; `resume` goes on from there.

\b
Examples:
  fedmed runs stop 20261122-101500-demo
"""

RESUME_HELP = """Go on with a run after its last finished round.

\b
Examples:
  fedmed runs resume 20261122-101500-demo
  fedmed runs resume 20261122-101500-demo --no-follow
"""

app = typer.Typer(rich_markup_mode=None)

Run = Annotated[str, typer.Argument(metavar="RUN", hidden=True)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Follow = Annotated[bool, typer.Option("--follow/--no-follow", help="Show what it prints until it ends.")]


def add_commands(root: typer.Typer) -> None:
    """Add these commands to the root command."""
    root.add_typer(app, name="runs")


@app.callback(help=RUNS_HELP, invoke_without_command=True)
def runs(context: typer.Context, coordinator: Coordinator = HERE, as_json: Json = False) -> None:
    """Without a command: list."""
    if context.invoked_subcommand is None:
        list_runs(coordinator, as_json)


@app.command("list", help=LIST_HELP)
def list_runs(coordinator: Coordinator = HERE, as_json: Json = False) -> None:
    """Read every run's folder, print a table."""
    from strategies.console import plain_console
    from strategies.coordinator.folder import CoordinatorFolder
    from strategies.coordinator.records import RunPlaces
    from strategies.coordinator.snapshot import run_row, runs_table

    rows = [run_row(place) for place in RunPlaces(CoordinatorFolder.open(coordinator).runs).all()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2, allow_nan=False))
    elif rows:
        plain_console().print(runs_table(rows))
    else:
        typer.echo("no run yet; launch one with: fedmed run federation=consortium federation.coordinator=DIR")


@app.command("show", help=SHOW_HELP)
def show(run: Run, follow: Follow = False, coordinator: Coordinator = HERE, as_json: Json = False) -> None:
    """Print its output, then where it stands."""
    from strategies.console import plain_console
    from strategies.coordinator.folder import CoordinatorFolder
    from strategies.coordinator.launch import watch
    from strategies.coordinator.records import RunPlaces
    from strategies.coordinator.snapshot import run_row, runs_table

    folder = CoordinatorFolder.open(coordinator)
    place = RunPlaces(folder.runs).named(run)
    if as_json:
        typer.echo(json.dumps(run_row(place), indent=2, allow_nan=False))
        return
    if follow:
        watch(folder, place)
        return
    if place.output.exists():
        typer.echo(place.output.read_text("utf-8", "replace"), nl=False)
    plain_console().print(runs_table([run_row(place)]))


@app.command("stop", help=STOP_HELP)
def stop(run: Run, coordinator: Coordinator = HERE) -> None:
    """Write the wish down; wait until it is heard."""
    import time

    from fedmed.errors import ConfigError
    from strategies.coordinator.folder import CoordinatorFolder
    from strategies.coordinator.records import OPEN, RunPlaces

    folder = CoordinatorFolder.open(coordinator)
    place = RunPlaces(folder.runs).named(run)
    state = place.read().state
    if state not in OPEN:
        raise ConfigError(f"run '{place.name}': {state}; expected one that is under way")
    place.stop()
    if folder.running() is None:
        place.change(state="stopped", detail="stopped by a person")
    end = time.monotonic() + 60
    while place.read().state in OPEN and time.monotonic() < end:
        time.sleep(0.1)
    state = place.read().state
    typer.echo(f"run '{place.name}': {'stopping' if state in OPEN else state}")


@app.command("resume", help=RESUME_HELP)
def resume(run: Run, follow: Follow = True, coordinator: Coordinator = HERE) -> None:
    """Start it again at the SuperLink, from its own folder."""
    from strategies.coordinator.folder import CoordinatorFolder
    from strategies.coordinator.launch import resumable, watch
    from strategies.coordinator.link import control
    from strategies.coordinator.records import RunPlaces

    folder = CoordinatorFolder.open(coordinator)
    operator = control(folder)
    place = resumable(folder, RunPlaces(folder.runs).named(run).path)
    shown = place.output.stat().st_size if place.output.exists() else 0
    operator.start_run(place.settings())
    typer.echo(f"run '{place.name}' goes on", err=True)
    if follow:
        watch(folder, place, since=shown)
