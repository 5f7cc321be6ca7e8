"""Runs through real site folders: nothing is opened before it is allowed and promised, nothing leaves uncharged."""

import dataclasses
import json
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from flwr.app import MessageType, RecordDict

import clients.site
import fedmed.data.table
import strategies.run
import strategies.sites
from clients.folder import LEDGER
from clients.opened import open_guard
from fedmed.config import TrainingConfig
from fedmed.errors import ConfigError, Interrupted
from fedmed.privacy.account import BudgetError
from fedmed.privacy.events import from_json
from strategies.folder import Progress, RunFolder
from tests.clients.sites import (
    GENEROUS,
    LARGE,
    PRIVATE_METRICS,
    SIZES,
    account,
    ask,
    change_policy,
    entries,
    instruction,
    ledger_of,
    make_site,
    make_sites,
    quoted,
    run,
    settings,
    start,
    states,
    table,
    trained,
    update,
)
from tests.commands import Ended, light, wait_for

ROUND = ["reserved", "opened", "committed"]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Plots take longer than the rounds; who is asked all the time leaves a person's command no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategies.run, "write_report", lambda *_: None)
        patch.setattr(strategies.sites, "APPROVAL_POLL", 0.3)
        yield


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return table(tmp_path / "t.csv")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every opening of data from now on, by what opened it."""
    calls: list[str] = []

    def spied(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return function(*arguments, **options)

        return call

    for module, name in (
        (clients.site, "read_site"),
        (fedmed.data.table, "read_site"),
        (fedmed.data.table, "read_csv"),
    ):
        monkeypatch.setattr(module, name, spied(name, getattr(module, name)))
    return calls


def composed(site: Path, run_id: str) -> float:
    """Epsilon of every attempt that a ledger shows as opened, by another path than the code's own."""
    accountant = PLDAccountant()
    for attempt in account(site).attempts.values():
        if attempt.run == run_id and attempt.state in ("opened", "committed"):
            accountant.compose(from_json(attempt.event))
    return float(accountant.get_epsilon(1e-5))


@pytest.mark.parametrize(
    ("metrics", "extra", "expected"),
    [
        ("none", (), ["hold", *ROUND, *ROUND, "returned"]),
        ("private", PRIVATE_METRICS, ["hold", "hold", *ROUND, *ROUND, *ROUND, "returned", "returned"]),
    ],
)
def test_a_run_is_promised_opened_committed_and_ended_at_every_site(
    metrics: str, extra: tuple[str, ...], expected: list[str], tmp_path: Path, data: Path, opened: list[str]
) -> None:
    sites = make_sites(tmp_path / "sites", held_out=metrics)
    folder = tmp_path / "run"
    summary, _ = run(settings(data, f"federation.sites={sites}", f"run_dir={folder}", *extra))
    assert opened
    assert summary["test"]["release"] == metrics
    run_id = RunFolder(folder).run_id
    for site in SIZES:
        assert states(sites / site) == expected
        spent = composed(sites / site, run_id)
        assert spent == pytest.approx(summary["privacy"]["sites"][site]["epsilon"], rel=0.01)
        with ledger_of(sites / site) as ledger:
            charges = ledger.account.cohort("default").charges
            assert charges.total() == len(ledger.account.attempts) == 2 + (metrics == "private")
            # Nobody repeats a request of a run that is over.
            assert not ledger.replies()


