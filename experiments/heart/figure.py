"""figure.svg and figure.png of the heart-disease benchmark, from results.csv alone.

Example: python experiments/heart/figure.py
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from results import FOLDER, SETTINGS, Row, Setting, read_rows, spread

# Okabe and Ito's colour-blind-safe hues, darkened; markers tell the series apart without colour.
SERIES = {"head": ("#0072b2", "o"), "lora": ("#c44e00", "s"), "logistic10": ("#00805d", "^")}
NAMES = {"head": "head", "lora": "LoRA, last 3 of 6 blocks", "logistic10": "logistic regression"}
TICKS = {"eps1": 0.0, "eps3": 1.0, "off": 2.0}
INK, MUTED = "#1c2024", "#5b636b"


def draw_figure(rows: list[Row], folder: Path) -> None:
    """Write both files: pooled AUC of the sentences on the left, accuracy of the table on the right."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "fedmed"}):
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
        text = [setting for setting in SETTINGS if setting.metric == "pooled_auc"]
        table = [setting for setting in SETTINGS if setting.metric != "pooled_auc"]
        _panel(left, rows, text, "pooled test AUC", "Patients as sentences, MiniLM")
        _panel(right, rows, table, "mean test accuracy over hospitals", "Ten-feature table")
        figure.savefig(folder / "figure.svg", metadata={"Date": None})
        figure.savefig(folder / "figure.png", dpi=160, metadata={"Software": None})


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
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(axis="y", color=MUTED, alpha=0.2, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", fontsize=8)


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
