"""Pretrain a small image encoder on made-up chest pictures and write it as a Hugging Face folder.

    python experiments/phantom_encoder/pretrain.py OUT [--steps N] [--seed S] [--architecture convnext|vit]

The encoder learns to say what was drawn: the kinds of findings, where they add brightness, and the measures of the
anatomy. Equal arguments and versions give, on one kind of processor, an equal model.safetensors.
"""

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

# Sums over several threads differ in their last bits with the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from pictures import CELLS, KINDS, SIDE, Pictures, draw
from torch import Tensor, nn
from torch.nn import functional
from transformers import ConvNextConfig, ConvNextModel, PreTrainedModel, ViTConfig, ViTModel
from transformers.utils import logging

BATCH = 64
# Grey values of 0 to 1 become -2 to 2.
MEAN, DEVIATION = 0.5, 0.25
LEARNING_RATE = {"convnext": 2e-3, "vit": 1e-3}
WEIGHT_DECAY = 0.05
WARM_UP = 100
LOSSES = ("kinds", "measures", "maps")
# Pictures over which the measures are standardised and the encoder's output is centred.
REFERENCE = 1024
# A map's deviation is about 0.03.
MAP_SCALE = 20.0
# The second word of every generator: phantoms of `make_phantoms` use 1 to 3 there, whatever their seed.
STREAM = 70_000


def stream(seed: int, number: int) -> np.random.Generator:
    """A generator that no demo and no test has, since theirs have other second words; 0 is the reference."""
    return np.random.default_rng([seed, STREAM, number])


class Convnext(nn.Module):
    """Three stages at 16, 8 and 4 cells a side; the last one is pooled by its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ConvNextModel(
            ConvNextConfig(
                num_channels=3, image_size=SIDE, patch_size=4, num_stages=3, hidden_sizes=[32, 96, 192],
                depths=[1, 2, 4], drop_path_rate=0.0,
                # No scale: a parameter of no layer, which few rules for gradients of single patients know.
                layer_scale_init_value=0.0,
            )
        )  # fmt: skip
        self.width, self.cells = 192, SIDE // 16

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(pictures, width) pooled and (pictures, width, cells, cells)."""
        found = self.encoder(pixels)
        return found.pooler_output, found.last_hidden_state

    @torch.no_grad()
    def standardise(self, mean: Tensor, deviation: Tensor) -> None:
        """Change the last layer so that its output has mean 0 and deviation 1 where it had these."""
        norm = self.encoder.layernorm
        norm.weight /= deviation
        norm.bias.copy_((norm.bias - mean) / deviation)


class Vit(nn.Module):
    """Patches of 8 pixels; the class token stands for the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ViTModel(
            ViTConfig(
                num_channels=3, image_size=SIDE, patch_size=8, hidden_size=144, num_hidden_layers=6,
                num_attention_heads=3, intermediate_size=576, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            add_pooling_layer=False,
        )  # fmt: skip
        self.width, self.cells = 144, SIDE // 8

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(pictures, width) class tokens and (pictures, width, cells, cells) patches."""
        tokens = self.encoder(pixels).last_hidden_state
        return tokens[:, 0], tokens[:, 1:].transpose(1, 2).unflatten(2, (self.cells, self.cells))

    def standardise(self, mean: Tensor, deviation: Tensor) -> None:
        """Nothing: the last layer's output is the patches' too."""


