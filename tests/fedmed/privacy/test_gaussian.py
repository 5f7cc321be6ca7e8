"""The Gaussian on the integers: its table exactly, its draws statistically, in blocks of constant memory."""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fedmed.privacy.gaussian import (
    BLOCK,
    LARGEST_CELLS,
    SAMPLER_ERROR,
    SIGMA_CELLS,
    AliasTable,
    bytes_for,
    draw_cells,
    table,
    weights,
)
from fedmed.privacy.randomness import operating_system, seeded
from tests.conftest import count

DRAWS = count(1_000_000, 100_000_000)
BLOCKED = 500_000
HALF, T = 2**15, 2**11
# With the deviation of the random rounding: sqrt(2^40 + 2^22) cells.
DEVIATION = math.hypot(SIGMA_CELLS, T)
LAGS = (1, 2, 3, 7, 64, BLOCK // 2, BLOCK, 2 * BLOCK)


def test_the_table_is_the_discrete_gaussian_within_the_stated_error() -> None:
    """In exact arithmetic, against exp from another library; the columns give back the weights exactly."""
    known, expected = table(), weights()
    assert sum(expected) == 2**128
    mass = [0] * (2 * HALF)
    for column in range(2 * HALF):
        high, middle, low = (int(part[column]) for part in (known.high, known.middle, known.low))
        threshold = (high * 2**64 + middle) * 2**40 + low
        mass[column] += threshold
        mass[known.alias[column]] += 2**112 - threshold
    assert mass == expected

    with mpmath.workdps(60):
        heights = [mpmath.exp(-mpmath.mpf(k * k) / (2 * T * T)) for k in range(HALF + 1)]
        total = heights[0] + 2 * mpmath.fsum(heights[1:])
        ideal = [heights[abs(column - HALF)] / total for column in range(2 * HALF)]
        unit = mpmath.mpf(2) ** -128
        distance = mpmath.fsum(abs(p - w * unit) for p, w in zip(ideal, expected, strict=True)) / 2
        outside = 2 * mpmath.ncdf(-16)
    assert 2 * (distance + 2 * outside) <= SAMPLER_ERROR


def test_the_sum_of_two_draws_is_one_gaussian() -> None:
    """The smoothing that the module's argument rests on, at t = 4 h for a small h, and broken at t = h."""

    def worst(t: float, h: int) -> float:
        k = np.arange(-12 * h * math.ceil(t), 12 * h * math.ceil(t) + 1)
        p = np.exp(-(k**2) / (2 * t**2))
        wide = np.zeros(len(k))
        wide[k % h == 0] = np.exp(-((k[k % h == 0] / h) ** 2) / (2 * t**2))
        both = np.convolve(wide / wide.sum(), p / p.sum(), mode="same")
        one = np.exp(-(k**2) / (2 * t**2 * (h**2 + 1)))
        bulk = np.abs(k) < 4 * t * h
        return float(np.abs(both / (one / one.sum()) - 1)[bulk].max())

    assert worst(16.0, 4) < 1e-12
    assert worst(4.0, 4) > 1e-9


def small_table(high: int, middle: int, low: int) -> AliasTable:
    """Column 5 stays below a threshold and goes to 7 from there on."""
    columns = AliasTable(
        np.zeros(16, np.uint8),
        np.zeros(16, np.uint64),
        np.zeros(16, np.uint64),
        np.arange(16, dtype=np.uint16),
    )
    columns.high[5], columns.middle[5], columns.low[5], columns.alias[5] = high, middle, low, 7
    return columns


@pytest.mark.parametrize(
    ("fraction", "k"),
    [((2, 2**64 - 1, 2**40 - 1), 5), ((3, 8, 2**40 - 1), 5), ((3, 9, 3), 5), ((3, 9, 4), 7), ((3, 9, 5), 7),
     ((3, 10, 0), 7), ((4, 0, 0), 7)],
)  # fmt: skip
def test_a_draw_is_held_against_all_112_bits(fraction: tuple[int, int, int], k: int) -> None:
    """The threshold is 3 * 2^104 + 9 * 2^40 + 4; the last bits are those that lead their word."""
    first, middle, last = fraction
    asked: list[int] = []

    def read(size: int) -> bytes:
        asked.append(size)
        tie = middle.to_bytes(8, "little") + (last << 24).to_bytes(8, "little")
        return (bytes([5, 0, 5, 0, first, first]) + 2 * tie).ljust(size, b"\xff")

    assert small_table(3, 9, 4).draw(2, read).tolist() == [k - HALF] * 2
    assert asked == [bytes_for(2)]


def test_ties_beyond_the_spare_words_are_read() -> None:
    """All draws of a block tie: half of their words say above the threshold, in turn."""
    count, asked = 1_000, []

    def read(size: int) -> bytes:
        asked.append(size)
        if len(asked) == 1:
            head = bytes([5, 0]) * count + bytes([3]) * count
            return head + (tie * count)[: size - len(head)]
        return (tie * count)[:size]

    tie = (8).to_bytes(8, "little") + bytes(8) + (10).to_bytes(8, "little") + bytes(8)
    drawn = small_table(3, 9, 4).draw(count, read)
    spare = (bytes_for(count) - 3 * count) // 16
    assert asked == [bytes_for(count), 16 * (count - spare)]
    # The second reading begins with the first of a pair again.
    expected = np.resize([5, 7], spare).tolist() + np.resize([5, 7], count - spare).tolist()
    assert (drawn + HALF).tolist() == expected


@pytest.mark.parametrize("count", [1, 40, 1_000, 2 * BLOCK])
def test_what_is_read_does_not_tell_what_was_drawn(count: int) -> None:
    """More ties than there are words for once in 10^17 times: the tail of their number, which is binomial."""
    assert stats.binom.sf((bytes_for(count) - 3 * count) // 16, count, 1 / 256) < 1e-17
    seen: set[int] = set()
    for seed in range(20):
        words, total = seeded(seed).read, [0]

        def read(size: int, words: Callable[[int], bytes] = words, total: list[int] = total) -> bytes:
            total[0] += size
            return words(size)

        table().draw(count, read)
        seen.add(total[0])
    assert seen == {bytes_for(count)}


def blocks(source_seed: int, draws: int) -> Iterator[NDArray[np.float64]]:
    """Standardised cells, a block at a time."""
    read = seeded(source_seed).read
    for _ in range(draws // BLOCKED):
        yield draw_cells(BLOCKED, read) / DEVIATION


class Judgement:
    """Kolmogorov-Smirnov (on a histogram of 2^14 equal bins), moments, tails and lags of a stream of blocks."""

    bins = 2**14

    def __init__(self, stream: Iterator[NDArray[np.float64]]) -> None:
        self.number, self.histogram = 0, np.zeros(self.bins, dtype=np.int64)
        self.powers, self.beyond = np.zeros(4), np.zeros(3)
        self.lags = {(lag, power): 0.0 for lag in LAGS for power in (1, 2)}
        edges = stats.norm.ppf(np.arange(1, self.bins) / self.bins)
        for z in stream:
            self.number += len(z)
            self.histogram += np.bincount(np.searchsorted(edges, z), minlength=self.bins)
            square = z * z
            self.powers += [z.sum(), square.sum(), (square * z).sum(), (square * square).sum()]
            self.beyond += [(np.abs(z) > limit).sum() for limit in (3, 4, 5)]
            for lag in LAGS:
                self.lags[lag, 1] += float(z[:-lag] @ z[lag:])
                self.lags[lag, 2] += float((square[:-lag] - 1) @ (square[lag:] - 1)) / 2

    def faults(self) -> set[str]:
        """What a true Gaussian would fail once in 10^8 tests or so (Kolmogorov-Smirnov: in 10^6)."""
        root, found = math.sqrt(self.number), set()
        ideal = np.arange(1, self.bins + 1) / self.bins
        distance = np.abs(np.cumsum(self.histogram) / self.number - ideal).max()
        if stats.kstwobign.sf(distance * root) < 1e-6:
            found.add("distribution")
        expected = self.number / self.bins
        if stats.chi2.sf(((self.histogram - expected) ** 2 / expected).sum(), self.bins - 1) < 1e-6:
            found.add("histogram")
        for name, value, mean, variance in zip(
            ("mean", "variance", "skew", "kurtosis"), self.powers, (0, 1, 0, 3), (1, 2, 15, 96), strict=True
        ):
            if abs(value / self.number - mean) > 6 * math.sqrt(variance) / root:
                found.add(name)
        for limit, seen in zip((3, 4, 5), self.beyond, strict=True):
            mean = self.number * 2 * stats.norm.sf(limit)
            if min(stats.poisson.sf(seen - 1, mean), stats.poisson.cdf(seen, mean)) < 1e-7:
                found.add("tails")
        if any(abs(value) > 6 * root for value in self.lags.values()):
            found.add("correlation")
        return found


# The full count takes minutes on one core.
@pytest.mark.timeout(1200)
def test_draws_are_gaussian_and_independent() -> None:
    judgement = Judgement(blocks(1, DRAWS))
    assert judgement.number == DRAWS
    assert judgement.faults() == set()


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (lambda z: z / 10, "variance"),
        (lambda z: z * math.sqrt(0.5), "variance"),
        (lambda z: z * 1.01, "variance"),
        (lambda z: z + 0.01, "mean"),
        (lambda z: np.clip(z, -4, 4), "tails"),
        (lambda z: np.repeat(z[::2], 2), "correlation"),
        (lambda z: np.tile(z[: BLOCK // 2], 62)[: len(z)], "correlation"),
        (lambda z: np.abs(z) * np.resize([1, -1], len(z)), "correlation"),
        (lambda z: np.random.default_rng(0).uniform(-(3**0.5), 3**0.5, len(z)), "distribution"),
    ],
)
def test_the_judgement_catches_a_broken_sampler(broken: object, fault: str) -> None:
    assert fault in Judgement(broken(z) for z in blocks(2, 1_000_000)).faults()  # type: ignore[operator]


def test_coarse_and_fine_part_of_a_value_and_of_its_neighbours_are_independent() -> None:
    """A value is 2^9 a + b: reused draws would cancel, or tell of one another."""
    read, total = seeded(3).read, np.zeros((4, 2))
    for _ in range(DRAWS // BLOCKED):
        a, b = (table().draw(2 * BLOCKED, read) / T).reshape(2, -1)
        pairs = ((a, b), (a[:-1], b[1:]), (a[1:], b[:-1]), (a[: BLOCKED // 2], b[BLOCKED // 2 :]))
        for row, (x, y) in zip(total, pairs, strict=True):
            row += [x @ y, (x**2 - 1) @ (y**2 - 1) / 2]
    assert np.abs(total).max() < 6 * math.sqrt(DRAWS)


def test_the_lowest_bits_are_as_random_as_the_highest() -> None:
    """On the grid itself: all residues modulo 2^10 occur equally often."""
    read, seen = seeded(4).read, np.zeros(2**10)
    for _ in range(DRAWS // BLOCKED):
        seen += np.bincount(draw_cells(BLOCKED, read) % 2**10, minlength=2**10)
    assert stats.chisquare(seen).pvalue > 1e-4


def test_blocks_do_not_show_and_no_value_is_out_of_bounds() -> None:
    """A longer request begins with the values of a shorter one, wherever it ends in whole blocks."""
    long = draw_cells(3 * BLOCK, seeded(5).read)
    read = seeded(5).read
    assert np.array_equal(long, np.concatenate([draw_cells(BLOCK, read), draw_cells(2 * BLOCK, read)]))
    assert np.abs(draw_cells(1_000, operating_system().read)).max() <= LARGEST_CELLS
    assert (2**9 + 1) * HALF <= LARGEST_CELLS
    assert Fraction(SIGMA_CELLS) ** 2 == Fraction(2**9 * T) ** 2
