"""`fedmed embed`: what a pretrained model makes of a site's records. Heavy imports wait until all is checked."""

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmed.cli.loading import loading

if TYPE_CHECKING:
    from fedmed.embed import Progress

EMBED_HELP = """Embed a site's records with a pretrained model.

A setting is KEY=VALUE, as in fedmed run: task and model are what counts. DIR is a new folder: embeddings.npy (records x
width, float32; numpy.load(..., mmap_mode='r')), index.csv (row, patient's number, label, part), embeddings.json (the
data's and the model's digests). It is as private as the records: no epsilon covers it. Keep it where they are.

With --texts a model of images and text (CLIP, SigLIP) embeds images and prompts in one space: texts.npy; the cosine of
a row and a prompt says how well they fit.

\b
Examples:
  fedmed embed task=heart model=minilm --site Cleveland --output cleveland
  fedmed embed experiment=demo_imaging --site Northside --output northside
  fedmed embed task=dicom task.path=sites/mercy/data model=phantom --site mercy --key sites/mercy/key --output mercy
  fedmed embed task=dicom task.path=data model=hf_image model.path=clip model.sha256=… --site a --texts prompts.txt \\
    --output a --json
  fedmed embed task=sound task.path=recordings model=hear --site mercy --output mercy      (fedmed models pull hear)
"""


def embed(
    site: Annotated[str, typer.Option(metavar="NAME", help="The site whose records are embedded.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="A new folder, as private as the records.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings, in Hydra's grammar.", show_default=False),
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts, one a line, for the model's text tower.")
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The key of a site that has a folder, for the part that it holds out."
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(metavar="NAME", help="auto (the first GPU, else the processor), cpu, cuda or cuda:N."),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compose, check, embed, write."""
    from fedmed.compose import compose
    from fedmed.config import DEVICE
    from fedmed.data.readers import version_of
    from fedmed.embed import check
    from fedmed.embed import embed as made_of
    from fedmed.embeddings import ABOUT, check_output
    from fedmed.errors import ConfigError

    if re.fullmatch(DEVICE, device) is None:
        raise ConfigError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    config = compose(list(overrides or []))
    prompts = _prompts(texts) if texts else None
    check(config.task, config.model, prompts)
    check_output(output)
    secret = _key(key) if key else None
    version_of(config.task, site)
    if config.model.pretrained:
        from fedmed.models.loading import check_digest, locate

        check_digest(config.model, locate(config.model))
    with loading("torch"):
        from fedmed.models.activations import at_home

    with _bar() as progress:
        made = made_of(
            config.task, config.model, site, seed=config.seed, key=secret, prompts=prompts, device=device,
            progress=progress,
            # A site's own folder is another place: nothing of its records is kept here.
            cache=None if key else at_home(),
        )  # fmt: skip
    made.save(output)
    if as_json:
        print(json.dumps({"folder": str(output)} | json.loads((output / ABOUT).read_text()), indent=2))
        return
    records, width = made.rows.shape
    beside = f", {len(made.texts)} prompts" if len(made.texts) else ""
    print(f"{records} records{beside}, width {width}: {output}")
    print("as private as the records: keep it where they are", file=sys.stderr)


def _prompts(path: Path) -> list[str]:
    from fedmed.errors import ConfigError

    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ConfigError(
            f"--texts {path}: {error.strerror}; expected a text file, one prompt a line"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"--texts {path}: not UTF-8; expected a text file, one prompt a line") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise ConfigError(f"--texts {path}: no prompt in it; expected one a line")
    return prompts


def _key(path: Path) -> bytes:
    from fedmed.data.split import KEY_BYTES
    from fedmed.errors import ConfigError

    try:
        key = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"--key {path}: {error.strerror}; expected the file 'key' of a site's folder"
        ) from None
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"--key {path}: expected a file of {KEY_BYTES} bytes, the file 'key' of a site's folder"
        )
    return key


@contextlib.contextmanager
def _bar() -> "Iterator[Progress | None]":
    """A live bar on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