class Reader(nn.Module):
    """What is asked of the encoder, by one linear layer each; thrown away afterwards."""

    def __init__(self, width: int, cells: int, measures: int) -> None:
        super().__init__()
        self.kinds, self.measures = nn.Linear(width, len(KINDS)), nn.Linear(width, measures)
        self.fold = CELLS // cells
        self.maps = nn.Conv2d(width, self.fold**2, kernel_size=1)

    def forward(self, pooled: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = functional.pixel_shuffle(self.maps(places), self.fold).squeeze(1)
        return self.kinds(pooled), self.measures(pooled), maps


def pixels_of(images: np.ndarray) -> Tensor:
    """(pictures, 3, SIDE, SIDE) as the encoder reads them: grey in three channels."""
    grey = (torch.from_numpy(images) - MEAN) / DEVIATION
    return grey.unsqueeze(1).expand(-1, 3, -1, -1)


def losses(
    model: nn.Module, reader: nn.Module, pictures: Pictures, mean: Tensor, deviation: Tensor
) -> Tensor:
    """(3,) means over a batch: cross-entropy of the kinds, robust error of the measures, squared error of the maps."""
    kinds, measures, maps = reader(*model(pixels_of(pictures.images)))
    wanted = (torch.from_numpy(pictures.measures) - mean) / deviation
    return torch.stack([
        functional.binary_cross_entropy_with_logits(kinds, torch.from_numpy(pictures.kinds)),
        functional.smooth_l1_loss(measures, wanted),
        functional.mse_loss(maps, torch.from_numpy(pictures.maps) * MAP_SCALE),
    ])  # fmt: skip


def optimizer_of(architecture: str, *modules: nn.Module) -> torch.optim.AdamW:
    """Matrices and kernels decay; biases, norms and positions do not."""
    groups: dict[float, list[nn.Parameter]] = {WEIGHT_DECAY: [], 0.0: []}
    for name, parameter in itertools.chain(*(module.named_parameters() for module in modules)):
        decays = parameter.dim() > 1 and "position" not in name
        groups[WEIGHT_DECAY if decays else 0.0].append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": decay} for decay, params in groups.items()],
        lr=LEARNING_RATE[architecture],
    )


def schedule(steps: int) -> Iterator[float]:
    """Parts of the learning rate: up in a line, then down along a cosine."""
    for step in range(steps):
        yield min(1, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def pretrain(architecture: str, *, steps: int, seed: int) -> PreTrainedModel:
    """The trained encoder; what it costs and how well it does is printed as it goes."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    reference = draw(REFERENCE, stream(seed, 0))
    mean, deviation = (torch.from_numpy(f(reference.measures, axis=0)) for f in (np.mean, np.std))
    model = {"convnext": Convnext, "vit": Vit}[architecture]()
    reader = Reader(model.width, model.cells, len(mean))
    optimizer = optimizer_of(architecture, model, reader)
    since: list[Tensor] = []
    for step, part in enumerate(schedule(steps), start=1):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE[architecture] * part
        found = losses(model, reader, draw(BATCH, stream(seed, step)), mean, deviation)
        optimizer.zero_grad()
        found.sum().backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *reader.parameters()], 1.0)
        optimizer.step()
        since.append(found.detach())
        if step % 100 == 0 or step == steps:
            values = ", ".join(
                f"{n} {v:.4f}" for n, v in zip(LOSSES, torch.stack(since).mean(0), strict=True)
            )
            print(f"step {step} of {steps}, {time.process_time():.0f} CPU s: {values}", flush=True)
            since = []
    centre(model, reference)
    return model.encoder


@torch.no_grad()
def centre(model: nn.Module, reference: Pictures) -> None:
    """Let the features have mean 0 and deviation 1 over made-up pictures: constants that no record has a part in."""
    model.eval()
    parts = np.split(reference.images, REFERENCE // BATCH)
    pooled = torch.cat([model(pixels_of(part))[0] for part in parts])
    model.standardise(pooled.mean(0), pooled.std(0))


def write(encoder: PreTrainedModel, out: Path) -> None:
    """config.json, model.safetensors in float16, and preprocessor_config.json."""
    logging.disable_progress_bar()
    encoder.half().save_pretrained(out)
    # Stored in half the bytes, computed with in float32.
    encoder.config.dtype = "float32"
    encoder.config.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    preprocessing = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": SIDE, "width": SIDE},
        "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [MEAN] * 3, "image_std": [DEVIATION] * 3,
    }  # fmt: skip
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--architecture", choices=sorted(LEARNING_RATE), default="convnext")
    asked = parser.parse_args()
    write(pretrain(asked.architecture, steps=asked.steps, seed=asked.seed), asked.out)


if __name__ == "__main__":
    main()
