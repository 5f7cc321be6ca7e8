"""Arrays as MedMNIST keeps them: `train_images`, `train_labels` and so on in one .npz file."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import ConfigError, DataError

SPLITS = ("train", "val", "test")


def read_npz(path: str | Path, split: str = "train") -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Images and labels of a split, or of all splits that are there, one after the other.

    Nothing in the file is unpickled.

    Args:
        split: train, val, test, or all.

    Raises:
        ConfigError: no such split.
        DataError: no such file, not an .npz, without those arrays, damaged, or arrays that do not fit together.
    """
    if split not in (*SPLITS, "all"):
        raise ConfigError(f"--split={split}: expected {', '.join(SPLITS)} or all")
    file = Path(path).expanduser()
    try:
        if not file.is_file():
            raise DataError(f"FILE={path}: {'a folder or a device' if file.exists() else 'no such file'}")
        if not zipfile.is_zipfile(file):
            raise DataError(f"FILE={path}: not an .npz file, as numpy.savez and MedMNIST write it")
    except OSError as error:
        raise DataError(f"FILE={path}: cannot be read ({error.strerror})") from None
    there, parts = _load(file, split, path)
    for name, (images, labels) in zip(there, parts, strict=True):
        _check(name, images, labels, path)
    if len({images.shape[1:] for images, _ in parts}) > 1:
        raise DataError(f"FILE={path}: the splits' images differ in shape; choose one with --split")
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def _load(file: Path, split: str, path: str | Path) -> tuple[list[str], list[tuple[Any, Any]]]:
    """The names of the splits that were asked for, and whatever their arrays are."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            there = [name for name in SPLITS if {f"{name}_images", f"{name}_labels"} <= set(arrays.files)]
            wanted = there if split == "all" else [split]
            if there and set(wanted) <= set(there):
                return wanted, [(arrays[f"{name}_images"], arrays[f"{name}_labels"]) for name in wanted]
    except MemoryError:
        raise DataError(f"FILE={path}: its arrays do not fit into memory") from None
    except Exception:
        # A damaged archive raises whatever zipfile, zlib and the tokenizer of numpy's headers raise; their messages
        # may quote what they found.
        raise DataError(
            f"FILE={path}: damaged, or with Python objects, which are not read; write plain arrays with numpy.savez"
        ) from None
    missing = f"{split}_images and {split}_labels" if split != "all" else "train_images and train_labels"
    hint = f"it has {', '.join(there)} (--split)" if there else "as MedMNIST names them"
    raise DataError(f"FILE={path}: no arrays {missing}; {hint}")


def _check(name: str, images: Any, labels: Any, path: str | Path) -> None:
    where = f"FILE={path}: {name}_images"
    if not isinstance(images, np.ndarray) or not isinstance(labels, np.ndarray):
        raise DataError(f"{where} or {name}_labels: no array; write it with numpy.savez")
    shape = images.shape
    if images.dtype != np.uint8:
        raise DataError(f"{where}: {images.dtype}; expected uint8")
    if not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)) or 0 in shape:
        raise DataError(
            f"{where}: shape {shape}; expected (images, rows, columns) or (images, rows, columns, 3)"
        )
    if labels.shape not in ((shape[0],), (shape[0], 1)):
        expected = f"expected ({shape[0]},) or ({shape[0]}, 1): one label an image"
        raise DataError(f"FILE={path}: {name}_labels: shape {labels.shape}; {expected}")
    if labels.dtype.kind not in "iub":
        raise DataError(f"FILE={path}: {name}_labels: {labels.dtype}; expected whole numbers")