def test_where_the_budget_is_used_up_nothing_is_opened_and_nothing_else_is_told(
    tmp_path: Path, data: Path, opened: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    sites = make_sites(tmp_path / "sites", budget=3.6)
    run(settings(data, f"federation.sites={sites}", f"run_dir={tmp_path / 'first'}"))
    before = {site: states(sites / site) for site in SIZES}
    # Another file, which no cache holds.
    other = table(tmp_path / "other.csv")
    opened.clear()
    asked = settings(other, f"federation.sites={sites}", f"run_dir={tmp_path / 'second'}")
    with pytest.raises(ConfigError) as refused:
        run(asked)
    assert str(refused.value) in {
        f"site '{site}' refuses the run: the site's policy refuses: budget: asked 2 rounds, allowed at most 0"
        for site in SIZES
    }
    assert opened == []
    assert {site: states(sites / site) for site in SIZES} == before
    assert not (tmp_path / "second").exists()
    # The spy is not blind: with room for it the same run opens the file.
    for site in SIZES:
        with ledger_of(sites / site) as ledger:
            ledger.set_budget("default", epsilon=9.0, delta=None, by="officer", why="board")
    run(asked)
    assert "read_csv" in opened
    capfd.readouterr()


def test_half_a_budget_allows_the_rounds_that_fit(tmp_path: Path, data: Path) -> None:
    site = make_site(tmp_path / "a", "a", held_out="none", budget=3.6).path
    asked = settings(data, "privacy.epsilon=null", "privacy.noise_multiplier=2.0357")
    refusal = quoted(site, instruction([*asked, "rounds=5"])).refusal or ""
    allowed = int(refusal.rpartition(" ")[2])
    assert refusal == f"the site's policy refuses: budget: asked 5 rounds, allowed at most {allowed}"
    assert 2 <= allowed < 5
    assert states(site) == []
    assert quoted(site, instruction([*asked, f"rounds={allowed}"])).refusal is None
    assert states(site) == ["hold"]


def test_a_budget_above_the_policy_s_total_allows_nothing(tmp_path: Path, data: Path) -> None:
    site = make_site(tmp_path / "a", "a", held_out="none", budget=30, epsilon_total=20.0).path
    refusal = quoted(site, instruction(settings(data))).refusal
    assert refusal == "the site's policy refuses: budget: asked 2 rounds, allowed 0"
    no_cohort = make_site(tmp_path / "b", "b", held_out="none", budget=30, cohort="another").path
    assert quoted(no_cohort, instruction(settings(data))).refusal == "budget"
    assert states(site) == states(no_cohort) == []


def test_one_site_s_refusal_gives_back_what_the_others_promised(tmp_path: Path, data: Path) -> None:
    sites = make_sites(tmp_path / "sites", "a")
    make_site(sites / "b", "b", held_out="none", budget=None)
    with pytest.raises(ConfigError, match=r"site 'b' refuses the run: .* budget: asked 2 rounds, allowed 0"):
        run(settings(data, f"federation.sites={sites}", f"run_dir={tmp_path / 'run'}"))
    assert states(sites / "a") == ["hold", "returned"]
    assert account(sites / "a").cohort("default").charges.total() == 0
    assert states(sites / "b") == []
    assert not (tmp_path / "run").exists()


# A person's approval.


def site_command(*words: str) -> Ended:
    """`fedmed site WORDS` in a process of its own."""
    return light()("site", *words)


def waiting(site: Path) -> str:
    """The run that waits for a person at the site, as soon as there is one."""
    return str(wait_for(lambda: next(iter(account(site).requests), None)))


@pytest.mark.parametrize("verdict", ["approve", "refuse"])
def test_a_run_waits_until_a_person_decides_in_another_process(
    verdict: str, tmp_path: Path, data: Path, opened: list[str]
) -> None:
    sites = make_sites(tmp_path / "sites", "a")
    make_site(sites / "b", "b", held_out="none", budget=30, needs_approval=True)
    ended: list[Ended] = []
    seen: list[list[str]] = []
    # Started here, so that nobody is asked again and again meanwhile.
    light()

    def person() -> None:
        run_id = waiting(sites / "b")
        seen.append([*opened, *states(sites / "b")])
        ended.append(site_command(verdict, str(sites / "b"), run_id, "--why", "vote 12", "--by", "Ada"))

    thread = threading.Thread(target=person)
    thread.start()
    asked = settings(
        data, f"federation.sites={sites}", f"run_dir={tmp_path / 'run'}", "federation.approval_timeout=600"
    )
    if verdict == "approve":
        _, said = run(asked)
        run_id = RunFolder(tmp_path / "run").run_id
        assert f"fedmed site approve DIR {run_id}" in said
        assert states(sites / "b") == ["request", "decision", "hold", *ROUND, *ROUND, "returned"]
    else:
        with pytest.raises(ConfigError) as refused:
            run(asked)
        told = str(refused.value)
        assert "refuses: needs_approval" in told
        assert told.endswith("allowed not this one: a person refused it")
        # Neither who refused nor why leaves the site.
        assert "Ada" not in told
        assert "vote" not in told
        assert states(sites / "a") == ["hold", "returned"]
        assert states(sites / "b") == ["request", "decision"]
        assert opened == []
    thread.join()
    assert (ended[0].code, ended[0].err) == (0, "")
    assert seen == [["request"]]
    decision = entries(sites / "b")[1]
    assert (decision["by"], decision["why"]) == ("Ada", "vote 12")


def test_without_time_to_wait_the_run_ends_at_once(tmp_path: Path, data: Path, opened: list[str]) -> None:
    sites = make_sites(tmp_path / "sites", "a")
    make_site(sites / "b", "b", held_out="none", budget=30, needs_approval=True)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"site 'b': a person .* fedmed site approve DIR run-.*nobody did"):
        run(settings(data, f"federation.sites={sites}", f"run_dir={tmp_path / 'run'}"))
    assert time.monotonic() - began < 120
    assert states(sites / "a") == ["hold", "returned"]
    assert states(sites / "b") == ["request"]
    assert opened == []


