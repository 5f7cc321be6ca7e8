"""Named arrays in a safetensors file, written and read one at a time: a payload is never in memory twice."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
CODES = {dtype: code for code, dtype in TYPES.items()}


def tensor_parts(
    tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """The file's content, for `fedmed.atomic.write_parts`: float32 or float64 arrays of any layout."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, values in tensors.items():
        start, end = end, end + values.nbytes
        header[name] = {
            "dtype": CODES[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, allow_nan=False).encode()
    # The arrays begin at a multiple of 8.
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for values in tensors.values():
        yield bytes_of(values)


def bytes_of(values: NDArray[Any]) -> memoryview:
    """An array's bytes in C order, without a copy where it has that order already."""
    return values.reshape(-1).view(np.uint8).data


class TensorFile(Mapping[str, NDArray[Any]]):
    """The arrays of such a file. One that is asked for is mapped into memory, read-only, as long as it is used.

    Raises:
        ValueError, KeyError: the file is none, or not whole.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            text = file.read(min(size, 2**27))
            length = file.seek(0, 2)
        header = json.loads(text)
        self.metadata: dict[str, str] = header.pop("__metadata__")
        self._path = path
        self._start = 8 + size
        self._tensors: dict[str, tuple[np.dtype[Any], tuple[int, ...], int]] = {}
        for name, values in header.items():
            dtype, shape = TYPES[values["dtype"]], tuple(values["shape"])
            start, end = values["data_offsets"]
            if end - start != math.prod(shape) * dtype.itemsize or self._start + end > length:
                raise ValueError("not whole")
            self._tensors[name] = dtype, shape, self._start + start

    def __getitem__(self, name: str) -> NDArray[Any]:
        dtype, shape, offset = self._tensors[name]
        if math.prod(shape) == 0:
            # Nothing cannot be mapped.
            return np.zeros(shape, dtype)
        return np.memmap(self._path, dtype, mode="r", offset=offset, shape=shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
