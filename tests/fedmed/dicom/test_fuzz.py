"""Whatever is done to a file, it ends in a record or in quarantine, within its limits of time and memory."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path

from fedmed.dicom.options import Options
from fedmed.dicom.reasons import Reason
from fedmed.dicom.workers import Workers
from tests.conftest import count
from tests.evidence import figure
from tests.fedmed.dicom.mutations import MUTATIONS, mutations, originals

SECONDS, MEMORY = 2.0, 500
# What killing a process and noticing it takes on a busy machine.
SLACK = 0.5


def read(folder: Path, paths: list[Path]) -> tuple[list[dict], int]:
    """Each file's outcome, and the largest memory of a worker in bytes, as the kernel counted it."""
    options = Options(seconds=SECONDS, memory_mb=MEMORY)
    settings = asdict(options) | {"key": bytes(32).hex(), "folder": str(folder)}
    outcomes: list[dict] = [{} for _ in paths]
    peak = 0
    with Workers(2, seconds=SECONDS, settings=settings) as workers:
        for index, outcome in workers.read(paths):
            assert not outcomes[index], "a file has two outcomes"
            outcomes[index] = outcome
            peak = max([peak, *(high_water(pid) for pid in workers.processes)])
    return outcomes, peak


def high_water(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM: 0")
    return int(line.split()[1]) * 1024


def test_every_broken_file_ends_in_a_record_or_in_quarantine(tmp_path: Path) -> None:
    kinds, paths = [], []
    for number, (kind, content) in enumerate(mutations(count(120, 5000), seed=4)):
        kinds.append(kind)
        paths.append(tmp_path / f"{number:05}.dcm")
        paths[-1].write_bytes(content)
    outcomes, peak = read(tmp_path, paths)
    ended: Counter[str] = Counter()
    for kind, path, outcome in zip(kinds, paths, outcomes, strict=True):
        assert ("reason" in outcome) != ("patient" in outcome), (kind, outcome)
        ended[Reason(outcome["reason"]).value if "reason" in outcome else "record"] += 1
        # A machine that stood still for a while is not the file's doing: once in five times alone it keeps the limit.
        tries = [outcome["seconds"]]
        while tries[-1] > SECONDS + SLACK and len(tries) < 6:
            tries.append(read(tmp_path, [path])[0][0]["seconds"])
        assert tries[-1] <= SECONDS + SLACK, (kind, outcome, tries)
    assert peak <= MEMORY * 2**20
    slowest = max(outcome["seconds"] for outcome in outcomes)
    figure("outcomes", ", ".join(f"{name} {number:,}" for name, number in ended.most_common()))
    figure("slowest file, largest memory of a worker", f"{slowest:.2f} s, {peak / 2**20:.0f} MiB")
    # The breaks reached the decoders, and did not merely spoil the first bytes.
    assert set(kinds) == {mutate.__name__ for mutate in MUTATIONS}
    assert len(ended) >= 8
    assert ended["record"] > len(paths) / 50


def test_the_files_are_read_as_long_as_nobody_breaks_them(tmp_path: Path) -> None:
    paths = []
    for number, content in enumerate(originals()):
        paths.append(tmp_path / f"{number:05}.dcm")
        paths[-1].write_bytes(content)
    outcomes, _ = read(tmp_path, paths)
    assert len(paths) > 80
    assert sum("patient" in outcome for outcome in outcomes) > 0.8 * len(paths)
