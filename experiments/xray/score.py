"""Score what a finished run released on a hospital that took part in no training.

Example: python experiments/xray/score.py RUN experiments/xray/data/val/ingested/val
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the root of the repository, where experiments is

from experiments.xray.shifts import SHIFTS
from fedmed.config import run_config_from_dict
from fedmed.data.readers import read_site
from fedmed.metrics import ScoreCounts
from fedmed.models.build import build
from fedmed.training import LocalData, logits, one_thread
from strategies.folder import RunFolder


def score(
    run: Path, hospital: Path, *, shift: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> tuple[float, float]:
    """AUC and accuracy (threshold 0.5) of what `run` released, on every image of an ingested `hospital`.

    Args:
        shift: what is done to the images first, as in `shifts.py`.
    """
    one_thread()
    config = run_config_from_dict(json.loads((run / "config.json").read_text()))
    # All of this hospital is scored: half of it is held out only because a split needs two parts.
    task = dataclasses.replace(config.task, path=str(hospital), test_fraction=0.5)
    data = read_site(task, hospital.name, seed=0)
    if shift is not None:
        data = dataclasses.replace(data, images=shift(torch.from_numpy(data.images)).numpy())
    network = build(config.task, config.model, config.adapter)
    everyone = LocalData(network.prepare(data), torch.from_numpy(data.labels), [])
    progress = RunFolder(run).load()
    if progress is None:
        raise SystemExit(f"{run}: no round was finished")
    network.initialise(config.seed)
    found = logits(network, everyone, progress.released())
    if not np.isfinite(found).all():
        raise SystemExit(f"{run}: the adapter's scores are not finite; the training diverged")
    counts = ScoreCounts.of(found, data.labels)
    auc, accuracy = counts.auc(), counts.accuracy()
    if auc is None or accuracy is None:
        raise SystemExit(f"{hospital}: expected images of both classes")
    return auc, accuracy


def main() -> None:
    """Print what `score` finds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("hospital", type=Path, help="the folder of an ingested hospital")
    parser.add_argument(
        "--shifted", action="store_true", help="AUC under each shift of shifts.py, and their mean"
    )
    arguments = parser.parse_args()
    if not arguments.shifted:
        auc, accuracy = score(arguments.run, arguments.hospital)
        print(f"AUC {auc:.4f}, accuracy {accuracy:.4f}")
        return
    found = {name: score(arguments.run, arguments.hospital, shift=shift)[0] for name, shift in SHIFTS.items()}
    for name, auc in found.items():
        print(f"{name}: AUC {auc:.4f}")
    print(f"mean {statistics.fmean(found.values()):.4f}, worst {min(found.values()):.4f}")


if __name__ == "__main__":
    main()
