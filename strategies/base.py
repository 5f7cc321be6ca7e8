"""What every strategy is: a function of the global adapter and the sites' updates, with a state to save."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.float32]]
State = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Update:
    """One site's reply: the change of each adapter array, and the site's declared size as its weight."""

    delta: Arrays
    weight: float


class Strategy(Protocol):
    """Aggregates a round. `state` and `restore` make it resumable; all sums run in float64 in the order of
    the sites' names, so that the result does not depend on who answered first."""

    def aggregate(self, arrays: Arrays, updates: Mapping[str, Update]) -> Arrays:
        """The next global adapter, with the names and shapes of `arrays`; `updates` is not empty."""
        ...

    def state(self) -> State:
        """What must be saved beside the adapter to go on from here."""
        ...

    def restore(self, state: State) -> None:
        """Go on from a saved state."""
        ...


def mean_delta(updates: Mapping[str, Update]) -> State:
    """The mean of the updates weighted by declared size (McMahan et al. 2017, algorithm 1), in float64."""
    total = sum(update.weight for update in updates.values())
    mean: State = {}
    for site in sorted(updates):
        share = updates[site].weight / total
        for name, values in updates[site].delta.items():
            term = share * values.astype(np.float64)
            mean[name] = mean[name] + term if name in mean else term
    return mean


def moved(arrays: Arrays, step: State) -> Arrays:
    """`arrays + step`, rounded to float32 once."""
    # np.asarray: the sum of two arrays without axes is no array.
    return {name: np.asarray(values + step[name], dtype=np.float32) for name, values in arrays.items()}
