"""The expected error of the AUC against simulations that know nothing of how it is computed."""

import math

import numpy as np
import pytest

from fedmed.privacy.accounting import calibrate_noise
from fedmed.privacy.expected_error import assumed_cells, expected_auc_error
from fedmed.privacy.histogram import HistogramPlan
from fedmed.privacy.randomness import seeded
from fedmed.private_metrics import NoisyHistogram
from tests.conftest import count


@pytest.mark.parametrize(("positives", "stated"), [(35, 0.08), (150, 0.015), (1_000, 0.004)])
def test_the_values_of_rule_16(positives: int, stated: float) -> None:
    """Four sites at epsilon 1, 10 bins, as many negative patients as positive ones."""
    noise = calibrate_noise(epsilon=1.0, delta=1e-4, sample_rate=1.0, steps=1)
    found = expected_auc_error(held_out=4 * 2 * positives, bins=10, noise=2 * noise)
    assert stated / 1.35 < found < stated * 1.35
    assert (found > 0.05) == (positives == 35)


@pytest.mark.parametrize("prevalence", [0.5, 0.2])
def test_it_is_the_error_of_whole_releases(prevalence: float) -> None:
    """Patients are drawn, scored, counted, noised at four sites, merged and measured; the error is to the AUC of
    all pairs of the same patients."""
    rng = np.random.default_rng(2)
    plan = HistogramPlan(unit="patient", bins=10, prevalence=prevalence, noise_multiplier=2.0, delta=1e-4)
    source, errors = seeded(11), []
    separation = math.sqrt(2) * 0.841621
    for _ in range(count(75, 1_500)):
        merged, scores, labels = None, [], []
        for _ in range(4):
            label = (rng.random(300) < prevalence).astype(np.float32)
            logit = rng.normal(size=300) * separation + (label - 0.5) * separation**2
            score = 1 / (1 + np.exp(-logit - math.log(prevalence / (1 - prevalence))))
            counts = plan.count(score, label, list(np.arange(300)[:, None]))
            site = NoisyHistogram(plan.release(counts, source), plan.noise_multiplier, plan.edges)
            merged = site if merged is None else merged + site
            scores.append(score)
            labels.append(label)
        assert merged is not None
        score, label = np.concatenate(scores), np.concatenate(labels)
        pairs = score[label == 1][:, None] - score[label == 0][None]
        estimate = merged.auc()
        assert estimate is not None
        errors.append(estimate.value - (np.mean(pairs > 0) + 0.5 * np.mean(pairs == 0)))
    expected = expected_auc_error(held_out=1_200, bins=10, noise=4.0, prevalence=prevalence)
    assert expected == pytest.approx(float(np.sqrt(np.mean(np.square(errors)))), rel=0.2)


def test_where_noise_is_small_it_is_the_delta_method_s() -> None:
    """var = noise^2 (sum (F_i - A)^2 / P^2 + sum (G_j - A)^2 / N^2), beside what the bins cost."""
    cells = assumed_cells(held_out=4_000, bins=10, prevalence=0.5)
    (negative, positive), noise = cells, 4.0
    below = (np.cumsum(negative) - negative / 2) / negative.sum()
    above = 1 - (np.cumsum(positive) - positive / 2) / positive.sum()
    area = (positive * below).sum() / positive.sum()
    variance = noise**2 * (
        ((below - area) ** 2).sum() / positive.sum() ** 2 + ((above - area) ** 2).sum() / negative.sum() ** 2
    )
    expected = expected_auc_error(held_out=4_000, bins=10, noise=noise)
    assert expected == pytest.approx(math.sqrt(variance + (area - 0.8) ** 2), rel=0.1)


def test_the_assumed_scores_are_what_they_are_called() -> None:
    """They have the assumed AUC, and are calibrated: in each fine bin the fraction of positives is the score."""
    cells = assumed_cells(held_out=1_000, bins=2_000, prevalence=0.1, auc=0.8)
    assert cells.sum(axis=1) == pytest.approx([900, 100])
    negative, positive = cells
    area = (positive * (np.cumsum(negative) - negative / 2)).sum() / (negative.sum() * positive.sum())
    assert area == pytest.approx(0.8, abs=1e-4)
    middle = slice(200, 1_800)
    inner = np.arange(1, 2_000) / 2_000
    edges = np.concatenate([[0], 0.1 * inner / (0.1 * inner + 0.9 * (1 - inner)), [1]])
    score = ((edges[1:] + edges[:-1]) / 2)[middle]
    assert (positive / (positive + negative))[middle] == pytest.approx(score, rel=0.02)


def test_it_is_a_public_constant() -> None:
    """The same on every machine that asks, so that a site refuses what the coordinator refuses."""
    expected_auc_error.cache_clear()
    first = expected_auc_error(held_out=500, bins=10, noise=6.0)
    expected_auc_error.cache_clear()
    assert expected_auc_error(held_out=500, bins=10, noise=6.0) == first
    assert expected_auc_error(held_out=500, bins=10, noise=8.0) > first
    assert expected_auc_error(held_out=250, bins=10, noise=6.0) > first
