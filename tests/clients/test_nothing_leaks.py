"""Canaries in the data, and things broken in many ways: none of them is ever seen outside the site.

Searched: every byte of every reply, error codes and reasons included; every log record from INFO up, standard output
and standard error, Python's warnings; the coordinator's run folder; and MLflow's store, read as raw bytes.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

import clients.client_app
import clients.guard
import clients.site
import fedmed.data.table
import fedmed.flower.in_process
import fedmed.privacy.chain
import fedmed.privacy.dpsgd
import fedmed.privacy.histogram
import fedmed.privacy.plan
import fedmed.privacy.release
import fedmed.training
import strategies.run
from clients.folder import KEY
from fedmed.cli.main import main
from fedmed.config import OPTIONS
from fedmed.data.table import read_site
from fedmed.flower.in_process import InProcessGrid
from fedmed.records import to_bytes
from tests.clients.breaks import BAD_DATA, KEPT, KINDS, NO_DATA, ODD_DATA, PLACES, REFUSED, SAID, Panic, Stage
from tests.clients.planted import MARK, PLANTERS, Planted, all_bytes, leaks, table
from tests.clients.sites import (
    account,
    instruction,
    make_site,
    make_sites,
    start,
)
from tests.evidence import some

FAILED = (fedmed.flower.in_process.ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "site-failed")


def test_every_kind_of_task_that_is_trained_has_a_planter() -> None:
    assert PLANTERS.keys() == {kind for kind, task in OPTIONS["task"].items() if task.trained}


@pytest.mark.parametrize("kind", PLANTERS)
def test_the_search_finds_what_it_searches_for(kind: str, tmp_path: Path) -> None:
    planted = PLANTERS[kind](tmp_path)
    canaries = planted.canaries
    assert len(canaries) > 40
    for canary in canaries:
        for seen in (canary.upper(), canary.decode().encode("utf-16-le"), canary.hex().encode()):
            assert leaks(b"{..." + seen + b"...}", canaries)
    import base64

    for shift in range(4):
        assert leaks(base64.b64encode(b"." * shift + MARK.encode() + b"...."), canaries)
    assert leaks(all_bytes(tmp_path), canaries)
    assert not leaks(b"a reply with nothing in it", canaries)


@dataclass
class Seen:
    """What a person or a log collector at the site's machine sees."""

    logs: pytest.LogCaptureFixture
    output: pytest.CaptureFixture[str]
    raised: list[warnings.WarningMessage]

    def text(self) -> bytes:
        out, err = self.output.readouterr()
        records = [
            logging.Formatter("%(name)s %(message)s").format(record)
            for record in self.logs.records
            if record.levelno >= logging.INFO
        ]
        words = [str(warning.message) for warning in self.raised]
        return "\n".join([out, err, *records, *words]).encode()


