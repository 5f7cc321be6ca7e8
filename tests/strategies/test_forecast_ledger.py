"""The forecast against a site's ledger says what the ledger then does, and reads it without a trace."""

import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dp_accounting
import pytest

from fedmed.compose import compose
from fedmed.config import RunConfig
from fedmed.errors import ConfigError, FedmedError
from fedmed.privacy.account import BudgetError
from fedmed.privacy.chain import LedgerError
from fedmed.privacy.events import to_json
from fedmed.privacy.histogram import metrics_plans
from fedmed.privacy.ledger import Ledger, new_ledger
from fedmed.privacy.plan import make_plan
from fedmed.privacy.reader import read_account
from strategies.budgets import compare, read_budgets
from strategies.console import ledger_lines
from tests.commands import FAST, heavy, light
from tests.evidence import some
from tests.fedmed.privacy.test_ledger import Key

SITE, COHORT = "Hungary", "cardiology"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return made(tmp_path / "site")


def made(
    folder: Path, *, site: str = SITE, cohorts: tuple[str, ...] = (COHORT,), epsilon: float = 4.0
) -> Path:
    """A site's folder as far as a coordinator reads it; the ledger's path."""
    folder.mkdir()
    path = folder / "ledger.db"
    path.write_bytes(new_ledger(Key(), site=site))
    ledger = Ledger(path, Key())
    for name in cohorts:
        ledger.add_cohort(name, declared_size=293, by="officer")
        if epsilon:
            ledger.set_budget(name, epsilon=epsilon, delta=1e-4, by="officer", why="protocol 7")
    ledger.close()
    return path


def charge(path: Path) -> None:
    """Earlier runs of other kinds: spent in part, given back in part, still promised, refunded."""
    ledger = Ledger(path, Key())
    step = dp_accounting.PoissonSampledDpEvent(0.3, dp_accounting.GaussianDpEvent(5.0))
    for run, purpose, event, rounds in (
        ("a", "train", to_json(dp_accounting.SelfComposedDpEvent(step, 2)), 7),
        ("a", "metrics", to_json(dp_accounting.GaussianDpEvent(6.0)), 1),
        ("b", "train", to_json(dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(30.0), 1)), 9),
    ):
        ledger.hold(run, cohort=COHORT, purpose=purpose, event=event, rounds=rounds)
    for number in (1, 2):
        attempt = ledger.reserve("a", purpose="train", round=number, request="x")
        assert not hasattr(attempt, "content")
        ledger.open_data(attempt)
        ledger.commit(attempt, b"update")
    ledger.end("a")
    ledger.close()


def settings(*more: str) -> RunConfig:
    return compose([*FAST, *more])


def forecast(config: RunConfig, path: Path, *cohorts: str) -> dict[str, Any]:
    (values,) = compare(config, read_budgets([path], cohorts=cohorts, config=config))
    return values


def accepted(config: RunConfig, path: Path) -> bool:
    """Whether a copy of the ledger promises the run its budget, as a site asks it."""
    copy = path.parent / "copy.db"
    shutil.copy(path, copy)
    ledger = Ledger(copy, Key())
    plan, histogram = make_plan(config, SITE), metrics_plans(config.task, config.privacy).get(SITE)
    try:
        ledger.hold(
            "r", cohort=COHORT, purpose="train", event=to_json(plan.event(rounds=1)), rounds=plan.rounds
        )
        if histogram is not None:
            ledger.hold("r", cohort=COHORT, purpose="metrics", event=to_json(histogram.event()), rounds=1)
    except BudgetError:
        return False
    finally:
        ledger.close()
    return True


METRICS = ["privacy.metrics=private", "privacy.metrics_epsilon=3"]
CASES = [(False, []), (True, []), (False, METRICS), (True, METRICS)]


