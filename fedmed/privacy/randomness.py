"""Where a site's random bits come from: the operating system, or (NOT PRIVATE) a seed.

Both sources feed the same fixed-iteration transforms, so that a seeded test exercises the code that a
private run uses.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmed.privacy.gaussian import SIGMA_CELLS, draw_cells


@dataclass(frozen=True)
class RandomSource:
    """Uniform and Gaussian variates from a stream of bytes.

    Attributes:
        read: returns that many random bytes.
        private: False for anything that a seed could repeat.
    """

    read: Callable[[int], bytes]
    private: bool

    def uniform(self, count: int) -> NDArray[np.float64]:
        """(count,) float64 in [0, 1) with 53 random bits each."""
        words = np.frombuffer(self.read(8 * count), dtype=np.uint64)
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self, count: int) -> NDArray[np.float64]:
        """(count,) standard Gaussian float64, all multiples of 2^-20, a fixed number of operations each.

        Each is within a total variation distance of `gaussian.SAMPLER_ERROR` of a true Gaussian that was rounded
        at random to one of those multiples, by a kernel of deviation 2^-9. The largest magnitude is 32.
        """
        return draw_cells(count, self.read) / SIGMA_CELLS

    def choose(self, count: int, k: int) -> NDArray[np.int64]:
        """k of `count` indices without replacement, uniformly; all of them where k >= count."""
        return np.argsort(self.uniform(count), kind="stable")[: min(k, count)]


def operating_system() -> RandomSource:
    """The site's secret generator: nothing to fork, snapshot or reuse."""
    return RandomSource(os.urandom, private=True)


def seeded(*key: int) -> RandomSource:
    """A repeatable source. What it samples or noises is NOT PRIVATE."""
    return RandomSource(np.random.default_rng(key).bytes, private=False)
