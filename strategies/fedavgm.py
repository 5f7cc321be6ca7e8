"""FedAvgM: FedAvg with momentum at the coordinator."""

from collections.abc import Mapping

from fedmed.config import StrategyConfig
from strategies.base import Arrays, Block, State, Update, by_block


class FedAvgM:
    """Hsu, Qi and Brown 2019, section 4.3: v = momentum * v + mean change; x + learning_rate * v."""

    weighted_sum = True
    moments = 1

    def __init__(self, config: StrategyConfig) -> None:
        self._config = config
        self._velocity: State = {}

    def aggregate(self, arrays: Arrays, updates: Mapping[str, Update]) -> Arrays:
        momentum, rate = self._config.momentum, self._config.learning_rate

        def step(change: Block, velocity: Block) -> tuple[Block, Block]:
            velocity = momentum * velocity + change
            return rate * velocity, velocity

        return by_block(arrays, updates, step, self._velocity)

    def state(self) -> State:
        return dict(self._velocity)

    def restore(self, state: State) -> None:
        self._velocity = dict(state)
