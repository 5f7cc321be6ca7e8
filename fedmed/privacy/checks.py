"""The five checks of an audit, each of which sees what the others cannot."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from fedmed.config import TrainingConfig
from fedmed.devices import CPU
from fedmed.models.classifier import Arrays, Classifier
from fedmed.optimizers import SGD
from fedmed.privacy.bound import lower_bound, right_guesses
from fedmed.privacy.canaries import WEIGHT, CanaryModel, Counted, canary_data, coupled
from fedmed.privacy.dpsgd import PatientOptimizer, private_step
from fedmed.privacy.patient_gradients import PatientGradients
from fedmed.privacy.plan import PrivacyPlan
from fedmed.privacy.randomness import RandomSource
from fedmed.training import LocalData, LocalUpdate

PASSED, FAILED, NOTHING = "passed", "failed", "proves nothing"
# Of correct code the variance check fails with this probability.
FALSE_ALARM = 1e-4
# Relative; the weights are float32, and planted errors are factors.
TOLERANCE = 0.01
# Of the patient whose removal is measured.
RECORDS = 20


class Train(Protocol):
    """One round of training at one site, as `fedmed.training.train`."""

    def __call__(
        self,
        model: Classifier,
        data: LocalData,
        arrays: Arrays,
        *,
        plan: PrivacyPlan,
        training: TrainingConfig,
        source: RandomSource,
    ) -> LocalUpdate: ...


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one check saw. `figures` holds numbers alone, so that the report reads as JSON."""

    name: str
    sees: str
    result: str
    figures: dict[str, float | int]


@dataclass(frozen=True)
class Bench:
    """What every check runs: a training function on a model that is wider than the patients reach."""

    train: Train
    plan: PrivacyPlan
    canaries: int
    progress: Callable[[str], None]
    device: torch.device = CPU

    def model(self) -> CanaryModel:
        return CanaryModel(self.width).to(self.device)

    @property
    def width(self) -> int:
        # Twice the canaries for the coupled check; the last third is never touched.
        return 3 * self.canaries

    @property
    def learning_rate(self) -> float:
        # Weights of a round stay near 1e-3, so that a canary's gradient stays above the clipping norm.
        spread = max(1.0, self.plan.noise_multiplier) * self.plan.max_grad_norm
        return 1e-3 * self.plan.expected_batch / (spread * math.sqrt(self.plan.steps_per_round))

    def data(self, directions: NDArray[np.int64], records: list[int] | None = None) -> LocalData:
        return canary_data(
            directions, width=self.width, max_grad_norm=self.plan.max_grad_norm, records=records
        )

    def round(
        self, data: LocalData, source: RandomSource, plan: PrivacyPlan
    ) -> tuple[NDArray[np.float64], int]:
        """The change (width,) of the weights in units of clip / divisor, from zero, and the steps that the
        function says it noised."""
        model = self.model()
        rate = self.learning_rate
        training = TrainingConfig(
            learning_rate=rate, sample_rate=plan.sample_rate, steps_per_round=plan.steps_per_round,
            physical_batch_size=512,
        )  # fmt: skip
        update = self.train(model, data, model.zeros(), plan=plan, training=training, source=source)
        change = update.delta[WEIGHT].astype(np.float64).ravel()
        return change * plan.expected_batch / (rate * plan.max_grad_norm), update.noise_draws

    def one_step(self) -> PrivacyPlan:
        """The plan for one full batch: sampling must not differ between coupled runs."""
        return replace(self.plan, sample_rate=1.0, steps_per_round=1, rounds=1, records_per_patient=RECORDS)


def whole_run(
    bench: Bench, directions: NDArray[np.int64], source: RandomSource
) -> tuple[NDArray[np.float64], float, int]:
    """All rounds on canaries along the given directions.

    Returns:
        (rounds, width) updates; how many steps' noise was drawn, counted at the source without what sampling
        reads; and how many steps the function says it noised.
    """
    data, counter = bench.data(directions), Counted(source)
    updates, reported = [], 0
    for number in range(bench.plan.rounds):
        bench.progress(f"round {number + 1} of {bench.plan.rounds} with {len(directions)} canaries")
        update, noised = bench.round(data, counter.counting(), bench.plan)
        updates.append(update)
        reported += noised
    sampling, step = _bytes_read(bench, len(directions), source)
    counted = (counter.total - bench.plan.steps * sampling) / step if step else math.nan
    return np.array(updates), counted, reported


def _bytes_read(bench: Bench, patients: int, source: RandomSource) -> tuple[int, int]:
    """What sampling that many patients once, and what one noised step reads from a source."""
    sampling, step = Counted(source), Counted(source)
    bench.plan.sample_patients(patients, sampling.counting())
    model = bench.model()
    optimizer = SGD(model.parameters(), lr=bench.learning_rate)
    private = PatientOptimizer(optimizer, plan=bench.one_step(), source=step.counting())
    private_step(PatientGradients(model), private, [])
    private.close()
    return sampling.total, step.total