@pytest.mark.parametrize(("charged", "more"), some(CASES, 3))
def test_the_verdict_is_the_ledgers_at_the_boundary(path: Path, charged: bool, more: list[str]) -> None:
    if charged:
        charge(path)
    noise = ["privacy.epsilon=null", "privacy.noise_multiplier=8", *more]
    values = forecast(settings(*noise, "rounds=3"), path)
    most = values["rounds_that_fit"]
    assert values["verdict"] == "fits"
    assert most > 3
    for rounds, fits in ((most, True), (most + 1, False)):
        config = settings(*noise, f"rounds={rounds}")
        assert accepted(config, path) is fits
        assert (forecast(config, path)["verdict"] == "fits") is fits
    least = values["noise_multiplier_that_fits"]
    assert least < 8
    for factor, fits in ((1.0, True), (0.98, False)):
        config = settings(
            "privacy.epsilon=null", f"privacy.noise_multiplier={least * factor}", *more, "rounds=3"
        )
        assert accepted(config, path) is fits
        assert (forecast(config, path)["verdict"] == "fits") is fits


def test_before_cost_and_after_are_the_filters(path: Path) -> None:
    """At one order divergences add up, so that a run adds what it adds, whatever came before."""
    charge(path)
    config = settings("privacy.epsilon=1", *METRICS)
    values = forecast(config, path)
    account, last = read_account(path)
    budget = account.cohorts[COHORT].budget
    assert budget is not None
    assert values["before"]["epsilon"] == budget.spent(account.cohorts[COHORT].charges) > 0
    constant = budget.epsilon - budget.limit
    parts = values["before"], values["cost"]["training"], values["cost"]["metrics"]
    added = sum(part["epsilon"] - constant for part in parts)
    assert values["after"]["epsilon"] == pytest.approx(added + constant)
    assert values["after"]["epsilon_pld"] < values["after"]["epsilon"]
    assert (values["budget"]["renyi_order"], values["ledger_head"]) == (budget.order, last)
    assert (values["site"], values["cohort"], values["budget"]["delta"]) == (SITE, COHORT, 1e-4)


def test_metrics_alone_may_be_too_much(tmp_path: Path) -> None:
    path = made(tmp_path / "site", epsilon=1.0)
    values = forecast(settings("privacy.epsilon=0.5", *METRICS), path)
    assert (values["verdict"], values["rounds_that_fit"], values["noise_multiplier_that_fits"]) == (
        "refused", 0, None,
    )  # fmt: skip
    assert not values["metrics_fit"]
    assert "the private metrics alone do not fit" in ledger_lines(values)[-1]


def test_a_run_without_privacy_is_not_charged(path: Path) -> None:
    for setting in ("privacy=off", "privacy.seeded=true"):
        values = forecast(settings(setting), path)
        assert (values["verdict"], "cost" in values) == ("not charged", False)
        assert values["not_private_reason"]


# Reading.


