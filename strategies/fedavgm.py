"""FedAvgM: FedAvg with momentum at the coordinator."""

from collections.abc import Mapping

from fedmed.config import StrategyConfig
from strategies.base import Arrays, State, Update, mean_delta, moved


class FedAvgM:
    """Hsu, Qi and Brown 2019, section 4.3: v = momentum * v + mean change; x + learning_rate * v."""

    def __init__(self, config: StrategyConfig) -> None:
        self._config = config
        self._velocity: State = {}

    def aggregate(self, arrays: Arrays, updates: Mapping[str, Update]) -> Arrays:
        change = mean_delta(updates)
        momentum, rate = self._config.momentum, self._config.learning_rate
        self._velocity = {n: momentum * self._velocity.get(n, 0.0) + c for n, c in change.items()}
        return moved(arrays, {name: rate * v for name, v in self._velocity.items()})

    def state(self) -> State:
        return self._velocity

    def restore(self, state: State) -> None:
        self._velocity = state
