"""A run as a person is asked about it: who asks, for what, what would leave, and what it would cost the cohort."""

import hashlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from clients.asked import not_private, run_epsilon, task_digest
from fedmed.pretrained import PretrainedConfig
from fedmed.privacy.chain import canonical
from fedmed.privacy.events import to_json
from fedmed.privacy.histogram import metrics_plans
from fedmed.schema import to_dict

if TYPE_CHECKING:
    from fedmed.privacy.account import Account
    from fedmed.privacy.plan import PrivacyPlan
    from fedmed.records import Instruction

GROUPS = ("task", "model", "adapter", "privacy", "training")


def described(instruction: "Instruction", site: str, coordinator: str | None) -> dict[str, Any]:
    """What a person is asked to approve: declared values, and a digest of all that stay the same over the rounds.

    Args:
        coordinator: HOST:PORT of who asks; None in a simulation on one machine.

    Raises:
        FedmedError: the plan is not the one that was declared.
    """
    from clients.site import own_plan

    plan = own_plan(instruction, site)
    releases = released(instruction, plan)
    whole = {name: to_dict(getattr(instruction, name)) for name in GROUPS} | {
        "plan": to_dict(plan), "seed": instruction.seed, "proximal_mu": instruction.proximal_mu,
        "releases": releases,
    }  # fmt: skip
    reason, model = not_private(instruction), instruction.model
    return {
        "coordinator": coordinator,
        "task": instruction.task.title,
        "task_digest": task_digest(instruction.task),
        "model": model.name,
        "model_sha256": model.sha256 if isinstance(model, PretrainedConfig) else None,
        "adapter": instruction.adapter.kind,
        "rounds": plan.rounds,
        "epsilon": None if reason else run_epsilon(instruction, site, plan),
        "delta": None if reason else plan.delta,
        "not_private": reason,
        "metrics": instruction.privacy.metrics,
        "releases": releases,
        "events": [] if reason else events(instruction, site, plan),
        "digest": hashlib.sha256(canonical(json.loads(json.dumps(whole))).encode()).hexdigest(),
    }


def released(instruction: "Instruction", plan: "PrivacyPlan") -> list[str]:
    """All that the run would have leave the site, in words. Everything else is a constant."""
    reason = not_private(instruction)
    guarantee = f"NOT PRIVATE ({reason})" if reason else "with noise, charged to the budget"
    kind = instruction.adapter.kind
    found = [
        "what the run costs here, by this site's own reckoning, and how its ledger's head is signed",
        f"{plan.rounds} updates of the {kind} adapter: {guarantee}",
    ]
    if instruction.privacy.metrics == "private":
        found.append("one noisy histogram of the held-out patients' scores: charged to the budget")
    elif instruction.privacy.metrics == "exact":
        found.append(
            "exact counts of the held-out patients' scores, after every round and at the end: outside every guarantee"
        )
    return found


def events(instruction: "Instruction", site: str, plan: "PrivacyPlan") -> list[list[Any]]:
    """What the ledger would be charged: each event with how many times."""
    histogram = metrics_plans(instruction.task, instruction.privacy).get(site)
    found: list[list[Any]] = [[to_json(plan.event(rounds=1)), plan.rounds]]
    if histogram is not None:
        found.append([to_json(histogram.event()), 1])
    return found


def forecast(account: "Account", name: str, run: str, what: dict[str, Any]) -> dict[str, float] | None:
    """What a run would leave of its cohort's budget, by the filter that binds; None where it has no budget, where the
    run is charged to none, or where it was promised its part already.

    Returns:
        Epsilon: `budget`, `left_before` and `left_after`, negative where the run does not fit.
    """
    cohort = account.cohorts.get(name)
    if cohort is None or cohort.budget is None or not what.get("events"):
        return None
    if any(held == run for held, _ in account.holds):
        return None
    budget = cohort.budget
    after = Counter(cohort.charges)
    for event, times in what["events"]:
        after[event] += times
    return {
        "budget": budget.epsilon,
        "left_before": budget.epsilon - budget.spent(cohort.charges),
        "left_after": budget.epsilon - budget.spent(after),
    }
