"""A cohort's budget and what is left of it: a Renyi filter at one order, fixed when the budget is set.

Later runs are chosen in the light of earlier ones, so that the composition theorems for plans fixed in
advance do not apply. A Renyi filter stays valid: as long as the Renyi divergences of all mechanisms, at an order
that was fixed beforehand, add up to no more than the budget's, everything together is (epsilon, delta)-DP
(Feldman and Zrnic 2021, "Individual Privacy Accounting via a Renyi Filter", section 4). PLD is shown beside it.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import dp_accounting
from dp_accounting import NeighboringRelation, UnsupportedEventError
from dp_accounting.rdp import RdpAccountant

from fedmed.errors import PrivacyError, require
from fedmed.privacy.accounting import NUMERICAL_SHARE, composed_epsilon
from fedmed.privacy.events import from_json

ORDERS = range(2, 513)
# What was charged: how many times each event (as JSON) was run or promised.
Charges = Mapping[str, int]


def renyi_budget(*, epsilon: float, delta: float, order: int) -> float:
    """The largest Renyi divergence at `order` that implies (epsilon, delta)-DP, with the share of delta set aside
    that covers the sampler.

    Canonne, Kamath and Steinke 2020, proposition 12, solved for the divergence; negative where none does.
    """
    left = delta * (1 - NUMERICAL_SHARE)
    return epsilon - math.log1p(-1 / order) + math.log(left * order) / (order - 1)


def best_order(*, epsilon: float, delta: float) -> int:
    """The order at which a budget holds most Gaussian mechanisms, whose divergence grows with the order."""
    return max(ORDERS, key=lambda order: renyi_budget(epsilon=epsilon, delta=delta, order=order) / order)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a cohort may ever spend: (epsilon, delta), bound by a Renyi filter at `order`."""

    epsilon: float
    delta: float
    order: int

    def __post_init__(self) -> None:
        require(0 < self.epsilon <= 100, "epsilon", self.epsilon, "> 0, at most 100")
        require(1e-12 <= self.delta <= 0.1, "delta", self.delta, "from 1e-12 to 0.1")
        require(self.order in ORDERS, "order", self.order, f"{ORDERS[0]} to {ORDERS[-1]}")
        possible = renyi_budget(epsilon=self.epsilon, delta=self.delta, order=self.order) > 0
        require(possible, "epsilon", self.epsilon, f"more: nothing fits into it at delta {self.delta:g}")

    @classmethod
    def of(cls, *, epsilon: float, delta: float) -> "Budget":
        """The budget with the order that suits it."""
        return cls(epsilon=epsilon, delta=delta, order=best_order(epsilon=epsilon, delta=delta))

    def raised(self, epsilon: float) -> "Budget":
        """The same budget with another epsilon: delta and order stay for the cohort's lifetime (rule 15)."""
        return dataclasses.replace(self, epsilon=epsilon)

    @property
    def limit(self) -> float:
        """The filter's bound: what the divergences of all charges may add up to."""
        return renyi_budget(epsilon=self.epsilon, delta=self.delta, order=self.order)

    def allows(self, charges: Charges) -> bool:
        """Whether the filter lets all of these charges stand together."""
        return divergence(charges, self.order) <= self.limit

    def spent(self, charges: Charges) -> float:
        """The epsilon of these charges at the budget's delta and order: what the filter counts.

        Zero without charges. One charge, however small, shows the order's constant: an epsilon at a
        fixed delta cannot be smaller.
        """
        total = divergence(charges, self.order)
        if total == 0:
            return 0.0
        return max(0.0, self.epsilon - self.limit + total)

    def rounds_that_fit(self, charges: Charges, event: str) -> int:
        """How many more times `event` may run."""
        each = divergence({event: 1}, self.order)
        room = self.limit - divergence(charges, self.order)
        if each == 0:
            raise PrivacyError("an event that costs nothing cannot be counted")
        times = max(0, math.floor(room / each)) if math.isfinite(each) else 0
        # The division rounds; the filter's own sum decides.
        while times and not self.allows(Counter(charges) + Counter({event: times})):
            times -= 1
        while self.allows(Counter(charges) + Counter({event: times + 1})):
            times += 1
        return times


@lru_cache(maxsize=65_536)
def _divergence_of(event: str, order: int) -> float:
    """Renyi divergence of one event at `order`, under adding or removing one patient."""
    accountant = RdpAccountant(orders=[order], neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    try:
        accountant.compose(from_json(event))
    except UnsupportedEventError:
        raise PrivacyError("an event that the Renyi filter cannot account is refused") from None
    return float(accountant.rdp[0])


def divergence(charges: Charges, order: int) -> float:
    """The sum of all charges' Renyi divergences at `order`; equal events are computed once."""
    return math.fsum(times * _divergence_of(event, order) for event, times in charges.items() if times)


def pld_epsilon(charges: Charges, *, delta: float) -> float:
    """What PLD says of the same charges. It would bind only if all of them had been fixed in advance."""
    events = [
        dp_accounting.SelfComposedDpEvent(from_json(event), times)
        for event, times in sorted(charges.items())
        if times
    ]
    return composed_epsilon(events, delta=delta) if events else 0.0
