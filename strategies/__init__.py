"""The coordinator's side. One aggregation idea a file; `build` picks the one that a configuration names.

A strategy sees only the sites' updates (differences to the global adapter) and their declared sizes.
"""

from collections.abc import Callable

from fedmed.config import StrategyConfig
from strategies.base import Strategy, Update
from strategies.fedavg import FedAvg
from strategies.fedavgm import FedAvgM
from strategies.fedopt import FedAdagrad, FedAdam, FedYogi

STRATEGIES: dict[str, Callable[[StrategyConfig], Strategy]] = {
    "fedavg": FedAvg,
    # FedProx (Li et al. 2020) changes what a site does, not how updates are averaged.
    "fedprox": FedAvg,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "fedadagrad": FedAdagrad,
}


def build(config: StrategyConfig) -> Strategy:
    """The strategy that a configuration names."""
    return STRATEGIES[config.kind](config)


__all__ = ["STRATEGIES", "Strategy", "Update", "build"]
