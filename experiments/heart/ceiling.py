"""How much these records can tell at all: centralised logistic regression, on the five splits and on others.

All patients in one place, without privacy, on every column of the table (numbers scaled, categories and blanks as
indicators). The penalty (C = 0.3) had the best mean AUC on training folds of seeds 0 to 4 among 0.03, 0.1 and 0.3.

Example:
  python experiments/heart/ceiling.py                   a minute on one core
"""

import os
import statistics

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from fedmed.compose import compose
from fedmed.data.dataset import SiteDataset
from fedmed.data.table import read_site

PENALTY = 0.3
OTHERS = range(100, 200)


def pooled_auc(sites: list[SiteDataset]) -> float:
    """Test AUC over all sites of one model that was trained on all of their training patients."""
    train, test = ([data.part(test=part) for data in sites] for part in (False, True))

    def gather(parts: list[np.ndarray], name: str) -> np.ndarray:
        return np.concatenate([getattr(data, name)[rows] for data, rows in zip(sites, parts, strict=True)])

    model = LogisticRegression(C=PENALTY, max_iter=1000)
    model.fit(gather(train, "features"), gather(train, "labels"))
    return float(roc_auc_score(gather(test, "labels"), model.predict_proba(gather(test, "features"))[:, 1]))


def main() -> None:
    """Print the AUC of seeds 0 to 4, and what five other splits give."""
    task = compose(["experiment=demo"]).task

    def auc(seed: int) -> float:
        return pooled_auc([read_site(task, site, seed=seed) for site in task.declared_sizes])

    five = [auc(seed) for seed in range(5)]
    print(f"seeds 0 to 4: {' '.join(f'{value:.3f}' for value in five)}; mean {statistics.fmean(five):.3f}")
    others = [auc(seed) for seed in OTHERS]
    means = sorted(statistics.fmean(others[start : start + 5]) for start in range(0, len(others), 5))
    print(
        f"seeds {OTHERS[0]} to {OTHERS[-1]}: mean {statistics.fmean(others):.3f}, sd of a seed "
        f"{statistics.stdev(others):.3f}; means of five seeds from {means[0]:.3f} to {means[-1]:.3f}, "
        f"median {statistics.median(means):.3f}"
    )


if __name__ == "__main__":
    main()
