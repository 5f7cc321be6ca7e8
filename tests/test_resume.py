"""A run that was killed goes on: bit by bit without privacy, and with privacy never past its plan."""

import contextlib
import dataclasses
import io
import json
import os
import random
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedmed.compose as composing
import strategies.run
from fedmed.cli.main import main
from fedmed.compose import compose
from fedmed.config import RunConfig
from fedmed.errors import ConfigError, FedmedError
from strategies.folder import CHECKPOINT, Progress, RunFolder
from tests.conftest import count

ROUNDS = 4
TASK = [
    "task=heart10",
    "task.declared_sizes={Cleveland: 304, Hungary: 260}",
    "model=logistic",
    "tracking=none",
]
PRIVATE = [*TASK, f"rounds={ROUNDS}"]
# A strategy with a state, and a release that reads earlier rounds: all of it must come back.
OFF = [*PRIVATE, "privacy=off", "strategy=fedadam", "strategy.average_last=3", "training.sample_rate=0.7"]
# The plans and the configuration are the first two files that a run makes last.
BEFORE_THE_FIRST_ROUND = 2


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Plots, and composing anew what was composed before, take longer than the rounds; child processes inherit."""
    compose_job = lru_cache(composing._compose)

    def composed(overrides: list[str]) -> RunConfig:
        folders = [text.removeprefix("run_dir=") for text in overrides if text.startswith("run_dir=")]
        rest = tuple(text for text in overrides if not text.startswith("run_dir="))
        return dataclasses.replace(compose_job(rest), run_dir=folders[-1] if folders else None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategies.run, "write_report", lambda *_: None)
        patch.setattr(composing, "_compose", composed)
        yield


@dataclass(frozen=True)
class Result:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str


class Command:
    """`fedmed ARGUMENTS` in a forked process: what is killed is a process, and torch is loaded once."""

    def __init__(self, *arguments: str, before: Callable[[], None] = lambda: None) -> None:
        with contextlib.suppress(FedmedError):
            # Kept by `quick`.
            compose(arguments[1:])
        reading, writing = os.pipe()
        self._errors = os.memfd_create("stderr")
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                os.dup2(writing, 1)
                os.dup2(self._errors, 2)
                os.close(reading)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
                sys.argv = ["fedmed", *arguments]
                before()
                main()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            except BaseException:
                traceback.print_exc()
            finally:
                try:
                    sys.stdout.flush()
                finally:
                    # Whatever happens, no second pytest goes on from here.
                    os._exit(code)
        os.close(writing)
        self.lines = os.fdopen(reading)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def end(self) -> Result:
        """Wait for the end."""
        out = self.lines.read()
        self.lines.close()
        _, status = os.waitpid(self.pid, 0)
        with os.fdopen(self._errors) as file:
            file.seek(0)
            return Result(os.waitstatus_to_exitcode(status), out, file.read())


def fedmed(*arguments: str, before: Callable[[], None] = lambda: None) -> Result:
    """Do a command to its end."""
    return Command(*arguments, before=before).end()


def killed_at(write: int, *, after: bool = False) -> Callable[[], None]:
    """Kill the process in its `write`-th write that is made last (fsync), before or after it is."""

    def prepare() -> None:
        fsync, calls = os.fsync, 0

        def counted(file: int) -> None:
            nonlocal calls
            calls += 1
            if calls == write and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(file)
            if calls == write:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = counted

    return prepare


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter.safetensors").read_bytes()


def summary(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return values


def sent(folder: Path) -> list[int]:
    """The rounds that the journal says were sent; every line is whole."""
    path = folder / "journal.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["round"] for line in lines]


def in_this_process(*arguments: str) -> None:
    """Do a command here: what it computes once, child processes need not compute again."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", ["fedmed", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 0


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, quick: None) -> Path:  # noqa: ARG001
    """A run without privacy that nobody disturbed."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    in_this_process("run", *OFF, f"run_dir={folder}")
    assert sent(folder) == [1, 2, 3, 4]
    return folder


@pytest.fixture(scope="module")
def accounted(tmp_path_factory: pytest.TempPathFactory, quick: None) -> None:  # noqa: ARG001
    """Noise and epsilons of the private runs below are worked out here once."""
    in_this_process("run", *PRIVATE, f"run_dir={tmp_path_factory.mktemp('private') / 'run'}")
    folder = tmp_path_factory.mktemp("private") / "run"
    in_this_process("run", *PRIVATE, "rounds=2", f"run_dir={folder}")
    in_this_process("run", f"resume={folder}", "rounds=4")


def assert_same_run(folder: Path, unbroken: Path) -> None:
    """The same weights to the bit, and the same figures of every round."""
    assert adapter(folder) == adapter(unbroken)
    histories = [json.loads((f / "history.json").read_text()) for f in (folder, unbroken)]
    for history in histories:
        for entry in history:
            del entry["seconds"]
    assert histories[0] == histories[1]
    assert summary(folder)["test"] == summary(unbroken)["test"]
    assert summary(folder)["rounds"] == ROUNDS


def durable_writes(folder: Path, *settings: str) -> int:
    """How many writes of an undisturbed run are made last."""
    counted = folder.with_name("writes")

    def prepare() -> None:
        fsync = os.fsync

        def noted(file: int) -> None:
            with counted.open("a") as log:
                log.write(".")
            fsync(file)

        os.fsync = noted

    assert fedmed("run", *settings, f"run_dir={folder}", before=prepare).code == 0
    return len(counted.read_text())


def test_killed_at_any_write_it_ends_as_the_unbroken_run(tmp_path: Path, unbroken: Path) -> None:
    """A run without privacy, killed before or after a write, chosen at random among all of them."""
    writes = durable_writes(tmp_path / "counted", *OFF)
    # Each round: the journal, then the checkpoint.
    assert writes >= BEFORE_THE_FIRST_ROUND + 2 * ROUNDS + 3
    draws = random.Random(len(sys.argv))
    for index in range(count(1, 30)):
        write, after = draws.randint(BEFORE_THE_FIRST_ROUND + 1, writes), draws.random() < 0.5
        folder = tmp_path / str(index)
        first = fedmed("run", *OFF, f"run_dir={folder}", before=killed_at(write, after=after))
        assert first.code == -signal.SIGKILL, (write, after, first)
        finished = RunFolder(folder).load()
        result = fedmed("run", f"resume={folder}")
        assert result.code == 0, (write, after, result)
        assert f"resumed after round {finished.round if finished else 0} of {ROUNDS}" in result.out
        assert result.out.splitlines()[-1] == str(folder / "summary.json")
        assert_same_run(folder, unbroken)


def test_killed_at_any_moment_it_ends_as_the_unbroken_run(tmp_path: Path, unbroken: Path) -> None:
    """With workers, some time after a round was reported; killed again while it goes on."""
    draws = random.Random(time_seed())
    for index in range(count(1, 30)):
        folder = tmp_path / str(index)
        arguments = [*OFF, "federation.workers=2", f"run_dir={folder}"]
        for _ in range(2):
            command = Command("run", *arguments)
            wanted = draws.randint(0, ROUNDS - 1)
            for line in command.lines:
                number = line.split()[1].partition("/")[0] if line.startswith("round ") else "0"
                if line.startswith(("round ", "federated ")) and int(number) >= wanted:
                    break
            # A round takes some 20 ms: this is a moment within it, unless the run ends first.
            ended = os.pidfd_open(command.pid)
            select.select([ended], [], [], draws.uniform(0, 0.06))
            os.close(ended)
            command.kill()
            command.end()
            arguments = [f"resume={folder}"]
        result = fedmed("run", f"resume={folder}")
        assert result.code == 0, result
        assert_same_run(folder, unbroken)


def time_seed() -> int:
    """Another moment each time; printed with a failing test."""
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    return seed


def test_the_installed_command_is_killed_and_goes_on(tmp_path: Path, unbroken: Path) -> None:
    """The same for a program of its own, which has inherited nothing."""
    folder = tmp_path / "run"
    program = [sys.executable, "-c", "from fedmed.cli.main import main; main()", "run"]
    with subprocess.Popen(
        [*program, *OFF, f"run_dir={folder}"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert any(line.startswith("round   2/4") for line in process.stdout)
        process.kill()
    assert fedmed("run", f"resume={folder}").code == 0
    assert_same_run(folder, unbroken)


@pytest.mark.usefixtures("accounted")
def test_a_private_run_never_sends_more_rounds_than_its_plan_has(tmp_path: Path) -> None:
    """Killed again and again at random writes, it ends within the plan that its sites agreed to."""
    draws = random.Random(time_seed())
    for index in range(count(1, 30)):
        folder = tmp_path / str(index)
        write = BEFORE_THE_FIRST_ROUND + draws.randint(1, 2 * ROUNDS)
        fedmed("run", *PRIVATE, f"run_dir={folder}", before=killed_at(write, after=True))
        said = ""
        while True:
            kill = killed_at(draws.randint(1, 4), after=draws.random() < 0.5)
            result = fedmed("run", f"resume={folder}", before=kill)
            said += result.out
            assert result.code in (0, -signal.SIGKILL), result
            if draws.random() < 0.5:
                result = fedmed("run", f"resume={folder}")
                said += result.out
                break
        assert result.code == 0, result
        spent = sent(folder)
        done = summary(folder)
        interrupted = len(spent) - done["rounds"]
        assert len(spent) == ROUNDS
        assert all(plan.rounds == ROUNDS for plan in RunFolder(folder).plans().values())
        assert all(2.99 < site["epsilon"] <= 3 for site in done["privacy"]["sites"].values())
        assert ("interrupted round(s) had been sent" in said) == (interrupted > 0)
        history = json.loads((folder / "history.json").read_text())
        # What was interrupted before a round is in that round's epsilon.
        plan = RunFolder(folder).plans()["Hungary"]
        places = [len(spent) - spent[::-1].index(entry["round"]) for entry in history]
        assert [entry["epsilon"]["Hungary"] for entry in history] == [plan.epsilon(rounds=n) for n in places]


@pytest.mark.usefixtures("accounted")
def test_a_private_round_that_was_interrupted_is_said_and_not_repeated(tmp_path: Path) -> None:
    """Killed in round 3 after it was sent: the run ends at round 3 instead of 4, with other noise."""
    folder = tmp_path / "run"
    kill = killed_at(BEFORE_THE_FIRST_ROUND + 5, after=True)
    assert fedmed("run", *PRIVATE, f"run_dir={folder}", before=kill).code == -signal.SIGKILL
    assert sent(folder) == [1, 2, 3]
    result = fedmed("run", f"resume={folder}")
    assert result.code == 0
    assert "1 interrupted round(s) had been sent: their budget counts as spent" in result.out
    assert "the run ends at round 3; continue with rounds=5 to repeat them at a larger epsilon" in " ".join(
        result.out.split()
    )
    assert sent(folder) == [1, 2, 3, 3]
    assert summary(folder)["rounds"] == 3


@pytest.mark.usefixtures("accounted")
def test_a_run_whose_every_round_was_interrupted_releases_where_it_started(tmp_path: Path) -> None:
    """Its whole budget is spent; more rounds go on from there at a larger epsilon."""
    folder = tmp_path / "run"
    assert fedmed("run", *PRIVATE, "rounds=2", f"run_dir={folder}", before=killed_at(3, after=True)).code < 0
    assert fedmed("run", f"resume={folder}", before=killed_at(1, after=True)).code < 0
    assert sent(folder) == [1, 1]
    result = fedmed("run", f"resume={folder}")
    assert result.code == 0, result
    assert summary(folder)["rounds"] == 0
    before = epsilons(folder)
    result = fedmed("run", f"resume={folder}", "rounds=4")
    assert result.code == 0, result
    assert sent(folder) == [1, 1, 1, 2]
    assert summary(folder)["rounds"] == 2
    assert all(epsilons(folder)[site] > epsilon for site, epsilon in before.items())


def epsilons(folder: Path) -> dict[str, float]:
    return {site: spent["epsilon"] for site, spent in summary(folder)["privacy"]["sites"].items()}


def noises(folder: Path) -> dict[str, float]:
    return {site: spent["noise_multiplier"] for site, spent in summary(folder)["privacy"]["sites"].items()}


@pytest.mark.usefixtures("accounted")
def test_more_rounds_cost_more_and_keep_the_noise(tmp_path: Path) -> None:
    """A finished run goes on; its summary, and what a later resumption says, charges for all rounds."""
    folder = tmp_path / "run"
    assert fedmed("run", *PRIVATE, "rounds=2", f"run_dir={folder}").code == 0
    spent, noise = epsilons(folder), noises(folder)
    seconds = summary(folder)["seconds"]["total"]
    result = fedmed("run", f"resume={folder}", "rounds=4")
    assert result.code == 0, result
    assert "resumed after round 2 of 4" in result.out
    assert sent(folder) == [1, 2, 3, 4]
    more = epsilons(folder)
    plans = RunFolder(folder).plans()
    for site, epsilon in spent.items():
        assert 2.99 < epsilon <= 3.0 < more[site]
        assert more[site] == plans[site].epsilon(rounds=4)
    assert noises(folder) == noise
    assert summary(folder)["rounds"] == 4
    assert summary(folder)["seconds"]["total"] > seconds
    # Without rounds=4 it must not fall back on what two rounds would have cost.
    assert fedmed("run", f"resume={folder}").code == 0
    assert epsilons(folder) == more
    assert sent(folder) == [1, 2, 3, 4]
    # Fewer rounds than were sent give nothing back.
    assert fedmed("run", f"resume={folder}", "rounds=3").code == 0
    assert epsilons(folder) == more


@pytest.mark.usefixtures("accounted")
def test_killed_among_more_rounds_no_figure_of_the_fewer_remains(tmp_path: Path) -> None:
    """A summary that says epsilon 3 would be wrong from the moment that the third round is sent."""
    folder = tmp_path / "run"
    assert fedmed("run", *PRIVATE, "rounds=2", f"run_dir={folder}").code == 0
    # The plans, the configuration, the journal of round 3.
    kill = killed_at(3, after=True)
    assert fedmed("run", f"resume={folder}", "rounds=4", before=kill).code == -signal.SIGKILL
    assert sent(folder) == [1, 2, 3]
    assert not {"summary.json", "report.html", "MODEL_CARD.md"} & {path.name for path in folder.iterdir()}
    result = fedmed("run", f"resume={folder}")
    assert result.code == 0, result
    assert "resumed after round 2 of 4" in result.out
    assert sent(folder) == [1, 2, 3, 3]
    plans = RunFolder(folder).plans()
    assert epsilons(folder) == {site: plan.epsilon(rounds=4) for site, plan in plans.items()}


def test_more_rounds_without_privacy_are_those_of_a_longer_run(tmp_path: Path, unbroken: Path) -> None:
    folder = tmp_path / "run"
    settings = [text for text in OFF if not text.startswith("rounds=")]
    assert fedmed("run", *settings, "rounds=3", f"run_dir={folder}").code == 0
    assert adapter(folder) != adapter(unbroken)
    assert fedmed("run", f"resume={folder}", f"rounds={ROUNDS}").code == 0
    assert_same_run(folder, unbroken)


@pytest.mark.parametrize("override", ["seed=1", "privacy=off", "privacy.epsilon=8", "model=mlp", "run_dir=x"])
def test_only_rounds_may_change(override: str, unbroken: Path) -> None:
    result = fedmed("run", f"resume={unbroken}", override)
    assert result.code == 2
    assert result.err == f"error: '{override}': with resume only rounds may change\n"
    assert result.out == ""


@pytest.mark.parametrize("rounds", ["0", "many", "1.5"])
def test_rounds_are_checked_on_resumption_too(rounds: str, unbroken: Path) -> None:
    result = fedmed("run", f"resume={unbroken}", f"rounds={rounds}")
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert result.err.startswith("error: ")
    assert "rounds" in result.err


def test_a_folder_without_a_configuration_is_no_run(tmp_path: Path) -> None:
    """Such as one of a run that was killed before its configuration lasted: it had sent nothing."""
    for write in range(1, BEFORE_THE_FIRST_ROUND + 1):
        folder = tmp_path / str(write)
        assert fedmed("run", *OFF, f"run_dir={folder}", before=killed_at(write)).code == -signal.SIGKILL
        assert not (folder / "config.json").exists()
        result = fedmed("run", f"resume={folder}")
        assert result.code == 2
        assert result.err == (
            f"error: resume={folder}: no config.json in it; expected the folder of an earlier run\n"
        )
        assert sent(folder) == []


@pytest.mark.usefixtures("accounted")
def test_a_torn_last_line_of_the_journal_is_as_if_it_had_not_been_begun(tmp_path: Path) -> None:
    """A machine that lost its power in the middle of the line; the next line does not end up behind it."""
    folder = tmp_path / "run"
    assert fedmed("run", *PRIVATE, f"run_dir={folder}", before=killed_at(5)).code == -signal.SIGKILL
    journal = folder / "journal.jsonl"
    whole = journal.read_bytes().splitlines(keepends=True)[0]
    for torn in (b"", b'{"time": 1.5, "event": "round-se', b"\x00\x00\x00", whole[:-1]):
        journal.write_bytes(whole + torn)
        assert RunFolder(folder).rounds_sent() == 1
    result = fedmed("run", f"resume={folder}")
    assert result.code == 0, result
    assert sent(folder) == [1, 2, 3, 4]
    assert "interrupted" not in result.out
    assert fedmed("run", f"resume={folder}").code == 0


ARRAYS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "scalar": np.float32(3).reshape(())}


def progress(number: int) -> Progress:
    values = {
        name: (array + number).astype(np.float32).reshape(array.shape) for name, array in ARRAYS.items()
    }
    made = Progress(round=number, arrays=values, state={"v/w": np.full((2, 3), 1e-300 * number)},
                    seconds=0.1, total_seconds=0.7)  # fmt: skip
    made.recent.extend([ARRAYS, values])
    made.history.append({"round": number, "auc": None, "dropped": {"VA 'Long' Beach": "no answer"}})
    return made


def assert_progress(left: Progress | None, right: Progress) -> None:
    assert left is not None
    assert (left.round, left.history) == (right.round, right.history)
    assert (left.seconds, left.total_seconds) == (right.seconds, right.total_seconds)
    pairs = [
        (left.arrays, right.arrays),
        (left.state, right.state),
        *zip(left.recent, right.recent, strict=True),
    ]
    for one, other in pairs:
        assert one.keys() == other.keys()
        for name, values in one.items():
            assert (values.shape, values.dtype) == (other[name].shape, other[name].dtype)
            assert values.tobytes() == other[name].tobytes()


def test_a_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.load() is None
    folder.save(progress(3))
    assert_progress(folder.load(), progress(3))


def test_a_checkpoint_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.save(progress(3))
    kept = (tmp_path / CHECKPOINT).read_bytes()
    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:

            def fail(*_: object) -> None:
                # What could be seen at this instant is the whole old checkpoint.
                assert (tmp_path / CHECKPOINT).read_bytes() == kept
                raise OSError(28, "No space left on device")

            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="No space"):
                folder.save(progress(4))
        assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
        assert_progress(folder.load(), progress(3))
    folder.save(progress(4))
    assert_progress(folder.load(), progress(4))


def test_what_a_killed_write_leaves_behind_hinders_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save(progress(3))

    def write() -> None:
        killed_at(1)()
        folder.save(progress(4))

    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            write()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert_progress(folder.load(), progress(3))
    folder.save(progress(4))
    assert_progress(folder.load(), progress(4))


def test_a_second_run_does_not_take_a_folder_over(unbroken: Path) -> None:
    config = compose([*OFF, f"run_dir={unbroken}"])
    with pytest.raises(ConfigError, match="holds a run already"):
        RunFolder.create(config, {}, run_id="r")
