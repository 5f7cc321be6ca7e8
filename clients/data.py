"""`fedmed site ingest` and `fedmed site data`: from a PACS export to a data set, and a look at it."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmed.dicom.options import BURNED_IN, MODALITIES

if TYPE_CHECKING:
    from fedmed.dicom.ingest import Progress

INGEST_HELP = f"""Make a data set of a PACS export.

SRC is a folder of DICOM files, or a DICOMDIR; DST a folder for the data set, private to its owner. Images of
{", ".join(MODALITIES)} are read; the slices of a CT or MR series become one volume. A file that cannot be used is
put into quarantine.csv with a reason, and ends nothing. Interrupted or killed, the same command goes on.

FILE.csv has a column StudyInstanceUID, SOPInstanceUID or PatientID, and a column of classes.

Nothing reads the pixels for burned-in text: files that say they have it, and kinds of files that often do (ultrasound,
secondary captures), are refused. --burned-in mask blanks what lies outside an ultrasound's regions, and where --regions
says that a device writes: a CSV with the columns manufacturer,model,modality,rows,columns,top,left,bottom,right.
Look at contact-sheet.png.

\b
Examples:
  fedmed site ingest /export/2026 /srv/fedmed/chest --labels labels.csv --site /srv/fedmed/site
  fedmed site ingest /media/cd/DICOMDIR /srv/fedmed/ct --window -600,1500 --site /srv/fedmed/site
  fedmed site ingest export chest --labels labels.csv --deidentify --modified-dates --burned-in mask
  fedmed site ingest export/mercy data/mercy --labels labels.csv --name mercy   # a simulated site
"""

DATA_HELP = """Look at data sets.

\b
Examples:
  fedmed site data show /srv/fedmed/chest
"""

SHOW_HELP = """Say in words what a data set holds, and what was left out of it.

\b
Examples:
  fedmed site data show /srv/fedmed/chest
  fedmed site data show /srv/fedmed/chest --check     # also read every byte
  fedmed site data show /srv/fedmed/chest --json
"""

data = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


def add_commands(site: typer.Typer) -> None:
    """Add what concerns a site's data to `fedmed site`."""
    site.command("ingest", help=INGEST_HELP)(ingest_command)
    site.add_typer(data, name="data")


# Hidden: described in the help's text, where Typer 0.20 under click 8.5 would lose its line.
def ingest_command(
    source: Annotated[Path, typer.Argument(metavar="SRC", hidden=True)],
    destination: Annotated[Path, typer.Argument(metavar="DST", hidden=True)],
    labels: Annotated[Path | None, typer.Option(metavar="FILE.csv", help="Which class each has.")] = None,
    label_column: Annotated[str, typer.Option(metavar="NAME", help="The column of classes.")] = "label",
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="NAME", help="A class that may occur; may be repeated. None: any."),
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option(
            "--site", envvar="FEDMED_SITE", metavar="DIR", help="The site's folder; else FEDMED_SITE."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of a simulated site that has no folder.")
    ] = None,
    size: Annotated[
        int, typer.Option(metavar="PIXELS", help="Longest side that is kept; 0: as it is.")
    ] = 256,
    modality: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="One to read; may be repeated. None: all.")
    ] = None,
    window: Annotated[
        str | None, typer.Option(metavar="CENTRE,WIDTH", help="Of every CT image, in HU; else its own.")
    ] = None,
    deidentify: Annotated[
        bool, typer.Option("--deidentify", help="Also write the files de-identified (PS3.15 Annex E).")
    ] = False,
    modified_dates: Annotated[
        bool,
        typer.Option("--modified-dates", help="In them, shift dates by a secret number of days a patient."),
    ] = False,
    keep_uids: Annotated[
        bool, typer.Option("--keep-uids", help="In them, keep UIDs, which lead back to the originals.")
    ] = False,
    burned_in: Annotated[
        str, typer.Option(metavar="|".join(BURNED_IN), help="Images in whose pixels text may stand.")
    ] = "refuse",
    regions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv", help="Where devices write text: see the documentation of --burned-in."
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Make an existing data set anew.")] = False,
    workers: Annotated[int, typer.Option(metavar="N", help="Processes; 0: one a core.")] = 0,
    seconds: Annotated[float, typer.Option(metavar="N", help="Longest time on one file.")] = 60.0,
    memory: Annotated[int, typer.Option(metavar="MIB", help="Largest memory of a process.")] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Read the export, say what became of it."""
    from clients.data_words import in_words
    from fedmed.dicom.options import Options
    from fedmed.errors import Interrupted, require

    require(not classes or labels is not None, "--class", ",".join(classes or ()), "only with --labels")
    options = Options(
        size=size, modalities=tuple(modality or MODALITIES), window=_window(window), deidentify=deidentify,
        modified_dates=modified_dates, keep_uids=keep_uids, burned_in=burned_in, regions=_regions(regions),
        workers=workers, seconds=seconds, memory_mb=memory,
    )  # fmt: skip
    key = _key(site, name)
    ingest = _import_ingest()
    try:
        with _progress() as progress:
            manifest = ingest(
                source, destination, key=key, labels=labels, label_column=label_column, classes=tuple(classes or ()),
                options=options, replace=replace, progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise Interrupted(f"{destination}: interrupted; the same command goes on from here") from None
    typer.echo(_as_json(manifest) if as_json else in_words(destination, manifest))


@data.callback(help=DATA_HELP)
def data_group() -> None:
    """Look at data sets."""


@data.command("show", help=SHOW_HELP)
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", hidden=True)],
    check: Annotated[bool, typer.Option("--check", help="Hold every byte against the manifest.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Open the data set, print what its manifest says."""
    from clients.data_words import in_words
    from fedmed.dicom.store import ImageStore

    manifest = ImageStore.open(folder, verify=check).manifest
    typer.echo(_as_json(manifest) if as_json else in_words(folder, manifest, checked=check))


def _import_ingest() -> Any:
    from fedmed.errors import ConfigError

    try:
        from fedmed.dicom.ingest import ingest
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"reading DICOM needs {error.name}: python -m pip install 'fedmed[dicom]'"
        ) from None
    return ingest


def _window(text: str | None) -> tuple[float, float] | None:
    from fedmed.errors import ConfigError

    if text is None:
        return None
    try:
        centre, width = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--window={text}: expected CENTRE,WIDTH in Hounsfield units, e.g. -600,1500"
        ) from None
    return centre, width


def _regions(path: Path | None) -> tuple[dict[str, Any], ...]:
    if path is None:
        return ()
    from fedmed.dicom.deid.burned_in import read_regions

    return read_regions(path)


def _key(site: Path | None, name: str | None) -> bytes:
    from fedmed.data.split import site_key
    from fedmed.errors import ConfigError

    # An option that somebody wrote comes before a variable that was set some day.
    if name is not None:
        return site_key(name)
    if site is not None:
        from clients.folder import SiteFolder

        return SiteFolder.open(site).split_key
    raise ConfigError("whose data? name the site's folder: --site DIR (or, of a simulated site, --name NAME)")


@contextmanager
def _progress() -> "Iterator[Progress | None]":
    """A bar on standard error; nothing where nobody looks."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("reading"), bars.BarColumn(), bars.MofNCompleteColumn(), bars.TextColumn("{task.fields[left]}"),
        bars.TimeRemainingColumn(),
    )  # fmt: skip
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=None, left="")

        def show(done: int, total: int, quarantined: int) -> None:
            bar.update(task, completed=done, total=total, left=f"{quarantined} in quarantine")

        yield show


def _as_json(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=2, allow_nan=False)
