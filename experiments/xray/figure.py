"""figure.svg and figure.png of the chest X-ray benchmark, from results.csv alone.

Example: python experiments/xray/figure.py
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the root of the repository, where experiments is

from experiments.shared.figures import INK, LOOKS, MUTED, figure_command, figure_in
from experiments.shared.rows import Row
from experiments.xray.results import (
    EPSILONS,
    FOLDER,
    LABEL_SKEW,
    NAMES,
    PUBLISHED,
    SETTINGS,
    TARGET,
    Setting,
    spread,
)


def draw_figure(rows: list[Row], folder: Path) -> None:
    """Write both files: test AUC against epsilon, a series for each split and strategy."""
    with figure_in(folder, 8.0, 4.4) as figure:
        axes = figure.subplots()
        series = list(dict.fromkeys((setting.split, setting.strategy) for setting in SETTINGS))
        looks = ((INK, "D"), *LOOKS)
        for index, ((split, strategy), (colour, marker)) in enumerate(zip(series, looks, strict=True)):
            line = []
            for tick, epsilon in enumerate(EPSILONS):
                mine = Setting(split=split, strategy=strategy, epsilon=epsilon).rows(rows)
                if not mine:
                    continue
                x = tick + 0.13 * (index - (len(series) - 1) / 2)
                mean, deviation = spread(mine)
                points = [float(row["auc"]) for row in mine]
                axes.scatter([x] * len(points), points, s=12, color=colour, alpha=0.45, linewidths=0)
                axes.errorbar(x, mean, yerr=deviation, color=colour, capsize=3, zorder=3)
                line.append((x, mean))
            if line:
                xs, means = zip(*line, strict=True)
                label = (
                    f"{NAMES[strategy]}, {'even split' if split == 'even' else f'Dirichlet {LABEL_SKEW:g}'}"
                )
                axes.plot(xs, means, color=colour, linewidth=0.8, marker=marker, markersize=6, label=label)
        axes.axhline(PUBLISHED, color=MUTED, linewidth=1, linestyle=":")
        axes.annotate(
            f"centralised ResNet-18, published: {PUBLISHED}", (-0.45, PUBLISHED), (0, 3), color=MUTED, ha="left",
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
        axes.plot([1.55, 2.45], [TARGET] * 2, color=INK, linewidth=1.6, label="target, even split")
        axes.set_xticks(range(4), ["ε = 1", "ε = 3", "ε = 8", "off\n(NOT PRIVATE)"])
        axes.set_xlim(-0.5, 3.5)
        axes.set_ylabel("AUC on the official test images")
        axes.legend(loc="lower center", bbox_to_anchor=(0.62, 0.0))


if __name__ == "__main__":
    figure_command(__doc__, FOLDER, draw_figure)
