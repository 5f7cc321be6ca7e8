"""How well a linear model on an encoder's features tells phantoms with a finding from those without.

    python experiments/phantom_encoder/probe.py [FOLDER …] [--seed S]

Beside each folder of an encoder stands one of the same shape with random weights, and means of 4 x 4 pixels. Phantoms
are those that `fedmed task phantoms` draws, each taken by one of three scanners.
"""

import argparse
import os
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from pretrain import MEAN, SIDE, pixels_of
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from transformers import AutoConfig, AutoModel

from fedmed.data.images import squared
from fedmed.dicom.synthetic.phantoms import make_phantoms
from fedmed.dicom.synthetic.scanners import scanners

SHIPPED = Path(__file__).parents[2] / "fedmed" / "models" / "phantom_encoder"
DIFFICULTIES = (0.25, 0.5, 1.0, 2.0)
TRAINED_ON = (50, 200, 600)
TESTED_ON = 600
# Inverse strengths of the penalty; each is tried on a quarter of the training patients.
PENALTIES = (0.001, 0.01, 0.1, 1.0)


def phantoms(difficulty: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(patients, SIDE, SIDE) of 0 to 1 and (patients,) labels: an image each, three scanners by turns."""
    count = max(TRAINED_ON) + TESTED_ON
    labels = np.random.default_rng([seed, 71_000]).integers(0, 2, count)
    made = make_phantoms(labels, np.ones(count, np.int64), difficulty=difficulty, seed=seed)
    images = np.empty((count, SIDE, SIDE), np.float32)
    for index, scanner in enumerate(scanners(3, SIDE, SIDE)):
        rng = np.random.default_rng([seed, 71_001, index])
        centre, width = scanner.window(scanner.bits_stored)
        stored = scanner.scan(made.images[index::3], shift=0.5, rng=rng).astype(np.float32)
        shown = (stored - np.float32(centre - 0.5)) / np.float32(width - 1) + np.float32(0.5)
        shown = 1 - shown if scanner.photometric == "MONOCHROME1" else shown
        images[index::3] = [squared(frame, SIDE) for frame in shown]
    return images, labels


@torch.no_grad()
def features(encoder: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """(patients, width): the pooled output, of a ViT the class token."""
    found = [encoder(part) for part in pixels_of(images).split(64)]
    pooled = [getattr(one, "pooler_output", None) for one in found]
    return torch.cat(
        [one.last_hidden_state[:, 0] if p is None else p for one, p in zip(found, pooled, strict=True)]
    ).numpy()


def auc(rows: np.ndarray, labels: np.ndarray, trained_on: int) -> float:
    """On the last `TESTED_ON` patients, of a logistic regression on the first `trained_on`."""
    middle, scale = rows[:trained_on].mean(0), rows[:trained_on].std(0) + 1e-6
    rows = (rows - middle) / scale
    kept = trained_on * 3 // 4

    def fit(penalty: float, count: int) -> LogisticRegression:
        return LogisticRegression(C=penalty, max_iter=2000).fit(rows[:count], labels[:count])

    def held_out(penalty: float) -> float:
        part = slice(kept, trained_on)
        return float(roc_auc_score(labels[part], fit(penalty, kept).decision_function(rows[part])))

    best = fit(max(PENALTIES, key=held_out), trained_on)
    return float(roc_auc_score(labels[-TESTED_ON:], best.decision_function(rows[-TESTED_ON:])))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="*", default=[SHIPPED])
    parser.add_argument("--seed", type=int, default=101)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    encoders = {}
    for folder in asked.folders:
        torch.manual_seed(0)
        encoders[f"{folder.name}, random"] = AutoModel.from_config(AutoConfig.from_pretrained(folder)).eval()
        encoders[folder.name] = AutoModel.from_pretrained(folder, dtype="float32").eval()
    for difficulty in DIFFICULTIES:
        images, labels = phantoms(difficulty, asked.seed)
        means = images.reshape(-1, SIDE // 4, 4, SIDE // 4, 4).mean(axis=(2, 4)).reshape(len(images), -1)
        found = {"means of pixels": (means - MEAN, 0.0)}
        for name, encoder in encoders.items():
            began = time.process_time()
            found[name] = features(encoder, images), (time.process_time() - began) / len(images)
        for name, (rows, seconds) in found.items():
            values = "  ".join(f"{n}: {auc(rows, labels, n):.3f}" for n in TRAINED_ON)
            print(
                f"difficulty {difficulty}  {name:30}  {values}  {seconds * 1e3:.2f} CPU ms an image",
                flush=True,
            )


if __name__ == "__main__":
    main()
