"""figure.svg and figure.png of an experiment: one style, the same bytes from the same rows."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.shared.rows import Row, read_rows

INK, MUTED = "#1c2024", "#5b636b"
# Okabe and Ito's colour-blind-safe hues, darkened; markers tell the series apart without colour.
LOOKS = (("#0072b2", "o"), ("#c44e00", "s"), ("#00805d", "^"), ("#a6447f", "v"))
STYLE = {
    "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "fedmed", "axes.titlelocation": "left",
    "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.grid.axis": "y", "grid.color": MUTED, "grid.alpha": 0.2, "grid.linewidth": 0.6,
    "legend.frameon": False, "legend.loc": "lower right", "legend.fontsize": 8,
}  # fmt: skip


@contextmanager
def figure_in(folder: Path, width: float, height: float) -> Iterator[Any]:
    """An empty figure of so many inches, in `STYLE`; what is drawn on it is saved at the end, as both files."""
    # Late: a run that ends before its figure needs no matplotlib.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(folder / "figure.svg", metadata={"Date": None})
        figure.savefig(folder / "figure.png", dpi=160, metadata={"Software": None})


def figure_command(doc: str | None, folder: Path, draw_figure: Callable[[list[Row], Path], None]) -> None:
    """What figure.py does as a command: draw from results.csv, beside it."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=folder / "results.csv", help="default: %(default)s")
    results = parser.parse_args().results
    draw_figure(read_rows(results), results.parent)
