"""A Gaussian of standard deviation 2^20 on the integers, drawn with integer arithmetic alone.

A rounded float64 Gaussian cannot be shown to be good enough: an error of a few 2^-53 of a deviation, in Box and
Muller's logarithm or cosine, can move a value into the neighbouring one of 2^20 cells once in 10^9 draws, while a
million draws at delta 1e-5 can pay for 10^-13 each. So nothing here is a floating-point number:

- A table holds the discrete Gaussian D(t) on the integers, P(k) ~ exp(-k^2 / (2 t^2)) with t = 2^11, to 128 bits.
  It is read by the alias method (Walker 1977; Vose 1991): a fixed number of operations for each draw.
- A value is 2^9 a + b with a, b from D(t). By Poisson summation (Micciancio and Walter 2017, section 4) this is
  the discrete Gaussian whose variance is S^2 = (2^9 t)^2 + t^2 = 2^40 + t^2, up to a factor 1 ± 10^-136.
- By the same sum, a real Gaussian of deviation 2^20 around an integer, rounded at random to the integer j with
  probability proportional to exp(-(j - x)^2 / (2 t^2)), has that very distribution. To add a value to a sum of
  integers is therefore the ideal Gaussian mechanism of deviation 2^20, followed by a rounding that reads no data.

What is left is the table: `SAMPLER_ERROR`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# The standard deviation, in cells.
SIGMA_CELLS = 2**20

# At most this total variation distance lies between a value and the ideal: twice that of the table, whose 2^16
# probabilities are rounded to multiples of 2^-128, each by at most 2^-129; what is missing to 1 goes to k = 0.
# That is at most 2^16 * 2^-129 = 2^-113 a draw of the table, tails included: they vanish beyond 12.7 deviations,
# and two draws a value. The factor above drowns in it, as does what lies beyond the table's 16 deviations (2^-184).
SAMPLER_ERROR = 2.0**-112

# No value is larger, in cells: (2^9 + 1) * 2^15.
LARGEST_CELLS = 2**25

_TABLE_SIGMA_BITS = 11
_STRIDE = 2**9
_COLUMNS = 2**16
_FRACTION = 2**112
# Of a fraction's 112 bits the first 8, the next 64 and the last 40. All but one in 256 are decided by the first.
_MIDDLE, _LAST = 2**64, 2**40
# Values that are drawn at once: their words and indices stay in the cache of one core.
BLOCK = 2**14


@dataclass(frozen=True)
class AliasTable:
    """Column c stands for k = c - 2^15 below its threshold of 112 bits, and for another k from there on."""

    high: NDArray[np.uint8]
    middle: NDArray[np.uint64]
    low: NDArray[np.uint64]
    # As k + 2^15.
    alias: NDArray[np.uint16]

    def draw(self, count: int, read: Callable[[int], bytes]) -> NDArray[np.int64]:
        """(count,) k: exact in integer arithmetic."""
        # Loads a compiler, which nobody need who only plans.
        from fedmed.privacy import compiled

        columns_end, first_end = 2 * count, 3 * count
        raw = np.frombuffer(read(bytes_for(count)), dtype=np.uint8)
        columns, first = raw[:columns_end].view(np.uint16), raw[columns_end:first_end]
        drawn, ties = np.empty(count, dtype=np.int64), np.empty(count + 1, dtype=np.intp)
        ties = ties[: compiled.look_up(columns, first, self.high, self.alias, drawn, ties)]
        words = raw[first_end:].tobytes()
        if len(ties) > _spare(count):
            words += read(16 * (len(ties) - _spare(count)))
        further = np.frombuffer(words, dtype=np.uint64).reshape(-1, 2)
        compiled.settle(columns, further, ties, self.middle, self.low, self.alias, drawn)
        drawn -= _COLUMNS // 2
        return drawn


def bytes_for(count: int) -> int:
    """What so many draws of the table read: a column, the first 8 bits of a fraction, and spare words for ties."""
    return 3 * count + 16 * _spare(count)


def _spare(count: int) -> int:
    """Words for ties, of which count / 256 are expected. More are needed once in 10^17 times, and then read.

    Read beforehand, so that what is read says nothing of what was drawn.
    """
    return count // 128 + 32


def weights() -> list[int]:
    """2^128 P(k) of the discrete Gaussian D(2^11) for k from -2^15 to 2^15 - 1, to the nearest integer.

    They sum to 2^128: what rounding left over is at k = 0.
    """
    bits, half = 256, _COLUMNS // 2
    with localcontext() as context:
        context.prec = 100
        ratio = int((-1 / Decimal(2 ** (2 * _TABLE_SIGMA_BITS + 1))).exp() * 2**bits)
    # exp(-(k + 1)^2 / n) = exp(-k^2 / n) * ratio^(2 k + 1), in fixed point: off by less than 2^-200.
    heights, step, square = [1 << bits], ratio, ratio * ratio >> bits
    for _ in range(half):
        heights.append(heights[-1] * step >> bits)
        step = step * square >> bits
    total = heights[0] + 2 * sum(heights[1:])
    unit = _COLUMNS * _FRACTION
    side = [(2 * height * unit + total) // (2 * total) for height in heights]
    rounded = [*side[half:0:-1], *side[:half]]
    rounded[half] += unit - sum(rounded)
    return rounded


@lru_cache(maxsize=1)
def table() -> AliasTable:
    """The alias table of `weights` (Vose 1991), built in 0.1 s when it is first asked for."""
    left = weights()
    high, alias = np.zeros(_COLUMNS, dtype=np.uint8), np.arange(_COLUMNS, dtype=np.uint16)
    middle, low = np.zeros((2, _COLUMNS), dtype=np.uint64)
    small = [column for column, weight in enumerate(left) if weight < _FRACTION]
    large = [column for column, weight in enumerate(left) if weight >= _FRACTION]
    # Integer weights fill the columns exactly; a column that is full is its own alias.
    while small:
        column, donor = small.pop(), large[-1]
        rest, low[column] = divmod(left[column], _LAST)
        high[column], middle[column] = divmod(rest, _MIDDLE)
        alias[column] = donor
        left[donor] -= _FRACTION - left[column]
        if left[donor] < _FRACTION:
            small.append(large.pop())
    return AliasTable(high, middle, low, alias)


def draw_cells(count: int, read: Callable[[int], bytes]) -> NDArray[np.int64]:
    """(count,) int64: within `SAMPLER_ERROR` of a randomly rounded Gaussian of deviation `SIGMA_CELLS`.

    Args:
        read: returns that many random bytes.
    """
    known, values = table(), np.empty(count, dtype=np.int64)
    for start in range(0, count, BLOCK):
        block = values[start : start + BLOCK]
        high, low = known.draw(2 * len(block), read).reshape(2, -1)
        np.add(_STRIDE * high, low, out=block)
    return values
