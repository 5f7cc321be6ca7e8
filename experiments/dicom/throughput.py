"""How fast ingestion reads, beside a bare loop of `dcmread` and `pixel_array` over the same files, in one run.

    python experiments/dicom/throughput.py [--files N]

Both sides read every file once, the bare loop in as many processes at once as there are cores. Rounds alternate, so
that a busy machine slows both; medians are printed.
"""

import argparse
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import pydicom
from pydicom.data import get_testdata_file

from fedmed.dicom.ingest import ingest
from fedmed.dicom.options import Options

# Name: files of pydicom and pydicom-data that are of one kind.
KINDS = {
    "CT 512 x 512, uncompressed": ["693_UNCR.dcm"],
    "CT 512 x 512, JPEG 2000": ["693_J2KR.dcm"],
    "CR 1955 x 1841, uncompressed": ["RG1_UNCR.dcm"],
    "MR 1024 x 1024, JPEG 2000": ["MR2_J2KR.dcm"],
    "mixed": [
        "693_UNCR.dcm",
        "693_J2KR.dcm",
        "RG3_UNCR.dcm",
        "MR2_J2KR.dcm",
        "693_J2KI.dcm",
        "bad_sequence.dcm",
    ],
}


def bare(paths: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    for path in paths:
        _ = pydicom.dcmread(path).pixel_array


def seconds_bare(paths: list[str], cores: int) -> float:
    """All files in a bare loop, on all cores; the processes are there before the clock starts."""
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        pool.map(bare, [paths[:1]] * cores, chunksize=1)
        began = time.monotonic()
        # In small pieces: neither core waits for the other's long files.
        pool.map(bare, [paths[first : first + 4] for first in range(0, len(paths), 4)], chunksize=1)
        return time.monotonic() - began


def seconds_ingested(folder: Path, cores: int) -> float:
    """The reading part of an ingestion: from the first outcome to the last."""
    moments: list[float] = []
    with tempfile.TemporaryDirectory() as destination:
        ingest(
            folder, destination, key=bytes(32), options=Options(workers=cores, burned_in="keep"),
            progress=lambda *_: moments.append(time.monotonic()),
        )  # fmt: skip
    return (moments[-1] - moments[0]) * len(moments) / (len(moments) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="kinds whose name holds this")
    asked = parser.parse_args()
    cores = os.cpu_count() or 1
    print(
        f"{'':<32} {'bare/s':>8} {'ingested/s':>10} {'ratio':>6}   ({cores} cores, medians of {asked.rounds})"
    )
    for name, sources in ((name, sources) for name, sources in KINDS.items() if asked.only in name):
        contents = [Path(str(get_testdata_file(source))).read_bytes() for source in sources]
        # As many as take a few seconds.
        files = asked.files if "uncompressed" in name else max(len(contents), asked.files // 8)
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root)
            for number in range(files):
                (folder / f"{number:06}.dcm").write_bytes(contents[number % len(contents)])
            paths = sorted(map(str, folder.iterdir()))
            rounds = [
                (seconds_bare(paths, cores), seconds_ingested(folder, cores)) for _ in range(asked.rounds)
            ]
        plain, own = (files / statistics.median(side) for side in zip(*rounds, strict=True))
        print(f"{name:<32} {plain:>8.0f} {own:>10.0f} {own / plain:>6.2f}", flush=True)


if __name__ == "__main__":
    main()