@pytest.fixture
def photograph(path: Path) -> Iterator[None]:
    """The folder is afterwards what it was."""

    def seen() -> dict[str, Any]:
        return {
            file.name: (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
            for file in path.parent.iterdir()
        }

    before = seen()
    yield
    assert seen() == before


@pytest.mark.usefixtures("photograph")
def test_reading_leaves_no_trace(path: Path) -> None:
    assert read_account(path)[0].site == SITE
    forecast(settings(), path.parent)


def test_reading_works_on_a_read_only_disk_and_beside_a_site_at_work(path: Path) -> None:
    os.chmod(path.parent, 0o500)
    os.chmod(path, 0o400)
    assert read_account(path)[0].site == SITE
    os.chmod(path.parent, 0o700)
    os.chmod(path, 0o600)
    ledger = Ledger(path, Key())
    content = path.read_bytes()
    ledger.add_cohort("second", declared_size=10, by="officer")
    # Still in the write-ahead log.
    assert path.read_bytes() == content
    account, last = read_account(path)
    assert set(account.cohorts) == {COHORT, "second"}
    assert last == ledger.head()["hash"]
    assert path.read_bytes() == content
    ledger.hold(
        "r", cohort=COHORT, purpose="train", event=to_json(dp_accounting.GaussianDpEvent(9.0)), rounds=1
    )
    assert read_account(path)[0].cohorts[COHORT].charges.total() == 1


def spoilt(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.commit()
    connection.close()


BAD = [
    ("PRAGMA user_version=2", "has format 2, this fedmed reads 1"),
    ("PRAGMA application_id=7", "is no ledger of fedmed"),
    ("UPDATE entries SET body = replace(body, '293', '294')", "entry 2 does not follow the one before it"),
    ("DELETE FROM entries WHERE number = 2", "entry 3 does not follow the one before it"),
    ("DELETE FROM entries", "names no site"),
    ("DROP TABLE entries", "cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("statement", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_ledger_is_named(path: Path, statement: str, message: str) -> None:
    spoilt(path, statement)
    with pytest.raises(LedgerError, match=message):
        read_account(path)


def test_a_file_that_is_no_ledger_is_named(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:8192] = os.urandom(4096)
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=r"damaged|cannot be read|does not follow"):
        read_account(path)
    path.write_text("no database")
    with pytest.raises(LedgerError, match="is damaged"):
        read_account(path)
    for absent in (path.parent / "nowhere", path.parent / "nowhere" / "ledger.db"):
        with pytest.raises(LedgerError, match=r"no ledger there; expected a site's folder or its ledger.db"):
            read_account(absent)


def test_which_site_and_which_cohort(tmp_path: Path) -> None:
    def refused(
        message: str, *paths: Path, cohorts: tuple[str, ...] = (), config: RunConfig | None = None
    ) -> None:
        with pytest.raises(FedmedError, match=message):
            read_budgets(paths, cohorts=cohorts, config=config or settings())

    two = made(tmp_path / "two", cohorts=("cardiology", "oncology"))
    refused("of site 'Hungry', which is not in task.declared_sizes; did you mean 'Hungary'",
            made(tmp_path / "other", site="Hungry"))  # fmt: skip
    refused("has cohorts cardiology, oncology; choose one with: --cohort NAME", two)
    refused("--cohort oncolgy: no such cohort in .*did you mean 'oncology'", two, cohorts=("oncolgy",))
    refused("has cohorts", two, cohorts=("cardiology", "oncology"))
    refused("expected one a site", two, two.parent, cohorts=("oncology",))
    refused("has no cohort; at the site: fedmed privacy cohort add", made(tmp_path / "none", cohorts=()))
    refused("cohort 'cardiology' has no budget", made(tmp_path / "unset", epsilon=0.0))
    (found,) = read_budgets([two], cohorts=("oncology",), config=settings())
    assert found.cohort.name == "oncology"


# As typed.


def test_the_command_prints_both_outcomes_and_ends_well(path: Path) -> None:
    arguments = ["plan", *FAST, "--site-ledger", str(path.parent)]
    ended = heavy()(*arguments, "privacy.epsilon=1")
    assert (ended.code, ended.err) == (0, "")
    assert f"ledger of site '{SITE}', cohort '{COHORT}': epsilon 4 at delta 0.0001" in ended.out
    assert "  fits: the site's budget holds the whole run" in ended.out
    ended = heavy()(*arguments, "privacy.epsilon=8")
    assert (ended.code, ended.err) == (0, "")
    assert "  refused: 20 rounds do not fit into what is left" in ended.out
    ended = heavy()(*arguments, "privacy.epsilon=8", "--json")
    (values,) = json.loads(ended.out)["ledgers"]
    assert values["verdict"] == "refused"
    assert values["noise_multiplier_that_fits"] > values["noise_multiplier"]
    assert 0 < values["rounds_that_fit"] < values["rounds"] == 20
    ended = heavy()(*arguments, "privacy=off")
    assert "no budget covers this run" in ended.out


def test_a_wrong_ledger_is_told_before_torch_loads(path: Path) -> None:
    ended = light()("plan", *FAST, "--site-ledger", str(path.parent / "nowhere"))
    assert (ended.code, ended.out, ended.torch) == (2, "", False)
    assert ended.err.startswith("error: ")
    assert "no ledger there" in ended.err
    ended = light()("plan", *FAST, "--cohort", "x")
    assert "add --site-ledger PATH" in ended.err


def test_a_resumed_run_has_its_promise(path: Path, tmp_path: Path) -> None:
    import dataclasses

    config = dataclasses.replace(settings(), resume=str(tmp_path))
    with pytest.raises(ConfigError, match="forecasts a new run"):
        read_budgets([path], config=config)
