"""Truncation never lets a norm grow, integer sums are exact, and the noise on the grid is the ideal one."""

import math
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fedmed.errors import PrivacyError
from fedmed.privacy.block_gradients import BlockGradients
from fedmed.privacy.clipping import (
    CACHED_ENTRIES,
    PIECE,
    ClippedSum,
    clipped_sum,
    noised,
    norm_bounds,
    norm_error,
)
from fedmed.privacy.compiled import norm_bound
from fedmed.privacy.gaussian import SIGMA_CELLS
from fedmed.privacy.grid import Grid
from fedmed.privacy.randomness import RandomSource, operating_system, seeded
from tests.conftest import count

TINY = float(np.finfo(np.float32).smallest_subnormal)


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How float32 on a CPU is summed: by the compiled functions, or as on an accelerator."""
    if request.param == "torch":
        monkeypatch.setattr(ClippedSum, "_add_compiled", lambda own, g: own._add(g.computed(), narrow=True))
    return request.param


def grid(noise_multiplier: float = 2.0, max_grad_norm: float = 0.5) -> Grid:
    return Grid(noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm)


def square_norm(cells: list[Tensor]) -> int:
    """In exact arithmetic."""
    return sum(int(n) ** 2 for c in cells for n in c.flatten().tolist())


def adversarial(seed: int) -> list[Tensor]:
    """One patient's gradient for two parameters: mixed magnitudes, subnormal, huge, on or just above the clip."""
    draws = np.random.default_rng(seed)
    first, second = draws.normal(size=7), draws.normal(size=(3, 5))
    kind = seed % 8
    if kind == 0:
        first, second = first * 1e30, second * 1e-30
    elif kind == 1:
        first, second = first * TINY, second * TINY
    elif kind in (2, 3, 4):
        # Just on, above and below the clip.
        factor = 0.5 / math.hypot(np.linalg.norm(first), np.linalg.norm(second))
        factor *= (1, 1 + 2e-7, 1 - 2e-7)[kind - 2]
        first, second = first * factor, second * factor
    elif kind == 5:
        first, second = np.full(7, 3e38), np.full((3, 5), -3e38)
    elif kind == 6:
        # Whole cells, which truncation leaves alone: a multiple of a power of two.
        first, second = np.round(first * 2**10) / 2**8, np.round(second)
    else:
        first, second = 10.0 ** draws.uniform(-40, 38, 7), -(10.0 ** draws.uniform(-40, 38, (3, 5)))
    return [torch.tensor(part, dtype=torch.float32)[None] for part in (first, second)]