@pytest.fixture
def seen(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[Seen]:
    caplog.set_level(logging.INFO)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        yield Seen(caplog, capfd, raised)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    planted = table(tmp_path)
    site = make_site(tmp_path / "sites" / "a", "a", held_out="private", budget=80).path
    planted.more |= {(site / KEY).read_bytes().hex()}
    # What is memorised of a run must not answer for another one.
    asked = instruction(planted.settings, run_id=f"run of {tmp_path.name}")
    return Stage(planted, site, monkeypatch, asked, start(asked))


def check(stage: Stage, seen: Seen) -> None:
    """Nothing is seen outside but content without a canary, and one constant."""
    assert set(stage.errors) <= {FAILED}
    assert not leaks(stage.left(), stage.planted.canaries)
    assert not leaks(seen.text(), stage.planted.canaries)


def test_a_site_that_works_sends_an_update_and_a_histogram_and_no_canary(stage: Stage, seen: Seen) -> None:
    stage.quote()
    stage.rounds()
    assert (stage.errors, stage.refusal) == ([], None)
    assert len(stage.left()) > 1000
    check(stage, seen)


@pytest.mark.parametrize("name", BAD_DATA)
def test_data_that_cannot_be_used_is_one_constant(name: str, stage: Stage, seen: Seen) -> None:
    stage.quote()
    with stage.patch.context() as patch:
        stage.patch, before = patch, stage.patch
        BAD_DATA[name](stage)
        stage.rounds()
        stage.patch = before
    assert stage.refusal is None
    # Both rounds and the metrics.
    assert stage.errors == [FAILED] * 3
    check(stage, seen)


@pytest.mark.parametrize("name", NO_DATA)
def test_whether_anybody_is_left_in_the_data_is_not_told(name: str, stage: Stage, seen: Seen) -> None:
    stage.quote()
    stage.planted.rows[:] = stage.planted.rows[:40]
    NO_DATA[name](stage)
    stage.rounds()
    assert (stage.errors, stage.refusal) == ([], None)
    check(stage, seen)


@pytest.mark.parametrize("name", ODD_DATA)
def test_what_is_left_out_of_the_data_is_not_told(name: str, stage: Stage, seen: Seen) -> None:
    plain = read_site(stage.asked.task, "a", seed=0, key=bytes(32))
    stage.quote()
    ODD_DATA[name](stage)
    odd = read_site(stage.asked.task, "a", seed=0, key=bytes(32))
    # It is in the file, and the reader has met it.
    assert odd.manifest != plain.manifest
    stage.rounds()
    assert (stage.errors, stage.refusal) == ([], None)
    check(stage, seen)


@pytest.mark.parametrize(
    ("where", "name"), some(PLACES, 2), ids=lambda x: x if isinstance(x, str) else x.__name__
)
def test_whatever_raises_with_a_value_in_its_words_is_one_constant(
    where: Any, name: str, stage: Stage, seen: Seen
) -> None:
    stage.quote()
    assert stage.refusal is None
    number, reached = PLACES.index((where, name)), []

    def fail(*_: object, **__: object) -> None:
        reached.append(name)
        raise KINDS[(number + len(reached)) % len(KINDS)]()

    with stage.patch.context() as patch:
        patch.setattr(where, name, fail)
        stage.rounds()
    assert reached
    assert FAILED in stage.errors
    check(stage, seen)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_data_is_opened_tells_no_more_than_the_rule(
    name: str, stage: Stage, seen: Seen
) -> None:
    action, expected = REFUSED[name]
    action(stage)

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("data was opened")

    stage.patch.setattr(clients.site, "read_site", opened)
    stage.patch.setattr(fedmed.training, "train", opened)
    try:
        stage.quote()
        stage.rounds()
    finally:
        while KEPT:
            KEPT.pop().close()
    if expected is None:
        assert stage.replies[0].has_error()
    else:
        assert (stage.refusal or "").startswith(expected), stage.refusal
    assert len(stage.errors) >= 3
    assert not any(line in seen.logs.text for line in ("AssertionError",))
    check(stage, seen)


def test_there_are_at_least_fifty_breaks() -> None:
    assert len(BAD_DATA) + len(ODD_DATA) + len(PLACES) + len(REFUSED) + len(RUNS) >= 50


def test_a_site_that_logs_a_value_is_found_out(stage: Stage, seen: Seen) -> None:
    """The search is not blind to logs, nor to replies."""
    original = clients.site.train

    def talks(*arguments: Any, **options: Any) -> Any:
        logging.getLogger("fedmed.site").info("training %s", SAID)
        return original(*arguments, **options)

    stage.quote()
    with stage.patch.context() as patch:
        patch.setattr(clients.site, "train", talks)
        stage.rounds()
    assert not leaks(stage.left(), stage.planted.canaries)
    assert leaks(seen.text(), stage.planted.canaries)
    with stage.patch.context() as patch:
        error = fedmed.flower.in_process.Error
        patch.setattr(fedmed.flower.in_process, "Error", lambda code, _reason: error(code, SAID))
        stage.planted.path.unlink()
        stage.rounds()
    assert leaks(stage.left(), stage.planted.canaries)


# Whole runs with MLflow: the coordinator's side.


def nothing(_: Planted, __: pytest.MonkeyPatch) -> None: ...


def file_gone(planted: Planted, patch: pytest.MonkeyPatch) -> None:
    train, calls = clients.site.train, []

    def work(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            planted.path.unlink()
        return train(*arguments, **options)

    patch.setattr(clients.site, "train", work)


def raising(error: BaseException) -> Callable[[Planted, pytest.MonkeyPatch], None]:
    def prepare(_: Planted, patch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        patch.setattr(clients.site, "train", fail)

    return prepare


def one_site_panics(_: Planted, patch: pytest.MonkeyPatch) -> None:
    train, calls = clients.site.train, []

    def work(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) % 2:
            raise Panic(SAID)
        return train(*arguments, **options)

    patch.setattr(clients.site, "train", work)


# What is done, and the exit code of the command.
RUNS: dict[str, tuple[Callable[[Planted, pytest.MonkeyPatch], None], int]] = {
    "a run that works": (nothing, 0),
    "a run that loses its file half-way": (file_gone, 1),
    "a run in which one site panics": (one_site_panics, 0),
    "a run in which every site fails": (raising(ValueError(SAID)), 1),
    "a run that is interrupted in a site": (raising(KeyboardInterrupt(SAID)), 130),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all the runs are tracked: making MLflow's tables takes seconds."""
    return tmp_path_factory.mktemp("mlflow")


@pytest.mark.parametrize("name", some(RUNS, 2))
def test_the_coordinator_and_its_tracking_see_no_canary(
    name: str, tmp_path: Path, store: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, code = RUNS[name]
    planted = table(tmp_path)
    sites = make_sites(tmp_path / "sites", held_out="private", budget=80)
    planted.more |= {(sites / site / KEY).read_bytes().hex() for site in ("a", "b")}
    replies: list[bytes] = []
    exchange = InProcessGrid.gather

    def recorded(self: InProcessGrid, *arguments: Any, **options: Any) -> Iterator[Message]:
        for m in exchange(self, *arguments, **options):
            replies.append(
                f"{m.error.code} {m.error.reason}".encode() if m.has_error() else to_bytes(m.content)
            )
            yield m

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(InProcessGrid, "gather", recorded)
        patch.setattr(strategies.run, "write_report", lambda *_: None)
        patch.chdir(store)
        patch.setattr(sys, "argv", [
            "fedmed", "run", *planted.settings, "tracking=mlflow", f"tracking.uri=sqlite:///{store}/mlruns.db",
            f"federation.sites={sites}", f"run_dir={folder}",
        ])  # fmt: skip
        prepare(planted, patch)
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == code
    assert len(replies) >= 2
    outside = b"\n".join([*replies, all_bytes(folder), all_bytes(store)])
    # MLflow's database, its artifacts, the run's journal and receipts are in it.
    for part in (b"SQLite format 3", b"round-sent", b"receipts.jsonl", b"epsilon"):
        assert part in outside
    assert not leaks(outside, planted.canaries)
    assert not leaks(seen.text(), planted.canaries)
    if code == 0:
        assert (folder / "summary.json").exists()
        assert account(sites / "a").cohort("default").charges
