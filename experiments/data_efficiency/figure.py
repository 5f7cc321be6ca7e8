"""figure.svg and figure.png of the curve, from results.csv alone.

Example: python experiments/data_efficiency/figure.py
"""

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the root of the repository, where experiments is

from experiments.data_efficiency.results import DATA, FOLDER, METHODS, SIZES, band, curve
from experiments.shared.figures import LOOKS, MUTED, figure_in
from experiments.shared.rows import Row, read_rows

SERIES = dict(zip((method.name for method in METHODS), LOOKS, strict=False))


def draw_figure(rows: list[Row], folder: Path) -> None:
    """Write both files: a row of panels for each data set, without privacy on the left, with it on the right."""
    shown = [data for data in DATA if any(row["data"] == data for row in rows)]
    with figure_in(folder, 9.6, 3.9 * len(shown)) as figure:
        panels = figure.subplots(len(shown), 2, sharey=True, squeeze=False)
        for data, pair in zip(shown, panels, strict=True):
            for axes, epsilon in zip(pair, ("off", "8"), strict=True):
                words = "NOT PRIVATE" if epsilon == "off" else f"ε = {epsilon}, δ = 1e-4, per patient"
                _panel(axes, rows, data, epsilon, f"{data}: {words}")
            pair[0].set_ylabel("AUC on 400 other patients")
            pair[0].legend()


def _panel(axes: Any, rows: list[Row], data: str, epsilon: str, title: str) -> None:
    for method in METHODS:
        found = curve(rows, data=data, method=method.name, epsilon=epsilon)
        if not found:
            continue
        colour, marker = SERIES[method.name]
        means, lows, highs = zip(*(band(values) for values in found.values()), strict=True)
        axes.fill_between(list(found), lows, highs, color=colour, alpha=0.15, linewidth=0)
        axes.plot(list(found), means, color=colour, marker=marker, markersize=5, label=method.label)
    axes.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.minorticks_off()
    axes.set_ylim(0.3, 1.02)
    axes.set_xlabel("labelled patients in the federation")
    axes.set_title(title)


if __name__ == "__main__":
    draw_figure(read_rows(FOLDER / "results.csv"), FOLDER)
