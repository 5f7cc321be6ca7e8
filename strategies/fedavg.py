"""FedAvg: the weighted mean of the sites' updates."""

from collections.abc import Mapping

from fedmed.config import StrategyConfig
from strategies.base import Arrays, State, Update, by_block


class FedAvg:
    """McMahan et al. 2017, algorithm 1: x + mean of the sites' changes, weighted by declared size."""

    weighted_sum = True
    moments = 0

    def __init__(self, config: StrategyConfig) -> None:
        del config

    def aggregate(self, arrays: Arrays, updates: Mapping[str, Update]) -> Arrays:
        return by_block(arrays, updates, lambda change: (change,))

    def state(self) -> State:
        return {}

    def restore(self, state: State) -> None:
        del state
