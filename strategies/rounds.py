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
from fedmed.privacy.plan import PrivacyPlan
from fedmed.records import Instruction, arrays_of, digest, instruction_record
from strategies import build
from strategies.base import Strategy
from strategies.folder import Progress
from strategies.members import Everyone, Members, Spent
from strategies.replies import Checks, Replies, norm_bounds
from strategies.sites import Sites
from strategies.spool import Spool
from strategies.summary import scores


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
        spool = Spool(self.spool, digest(instruction_record(instruction)), list(self.plans))
        replies = Replies(self._checks(number, progress), spool)
        if not self._collect(replies, content, members, present):
            return False
        for site in replies.good:
            self.spent.used(site)
        # What is held here alone goes as soon as the strategy has replaced it.
        progress.state = {}
        progress.arrays = strategy.aggregate(progress.arrays, replies.updates())
        progress.state = strategy.state()
        if self.config.strategy.average_last > 1:
            progress.recent.append(progress.arrays)
        progress.round = number
        elapsed = time.monotonic() - began
        progress.seconds += elapsed
        progress.history.append(
            self._entry(instruction, progress, replies, members) | {"seconds": round(elapsed, 4)}
        )
        self.finished(progress)
        spool.clear()
        return True

    def _checks(self, number: int, progress: Progress) -> Checks:
        return Checks(
            expected=progress.arrays,
            round=number,
            weights={site: plan.declared_size for site, plan in self.plans.items()},
            norm_bounds=norm_bounds(self.config, self.plans, progress.arrays),
            noise_draws=self.config.training.steps_per_round if self.config.privacy.kind == "dp" else 0,
        )

    def _collect(
        self, replies: Replies, content: RecordDict, members: Members, present: Sequence[str]
    ) -> bool:
        """Gather good replies of the quorum; False where what the sites promised is used up.

        Raises:
            RunError: there are fewer for another reason.
        """
        number, quorum = replies.checks.round, quorum_of(self.config, self.plans)
        used_up = {site for site in present if site not in replies.good and self.spent.used_up(site)}
        self._gather(replies, content, members, present)
        if len(replies.good) < quorum and self.config.federation.kind == "consortium":
            # Those who fell silent may be back. Who had answered is not asked again, nor who answered badly.
            silent = [site for site in members.present(number) if replies.silent(site)]
            self._gather(replies, content, members, silent)
        if len(replies.good) >= quorum:
            return True
        if len({*present} - used_up) < quorum <= len(present):
            self.warn(
                f"round {number}: what the sites promised is used up by rounds that were interrupted, so that the run "
                f"ends at round {number - 1}; continue with rounds={self.config.rounds + 1} at a larger epsilon"
            )
            return False
        raise RunError(
            f"round {number}: {len(replies.good)} good replies of {len(self.plans)} sites; "
            f"federation.quorum={self.config.federation.quorum:g} asks for {quorum}"
        )

    def _gather(
        self, replies: Replies, content: RecordDict, members: Members, present: Sequence[str]
    ) -> None:
        """Send the round to those who have not answered yet, and take in what comes."""
        number = replies.checks.round
        asked = [site for site in present if site not in replies.good]
        if not asked:
            return
        self.sent(number, asked)
        self.spent.sent(asked)
        questions = members.questions()
        for site, answer in self.sites.train(
            content, asked, replies.traffic, beside=questions, heard=members.heard
        ):
            replies.take(site, answer)
            # Or it would lie here while the next one is read.
            del answer
        for site, reason in sorted(replies.end(asked).items()):
            self.warn(f"round {number}: '{site}' is left out: {reason}")

    def _entry(
        self, instruction: Instruction, progress: Progress, replies: Replies, members: Members
    ) -> dict[str, Any]:
        """What the history keeps of a round."""
        exact = self.score_rounds and self.config.privacy.metrics == "exact"
        # Who is not there would be waited for once more.
        asked = replies.good if self.config.federation.kind == "consortium" else self.plans
        counts = self.sites.evaluate(instruction, progress.arrays, asked) if exact else {}
        result = scores(counts)
        private = self.config.private and self.score_rounds
        spent = {site: self.spent.rounds.get(site, 0) for site in self.plans}
        return {
            "round": instruction.round,
            "sites": replies.good,
            "dropped": members.absent() | replies.dropped,
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
            "bytes_up": replies.traffic.up,
            "bytes_down": replies.traffic.down,
        }


def quorum_of(config: RunConfig, plans: Mapping[str, PrivacyPlan]) -> int:
    """How many of the run's sites a round needs."""
    # The slack keeps 0.28 of 25 sites (7.000000000000001) from being 8.
    return max(1, int(np.ceil(config.federation.quorum * len(plans) - 1e-9)))
