"""A coordinator that dies at any point of a round goes on, and says what the sites' ledgers say."""

import contextlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import strategies.run
from fedmed.privacy.ledger import Ledger
from strategies.folder import RunFolder
from strategies.sites import Sites
from strategies.spool import Spool
from tests.clients.sites import PRIVATE_METRICS, SIZES, account, make_sites, run, settings, table
from tests.conftest import count

ROUNDS = 3
DIED = 9
# What a round does, at the coordinator and, in the same process, at the sites: it may end before and after each.
POINTS: list[tuple[Any, str]] = [
    (RunFolder, "journal"), (RunFolder, "receive"), (RunFolder, "save"), (Spool, "add"), (Spool, "clear"),
    (Ledger, "reserve"), (Ledger, "open_data"), (Ledger, "commit"), (Sites, "end"),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a first run computes once in a process, the processes that are forked from this one have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategies.run, "write_report", lambda *_: None)
        run(new_run(tmp_path_factory.mktemp("warm"))[2])
        yield


def in_child(work: Callable[[], Any], *, end_at: int | None = None) -> tuple[int, int]:
    """Do something in a process of its own, which may end at a point without a word; its code, and how many points
    it passed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        code, passed = 1, 0

        def point() -> None:
            nonlocal passed
            passed += 1
            if passed == end_at:
                os._exit(DIED)

        with contextlib.suppress(BaseException):
            for owner, name in POINTS:
                _spy(owner, name, point)
            work()
            code = 0
        os.write(writing, str(passed).encode())
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as file:
        passed = int(file.read() or 0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), passed


def _spy(owner: Any, name: str, point: Callable[[], None]) -> None:
    function = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        point()
        try:
            return function(*arguments, **options)
        finally:
            point()

    setattr(owner, name, call)


def new_run(parent: Path) -> tuple[Path, Path, list[str]]:
    """Fresh sites, the run's folder, and its settings."""
    sites, folder = make_sites(parent / "sites"), parent / "run"
    data = table(parent / "t.csv")
    fixed = ["privacy.epsilon=null", "privacy.noise_multiplier=4", f"rounds={ROUNDS}"]
    return sites, folder, settings(data, f"federation.sites={sites}", f"run_dir={folder}", *fixed)


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def assert_agrees(sites: Path, folder: Path) -> None:
    """History, journal and ledgers tell one story."""
    history = json.loads((folder / "history.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    assert [entry["round"] for entry in history] == list(range(1, ROUNDS + 1))
    plans, run_id = RunFolder(folder).plans(), RunFolder(folder).run_id
    for site in SIZES:
        attempts = [a for a in account(sites / site).attempts.values() if a.run == run_id]
        committed = Counter(a.round for a in attempts if a.state == "committed")
        used = [entry["round"] for entry in history if site in entry["sites"]]
        # Every round that was used was answered once, however often it was asked for.
        assert set(committed.values()) <= {1}
        assert set(used) <= set(committed)
        # The epsilon that is printed is what the ledger was charged; the run's statement is no less.
        assert history[-1]["spent"][site] == len(attempts) <= ROUNDS
        assert history[-1]["epsilon"][site] == plans[site].epsilon(rounds=len(attempts))
        assert summary["privacy"]["sites"][site]["epsilon"] >= history[-1]["epsilon"][site]
        assert account(sites / site).cohort("default").charges.total() == len(attempts)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many points a run passes that nothing disturbs."""
    sites, folder, overrides = new_run(tmp_path_factory.mktemp("unbroken"))
    code, points = in_child(lambda: run(overrides))
    assert code == 0
    assert_agrees(sites, folder)
    # Each round at least: journal, and at each site a reservation, an opening, a commitment, a receipt and a reply.
    assert points >= ROUNDS * (2 + 2 * 2 * 5)
    return points


def test_ended_at_any_point_it_goes_on_and_agrees_with_the_ledgers(tmp_path: Path, unbroken: int) -> None:
    draws = random.Random(seed := int.from_bytes(os.urandom(4)))
    print(f"seed {seed}")
    points = sorted(draws.sample(range(1, unbroken), count(5, unbroken - 1)))
    repeated = 0
    for point in points:
        sites, folder, overrides = new_run(tmp_path / str(point))
        assert in_child(lambda o=overrides: run(o), end_at=point)[0] == DIED, point
        done = RunFolder(folder).load()
        sent = len(journal(folder)) if (folder / "journal.jsonl").exists() else 0
        code, _ = in_child(lambda f=folder: run([f"resume={f}"]))
        assert code == 0, point
        # No finished round is sent again.
        again = journal(folder)[sent:]
        assert all(entry["round"] > (done.round if done else 0) for entry in again), point
        repeated += bool(again) and sent > (done.round if done else 0)
        assert_agrees(sites, folder)
    assert repeated, points


def test_ended_again_and_again_it_still_agrees(tmp_path: Path, unbroken: int) -> None:
    """Several deaths in one run: at a site between opening its data and its answer too, as often as a draw says."""
    draws = random.Random(seed := int.from_bytes(os.urandom(4)))
    print(f"seed {seed}")
    for index in range(count(1, 20)):
        sites, folder, overrides = new_run(tmp_path / str(index))
        arguments = overrides
        for _ in range(3):
            code, _ = in_child(lambda a=arguments: run(a), end_at=draws.randint(5, unbroken // 3))
            if (folder / "config.json").exists():
                arguments = [f"resume={folder}"]
            if code == 0:
                break
        code, _ = in_child(lambda f=folder: run([f"resume={f}"]))
        assert code == 0
        history = json.loads((folder / "history.json").read_text())
        plans, run_id = RunFolder(folder).plans(), RunFolder(folder).run_id
        for site in SIZES:
            drawn = account(sites / site).drawn(run_id)
            assert drawn <= ROUNDS
            if history:
                assert history[-1]["spent"][site] == drawn or site not in history[-1]["sites"]
                assert history[-1]["spent"][site] >= sum(site in entry["sites"] for entry in history)
                assert plans[site].rounds == ROUNDS


def test_who_has_answered_is_not_asked_again(tmp_path: Path) -> None:
    """The coordinator dies with one reply kept and one not: the other alone is asked, and the bits are the same."""
    sites, folder, overrides = new_run(tmp_path)

    def die_at_the_second_reply() -> None:
        add = Spool.add
        seen: list[str] = []

        def counted(self: Spool, site: str, delta: Any) -> None:
            seen.append(site)
            if len(seen) == 2:
                os._exit(DIED)
            add(self, site, delta)

        Spool.add = counted  # type: ignore[method-assign]
        run(overrides)

    assert in_child(die_at_the_second_reply)[0] == DIED
    assert [entry["sites"] for entry in journal(folder)] == [["a", "b"]]
    kept = list((folder / "replies").iterdir())
    assert len(kept) == 1
    assert in_child(lambda: run([f"resume={folder}"]))[0] == 0
    assert [entry["sites"] for entry in journal(folder)][1] == ["b"]
    assert not (folder / "replies").exists()
    assert_agrees(sites, folder)


@pytest.mark.parametrize("damage", ["half", "flipped", "another run's", "empty"])
def test_a_kept_reply_that_is_damaged_is_not_used(damage: str, tmp_path: Path) -> None:
    """Such as by a power failure: the site is asked again, which costs it nothing."""
    sites, folder, overrides = new_run(tmp_path)
    patch = POINTS.index((Spool, "add"))

    def die() -> None:
        add = POINTS[patch][0].add

        def then_die(self: Spool, site: str, delta: Any) -> None:
            add(self, site, delta)
            os._exit(DIED)

        Spool.add = then_die  # type: ignore[method-assign]
        run(overrides)

    assert in_child(die)[0] == DIED
    (file,) = (folder / "replies").iterdir()
    content = file.read_bytes()
    asked = content.index(b'"asked": "') + 10
    file.write_bytes(
        {
            "half": content[: len(content) // 2],
            "flipped": content[:-1] + bytes([content[-1] ^ 1]),
            "another run's": content[:asked] + b"0" * 64 + content[asked + 64 :],
            "empty": b"",
        }[damage]
    )
    assert in_child(lambda: run([f"resume={folder}"]))[0] == 0
    assert [entry["sites"] for entry in journal(folder)][:2] == [["a", "b"], ["a", "b"]]
    assert_agrees(sites, folder)


def test_metrics_that_were_drawn_and_lost_are_repeated_not_redrawn(tmp_path: Path) -> None:
    """The coordinator dies between the sites' answers and the file that keeps them (privacy.md, rule 17)."""
    sites, folder = make_sites(tmp_path / "sites", held_out="private"), tmp_path / "run"
    overrides = settings(
        table(tmp_path / "t.csv"),
        f"federation.sites={sites}",
        f"run_dir={folder}",
        *PRIVATE_METRICS,
        "privacy.epsilon=null",
        "privacy.noise_multiplier=4",
    )

    def die() -> None:
        evaluate = Sites.evaluate_privately

        def then_die(self: Sites, *arguments: Any) -> Any:
            evaluate(self, *arguments)
            os._exit(DIED)

        Sites.evaluate_privately = then_die  # type: ignore[method-assign]
        run(overrides)

    assert in_child(die)[0] == DIED
    assert in_child(lambda: run([f"resume={folder}"]))[0] == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["test"]["sites"]) == set(SIZES)
    for site in SIZES:
        found = account(sites / site)
        attempts = [a for a in found.attempts.values() if a.purpose == "metrics"]
        assert [a.state for a in attempts] == ["committed"]
        assert summary["participation"][site] == {
            "rounds": 2,
            "charged": found.drawn(RunFolder(folder).run_id),
        }
