"""Draws what rounds cost beyond their work, from results.csv."""

from pathlib import Path

from experiments.latency.results import FOLDER, SIDES, overheads
from experiments.shared.figures import INK, LOOKS, figure_in
from experiments.shared.rows import Row, read_rows


def draw_figure(rows: list[Row], folder: Path) -> None:
    """One mark a round, on a logarithmic scale."""
    with figure_in(folder, 6.0, 2.4) as figure:
        axes = figure.add_subplot()
        for index, (side, (colour, marker)) in enumerate(zip(SIDES, LOOKS, strict=False)):
            found = overheads(rows, side)
            axes.plot(found, [index] * len(found), marker, color=colour, alpha=0.4, linestyle="none")
        axes.set_xscale("log")
        axes.set_yticks(range(len(SIDES)), SIDES)
        axes.set_ylim(-0.6, len(SIDES) - 0.4)
        axes.invert_yaxis()
        axes.grid(axis="x")
        for line in (0.3, 0.7):
            axes.axvline(line, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlabel("seconds of a round beyond its slowest site's own work; dotted: 0.3 and 0.7")


if __name__ == "__main__":
    draw_figure(read_rows(FOLDER / "results.csv"), FOLDER)
