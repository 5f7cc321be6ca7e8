"""A tiny encoder of each family, made from its configuration class and saved as its authors' are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as t
from torch import nn

from fedmed.models.classifier import Arrays, Classifier, select
from fedmed.training import LocalData, set_adapter
from tests.conftest import WORDS, sha256
from tests.stores import settings

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
IMAGE = {"image_size": 16, "patch_size": 4, "num_channels": 3}
VISION = {**SIZES, **IMAGE}
DINO = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, **IMAGE}
STAGES = {"hidden_sizes": [8, 16, 32], "depths": [1, 2, 1], "num_stages": 3}
TEXT = {**SIZES, "vocab_size": 50, "max_position_embeddings": 8, "projection_dim": 16}

# The encoder, and the file of its preprocessing; SigLIP and CLIP with both towers, as they are published.
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "vit": (lambda: t.ViTModel(t.ViTConfig(**VISION)), {"image_processor_type": "ViTImageProcessor"}),
    "dinov2": (lambda: t.Dinov2Model(t.Dinov2Config(**DINO)), {"image_processor_type": "BitImageProcessor"}),
    "dinov2_with_registers": (
        lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(num_register_tokens=2, **DINO)),
        {"image_processor_type": "BitImageProcessor"},
    ),
    "dinov3_vit": (
        lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(num_register_tokens=2, **VISION)),
        {"image_processor_type": "DINOv3ViTImageProcessorFast"},
    ),
    "siglip": (
        lambda: t.SiglipModel(
            t.SiglipConfig(
                text_config={**TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, vision_config=VISION
            )
        ),
        {"image_processor_type": "SiglipImageProcessor"},
    ),
    "clip": (
        lambda: t.CLIPModel(
            t.CLIPConfig(
                text_config={**TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
                vision_config={**VISION, "projection_dim": 16}, projection_dim=16,
            )
        ),
        {"image_processor_type": "CLIPImageProcessor"},
    ),
    "convnext": (
        lambda: t.ConvNextModel(t.ConvNextConfig(**STAGES)),
        {"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.8},
    ),
    "convnextv2": (
        lambda: t.ConvNextV2Model(t.ConvNextV2Config(**STAGES)),
        {"image_processor_type": "ConvNextImageProcessor"},
    ),
}  # fmt: skip
# Those that published models pool by their class token.
POOLING = {"siglip": "pooler", "convnext": "pooler", "convnextv2": "pooler"}


def image_encoder(folder: Path, family: str) -> Path:
    """A folder with such an encoder for images of 16 pixels."""
    make, processor = FAMILIES[family]
    torch.manual_seed(0)
    encoder = make()
    with torch.no_grad():
        for parameter in encoder.parameters():
            # Also what starts at zero or at a constant: tokens, scales, biases.
            parameter.add_(0.02 * torch.randn_like(parameter))
    encoder.save_pretrained(folder)
    size = {"shortest_edge": 20} if "Bit" in str(processor) or "CLIP" in str(processor) else None
    if "ConvNext" in str(processor):
        size = {"shortest_edge": 16}
    sized = {"size": size or {"height": 16, "width": 16}}
    crop = {"crop_size": {"height": 16, "width": 16}} if size == {"shortest_edge": 20} else {}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | sized | crop))
    return folder


def image_overrides(folder: Path, family: str, data: Path | str = "nowhere", *more: str) -> list[str]:
    """A private run with that encoder on the images of two sites."""
    return settings(
        data, "model=hf_image", f"model.path={folder}", f"model.sha256={sha256(folder / 'model.safetensors')}",
        f"model.pooling={POOLING.get(family, 'cls')}", "adapter=lora", "adapter.rank=4", "adapter.last_blocks=2",
        "task.image_size=20", *more,
    )  # fmt: skip


def modernbert(folder: Path) -> Path:
    """A folder with a ModernBERT and a word tokenizer."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", ".", *WORDS.split(), *map(str, range(300))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    t.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    modernbert_of(len(words)).save_pretrained(folder)
    return folder


def modernbert_of(vocabulary: int) -> Any:
    """A ModernBERT with layers of both kinds of attention."""
    torch.manual_seed(0)
    return t.ModernBertModel(
        t.ModernBertConfig(
            vocab_size=vocabulary, pad_token_id=0, bos_token_id=2, cls_token_id=2, eos_token_id=3, sep_token_id=3,
            local_attention=4, global_attn_every_n_layers=2, max_position_embeddings=64, **SIZES,
        )
    )  # fmt: skip


def moved(model: Classifier, seed: int = 0) -> Arrays:
    """The start of a run, with something added to every array: LoRA's B and the head start at zero."""
    draws = np.random.default_rng(seed)
    start = model.initialise(0)
    return {n: v + draws.normal(0, 0.05, v.shape).astype(np.float32) for n, v in start.items()}


def own_gradient(
    model: Classifier, data: LocalData, arrays: Arrays, records: np.ndarray
) -> dict[str, np.ndarray]:
    """Of one patient's mean loss, by autograd alone."""
    set_adapter(model, arrays)
    model.training_mode()
    model.zero_grad()
    given = model(**select(data.batch, torch.from_numpy(records)))
    nn.functional.binary_cross_entropy_with_logits(given, data.labels[records]).backward()
    found = {
        name: p.grad.double().numpy().copy() for name, p in model.adapter().items() if p.grad is not None
    }
    model.zero_grad(set_to_none=True)
    assert found.keys() == arrays.keys()
    return found
