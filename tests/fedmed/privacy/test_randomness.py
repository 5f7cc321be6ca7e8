"""The transforms are right, and a private source cannot be repeated."""

import os
import random

import numpy as np
import pytest
import torch
from scipy import stats

from fedmed.privacy.gaussian import draw_cells
from fedmed.privacy.randomness import RandomSource, operating_system, seeded
from tests.conftest import count


def test_normal_variates_are_those_of_the_table_on_a_grid() -> None:
    draws = seeded(1).normal(100_000)
    assert draws.dtype == np.float64
    assert np.array_equal(draws * 2.0**20, draw_cells(100_000, seeded(1).read))
    assert stats.kstest(draws, "norm").pvalue > 1e-3
    assert len(seeded(11).normal(7)) == 7
    assert len(seeded(11).normal(0)) == 0


@pytest.mark.parametrize("byte", [b"\x00", b"\x7f", b"\x80", b"\xff"])
def test_the_extreme_words_give_finite_variates(byte: bytes) -> None:
    """A word of 64 zeros comes once in 2^64 draws, and must not destroy every weight."""
    source = RandomSource(lambda size: byte * size, private=False)
    assert np.abs(source.normal(3)).max() <= 32
    assert ((source.uniform(3) >= 0) & (source.uniform(3) < 1)).all()


def test_uniform_variates_use_53_bits() -> None:
    draws = seeded(2).uniform(100_000)
    assert ((draws >= 0) & (draws < 1)).all()
    scaled = draws * 2.0**53
    assert (scaled == np.floor(scaled)).all()
    # The lowest of the 53 bits is as random as the highest.
    assert abs((scaled % 2).mean() - 0.5) < 0.01
    assert abs((draws >= 0.5).mean() - 0.5) < 0.01


def test_neither_seed_nor_state_of_any_library_repeats_the_operating_system() -> None:
    """privacy.md, rule 8."""

    def draw() -> np.ndarray:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        return operating_system().normal(64)

    assert operating_system().private
    # Rule 10: no generator in the process, whose state a fork or a snapshot would share.
    assert operating_system().read is os.urandom
    assert not np.array_equal(draw(), draw())


def test_a_seeded_source_repeats_and_says_that_it_is_not_private() -> None:
    assert np.array_equal(seeded(3, 4).normal(9), seeded(3, 4).normal(9))
    assert not np.array_equal(seeded(3, 4).normal(9), seeded(3, 5).normal(9))
    assert not seeded(3).private


def test_choosing_k_of_n_is_uniform() -> None:
    source, draws = seeded(6), count(6_000, 200_000)
    picked = np.concatenate([source.choose(5, 2) for _ in range(draws)])
    assert np.abs(np.bincount(picked) / draws - 0.4).max() < 6 * np.sqrt(0.24 / draws)
    assert sorted(source.choose(3, 10)) == [0, 1, 2]
