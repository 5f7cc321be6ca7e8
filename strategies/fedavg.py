"""FedAvg: the weighted mean of the sites' updates."""

from collections.abc import Mapping

from fedmed.config import StrategyConfig
from strategies.base import Arrays, State, Update, mean_delta, moved


class FedAvg:
    """McMahan et al. 2017, algorithm 1: x + mean of the sites' changes, weighted by declared size."""

    def __init__(self, config: StrategyConfig) -> None:
        del config

    def aggregate(self, arrays: Arrays, updates: Mapping[str, Update]) -> Arrays:
        return moved(arrays, mean_delta(updates))

    def state(self) -> State:
        return {}

    def restore(self, state: State) -> None:
        del state
