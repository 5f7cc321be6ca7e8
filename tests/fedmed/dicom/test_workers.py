"""What becomes of the files of a process that is slow, greedy, dies, or never starts; and of the process."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import fedmed.dicom.workers
from fedmed.dicom.ingest import ingest
from fedmed.dicom.options import Options
from fedmed.dicom.reasons import Reason
from fedmed.dicom.store import ImageStore
from fedmed.dicom.workers import Workers
from fedmed.errors import DataError
from tests.fedmed.dicom.files import export
from tests.timing import PATIENCE

ROOT = Path(__file__).parents[3]

# The worker's own program around a reader that does what the file says.
STUB = """
import ctypes, os, sys, time, types
sys.path.insert(0, {root!r})

class Reader:
    def __init__(self, settings):
        pass

    def read(self, path):
        with open(path) as file:
            order = file.read()
        if order == "sleep": time.sleep(600)
        if order == "spin":
            while True: pass
        if order == "abort": os.abort()
        if order == "segfault": ctypes.string_at(0)
        if order == "exit": os._exit(0)
        if order == "grow": bytearray(4 << 30)
        if order == "raise": raise RuntimeError("Doe^Jane")
        if order == "recurse": self.read(path)
        if order == "print": print("Doe^Jane", flush=True); os.write(1, b"[0, 1]\\n"); os.write(2, b"Doe^Jane")
        return {{"patient": order}}

# In the place of the module that reads, which takes half a second to import.
stand_in = sys.modules["fedmed.dicom.reader"] = types.ModuleType("reader")
stand_in.Reader, stand_in.StoreFailed = Reader, type("StoreFailed", (OSError,), {{}})
import fedmed.dicom.worker
fedmed.dicom.worker.main()
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Start this program instead of the worker's."""

    def use(program: str) -> None:
        path = tmp_path / "stub.py"
        path.write_text(program)
        start = subprocess.Popen
        monkeypatch.setattr(
            fedmed.dicom.workers.subprocess, "Popen", lambda words, **how: start([words[0], str(path)], **how)
        )

    return use


def orders(folder: Path, *texts: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number}.dcm").write_text(text)
    return [folder / f"{number}.dcm" for number in range(len(texts))]


def read(
    paths: list[Path], *, workers: int = 1, seconds: float = 20.0
) -> tuple[list[dict[str, Any]], set[int]]:
    """Each path's outcome, and the processes that there were."""
    options = asdict(Options(memory_mb=500)) | {"key": bytes(32).hex(), "folder": "/nowhere"}
    outcomes: list[dict[str, Any]] = [{} for _ in paths]
    seen: set[int] = set()
    with Workers(workers, seconds=seconds, settings=options) as pool:
        for index, outcome in pool.read(paths):
            assert not outcomes[index], "a file has two outcomes"
            outcomes[index] = outcome
            seen |= set(pool.processes)
    for pid in seen:
        # Killed and waited for: neither alive nor a zombie.
        assert not Path(f"/proc/{pid}").exists()
    return outcomes, seen


@pytest.mark.parametrize(
    ("order", "reason"),
    [("abort", Reason.DECODER_CRASHED), ("segfault", Reason.DECODER_CRASHED), ("exit", Reason.DECODER_CRASHED),
     ("sleep", Reason.TOO_SLOW), ("spin", Reason.TOO_SLOW), ("grow", Reason.TOO_LARGE),
     ("raise", Reason.UNREADABLE), ("recurse", Reason.UNREADABLE)],
)  # fmt: skip
def test_a_file_that_ends_its_process_costs_no_other_file(
    order: str, reason: Reason, tmp_path: Path, stub: Callable[[str], None]
) -> None:
    """Those which the process had in hand beside it are read by another."""
    stub(STUB.format(root=str(ROOT)))
    paths = orders(tmp_path / "src", "a", "b", order, "c", "d", "e")
    expected = ["a", "b", None, "c", "d", "e"]
    for limit in PATIENCE if reason is Reason.TOO_SLOW else [60.0]:
        outcomes, _ = read(paths, seconds=limit)
        if [outcome.get("patient") for outcome in outcomes] == expected:
            break
    assert [outcome.get("patient") for outcome in outcomes] == expected
    assert outcomes[2].keys() == {"reason", "seconds"}
    assert outcomes[2]["reason"] == reason
    if reason is Reason.TOO_SLOW:
        assert limit <= outcomes[2]["seconds"] < limit + 60


def test_nothing_but_such_files(tmp_path: Path, stub: Callable[[str], None]) -> None:
    stub(STUB.format(root=str(ROOT)))
    outcomes, _ = read(orders(tmp_path / "src", *["abort", "segfault", "exit"] * 3), workers=2)
    assert [outcome["reason"] for outcome in outcomes] == [Reason.DECODER_CRASHED] * 9


