"""The loop of a site's process: what it answers, and what it does when the network or the coordinator fails."""

import dataclasses
import gc
import io
import itertools
import logging
import sys
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

import clients.daemon
import clients.site
from clients.daemon import LONGEST_PAUSE, TRIES
from clients.folder import POLICY
from clients.logs import JsonLines
from clients.pause import set_paused
from fedmed.flower.bundle import Bundle, installed, make_bundle, read_bundle
from fedmed.flower.line import LinkDown, LinkError, LinkRefused
from fedmed.flower.site_link import Request
from fedmed.records import Instruction, read_quote, read_update
from tests.clients.breaks import KINDS
from tests.clients.planted import MARK, leaks
from tests.clients.queue_link import QueueLink, query, serve, train
from tests.clients.sites import (
    GENEROUS,
    change_policy,
    instruction,
    make_site,
    settings,
    start,
    states,
    table,
)

ROUND = ["reserved", "opened", "committed"]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return make_site(tmp_path / "a", "a", held_out="none", budget=30).path


@pytest.fixture
def asked(tmp_path: Path) -> Instruction:
    return instruction(settings(table(tmp_path / "t.csv")), run_id="run-1")


def quote_of(asked: Instruction) -> Instruction:
    return dataclasses.replace(asked, round=0)


def later(asked: Instruction) -> Instruction:
    return dataclasses.replace(asked, round=2)


def never(*_: Any, **__: Any) -> Message:
    raise AssertionError("the app was called")


def test_a_node_with_a_folder_plays_its_own_site(site: Path, asked: Instruction) -> None:
    """No partition is named: neither by its number nor by the coordinator."""
    arrays = start(asked)
    link = QueueLink(query(quote_of(asked)), None, train(asked, arrays), train(later(asked), arrays))
    health = serve(site, link)
    quote = read_quote(link.replies[0].content)
    assert (quote.site, quote.refusal, quote.declared_size) == ("a", None, 40)
    receipt, delta = read_update(link.replies[1].content)
    assert (receipt.site, receipt.round) == ("a", 1)
    assert delta.keys() == arrays.keys()
    assert states(site) == ["hold", *ROUND, *ROUND]
    assert (link.connected, link.bundles) == (1, 1)
    assert (health.state, health.run, health.round) == ("stopping", "run-1", 2)
    assert health.last_contact is not None


def test_a_site_that_the_run_does_not_know_refuses(tmp_path: Path, asked: Instruction) -> None:
    other = make_site(tmp_path / "elsewhere", "elsewhere", held_out="none", budget=30).path
    link = QueueLink(query(quote_of(asked)), train(asked, start(asked)))
    serve(other, link)
    assert "no declared size for this site" in (read_quote(link.replies[0].content).refusal or "")
    assert link.replies[1].error.reason == "site-failed"


