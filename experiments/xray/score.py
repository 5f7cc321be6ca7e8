"""Score what a finished run released on a hospital that took part in no training.

Example: python experiments/xray/score.py RUN experiments/xray/data/val/ingested/val
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from fedmed.config import run_config_from_dict
from fedmed.data.readers import read_site
from fedmed.metrics import ScoreCounts
from fedmed.models.build import build
from fedmed.training import LocalData, logits, one_thread
from strategies.folder import RunFolder


def score(run: Path, hospital: Path) -> tuple[float, float]:
    """AUC and accuracy (threshold 0.5) of what `run` released, on every image of an ingested `hospital`."""
    one_thread()
    config = run_config_from_dict(json.loads((run / "config.json").read_text()))
    # All of this hospital is scored: half of it is held out only because a split needs two parts.
    task = dataclasses.replace(config.task, path=str(hospital), test_fraction=0.5)
    data = read_site(task, hospital.name, seed=0)
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
    arguments = parser.parse_args()
    auc, accuracy = score(arguments.run, arguments.hospital)
    print(f"AUC {auc:.4f}, accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
