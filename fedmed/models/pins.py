"""Weights that this machine holds: of each model of the hub one commit, with the sha256 of every file.

For a model ORG/NAME the models folder holds ORG--NAME.json, its pin, and the folder of files that the pin names. The
pin is written last and in one step, so that a model is there whole or not at all.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedmed.atomic import sync_folder, write_json
from fedmed.data.split import fedmed_home
from fedmed.errors import ConfigError, ModelError, require
from fedmed.pretrained import COMMIT, DIGEST, HUB_ID
from fedmed.schema import from_dict, to_dict

WEIGHTS = "model.safetensors"
# What the ids of converted models begin with, in place of an organisation of the hub.
LOCAL = "local/"
# All that is ever fetched or unpacked: weights, settings, vocabularies. No pickle, no code.
FILES = frozenset(
    {
        "config.json", WEIGHTS, "preprocessor_config.json", "processor_config.json", "tokenizer.json",
        "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
        "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    }
)  # fmt: skip
# What is hashed or copied so far: the file, its bytes done, its bytes in all.
Progress = Callable[[str, int, int], None]
_CHUNK = 1 << 20
# Other hands may still be writing to a younger one.
_STALE_SECONDS = 24 * 3600


@dataclass(frozen=True, kw_only=True)
class PinnedFile:
    """One file of a pinned model. `size`: bytes."""

    sha256: str
    size: int

    def __post_init__(self) -> None:
        require(bool(DIGEST.fullmatch(self.sha256)), "sha256", self.sha256, "64 hex digits")
        require(0 <= self.size < 2**50, "size", self.size, "bytes, at most a petabyte")


@dataclass(frozen=True, kw_only=True)
class Pin:
    """Which files a model of the hub consists of."""

    version: int = 1
    hub: str
    # The commit on the hub (of a converted model, 40 hex digits that its files alone have), and the version of
    # transformers that the files were fetched for.
    revision: str
    transformers: str
    files: dict[str, PinnedFile]

    def __post_init__(self) -> None:
        require(self.version == 1, "version", self.version, "1; a newer fedmed wrote it")
        require(is_hub_id(self.hub), "hub", self.hub, "an id of the Hugging Face hub")
        require(bool(COMMIT.fullmatch(self.revision)), "revision", self.revision, "40 hex digits")
        unknown = sorted(self.files.keys() - FILES)
        require(not unknown, "files", ", ".join(unknown), f"no others than {', '.join(sorted(FILES))}")
        missing = sorted({WEIGHTS, "config.json"} - self.files.keys())
        require(not missing, "files", "…", f"{' and '.join(missing)} among them")

    @property
    def sha256(self) -> str:
        """What a run and a site's policy name: the digest of the weights."""
        return self.files[WEIGHTS].sha256

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files.values())

    @property
    def folder(self) -> Path:
        """Where its files are: a place that only these files can have."""
        return models_folder() / f"{_stem(self.hub)}@{digest_of(self.files)[:16]}"

    @classmethod
    def of(cls, values: Any, *, where: str) -> "Pin":
        """The pin that `to_dict` made a mapping of.

        Raises:
            ModelError: it is none.
        """
        try:
            require(isinstance(values, dict), "pin", "…", "a mapping")
            return from_dict(cls, values)
        except ConfigError as error:
            raise ModelError(f"{where}: {error}") from None


def digest_of(files: Mapping[str, PinnedFile]) -> str:
    """64 hex digits that change with any file's name, size or content."""
    values = {name: to_dict(file) for name, file in files.items()}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def transformers_version() -> str:
    """The installed one, without importing it."""
    return version("transformers")


def is_hub_id(text: str) -> bool:
    """Whether it is an id of the hub: ORG/NAME or NAME. Never a path that leaves a folder."""
    # The hub has none with `--` or `-/`, and without them a file's name tells the id.
    return len(text) <= 96 and "--" not in text and "-/" not in text and bool(HUB_ID.fullmatch(text))


def models_folder() -> Path:
    """`$FEDMED_HOME/models`."""
    return fedmed_home() / "models"


def _stem(hub: str) -> str:
    return hub.replace("/", "--")


def _pin_file(hub: str) -> Path:
    return models_folder() / f"{_stem(hub)}.json"


def find(hub: str) -> Pin | None:
    """The pin of a model of the hub, or None where it was not pulled.

    Raises:
        ModelError: the pin is damaged or cannot be read.
    """
    path = _pin_file(hub)
    if not is_hub_id(hub) or not path.exists():
        return None
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path}: damaged; run: fedmed models pull {hub} --replace") from None
    pin = Pin.of(values, where=str(path))
    if pin.hub != hub:
        raise ModelError(f"{path}: is the pin of {pin.hub}, expected {hub}; was it renamed?")
    return pin


