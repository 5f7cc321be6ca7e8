"""What results.csv holds, and README's table of it."""

import statistics
from pathlib import Path

from experiments.shared.rows import Row

FOLDER = Path(__file__).parent
COLUMNS = ("side", "block", "round", "seconds", "work", "commit")
SIDES = ("fedmed", "stock Flower")


def overheads(rows: list[Row], side: str) -> list[float]:
    """Seconds of each round beyond its slowest site's own work; the first of a run, in which all is loaded, is out."""
    return [
        float(row["seconds"]) - float(row["work"])
        for row in rows
        if row["side"] == side and row["round"] != "1"
    ]


def table(rows: list[Row]) -> str:
    """Rounds, and what they cost beyond their work, of each side."""
    lines = ["| side | rounds | median | best | worst of ten |", "|---|---|---|---|---|"]
    for side in SIDES:
        found = sorted(overheads(rows, side))
        if found:
            tenth = found[int(0.9 * (len(found) - 1))]
            lines.append(
                f"| {side} | {len(found)} | {statistics.median(found):.2f} s | {found[0]:.2f} s | {tenth:.2f} s |"
            )
    return "\n".join(lines)