@pytest.mark.parametrize("noise_multiplier", [1e-9, 0.1, 1.0, 2.7, 1024.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("way")
def test_no_truncated_gradient_is_longer_than_the_clip(noise_multiplier: float, dtype: torch.dtype) -> None:
    """privacy.md, rule 10, in exact arithmetic: the sensitivity is 2^20 / noise multiplier cells."""
    limit = (Fraction(SIGMA_CELLS) / Fraction(noise_multiplier)) ** 2
    longest = Fraction(0)
    for seed in range(count(80, 8_000)):
        own = grid(noise_multiplier)
        cells = clipped_sum([part.to(dtype) for part in adversarial(seed)], grid=own)
        assert all(c.dtype == torch.int64 for c in cells)
        norm = square_norm(cells)
        assert norm <= limit
        longest = max(longest, norm / limit)
    # And it is not the shrinking that keeps it so.
    assert longest > (0.99 if noise_multiplier < 100 else 0.8)


def test_truncation_is_toward_zero_and_a_norm_that_fits_is_left_alone() -> None:
    own = grid()
    gradient = torch.tensor([[0.4999, -0.4999, 1.5, -1.5, 100.9, -100.9]], dtype=torch.float64) * own.cell
    assert clipped_sum([gradient], grid=own)[0].tolist() == [0, 0, 1, -1, 100, -100]


def test_rounding_to_nearest_would_grow_a_norm() -> None:
    """The deliberately broken variant: many entries of 0.6 cells."""
    own = grid(noise_multiplier=1000.0)
    entries = int((own.bound / 0.6) ** 2)
    gradient = torch.full((1, entries), 0.6 * own.cell, dtype=torch.float64)
    assert torch.round(gradient / own.cell).norm() > 1.5 * own.bound
    assert square_norm(clipped_sum([gradient], grid=own)) == 0


def slow_sum(gradients: list[Tensor], own: Grid) -> list[list[int]]:
    """The reference: fractions, one entry at a time."""
    sums = [[0] * g[0].numel() for g in gradients]
    for patient in range(len(gradients[0])):
        parts = [[Fraction(x) for x in g[patient].double().flatten().tolist()] for g in gradients]
        square = sum(x * x for part in parts for x in part)
        # The root of a big integer is exact to 2^-100.
        norm = Fraction(math.isqrt(int(square * 2**400)), 2**200)
        clip = Fraction(own.max_grad_norm)
        factor = min(Fraction(1), clip / norm if norm else Fraction(1)) / Fraction(own.cell)
        for total, part in zip(sums, parts, strict=True):
            for index, x in enumerate(part):
                total[index] += math.trunc(x * factor)
    return sums


@pytest.mark.usefixtures("way")
def test_the_sum_is_that_of_an_obvious_reference() -> None:
    torch.manual_seed(0)
    shapes, patients = [(5, 7), (11,), (2, 3, 4)], 9
    gradients = [torch.randn(patients, *shape) for shape in shapes]
    for g in gradients:
        g *= torch.logspace(-3, 3, patients).view(-1, *[1] * (g.dim() - 1))
    own = grid()
    got = clipped_sum(gradients, grid=own)
    assert [tuple(g.shape) for g in got] == shapes
    # float32 shrinks whoever is clipped by 1.6e-5 of an entry, and rounds each product once.
    for cells, expected in zip(got, slow_sum(gradients, own), strict=True):
        distance = np.abs(cells.flatten().numpy() - np.array(expected))
        assert (distance <= 1 + patients * 2e-5 * own.bound).all()
        assert distance.mean() < 1e-5 * own.bound
    exact = clipped_sum([g.double() for g in gradients], grid=own)
    # The rounding of a quotient may cost a cell where an entry lies on a border.
    for cells, expected in zip(exact, slow_sum(gradients, own), strict=True):
        distance = np.abs(cells.flatten().numpy() - np.array(expected))
        assert distance.max() <= 1
        assert distance.mean() < 0.01


@pytest.mark.usefixtures("way")
def test_the_sum_is_exact_whatever_the_order_and_the_pieces() -> None:
    torch.manual_seed(1)
    patients, entries = 37, CACHED_ENTRIES // 8 + 3
    gradients = torch.randn(patients, entries) * torch.logspace(-5, 5, patients)[:, None]
    own = grid()
    whole = clipped_sum([gradients], grid=own)[0]
    assert torch.equal(clipped_sum([gradients[torch.randperm(patients)]], grid=own)[0], whole)
    one_by_one = sum((clipped_sum([g[None]], grid=own)[0] for g in gradients), torch.zeros(entries).long())
    assert torch.equal(one_by_one, whole)
    # The deliberately broken variant: float32 sums, as floating-point addition does not associate.
    assert not torch.equal(gradients.sum(dim=0), gradients.flip(0).sum(dim=0))


def test_a_patient_s_norm_does_not_depend_on_who_is_beside_it() -> None:
    """To the last bit: else one entry in 10^10 would be truncated to another cell when a batch is split."""
    torch.manual_seed(3)
    for entries in (1, 17, PIECE, 3_456, 5_003, CACHED_ENTRIES + 5):
        for pieces in (1, 9):
            gradients = torch.randn(pieces, 9, entries)
            together = norm_bounds([gradients])
            alone = [norm_bounds([gradients[:, n : n + 1]]) for n in range(9)]
            assert torch.equal(together, torch.cat(alone))
            assert torch.equal(together[2:5], norm_bounds([gradients[:, 2:5]]))
            # Nor on where it lies in memory.
            apart = torch.empty(pieces, 9, entries + 3)[..., 1:-2]
            assert torch.equal(together, norm_bounds([apart.copy_(gradients)]))


@pytest.mark.parametrize("entries", [1, PIECE - 1, 3 * PIECE + 7, 200_000])
def test_a_norm_is_bounded_from_above_and_closely(entries: int) -> None:
    """In exact arithmetic, also where squares are lost: below the root of the smallest normal number."""
    draws = np.random.default_rng(entries)
    for magnitude in (1.0, 1e-12, 1e-19, 3e-23, 1e-30, TINY, 1e15):
        for spread in (0.0, 3.0):
            values = draws.normal(size=entries) * 10.0 ** draws.uniform(-spread, 0, entries) * magnitude
            row = torch.tensor(values, dtype=torch.float32)
            # Exact: a float32 is a whole number of 2^-149.
            square = sum(int(math.ldexp(x, 149)) ** 2 for x in row.tolist())
            for parts in ([row[None, None]], [half[None, None] for half in row.chunk(2)]):
                lost, error = norm_error(entries, torch.float32)
                for found in (norm_bounds(parts).item(), norm_bound(row.numpy(), PIECE, lost, error)):
                    bound = Fraction(found) * 2**149
                    assert bound * bound >= square
                    if magnitude > 1e-13:
                        assert bound * bound <= square * (1 + Fraction(1, 25_000))


def test_float32_is_left_where_it_cannot_hold_the_cells(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below a noise multiplier of 1/16 one clipped entry may have more than 2^24 cells."""
    torch.manual_seed(4)
    wide: list[bool] = []
    original = ClippedSum._add
    monkeypatch.setattr(
        ClippedSum, "_add", lambda own, parts, narrow: (wide.append(not narrow), original(own, parts, narrow))
    )
    gradients = torch.zeros(5, 40)
    gradients[:, 0] = torch.tensor([1.0, -1.0, 0.7, 0.3, 1e-3])
    for noise, narrow in ((1.0, True), (2.0**-4, True), (2.0**-5, False), (2.0**-30, False)):
        own = grid(noise_multiplier=noise, max_grad_norm=1.0)
        wide.clear()
        [cells] = clipped_sum([gradients], grid=own)
        assert wide == ([] if narrow and way == "compiled" else [not narrow])
        expected = gradients[:, 0].double().sum().item() * own.bound
        assert abs(cells[0].item() - expected) <= 5 + 5 * 2e-5 * own.bound


@pytest.mark.usefixtures("way")
def test_full_float32_partial_sums_are_exact() -> None:
    """As many as fit into 2^24 cells at once, all at the bound, and one more."""
    own = grid(noise_multiplier=1.0, max_grad_norm=1.0)
    gradients = torch.zeros(33, 3)
    gradients[:, 1] = 1e6
    [cells] = clipped_sum([gradients], grid=own)
    [alone] = clipped_sum([gradients[:1]], grid=own)
    assert torch.equal(cells, 33 * alone)
    assert 0.9999 * own.bound < alone[1].item() <= own.bound


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.usefixtures("way")
def test_a_patient_who_is_not_finite_counts_as_zero_in_every_parameter(bad: float) -> None:
    torch.manual_seed(2)
    first, second = torch.randn(3, 4), torch.randn(3, 2)
    own = grid()
    expected = clipped_sum([first[[0, 2]], second[[0, 2]]], grid=own)
    second[1, 0] = bad
    got = clipped_sum([first, second], grid=own)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    # Nor one whose norm is beyond float64.
    wide = first.double()
    wide[1, 0] = 1e200
    assert torch.equal(clipped_sum([wide], grid=own)[0], clipped_sum([first[[0, 2]].double()], grid=own)[0])


def with_noise(cells: torch.Tensor, own: Grid, source: RandomSource) -> torch.Tensor:
    return noised(cells, torch.from_numpy(own.noise(cells.numel(), source)).view(cells.shape), grid=own)


def test_an_empty_batch_sums_to_zero_and_is_noised_all_the_same() -> None:
    own = grid()
    [cells] = clipped_sum([torch.zeros(0, 100, 200)], grid=own)
    assert cells.shape == (100, 200)
    assert not cells.any()
    result = with_noise(cells, own, seeded(1))
    assert result.dtype == torch.float64
    assert result.std().item() == pytest.approx(1.0, rel=0.03)


def test_no_value_of_noise_is_given_to_two_cells() -> None:
    with pytest.raises(PrivacyError, match=r"noise of shape \(1,\) for \(5,\) cells"):
        noised(torch.zeros(5, dtype=torch.int64), torch.ones(1, dtype=torch.int64), grid=grid())


def test_what_cannot_fit_is_refused() -> None:
    own = grid(noise_multiplier=1e-6)
    assert own.most_patients * own.bound + 2**25 < 2**63
    own.check_fits(own.most_patients)
    with pytest.raises(PrivacyError, match=r"overflow 64 bits, that of \d+ would not; add noise"):
        own.check_fits(own.most_patients + 1)
    with pytest.raises(PrivacyError, match="one gradient would overflow"):
        grid(noise_multiplier=1e-14)
    for clip in (1e-120, 1e120):
        with pytest.raises(PrivacyError, match=r"change privacy\.max_grad_norm"):
            grid(max_grad_norm=clip)
    # Under the smallest noise that a configuration may ask for, more than there are people.
    assert grid(noise_multiplier=0.1).most_patients > 10**11


def test_the_fullest_sum_does_not_overflow() -> None:
    own = grid(noise_multiplier=2.0**-41)
    cells = clipped_sum([torch.full((own.most_patients, 1), 1e30)], grid=own)[0]
    assert 0 < cells.item() <= own.most_patients * own.bound


def judged(cells: np.ndarray) -> float:
    """Kolmogorov-Smirnov against the rounded Gaussian, whose steps are far below what it can see."""
    return float(stats.kstest(cells / SIGMA_CELLS, "norm").pvalue)


def test_the_rounded_noise_is_the_ideal_one_and_a_tenth_of_it_is_caught() -> None:
    noise = grid().noise(count(200_000, 5_000_000), seeded(3))
    assert noise.dtype == np.int64
    assert judged(noise) > 1e-3
    assert judged(noise[:10_000] // 10) < 1e-9


def test_a_source_off_the_grid_is_rounded_to_it() -> None:
    class Coarse:
        @staticmethod
        def normal(number: int) -> np.ndarray:
            return np.full(number, 1.4 / SIGMA_CELLS)

    assert grid().noise(3, Coarse()).tolist() == [1, 1, 1]  # type: ignore[arg-type]


def test_noise_comes_at_five_million_values_a_second() -> None:
    """privacy.md, rule 10: from the operating system's bytes to sums that are noised and scaled, one core."""
    own, cells, seconds = grid(), torch.zeros(1_000_000, dtype=torch.int64), []
    with_noise(cells[:10], own, operating_system())
    for _ in range(15):
        began = time.process_time()
        with_noise(cells, own, operating_system())
        seconds.append(time.process_time() - began)
        if seconds[-1] < 0.2:
            break
    assert len(cells) / min(seconds) >= 5e6


@pytest.mark.usefixtures("way")
def test_a_sum_stays_exact_however_many_pieces_one_step_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What float32 still has room for is kept from piece to piece; a step of many blocks adds them one by one."""
    own = grid(noise_multiplier=1.0, max_grad_norm=1.0)
    gradients = torch.zeros(99, 3)
    gradients[:, 1] = 1e6 * torch.rand(99, generator=torch.Generator().manual_seed(0)) + 1
    gradients[::2, 0] = 3.0
    alone = [clipped_sum([g[None]], grid=own)[0] for g in gradients]
    expected = torch.stack(alone).sum(dim=0)

    def summed(size: int) -> Tensor:
        total = ClippedSum(3, grid=own, device=torch.device("cpu"))
        for piece in gradients.split(size):
            total.add(BlockGradients.at_hand([piece]))
        return total.cells()

    for size in (1, 3, 16, 17, 99):
        assert torch.equal(summed(size), expected)
    # The deliberately broken variant: more than float32 holds.
    monkeypatch.setattr("fedmed.privacy.clipping.EXACT", 2**30)
    assert not torch.equal(summed(99), expected)


def test_where_nothing_can_be_kept_it_is_compiled_anew(tmp_path: Path) -> None:
    """A read-only installation and no home: as in a hardened service."""
    source = tmp_path / "read_only.py"
    source.write_text("from fedmed.privacy.compiled import _compiled\n\n\ndef twice(n):\n    return 2 * n\n")
    script = (
        "import numba.core.caching as caching, read_only\n"
        "caching.CacheImpl._locator_classes = []\n"
        "assert read_only._compiled()(read_only.twice)(21) == 42\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    # The reason for it: numba by itself refuses.
    refused = script.replace("read_only._compiled()", "__import__('numba').njit(cache=True)")
    ended = subprocess.run(
        [sys.executable, "-c", refused], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert "cannot cache function" in ended.stderr