def held() -> list[str]:
    """The hub ids of all pinned models, sorted."""
    return sorted(
        filter(is_hub_id, (path.stem.replace("--", "/") for path in models_folder().glob("*.json")))
    )


def located(hub: str, revision: str) -> Path | None:
    """The folder of a pulled model, whose files are those that were pinned; None where that commit was not pulled.

    The weights are not hashed here: a run checks them against the digest that it names. The other files are: a site
    where one differs would prepare its records otherwise than the others.

    Raises:
        ModelError: a file is missing, was changed or was added.
    """
    pin = find(hub)
    if pin is None or pin.revision != revision:
        return None
    if found := differences(pin, weights=False):
        raise ModelError(f"{pin.folder}: {found[0]}; run: fedmed models pull {hub}")
    return pin.folder


def differences(pin: Pin, *, weights: bool = True, progress: Progress | None = None) -> list[str]:
    """How the files on disk differ from their pin, in words; empty where they do not.

    Args:
        weights: also hash the weights, which takes a second per gigabyte or more.
    """
    if not pin.folder.is_dir():
        return ["the folder is gone"]
    words = []
    there = {path.name for path in pin.folder.iterdir()}
    words += [f"{name} was added" for name in sorted(there - pin.files.keys())]
    for name, file in sorted(pin.files.items()):
        path = pin.folder / name
        if not path.is_file() or path.is_symlink():
            words.append(f"{name} is missing")
        elif path.stat().st_size != file.size:
            words.append(f"{name} has {path.stat().st_size} bytes, not {file.size}")
        elif (weights or name != WEIGHTS) and sha256_of(path, progress) != file.sha256:
            words.append(f"{name} was changed")
    return words


def sha256_of(path: Path, progress: Progress | None = None) -> str:
    """The sha256 of a file."""
    hasher, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
            done += len(chunk)
            if progress:
                progress(path.name, done, total)
    return hasher.hexdigest()


@contextlib.contextmanager
def drafting(size: int) -> Iterator[Path]:
    """A new folder beside the models, gone when the block ends, however it ends.

    Args:
        size: bytes that will be written.

    Raises:
        ModelError: it cannot be made, there is no room for `size` bytes, or a file cannot be written in the block.
    """
    root = models_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        free = shutil.disk_usage(root).free
        if free < size:
            raise ModelError(f"{root}: {size / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
        with tempfile.TemporaryDirectory(prefix=".draft-", dir=root, ignore_cleanup_errors=True) as private:
            draft = Path(private) / "files"
            draft.mkdir()
            yield draft
    except OSError as error:
        # Not the whole error: a library's may hold an address with a token.
        words = error.strerror or type(error).__name__
        raise ModelError(f"{root}: cannot be written ({words}); set FEDMED_HOME to another place") from None


def _sweep(root: Path) -> None:
    """Remove what a killed process has left."""
    for path in root.glob(".draft-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def check_replaces(pin: Pin, *, replace: bool) -> None:
    """Raise `ModelError` if another version of the model is here and may not be replaced."""
    before = None if replace else find(pin.hub)
    if before is not None and (before.files, before.revision) != (pin.files, pin.revision):
        raise ModelError(
            f"{pin.hub}: here already at {before.revision[:12]} (sha256 {before.sha256[:12]}), not at "
            f"{pin.revision[:12]} (sha256 {pin.sha256[:12]}); replace it with --replace"
        )


def install(draft: Path, pin: Pin, *, replace: bool = False) -> None:
    """Make a folder with exactly the files of `pin` the model's own, in one step; the draft is then gone.

    Raises:
        ModelError: see `check_replaces`.
    """
    for path in draft.iterdir():
        sync_folder(path)
    sync_folder(draft)
    with _lock(), drafting(0) as grave:
        check_replaces(pin, replace=replace)
        before = _find_or_none(pin.hub)
        if pin.folder.exists():
            os.rename(pin.folder, grave / "old")
        os.rename(draft, pin.folder)
        sync_folder(models_folder())
        write_json(_pin_file(pin.hub), to_dict(pin))
        if before is not None and before.folder != pin.folder:
            shutil.rmtree(before.folder, ignore_errors=True)


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    """One process at a time: two that replace a model would each remove what the other has put in place."""
    with (models_folder() / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _find_or_none(hub: str) -> Pin | None:
    with contextlib.suppress(ModelError):
        return find(hub)
    return None
