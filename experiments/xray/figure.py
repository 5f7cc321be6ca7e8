"""figure.svg and figure.png of the chest X-ray benchmark, from results.csv alone.

Example: python experiments/xray/figure.py
"""

import argparse
from pathlib import Path

from results import (
    EPSILONS,
    FOLDER,
    LABEL_SKEW,
    NAMES,
    PUBLISHED,
    SETTINGS,
    TARGET,
    Row,
    Setting,
    read_rows,
    spread,
)

# Okabe and Ito's colour-blind-safe hues, darkened; markers tell the series apart without colour.
LOOKS = {
    ("even", "fedavg"): ("#1c2024", "D"),
    ("skew", "fedavg"): ("#0072b2", "o"),
    ("skew", "fedprox"): ("#c44e00", "s"),
    ("skew", "fedavgm"): ("#00805d", "^"),
    ("skew", "fedadam"): ("#a6447f", "v"),
}
MUTED = "#5b636b"


def draw_figure(rows: list[Row], folder: Path) -> None:
    """Write both files: test AUC against epsilon, a series for each split and strategy."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "fedmed"}):
        figure = Figure(figsize=(8.0, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        series = list(dict.fromkeys((setting.split, setting.strategy) for setting in SETTINGS))
        for index, (split, strategy) in enumerate(series):
            colour, marker = LOOKS[split, strategy]
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
            f"centralised ResNet-18, published: {PUBLISHED}", (3.45, PUBLISHED), (0, 3), color=MUTED, ha="right",
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
        axes.plot([1.55, 2.45], [TARGET] * 2, color="#1c2024", linewidth=1.6, label="target, even split")
        axes.set_xticks(range(4), ["ε = 1", "ε = 3", "ε = 8", "off\n(NOT PRIVATE)"])
        axes.set_xlim(-0.5, 3.5)
        axes.set_ylabel("AUC on the official test images")
        axes.grid(axis="y", color=MUTED, alpha=0.2, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right", fontsize=8)
        figure.savefig(folder / "figure.svg", metadata={"Date": None})
        figure.savefig(folder / "figure.png", dpi=160, metadata={"Software": None})


def main() -> None:
    """Draw from results.csv."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=FOLDER / "results.csv", help="default: %(default)s")
    results = parser.parse_args().results
    draw_figure(read_rows(results), results.parent)


if __name__ == "__main__":
    main()
