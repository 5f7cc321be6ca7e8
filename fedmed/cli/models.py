"""`fedmed models`: which pretrained models there are, and what of them is on this machine."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedmed.models.pins import Pin, Progress
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

PULL_HELP = """Fetch a model from the Hugging Face hub and pin it.

NAME is one that `fedmed models list` shows, or any ORG/NAME of the hub. Only safetensors, settings and vocabularies
are fetched, at one commit, never code or pickles. For gated models accept the terms on their page, then set HF_TOKEN.
A model that is here already is hashed, and fetched again where it was damaged.

\b
Examples:
  fedmed models pull rad_dino
  HF_TOKEN=… fedmed models pull medsiglip
  fedmed models pull facebook/dinov2-small --revision refs/pr/3
  fedmed models pull rad_dino --revision main --replace
"""

VERIFY_HELP = """Hash models again and compare with their pins.

Without a NAME: all that are here. Exit codes: 0 as pinned, 1 something differs, 2 no such model or not here.

\b
Examples:
  fedmed models verify
  fedmed models verify rad_dino minilm --json
"""

EXPORT_HELP = """Write a pulled model to one file, for machines without internet.

FILE is a plain tar. Whether a licence allows passing the model on is yours to check: some do not.

\b
Examples:
  fedmed models export rad_dino rad_dino.tar
"""

IMPORT_HELP = """Take in what `fedmed models export` wrote.

Every file must have the name, size and sha256 that the tar's first member says before any is visible. Whoever made
the file says those, too: compare the sha256 that is printed with the one that the exporting side sees.

\b
Examples:
  fedmed models import rad_dino.tar
  fedmed models import rad_dino.tar --sha256 DIGEST
"""

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

# Hidden: described in the help's text, where Typer 0.20 under click 8.5 would lose its line.
Name = Annotated[str, typer.Argument(metavar="NAME", hidden=True)]
Names = Annotated[list[str] | None, typer.Argument(metavar="[NAME…]", hidden=True)]
File = Annotated[Path, typer.Argument(metavar="FILE", hidden=True)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Replace = Annotated[bool, typer.Option("--replace", help="In place of another version that is here.")]
Sha256 = Annotated[str, typer.Option(metavar="DIGEST", help="What model.safetensors must have.")]


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


@app.command("pull", help=PULL_HELP)
def pull(
    name: Name,
    revision: Annotated[
        str, typer.Option(metavar="COMMIT", help="A commit, branch or tag, which is resolved to its commit.")
    ] = "",
    replace: Replace = False,
) -> None:
    """Fetch, pin, say how to use it."""
    from fedmed.errors import ModelError
    from fedmed.models.pull import pull as pull_model
    from fedmed.models.registry import entry

    found = entry(name)
    if not found.hub:
        raise ModelError(f"{found.name}: is not pulled from the hub; {found.next_step}")
    _go_online()
    own = str(found.settings.get("revision") or "")
    with _bar("hashing") as progress:
        pulled = pull_model(
            found.hub, revision=revision or own, sha256="" if revision not in ("", own) else found.sha256,
            replace=replace, progress=progress,
        )  # fmt: skip
    pin = pulled.pin
    asked = revision or own or "main"
    commit = pin.revision if asked in (pin.revision, "") else f"{asked}, which is {pin.revision}"
    typer.echo(f"{found.hub} at {commit if pulled.fetched else pin.revision}")
    _say(pin, "pulled" if pulled.fetched else "here already, as pinned")
    if pulled.fetched and found.about.gated:
        typer.echo(
            "note: gated: each site accepts the terms itself, or its licence must allow passing it on",
            err=True,
        )
    _say_next(pin, found)


def _go_online() -> None:
    """Allow downloads where only fedmed's own default forbids them."""
    from fedmed.cli.main import defaulted

    if "HF_HUB_OFFLINE" in defaulted:
        os.environ["HF_HUB_OFFLINE"] = "0"


def _say(pin: "Pin", what: str) -> None:
    typer.echo(f"{what}: {len(pin.files)} files, {pin.total_bytes / 1e6:.1f} MB, in {pin.folder}")
    typer.echo(f"sha256 of model.safetensors: {pin.sha256}")


def _say_next(pin: "Pin", entry: "Entry") -> None:
    option = (
        f"model={entry.name}"
        if entry.name != pin.hub
        else f"model=hf_image model.hub={pin.hub} (text: model=hf …)"
    )
    typer.echo(
        f"next: {option}; the sites list in site.yaml: {{id: {pin.hub}, sha256: {pin.sha256}}}", err=True
    )


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
        with _bar("hashing") as progress:
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


@app.command("export", help=EXPORT_HELP)
def export(
    name: Name,
    file: File,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
) -> None:
    """Write the tar, say what to compare."""
    from fedmed.errors import ModelError
    from fedmed.models.archive import export as export_model
    from fedmed.models.registry import entry

    found = entry(name)
    pin = found.pin
    if pin is None:
        carried = f"comes in the Python package {found.package.partition(':')[0]}: carry its wheel"
        raise ModelError(f"{found.name}: {carried if found.package else f'not pulled; {found.next_step}'}")
    with _bar("exporting") as progress:
        export_model(pin, file, force=force, progress=progress)
    typer.echo(f"{file}: {file.stat().st_size / 1e6:.1f} MB; {pin.hub} at {pin.revision}")
    typer.echo(f"sha256 of model.safetensors: {pin.sha256}")
    if found.about.licence:
        typer.echo(f"note: its licence: {found.about.licence}; does it allow passing the model on?", err=True)
    typer.echo(f"next, there: fedmed models import {file.name} --sha256 {pin.sha256}", err=True)


@app.command("import", help=IMPORT_HELP)
def import_(file: File, sha256: Sha256 = "", replace: Replace = False) -> None:
    """Unpack, say what came."""
    from fedmed.models.archive import import_ as import_model
    from fedmed.models.registry import entries, entry

    # What fedmed's own file of the model pins holds, whatever the tar says.
    pinned = {found.hub: found.sha256 for found in entries().values() if found.hub and found.sha256}
    with _bar("importing") as progress:
        pin = import_model(file, sha256=sha256, pinned=pinned, replace=replace, progress=progress)
    typer.echo(f"{pin.hub} at {pin.revision}")
    _say(pin, "imported")
    _say_next(pin, entry(pin.hub))


@contextlib.contextmanager
def _bar(title: str) -> Iterator["Progress | None"]:
    """A live bar on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(title, total=None)
        yield lambda name, done, total: shown.update(
            task, description=f"{title} {name}", completed=done, total=total
        )
