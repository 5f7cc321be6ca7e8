"""The round loop: send, drop what is bad as it arrives, aggregate, evaluate, checkpoint."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import RecordDict

from fedmed.config import RunConfig
from fedmed.errors import RunError
from fedmed.metrics import ScoreCounts
from fedmed.privacy.plan import PrivacyPlan
from fedmed.records import Instruction, arrays_of, digest, instruction_record
from strategies import build
from strategies.base import Strategy
from strategies.folder import Progress
from strategies.members import Everyone, Members, Spent
from strategies.replies import Checks, norm_bounds
from strategies.sites import Sites, Traffic
from strategies.spool import Spool
from strategies.summary import scores

NO_ANSWER = "no answer"


@dataclass
class Loop:
    """Trains an adapter over the rounds of a run.

    Attributes:
        members: who takes part in a round; None: everyone.
        spent: what the sites' budgets were charged so far.
        spool: a folder for a round's replies; None: they are kept in memory.
        score_rounds: whether every round is evaluated, or only what comes out at the end.
        sent: called before a round is sent to some sites: what it does must last, since the round's budget then counts
            as spent.
        finished: called after each finished round with where the run stands.
        warn: shows a person one line.
    """

    config: RunConfig
    sites: Sites
    plans: Mapping[str, PrivacyPlan]
    run_id: str
    members: Members | None = None
    spent: Spent = field(default_factory=Spent)
    spool: Path | None = None
    score_rounds: bool = True
    sent: Callable[[int, Sequence[str]], None] = field(default=lambda _round, _sites: None)
    finished: Callable[[Progress], None] = field(default=lambda _progress: None)
    warn: Callable[[str], None] = field(default=lambda _text: None)

    def run(self, progress: Progress, *, until: int) -> Progress:
        """Go on from `progress` to round `until`, or until interrupted rounds have used up what the sites promised.

        Raises:
            RunError: fewer good replies than the quorum.
        """
        strategy = build(self.config.strategy)
        if progress.state:
            strategy.restore(progress.state)
        last = self.config.strategy.average_last
        # Of one adapter there is no mean: it would only lie in memory twice.
        progress.recent = deque(progress.recent if last > 1 else (), maxlen=last)
        self.sites.drawn = self.spent.drawn
        while progress.round < until and self._round(strategy, progress):
            pass
        return progress

    def _round(self, strategy: Strategy, progress: Progress) -> bool:
        """One round; False where the sites' promises are used up before it."""
        number = progress.round + 1
        members = self.members or Everyone(list(self.plans))
        present = members.present(number)
        began = time.monotonic()
        instruction = Instruction.of(self.config, self.plans, run_id=self.run_id, round=number)
        content = instruction_record(instruction, progress.arrays)
        # The message's own bytes are the adapter while replies come in: one payload, not two.
        progress.hold(arrays_of(content))
        traffic = Traffic()
        spool = Spool(self.spool, digest(instruction_record(instruction)), list(self.plans))
        used_up = {site for site in present if site not in spool.sites and self.spent.used_up(site)}
        dropped = self._gather(number, content, spool, members, present, traffic)
        quorum = quorum_of(self.config, self.plans)
        if len(spool.sites) < quorum and self.config.federation.kind == "consortium":
            # Those who fell silent may be back by now. Whoever had answered is not asked again, nor who answered badly.
            again = {site for site in members.present(number) if dropped.get(site, NO_ANSWER) == NO_ANSWER}
            dropped |= self._gather(number, content, spool, members, sorted(again), traffic)
            dropped = {site: reason for site, reason in dropped.items() if site not in spool.sites}
        good = spool.sites
        if len(good) < quorum:
            if len({*present} - used_up) < quorum <= len(present):
                self._say_used_up(number)
                return False
            raise RunError(
                f"round {number}: {len(good)} good replies of {len(self.plans)} sites; "
                f"federation.quorum={self.config.federation.quorum:g} asks for {quorum}"
            )
        weights = {site: plan.declared_size for site, plan in self.plans.items()}
        # What is held here alone goes as soon as the strategy has replaced it.
        progress.state = {}
        progress.arrays = strategy.aggregate(progress.arrays, spool.updates(weights))
        progress.state = strategy.state()
        progress.recent.append(progress.arrays)
        progress.round = number
        elapsed = time.monotonic() - began
        progress.seconds += elapsed
        exact = self.score_rounds and self.config.privacy.metrics == "exact"
        # Who is not there would be waited for once more.
        asked = good if self.config.federation.kind == "consortium" else self.plans
        counts = self.sites.evaluate(instruction, progress.arrays, asked) if exact else {}
        progress.history.append(
            self._entry(number, counts, members.absent() | dropped, good)
            | {"bytes_up": traffic.up, "bytes_down": traffic.down, "seconds": round(elapsed, 4)}
        )
        self.finished(progress)
        spool.clear()
        return True

    def _gather(
        self,
        number: int,
        content: RecordDict,
        spool: Spool,
        members: Members,
        present: Sequence[str],
        traffic: Traffic,
    ) -> dict[str, str]:
        """Send the round and fill the spool with good replies; why each other one of those present is left out."""
        expected = arrays_of(content)
        checks = Checks(
            expected=expected,
            round=number,
            weights={site: plan.declared_size for site, plan in self.plans.items()},
            norm_bounds=norm_bounds(self.config, self.plans, expected),
            noise_draws=self.config.training.steps_per_round if self.config.privacy.kind == "dp" else 0,
        )
        asked = [site for site in present if site not in spool.sites]
        if asked:
            self.sent(number, asked)
            self.spent.sent(asked)
        dropped = {}
        replies = self.sites.train(content, asked, traffic, beside=members.questions(), heard=members.heard)
        for site, answer in replies:
            reason = NO_ANSWER if answer is None else checks.reason(site, *answer)
            if reason is not None:
                dropped[site] = reason
            elif answer is not None:
                spool.add(site, answer[1])
            # Or it would lie here while the next one is read.
            del answer
        dropped |= {site: NO_ANSWER for site in asked if site not in spool.sites and site not in dropped}
        for site, reason in sorted(dropped.items()):
            self.warn(f"round {number}: '{site}' is left out: {reason}")
        return dropped

    def _say_used_up(self, number: int) -> None:
        self.warn(
            f"round {number}: what the sites promised is used up by rounds that were interrupted, so that the run ends "
            f"at round {number - 1}; continue with rounds={self.config.rounds + 1} at a larger epsilon"
        )

    def _entry(
        self, number: int, counts: Mapping[str, ScoreCounts], dropped: dict[str, str], answered: list[str]
    ) -> dict[str, Any]:
        result = scores(counts)
        private = self.config.private and self.score_rounds
        spent = {site: self.spent.rounds.get(site, 0) for site in self.plans}
        return {
            "round": number,
            "sites": answered,
            "dropped": dropped,
            "evaluated": self.config.privacy.metrics == "exact",
            "auc": result["auc"],
            "accuracy": result["accuracy"],
            "site_metrics": result["sites"],
            # Rounds that the site's budget was charged for, and what they cost of a plan that was fixed in advance.
            "spent": spent if private else None,
            "epsilon": {
                site: plan.epsilon(rounds=spent[site]) if private else None
                for site, plan in self.plans.items()
            },
        }


def quorum_of(config: RunConfig, plans: Mapping[str, PrivacyPlan]) -> int:
    """How many of the run's sites a round needs."""
    # The slack keeps 0.28 of 25 sites (7.000000000000001) from being 8.
    return max(1, int(np.ceil(config.federation.quorum * len(plans) - 1e-9)))