WRONG: dict[str, dict[str, Any]] = {
    "name": {"name": "fedmad"},
    "publisher": {"publisher": "mallory"},
    "version": {"version": "99"},
    "server app": {"components": {"serverapp": "evil:app", "clientapp": "clients.client_app:app"}},
    "client app": {"components": {"serverapp": "strategies.server_app:app", "clientapp": "evil:app"}},
    "one more component": {"components": {**installed().components, "agentapp": "evil:app"}},
    "one less": {"components": {"clientapp": "clients.client_app:app"}},
    "code": {"files": (*installed().files, "torch.py")},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bundle_that_is_not_the_installed_fedmed_is_refused(
    name: str, site: Path, asked: Instruction, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = dataclasses.replace(installed(), **WRONG[name])
    link = QueueLink(query(quote_of(asked)), train(asked, start(asked)), bundle=bundle)
    serve(site, link, app=never)
    assert [reply.error.reason for reply in link.replies] == ["unknown-bundle"] * 2
    assert link.bundles == 1
    assert states(site) == []
    found = str(next(iter(WRONG[name].values())))[:40] if name != "code" else "torch.py"
    assert "its bundle is refused, and was not opened" in caplog.text
    assert found in caplog.text


@pytest.mark.parametrize(
    "fault", [LinkError("no such thing"), ValueError("x"), zipfile.BadZipFile(), MemoryError()]
)
def test_a_bundle_that_cannot_be_read_is_refused(fault: Exception, site: Path, asked: Instruction) -> None:
    link = QueueLink(query(quote_of(asked)), bundle=fault)  # type: ignore[arg-type]
    serve(site, link, app=never)
    assert [reply.error.reason for reply in link.replies] == ["unknown-bundle"]


def shadowing(marker: Path) -> bytes:
    """The bundle of the installed fedmed, with modules beside it that would be found before the installed ones."""
    evil = f"open({str(marker)!r}, 'a').write(__name__)\n".encode()
    packed = io.BytesIO(make_bundle())
    with zipfile.ZipFile(packed, "a") as archive:
        for name in ("fedmed/__init__.py", "torch/__init__.py", "clients/client_app.py", "sitecustomize.py"):
            archive.writestr(name, evil)
    return packed.getvalue()


@pytest.mark.parametrize("blind", [False, True])
def test_nothing_of_a_bundle_that_shadows_modules_is_run(
    blind: bool, site: Path, asked: Instruction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused; and were it not, then what answers would still be what is installed."""
    marker = tmp_path / "ran"
    bundle = read_bundle(shadowing(marker))
    assert {"torch/__init__.py", "fedmed/__init__.py"} <= set(bundle.files)
    modules, paths = set(sys.modules), list(sys.path)
    if blind:
        monkeypatch.setattr(clients.daemon, "misfit", lambda _: None)
    link = QueueLink(query(quote_of(asked)), train(asked, start(asked)), bundle=bundle)
    serve(site, link)
    if blind:
        assert read_quote(link.replies[0].content).refusal is None
        assert read_update(link.replies[1].content)[0].site == "a"
    else:
        assert [reply.error.reason for reply in link.replies] == ["unknown-bundle"] * 2
    assert not marker.exists()
    assert sys.path == paths
    assert not {
        name for name in set(sys.modules) - modules if name.startswith(("fedmed", "torch", "clients.cl"))
    }
    # The modules would have run, had they been found: the marker is no blank.
    exec(zipfile.ZipFile(io.BytesIO(shadowing(marker))).read("torch/__init__.py"), {"__name__": "torch"})
    assert marker.read_text() == "torch"


DOWN = LinkDown("127.0.0.1:1: cannot be reached (ConnectError)")


def test_what_was_made_when_the_network_failed_is_sent_once_it_is_back(
    site: Path, asked: Instruction
) -> None:
    """It is not made again: a second answer would be a second charge, or the stored one."""
    arrays = start(asked)
    link = QueueLink(
        query(quote_of(asked)), DOWN, train(asked, arrays), train(later(asked), arrays),
        refusals=[None, DOWN, LinkRefused("replayed", "x"), DOWN],
    )  # fmt: skip
    link.connects = [None, DOWN, DOWN, None]
    serve(site, link)
    assert [reply.has_error() for reply in link.replies] == [False] * 3
    assert [read_update(reply.content)[0].round for reply in link.replies[1:]] == [1, 2]
    assert states(site) == ["hold", *ROUND, *ROUND]
    assert link.connected == 7


def test_a_message_whose_bundle_could_not_be_asked_for_is_answered_later(
    site: Path, asked: Instruction
) -> None:
    link = QueueLink(query(quote_of(asked)), bundle=DOWN)  # type: ignore[arg-type]

    def back(_: float) -> None:
        link.shipped = installed()

    serve(site, link, sleep=back)
    assert read_quote(link.replies[0].content).refusal is None


def test_a_reply_that_nobody_wants_is_dropped(site: Path, asked: Instruction) -> None:
    link = QueueLink(
        query(quote_of(asked)), query(quote_of(asked)), refusals=[LinkError("its run has ended"), None]
    )
    serve(site, link)
    assert (len(link.replies), link.connected) == (1, 1)


@pytest.mark.parametrize("fault", [DOWN, RuntimeError("what nobody thought of")])
def test_a_message_that_never_gets_an_answer_through_is_given_up(
    fault: Exception, site: Path, asked: Instruction
) -> None:
    link = QueueLink(query(quote_of(asked), run=1), query(quote_of(asked), run=2), refusals=[fault] * TRIES)
    serve(site, link)
    assert len(link.replies) == 1
    assert link.connected == TRIES + 1


def test_it_waits_longer_each_time_and_says_a_state_once(
    site: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    caplog.set_level(logging.INFO, "fedmed.site")
    link, tried = QueueLink(), []
    unknown = LinkRefused("unknown-node", "127.0.0.1:1: refuses us: unknown-node")
    link.connects = [*[DOWN] * 12, *[unknown] * 3, None]
    connect = link.connect

    def connecting() -> int:
        tried.append(clock[0])
        return connect()

    def sleep(seconds: float) -> None:
        assert 0 <= seconds <= 0.5
        clock[0] += seconds

    monkeypatch.setattr(link, "connect", connecting)
    serve(site, link, sleep=sleep)
    pauses = [after - before for before, after in itertools.pairwise(tried)]
    assert len(pauses) == 15
    assert 0.4 < pauses[0] < 1.1
    assert all(LONGEST_PAUSE / 2 <= pause <= LONGEST_PAUSE + 1 for pause in pauses[8:])
    # With jitter: sites that lost the same coordinator do not come back as one.
    assert len({round(pause, 6) for pause in pauses[8:]}) > 1
    said = [record.getMessage().split(":")[0] for record in caplog.records]
    assert said == ["unreachable", "refused", "online", "stopped"]


def test_a_stop_ends_after_the_present_message(site: Path, asked: Instruction) -> None:
    arrays = start(asked)
    link = QueueLink(query(quote_of(asked)), train(asked, arrays), train(later(asked), arrays))
    calls: list[str] = []

    def stopping(message: Message, context: Any) -> Message:
        calls.append(message.metadata.message_type)
        if len(calls) == 2:
            link.stop()
        return clients.client_app.app(message=message, context=context)  # type: ignore[no-any-return]

    serve(site, link, app=stopping)
    assert [reply.has_error() for reply in link.replies] == [False, False]
    assert len(link.steps) == 1


def test_a_stop_does_not_wait_for_the_network(site: Path) -> None:
    link = QueueLink()
    link.connects = [DOWN] * 3
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        link.stop()

    assert serve(site, link, sleep=sleep).state == "stopping"
    # Nothing was sent that a coordinator may still have to fetch.
    assert len(slept) == 2
    assert slept[1] == 0


@pytest.mark.parametrize(
    "record", [{}, {"instruction": {"json": "[]"}}, {"instruction": {"json": "{"}}, {"x": {"y": 1}}]
)
def test_what_is_no_instruction_gets_the_constant(
    record: dict[str, Any], site: Path, asked: Instruction
) -> None:
    strange = query(asked)
    strange.message.content = RecordDict({name: ConfigRecord(values) for name, values in record.items()})
    link = QueueLink(strange, query(quote_of(asked)))
    health = serve(site, link)
    assert link.replies[0].error.reason == "site-failed"
    assert read_quote(link.replies[1].content).refusal is None
    assert health.run == "run-1"


# Warm, and awake to what its engineer changes.


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every reading of the site's data from now on."""
    calls: list[str] = []
    read: Callable[..., Any] = clients.site.read_site

    def spied(*arguments: Any, **options: Any) -> Any:
        calls.append("read")
        return read(*arguments, **options)

    monkeypatch.setattr(clients.site, "read_site", spied)
    return calls


def test_data_stays_between_rounds_runs_and_changes_of_the_policy(
    site: Path, asked: Instruction, reads: list[str]
) -> None:
    arrays = start(asked)
    second = dataclasses.replace(asked, run_id="run-2")
    first = [query(quote_of(asked)), train(asked, arrays), train(later(asked), arrays)]
    link = QueueLink(*first)
    serve(site, link)
    warm = len(reads)
    assert warm > 0
    link = QueueLink(
        query(quote_of(second), run=8), train(second, arrays, run=8),
        lambda: change_policy(site, **GENEROUS, metrics={"held_out": "none"}, max_steps=9_999),
        train(later(second), arrays, run=8),
    )  # fmt: skip
    serve(site, link)
    assert [reply.has_error() for reply in link.replies] == [False] * 3
    assert len(reads) == warm


def test_a_changed_policy_counts_from_the_next_message_on(
    site: Path, asked: Instruction, caplog: pytest.LogCaptureFixture
) -> None:
    def changed(**values: Any) -> Callable[[], None]:
        return lambda: change_policy(site, **{**GENEROUS, "metrics": {"held_out": "none"}, **values})

    arrays = start(asked)
    link = QueueLink(
        query(quote_of(asked)), changed(max_steps=1), train(asked, arrays), query(quote_of(asked)),
        lambda: (site / POLICY).write_text("name: a\nmax_stepz: 5\n"), query(quote_of(asked)),
        train(asked, arrays), changed(), train(asked, arrays),
    )  # fmt: skip
    serve(site, link)
    answers = [reply.error.reason if reply.has_error() else "content" for reply in link.replies]
    assert answers == ["content", "site-failed", "content", "site-failed", "site-failed", "content"]
    assert "steps: asked 6, allowed at most 1" in (read_quote(link.replies[2].content).refusal or "")
    assert "max_stepz=5: unknown key" in caplog.text
    assert states(site) == ["hold", *ROUND]


def test_a_paused_site_takes_no_new_run_and_ends_those_under_way(
    site: Path, asked: Instruction, reads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    arrays = start(asked)
    new = dataclasses.replace(asked, run_id="run-2")
    link = QueueLink(
        query(quote_of(asked)), lambda: set_paused(site, True), query(quote_of(new), run=8),
        train(new, arrays, run=8), lambda: reads.append("the run under way"), train(asked, arrays),
        lambda: set_paused(site, False), query(quote_of(new), run=8), train(new, arrays, run=8),
    )  # fmt: skip
    serve(site, link)
    quotes = [read_quote(link.replies[index].content).refusal for index in (0, 1, 4)]
    assert quotes == [None, "paused", None]
    assert link.replies[2].error.reason == "paused"
    assert [link.replies[index].has_error() for index in (3, 5)] == [False, False]
    assert reads[0] == "the run under way"
    assert "fedmed site pause DIR --resume" in caplog.text


def test_a_pause_holds_for_what_is_not_private(tmp_path: Path, reads: list[str]) -> None:
    """No budget was promised to it, so that nothing tells whether it is under way."""
    site = make_site(tmp_path / "a", "a", held_out="none", budget=30, non_private=True).path
    asked = instruction(settings(table(tmp_path / "t.csv"), "privacy=off"))
    set_paused(site, True)
    link = QueueLink(query(quote_of(asked)), train(asked, start(asked)))
    serve(site, link)
    assert read_quote(link.replies[0].content).refusal == "paused"
    assert link.replies[1].error.reason == "paused"
    assert reads == []


def test_requests_are_let_go_of(site: Path, asked: Instruction) -> None:
    """A site's memory holds one message at a time, and not beside its answer while that is sent."""
    arrays = start(asked)
    script = iter([quote_of(asked), asked, later(asked), None])
    alive: list[weakref.ref[Message]] = []

    def forgotten() -> bool:
        gc.collect()
        return not [ref for ref in alive if ref() is not None]

    class Fresh(QueueLink):
        def receive(self, wait: float) -> Request | None:
            assert wait > 0
            assert forgotten()
            step = next(script)
            if step is None:
                self.stop()
                return None
            made = train(step, arrays) if step.round else query(step)
            alive.append(weakref.ref(made.message))
            self.handed.append(made.message.metadata.message_id)
            return made

        def reply(self, request: Request, reply: Message) -> None:
            assert forgotten()
            super().reply(request, reply)

    link = Fresh()
    serve(site, link)
    assert [reply.has_error() for reply in link.replies] == [False] * 3
    assert len(alive) == 3


def test_a_run_that_asks_again_and_again_is_logged_once(
    site: Path, asked: Instruction, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedmed.site")
    first, other = quote_of(asked), dataclasses.replace(quote_of(asked), run_id="run-2")
    serve(site, QueueLink(query(first), query(first), query(first), query(other), query(first)))
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if line.startswith("begun")]) == 3
    assert len([line for line in said if line.startswith("answered")]) == 3


@pytest.mark.parametrize("error", KINDS)
def test_whatever_fails_in_the_app_is_one_constant_and_its_words_are_nowhere(
    error: Callable[[], BaseException], site: Path, asked: Instruction, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the app's own mods did not stand before it."""
    caplog.set_level(logging.INFO)

    def fails(*_: Any, **__: Any) -> Message:
        raise error()

    link = QueueLink(query(quote_of(asked)))
    serve(site, link, app=fails)
    assert link.replies[0].error.reason == "site-failed"
    said = "\n".join(JsonLines().format(record) for record in caplog.records)
    assert "a site failed" in said
    assert not leaks(said.encode(), {MARK.encode()})


def test_the_bundle_of_the_launch_is_the_one_that_sites_take() -> None:
    bundle: Bundle = read_bundle(make_bundle())
    assert clients.daemon.misfit(bundle) is None
