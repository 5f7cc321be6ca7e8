"""The command of fedmed, and what every run.py does as a command: its options, and how it ends."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from experiments.shared.pages import write_pages
from experiments.shared.rows import Row


def fedmed() -> str:
    """The command that belongs to this Python."""
    beside = Path(sys.executable).with_name("fedmed")
    return str(beside) if beside.exists() else "fedmed"


def benchmark_parser(
    doc: str | None, folder: Path, *, quick: str, names: Iterable[str] = ()
) -> argparse.ArgumentParser:
    """A parser with --output, --quick (`quick` says what it does), and --only where there are `names` of settings."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if names := list(names):
        text = f"of {', '.join(names)}; default: all"
        parser.add_argument("--only", nargs="+", choices=names, metavar="SETTING", help=text)
    text = "folder of results.csv and the figure; default: here"
    parser.add_argument("--output", type=Path, default=folder, help=text)
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def fill(
    output: Path | None,
    run_missing: Callable[[Path], int | None],
    table: Callable[[list[Row]], str],
    draw_figure: Callable[[list[Row], Path], None],
) -> int:
    """Let `run_missing` fill results.csv and, however it ends, write the pages of the rows that are there.

    Args:
        output: the folder of both; None: a temporary one.

    Returns:
        the exit code: what `run_missing` returns, 130 after Ctrl-C.
    """
    with tempfile.TemporaryDirectory(prefix="fedmed-quick-") as temporary:
        folder = output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return run_missing(folder / "results.csv") or 0
        except KeyboardInterrupt:
            if output:
                print("interrupted: the same command continues", file=sys.stderr)
            return 130
        finally:
            write_pages(folder, table, draw_figure)
