"""What every strategy is: a function of the global adapter and the sites' updates, with a state to save."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.float32]]
State = dict[str, NDArray[np.float64]]
Block = NDArray[np.float64]

# Elements of an array that are worked on at once: their float64 copies take a few MB, however large the array is.
BLOCK = 2**18


@dataclass(frozen=True)
class Update:
    """One site's reply: the change of each adapter array, and the site's declared size as its weight.

    The arrays may lie on disk: what is read of them costs memory, and no more of them.
    """

    delta: Mapping[str, NDArray[np.float32]]
    weight: float


class Strategy(Protocol):
    """Aggregates a round. `state` and `restore` make it resumable; all sums run in float64 in the order of
    the sites' names, so that the result does not depend on who answered first.

    Attributes:
        weighted_sum: whether only the weighted mean of the updates counts. Where it does not, all of them are in
            memory together, and `fedmed plan` says how much that is.
        moments: how many float64 arrays of the adapter's shape the state holds.
    """

    weighted_sum: bool
    moments: int

    def aggregate(self, arrays: Arrays, updates: Mapping[str, Update]) -> Arrays:
        """The next global adapter, with the names and shapes of `arrays`; `updates` is not empty."""
        ...

    def state(self) -> State:
        """What must be saved beside the adapter to go on from here."""
        ...

    def restore(self, state: State) -> None:
        """Go on from a saved state."""
        ...


def blocks(size: int) -> Iterator[slice]:
    """Slices that cover an array of `size` elements, in order."""
    return (slice(start, start + BLOCK) for start in range(0, size, BLOCK))


def by_block(
    arrays: Arrays, updates: Mapping[str, Update], step: Callable[..., tuple[Block, ...]], *states: State
) -> Arrays:
    """`arrays` moved by steps that are computed element by element, rounded to float32 once.

    In memory beside `arrays` are the result, one array of the new state and a few blocks.

    Args:
        step: from a block of the mean change, and that block of each of `states` (zeros at first), the block of the
            step and those of the new states.
        states: changed in place, array by array; the arrays in them are replaced, never written to.
    """
    result: Arrays = {}
    for name, values in arrays.items():
        flat, moved = values.reshape(-1), np.empty(values.size, np.float32)
        before = [state[name].reshape(-1) if name in state else np.zeros(values.size) for state in states]
        after = [np.empty(values.size) for _ in states]
        for block in blocks(values.size):
            by, *new = step(_mean_change(updates, name, block), *(part[block] for part in before))
            moved[block] = flat[block] + by
            for whole, part in zip(after, new, strict=True):
                whole[block] = part
        for state, whole in zip(states, after, strict=True):
            state[name] = whole.reshape(values.shape)
        result[name] = moved.reshape(values.shape)
    return result


def _mean_change(updates: Mapping[str, Update], name: str, block: slice) -> Block:
    """A block of the mean of the updates weighted by declared size (McMahan et al. 2017, algorithm 1)."""
    total = sum(update.weight for update in updates.values())
    mean: Block | None = None
    for site in sorted(updates):
        share = updates[site].weight / total
        term = share * updates[site].delta[name].reshape(-1)[block].astype(np.float64)
        mean = term if mean is None else mean + term
    assert mean is not None
    return mean
