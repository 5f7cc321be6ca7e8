"""`fedmed task from-npz` and `fedmed task phantoms`: hospitals as DICOM. Heavy imports wait until a command runs."""

import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedmed.dicom.synthetic.tree import Written

NPZ_HELP = """Make DICOM hospitals out of labelled images.

FILE is a .npz file as MedMNIST writes it (train_images, train_labels, …; uint8; grey or RGB); OUT is a new folder.
Patients are made up, each with images of one class. Hospitals differ in their scanners: size, bit depth, MONOCHROME1,
RLE, JPEG 2000, contrast, noise, blur. All compression is lossless.

\b
Examples:
  fedmed task from-npz pneumoniamnist.npz hospitals --class-names normal,pneumonia
  fedmed task from-npz pneumoniamnist.npz hospitals --label-skew 0.5 --images-per-patient 1-4
  fedmed task from-npz bloodmnist.npz hospitals --hospitals 5 --scanner-shift 0 --positive 3
  fedmed task from-npz pneumoniamnist.npz hospitals --hospitals 2 --prevalences 0.3,0.6 --json
"""

PHANTOMS_HELP = """Make DICOM hospitals of chest phantoms.

Synthetic X-rays, in part of them an opacity.

OUT is a new folder: for each hospital DICOM files and labels (clear, opacity). A patient's images share the anatomy.

\b
Examples:
  fedmed task phantoms hospitals
  fedmed task phantoms hospitals --patients 100 --images-per-patient 1-6 --difficulty 2
  fedmed task phantoms hospitals --name Northside --name Riverbank --seed 1 --json
"""

# Hidden: described in the help's text, where Typer 0.20 under click 8.5 would lose its line.
File = Annotated[str, typer.Argument(metavar="FILE", hidden=True)]
Out = Annotated[str, typer.Argument(metavar="OUT", hidden=True)]
Name = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="A hospital's name; repeat it for each.")
]
PerPatient = Annotated[
    str, typer.Option(metavar="LOW-HIGH", help="Images a patient, drawn evenly; or one number.")
]
Prevalences = Annotated[
    str | None, typer.Option(metavar="A,B,…", help="Share of positive patients of each hospital, 0 to 1.")
]
Shift = Annotated[
    float,
    typer.Option(metavar="0…3", help="How far scanners differ in size and grey values; 0: only in encoding."),
]
Key = Annotated[str, typer.Option(metavar="COLUMN", help="StudyInstanceUID, SOPInstanceUID or PatientID.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Of everything random.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def add_commands(app: typer.Typer) -> None:
    """Add the two commands to `fedmed task`."""
    app.command("from-npz", help=NPZ_HELP)(from_npz)
    app.command("phantoms", help=PHANTOMS_HELP)(phantoms)


def from_npz(
    file: File,
    out: Out,
    hospitals: Annotated[int, typer.Option(metavar="N", help="How many hospitals.")] = 3,
    name: Name = None,
    split: Annotated[str, typer.Option(metavar="SPLIT", help="train, val, test, or all.")] = "train",
    class_names: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Names of the labels 0, 1, …; else the numbers.")
    ] = None,
    positive: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A class that means the outcome; else the last one."),
    ] = None,
    label_skew: Annotated[
        float | None,
        typer.Option(
            metavar="ALPHA", help="Dirichlet's alpha: 0.1 strong, 1 moderate, 100 hardly any; else none."
        ),
    ] = None,
    prevalences: Prevalences = None,
    images_per_patient: PerPatient = "1",
    scanner_shift: Shift = 0.5,
    key: Key = "StudyInstanceUID",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Read the arrays, write the folder, say what comes next."""
    _check_installed()
    from fedmed.dicom.synthetic.hospitals import make_hospitals
    from fedmed.dicom.synthetic.npz import read_npz
    from fedmed.dicom.synthetic.tree import check_out

    check_out(out)
    few_most, shares = _range(images_per_patient), _numbers("--prevalences", prevalences)
    images, labels = read_npz(file, split)
    with _bar() as progress:
        written = make_hospitals(
            images, labels, out, hospitals=hospitals, names=name or None, positive=positive or None,
            class_names=None if class_names is None else [text.strip() for text in class_names.split(",")],
            label_skew=label_skew, prevalences=shares, images_per_patient=few_most, scanner_shift=scanner_shift,
            key=key, seed=seed, progress=progress,
        )  # fmt: skip
    _say(written, out, as_json=as_json)


def phantoms(
    out: Out,
    name: Name = None,
    patients: Annotated[int, typer.Option(metavar="N", help="Patients of each hospital.")] = 300,
    prevalences: Prevalences = None,
    images_per_patient: PerPatient = "1-4",
    size: Annotated[int, typer.Option(metavar="PIXELS", help="Rows and columns before the scanner.")] = 64,
    difficulty: Annotated[
        float, typer.Option(metavar="X", help="Divides the opacities' contrast: 0.5 easy, 3 nearly hopeless.")
    ] = 1.0,
    scanner_shift: Shift = 0.5,
    key: Key = "StudyInstanceUID",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Draw the phantoms, write the folder, say what comes next."""
    _check_installed()
    from fedmed.dicom.synthetic.hospitals import PHANTOM_NAMES, write_phantom_hospitals

    few_most, shares = _range(images_per_patient), _numbers("--prevalences", prevalences)
    with _bar() as progress:
        written = write_phantom_hospitals(
            out, names=name or PHANTOM_NAMES, patients=patients, prevalences=shares, size=size,
            images_per_patient=few_most, difficulty=difficulty, scanner_shift=scanner_shift, key=key, seed=seed,
            progress=progress,
        )  # fmt: skip
    _say(written, out, as_json=as_json)


def _check_installed() -> None:
    from fedmed.errors import ConfigError

    for module in ("pydicom", "openjpeg", "rle"):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"'{module}' is not installed; install it with: pip install 'fedmed[dicom]'")


def _range(text: str) -> tuple[int, int]:
    """`3` or `1-4`."""
    from fedmed.errors import ConfigError

    low, dash, high = text.partition("-")
    try:
        return int(low), int(high if dash else low)
    except ValueError:
        raise ConfigError(f"--images-per-patient={text}: expected a number, or two as in 1-4") from None


def _numbers(option: str, text: str | None) -> list[float] | None:
    from fedmed.errors import ConfigError

    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option}={text}: expected numbers as in 0.2,0.4") from None


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int], None] | None]:
    """A live bar on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("writing DICOM"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def _say(written: "Written", out: str, *, as_json: bool) -> None:
    """What was made, in words or as JSON; then the commands that follow."""
    if as_json:
        from dataclasses import asdict

        typer.echo(json.dumps(asdict(written) | {"next": written.commands(folder=out)}, indent=2))
        return
    for hospital in written.hospitals:
        classes = ", ".join(f"{count} {label}" for label, count in hospital.by_label.items())
        counts = f"{hospital.patients} patients ({classes}), {hospital.images} images"
        typer.echo(f"{hospital.name}: {counts}, scanner {hospital.scanner}")
    if written.left_out["images"]:
        left = f"{written.left_out['patients']} patients with {written.left_out['images']} images"
        typer.echo(f"left out: {left}, for whom the prevalences have no room", err=True)
    typer.echo(f"folder: {out}")
    typer.echo("next:\n  " + "\n  ".join(written.commands(folder=out)), err=True)
