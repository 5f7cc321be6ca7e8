"""The round loop: send, gather, drop what is bad, aggregate, evaluate, checkpoint."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedmed.config import RunConfig
from fedmed.errors import RunError
from fedmed.metrics import ScoreCounts
from fedmed.privacy.plan import PrivacyPlan
from fedmed.records import Instruction
from strategies import build
from strategies.folder import Progress
from strategies.replies import good_updates
from strategies.sites import Sites
from strategies.summary import scores


@dataclass
class Loop:
    """Trains an adapter over the rounds of a run.

    Attributes:
        sent: called before a round is sent: what it does must last, since the round's budget then counts as spent.
        finished: called after each finished round with where the run stands.
        warn: shows a person one line.
    """

    config: RunConfig
    sites: Sites
    plans: Mapping[str, PrivacyPlan]
    run_id: str
    # Rounds that were sent and never finished: they have spent their budget too.
    interrupted: int = 0
    # Whether every round is evaluated, or only what comes out at the end.
    score_rounds: bool = True
    sent: Callable[[int], None] = field(default=lambda _round: None)
    finished: Callable[[Progress], None] = field(default=lambda _progress: None)
    warn: Callable[[str], None] = field(default=lambda _text: None)

    def run(self, progress: Progress, *, until: int) -> Progress:
        """Go on from `progress` to round `until`.

        Raises:
            RunError: fewer good replies than the quorum.
        """
        strategy = build(self.config.strategy)
        if progress.state:
            strategy.restore(progress.state)
        progress.recent = deque(progress.recent, maxlen=self.config.strategy.average_last)
        weights = {site: plan.declared_size for site, plan in self.plans.items()}
        # The slack keeps 0.28 of 25 sites (7.000000000000001) from being 8.
        quorum = max(1, int(np.ceil(self.config.federation.quorum * len(self.plans) - 1e-9)))
        while progress.round < until:
            number = progress.round + 1
            began = time.monotonic()
            instruction = Instruction.of(self.config, self.plans, run_id=self.run_id, round=number)
            self.sent(number)
            replies, traffic = self.sites.train(instruction, progress.arrays, self.plans)
            updates, dropped = good_updates(
                replies,
                progress.arrays,
                round=number,
                weights=weights,
                norm_bound=self.config.strategy.norm_bound,
                noise_draws=self.config.training.steps_per_round if self.config.privacy.kind == "dp" else 0,
            )
            dropped |= {site: "no answer" for site in self.plans if site not in replies}
            for site, reason in dropped.items():
                self.warn(f"round {number}: '{site}' is left out: {reason}")
            if len(updates) < quorum:
                raise RunError(
                    f"round {number}: {len(updates)} good replies of {len(self.plans)} sites; "
                    f"federation.quorum={self.config.federation.quorum:g} asks for {quorum}"
                )
            progress.arrays = strategy.aggregate(progress.arrays, updates)
            progress.state = strategy.state()
            progress.recent.append(progress.arrays)
            progress.round = number
            elapsed = time.monotonic() - began
            progress.seconds += elapsed
            exact = self.score_rounds and self.config.privacy.metrics == "exact"
            counts = self.sites.evaluate(instruction, progress.arrays, self.plans) if exact else {}
            progress.history.append(
                self._entry(number, counts, dropped, list(updates))
                | {"bytes_up": traffic.up, "bytes_down": traffic.down, "seconds": round(elapsed, 4)}
            )
            self.finished(progress)
        return progress

    def _entry(
        self, number: int, counts: Mapping[str, ScoreCounts], dropped: dict[str, str], answered: list[str]
    ) -> dict[str, Any]:
        result = scores(counts)
        private = self.config.private and self.score_rounds
        return {
            "round": number,
            "sites": answered,
            "dropped": dropped,
            "evaluated": self.config.privacy.metrics == "exact",
            "auc": result["auc"],
            "accuracy": result["accuracy"],
            "site_metrics": result["sites"],
            # Of the rounds sent so far, of a plan that was fixed in advance.
            "epsilon": {
                site: plan.epsilon(rounds=number + self.interrupted) if private else None
                for site, plan in self.plans.items()
            },
        }
