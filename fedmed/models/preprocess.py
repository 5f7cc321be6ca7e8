"""How an image encoder wants its images: preprocessor_config.json, read as written and run in torch.

The processors that transformers ships round to 8 bits at each step and refuse values above 255; here an image stays
what it is, with 16 bits or more. On 8-bit images the result is theirs within their own rounding: at most `TOLERANCE`
grey levels of 255 from what PIL makes of a square (measured over noise, black-and-white noise and ramps, enlarged and
made smaller: 1.00 by the bilinear filter, 1.09 by the bicubic, 0.4 on average). Of other shapes PIL may take the
columns first, which the bicubic filter shows where it overshoots black or white; records come as squares.

Torch is loaded by the first image: what is wrong with a file is said before.
"""

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmed.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PROCESSOR = "preprocessor_config.json"
# In grey levels of 255: PIL resamples rows, rounds, resamples columns, and rounds again.
TOLERANCE = 1.25
# The numbers that PIL gives its filters. Both widen where an image is made smaller (antialiasing).
FILTERS = {2: "bilinear", 3: "bicubic"}

_HALF = (0.5, 0.5, 0.5)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_SQUARE = {"height": 224, "width": 224}
_COMMON: dict[str, Any] = {
    "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_center_crop": False,
    "crop_size": None, "crop_pct": None, "image_mean": _HALF, "image_std": _HALF, "size": _SQUARE, "resample": 3,
}  # fmt: skip
_CROPPED = {
    "size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": _SQUARE, "image_mean": _CLIP[0],
    "image_std": _CLIP[1],
}  # fmt: skip
CONVNEXT = "ConvNextImageProcessor"
# What each processor does where its file is silent.
DEFAULTS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": _COMMON | {"resample": 2},
    "SiglipImageProcessor": _COMMON,
    "BitImageProcessor": _COMMON | _CROPPED,
    "CLIPImageProcessor": _COMMON | _CROPPED,
    CONVNEXT: _COMMON | {"size": {"shortest_edge": 384}, "crop_pct": 224 / 256},
    "DINOv3ViTImageProcessor": _COMMON
    | {"resample": 2, "image_mean": _IMAGENET[0], "image_std": _IMAGENET[1]},
}
# Where a size is one number, of these processors it is a square's; of the others that of the shorter side.
_SQUARES = ("ViTImageProcessor", "DINOv3ViTImageProcessor")
# Keys that do not change a pixel of what is prepared here: every image gets three channels.
_FREE = {
    "image_processor_type", "feature_extractor_type", "processor_class", "_processor_class", "_valid_processor_keys",
    "do_convert_rgb", "data_format", "input_data_format", "default_to_square", "device", "return_tensors",
    "disable_grouping", "image_seq_length",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Preprocessor:
    """Resampling, a crop in the middle, and a scale for each channel: the same for every image, whatever its batch.

    Attributes:
        processor: the processor in transformers that it stands for.
        resize: (height, width); or the length of the shorter side, both keeping the other in proportion; or None.
        crop: (height, width) of the middle that is kept, padded with black where the image is smaller; or None.
        filter: a name of `FILTERS`.
        clamped: whether resampled values are kept within 0 and 1, as rounding to 8 bits keeps them.
        mean, std: of the channels, in units of the white of an image.
    """

    processor: str
    resize: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    filter: str
    clamped: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, path: Path, *, image_size: int = 0, default: str = "") -> "Preprocessor":
        """What the file says, with another number of pixels a side where `image_size` is not 0.

        Args:
            default: the processor of the encoder's family; some older files name none.

        Raises:
            ModelError: the file is damaged, or of a processor or with a key that is not known.
        """
        try:
            values = json.loads(path.read_text())
            name = _name(path, values, default)
            filled = _filled(path, name, values)
            if name == CONVNEXT and image_size:
                # What it crops away depends on the size.
                return _parsed(name, filled | {"size": {"shortest_edge": image_size}}, path)
            found = _parsed(name, filled, path)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise ModelError(f"{path}: damaged, or of a processor that is not known") from None
        return found._resized(image_size) if image_size else found

    def size(self, rows: int, columns: int) -> tuple[int, int]:
        """(height, width) of what is made of an image of this size."""
        return self.crop or self.resampled(rows, columns)

    def resampled(self, rows: int, columns: int) -> tuple[int, int]:
        """(height, width) of such an image before it is cropped."""
        if self.resize is None:
            return rows, columns
        if isinstance(self.resize, tuple):
            return self.resize
        short, long = sorted((rows, columns))
        new = int(self.resize * long / short)
        return (new, self.resize) if columns <= rows else (self.resize, new)

    def __call__(self, images: "Tensor") -> "Tensor":
        """(images, 3, height, width) for the encoder, of (images, 1 or 3, rows, columns) from 0 (black) to 1."""
        return self.scaled(self.cut(images))

    def cut(self, images: "Tensor") -> "Tensor":
        """The images resampled and cropped: (images, channels, height, width) of 0 to 1."""
        from torch.nn import functional

        rows, columns = images.shape[-2:]
        size = self.resampled(rows, columns)
        # Along the rows first, as PIL does it with a square: what overshoots is cut off before the columns' turn.
        for step in ((rows, size[1]), size) if self.resize is not None else ():
            images = functional.interpolate(
                images, size=step, mode=self.filter, antialias=True, align_corners=False
            )
            images = images.clamp(0, 1) if self.clamped else images
        if self.crop is None:
            return images
        images = functional.pad(images, self.padding(*size))
        top, left = ((side - kept) // 2 for side, kept in zip(images.shape[-2:], self.crop, strict=True))
        return images[..., top : top + self.crop[0], left : left + self.crop[1]]

    def padding(self, rows: int, columns: int) -> tuple[int, int, int, int]:
        """Left, right, top and bottom of black around an image that is smaller than the crop."""
        if self.crop is None:
            return 0, 0, 0, 0
        down, across = (max(0, kept - side) for kept, side in zip(self.crop, (rows, columns), strict=True))
        # An odd line goes to the top and to the left.
        return across - across // 2, across // 2, down - down // 2, down // 2

    def scaled(self, images: "Tensor") -> "Tensor":
        """Three channels, each less its mean, over its deviation."""
        mean, std = (_constants(values, images.dtype, images.device) for values in (self.mean, self.std))
        return (images - mean) / std

    def _resized(self, size: int) -> "Preprocessor":
        """The same with `size` pixels a side, and as much of the image cropped away."""
        whole: tuple[int, int] | int | None = (size, size)
        if isinstance(self.resize, int):
            whole = round(self.resize * size / min(self.crop)) if self.crop else size
        return replace(self, resize=whole, crop=(size, size) if self.crop else None)


@lru_cache(maxsize=16)
def _constants(values: tuple[float, ...], dtype: "torch.dtype", device: "torch.device") -> "Tensor":
    """(channels, 1, 1)."""
    import torch

    from fedmed.devices import sent

    return sent(torch.tensor(values, dtype=dtype), device)[:, None, None]


def _name(path: Path, values: dict[str, Any], default: str) -> str:
    """The processor in transformers; older files name what came before it."""
    written = values.get("image_processor_type") or values.get("feature_extractor_type") or default or "none"
    name = str(written).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if name not in DEFAULTS:
        raise ModelError(f"{path}: image_processor_type={written}: expected one of {', '.join(DEFAULTS)}")
    return name


def _filled(path: Path, name: str, values: dict[str, Any]) -> dict[str, Any]:
    # What is off or empty changes nothing.
    unknown = sorted(
        key for key, value in values.items() if key not in _COMMON and key not in _FREE and value
    )
    if unknown:
        raise ModelError(
            f"{path}: {unknown[0]}={values[unknown[0]]}: a key that is not known, and may change pixels; "
            f"expected of a {name}: {', '.join(_COMMON)}"
        )
    known = {key: value for key, value in values.items() if key in _COMMON and value is not None}
    return DEFAULTS[name] | known


def _parsed(name: str, values: dict[str, Any], path: Path) -> Preprocessor:
    if values["resample"] not in FILTERS:
        raise ModelError(f"{path}: resample={values['resample']}: expected 2 (bilinear) or 3 (bicubic)")
    resize = _sides(values["size"], path, square=name in _SQUARES) if values["do_resize"] else None
    crop = _sides(values["crop_size"], path, square=True) if values["do_center_crop"] else None
    if name == CONVNEXT and resize is not None:
        if not isinstance(resize, int) or crop is not None:
            raise ModelError(f"{path}: size={values['size']}: expected shortest_edge, and no do_center_crop")
        # From 384 pixels on it warps the whole image; below, it keeps the middle.
        small = resize < 384
        crop = (resize, resize) if small else None
        resize = int(resize / values["crop_pct"]) if small else (resize, resize)
    # In units of white: the file's mean and deviation are of values times `rescale_factor`, white being 255.
    white = 255 * (float(values["rescale_factor"]) if values["do_rescale"] else 1.0)
    mean, std = (
        (values["image_mean"], values["image_std"]) if values["do_normalize"] else ((0.0,) * 3, (1.0,) * 3)
    )
    return Preprocessor(
        processor=name,
        resize=resize,
        crop=crop if crop is None or isinstance(crop, tuple) else (crop, crop),
        filter=FILTERS[values["resample"]],
        # It scales before it resamples, and rounds nothing.
        clamped=name != "DINOv3ViTImageProcessor",
        mean=_channels(mean, white),
        std=_channels(std, white),
    )


def _sides(size: Any, path: Path, *, square: bool) -> tuple[int, int] | int:
    if isinstance(size, int):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    kinds = ({"height", "width"}, {"shortest_edge"})
    whole = isinstance(size, dict) and all(
        isinstance(side, int) and 1 <= side <= 4096 for side in size.values()
    )
    if not whole or set(size) not in kinds:
        raise ModelError(f"{path}: size={size}: expected height and width, or shortest_edge, up to 4096")
    return (size["height"], size["width"]) if "height" in size else size["shortest_edge"]


def _channels(values: Any, white: float) -> tuple[float, ...]:
    found = tuple(
        float(value) / white for value in (values if isinstance(values, list | tuple) else [values] * 3)
    )
    if len(found) != 3:
        raise ValueError("three channels")
    return found
