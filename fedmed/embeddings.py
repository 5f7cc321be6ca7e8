"""What a pretrained model makes of each record of one site: a memory-mapped array, tied to the data and the model.

A folder of embeddings is as private as the records that they are of: embeddings can be inverted, and each row stands
beside its label. Nothing here is covered by an epsilon; nothing here leaves the machine.
"""

import csv
import hashlib
import io
import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.atomic import write_bytes, write_json
from fedmed.data.dataset import SiteDataset
from fedmed.errors import DataError

FORMAT = "fedmed embeddings 1"
ROWS, TEXTS, INDEX, ABOUT = "embeddings.npy", "texts.npy", "index.csv", "embeddings.json"
COLUMNS = ("row", "patient", "label", "part")
Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Embeddings of all usable records of one site.

    Attributes:
        rows: (records, width) float32; of an opened folder memory-mapped, read-only.
        patients: (records,) int64, the same number for all records of a patient; the number names nobody.
        labels: (records,) float32 of 0 and 1.
        test: (records,) bool: whether the task's split holds the record's patient out.
        texts: (prompts, width) float32 in the same space; of no prompt (0, width).
        about: what embeddings.json says: the data, the model, the versions.
    """

    rows: Floats
    patients: NDArray[np.int64]
    labels: Floats
    test: NDArray[np.bool_]
    texts: Floats
    about: dict[str, Any] = field(repr=False)

    def save(self, folder: Path) -> None:
        """Write a new folder, for its owner alone, whole or not at all.

        Raises:
            DataError: something is there already, or it cannot be written.
        """
        check_output(folder)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Private from the first byte: mkdtemp gives 0700.
            draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
        except OSError as error:
            raise DataError(f"--output {folder}: cannot be written ({error.strerror})") from None
        try:
            files = {ROWS: _npy(self.rows), INDEX: self._index()}
            if len(self.texts):
                files[TEXTS] = _npy(self.texts)
            for name, content in files.items():
                write_bytes(draft / name, content)
            sums = {name: _file(content) for name, content in files.items()}
            write_json(draft / ABOUT, self.about | {"files": sums})
            for path in draft.iterdir():
                path.chmod(0o600)
            # Onto an empty folder as well, and onto nothing else.
            os.rename(draft, folder)
        except OSError as error:
            raise DataError(f"--output {folder}: cannot be written ({error.strerror})") from None
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    @classmethod
    def open(cls, folder: Path) -> "Embeddings":
        """What `save` wrote: every file is held against its digest before anything is used.

        Raises:
            DataError: a file is missing, is not the one that was written, or does not fit the others.
        """
        about = _read_about(folder)
        try:
            for name, expected in about["files"].items():
                if Path(name).name != name or _digest(folder / name) != expected:
                    raise DataError(f"{folder / name}: not the file that was written; embed the data again")
            rows = np.load(folder / ROWS, mmap_mode="r", allow_pickle=False)
            texts = np.zeros((0, rows.shape[1]), dtype=np.float32)
            if about["prompts"]:
                texts = np.load(folder / TEXTS, allow_pickle=False)
            with (folder / INDEX).open(newline="") as file:
                table = list(csv.DictReader(file))
            fits = list(rows.shape) == about["shape"] and rows.dtype == np.float32
            fits &= ROWS in about["files"] and INDEX in about["files"] and len(table) == len(rows)
            fits &= texts.shape == (len(about["prompts"]), rows.shape[1])
            fits &= [row["row"] for row in table] == [str(number) for number in range(len(rows))]
            if not fits:
                raise DataError(f"{folder}: its files do not fit {ABOUT}; embed the data again")
            return cls(
                rows=rows,
                patients=np.array([int(row["patient"]) for row in table], dtype=np.int64),
                labels=np.array([float(row["label"]) for row in table], dtype=np.float32),
                test=np.array([row["part"] == "test" for row in table], dtype=bool),
                texts=texts,
                about=about,
            )
        except OSError as error:
            raise DataError(f"{folder}: {error.strerror}; embed the data again") from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise DataError(f"{folder}: damaged; embed the data again") from None

    def check(self, data: SiteDataset) -> None:
        """Refuse another dataset, or another content of it, than these embeddings were made from.

        Raises:
            DataError: name which of the facts differs; no count is in the message.
        """
        mine, other = self.about["data"], described(data)
        differ = [name for name in other if other[name] != mine.get(name)]
        if differ:
            raise DataError(
                f"site '{data.site}': {', '.join(differ)} differ from what was embedded; embed it again"
            )

    def similarity(self) -> Floats:
        """(records, prompts) cosine of each record with each prompt: the highest is the zero-shot guess.

        Raises:
            DataError: these embeddings were made without prompts.
        """
        if not len(self.texts):
            raise DataError("no prompt was embedded beside these records; embed them with --texts FILE")
        found: Floats = self.rows @ self.texts.T
        return found

    def _index(self) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        parts = np.where(self.test, "test", "train")
        for number, row in enumerate(zip(self.patients, self.labels, parts, strict=True)):
            patient, label, part = row
            writer.writerow((number, int(patient), int(label), part))
        return text.getvalue().encode()


def check_output(folder: Path) -> None:
    """Raise `DataError` where `save` would find something in its place, or could not write."""
    try:
        taken = folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir())))
        above = next(path for path in folder.absolute().parents if path.exists())
        writable = above.is_dir() and os.access(above, os.W_OK | os.X_OK)
    except OSError as error:
        raise DataError(f"--output {folder}: cannot be written ({error.strerror})") from None
    if taken:
        raise DataError(f"--output {folder}: is there already; expected a new or an empty folder")
    if not writable:
        raise DataError(f"--output {folder}: cannot be written: {above} is no folder that can be written to")


def described(data: SiteDataset) -> dict[str, Any]:
    """What ties embeddings to their data. The digest of records and labels tells how the task reads them."""
    digest = hashlib.sha256(json.dumps(data.texts).encode())
    inputs = (data.sounds, data.images) if data.sounds.size else (data.images,)
    for array in (*inputs, data.labels, data.patients):
        digest.update(f"{array.shape} {array.dtype}\n".encode() + np.ascontiguousarray(array).tobytes())
    manifest = data.manifest
    facts = {name: getattr(manifest, name) for name in ("content_sha256", "reader", "records", "patients")}
    return (
        {"site": data.site} | facts | {"positives": manifest.positives, "records_sha256": digest.hexdigest()}
    )


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / ABOUT).read_text())
    except OSError as error:
        raise DataError(
            f"{folder / ABOUT}: {error.strerror}; expected a folder that fedmed embed wrote"
        ) from None
    except ValueError:
        about = None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise DataError(f"{folder / ABOUT}: damaged, or of another version; embed the data again")
    return about


def _npy(array: Floats) -> bytes:
    content = io.BytesIO()
    np.save(content, np.ascontiguousarray(array, dtype=np.float32), allow_pickle=False)
    return content.getvalue()


def _file(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": _sha256(content)}


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": os.fstat(file.fileno()).st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
