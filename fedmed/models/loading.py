"""Encoder folders: found, checked against their pinned digest, loaded offline, safetensors only."""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from fedmed.errors import ModelError
from fedmed.model import TextModelConfig

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


def locate(config: TextModelConfig) -> Path:
    """The folder of the encoder.

    Raises:
        ModelError: the package is not installed, the folder is missing, or a file in it is missing or damaged.
    """
    if config.package is not None:
        package, _, subfolder = config.package.partition(":")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                f"model.package={config.package}: '{package}' is not installed; run: pip install 'fedmed[demo]'"
            )
        folder = Path(spec.submodule_search_locations[0]) / subfolder
    else:
        folder = Path(config.path or "").expanduser()
    if not folder.is_dir():
        raise ModelError(f"model.path={folder}: no such folder")
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            found = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".ckpt", ".h5"))
            hint = f"; {found[0]} is not read: convert it to safetensors" if found else ""
            raise ModelError(f"model.path={folder}: no {name} in it{hint}")
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type", "unknown")
    except (ValueError, AttributeError):
        raise ModelError(f"model.path={folder}: its config.json is damaged") from None
    # Without its files transformers makes up a tokenizer that knows no word.
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"model.path={folder}: no tokenizer in it; a '{kind}' model does not read text")
    return folder


def check_digest(config: TextModelConfig, folder: Path) -> None:
    """Raise `ModelError` unless model.safetensors has the pinned sha256."""
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != config.sha256:
        raise ModelError(
            f"model.sha256={config.sha256[:12]}…: {folder / 'model.safetensors'} has {digest}; "
            "pin that digest only if you trust where the file came from"
        )


def load_encoder(config: TextModelConfig) -> tuple[Any, Any]:
    """The encoder in eval mode and its tokenizer.

    Raises:
        ModelError: see `locate` and `check_digest`; or transformers cannot read the folder.
    """
    folder = locate(config)
    check_digest(config, folder)
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        encoder = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype="float32"
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model.path={folder}: transformers cannot load it ({type(error).__name__})"
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        raise ModelError(f"model.path={folder}: transformers cannot load its tokenizer") from None
    return encoder.eval(), tokenizer
