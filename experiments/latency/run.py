"""How long a round takes beyond the work of its slowest site: fedmed's consortium and stock Flower, on this machine.

    OMP_NUM_THREADS=1 python experiments/latency/run.py

Both run on loopback with four sites, one after the other, a block of rounds of each in turn. Stock Flower runs without
encryption and without authentication, fedmed with both, and with its ledgers. About ten minutes on two quiet cores.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from experiments.latency import results, stock_rounds
from experiments.latency.figure import draw_figure
from experiments.shared.commands import fill
from experiments.shared.consortium import Consortium, free_port
from experiments.shared.rows import Row, commit_mark, write_rows

NAMES = ("Cleveland", "Hungary", "Switzerland", "VA Long Beach")
RUN = [
    "model=logistic", "task.split=hash", "privacy.epsilon=null", "privacy.noise_multiplier=20", "privacy.delta=1e-5",
    "privacy.metrics=none", "tracking=none",
]  # fmt: skip


def fedmed_rounds(folder: Path, *, rounds: int) -> list[dict[str, float]]:
    """Each round's `seconds`, and the `work` of its slowest site within them, of one run by warm sites."""
    consortium = Consortium(folder, NAMES)
    consortium.make()
    try:
        consortium.start()
        consortium.run(*RUN, f"rounds={rounds}", name="latency")
        history = consortium.history("latency")
        work = [consortium.work(name) for name in NAMES]
    finally:
        consortium.end()
    return [
        {"seconds": entry["seconds"], "work": max(times[entry["round"]] for times in work)}
        for entry in history
    ]


def measure(path: Path, *, blocks: int, rounds: int, stock: int) -> None:
    """Add rows to results.csv, block by block."""
    rows: list[Row] = []
    for block in range(blocks):
        with tempfile.TemporaryDirectory() as temporary:
            here = Path(temporary)
            ports = [free_port() for _ in range(len(NAMES) + 1)]
            found = {
                "fedmed": fedmed_rounds(here / "fedmed", rounds=rounds),
                "stock Flower": stock_rounds.rounds(
                    here / "stock", sites=len(NAMES), rounds=stock, work=0.0, ports=ports
                ),
            }
        for side, measured in found.items():
            rows += [
                {
                    "side": side, "block": str(block), "round": str(number), "seconds": f"{entry['seconds']:.3f}",
                    "work": f"{entry['work']:.3f}", "commit": commit_mark(),
                }
                for number, entry in enumerate(measured, start=1)
            ]  # fmt: skip
            overhead = [entry["seconds"] - entry["work"] for entry in measured[1:]]
            print(f"{side}: median overhead {statistics.median(overhead):.2f} s", flush=True)
        write_rows(
            path, rows, results.COLUMNS, lambda row: (row["side"], int(row["block"]), int(row["round"]))
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=40, help="of fedmed in a block")
    parser.add_argument("--stock", type=int, default=6, help="rounds of stock Flower in a block")
    parser.add_argument("--quick", action="store_true", help="one short block, nothing kept")
    asked = parser.parse_args()

    def run_missing(path: Path) -> None:
        if asked.quick:
            measure(path, blocks=1, rounds=5, stock=2)
        else:
            measure(path, blocks=asked.blocks, rounds=asked.rounds, stock=asked.stock)

    return fill(None if asked.quick else results.FOLDER, run_missing, results.table, draw_figure)


if __name__ == "__main__":
    sys.exit(main())
