"""What a site checks before it trains, where its randomness comes from, and what may be said afterwards."""

import dataclasses
import math

import pytest
from dp_accounting import NeighboringRelation
from dp_accounting.pld import PLDAccountant

from clients.site import _source, own_plan, quote, work
from fedmed.compose import compose
from fedmed.config import RunConfig
from fedmed.errors import ConfigError
from fedmed.models.build import build
from fedmed.privacy.in_words import belief_in_words, round_up
from fedmed.privacy.plan import PrivacyPlan, make_plan
from fedmed.records import Instruction, instruction_record, read_instruction
from strategies.console import footnotes
from strategies.summary import privacy_statement
from tests.fedmed.privacy.test_accounting import make

SITE = "Cleveland"
GIVEN_NOISE = ("privacy.epsilon=null", "privacy.noise_multiplier=3")


def config(*overrides: str) -> RunConfig:
    return compose(["model=logistic", "tracking=none", "rounds=4", *overrides])


def instruction(*overrides: str, round: int = 1, **changes: object) -> Instruction:
    """What a coordinator sends that changes the site's plan, as it arrives."""
    run = config(*overrides)
    plans = {site: make_plan(run, site) for site in run.task.declared_sizes}
    plans[SITE] = dataclasses.replace(plans[SITE], **changes)  # type: ignore[arg-type]
    return read_instruction(instruction_record(Instruction.of(run, plans, run_id="r", round=round)))[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("unit", "record"), ("declared_size", 10_000), ("sample_rate", 0.1), ("steps_per_round", 2),
        ("records_per_patient", 9), ("max_grad_norm", 5.0), ("delta", 1e-2), ("noise_multiplier", 2.9),
        ("noise_multiplier", 0.0),
    ],
)  # fmt: skip
def test_a_plan_that_is_not_the_declared_one_is_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"plans.{SITE}.{name}="):
        own_plan(instruction(*GIVEN_NOISE, **{name: value}), SITE)


def test_a_plan_without_noise_is_refused_under_a_target() -> None:
    with pytest.raises(ConfigError, match="expected > 0 with privacy=dp"):
        own_plan(instruction(noise_multiplier=0.0), SITE)


def test_a_plan_that_costs_more_than_was_asked_for_is_refused() -> None:
    honest = instruction()
    assert own_plan(honest, SITE) == honest.plans[SITE]
    for changes in (
        {"noise_multiplier": 0.9 * honest.plans[SITE].noise_multiplier},
        {"rounds": 8},
    ):
        with pytest.raises(ConfigError, match=r"the run asked for 3\.0"):
            own_plan(instruction(**changes), SITE)


@pytest.mark.parametrize("round", [5, 0, -1])
def test_a_round_outside_the_plan_trains_nothing(round: int) -> None:
    asked = instruction(round=round)
    arrays = build(asked.task, asked.model, asked.adapter).initialise(0)
    with pytest.raises(ConfigError, match=f"round={round}: expected"):
        work(asked, SITE, arrays)


def test_another_site_s_plan_is_not_used() -> None:
    asked = instruction()
    others = {site: plan for site, plan in asked.plans.items() if site != SITE}
    with pytest.raises(ConfigError, match=f"plans: none for site '{SITE}'"):
        own_plan(dataclasses.replace(asked, plans=others), SITE)


def test_a_site_s_quote_is_its_own_plan_s_whole_cost() -> None:
    asked = instruction(round=0)
    assert quote(asked, SITE).epsilon == pytest.approx(asked.plans[SITE].epsilon())
    assert quote(instruction("privacy=off", round=0), SITE).epsilon is None


def test_the_source_is_the_operating_system_unless_the_run_is_declared_not_private() -> None:
    """privacy.md, rule 8."""
    assert _source(instruction(), SITE).private
    for overrides in (["privacy.seeded=true"], ["privacy=off"]):
        asked = instruction(*overrides)
        assert not _source(asked, SITE).private
        assert _source(asked, SITE).read(8) == _source(asked, SITE).read(8)
        assert _source(asked, SITE).read(8) != _source(asked, "Hungary").read(8)
        assert _source(asked, SITE).read(8) != _source(instruction(*overrides, round=2), SITE).read(8)


