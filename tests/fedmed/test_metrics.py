"""AUC and accuracy from counts are those of the records, however the sites hold them."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, roc_auc_score

from fedmed.metrics import CELLS, ScoreCounts
from tests.conftest import count


def draw(rng: np.random.Generator, records: int, gap: float) -> tuple[np.ndarray, np.ndarray]:
    labels = (rng.random(records) < rng.uniform(0.2, 0.8)).astype(np.float32)
    labels[:2] = 0, 1
    return (rng.normal(size=records) + gap * (labels - 0.5)).astype(np.float32), labels


@pytest.mark.parametrize("records", [300, 3_000])
def test_auc_and_accuracy_are_scikit_learn_s(records: int) -> None:
    """To a thousandth, though some logits share a cell; over many draws."""
    rng = np.random.default_rng(records)
    for _ in range(count(50, 500)):
        logits, labels = draw(rng, records, gap=rng.uniform(-1, 3))
        counts = ScoreCounts.of(logits, labels)
        assert counts.auc() == pytest.approx(roc_auc_score(labels, logits), abs=1e-3)
        assert counts.accuracy() == pytest.approx(accuracy_score(labels, logits >= 0), abs=1e-12)
        assert counts.records == records


@pytest.mark.parametrize("records", [2, 20, 100])
def test_of_few_records_only_what_shares_a_cell_is_taken_for_a_tie(records: int) -> None:
    """Between 20 records a single pair weighs more than a thousandth; the cell is a thousandth wide."""
    rng = np.random.default_rng(records)
    for _ in range(count(50, 500)):
        logits, labels = draw(rng, records, gap=rng.uniform(-1, 3))
        cells = np.floor(logits.astype(np.float64) / 0.001)
        assert ScoreCounts.of(logits, labels).auc() == pytest.approx(roc_auc_score(labels, cells), abs=1e-12)


def test_separated_logits_give_exactly_scikit_learn_s() -> None:
    """No two records within a cell: nothing is lost."""
    rng = np.random.default_rng(1)
    for _ in range(count(50, 500)):
        logits = (rng.permutation(2_000)[:300] * 0.015 - 15 + 0.004).astype(np.float32)
        labels = (rng.random(300) < 0.4).astype(np.float32)
        counts = ScoreCounts.of(logits, labels)
        assert counts.auc() == pytest.approx(roc_auc_score(labels, logits), abs=1e-12)
        assert counts.accuracy() == accuracy_score(labels, logits >= 0)


def test_ties_count_half() -> None:
    logits = np.zeros(4, np.float32)
    labels = np.array([0, 1, 0, 1], np.float32)
    assert ScoreCounts.of(logits, labels).auc() == roc_auc_score(labels, logits) == 0.5


def test_merged_sites_are_the_pooled_records() -> None:
    """Whatever the cut into sites, empty ones and those with one class too."""
    rng = np.random.default_rng(2)
    logits, labels = draw(rng, 500, gap=1.0)
    order = np.argsort(labels)
    pooled = ScoreCounts.of(logits, labels)
    for cuts in ([100, 300], [0, 250, 250], [1], [int((labels == 0).sum())]):
        sites = [ScoreCounts.of(logits[part], labels[part]) for part in np.split(order, cuts)]
        merged = sum(sites[1:], start=sites[0])
        assert np.array_equal(merged.counts, pooled.counts)
        assert merged.auc() == pooled.auc()
        assert merged.accuracy() == pooled.accuracy()


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_no_auc_and_an_accuracy(label: int) -> None:
    counts = ScoreCounts.of(np.array([-1, 1, 2], np.float32), np.full(3, label, np.float32))
    assert counts.auc() is None
    assert counts.accuracy() == pytest.approx(2 / 3 if label else 1 / 3)


def test_no_record_has_neither() -> None:
    nothing = ScoreCounts.of(np.zeros(0, np.float32), np.zeros(0, np.float32))
    assert nothing.records == 0
    assert nothing.auc() is None
    assert nothing.accuracy() is None


def test_the_threshold_is_a_logit_of_0() -> None:
    """0 itself is positive; the smallest number below it is not."""
    below = np.nextafter(np.float32(0), np.float32(-1))
    for logit, right in ((0.0, 1.0), (below, 0.0), (1e-30, 1.0)):
        assert ScoreCounts.of(np.array([logit], np.float32), np.ones(1, np.float32)).accuracy() == right


def test_extreme_and_broken_logits_are_counted_once_each() -> None:
    """Infinite ones lie outermost, NaN counts as 0, and nobody is lost."""
    logits = np.array([np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-45, 19.9995, -20.0, 500, -500], np.float32)
    labels = (np.arange(10) % 2 == 0).astype(np.float32)
    counts = ScoreCounts.of(logits, labels)
    assert counts.records == 10
    assert counts.counts.sum(axis=0)[[0, CELLS // 2, CELLS - 1]].tolist() == [4, 2, 4]


def test_inputs_are_not_changed() -> None:
    logits, labels = np.array([np.nan, 1e9], np.float32), np.array([0, 1], np.float32)
    ScoreCounts.of(logits, labels)
    assert np.isnan(logits[0])
    assert logits[1] == np.float32(1e9)
