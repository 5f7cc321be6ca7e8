"""The same work in a bare loop: PyTorch and Opacus in one process, no sites, no messages.

    python experiments/speed/bare.py images.npz --sites 4 --rounds 10 --steps 16

Opacus's own parts: GradSampleModule (hooks), DPOptimizer, Poisson sampling by a mask. One model stands for every site
in turn, and the sites' weights are averaged after each round. Prints one JSON object: seconds, and the peak memory.
"""

import argparse
import copy
import json
import time

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn import functional

from fedmed.resources import PeakMemory


def network() -> nn.Module:
    """The layers of `model=cnn`, with an ordinary head."""

    def block(*layers: nn.Module, width: int) -> list[nn.Module]:
        return [*layers, nn.GroupNorm(8, width), nn.ReLU()]

    return nn.Sequential(
        *block(nn.Conv2d(1, 24, 5, stride=2, padding=2), width=24),
        *block(nn.AvgPool2d(2), nn.Conv2d(24, 48, 3, padding=1), width=48),
        *block(nn.AvgPool2d(2), nn.Conv2d(48, 72, 3, padding=1), width=72),
        *block(nn.AvgPool2d(2), nn.Conv2d(72, 96, 3, padding=1), width=96),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 1),
    )  # fmt: skip


def train(model: nn.Module, images: Tensor, labels: Tensor, asked: argparse.Namespace) -> None:
    """One round at one site."""
    wrapped = GradSampleModule(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0,
        expected_batch_size=asked.rate * len(images),
    )  # fmt: skip
    for _ in range(asked.steps):
        chosen = torch.rand(len(images)) < asked.rate
        optimizer.zero_grad()
        logits = wrapped((images[chosen] - 0.5) * 4).squeeze(1)
        functional.binary_cross_entropy_with_logits(logits, labels[chosen]).backward()
        optimizer.step()
    wrapped.remove_hooks()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", help="a .npz file with train_images and train_labels")
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--patients", type=int, required=True, help="of each site, to train on")
    parser.add_argument("--rate", type=float, default=1 / 16)
    asked = parser.parse_args()
    began = time.monotonic()
    with PeakMemory() as memory, np.load(asked.images) as file:
        order = np.random.default_rng(0).permutation(len(file["train_images"]))
        images = torch.from_numpy(file["train_images"][order]).float().unsqueeze(1) / 255
        labels = torch.from_numpy(file["train_labels"][order].ravel()).float()
        parts = [slice(site * asked.patients, (site + 1) * asked.patients) for site in range(asked.sites)]
        shared = network()
        for _ in range(asked.rounds):
            found = []
            for part in parts:
                model = copy.deepcopy(shared)
                train(model, images[part], labels[part], asked)
                found.append(model.state_dict())
            shared.load_state_dict({name: sum(own[name] for own in found) / len(found) for name in found[0]})
    print(json.dumps({"seconds": time.monotonic() - began, "peak_mb": memory.megabytes}))


if __name__ == "__main__":
    main()