def check_canaries(
    bench: Bench,
    update: NDArray[np.float64],
    included: NDArray[np.bool_],
    guesses: int,
    confidence: float,
) -> Check:
    """The lower bound of one run against the claim.

    Args:
        update: (width,) the sum of all rounds' updates.
        included: (canaries,) the secret coins.
    """
    plan, canaries = bench.plan, bench.canaries
    # The inner product of all noisy updates with a canary's direction is one weight's whole change.
    right = right_guesses(np.nan_to_num(update[:canaries]), included, guesses=guesses)
    settings = {"canaries": canaries, "guesses": guesses, "delta": plan.delta, "confidence": confidence}
    bound = lower_bound(**settings, right=right)
    # What the function reaches that hides nothing at all.
    largest = lower_bound(**settings, right=guesses)
    claim = plan.epsilon()
    result = FAILED if bound > claim else NOTHING if claim >= largest else PASSED
    return Check(
        name="canaries",
        sees="more leaks than is claimed: too little noise, no clipping, a wrong sampling rate",
        result=result,
        figures={
            "claim": claim, "lower_bound": bound, "largest_possible_bound": largest, "guesses": guesses,
            "right_guesses": right, "confidence": confidence,
        },
    )  # fmt: skip


def check_variance(bench: Bench, rounds: NDArray[np.float64], claimed: float) -> Check:
    """Chi-squared, on the directions that no patient touches: of the rounds one by one, and of their sum.

    Args:
        claimed: the sum of the accounted steps' variances, in units of the clipping norm.
    """
    unused = rounds[:, bench.canaries :]
    per_round = float((unused**2).sum()) / claimed * bench.plan.rounds
    summed = float((unused.sum(axis=0) ** 2).sum()) / claimed
    inside = []
    for value, freedom in ((per_round, unused.size), (summed, unused.shape[1])):
        low, high = stats.chi2.interval(1 - FALSE_ALARM / 2, freedom)
        inside.append(bool(low < value < high))
    return Check(
        name="variance",
        sees="noise of another variance than the accounted steps add up to; noise used twice",
        result=PASSED if all(inside) else FAILED,
        figures={
            "directions": unused.shape[1], "variance_of_a_round": per_round / unused.size,
            "variance_of_the_run": summed / unused.shape[1], "expected": 1.0, "false_alarm": FALSE_ALARM,
        },
    )  # fmt: skip


def check_counting(bench: Bench, claimed: int, counted: float, reported: int, source: RandomSource) -> Check:
    """The bytes that leave the source, in units of what one `private_step` reads.

    Counted twice, on the canaries and on a site without patients, where every batch is empty.
    """
    _, empty, empty_reported = whole_run(bench, np.arange(0), source)
    # Not to the byte: what a function reads once, say for its dropout, is no step.
    right = all(abs(value - claimed) < 0.5 for value in (counted, empty, reported, empty_reported))
    return Check(
        name="counting",
        sees="steps noised but not accounted, or accounted but not noised; noise that bypasses the source",
        result=PASSED if right else FAILED,
        figures={
            "accounted_steps": claimed, "counted_at_the_source": counted, "counted_on_empty_batches": empty,
            "reported": reported,
        },
    )  # fmt: skip


def check_coupled(bench: Bench, source: RandomSource) -> Check:
    """With the same noise, batches of 0, 1 and 2n patients differ by the patients alone."""
    bench.progress("batches of 0, 1 and 2n patients with the same noise")
    make, plan, size = coupled(source.read(32)), bench.one_step(), bench.canaries
    nobody, one, many = (
        bench.round(bench.data(np.arange(patients)), make(), plan)[0] for patients in (0, 1, 2 * size)
    )
    noise = nobody[2 * size :]
    power = float(noise @ noise)
    figures = {}
    for name, update in (("1", one), ("2n", many)):
        # Without any noise its scale is constant.
        figures[f"noise_with_{name}"] = float(update[2 * size :] @ noise) / power if power else 1.0
    figures["patient_in_1"] = float((one - nobody)[0])
    figures["patient_in_2n"] = float((many - nobody)[: 2 * size].mean())
    same = all(abs(value - 1) <= TOLERANCE for value in figures.values())
    return Check(
        name="coupled",
        sees="a divisor or noise scale that depends on the batch",
        result=PASSED if same else FAILED,
        figures={**figures, "expected": 1.0, "n": size},
    )


def check_clipping(bench: Bench, source: RandomSource) -> Check:
    """With the same noise, removing a patient with many records changes a step by at most clip / divisor."""
    bench.progress(f"a patient with {RECORDS} records, removed")
    make, plan = coupled(source.read(32)), bench.one_step()
    with_patient, without = (
        bench.round(bench.data(np.arange(len(records)), records), make(), plan)[0]
        for records in ([1, 2, 1, 3, RECORDS], [1, 2, 1, 3])
    )
    change = float(np.linalg.norm(with_patient - without))
    return Check(
        name="clipping",
        sees="a patient's records clipped one by one",
        result=PASSED if change <= 1 + TOLERANCE else FAILED,
        figures={"records_of_the_patient": RECORDS, "change": change, "largest_allowed": 1.0},
    )