def decide(site: Path, run_id: str = "r", *, approved: bool = True) -> None:
    with ledger_of(site) as ledger:
        what = ledger.account.requests[run_id]
        ledger.decide(run_id, approved=approved, by="Ada", why="vote 12", what=what)


def test_changed_settings_need_a_new_approval(tmp_path: Path, data: Path) -> None:
    site = make_site(tmp_path / "a", "a", held_out="none", budget=30, needs_approval=True).path
    asked, changed = instruction(settings(data)), instruction(settings(data, "task.label=id"))
    assert quoted(site, asked).waiting == "a person at the site has to approve run r"
    first = account(site).requests["r"]
    # What a person looks at is not exchanged under their eyes.
    assert quoted(site, changed).waiting
    assert account(site).requests["r"] == first
    decide(site)
    # At once, not at the next time of asking.
    assert quoted(site, asked).waiting is None
    assert states(site) == ["request", "decision", "hold"]
    assert quoted(site, changed).waiting
    assert account(site).requests["r"] != first
    assert trained(site, changed).has_error()
    decide(site)
    assert quoted(site, changed).waiting is None
    # And of two that were approved the last one holds.
    assert quoted(site, asked).waiting
    assert trained(site, asked).has_error()


@pytest.mark.parametrize("change", [{"seed": 1}, {"proximal_mu": 0.5}])
def test_an_approval_covers_every_setting_that_changes_what_is_trained(
    change: dict[str, Any], tmp_path: Path, data: Path, opened: list[str]
) -> None:
    """The seed of a shuffled split says who is held out, and so whose scores leave exactly."""
    site = make_site(tmp_path / "a", "a", held_out="exact", budget=30).path
    asked = instruction(settings(data, "privacy.metrics=exact"))
    quoted(site, asked)
    decide(site)
    assert quoted(site, asked).waiting is None
    changed = dataclasses.replace(asked, **change)
    for kind in (MessageType.TRAIN, MessageType.EVALUATE):
        assert ask(site, kind, changed, start(changed)).error.reason == "site-failed"
    assert quoted(site, changed).waiting
    assert opened == []


