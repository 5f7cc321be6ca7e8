"""Figures from noisy histograms: those of the patients where there is no noise, and honest about it where there is."""

import math

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, roc_auc_score

from fedmed.metrics import ScoreCounts
from fedmed.private_metrics import Estimate, NoisyHistogram, auc_of, bin_edges, consistent
from tests.conftest import count


def draw(rng: np.random.Generator, patients: int, prevalence: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of patients."""
    labels = (rng.random(patients) < prevalence).astype(np.float32)
    return (rng.normal(size=patients) * 1.3 + 1.6 * (labels - 0.5)).astype(np.float32), labels


def histogram(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    bins: int = 20,
    noise: float = 0.0,
    rng: np.random.Generator | None = None,
) -> NoisyHistogram:
    edges = bin_edges(bins)
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    counts = np.stack([np.histogram(scores[labels == label], edges)[0] for label in (0, 1)]).astype(float)
    if rng is not None:
        counts += noise * rng.normal(size=counts.shape)
    return NoisyHistogram(counts, noise, edges)


def value(estimate: Estimate | None) -> float:
    assert estimate is not None
    return estimate.value


def test_without_noise_the_figures_are_the_patients() -> None:
    """AUC within the bins' bound, accuracy exactly, Brier score within a bin's width."""
    rng = np.random.default_rng(0)
    for _ in range(count(30, 300)):
        logits, labels = draw(rng, 400)
        found, exact = histogram(logits, labels), ScoreCounts.of(logits, labels)
        scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
        bound = found.auc_bin_width()
        assert bound is not None
        assert 0 < bound < 0.05
        assert abs(value(found.auc()) - roc_auc_score(labels, logits)) <= bound + 1e-12
        assert abs(value(found.auc()) - exact.auc()) <= bound + 1e-3
        assert value(found.accuracy()) == pytest.approx(exact.accuracy())
        assert value(found.brier()) == pytest.approx(brier_score_loss(labels, scores), abs=0.05 / 2)
        for threshold in (0.2, 0.5, 0.8):
            above = scores >= threshold
            assert value(found.sensitivity(threshold)) == pytest.approx(above[labels == 1].mean())
            assert value(found.specificity(threshold)) == pytest.approx(1 - above[labels == 0].mean())
        assert value(found.prevalence()) == pytest.approx(labels.mean())
        assert value(found.count(1)) == labels.sum()


def test_the_threshold_is_the_least_edge_that_is_specific_enough() -> None:
    rng = np.random.default_rng(1)
    found = histogram(*draw(rng, 500))
    threshold = found.threshold_at(0.9)
    assert threshold is not None
    assert value(found.specificity(threshold)) >= 0.9
    assert value(found.specificity(float(found.edges[np.searchsorted(found.edges, threshold) - 1]))) < 0.9
    assert found.threshold_at(1.0) is not None


def test_the_calibration_curve_is_the_fraction_of_positives_in_each_bin() -> None:
    rng = np.random.default_rng(2)
    logits, labels = draw(rng, 5_000)
    found = histogram(logits, labels, bins=10)
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    for cell in found.calibration():
        inside = (scores >= cell["from"]) & (scores < cell["to"])
        assert cell["positive"]["value"] == pytest.approx(labels[inside].mean())
        assert 0 <= cell["positive"]["low"] <= cell["positive"]["value"] <= cell["positive"]["high"] <= 1


def test_merged_sites_are_the_pooled_patients() -> None:
    rng = np.random.default_rng(3)
    logits, labels = draw(rng, 600)
    parts = [histogram(logits[part], labels[part]) for part in np.split(np.arange(600), [100, 350])]
    merged, pooled = sum(parts[1:], start=parts[0]), histogram(logits, labels)
    assert np.array_equal(merged.counts, pooled.counts)
    assert merged.all_figures() == pooled.all_figures()
    noisy = NoisyHistogram(pooled.counts, 3.0, pooled.edges) + NoisyHistogram(
        pooled.counts, 4.0, pooled.edges
    )
    assert noisy.noise == 5.0
    with pytest.raises(ValueError, match="different bins"):
        pooled + histogram(logits, labels, bins=4)


def test_a_threshold_inside_a_bin_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an edge of a bin"):
        histogram(*draw(np.random.default_rng(4), 50)).accuracy(0.51)


def nearest(row: np.ndarray) -> np.ndarray:
    """The nearest cells that are not negative and have the row's total, by bisection on the shift."""
    total, low, high = max(row.sum(), 0.0), row.min() - abs(row.sum()) - 1, row.max()
    for _ in range(200):
        shift = (low + high) / 2
        low, high = (shift, high) if np.maximum(row - shift, 0).sum() > total else (low, shift)
    return np.maximum(row - (low + high) / 2, 0)


def test_negative_cells_go_and_the_total_stays() -> None:
    """The L2 projection, against a slow one; nothing changes where nothing is negative."""
    rng = np.random.default_rng(5)
    for _ in range(count(200, 2_000)):
        row = rng.normal(size=int(rng.integers(2, 21))) * 5 + rng.uniform(-3, 6)
        found = consistent(row[None])[0]
        assert (found >= 0).all()
        assert found == pytest.approx(nearest(row), abs=1e-6)
        assert found.sum() == pytest.approx(max(row.sum(), 0), abs=1e-9)
    assert np.array_equal(consistent(np.array([[1.0, 0.0, 2.0]])), [[1.0, 0.0, 2.0]])


def test_the_area_is_the_mann_whitney_statistic() -> None:
    rng = np.random.default_rng(6)
    cells = rng.integers(0, 6, size=(50, 2, 7)).astype(float)
    cells[0, 0] = 0
    for one, area in zip(cells, auc_of(cells), strict=True):
        labels = np.repeat([0, 1], one.sum(axis=1).astype(int))
        scores = np.concatenate([np.repeat(np.arange(7), row.astype(int)) for row in one])
        assert area == pytest.approx(roc_auc_score(labels, scores) if one.sum(axis=1).all() else 0.5)


@pytest.mark.parametrize("noise", [0.0, 6.0])
def test_the_intervals_hold_the_truth_19_times_in_20(noise: float) -> None:
    """What the figures would be of endless patients, binned; over fresh patients and fresh noise."""
    rng = np.random.default_rng(7)
    many = histogram(*draw(rng, 400_000), bins=10)
    truth = {
        "auc": value(many.auc()), "accuracy": value(many.accuracy()), "brier": value(many.brier()),
        "prevalence": value(many.prevalence()), "sensitivity": value(many.sensitivity(0.7)),
    }  # fmt: skip
    held = dict.fromkeys(truth, 0)
    repeats = count(400, 4_000)
    for _ in range(repeats):
        found = histogram(*draw(rng, 800), bins=10, noise=noise, rng=rng)
        for name, true in truth.items():
            estimate = found.sensitivity(0.7) if name == "sensitivity" else getattr(found, name)()
            assert estimate is not None
            held[name] += estimate.low <= true <= estimate.high
    for name, times in held.items():
        assert 0.91 < times / repeats <= 1.0, name


def test_what_is_within_the_noise_is_not_shown() -> None:
    """By noisy counts alone: nothing true is at hand to decide by."""
    rng = np.random.default_rng(8)
    edges = bin_edges(10)
    for _ in range(count(50, 500)):
        empty = NoisyHistogram(5.0 * rng.normal(size=(2, 10)), 5.0, edges)
        shown = [name for name in ("auc", "brier", "accuracy", "prevalence") if getattr(empty, name)()]
        assert len(shown) == 0 or empty.counts.sum() > 0
    nothing = NoisyHistogram(np.zeros((2, 10)), 5.0, edges).all_figures()
    assert {
        nothing[name] for name in ("auc", "auc_interval", "brier", "at_specificity", "positive_patients")
    } == {None}
    assert all(cell["positive"] is None for cell in nothing["calibration"])
    # One class: an AUC needs both.
    one = NoisyHistogram(np.array([[0.0] * 10, [50.0] * 10]), 5.0, edges)
    assert one.auc() is None
    assert one.accuracy() is not None


@pytest.mark.parametrize("prevalence", [0.01, 0.05, 0.3, 0.5, 0.8, 0.99])
def test_the_edges_ascend_and_half_is_one_of_them(prevalence: float) -> None:
    for bins in range(2, 21):
        edges = bin_edges(bins, prevalence)
        assert len(edges) == bins + 1
        assert (np.diff(edges) > 0).all()
        assert edges[0] == 0
        assert edges[-1] == 1
        assert 0.5 in edges
    assert bin_edges(10)[5] == 0.5
    assert bin_edges(10) == pytest.approx(np.linspace(0, 1, 11))
    assert math.isclose(bin_edges(20, 0.05)[10], 0.05)
