"""`fedmed models pull`, `export` and `import`. Heavy imports wait until a command runs."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedmed.models.pins import Pin, Progress
    from fedmed.models.registry import Entry

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

EXPORT_HELP = """Write a pulled model to one file, for machines without internet.

FILE is a plain tar. Whether a licence allows passing the model on is yours to check: some do not.

\b
Examples:
  fedmed models export rad_dino rad_dino.tar
"""

IMPORT_HELP = """Take in an exported file, or a folder of converted weights.

Of a tar every file must have the name, size and sha256 that the tar's first member says before any is visible.
Whoever made the tar says those, too: compare the sha256 that is printed with the one that the exporting side sees.
A folder, as save_pretrained writes it, is copied and pinned as local/NAME, and can be exported from then on.

\b
Examples:
  fedmed models import rad_dino.tar
  fedmed models import rad_dino.tar --sha256 DIGEST
  fedmed models import converted --name uni
"""

# Hidden: described in the help's text, where Typer 0.20 under click 8.5 would lose its line.
Name = Annotated[str, typer.Argument(metavar="NAME", hidden=True)]
File = Annotated[Path, typer.Argument(metavar="FILE", hidden=True)]
Replace = Annotated[bool, typer.Option("--replace", help="In place of another version that is here.")]


def add_commands(app: typer.Typer) -> None:
    """Add the three commands to `fedmed models`."""
    app.command("pull", help=PULL_HELP)(pull)
    app.command("export", help=EXPORT_HELP)(export)
    app.command("import", help=IMPORT_HELP)(import_)


def pull(
    name: Name,
    revision: Annotated[
        str, typer.Option(metavar="COMMIT", help="A commit, branch or tag, which is resolved to its commit.")
    ] = "",
    replace: Replace = False,
) -> None:
    """Fetch, pin, say how to use it."""
    from fedmed.errors import ModelError
    from fedmed.models.pins import LOCAL
    from fedmed.models.pull import pull as pull_model
    from fedmed.models.registry import entry

    found = entry(name)
    if not found.hub or found.hub.startswith(LOCAL):
        raise ModelError(f"{found.name}: is not pulled from the hub; {found.next_step}")
    _go_online()
    own = str(found.settings.get("revision") or "")
    with bar("pulling") as progress:
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
        raise ModelError(f"{found.name}: {carried if found.package else f'not here; {found.next_step}'}")
    with bar("exporting") as progress:
        export_model(pin, file, force=force, progress=progress)
    typer.echo(f"{file}: {file.stat().st_size / 1e6:.1f} MB; {pin.hub} at {pin.revision}")
    typer.echo(f"sha256 of model.safetensors: {pin.sha256}")
    if found.about.licence:
        typer.echo(f"note: its licence: {found.about.licence}; does it allow passing the model on?", err=True)
    typer.echo(f"next, there: fedmed models import {file.name} --sha256 {pin.sha256}", err=True)


def import_(
    file: File,
    sha256: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="What the tar's model.safetensors must have.")
    ] = None,
    name: Annotated[str, typer.Option(metavar="NAME", help="Of a folder: its name here.")] = "",
    replace: Replace = False,
) -> None:
    """Unpack or copy, say what came."""
    from fedmed.errors import require
    from fedmed.models.archive import import_ as import_model
    from fedmed.models.registry import entries, entry
    from fedmed.models.take_in import take_in
    from fedmed.pretrained import DIGEST

    folder = file.is_dir()
    expected = "a name for the model in a folder" if folder else "none: a tar says itself what it holds"
    require(bool(name) == folder, "--name", name or "''", expected)
    # A shell variable that is not set would check nothing.
    require(
        sha256 is None or bool(DIGEST.fullmatch(sha256)), "--sha256", sha256 or "''", "64 hexadecimal digits"
    )
    # What fedmed's own file of a model pins holds, whatever a tar says.
    pinned = {found.hub: found.sha256 for found in entries().values() if found.hub and found.sha256}
    with bar("importing") as progress:
        if name:
            pin = take_in(file, name, replace=replace, progress=progress)
        else:
            pin = import_model(file, sha256=sha256 or "", pinned=pinned, replace=replace, progress=progress)
    typer.echo(f"{pin.hub} at {pin.revision}")
    _say(pin, "imported")
    _say_next(pin, entry(pin.hub))


@contextlib.contextmanager
def bar(title: str) -> Iterator["Progress | None"]:
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