def summary_of(run: RunConfig, plans: dict[str, PrivacyPlan]) -> dict:
    return {"privacy": privacy_statement(run, plans), "references": None, "test": {"release": "exact"}}


def test_the_consortium_pays_the_largest_at_one_site_and_the_composition_at_all() -> None:
    """privacy.md, rule 2: with different plans, so that the first, the mean and the largest are told apart."""
    plans = {
        "a": make(noise_multiplier=4.0, delta=1e-5),
        "b": make(noise_multiplier=2.0, delta=1e-6),
        "c": make(noise_multiplier=3.0, delta=1e-4),
    }
    privacy = privacy_statement(config(), plans)
    spent = {site: plan.epsilon() for site, plan in plans.items()}
    assert {site: values["epsilon"] for site, values in privacy["sites"].items()} == spent
    assert {site: values["delta"] for site, values in privacy["sites"].items()} == {
        "a": 1e-5, "b": 1e-6, "c": 1e-4,
    }  # fmt: skip
    one, everywhere = privacy["consortium"]["one_site"], privacy["consortium"]["all_sites"]
    assert one["epsilon"] == max(spent.values()) == spent["b"]
    assert privacy["delta"] == one["delta"] == 1e-4
    # At the smallest delta, where all sites cannot seem to cost less than one.
    assert everywhere["delta"] == 1e-6
    together = PLDAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    for plan in plans.values():
        together.compose(plan.event())
    assert everywhere["epsilon"] == pytest.approx(together.get_epsilon(1e-6), rel=1e-3)
    assert everywhere["epsilon"] > max(dataclasses.replace(p, delta=1e-6).epsilon() for p in plans.values())
    assert privacy["accountant"] == "pld"
    assert one["epsilon_rdp"] == max(plan.epsilon(accountant="rdp") for plan in plans.values())
    for site, plan in plans.items():
        # RDP is never the tighter one here: the two are not swapped.
        assert privacy["sites"][site]["epsilon_rdp"] > privacy["sites"][site]["epsilon"] == plan.epsilon()
    shown = " ".join(footnotes(summary_of(config(), plans)))
    assert f"{round_up(everywhere['epsilon']):.2f}" in shown
    assert "PLD accountant" in shown


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [(["privacy=off"], "privacy=off"), (["privacy.seeded=true"], "privacy.seeded=true")],
)
def test_no_epsilon_where_nothing_is_private(overrides: list[str], reason: str) -> None:
    """privacy.md, rule 8: NOT PRIVATE wherever an epsilon would stand."""
    run = config(*overrides)
    plans = {site: make_plan(run, site) for site in run.task.declared_sizes}
    privacy = privacy_statement(run, plans)
    assert not privacy["private"]
    assert privacy["not_private_reason"].startswith(reason)
    assert privacy["consortium"] is privacy["in_words"] is privacy["delta"] is privacy["accountant"] is None
    assert all(values["epsilon"] is values["epsilon_rdp"] is None for values in privacy["sites"].values())
    assert any(line.startswith(f"NOT PRIVATE: {reason}") for line in footnotes(summary_of(run, plans)))


def test_ranges_read_from_the_records_are_not_private() -> None:
    """privacy.md, rule 9."""
    run = config()
    read = dataclasses.replace(run, task=dataclasses.replace(run.task, declare="from_data"))
    assert run.private
    assert run.not_private_reason() is None
    assert not read.private
    assert "from_data" in (read.not_private_reason() or "")


def test_belief_in_words_is_the_bound_and_never_less() -> None:
    """privacy.md, rule 15: 73% at 1, 95% at 3 (rounded up), 99.97% at 8."""
    for epsilon, percent in ((1.0, 73.2), (3.0, 95.3), (8.0, 99.97)):
        said = belief_in_words(epsilon, "patient")
        assert f"a patient took part can become at most {percent:g}% sure" in said
        assert percent >= 100 / (1 + math.exp(-epsilon))
