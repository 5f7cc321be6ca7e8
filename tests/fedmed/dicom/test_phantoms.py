"""Phantoms: seeded, graded, and alike where they are of one patient."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from fedmed.dicom.synthetic.phantoms import Phantoms, make_phantoms
from fedmed.errors import ConfigError
from tests.timing import best


def phantoms(patients: int = 60, images: int = 3, seed: int = 0, **values: float) -> Phantoms:
    labels = (np.arange(patients) % 2).astype(np.int64)
    return make_phantoms(labels, np.full(patients, images), seed=seed, **values)  # type: ignore[arg-type]


def test_shapes_and_who_owns_what() -> None:
    made = make_phantoms(np.array([0, 1, 1]), np.array([1, 3, 2]), size=40)
    assert (made.images.shape, made.images.dtype) == ((6, 40, 40), np.uint8)
    assert made.patients.tolist() == [0, 1, 1, 1, 2, 2]
    assert made.labels.tolist() == [0, 1, 1, 1, 1, 1]
    assert made.images.min() < 20
    assert made.images.max() > 150


def test_equal_seeds_make_equal_images_and_others_do_not() -> None:
    one, two, other = (phantoms(seed=seed, size=32).images for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert (one != other).mean() > 0.5


def test_no_two_images_are_the_same() -> None:
    images = phantoms(size=32).images.reshape(180, -1)
    assert len(np.unique(images, axis=0)) == 180


def test_a_patient_s_images_are_alike() -> None:
    made = phantoms(size=32)
    flat = made.images.reshape(len(made.images), -1).astype(float)
    flat -= flat.mean(axis=0)
    alike = np.corrcoef(flat)
    same = made.patients[:, None] == made.patients
    np.fill_diagonal(same, False)
    other = made.patients[:, None] != made.patients
    assert alike[same].mean() > alike[other].mean() + 0.2


def auc(difficulty: float) -> float:
    """Of a linear model on 12 x 12 means, on other patients: far less than a network reaches."""
    made = phantoms(patients=700, images=2, size=48, difficulty=difficulty)
    means = made.images.reshape(-1, 12, 4, 12, 4).mean(axis=(2, 4)).reshape(len(made.images), -1) / 64
    train = made.patients < 500
    model = LogisticRegression(C=0.03, max_iter=500).fit(means[train], made.labels[train])
    return float(roc_auc_score(made.labels[~train], model.decision_function(means[~train])))


def test_difficulty_is_graded() -> None:
    easy, usual, hopeless = auc(0.4), auc(1.0), auc(1000.0)
    assert easy > usual + 0.02
    assert usual > 0.7
    assert 0.35 < hopeless < 0.65


def test_brightness_alone_does_not_tell() -> None:
    made = phantoms(patients=600, images=1, size=32)
    assert 0.4 < roc_auc_score(made.labels, made.images.mean(axis=(1, 2))) < 0.62


def test_drawing_is_fast() -> None:
    # 300 a second and more on a free core; a slow machine is given leave.
    assert best(lambda: phantoms(patients=150, images=2, size=64), enough=300 / 75) <= 300 / 75


@pytest.mark.parametrize(
    ("values", "says"), [({"size": 8}, "size=8"), ({"difficulty": 0.0}, "difficulty=0.0")]
)
def test_wrong_values_are_refused(values: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        phantoms(patients=2, **values)