def test_nobody_trains_without_an_approval(tmp_path: Path, data: Path, opened: list[str]) -> None:
    site = make_site(tmp_path / "a", "a", held_out="none", budget=30, needs_approval=True).path
    asked = instruction(settings(data))
    assert trained(site, asked).error.reason == "site-failed"
    quoted(site, asked)
    decide(site, approved=False)
    assert "a person refused it" in (quoted(site, asked).refusal or "")
    assert trained(site, asked).error.reason == "site-failed"
    assert opened == []


def test_what_a_person_reads_of_a_run_cannot_act_on_the_terminal(tmp_path: Path, data: Path) -> None:
    title = "Sepsis\x1b[2J\nr: approved by the board"
    site = make_site(tmp_path / "a", "a", held_out="none", budget=30, needs_approval=True, tasks=("*",)).path
    asked = instruction(settings(data))
    spoofed = dataclasses.replace(asked, task=dataclasses.replace(asked.task, title=title))
    assert quoted(site, spoofed).waiting
    listed = site_command("requests", str(site))
    assert listed.code == 0, listed.err
    assert "\x1b" not in listed.out
    assert not any(line.startswith("r: approved") for line in listed.out.splitlines())
    for run_id in ("", "r\nr: approved", "x" * 201):
        assert ask(site, MessageType.QUERY, dataclasses.replace(asked, run_id=run_id)).has_error()


def test_exact_metrics_are_approved_and_stand_outside_the_guarantee(tmp_path: Path, data: Path) -> None:
    sites = make_sites(tmp_path / "sites", held_out="exact")
    threads = [
        threading.Thread(target=lambda site=site: decide(sites / site, waiting(sites / site)))
        for site in SIZES
    ]
    for thread in threads:
        thread.start()
    summary, _ = run(
        settings(data, f"federation.sites={sites}", f"run_dir={tmp_path / 'run'}", "privacy.metrics=exact",
                 "federation.approval_timeout=600")
    )  # fmt: skip
    for thread in threads:
        thread.join()
    assert summary["test"]["release"] == "exact"
    for site in SIZES:
        outside = [entry for entry in entries(sites / site) if entry["kind"] == "outside"]
        # Each round, and the released adapter.
        assert [entry["what"] for entry in outside] == ["exact metrics"] * 3
        assert {entry["approval"] for entry in outside} == {"Ada: vote 12"}
        # They cost no epsilon: the ledger claims none for them.
        assert account(sites / site).cohort("default").charges.total() == 2


def test_exact_metrics_that_nobody_approved_do_not_leave(
    tmp_path: Path, data: Path, opened: list[str]
) -> None:
    site = make_site(tmp_path / "a", "a", held_out="exact", budget=30).path
    asked = instruction(settings(data, "privacy.metrics=exact"))
    assert quoted(site, asked).waiting
    assert ask(site, MessageType.EVALUATE, asked, start(asked)).error.reason == "site-failed"
    assert states(site) == ["request"]
    assert opened == []


# A coordinator that is not honest.

VIOLATIONS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "another task": ("task", {"tasks": ("Sepsis",)}, ()),
    "another model": ("model", {"scratch_models": ("mlp",)}, ()),
    "patients moved by others": ("split", {}, ("task.public_benchmark=true", "task.split=shuffle")),
    "too costly": ("epsilon", {"epsilon_per_run": 1.0}, ()),
    "metrics make it too costly": ("epsilon", {"epsilon_per_run": 5.0}, PRIVATE_METRICS),
    "too many steps": ("steps", {"max_steps": 5}, ()),
    "exact metrics": ("metrics", {}, ("privacy.metrics=exact",)),
    "not private": ("non_private", {}, ("privacy=off",)),
    "noise that is known": ("non_private", {}, ("privacy.seeded=true",)),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_what_the_policy_forbids_is_refused_at_the_quote_and_in_the_round(
    name: str, tmp_path: Path, data: Path, opened: list[str]
) -> None:
    rule, changes, overrides = VIOLATIONS[name]
    held_out = "private" if overrides == PRIVATE_METRICS else "none"
    site = make_site(tmp_path / "a", "a", held_out=held_out, budget=30, **changes).path
    asked = instruction(settings(data, *overrides))
    refusal = quoted(site, asked).refusal or ""
    assert refusal.startswith(f"the site's policy refuses: {rule}: asked "), refusal
    # Whoever does not ask is told no more than that it failed.
    for reply in (trained(site, asked), ask(site, MessageType.EVALUATE, asked, start(asked))):
        assert reply.error.reason == "site-failed"
    assert opened == []
    assert states(site) == []


