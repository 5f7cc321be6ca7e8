"""What another clinic's scanner and positioning may do to an image: fixed before any setting was scored under it.

The official training and validation images are of one kind, the test images of another: a plain validation AUC is near
0.99 for many settings and does not tell them apart. Settings are chosen by the mean AUC over these shifts in its place
(`score.py --shifted`).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def moved(images: Tensor, *, zoom: float | Tensor = 1.0, right: float | Tensor = 0.0, down: float | Tensor = 0.0,
          degrees: float | Tensor = 0.0) -> Tensor:  # fmt: skip
    """Enlarged by `zoom`, turned, and shifted by 28ths of a side; the border goes on beyond the edge."""
    ones = torch.ones(len(images))
    angle = degrees * ones * math.pi / 180
    cosine, sine = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    rows = (
        torch.stack([cosine, -sine, right * ones / 14], 1),
        torch.stack([sine, cosine, down * ones / 14], 1),
    )
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def toned(images: Tensor, *, gamma: float | Tensor = 1.0, contrast: float | Tensor = 1.0,
          brightness: float | Tensor = 0.0) -> Tensor:  # fmt: skip
    """To the power `gamma`, then stretched about the middle grey and made brighter, within 0 and 1."""
    ones = torch.ones(len(images), 1, 1, 1)
    power, slope, more = (
        ones * torch.as_tensor(value).view(-1, 1, 1, 1) for value in (gamma, contrast, brightness)
    )
    return (((images**power) - 0.5) * slope + 0.5 + more).clamp(0, 1)


def blurred(images: Tensor, *, deviation: float) -> Tensor:
    """By a Gaussian of so many pixels."""
    line = torch.exp(-(torch.arange(-3, 4.0) ** 2) / 2 / deviation**2)
    line /= line.sum()
    across = functional.conv2d(functional.pad(images, (3, 3, 0, 0), mode="replicate"), line.view(1, 1, 1, 7))
    return functional.conv2d(functional.pad(across, (0, 0, 3, 3), mode="replicate"), line.view(1, 1, 7, 1))


def noisy(images: Tensor, *, deviation: float, seed: int) -> Tensor:
    """With Gaussian noise, within 0 and 1."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + deviation * noise).clamp(0, 1)


def mixed(images: Tensor, *, seed: int) -> Tensor:
    """Each image in a way of its own: moved, toned and a little noisy."""
    draws = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> Tensor:
        return torch.rand(len(images), generator=draws) * (high - low) + low

    zoom = torch.exp(between(math.log(0.87), math.log(1.15)))
    found = moved(images, zoom=zoom, right=between(-2, 2), down=between(-2, 2), degrees=between(-8, 8))
    gamma = torch.exp(between(math.log(0.7), math.log(1.4)))
    contrast = torch.exp(between(math.log(0.75), math.log(1.3)))
    found = toned(found, gamma=gamma, contrast=contrast, brightness=between(-0.1, 0.1))
    return noisy(found, deviation=0.02, seed=seed + 100)


# Of (images, 1, rows, columns) from 0 to 1 each makes as many of the same shape.
SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "brighter": lambda x: toned(x, brightness=0.1),
    "darker": lambda x: toned(x, brightness=-0.1),
    "less contrast": lambda x: toned(x, contrast=0.75),
    "more contrast": lambda x: toned(x, contrast=1.3),
    "lighter midtones": lambda x: toned(x, gamma=0.7),
    "darker midtones": lambda x: toned(x, gamma=1.4),
    "larger": lambda x: moved(x, zoom=1.15),
    "smaller": lambda x: moved(x, zoom=0.87),
    "shifted": lambda x: moved(x, right=2, down=-1.5),
    "turned": lambda x: moved(x, degrees=8),
    "blurred": lambda x: blurred(x, deviation=0.7),
    "noisy": lambda x: noisy(x, deviation=0.05, seed=7),
    **{f"mixed {seed}": lambda x, seed=seed: mixed(x, seed=seed) for seed in (1, 2, 3)},  # type: ignore[misc]
}
