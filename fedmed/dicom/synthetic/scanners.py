"""What a scanner makes of a picture: its size, its grey values, how many bits, and which way round they stand."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.dicom.synthetic.facts import GREY
from fedmed.dicom.synthetic.write import JPEG_2000_SIDE, Syntax
from fedmed.errors import require

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """A make and how its pictures look at full shift; `rows` and `columns` of None are those of the array."""

    name: str
    manufacturer: str
    modality: str = "DX"
    rows: int | None = None
    columns: int | None = None
    bits_stored: int = 12
    photometric: str = "MONOCHROME2"
    syntax: Syntax = Syntax.EXPLICIT
    # The part of the range of stored values that the window shows.
    levels: tuple[float, float] = (0.0, 1.0)
    # value -> gain * (value - 0.5) + 0.5 + offset, in parts of the range from black to white.
    gain: float = 1.0
    offset: float = 0.0
    # Standard deviations: of the noise in parts of that range, of the blur in parts of the image's height.
    noise: float = 0.0
    blur: float = 0.0
    # Millimetres a row and a column.
    pixel_spacing: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        where = f"scanner '{self.name}'"
        require(self.photometric in GREY, f"{where}: photometric", self.photometric, " or ".join(GREY))
        require(8 <= self.bits_stored <= 16, f"{where}: bits_stored", self.bits_stored, "8 to 16")
        low, high = self.levels
        require(0 <= low < high <= 1, f"{where}: levels", self.levels, "0 <= low < high <= 1")
        for name in ("noise", "blur"):
            require(getattr(self, name) >= 0, f"{where}: {name}", getattr(self, name), ">= 0")
        for side in (self.rows, self.columns):
            require(side is None or 1 <= side < 2**16, f"{where}: rows, columns", side, "1 to 65,535")

    def syntax_for(self, rows: int, columns: int) -> Syntax:
        """Its own, except that JPEG 2000 becomes RLE for images that the encoder finds too small."""
        small = min(rows, columns) < JPEG_2000_SIDE and self.syntax == Syntax.JPEG_2000
        return Syntax.RLE if small else self.syntax

    def window(self, depth: int) -> tuple[float, float]:
        """Centre and width that show `levels` of `depth` bits, from the first of them black to the last white."""
        low, high = self._ends(depth)
        # PS3.3 C.11.2.1.2: of width w, black is at centre - 0.5 - (w - 1) / 2 and white at + (w - 1) / 2.
        return (low + high) / 2 + 0.5, high - low + 1.0

    def _ends(self, depth: int) -> tuple[float, float]:
        top = 2**depth - 1
        return float(round(self.levels[0] * top)), float(round(self.levels[1] * top))

    def scan(self, pictures: NDArray[np.uint8], *, shift: float, rng: np.random.Generator) -> NDArray[Any]:
        """The stored values of pictures.

        Without shift a picture is what it was: shown through the window at 8 bits, it has its 8-bit values.

        Args:
            pictures: (images, rows, columns) or (images, rows, columns, 3) uint8, 0 black.
            shift: 0 leaves size and grey values alone; beyond it the scanner's size holds, and gain, offset, noise
                and blur in proportion.

        Returns:
            the same with its rows and columns: uint8, or uint16 beyond 8 bits. Colour keeps 8 bits and its polarity.
        """
        colour = pictures.ndim == 4
        depth = 8 if colour else self.bits_stored
        low, high = (0.0, 255.0) if colour else self._ends(depth)
        values = pictures.astype(np.float32) / np.float32(255)
        if shift > 0:
            values = self._shifted(values, shift, rng)
        if self.photometric == "MONOCHROME1" and not colour:
            values = 1 - values
        values *= np.float32(high - low)
        values += np.float32(low)
        return np.rint(values, out=values).astype(np.uint8 if depth == 8 else np.uint16)

    def _shifted(self, values: Floats, shift: float, rng: np.random.Generator) -> Floats:
        rows, columns = values.shape[1:3]
        down = _resampling(rows, self.rows or rows, blur=self.blur * shift)
        across = _resampling(columns, self.columns or columns, blur=self.blur * shift)
        if values.ndim == 4:
            planes = np.moveaxis(values, 3, 1)
            values = np.moveaxis(down @ planes @ across.T, 1, 3)
        else:
            values = down @ values @ across.T
        values = (values - np.float32(0.5)) * np.float32(1 + shift * (self.gain - 1))
        values += np.float32(0.5 + shift * self.offset)
        if self.noise:
            values += rng.standard_normal(values.shape, np.float32) * np.float32(self.noise * shift)
        return np.clip(values, 0, 1, out=values)


def _resampling(size: int, wanted: int, *, blur: float) -> Floats:
    """(wanted, size): linear interpolation between the centres of pixels, then a Gaussian of `blur` times the side."""
    place = np.clip((np.arange(wanted) + 0.5) * size / wanted - 0.5, 0, size - 1)
    matrix = np.maximum(1 - np.abs(place[:, None] - np.arange(size)), 0)
    if wanted < size:
        # Smaller: each pixel is a mean over the width that it stands for.
        reach = size / wanted
        matrix = np.maximum(1 - np.abs(place[:, None] - np.arange(size)) / reach, 0)
    if blur:
        apart = np.arange(wanted)[:, None] - np.arange(wanted)
        matrix = _means(np.exp(-0.5 * (apart / (blur * wanted)) ** 2)) @ matrix
    return _means(matrix).astype(np.float32)


def _means(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return matrix / matrix.sum(axis=1, keepdims=True)


def scanners(count: int, rows: int, columns: int) -> list[Scanner]:
    """Makes for `count` hospitals whose arrays are `rows` by `columns`; there are four, then they begin again."""

    def side(times: float) -> tuple[int, int]:
        return round(rows * times), round(columns * times)

    makes = []
    for times, values in zip((1.0, 1.5, 1.25, 2.0), _MAKES, strict=True):
        height, width = side(times)
        # A chest is about 350 mm high, whatever the number of pixels.
        spacing = (round(350 / height, 4), round(350 / width, 4))
        makes.append(Scanner(rows=height, columns=width, pixel_spacing=spacing, **values))
    return [makes[index % len(makes)] for index in range(count)]


# No product that can be bought: a real make's name would be a claim about it.
_MAKES: tuple[dict[str, Any], ...] = (
    {
        "name": "Lumen 2", "manufacturer": "Aster Imaging", "modality": "DX", "bits_stored": 12,
        "syntax": Syntax.EXPLICIT, "noise": 0.01,
    },
    {
        "name": "Corvid CR", "manufacturer": "Corvid Medical", "modality": "CR", "bits_stored": 10,
        "photometric": "MONOCHROME1", "syntax": Syntax.RLE, "gain": 0.8, "offset": 0.05, "noise": 0.03, "blur": 0.006,
    },
    {
        "name": "Halden 14", "manufacturer": "Halden", "modality": "DX", "bits_stored": 14,
        "syntax": Syntax.JPEG_2000, "levels": (0.1, 0.8), "gain": 1.15, "offset": -0.04, "noise": 0.015,
    },
    {
        "name": "Plate 8", "manufacturer": "Corvid Medical", "modality": "CR", "bits_stored": 8,
        "syntax": Syntax.IMPLICIT, "gain": 0.9, "offset": -0.05, "noise": 0.02, "blur": 0.01,
    },
)  # fmt: skip