def test_another_site_s_part_is_refused(tmp_path: Path, data: Path, opened: list[str]) -> None:
    made = make_site(tmp_path / "b", "b", held_out="none", budget=30).path
    asked = instruction(settings(data))
    moved = made.rename(tmp_path / "a")
    change_policy(tmp_path / "a", **{**GENEROUS, "epsilon_per_run": 3.0})
    text = (moved / "site.yaml").read_text()
    (moved / "site.yaml").write_text(text.replace("name: a", "name: b"))
    assert "asked another site's part" in (quoted(moved, asked).refusal or "")
    assert trained(moved, asked).has_error()
    assert opened == []


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return make_site(tmp_path / "a", "a", held_out="private", budget=60).path


def test_a_round_that_nobody_quoted_is_refused(site: Path, data: Path, opened: list[str]) -> None:
    assert trained(site, instruction(settings(data))).error.reason == "site-failed"
    assert states(site) == []
    assert opened == []


@pytest.mark.parametrize(
    "change", ["training.steps_per_round=2", "training.sample_rate=0.25", "privacy.epsilon=1", "privacy.epsilon=3.5"]
)  # fmt: skip
def test_a_round_of_another_plan_than_the_promised_one_is_refused(
    change: str, site: Path, data: Path, opened: list[str]
) -> None:
    assert quoted(site, instruction(settings(data))).refusal is None
    assert trained(site, instruction(settings(data, change))).error.reason == "site-failed"
    assert "another mechanism" not in str(quoted(site, instruction(settings(data, change))).refusal)
    assert states(site) == ["hold"]
    assert opened == []


def test_the_same_request_gets_the_same_bytes_and_another_one_is_a_new_charge(site: Path, data: Path) -> None:
    asked = instruction(settings(data))
    quoted(site, asked)
    first = update(trained(site, asked))
    assert [update(trained(site, asked)) for _ in range(3)] == [first] * 3
    assert states(site) == ["hold", *ROUND]
    # The same round with another adapter.
    other = {name: values + 1 for name, values in start(asked).items()}
    second = update(trained(site, asked, other))
    assert second != first
    assert states(site) == ["hold", *ROUND, *ROUND]
    # Two were promised; whatever the third is called, it is one too many.
    more = {name: values + 2 for name, values in start(asked).items()}
    assert trained(site, asked, more).error.reason == "site-failed"
    assert trained(site, dataclasses.replace(asked, round=2)).error.reason == "site-failed"
    assert trained(site, dataclasses.replace(asked, round=3)).error.reason == "site-failed"
    assert states(site) == ["hold", *ROUND, *ROUND]
    # What was answered is answered again.
    assert (update(trained(site, asked)), update(trained(site, asked, other))) == (first, second)


