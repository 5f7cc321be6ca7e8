"""Bad replies are dropped before they can end a run or spoil the model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedmed.config import RunConfig
from fedmed.privacy.plan import PrivacyPlan
from fedmed.records import Receipt
from strategies.base import Arrays, Update, blocks
from strategies.sites import Traffic
from strategies.spool import Spool

# An honest update is this much smaller than the bound that its plan gives: declared sizes are no more than declared.
SLACK = 10.0
NO_ANSWER = "no answer"


def problem(delta: Arrays, expected: Arrays) -> str | None:
    """Why an update cannot be used, or None."""
    if delta.keys() != expected.keys():
        return "misnamed arrays"
    if any(delta[name].shape != values.shape for name, values in expected.items()):
        return "misshapen arrays"
    if any(delta[name].dtype != np.float32 for name in expected):
        return "arrays of another type than float32"
    for values in delta.values():
        flat = values.reshape(-1)
        if not all(np.isfinite(flat[block]).all() for block in blocks(flat.size)):
            return "non-finite values"
    return None


def norm(arrays: Arrays) -> float:
    """The L2 norm of all arrays together, in float64."""
    total = 0.0
    for values in arrays.values():
        flat = values.reshape(-1)
        for block in blocks(flat.size):
            total += float(np.sum(flat[block].astype(np.float64) ** 2))
    return math.sqrt(total)


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What each reply to a round is held against.

    Attributes:
        expected: arrays of the names and shapes that an update must have.
        weights: declared sizes; a receipt that says otherwise is dropped, so that no site can weigh itself.
        norm_bounds: drop a site's update with a larger L2 norm; of a site that is not in it none.
        noise_draws: how often a round adds noise; a receipt that says otherwise is dropped.
    """

    expected: Arrays
    round: int
    weights: Mapping[str, int]
    norm_bounds: Mapping[str, float]
    noise_draws: int | None = None

    def reason(self, site: str, receipt: Receipt, delta: Arrays) -> str | None:
        """Why a site's reply cannot be used, or None."""
        found = problem(delta, self.expected)
        if found is not None:
            return found
        if receipt.round != self.round:
            return f"an answer to round {receipt.round}"
        if receipt.declared_size != self.weights[site]:
            return "another declared size than the run's"
        if self.noise_draws is not None and receipt.noise_draws != self.noise_draws:
            return f"{receipt.noise_draws} noise draws instead of {self.noise_draws}"
        bound = self.norm_bounds.get(site)
        if bound is not None and (size := norm(delta)) > bound:
            return f"norm {size:.3g} above {bound:.3g} (strategy.norm_bound sets another bound)"
        return None


@dataclass
class Replies:
    """The replies to one round, checked as they arrive: good ones go into the spool.

    Attributes:
        dropped: why each other site that was asked is left out.
    """

    checks: Checks
    spool: Spool
    traffic: Traffic = field(default_factory=Traffic)
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def good(self) -> list[str]:
        """Whose updates can be used, in the order of their names."""
        return self.spool.sites

    def silent(self, site: str) -> bool:
        """Whether nothing readable came from the site yet."""
        return site not in self.good and self.dropped.get(site, NO_ANSWER) == NO_ANSWER

    def take(self, site: str, answer: tuple[Receipt, Arrays] | None) -> None:
        """Take in what a site sent; None: an error, or something that could not be read."""
        if answer is None:
            return
        reason = self.checks.reason(site, *answer)
        if reason is None:
            self.spool.add(site, answer[1])
        else:
            self.dropped[site] = reason

    def end(self, asked: Sequence[str]) -> dict[str, str]:
        """Nothing more is waited for: why each of those who were asked is left out."""
        left_out = {site: self.dropped.get(site, NO_ANSWER) for site in asked if site not in self.good}
        self.dropped = {site: r for site, r in self.dropped.items() if site not in self.good} | left_out
        return left_out

    def updates(self) -> dict[str, Update]:
        """The updates with the declared sizes as weights."""
        return self.spool.updates(self.checks.weights)


def norm_bounds(config: RunConfig, plans: Mapping[str, PrivacyPlan], arrays: Arrays) -> dict[str, float]:
    """The norm above which a site's update is dropped: `strategy.norm_bound`; in a consortium also without it, where
    the plan says how large an honest update can be."""
    if config.strategy.norm_bound:
        return dict.fromkeys(plans, config.strategy.norm_bound)
    if config.federation.kind != "consortium" or config.privacy.kind == "off":
        return {}
    return {site: plan_bound(config, plan, arrays) for site, plan in plans.items()}


def plan_bound(config: RunConfig, plan: PrivacyPlan, arrays: Arrays) -> float:
    """`SLACK` times the norm that an honest update of one round is expected to stay below (privacy.md, rule 22).

    A step of SGD moves by at most learning rate x (clip + noise), the noise's norm being noise multiplier x clip
    x sqrt(parameters) / expected batch; momentum m multiplies it by at most 1 / (1 - m). A step of AdamW moves each
    parameter by at most (1 - 0.9) / sqrt(1 - 0.999) learning rates (Kingma and Ba 2015, section 2.1). Weight decay and
    the proximal term pull by the norm of the global adapter, and of the update itself.
    """
    training, parameters = config.training, sum(values.size for values in arrays.values())
    rate = float(training.learning_rate or 0)
    if training.optimizer == "adam":
        step = rate * (1 - 0.9) / math.sqrt(1 - 0.999) * math.sqrt(parameters)
    else:
        # Beyond the square root of the number: a chi distribution's tail, once in 10^8.
        noise = plan.noise_multiplier * (math.sqrt(parameters) + 6) / plan.expected_batch
        step = rate * plan.max_grad_norm * (1 + noise) / (1 - training.momentum)
    decay = rate * training.weight_decay / (1 - training.momentum) * norm(arrays)
    pulled = 1 + rate * config.strategy.proximal_mu / (1 - training.momentum)
    # Steps that pull back by more than they went (rate x proximal_mu > 2) grow; no bound is meant to catch those.
    return SLACK * training.steps_per_round * (step + decay) * pulled
