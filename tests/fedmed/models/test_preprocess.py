"""Preprocessing in torch against the processors that transformers ships, which are PIL's and NumPy's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fedmed.errors import ModelError
from fedmed.models.preprocess import DEFAULTS, PROCESSOR, TOLERANCE, Preprocessor

# As published models have them: RAD-DINO and DINOv2, MedSigLIP, Phikon, CLIP, ConvNeXt below and from 384 pixels.
ORIGINALS = {
    "vit": ViTImageProcessorPil(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]),
    "vit, 96 x 80": ViTImageProcessorPil(size={"height": 96, "width": 80}),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}),
    "rad-dino": BitImageProcessorPil(size={"shortest_edge": 118}, crop_size={"height": 118, "width": 118}),
    "crop larger than the image": BitImageProcessorPil(
        size={"shortest_edge": 50}, crop_size={"height": 65, "width": 72}
    ),
    "siglip": SiglipImageProcessorPil(size={"height": 148, "width": 148}),
    "medsiglip": SiglipImageProcessorPil(size={"height": 148, "width": 148}, resample=2),
    "clip": CLIPImageProcessorPil(),
    "clip, not resized": CLIPImageProcessorPil(do_resize=False, crop_size={"height": 40, "width": 41}),
    "convnext, 128": ConvNextImageProcessorPil(size={"shortest_edge": 128}),
    "convnext, 160 of 0.9": ConvNextImageProcessorPil(size={"shortest_edge": 160}, crop_pct=0.9),
    "convnext, 384": ConvNextImageProcessorPil(),
    "neither scaled nor centred": ViTImageProcessorPil(do_rescale=False, do_normalize=False),
}


def pictures(rows: int, columns: int) -> list[NDArray[np.uint8]]:
    """What is hard on a filter: noise of all values, of black and white alone, and a ramp that wraps around."""
    draws = np.random.default_rng(rows)
    noise = draws.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    ramp = (np.add.outer(3 * np.arange(rows), 2 * np.arange(columns)) % 256).astype(np.uint8)
    return [noise, np.where(noise > 127, 255, 0).astype(np.uint8), np.repeat(ramp[..., None], 3, axis=2)]


def tensor(picture: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("name", ORIGINALS)
def test_it_agrees_with_the_shipped_processor(name: str, tmp_path: Path) -> None:
    original = ORIGINALS[name]
    original.save_pretrained(tmp_path)
    own = Preprocessor.read(tmp_path / PROCESSOR)
    differences = []
    for size in (64, 97, 224, 300, 513):
        for picture in pictures(size, size):
            expected = original(images=picture, return_tensors="np")["pixel_values"][0]
            got = own(tensor(picture))[0].numpy()
            assert got.shape == expected.shape
            assert got.shape[1:] == own.size(size, size)
            differences.append(np.abs(got - expected) * np.array(own.std)[:, None, None] * 255)
    assert max(d.max() for d in differences) < TOLERANCE
    assert np.mean([d.mean() for d in differences]) < 0.5


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize("shape", [(120, 200), (201, 133)])
def test_other_shapes_agree_where_nothing_overshoots(
    name: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    original = ORIGINALS[name]
    original.save_pretrained(tmp_path)
    own = Preprocessor.read(tmp_path / PROCESSOR)
    picture = (80 + pictures(*shape)[0] // 4).astype(np.uint8)
    expected = original(images=picture, return_tensors="np")["pixel_values"][0]
    got = own(tensor(picture))[0].numpy()
    assert got.shape == expected.shape
    assert (np.abs(got - expected) * np.array(own.std)[:, None, None] * 255).max() < TOLERANCE


def test_dinov3_resamples_without_rounding(tmp_path: Path) -> None:
    """Its shipped processor needs torchvision. PIL's own images of floats are an independent reference."""
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    own = written(
        tmp_path, {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 80, "width": 80}}
    )
    assert not own.clamped
    for size in (64, 224, 513):
        for picture in pictures(size, size):
            scaled = picture.astype(np.float32) / 255
            resized = [
                np.asarray(Image.fromarray(scaled[..., channel]).resize((80, 80), resample=2))
                for channel in range(3)
            ]
            expected = (np.stack(resized) - mean[:, None, None]) / deviation[:, None, None]
            assert np.abs(own(tensor(picture))[0].numpy() - expected).max() < 1e-4


