"""`fedmed task`: proposes the declaration of a table. pandas waits until the command runs."""

import json
import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from fedmed.cli.hospitals import add_commands

DESCRIBE_HELP = """Propose the declaration of a table, as YAML to edit.

FILE is a CSV file in UTF-8 with a header line. The proposal names the sites with their sizes, the label's
values, a range for each number and the categories of each text. All of it is read from the records: review
every line before a run on it may be called private.

\b
Examples:
  fedmed task describe patients.csv --site-column hospital --label outcome --patient-column id
  fedmed task describe patients.csv --site-column hospital --label stage --positive III --positive IV
  fedmed task describe patients.csv --site-column hospital --label outcome --output patients.yaml
  fedmed task describe patients.csv --site-column hospital --label outcome --json
"""

TASK_HELP = """Bring your own table, or make hospitals to try things on.

\b
Examples:
  fedmed task describe patients.csv --site-column hospital --label outcome --output mine.yaml
  fedmed run task=csv task.declaration=mine.yaml
  fedmed task from-npz pneumoniamnist.npz hospitals --class-names normal,pneumonia
  fedmed task phantoms hospitals
"""

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback(help=TASK_HELP)
def task() -> None:
    """Bring your own table, or make hospitals to try things on."""


@app.command("describe", help=DESCRIBE_HELP)
def describe(
    # Hidden: described in the help's text, where Typer 0.20 under click 8.5 would lose its line.
    file: Annotated[str, typer.Argument(metavar="FILE", hidden=True)],
    site_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column that names each record's site.")
    ] = None,
    label: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column that holds the outcome.")
    ] = None,
    patient_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The patient's id; without it the privacy unit is a record."),
    ] = None,
    positive: Annotated[
        list[str] | None,
        typer.Option(metavar="VALUE", help="A value of the label that means the outcome; may be repeated."),
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FILE.yaml", help="Write the YAML there instead of printing it.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file that --output names.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, with what was left out.")
    ] = False,
) -> None:
    """Read the table, print or write the proposal, say what is missing in it and what to do next."""
    if output is not None:
        _check_output(output, file, force=force)
    from fedmed.data.describe import examine, to_yaml

    proposal = examine(
        file, site_column=site_column, label=label, patient_column=patient_column, positive=positive or ()
    )
    if output is not None:
        _write(output, to_yaml(proposal.declaration))
    if as_json:
        values = {
            "declaration": proposal.declaration, "left_out": proposal.left_out, "remarks": proposal.remarks
        }  # fmt: skip
        typer.echo(json.dumps(values, indent=2))
    elif output is None:
        typer.echo(to_yaml(proposal.declaration), nl=False)
    for name, reason in proposal.left_out.items():
        typer.echo(f"left out: {name} ({reason})", err=True)
    for remark in proposal.remarks:
        typer.echo(f"note: {remark}", err=True)
    typer.echo(_next(output), err=True)


def _next(output: str | None) -> str:
    """The commands that follow."""
    run = f"fedmed run task=csv {_override(output or 'FILE.yaml')}"
    if output is None:
        return f"next: write it to a file (--output FILE.yaml), review every line, then: {run}"
    return f"next: review every line of {output} and set 'declare: declared' (until then: NOT PRIVATE), then: {run}"


def _override(path: str) -> str:
    """The setting as a shell and Hydra's grammar read it."""
    if not re.fullmatch(r"[\w./+-]+", path, re.ASCII):
        escaped = path.replace("\\", "\\\\").replace('"', '\\"')
        path = f'"{escaped}"'
    return shlex.quote(f"task.declaration={path}") if '"' in path else f"task.declaration={path}"


def _check_output(output: str, file: str, *, force: bool) -> None:
    from fedmed.errors import ConfigError

    path = Path(output)
    if path.is_dir():
        raise ConfigError(f"--output={output}: a folder; expected the name of a file")
    if not path.parent.is_dir():
        raise ConfigError(f"--output={output}: no folder '{path.parent}'")
    if path.exists() and Path(file).exists() and path.samefile(file):
        raise ConfigError(f"--output={output}: is the table itself")
    if path.exists() and not force:
        raise ConfigError(f"--output={output}: exists already; replace it with --force")


def _write(output: str, text: str) -> None:
    from fedmed.atomic import write_bytes
    from fedmed.errors import ConfigError

    try:
        write_bytes(Path(output), text.encode())
    except OSError as error:
        raise ConfigError(f"--output={output}: cannot be written ({error.strerror})") from None


add_commands(app)