def test_a_failed_round_is_spent_and_its_repetition_has_fresh_noise(
    site: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = instruction(settings(data))
    quoted(site, asked)

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk")

    with monkeypatch.context() as patch:
        patch.setattr(clients.site, "train", fail)
        assert trained(site, asked).error.reason == "site-failed"
    assert states(site) == ["hold", "reserved", "opened"]
    assert trained(site, asked).has_content()
    assert states(site) == ["hold", "reserved", "opened", *ROUND]
    assert trained(site, dataclasses.replace(asked, round=2)).error.reason == "site-failed"


def test_what_fails_before_data_is_opened_is_given_back(
    site: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = instruction(settings(data))
    quoted(site, asked)
    with monkeypatch.context() as patch:
        patch.setattr(clients.site, "load", lambda _: 1 / 0)
        assert trained(site, asked).error.reason == "site-failed"
    assert states(site) == ["hold", "reserved", "refunded"]
    assert [trained(site, dataclasses.replace(asked, round=n)).has_content() for n in (1, 2)] == [True, True]


def test_private_metrics_are_drawn_once(site: Path, data: Path) -> None:
    asked = instruction(settings(data, *PRIVATE_METRICS), run_id="metrics once")
    assert quoted(site, asked).refusal is None
    arrays = start(asked)
    replies = [ask(site, MessageType.EVALUATE, asked, arrays) for _ in range(3)]
    assert len({update(reply) for reply in replies}) == 1
    # Even a process that has forgotten it does not draw again.
    clients.site._drawn.clear()
    assert update(ask(site, MessageType.EVALUATE, asked, arrays)) == update(replies[0])
    other = {name: np.asarray(values + 1) for name, values in arrays.items()}
    assert ask(site, MessageType.EVALUATE, asked, other).error.reason == "site-failed"
    assert Counter(states(site)) == {"hold": 2, "reserved": 1, "opened": 1, "committed": 1}


def test_two_runs_are_never_promised_the_same_budget(tmp_path: Path, data: Path) -> None:
    site = make_site(tmp_path / "a", "a", held_out="none", budget=3.6).path
    one, other = (instruction(settings(data), run_id=name) for name in ("one", "other"))
    assert quoted(site, one).refusal is None
    assert "budget: asked 2 rounds, allowed at most 0" in (quoted(site, other).refusal or "")
    assert ask(site, f"{MessageType.QUERY}.end", one).has_content()
    assert quoted(site, other).refusal is None


# Runs that are interrupted, and what remains of them.


def interrupted(folder: Path, overrides: list[str], *, after: bool) -> None:
    """A run that a person stops in round 2's checkpoint (round 1's, if `after`), or after it."""
    save = RunFolder.save

    def stop(self: RunFolder, progress: Progress) -> None:
        if progress.round == 1 or after:
            save(self, progress)
        if progress.round == (1 if after else 2):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "save", stop)
        with pytest.raises(Interrupted, match=f"resume={folder}"):
            run(overrides)


@pytest.mark.parametrize("after", [True, False])
def test_a_resumed_run_keeps_what_it_was_promised_and_is_not_charged_twice(
    after: bool, tmp_path: Path, data: Path
) -> None:
    sites, folder = make_sites(tmp_path / "sites"), tmp_path / "run"
    interrupted(folder, settings(data, f"federation.sites={sites}", f"run_dir={folder}"), after=after)
    done = 1 if after else 2
    for site in SIZES:
        assert states(sites / site) == ["hold", *ROUND * done]
        # Promised as long as it may go on.
        assert account(sites / site).cohort("default").charges.total() == 2
    summary, said = run([f"resume={folder}"])
    for site in SIZES:
        assert states(sites / site) == ["hold", *ROUND, *ROUND, "returned"]
        spent = composed(sites / site, RunFolder(folder).run_id)
        assert spent == pytest.approx(summary["privacy"]["sites"][site]["epsilon"], rel=0.01)
    # The sites remember what they answered: the interrupted round is finished, and costs nothing more.
    assert "interrupted" not in said
    assert summary["rounds"] == 2
    # More rounds of the finished run: only these are added.
    run([f"resume={folder}", "rounds=3"])
    for site in SIZES:
        assert account(sites / site).cohort("default").charges.total() == 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sites' folders and the run's folder."""
    parent = tmp_path_factory.mktemp("finished")
    sites = make_sites(parent / "sites")
    run(settings(table(parent / "t.csv"), f"federation.sites={sites}", f"run_dir={parent / 'run'}"))
    return sites, parent / "run"


def verified(site: Path, receipts: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """`fedmed privacy verify --site SITE --receipts RUN_DIR --json`."""
    import typer

    from clients.officer import verify_command

    code = 0
    try:
        verify_command(site, [receipts], as_json=True)
    except typer.Exit as ended:
        code = ended.exit_code
    return code, json.loads(capsys.readouterr().out)


def test_receipts_are_kept_and_show_a_ledger_that_was_cut_off(
    finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sites, folder = finished
    kept = [json.loads(line) for line in (folder / "receipts.jsonl").read_text().splitlines()]
    # The quote, two rounds, the end: from each site.
    assert Counter(entry["site"] for entry in kept) == {"a": 4, "b": 4}
    for site in SIZES:
        code, verdict = verified(sites / site, folder, capsys)
        assert (code, verdict["ok"], verdict["receipts"]) == (0, True, 4)
    connection = sqlite3.connect(sites / "a" / LEDGER)
    last = connection.execute("SELECT max(number) FROM entries").fetchone()[0]
    # Back to what only the quote's receipt shows.
    connection.execute("DELETE FROM entries WHERE number > ?", (last - 8,))
    connection.commit()
    connection.close()
    code, verdict = verified(sites / "a", folder, capsys)
    assert (code, verdict["ok"]) == (1, False)
    assert verdict["first_bad_entry"] == last - 7
    assert "cut off" in verdict["reason"]


def test_with_site_folders_the_command_itself_opens_no_data(tmp_path: Path, opened: list[str]) -> None:
    """privacy.md, rule 19: policy checks come first; a table that is missing shows at its site, in the round."""
    sites = make_sites(tmp_path / "sites", tasks=("Sepsis",))
    with pytest.raises(ConfigError, match="refuses the run: the site's policy refuses: task"):
        run(settings(tmp_path / "nowhere.csv", f"federation.sites={sites}", f"run_dir={tmp_path / 'run'}"))
    assert opened == []
    assert not (tmp_path / "fedmed-home").exists()


class Clock:
    """A clock that goes on by itself at each look, and by what was slept."""

    def __init__(self) -> None:
        self.looks: list[float] = []
        self.now = 100.0

    def monotonic(self) -> float:
        self.now += 0.27
        self.looks.append(self.now)
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


def test_replies_leave_on_a_grid_whether_they_are_answers_or_failures(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """privacy.md, rule 19: how long a site worked tells little."""
    site = make_site(tmp_path / "a", "a", held_out="none", budget=30, reply_grid_seconds=0.4).path
    asked = instruction(settings(data))
    quoted(site, asked)
    for request, answered in ((asked, True), (dataclasses.replace(asked, round=9), False)):
        clock = Clock()
        monkeypatch.setattr("clients.guard.time", clock)
        assert trained(site, request).has_content() == answered
        # From the first look at the clock to the time after its last sleep.
        late = (clock.now - clock.looks[0]) % 0.4
        assert min(late, 0.4 - late) < 1e-6
        assert clock.now > clock.looks[-1]


def test_a_run_does_not_spend_one_cohort_s_budget_on_another_one_s_patients(
    tmp_path: Path, data: Path, opened: list[str]
) -> None:
    """Its officer has named other data, and another cohort, since the run was promised its budget."""
    site = make_site(tmp_path / "a", "a", held_out="private", budget=60).path
    asked = instruction(settings(data, *PRIVATE_METRICS))
    assert quoted(site, asked).refusal is None
    with ledger_of(site) as ledger:
        ledger.add_cohort("children", declared_size=600, by="officer")
    other = table(tmp_path / "children.csv")
    change_policy(
        site, **{**GENEROUS, "data": str(other), "cohort": "children", "metrics": {"held_out": "private"}}
    )
    for kind in (MessageType.TRAIN, MessageType.EVALUATE):
        assert ask(site, kind, asked, start(asked)).error.reason == "site-failed"
    assert opened == []
    assert states(site) == ["hold", "hold"]


def test_metrics_with_less_noise_than_was_promised_are_not_drawn(tmp_path: Path, data: Path) -> None:
    """What is charged is what was held: a coordinator cannot lower the noise after the quote."""
    site = make_site(tmp_path / "a", "a", held_out="private", budget=60).path
    quoted(site, instruction(settings(data, *PRIVATE_METRICS)))
    less = instruction(settings(data, *PRIVATE_METRICS, "privacy.metrics_epsilon=10"))
    before = states(site)
    with pytest.raises(BudgetError, match="not the metrics that was promised"):
        open_guard(str(site)).evaluate(less, "a", {}, RecordDict())
    assert states(site) == before


@pytest.mark.parametrize(("apart", "size"), [(True, 1), (False, None)])
def test_the_site_chooses_how_many_records_are_in_memory(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, apart: bool, size: int | None
) -> None:
    site = make_site(tmp_path / "a", "a", held_out="none", budget=60, patients_apart=apart).path
    asked = instruction(settings(data, "training.physical_batch_size=1000000"))
    quoted(site, asked)
    seen = []

    def train(*_: Any, training: TrainingConfig, **__: Any) -> None:
        seen.append(training.physical_batch_size)
        raise ValueError

    monkeypatch.setattr(clients.site, "train", train)
    trained(site, asked)
    assert seen == [size]


@pytest.mark.parametrize("metrics_first", [True, False])
def test_a_run_cannot_put_its_cost_together_from_several_quotes(
    tmp_path: Path, data: Path, metrics_first: bool
) -> None:
    """Each fits `epsilon_per_run` alone; rounds of the one and metrics of the other would not."""
    site = make_site(tmp_path / "a", "a", held_out="private", budget=60).path
    noise = ("privacy.epsilon=null", "privacy.noise_multiplier=2", LARGE)
    with_metrics = instruction(settings(data, *noise, *PRIVATE_METRICS))
    without = instruction(settings(data, *noise, f"rounds={with_metrics.plans['a'].rounds + 1}"))
    first, second = (with_metrics, without) if metrics_first else (without, with_metrics)
    second = dataclasses.replace(second, run_id=first.run_id)
    assert quoted(site, first).refusal is None
    before = states(site)
    answer = quoted(site, second)
    assert answer.refusal is not None
    assert "all that it was promised" in answer.refusal
    assert states(site) == before


def test_an_accelerator_that_is_not_there_stops_a_site_before_anything_is_charged(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site(tmp_path / "a", "a", held_out="none", budget=60).path
    asked = instruction(settings(data))
    quoted(site, asked)
    before = states(site)
    change_policy(site, **{**GENEROUS, "device": "cuda:99"})
    assert trained(site, asked).error.reason == "site-failed"
    assert states(site) == before
    assert "device=cuda:99: PyTorch" in caplog.text
    change_policy(site, **{**GENEROUS, "device": "cpu"})
    assert not trained(site, asked).has_error()


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_the_site_chooses_where_networks_compute(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    site = make_site(tmp_path / "a", "a", held_out="none", budget=60, device=name).path
    asked = instruction(settings(data))
    quoted(site, asked)
    seen = []
    device_of = clients.site.device_of
    monkeypatch.setattr(clients.site, "device_of", lambda name: (seen.append(name), device_of("cpu"))[1])
    assert not trained(site, asked).has_error()
    assert set(seen) == {name}


def test_what_to_do_about_an_accelerators_full_memory_is_in_the_log(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site(tmp_path / "a", "a", held_out="none", budget=60).path
    asked = instruction(settings(data))
    quoted(site, asked)

    def train(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("a tensor of somebody's")

    monkeypatch.setattr(clients.site, "train", train)
    assert trained(site, asked).error.reason == "site-failed"
    assert "memory is full: end what else uses it (nvidia-smi), or set device: cpu" in caplog.text
    assert "somebody" not in caplog.text
