"""Images a second and peak memory of ViT-L on an accelerator: LoRA, head and full, with privacy and without.

    python experiments/speed/gpu.py [--device cuda] [--batch 64] [--layers 24 --width 1024]

224 pixels, patches of 16, in fp32 and in bf16. Writes gpu.csv beside itself. On an accelerator PyTorch fails the steps
that are timed where the host would wait inside one. On a CPU, `--device cpu --layers 2 --width 64` goes the same way;
the peak memory is then the process's own high-water mark.
"""

import argparse
import contextlib
import csv
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from networks import Setting
from step import Sides

from fedmed.devices import device_of
from fedmed.resources import peak_resident

COLUMNS = ("adapter", "precision", "side", "batch", "images_per_second", "peak_mb")


def setting(adapter: str, asked: argparse.Namespace, *, bf16: bool) -> Setting:
    """From pixels: nothing is stored."""
    return Setting(
        adapter, "vit", asked.batch, size=asked.size, width=asked.width, layers=asked.layers, adapter=adapter,
        bf16=bf16,
    )  # fmt: skip


def seconds(action: Callable[[], None], steps: int, device: torch.device) -> float:
    """Of one step: the mean of several after a first one, as the device works behind the host."""
    action()
    _wait(device)
    began = time.monotonic()
    with _nobody_waits(device):
        for _ in range(steps):
            action()
    _wait(device)
    return (time.monotonic() - began) / steps


@contextlib.contextmanager
def _nobody_waits(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak(device: torch.device) -> float:
    """Megabytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_resident() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--results", default=str(Path(__file__).parent / "gpu.csv"))
    asked = parser.parse_args()
    device = device_of(asked.device)
    rows = []
    for adapter, precision in itertools.product(("head", "lora", "full"), ("fp32", "bf16")):
        sides = Sides(setting(adapter, asked, bf16=precision == "bf16"), device)
        for side in ("plain", "private"):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            rate = asked.batch / seconds(getattr(sides, side), asked.steps, device)
            values = (adapter, precision, side, asked.batch, f"{rate:.1f}", f"{peak(device):.0f}")
            rows.append(dict(zip(COLUMNS, values, strict=True)))
            print(
                f"{adapter:<6} {precision} {side:<8} {rate:>9.1f} images/s {peak(device):>8.0f} MB",
                flush=True,
            )
        sides.private_optimizer.close()
        del sides
    with open(asked.results, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
