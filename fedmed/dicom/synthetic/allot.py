"""Who lies in which hospital: images become patients, patients are spread over hospitals."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import ConfigError, require

Integers = NDArray[np.int64]
# Draws of a Dirichlet distribution that leave a hospital without a patient are drawn again, so often.
DRAWS = 1000
# What Dirichlet's alpha may be: below it all of a class is in one hospital, above it the mix is the same in all.
ALPHAS = (0.01, 10_000.0)


def group_patients(
    labels: Integers, images_per_patient: tuple[int, int], rng: np.random.Generator
) -> Integers:
    """(images,) the made-up patient of each image, 0 … patients - 1.

    A patient has a uniformly drawn number of images, all of one class; the last patient of a class has what is left.
    """
    low, high = images_per_patient
    require(1 <= low <= high <= 1000, "images_per_patient", f"{low}-{high}", "1 <= fewest <= most <= 1000")
    patients = np.empty(len(labels), np.int64)
    begin = 0
    for label in np.unique(labels):
        images = rng.permutation(np.flatnonzero(labels == label))
        sizes = rng.integers(low, high + 1, -(-len(images) // low))
        owner = np.repeat(np.arange(len(sizes)), sizes)[: len(images)]
        patients[images] = begin + owner
        begin += int(owner[-1]) + 1
    # Numbered in no order, or the first patients of a hospital would all be of one class.
    return rng.permutation(begin)[patients]


def allot(
    labels: Integers,
    hospitals: int,
    *,
    label_skew: float | None = None,
    prevalences: Sequence[float] | None = None,
    positive: Sequence[int] = (1,),
    rng: np.random.Generator,
) -> Integers:
    """(patients,) the hospital of each patient, 0 … hospitals - 1; -1 for one that is left out.

    With `label_skew`, each class is spread by shares drawn from a Dirichlet distribution with every alpha equal to it
    (Li et al. 2022, Federated Learning on Non-IID Data Silos, section 4.1): 0.1 is strong, 1 moderate, 100 hardly any.
    With `prevalences`, all hospitals are of one size, each has that share of positive patients, and who does not fit
    is left out. With neither, every hospital has the same mix.

    Args:
        labels: (patients,).
        positive: the classes whose share is the prevalence.

    Raises:
        ConfigError: both, values out of range, or fewer patients than hospitals.
    """
    require(hospitals >= 1, "hospitals", hospitals, ">= 1")
    enough = f"at most {len(labels)}: one patient each"
    require(hospitals <= len(labels), "hospitals", hospitals, enough)
    require(
        label_skew is None or prevalences is None, "prevalences", prevalences, "null together with label_skew"
    )
    if prevalences is not None:
        return _by_prevalence(np.isin(labels, positive), hospitals, prevalences, rng)
    if label_skew is None:
        return _evenly(labels, hospitals, rng)
    low, high = ALPHAS
    require(low <= label_skew <= high, "label_skew", label_skew, f"Dirichlet's alpha, {low:g} to {high:g}")
    for _ in range(DRAWS):
        found = _by_shares(labels, hospitals, label_skew, rng)
        if len(np.unique(found)) == hospitals:
            return found
    raise ConfigError(
        f"label_skew={label_skew:g}: leaves one of {hospitals} hospitals without a patient in {DRAWS} draws; "
        "expected a larger one, or fewer hospitals"
    )


def _evenly(labels: Integers, hospitals: int, rng: np.random.Generator) -> Integers:
    # Class after class dealt in turns: no hospital has more than one patient of a class more than another.
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    found = np.empty(len(labels), np.int64)
    found[order] = np.arange(len(labels)) % hospitals
    return found


def _by_shares(labels: Integers, hospitals: int, alpha: float, rng: np.random.Generator) -> Integers:
    found = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        patients = rng.permutation(np.flatnonzero(labels == label))
        ends = np.rint(np.cumsum(rng.dirichlet(np.full(hospitals, alpha))) * len(patients))[:-1]
        for hospital, part in enumerate(np.split(patients, ends.astype(np.int64))):
            found[part] = hospital
    return found


def _by_prevalence(
    positive: NDArray[np.bool_], hospitals: int, prevalences: Sequence[float], rng: np.random.Generator
) -> Integers:
    require(
        len(prevalences) == hospitals, "prevalences", list(prevalences), f"{hospitals}, one each hospital"
    )
    for value in prevalences:
        require(0 <= value <= 1, "prevalences", value, "0 to 1")
    pools = {side: rng.permutation(np.flatnonzero(positive == side)) for side in (True, False)}
    size = len(positive) // hospitals
    # The largest size for which both kinds of patients suffice.
    while size and sum(round(value * size) for value in prevalences) > len(pools[True]):
        size -= 1
    while size and sum(size - round(value * size) for value in prevalences) > len(pools[False]):
        size -= 1
    if size == 0:
        raise ConfigError(f"prevalences={list(prevalences)}: there are too few patients of a class for them")
    found = np.full(len(positive), -1, np.int64)
    used = {True: 0, False: 0}
    for hospital, value in enumerate(prevalences):
        for side, count in ((True, round(value * size)), (False, size - round(value * size))):
            found[pools[side][used[side] : used[side] + count]] = hospital
            used[side] += count
    return found