def written(folder: Path, values: dict[str, Any], image_size: int = 0) -> Preprocessor:
    (folder / PROCESSOR).write_text(json.dumps(values))
    return Preprocessor.read(folder / PROCESSOR, image_size=image_size)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_sixteen_bits_stay_sixteen_bits(kind: str, tmp_path: Path) -> None:
    """Two images that differ by one part in 65,535 are told apart everywhere; rounded to 8 bits they would not be."""
    own = written(tmp_path, {"image_processor_type": kind})
    low = torch.full((1, 1, 300, 300), 30_000 / 65_535)
    high = torch.full((1, 1, 300, 300), 30_001 / 65_535)
    change = (own(high) - own(low)) * torch.tensor(own.std)[:, None, None] * 65_535
    assert own(low).shape[1] == 3
    assert (change - 1).abs().max() < 0.05
    assert torch.equal((low * 255).round(), (high * 255).round())


@pytest.mark.parametrize("kind", DEFAULTS)
def test_an_image_does_not_depend_on_its_batch_and_is_the_same_again(kind: str, tmp_path: Path) -> None:
    own = written(tmp_path, {"image_processor_type": kind})
    images = torch.rand(5, 1, 90, 90, generator=torch.Generator().manual_seed(0))
    together = own(images)
    assert torch.equal(together, own(images))
    assert torch.equal(together, torch.cat([own(one) for one in images.split(1)]))
    # The slices of a record are resampled as its channels.
    assert torch.equal(own.cut(images.transpose(0, 1)), own.cut(images).transpose(0, 1))
    grey = own.scaled(own.cut(images))
    assert torch.equal(grey, own(images.expand(-1, 3, -1, -1)))


def test_another_image_size_crops_away_as_much(tmp_path: Path) -> None:
    cropped = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "crop_size": 224}
    assert written(tmp_path, cropped).size(300, 300) == (224, 224)
    larger = written(tmp_path, cropped, image_size=448)
    assert (larger.resize, larger.crop) == (512, (448, 448))
    for kind in DEFAULTS:
        assert written(tmp_path, {"image_processor_type": kind}, image_size=96).size(300, 300) == (96, 96)
    # ConvNeXt warps from 384 pixels on, and crops below.
    convnext = {"image_processor_type": "ConvNextImageProcessor"}
    assert (written(tmp_path, convnext).resize, written(tmp_path, convnext).crop) == ((384, 384), None)
    smaller = written(tmp_path, convnext, image_size=224)
    assert (smaller.resize, smaller.crop) == (256, (224, 224))


def test_older_files_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    """A number for a size: a square's side of ViT, the shorter side of the others."""
    vit = written(tmp_path, {"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "resample": 2})
    assert (vit.processor, vit.resize, vit.crop) == ("ViTImageProcessor", (224, 224), None)
    clip = written(
        tmp_path, {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224}
    )
    assert (clip.resize, clip.crop) == (224, (224, 224))
    convnext = written(
        tmp_path, {"image_processor_type": "ConvNextImageProcessor", "size": 224, "crop_pct": 0.875}
    )
    assert (convnext.resize, convnext.crop) == (256, (224, 224))
    (tmp_path / PROCESSOR).write_text('{"size": 224, "do_resize": true}')
    unnamed = Preprocessor.read(tmp_path / PROCESSOR, default="ViTImageProcessor")
    assert (unnamed.processor, unnamed.size(300, 200)) == ("ViTImageProcessor", (224, 224))


REFUSED = [
    (
        {"image_processor_type": "EfficientNetImageProcessor"},
        "EfficientNetImageProcessor: expected one of ViT",
    ),
    ({}, "image_processor_type=none: expected one of ViT"),
    ({"image_processor_type": "ViTImageProcessor", "do_flip": True}, "do_flip=True: a key that is not known"),
    ({"image_processor_type": "ViTImageProcessor", "do_pad": True}, "do_pad=True: a key that is not known"),
    ({"image_processor_type": "ViTImageProcessor", "resample": 1}, "resample=1: expected 2 .bilinear. or 3"),
    (
        {"image_processor_type": "ViTImageProcessor", "size": {"longest_edge": 9}},
        "size=.*: expected height and width",
    ),
    (
        {"image_processor_type": "ViTImageProcessor", "size": {"height": 9, "width": "9"}},
        "size=.*: expected height",
    ),
    ({"image_processor_type": "ViTImageProcessor", "image_mean": [0.5, 0.5]}, "damaged, or of a processor"),
    (
        {"image_processor_type": "ConvNextImageProcessor", "size": {"height": 9, "width": 9}},
        "expected shortest_edge",
    ),
    (["ViTImageProcessor"], "damaged"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_not_known_is_refused(values: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        written(tmp_path, values)


def test_what_is_off_or_changes_nothing_is_not_refused(tmp_path: Path) -> None:
    plain = written(tmp_path, {"image_processor_type": "ViTImageProcessor"})
    more = {
        "do_pad": None,
        "do_flip": False,
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "crop_pct": 1,
    }
    assert written(tmp_path, {"image_processor_type": "ViTImageProcessorFast", **more}) == plain
