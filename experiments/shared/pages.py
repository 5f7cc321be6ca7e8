"""What an experiment shows of its rows: the table in its README.md, and its figure."""

from collections.abc import Callable
from pathlib import Path

from experiments.shared.rows import Row, read_rows
from fedmed.atomic import write_bytes

# Marks in README.md between which the table stands.
BEGIN, END = "<!-- table: written by run.py -->", "<!-- end of the table -->"


def write_pages(
    folder: Path, table: Callable[[list[Row]], str], draw_figure: Callable[[list[Row], Path], None]
) -> None:
    """Write README's table (where the folder has a README) and the figure from results.csv."""
    rows = read_rows(folder / "results.csv")
    if not rows:
        return
    print(table(rows))
    draw_figure(rows, folder)
    readme = folder / "README.md"
    if readme.exists():
        before, _, rest = readme.read_text().partition(BEGIN)
        text = f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}"
        write_bytes(readme, text.encode())
