"""From the folder of a PACS export to a data set: read, quarantine, assemble, write."""

import contextlib
import csv
import fcntl
import hashlib
import io
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedmed.atomic import write_bytes
from fedmed.dicom.assemble import Assembled, assemble
from fedmed.dicom.contact_sheet import contact_sheet
from fedmed.dicom.discover import Found, discover
from fedmed.dicom.journal import Journal, unwritable
from fedmed.dicom.labels import Labels, read_labels
from fedmed.dicom.options import Options
from fedmed.dicom.reasons import Reason
from fedmed.dicom.store import MANIFEST, write_store
from fedmed.dicom.workers import Workers
from fedmed.errors import DataError

READER = "dicom/1"
WORK = ".ingest"
QUARANTINE, UNMATCHED, SHEET, DEIDENTIFIED = "quarantine.csv", "unmatched.csv", "contact-sheet.png", "dicom"
# Settings that change neither what is read nor what is kept of it.
_HOW = ("workers", "seconds", "memory_mb")

# Called with the files that are done, those there are, and those in quarantine.
Progress = Callable[[int, int, int], None]


def ingest(
    source: str | Path,
    destination: str | Path,
    *,
    key: bytes,
    labels: str | Path | None = None,
    label_column: str = "label",
    classes: tuple[str, ...] = (),
    options: Options | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make a data set of a PACS export, and return its manifest.

    Killed at any instant, it goes on from there when it is called again with the same settings. Until it is done the
    destination holds no manifest, and so no data set.

    Args:
        source: a folder of DICOM files, or a DICOMDIR.
        destination: a folder that is made, private to its owner.
        key: the site's secret: of the pseudonyms, and of the hashes that stand in for UIDs.
        labels: a CSV file with a column StudyInstanceUID, SOPInstanceUID or PatientID, and one of classes.
        classes: the classes that may occur in it; empty: any.
        replace: make the data set anew where the destination has one.

    Raises:
        DataError: nothing can be read or kept, or `labels` cannot be used. What single files lack raises nothing: they
            are in quarantine, with a reason.
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    options = options or Options()
    read = read_labels(Path(labels), key=key, label_column=label_column, classes=classes) if labels else None
    if not source.exists():
        raise DataError(f"{source}: no such folder")
    found = discover(source, leave_out=destination)
    with _working_folder(destination, replace=replace) as work:
        outcomes = _read_all(found, work, key, options, progress)
        return _write(destination, work, found, outcomes, read, options)


@contextlib.contextmanager
def _working_folder(destination: Path, *, replace: bool) -> Iterator[Path]:
    """The folder of half-done work, ours alone while we use it."""
    try:
        if destination.is_file():
            raise DataError(f"{destination}: a file; expected a folder, or a name for a new one")
        work = destination / WORK
        if destination.is_dir():
            _check_destination(destination, begun=work.is_dir(), replace=replace)
        destination.mkdir(mode=0o700, parents=True, exist_ok=True)
        work.mkdir(mode=0o700, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise DataError(f"{destination}: cannot be written ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{destination}: another ingestion is writing there") from None
        yield work


def _check_destination(destination: Path, *, begun: bool, replace: bool) -> None:
    if (destination / MANIFEST).exists():
        if not replace:
            raise DataError(f"{destination}: holds a data set already; make it anew with --replace")
    elif any(destination.iterdir()) and not begun:
        raise DataError(f"{destination}: holds other files; expected a new or an empty folder")


def _read_all(
    found: Found, work: Path, key: bytes, options: Options, progress: Progress | None
) -> dict[str, dict[str, Any]]:
    """Every file's outcome: those that are known from before, and the rest by workers."""
    settings = asdict(options)
    about = {name: value for name, value in settings.items() if name not in _HOW} | {
        "reader": READER,
        "root": os.fspath(found.root.resolve()),
        # Says which key, and not the key.
        "key": hashlib.sha256(b"fedmed ingest\0" + key).hexdigest(),
    }
    # As JSON gives it back.
    about = {name: list(value) if isinstance(value, tuple) else value for name, value in about.items()}
    journal = Journal(work, about=about)
    try:
        outcomes = {
            file: outcome
            for file, status in found.files.items()
            if (outcome := journal.known(file, status)) is not None and _there(work, outcome)
        }
        todo = [file for file in found.files if file not in outcomes]
        quarantined = sum("reason" in outcome for outcome in outcomes.values())
        count = options.workers or os.cpu_count() or 1
        settings |= {"key": key.hex(), "folder": os.fspath(work)}
        with Workers(count, seconds=options.seconds, settings=settings) as workers:
            for index, outcome in workers.read([found.root / file for file in todo]):
                if "fatal" in outcome:
                    raise unwritable(work.parent, outcome["fatal"])
                file = todo[index]
                journal.add(file, found.files[file], outcome)
                outcomes[file] = outcome
                quarantined += "reason" in outcome
                if progress:
                    progress(len(outcomes), len(found.files), quarantined)
    finally:
        journal.close()
    return {file: outcomes[file] for file in found.files}


def _there(work: Path, outcome: dict[str, Any]) -> bool:
    """Whether the pixels that an outcome speaks of are on the disk."""
    if "reason" in outcome:
        # Another limit, another outcome.
        return outcome["reason"] not in (Reason.TOO_SLOW, Reason.TOO_LARGE, Reason.NO_PERMISSION)
    try:
        return (work / outcome["part"]).stat().st_size >= outcome["offset"] + outcome["bytes"]
    except OSError:
        return False


def _write(
    destination: Path,
    work: Path,
    found: Found,
    outcomes: dict[str, dict[str, Any]],
    labels: Labels | None,
    options: Options,
) -> dict[str, Any]:
    assembled = assemble(outcomes, labels, work=work)
    quarantine = assembled.quarantine | found.unread
    counts = dict(sorted(Counter(reason.value for reason in quarantine.values()).items()))
    try:
        (destination / MANIFEST).unlink(missing_ok=True)
        reasons = ([path, reason.value, reason.meaning] for path, reason in sorted(quarantine.items()))
        _write_table(destination / QUARANTINE, ["path", "reason", "meaning"], reasons)
        unmatched = [
            *(["row of the labels", f"line {line}"] for line in assembled.unmatched_rows),
            *(["image", path] for path in assembled.unmatched_images),
        ]
        _write_table(destination / UNMATCHED, ["what", "where"], unmatched)
        if not assembled.images:
            listed = ", ".join(f"{count} x {reason}" for reason, count in counts.items())
            raise DataError(f"no image can be used ({listed}); see {destination / QUARANTINE}")
        _deidentified(destination, work, assembled, options)
        write_bytes(destination / SHEET, contact_sheet(assembled.images))
        (destination / SHEET).chmod(0o600)
        manifest = write_store(
            destination,
            images=(image.load() for image in assembled.images),
            size=options.size,
            reader=READER,
            quarantine=counts,
            labels={
                "unmatched_rows": len(assembled.unmatched_rows),
                "unmatched_images": len(assembled.unmatched_images),
            },
            warnings=assembled.warnings,
            deidentified=options.deidentify,
        )
    except OSError as error:
        raise unwritable(destination, error.strerror) from None
    shutil.rmtree(work)
    return manifest


def _deidentified(destination: Path, work: Path, assembled: Assembled, options: Options) -> None:
    """Move the de-identified files of what was kept to where they stay."""
    target = destination / DEIDENTIFIED
    shutil.rmtree(target, ignore_errors=True)
    if options.deidentify:
        target.mkdir(mode=0o700)
        for name in {found["deidentified"] for image in assembled.images for found in image.facts.values()}:
            (target / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # A copy where links are not known: the original stays until the manifest is written.
            try:
                os.link(work / DEIDENTIFIED / name, target / name)
            except OSError:
                shutil.copyfile(work / DEIDENTIFIED / name, target / name)


def _write_table(path: Path, header: list[str], rows: Iterable[list[str]]) -> None:
    """A CSV for the eyes of the site's engineer: it names files."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode(errors="surrogateescape"))
    path.chmod(0o600)
