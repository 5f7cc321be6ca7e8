"""figure.svg and figure.png of the heart-disease benchmark, from results.csv alone.

Example: python experiments/heart/figure.py
"""

import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the root of the repository, where experiments is

from experiments.heart.results import FOLDER, SETTINGS, Setting, spread
from experiments.shared.figures import INK, LOOKS, figure_command, figure_in
from experiments.shared.rows import Row

NAMES = {"head": "head", "lora": "LoRA, last 3 of 6 blocks", "logistic10": "logistic regression"}
SERIES = dict(zip(NAMES, LOOKS, strict=False))
TICKS = {"eps1": 0.0, "eps3": 1.0, "off": 2.0}


def draw_figure(rows: list[Row], folder: Path) -> None:
    """Write both files: pooled AUC of the sentences on the left, accuracy of the table on the right."""
    with figure_in(folder, 9.6, 4.2) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
        text = [setting for setting in SETTINGS if setting.metric == "pooled_auc"]
        table = [setting for setting in SETTINGS if setting.metric != "pooled_auc"]
        _panel(left, rows, text, "pooled test AUC", "Patients as sentences, MiniLM")
        _panel(right, rows, table, "mean test accuracy over hospitals", "Ten-feature table")


def _panel(axes: Any, rows: list[Row], settings: list[Setting], ylabel: str, title: str) -> None:
    families = list(dict.fromkeys(setting.name.split("-")[0] for setting in settings))
    for index, family in enumerate(families):
        colour, marker = SERIES[family]
        offset = 0.16 * (index - (len(families) - 1) / 2)
        line: list[tuple[float, float]] = []
        for setting in (one for one in settings if one.name.startswith(f"{family}-")):
            mine = [row for row in rows if row["setting"] == setting.name]
            if not mine:
                continue
            x = TICKS[setting.name.split("-")[1]] + offset
            by_seed = [
                statistics.fmean(float(r[setting.metric]) for r in mine if r["seed"] == seed)
                for seed in sorted({row["seed"] for row in mine})
            ]
            mean, between, _ = spread(mine, setting.metric)
            jitter = [x + 0.012 * (i - (len(by_seed) - 1) / 2) for i in range(len(by_seed))]
            axes.scatter(jitter, by_seed, s=12, color=colour, alpha=0.45, marker=marker, linewidths=0)
            axes.errorbar(
                x, mean, yerr=between, color=colour, marker=marker, markersize=7, capsize=4, zorder=3
            )
            right = index == len(families) - 1
            axes.annotate(
                f"{mean:.3f}", (x, mean), (9 if right else -9, 9), color=colour, textcoords="offset points",
                ha="left" if right else "right", va="center", fontweight="bold",
            )  # fmt: skip
            line.append((x, mean))
            if setting.target is not None:
                axes.plot([x - 0.14, x + 0.14], [setting.target] * 2, color=INK, linewidth=1.6)
        if line:
            xs, means = zip(*line, strict=True)
            axes.plot(xs, means, color=colour, linewidth=1, alpha=0.5, marker=marker, label=NAMES[family])
    axes.plot([], [], color=INK, linewidth=1.6, label="target")
    axes.set_xticks(list(TICKS.values()), ["ε = 1", "ε = 3", "off\n(NOT PRIVATE)"])
    axes.set_xlim(-0.5, 2.5)
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.legend()


if __name__ == "__main__":
    figure_command(__doc__, FOLDER, draw_figure)
