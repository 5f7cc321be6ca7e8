"""What a pretrained model makes of each record of one site: a memory-mapped array, tied to the data and the model.

A folder of embeddings is as private as the records that they are of: embeddings can be inverted, and each row stands
beside its label. Nothing here is covered by an epsilon; nothing here leaves the machine.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmed.atomic import write_bytes, write_json
from fedmed.data.dataset import SiteDataset
from fedmed.data.readers import read_site
from fedmed.errors import ConfigError, DataError
from fedmed.model import ImageModelConfig, ModelConfig, TextModelConfig
from fedmed.pretrained import PretrainedConfig
from fedmed.task import ImageTaskConfig, TaskConfig

if TYPE_CHECKING:
    from fedmed.models.activations import ActivationCache

FORMAT = "fedmed embeddings 1"
ROWS, TEXTS, INDEX, ABOUT = "embeddings.npy", "texts.npy", "index.csv", "embeddings.json"
COLUMNS = ("row", "patient", "label", "part")
Floats = NDArray[np.float32]
# Called with the passes through the encoder that are done, and those there are.
Progress = Callable[[int, int], None]


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

    @classmethod
    def make(
        cls,
        task: TaskConfig,
        model: ModelConfig,
        site: str,
        *,
        seed: int = 0,
        key: bytes | None = None,
        prompts: list[str] | None = None,
        cache: "ActivationCache | None" = None,
        progress: Progress | None = None,
    ) -> "Embeddings":
        """Embed a site's records, each alone, so that no bit of a row depends on another record.

        Without prompts a row is what a classifier's head would read of the record: of text the encoder's plain pooled
        output (not centred, not whitened), of images its pooled output, averaged over slices, of norm
        `model.feature_norm`. With prompts a row is the record's projection into the space of images and text, of
        norm 1, as are the prompts'.

        Args:
            seed, key: of the split, as in `fedmed.data.readers.read_site`.
            prompts: texts for the text tower of a model of images and text.
            cache: where what was computed before is looked for, and kept.

        Raises:
            ConfigError: the model has no pretrained features, or does not read the task's records.
            DataError: the site has no usable record, or its data cannot be read.
            ModelError: the model cannot be loaded, is not the pinned one, or has no tower for text.
        """
        check(task, model, prompts)
        data = read_site(task, site, seed=seed, key=key, maybe_empty=True)
        if not len(data.labels):
            raise DataError(f"site '{site}' has no usable record to embed")
        rows, texts, how = _computed(task, model, data, prompts or [], cache, progress)
        about = {
            "format": FORMAT,
            "data": _described(data),
            "split": {"kind": task.split, "seed": seed if task.split == "shuffle" else None},
            "model": {"name": model.name, "sha256": getattr(model, "sha256", "")} | how,
            "prompts": prompts or [],
            "shape": list(rows.shape),
            "dtype": "float32",
            "versions": {name: version(name) for name in ("fedmed", "numpy", "torch", "transformers")},
        }
        return cls(
            rows=rows, patients=data.patients, labels=data.labels, test=data.test, texts=texts, about=about
        )

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
        mine, other = self.about["data"], _described(data)
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


def check(task: TaskConfig, model: ModelConfig, prompts: list[str] | None = None) -> None:
    """Whether the model has features to embed the task's records with; torch is not loaded for it.

    Raises:
        ConfigError: it has not.
    """
    if not model.pretrained:
        raise ConfigError(
            f"model={model.name}: starts from nothing and has no pretrained features; "
            f"expected a pretrained encoder, e.g. model={'phantom' if task.kind == 'image' else 'minilm'}"
        )
    if model.reads != task.kind:
        raise ConfigError(f"model={model.name}: reads {model.reads}s; the task's records are {task.kind}s")
    if prompts and not isinstance(model, ImageModelConfig):
        raise ConfigError(
            f"--texts: model={model.name} has no tower for images; expected a model of both, e.g. CLIP or SigLIP"
        )


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


def _computed(
    task: TaskConfig,
    model: ModelConfig,
    data: SiteDataset,
    prompts: list[str],
    cache: "ActivationCache | None",
    progress: Progress | None,
) -> tuple[Floats, Floats, dict[str, Any]]:
    """Rows, prompts, and how they were made: the digest of all that they depend on besides weights and records."""
    from fedmed.config import AdapterConfig
    from fedmed.models.build import build
    from fedmed.models.image_text import ImageTextEncoder
    from fedmed.training import one_thread

    one_thread()
    none = np.zeros((0, 0), dtype=np.float32)
    if prompts:
        assert isinstance(model, ImageModelConfig)
        assert isinstance(task, ImageTaskConfig)
        both = ImageTextEncoder(task, model)
        # Before the records: a prompt that is too long is said at once.
        texts = both.texts(prompts).numpy()
        with _counted(both.model.vision_model, len(data.labels) * data.images.shape[1], progress):
            rows = both.images(data, cache=cache)
        return rows.numpy(), texts, _how(task, model, both.depends)
    if isinstance(model, TextModelConfig):
        model = dataclasses.replace(model, synthetic_sentences=0, components=0, feature_norm=1.0)
    network: Any = build(task, model, AdapterConfig(kind="head"))
    passes = len(data.labels) * (data.images.shape[1] if len(data.images) else 1)
    with _counted(network.encoder, passes, progress):
        rows = network.prepare(data, cache=cache, alone=True)["features"].numpy()
    return rows, none.reshape(0, rows.shape[1]), _how(task, model, network._depends)


def _how(task: TaskConfig, model: ModelConfig, depends: dict[str, Any]) -> dict[str, Any]:
    from fedmed.models.loading import tokenizer_digest

    assert isinstance(model, PretrainedConfig)
    depends = dict(depends)
    if isinstance(model, TextModelConfig):
        depends |= {"max_tokens": model.max_tokens, "tokenizer": tokenizer_digest(model)}
    else:
        depends |= {name: getattr(task, name) for name in ("image_size", "slices")}
        if depends.get("space"):
            depends["tokenizer"] = tokenizer_digest(model)
    text = json.dumps(depends, sort_keys=True)
    return {"space": depends.get("space", "pooled"), "preprocessing_sha256": _sha256(text.encode())}


@contextlib.contextmanager
def _counted(encoder: Any, passes: int, progress: Progress | None) -> Iterator[None]:
    """Tell `progress` of each pass through the encoder; of what is read from a cache there is none."""
    done = 0

    def one(*_: object) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(min(done, passes), passes)

    hook = encoder.register_forward_hook(one)
    try:
        yield
    finally:
        hook.remove()


def _described(data: SiteDataset) -> dict[str, Any]:
    """What ties embeddings to their data. The digest of records and labels tells how the task reads them."""
    digest = hashlib.sha256(json.dumps(data.texts).encode())
    for array in (data.images, data.labels, data.patients):
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
