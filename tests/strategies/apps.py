"""Federations of hand-written ClientApps: what a site sends is up to the test."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedmed.compose import compose
from fedmed.config import RunConfig
from fedmed.flower.in_process import InProcessGrid
from fedmed.metrics import ScoreCounts
from fedmed.privacy.plan import make_plan
from fedmed.records import (
    Arrays,
    Instruction,
    Quote,
    Receipt,
    quote_record,
    read_instruction,
    scores_record,
    update_record,
)
from strategies.folder import Progress
from strategies.rounds import Loop
from strategies.sites import Sites

# From an honest site's receipt and update, what the site sends instead.
Train = Callable[[Instruction, Receipt, Arrays], RecordDict]
Evaluate = Callable[[str], RecordDict]
Answer = Callable[[Quote], Quote]

NAMES = ("A", "B", "C", "D")
SHAPES = {"w": (3, 2), "b": (1,), "scale": ()}


def start() -> Arrays:
    """The global adapter before the first round."""
    return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


def honest(instruction: Instruction, site: str) -> tuple[Receipt, Arrays]:
    """A receipt, and an update that tells site and round: 10 x the site's place + the round."""
    number = 10 * list(instruction.task.declared_sizes).index(site) + instruction.round
    delta = {name: np.full(shape, number, np.float32) for name, shape in SHAPES.items()}
    size = instruction.task.declared_train(site)
    draws = instruction.training.steps_per_round if instruction.privacy.kind == "dp" else 0
    return Receipt(site=site, round=instruction.round, declared_size=size, noise_draws=draws), delta


def client_app(
    train: dict[str, Train] | None = None,
    evaluate: dict[str, Evaluate] | None = None,
    names: dict[str, str | None] | None = None,
    quotes: dict[str, Answer] | None = None,
) -> ClientApp:
    """Sites that are honest but where a name is given.

    Args:
        names: what a site calls itself in its quote; None: it gives no quote.
        quotes: from an honest quote, what the site says instead.
    """
    app = ClientApp()

    def site_of(instruction: Instruction, context: Context) -> str:
        return list(instruction.task.declared_sizes)[int(context.node_config["partition-id"])]

    @app.query()
    def _query(message: Message, context: Context) -> Message:
        instruction, _ = read_instruction(message.content)
        site = site_of(instruction, context)
        size = instruction.task.declared_train(site)
        name = (names or {}).get(site, site)
        if name is None:
            raise RuntimeError
        quote = Quote(site=name, declared_size=size, epsilon=None)
        return Message(quote_record((quotes or {}).get(site, lambda q: q)(quote)), reply_to=message)

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        instruction, _ = read_instruction(message.content)
        site = site_of(instruction, context)
        receipt, delta = honest(instruction, site)
        change = (train or {}).get(site, lambda _i, r, d: update_record(r, d))
        return Message(change(instruction, receipt, delta), reply_to=message)

    @app.evaluate()
    def _evaluate(message: Message, context: Context) -> Message:
        instruction, _ = read_instruction(message.content)
        site = site_of(instruction, context)
        counts = ScoreCounts.of(np.array([-1.0, 1.0], np.float32), np.array([0.0, 1.0], np.float32))
        change = (evaluate or {}).get(site, lambda name: scores_record(name, counts))
        return Message(change(site), reply_to=message)

    return app


@lru_cache
def run_config(*overrides: str, names: tuple[str, ...] = NAMES) -> RunConfig:
    """A run of equally large sites. No data is opened: its table does not exist."""
    sizes = ", ".join(f"{name}: 150" for name in names)
    return compose(
        ["task=csv", "task.path=/nowhere.csv", "task.site_column=s", "task.label=y", "model=logistic",
         f"task.declared_sizes={{{sizes}}}", "privacy=off", "tracking=none", "rounds=3", *overrides]
    )  # fmt: skip


class Federation:
    """A loop over an `InProcessGrid`, with what it said to people in `warnings`."""

    def __init__(
        self,
        config: RunConfig,
        app: ClientApp,
        *,
        workers: int = 1,
        grid: type[InProcessGrid] = InProcessGrid,
    ) -> None:
        self.config = config
        self.warnings: list[str] = []
        plans = {site: make_plan(config, site) for site in config.task.declared_sizes}
        self.grid: Any = grid(app, nodes=len(plans), workers=workers)
        self.sites = Sites(self.grid, config.federation.timeout)
        self.loop = Loop(config, self.sites, plans, "test", warn=self.warnings.append)
        self.first = Instruction.of(config, plans, run_id="test", round=0)

    def __enter__(self) -> "Federation":
        # Set-up does not count against the time-out of a round.
        self.sites.timeout = 60
        self.sites.connect(self.first)
        self.sites.timeout = self.config.federation.timeout
        return self

    def __exit__(self, *_: object) -> None:
        self.grid.close()

    def run(self, until: int | None = None) -> Progress:
        """Do the rounds."""
        return self.loop.run(Progress(round=0, arrays=start()), until=until or self.config.rounds)


def mean_of(*numbers: float) -> Arrays:
    """The adapter after one round in which equally large sites sent these numbers."""
    return {name: np.full(shape, np.mean(numbers), np.float32) for name, shape in SHAPES.items()}


def lying(receipt: Receipt, **changes: Any) -> Receipt:
    """The receipt with other values."""
    return replace(receipt, **changes)