def test_what_a_decoder_prints_is_no_answer(
    tmp_path: Path, stub: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    stub(STUB.format(root=str(ROOT)))
    outcomes, _ = read(orders(tmp_path / "src", "print", "a"))
    assert [outcome["patient"] for outcome in outcomes] == ["print", "a"]
    assert capfd.readouterr() == ("", "")


def test_a_process_is_replaced_after_so_many_files(
    tmp_path: Path, stub: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(STUB.format(root=str(ROOT)))
    monkeypatch.setattr(fedmed.dicom.workers, "FILES_PER_PROCESS", 4)
    outcomes, seen = read(orders(tmp_path / "src", *"abcdefghij"))
    assert [outcome["patient"] for outcome in outcomes] == list("abcdefghij")
    assert len(seen) >= 2


def test_answers_longer_than_a_pipe_arrive(tmp_path: Path, stub: Callable[[str], None]) -> None:
    stub(STUB.format(root=str(ROOT)))
    long = [letter * 500_000 for letter in "abcdef"]
    outcomes, _ = read(orders(tmp_path / "src", *long))
    assert [outcome["patient"] for outcome in outcomes] == long


@pytest.mark.parametrize("program", ["raise SystemExit(1)", "import os; os.abort()", "import no_such_module"])
def test_a_process_that_cannot_start_is_told(
    program: str, tmp_path: Path, stub: Callable[[str], None]
) -> None:
    before = set(children())
    stub(program)
    with pytest.raises(DataError, match=r"cannot start; is fedmed installed with its extra 'dicom'\?"):
        read(orders(tmp_path / "src", "a"))
    assert not set(children()) - before


def test_a_process_that_never_starts_is_told(
    tmp_path: Path, stub: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(children())
    stub("import time; time.sleep(600)")
    monkeypatch.setattr(fedmed.dicom.workers, "START_SECONDS", 0.3)
    with pytest.raises(DataError, match="do not start"):
        read(orders(tmp_path / "src", "a"))
    assert not set(children()) - before


def test_a_program_that_cannot_be_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the number of processes is limited."""

    def fail(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(fedmed.dicom.workers.subprocess, "Popen", fail)
    with pytest.raises(DataError, match=r"Resource temporarily unavailable.*--workers"):
        read(orders(tmp_path / "src", "a"))


def test_a_folder_that_cannot_be_written_is_told_as_that(tmp_path: Path) -> None:
    """Not as a missing package: the disk may be full, or mounted read-only meanwhile."""
    options = asdict(Options()) | {"key": bytes(32).hex(), "folder": str(tmp_path / "gone")}
    source = export(tmp_path / "src", patients=1, images=1)
    with Workers(1, seconds=20, settings=options) as pool:
        found = list(pool.read([source / "p0" / "0.dcm"]))
    assert found == [(0, {"fatal": "No such file or directory", "seconds": found[0][1]["seconds"]})]


def test_an_ingestion_goes_on_without_a_slow_file(tmp_path: Path, stub: Callable[[str], None]) -> None:
    source = export(tmp_path / "src", patients=2)
    stub(
        STUB.split("class Reader")[0].format(root=str(ROOT)) + "from fedmed.dicom.reader import Reader\n"
        "read = Reader.read\n"
        "def slow(self, path):\n"
        "    if path.endswith('p1/1.dcm'): time.sleep(600)\n"
        "    return read(self, path)\n"
        "Reader.read = slow\n"
        "import fedmed.dicom.worker\n"
        "fedmed.dicom.worker.main()\n"
    )
    for limit in PATIENCE[1:]:
        options = Options(workers=1, size=0, seconds=limit)
        manifest = ingest(source, tmp_path / f"{limit}", key=bytes(32), options=options)
        if manifest["quarantine"] == {Reason.TOO_SLOW: 1}:
            break
    assert manifest["quarantine"] == {Reason.TOO_SLOW: 1}
    assert len(ImageStore.open(tmp_path / f"{limit}").records) == 3


@contextlib.contextmanager
def parent(tmp_path: Path, order: str) -> Iterator[subprocess.Popen[str]]:
    """A process that reads a file by a worker, which it names."""
    (tmp_path / "stub.py").write_text(STUB.format(root=str(ROOT)))
    paths = orders(tmp_path / "src", order)
    program = (
        "import subprocess, sys; from pathlib import Path; import fedmed.dicom.workers as w\n"
        "start = subprocess.Popen\n"
        f"w.subprocess.Popen = lambda words, **how: start([words[0], {str(tmp_path / 'stub.py')!r}], **how)\n"
        "from dataclasses import asdict; from fedmed.dicom.options import Options\n"
        "settings = asdict(Options()) | {'key': '00', 'folder': '/nowhere'}\n"
        "with w.Workers(1, seconds=600, settings=settings) as pool:\n"
        "    end = pool._end; feed = pool._feed\n"
        "    def told(worker, *rest):\n"
        "        feed(worker, *rest); worker.ready and print(worker.process.pid, flush=True)\n"
        "    pool._feed = told\n"
        f"    list(pool.read([Path({str(paths[0])!r})]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("order", ["sleep", "spin"])
def test_a_worker_does_not_outlive_who_started_it(order: str, tmp_path: Path) -> None:
    """Not even one whose decoder never returns, of a process that was killed and could not end it."""
    with parent(tmp_path, order) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
    until = time.monotonic() + 60
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children() -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
    return found
