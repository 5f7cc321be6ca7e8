"""FedAdam, FedYogi and FedAdagrad: adaptive steps at the coordinator (Reddi et al. 2021, algorithm 2)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedmed.config import StrategyConfig
from strategies.base import Arrays, State, Update, by_block

Values = NDArray[np.float64]


class FedOpt(ABC):
    """x + rate * m / (sqrt(v) + tau), where m averages the changes and `second_moment` gives v."""

    weighted_sum = True
    moments = 2

    def __init__(self, config: StrategyConfig) -> None:
        self._config = config
        self._m: State = {}
        self._v: State = {}
        self._rounds = 0

    @abstractmethod
    def second_moment(self, v: Values, squared: Values) -> Values:
        """The next v from the last one and the squared mean change."""

    def rate(self) -> float:
        """The step size of this round."""
        return self._config.learning_rate

    def aggregate(self, arrays: Arrays, updates: Mapping[str, Update]) -> Arrays:
        self._rounds += 1
        beta, rate, tau = self._config.beta_1, self.rate(), self._config.tau

        def step(change: Values, m: Values, v: Values) -> tuple[Values, Values, Values]:
            m = beta * m + (1 - beta) * change
            v = self.second_moment(v, change**2)
            return rate * m / (np.sqrt(v) + tau), m, v

        return by_block(arrays, updates, step, self._m, self._v)

    def state(self) -> State:
        saved: State = {"rounds": np.array(float(self._rounds))}
        for prefix, values in (("m", self._m), ("v", self._v)):
            saved |= {f"{prefix}/{name}": value for name, value in values.items()}
        return saved

    def restore(self, state: State) -> None:
        self._rounds = int(state["rounds"])
        self._m = {name[2:]: value for name, value in state.items() if name.startswith("m/")}
        self._v = {name[2:]: value for name, value in state.items() if name.startswith("v/")}


class FedAdam(FedOpt):
    """v decays by beta_2. The bias correction counts rounds from 2, as Flower's FedAdam does."""

    def second_moment(self, v: Values, squared: Values) -> Values:
        return self._config.beta_2 * v + (1 - self._config.beta_2) * squared

    def rate(self) -> float:
        t = self._rounds + 1
        correction = np.sqrt(1 - self._config.beta_2**t) / (1 - self._config.beta_1**t)
        return float(self._config.learning_rate * correction)


class FedYogi(FedOpt):
    """v moves towards the squared change by a step that does not grow with v."""

    def second_moment(self, v: Values, squared: Values) -> Values:
        return v - (1 - self._config.beta_2) * squared * np.sign(v - squared)


class FedAdagrad(FedOpt):
    """v sums all squared changes."""

    def second_moment(self, v: Values, squared: Values) -> Values:
        return v + squared
