"""`fedmed models`: which pretrained models there are, and what of them is on this machine."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmed.cli.carry import Name, add_commands, bar

if TYPE_CHECKING:
    from fedmed.models.registry import Entry

MODELS_HELP = """List pretrained models, fetch them, check them, carry them.

A run downloads nothing: it takes models that were pulled or imported before. What was pulled is pinned, by commit and
sha256, and kept in $FEDMED_HOME/models (else ~/.fedmed/models).

\b
Examples:
  fedmed models list
  fedmed models show rad_dino
  fedmed models pull rad_dino
  fedmed models export rad_dino rad_dino.tar
  fedmed models import rad_dino.tar
  fedmed run task=dicom task.path=data model=rad_dino adapter=lora
"""

LIST_HELP = """List the models: licence, gating, whether pinned, whether here.

Gated models are given only to those who accept their terms on the hub.

\b
Examples:
  fedmed models list
  fedmed models list --json
"""

SHOW_HELP = """Show what is known of a model, and what was tested with it.

\b
Examples:
  fedmed models show medsiglip
  fedmed models show medsiglip --json
"""

VERIFY_HELP = """Hash models again and compare with their pins.

Without a NAME: all that are here. Exit codes: 0 as pinned, 1 something differs, 2 no such model or not here.

\b
Examples:
  fedmed models verify
  fedmed models verify rad_dino minilm --json
"""

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

# Hidden: described in the help's text, where Typer 0.20 under click 8.5 would lose its line.
Names = Annotated[list[str] | None, typer.Argument(metavar="[NAME…]", hidden=True)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback(help=MODELS_HELP)
def models() -> None:
    """List, fetch, check and carry pretrained models."""


@app.command("list", help=LIST_HELP)
def list_(as_json: AsJson = False) -> None:
    """One line a model."""
    from fedmed.models.registry import entries

    found = list(entries().values())
    if as_json:
        typer.echo(json.dumps([_values(entry) for entry in found], indent=2))
        return
    heads = ("name", "modality", "licence", "gated", "pinned", "here")
    rows = [heads, *(_row(_values(entry)) for entry in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _row(values: dict[str, Any]) -> tuple[str, ...]:
    return (
        values["name"],
        values["about"]["modality"] or "-",
        values["about"]["licence"] or "-",
        "yes" if values["about"]["gated"] else "no",
        values["sha256"][:12] or "no",
        values["here"],
    )


@app.command("show", help=SHOW_HELP)
def show(name: Name, as_json: AsJson = False) -> None:
    """All that is known, and the next step."""
    from fedmed.models.registry import entry

    found = entry(name)
    values = _values(found)
    if as_json:
        typer.echo(json.dumps(values, indent=2))
        return
    for key, value in {**values.pop("about"), **values}.items():
        if value not in ("", None, {}):
            typer.echo(f"{key.replace('_', ' ')}: {_in_words(value)}")
    if values["here"] != "yes":
        typer.echo(f"next: {found.next_step}", err=True)


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key}={part}" for key, part in value.items())
    return str(value)


def _values(entry: "Entry") -> dict[str, Any]:
    """A model as JSON. `here`: yes, no, or what is wrong with it without hashing anything."""
    from fedmed.errors import ModelError
    from fedmed.schema import to_dict

    places = ("hub", "package", "revision", "sha256", "defaults")
    try:
        pin, here = entry.pin, "yes" if entry.folder and entry.folder.is_dir() else "no"
    except ModelError:
        pin, here = None, "damaged"
    return {
        "name": entry.name,
        "here": here,
        "hub": entry.hub,
        "package": entry.package,
        "revision": pin.revision if pin else str(entry.settings.get("revision") or ""),
        "sha256": pin.sha256 if pin else entry.sha256,
        "transformers": pin.transformers if pin else "",
        "folder": str(entry.folder or "") if here == "yes" else "",
        "settings": {key: value for key, value in entry.settings.items() if key not in places},
        "about": to_dict(entry.about),
    }


@app.command("verify", help=VERIFY_HELP)
def verify(names: Names = None, as_json: AsJson = False) -> None:
    """Hash, compare, end with 1 where something differs."""
    from fedmed.errors import ModelError
    from fedmed.models.registry import entries, entry

    asked = (
        [entry(name) for name in names] if names else [found for found in entries().values() if _there(found)]
    )
    results: dict[str, list[str]] = {}
    for found in asked:
        with bar("hashing") as progress:
            try:
                results[found.name] = found.differences(progress)
            except ModelError as error:
                if names and found.folder is None:
                    raise
                results[found.name] = [str(error)]
    if as_json:
        values = {name: {"ok": not words, "differences": words} for name, words in results.items()}
        typer.echo(json.dumps(values, indent=2))
    else:
        for name, words in results.items():
            typer.echo(f"{name}: {'; '.join(words) if words else 'as pinned'}")
        if not results:
            typer.echo("no model is here; see: fedmed models list")
    if any(results.values()):
        raise typer.Exit(1)


def _there(entry: "Entry") -> bool:
    """Whether something of the model is here, if only a damaged pin."""
    from fedmed.errors import ModelError

    try:
        return entry.pin is not None or bool(entry.folder and entry.folder.is_dir())
    except ModelError:
        return True


add_commands(app)
