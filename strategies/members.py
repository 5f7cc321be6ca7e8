"""Who takes part in a round: everyone from the first to the last, or who is there."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedmed.privacy.plan import PrivacyPlan
from fedmed.records import Quote
from strategies.sites import Question

log = logging.getLogger("fedmed.coordinator")


class Members(Protocol):
    """The sites of a run as they come and go."""

    def present(self, round: int) -> list[str]:
        """Who is asked to train in a round.

        Raises:
            RunError: fewer than the quorum, for too long.
        """
        ...

    def absent(self) -> dict[str, str]:
        """Why each other site is not asked."""
        ...

    def questions(self) -> list[Question]:
        """What others are asked beside the round."""
        ...

    def heard(self, site: str, quote: Quote) -> None:
        """Take in an answer to one of `questions`."""
        ...


@dataclass(frozen=True)
class Everyone:
    """All sites of the run, in every round: they have all agreed before the first."""

    sites: Sequence[str]

    def present(self, round: int) -> list[str]:
        del round
        return list(self.sites)

    def absent(self) -> dict[str, str]:
        return {}

    def questions(self) -> list[Question]:
        return []

    def heard(self, site: str, quote: Quote) -> None:
        del site, quote


@dataclass
class Spent:
    """How many rounds each site's budget was charged for: never fewer than were (privacy.md, rule 13).

    A round that was sent counts; a site with a ledger then says itself what its ledger was charged.

    Attributes:
        most: what a site's ledger promised the run: more it does not charge. Empty where there are no ledgers.
        answered: rounds in which a site's update was used: it was drawn, whatever the site says of it.
    """

    rounds: dict[str, int] = field(default_factory=dict)
    most: Mapping[str, int] = field(default_factory=dict)
    answered: dict[str, int] = field(default_factory=dict)

    @classmethod
    def by_ledgers(
        cls,
        before: Mapping[str, int],
        sent: Sequence[Sequence[str]],
        plans: Mapping[str, PrivacyPlan],
        answered: Mapping[str, int],
    ) -> "Spent":
        """After the last finished round, and rounds that were then sent to some sites and never finished."""
        spent = cls(dict(before), {site: plan.rounds for site, plan in plans.items()}, dict(answered))
        for sites in sent:
            spent.sent(sites)
        return spent

    def sent(self, sites: Sequence[str]) -> None:
        """Count a round that is about to be sent."""
        for site in sites:
            rounds = self.rounds.get(site, 0) + 1
            self.rounds[site] = min(rounds, self.most.get(site, rounds))

    def drawn(self, site: str, rounds: int) -> None:
        """Take a site's word for what its own ledger was charged, where that can be."""
        known = self.answered.get(site, 0)
        self.rounds[site] = max(known, min(rounds, self.most.get(site, rounds)))
        if self.rounds[site] != rounds:
            log.warning(
                "'%s' says that its ledger was charged for %d rounds of this run; it has answered %d and promised %d",
                site, rounds, known, self.most.get(site, known),
            )  # fmt: skip

    def used(self, site: str) -> None:
        """Count a round in which the site's update was used."""
        self.answered[site] = self.answered.get(site, 0) + 1
        self.rounds[site] = max(self.rounds.get(site, 0), self.answered[site])

    def used_up(self, site: str) -> bool:
        """Whether the site's ledger has nothing left for the run."""
        return site in self.most and self.rounds.get(site, 0) >= self.most[site]
