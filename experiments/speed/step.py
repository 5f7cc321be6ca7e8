"""How long a private step takes beside the same step without privacy, on one thread.

    python experiments/speed/step.py [--rounds N] [--only NAME]

Both sides take the same batch through the same network: forward, backward and optimizer in plain PyTorch, and the
step of `fedmed.privacy.dpsgd`, noise included. They alternate; what is compared is the medians of their CPU seconds.
Then the shares of the private step, and the peak memory of one large step, each measured in a process of its own.
"""

import argparse
import csv
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from networks import Setting, network, plan, records
from torch import Tensor
from torch.nn import functional

from fedmed.devices import CPU, sent
from fedmed.optimizers import SGD
from fedmed.privacy.dpsgd import PatientOptimizer, private_step
from fedmed.privacy.patient_gradients import PatientGradients
from fedmed.privacy.randomness import operating_system
from fedmed.training import one_thread

RESULTS = Path(__file__).parent / "results.csv"
COLUMNS = (
    "setting", "plain_ms", "private_ms", "ratio", "target", "network_ms", "clip_ms", "noise_ms", "peak_mb",
    "plain_peak_mb",
)  # fmt: skip
SETTINGS = [
    Setting("cnn, 28 px", "cnn", 64, size=28, target=1.6),
    Setting("cnn, 32 px", "cnn", 64, size=32, target=1.6),
    Setting("cnn, 64 px", "cnn", 64, size=64, target=1.6),
    Setting("cnn, 28 px, 3 images a patient", "cnn", 64, images=3, size=28, target=1.6),
    Setting("cnn, 64 px, 3 images a patient", "cnn", 64, images=3, size=64, target=1.6),
    Setting("LoRA, last 2 of 12 blocks, ViT-S, 224 px", "suffix", 16, width=384, adapter="lora", target=1.05),
    Setting("LoRA, last 2 of 12 blocks, ViT-B, 224 px", "suffix", 16, width=768, adapter="lora", target=1.05),
    Setting("full, ViT-Tiny, 224 px", "vit", 32, target=1.35),
    Setting("full, ViT-Tiny, 112 px", "vit", 32, size=112),
    Setting("bf16: cnn, 64 px", "cnn", 64, size=64, bf16=True),
    Setting("bf16: LoRA, last 2 of 12 blocks, ViT-S, 224 px", "suffix", 16, width=384, adapter="lora", bf16=True),
    Setting("bf16: full, ViT-Tiny, 224 px", "vit", 32, bf16=True),
    Setting("head, 768 features", "head", 64, adapter="head"),
    Setting("mlp, 20 features, 64 hidden", "mlp", 64),
]  # fmt: skip


class Sides:
    """The same network with and without privacy, each with its own optimizer; records wait on the host."""

    def __init__(self, setting: Setting, device: torch.device = CPU) -> None:
        self.values, self.labels, self.patients = records(setting)
        self.device = device
        self.bf16 = setting.bf16
        self.models = {side: network(setting).to(device) for side in ("plain", "private")}
        optimizers = {
            side: SGD((p for p in model.parameters() if p.requires_grad), lr=1e-3)
            for side, model in self.models.items()
        }
        self.plain_optimizer = optimizers["plain"]
        # As in training, for all steps of a round.
        self.wrapped = PatientGradients(self.models["private"], {"values": self.values})
        self.private_optimizer = PatientOptimizer(
            optimizers["private"], plan=plan(setting), source=operating_system(), live=self.wrapped.live
        )

    def losses(self, model: Callable[..., Tensor]) -> Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            logits = model(values=sent(self.values, self.device))
        labels = sent(self.labels, self.device)
        return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")

    def plain(self) -> None:
        self.losses(self.models["plain"]).mean().backward()
        self.plain_optimizer.step()
        for p in self.plain_optimizer.parameters:
            p.grad = None

    def private(self) -> None:
        chunks = ((self.losses(self.wrapped), self.patients) for _ in (0,))
        private_step(self.wrapped, self.private_optimizer, chunks)


def seconds(action: Callable[[], None]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


def shares(sides: Sides, rounds: int) -> dict[str, float]:
    """Medians of CPU milliseconds: clip (with truncation and sum), noise, and everything else: the network's part."""
    spent = {"clip": 0.0, "noise": 0.0}
    owner, names = PatientOptimizer, {"clip": "accumulate", "noise": "noised"}
    originals = {part: getattr(owner, name) for part, name in names.items()}

    def timed(part: str) -> Callable[..., object]:
        def call(*values: object) -> object:
            began = time.process_time()
            found = originals[part](*values)
            spent[part] += time.process_time() - began
            return found

        return call

    found: dict[str, list[float]] = {"network": [], "clip": [], "noise": []}
    try:
        for part, name in names.items():
            setattr(owner, name, timed(part))
        for _ in range(rounds):
            spent.update(clip=0.0, noise=0.0)
            total = seconds(sides.private)
            for part in spent:
                found[part].append(spent[part])
            found["network"].append(total - spent["clip"] - spent["noise"])
    finally:
        for part, name in names.items():
            setattr(owner, name, originals[part])
    return {f"{part}_ms": 1e3 * statistics.median(values) for part, values in found.items()}


def measured(setting: Setting, rounds: int) -> dict[str, float]:
    """Both sides in turn, after two steps of each."""
    one_thread()
    sides = Sides(setting)
    plain, private = [], []
    gc.disable()
    for number in range(rounds + 2):
        pair = seconds(sides.plain), seconds(sides.private)
        if number >= 2:
            plain.append(pair[0])
            private.append(pair[1])
    gc.enable()
    medians = 1e3 * statistics.median(plain), 1e3 * statistics.median(private)
    return {
        "plain_ms": medians[0], "private_ms": medians[1], "ratio": medians[1] / medians[0], **shares(sides, rounds),
    }  # fmt: skip


def peak_megabytes(setting: Setting, side: str) -> float:
    """Of two steps in a new process, above what it held before them: the system's own high-water mark."""
    command = [sys.executable, __file__, "--peak", setting.name, side]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(setting: Setting, side: str) -> None:
    one_thread()
    sides = Sides(setting)

    def held(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

    before = held("VmRSS:")
    for _ in range(2):
        getattr(sides, side)()
    print(held("VmHWM:") - before)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--only", default="", help="settings whose name holds this; results.csv is left alone"
    )
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "SIDE"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peak:
        print_peak(next(one for one in SETTINGS if one.name == asked.peak[0]), asked.peak[1])
        return
    print(
        f"{'':<42} {'plain':>8} {'private':>8} {'ratio':>6} {'target':>6}   network + clip + noise (ms); peaks (MB)"
    )
    rows = []
    for setting in (one for one in SETTINGS if asked.only in one.name):
        row: dict[str, float] = measured(setting, asked.rounds)
        row |= {
            "peak_mb": peak_megabytes(setting, "private"),
            "plain_peak_mb": peak_megabytes(setting, "plain"),
        }
        rows.append(
            {"setting": setting.name, "target": setting.target or ""}
            | {k: f"{v:.3g}" for k, v in row.items()}
        )
        print(
            f"{setting.name:<42} {row['plain_ms']:>8.1f} {row['private_ms']:>8.1f} {row['ratio']:>6.2f} "
            f"{setting.target or '':>6}   {row['network_ms']:.1f} + {row['clip_ms']:.1f} + {row['noise_ms']:.1f}   "
            f"{row['peak_mb']:.0f}, {row['plain_peak_mb']:.0f}", flush=True,
        )  # fmt: skip
    if not asked.only:
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
