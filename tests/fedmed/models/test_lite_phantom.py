"""EfficientNet-Lite0 beside the phantom encoder: as published layer by layer, the same bytes everywhere, head alone."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel

import fedmed
from fedmed.compose import compose
from fedmed.config import AdapterConfig
from fedmed.errors import ModelError
from fedmed.model import ImageModelConfig
from fedmed.models.build import build
from fedmed.models.export import export, write_card
from fedmed.models.lite_phantom import convert
from fedmed.models.loading import load_image_encoder
from tests.conftest import sha256
from tests.fedmed.models.test_export import _summary

PHANTOM = Path(fedmed.__file__).parent / "models" / "phantom_encoder"
# Of each block of the published network: channels before and after, expansion, kernel, stride.
BLOCKS = (
    (32, 16, 1, 3, 1), (16, 24, 6, 3, 2), (24, 24, 6, 3, 1), (24, 40, 6, 5, 2), (40, 40, 6, 5, 1), (40, 80, 6, 3, 2),
    (80, 80, 6, 3, 1), (80, 80, 6, 3, 1), (80, 112, 6, 5, 1), (112, 112, 6, 5, 1), (112, 112, 6, 5, 1),
    (112, 192, 6, 5, 2), (192, 192, 6, 5, 1), (192, 192, 6, 5, 1), (192, 192, 6, 5, 1),
)  # fmt: skip
# The last block of the fifth stage and of the sixth.
ENDS = (10, 14)
Arrays = dict[str, NDArray[np.float32]]


def published() -> Arrays:
    """Random arrays by the package's names, in the memory order in which TensorFlow's convolutions come."""
    draws, arrays = np.random.default_rng(0), {}

    def layer(name: str, norm: str, shape: tuple[int, int, int, int]) -> None:
        values = draws.normal(size=shape, scale=(2 / np.prod(shape[1:])) ** 0.5).astype(np.float32)
        arrays[f"{name}.weight"] = np.asfortranarray(values)
        arrays[f"{norm}.weight"] = draws.uniform(0.7, 1.3, shape[0]).astype(np.float32)
        arrays[f"{norm}.running_var"] = draws.uniform(0.5, 1.5, shape[0]).astype(np.float32)
        for part in ("bias", "running_mean"):
            arrays[f"{norm}.{part}"] = draws.normal(0, 0.3, shape[0]).astype(np.float32)

    layer("_conv_stem", "_bn0", (32, 3, 3, 3))
    for number, (before, after, expansion, kernel, _) in enumerate(BLOCKS):
        there, width = f"_blocks.{number}.", before * expansion
        if expansion > 1:
            layer(f"{there}_expand_conv", f"{there}_bn0", (width, before, 1, 1))
        layer(f"{there}_depthwise_conv", f"{there}_bn1", (width, 1, kernel, kernel))
        layer(f"{there}_project_conv", f"{there}_bn2", (after, width, 1, 1))
    return arrays


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("lite_phantom")
    convert(published(), PHANTOM, made)
    return made


def model_of(folder: Path) -> ImageModelConfig:
    digest = sha256(folder / "model.safetensors")
    return ImageModelConfig(path=str(folder), sha256=digest, pooling="pooler", feature_norm=5.0)


def reference(images: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled stages 5 and 6, one layer after the other with its BatchNorm."""
    arrays = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in published().items()}

    def layer(x: Tensor, name: str, norm: str, stride: int = 1, *, depthwise: bool = False) -> Tensor:
        weight = arrays[f"{name}.weight"]
        side, kernel = x.shape[-1], weight.shape[-1]
        more = max(0, (-(-side // stride) - 1) * stride + kernel - side)
        x = functional.pad(x, (more // 2, more - more // 2) * 2)
        x = functional.conv2d(x, weight, stride=stride, groups=len(weight) if depthwise else 1)
        statistics = [arrays[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return functional.batch_norm(x, *statistics, eps=1e-3)

    x, pooled = functional.relu6(layer(images, "_conv_stem", "_bn0", 2)), []
    for number, (before, after, expansion, _, stride) in enumerate(BLOCKS):
        there, y = f"_blocks.{number}.", x
        if expansion > 1:
            y = functional.relu6(layer(y, f"{there}_expand_conv", f"{there}_bn0"))
        y = functional.relu6(layer(y, f"{there}_depthwise_conv", f"{there}_bn1", stride, depthwise=True))
        y = layer(y, f"{there}_project_conv", f"{there}_bn2")
        x = x + y if stride == 1 and before == after else y
        if number in ENDS:
            pooled.append(x.mean(dim=(2, 3)))
    return pooled[0], pooled[1]


def pictures(count: int, side: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).random((count, 1, side, side), dtype=np.float32))


@torch.no_grad()
@pytest.mark.parametrize("side", [160, 61])
def test_it_computes_what_the_published_layers_and_the_phantom_encoder_do(folder: Path, side: int) -> None:
    encoder, preprocessor = load_image_encoder(model_of(folder))
    grey = pictures(2, side)
    scaled = preprocessor.scaled(grey)
    assert torch.allclose(scaled[:, 1:2] * 128 + 127, grey * 255, atol=1e-3)
    small = functional.interpolate(grey, size=(64, 64), mode="bilinear", antialias=True, align_corners=False)
    phantom = AutoModel.from_pretrained(PHANTOM, local_files_only=True).eval()
    third = phantom(pixel_values=((small - 0.5) / 0.25).expand(-1, 3, -1, -1)).pooler_output
    wanted = torch.cat([functional.normalize(part) for part in (*reference(scaled), third)], dim=1)
    found = encoder(pixel_values=scaled).pooler_output
    assert found.shape == (2, 112 + 192 + 192)
    assert torch.allclose(found, wanted, atol=2e-5)
    # Two pictures differ by much more than that.
    assert (wanted[0] - wanted[1]).abs().max() > 1e-2


@torch.no_grad()
def test_nothing_in_it_mixes_the_records_of_a_batch(folder: Path) -> None:
    encoder, preprocessor = load_image_encoder(model_of(folder))
    assert not [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    images = preprocessor.scaled(pictures(3, 64))
    # In training mode too.
    together = encoder.train()(pixel_values=images).pooler_output
    others = torch.cat([images[:1], images[1:] * 0])
    assert torch.allclose(encoder(pixel_values=others).pooler_output[0], together[0], atol=1e-6)


def test_the_same_arrays_give_the_same_bytes_however_they_lie_in_memory(folder: Path, tmp_path: Path) -> None:
    convert({name: np.ascontiguousarray(values) for name, values in published().items()}, PHANTOM, tmp_path)
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    lacking = published()
    del lacking["_blocks.14._bn2.bias"]
    with pytest.raises(KeyError, match=r"_blocks\.14\._bn2\.bias"):
        convert(lacking, PHANTOM, tmp_path)


def task() -> Any:
    return compose(["experiment=xray"]).task


@pytest.mark.parametrize("kind", ["lora", "ffa_lora", "full"])
def test_it_stays_as_it_is(folder: Path, kind: str) -> None:
    with pytest.raises(ModelError, match=rf"^adapter={kind}: .* stays as it is; expected adapter=head"):
        build(task(), model_of(folder), AdapterConfig(kind=kind))


def test_the_head_has_a_weight_a_feature_and_the_card_reproduces_its_scores(
    folder: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(compose(["experiment=xray"]), model=model_of(folder))
    network = build(config.task, config.model, config.adapter)
    arrays = network.initialise(config.seed)
    assert {name: values.shape for name, values in arrays.items()} == {
        "head.weight": (1, 496),
        "head.bias": (1,),
    }
    arrays["head.weight"] = np.random.default_rng(2).normal(size=(1, 496)).astype(np.float32)
    export(network, arrays, config, tmp_path / "adapter")
    write_card(_summary(config.task.declared_sizes, config), config, tmp_path / "MODEL_CARD.md")
    snippet = re.search(r"```python\n(.*?)```", (tmp_path / "MODEL_CARD.md").read_text(), re.S)
    assert snippet
    names: dict[str, Any] = {}
    exec(snippet[1], names)
    images = pictures(3, config.task.image_size)
    with torch.no_grad():
        wanted = network(images=network.preprocessor.cut(images))
    found = names["scores"](folder, tmp_path / "adapter", images)
    assert torch.allclose(found, wanted, atol=1e-4)
    assert wanted.std() > 1e-2
