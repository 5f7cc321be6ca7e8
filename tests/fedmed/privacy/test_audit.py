"""Correct code passes; each planted defect is caught by the checks that can see it, and by no other."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import dp_accounting
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fedmed.config import TrainingConfig
from fedmed.errors import ConfigError, PrivacyError
from fedmed.models.classifier import Arrays, Classifier
from fedmed.privacy.audit import CAUTION, Audit, audit, composed_noise
from fedmed.privacy.bound import lower_bound, p_value, right_guesses
from fedmed.privacy.canaries import WEIGHT, CanaryModel, Counted, canary_data, coupled
from fedmed.privacy.checks import FAILED, NOTHING, PASSED, Train
from fedmed.privacy.plan import PrivacyPlan
from fedmed.privacy.randomness import RandomSource, operating_system, seeded
from fedmed.training import LocalData, LocalUpdate, train
from tests.conftest import count

CHECKS = {"canaries", "variance", "counting", "coupled", "clipping"}


def make(epsilon: float = 3.0, kind: type[PrivacyPlan] = PrivacyPlan, **changes: object) -> PrivacyPlan:
    values: dict[str, object] = {
        "unit": "patient", "declared_size": 1000, "sample_rate": 1.0, "records_per_patient": 1,
        "max_grad_norm": 1.0, "noise_multiplier": 0.0, "steps_per_round": 2, "rounds": 4, "delta": 1e-4,
    }  # fmt: skip
    return kind(**(values | changes)).calibrate(epsilon=epsilon)  # type: ignore[arg-type]


def failed(result: Audit) -> set[str]:
    return {check.name for check in result.checks if check.result == FAILED}


# What `train` is called with, and what a defect makes of it.
Call = tuple[LocalData, PrivacyPlan, RandomSource]


def broken(change: Callable[[LocalData, PrivacyPlan, RandomSource], Call]) -> Train:
    """The real training under changed arguments."""

    def defect(
        model: Classifier,
        data: LocalData,
        arrays: Arrays,
        *,
        plan: PrivacyPlan,
        training: TrainingConfig,
        source: RandomSource,
    ) -> LocalUpdate:
        data, plan, source = change(data, plan, source)
        return train(model, data, arrays, plan=plan, training=training, source=source)

    return defect


@dataclass(frozen=True)
class Watched(PrivacyPlan):
    """A plan that tells how many patients it sampled."""

    def sample_patients(self, patients: int, source: RandomSource) -> NDArray[np.int64]:
        sampled = super().sample_patients(patients, source)
        REALISED.append(len(sampled))
        return sampled


REALISED: list[int] = []


def stepwise(
    plan_of: Callable[[PrivacyPlan, int], PrivacyPlan], weight_of: Callable[[PrivacyPlan], float]
) -> Train:
    """The real training step by step, each by a plan of its own, its change weighted afterwards."""

    def defect(
        model: Classifier,
        data: LocalData,
        arrays: Arrays,
        *,
        plan: PrivacyPlan,
        training: TrainingConfig,
        source: RandomSource,
    ) -> LocalUpdate:
        now, draws = arrays, 0
        for number in range(plan.steps_per_round):
            one = plan_of(plan, number)
            step = train(model, data, now, plan=one, training=training, source=source)
            weight = weight_of(plan)
            now = {name: (now[name] + weight * step.delta[name]).astype(np.float32) for name in now}
            draws += step.noise_draws
        return LocalUpdate({name: now[name] - arrays[name] for name in now}, draws)

    return defect


# Every step is divided by the number of patients that were sampled.
realised_divisor = stepwise(
    lambda plan, _: Watched(**{**vars(plan), "steps_per_round": 1}),
    lambda plan: plan.expected_batch / max(1, REALISED.pop()),
)
# Every second step has noise to no purpose: drawn, and then a millionth of it added.
half_noised = stepwise(
    lambda plan, number: replace(
        plan, steps_per_round=1, noise_multiplier=1e-6 if number % 2 else plan.noise_multiplier
    ),
    lambda _: 1.0,
)


class HalfAccounted(PrivacyPlan):
    """Accounts, and so calibrates, for half of the steps that it runs."""

    def event(self, rounds: int | None = None) -> dp_accounting.DpEvent:
        event = super().event(rounds)
        return dp_accounting.SelfComposedDpEvent(event.event, max(1, event.count // 2))

    def calibrate(self, *, epsilon: float) -> PrivacyPlan:
        half = PrivacyPlan(**{**vars(self), "rounds": self.rounds // 2}).calibrate(epsilon=epsilon)
        return replace(self, noise_multiplier=half.noise_multiplier)


class MoreNoiseAccounted(PrivacyPlan):
    """Accounts for 1.4 times the noise that it adds: too little for one run's canaries to see."""

    def event(self, rounds: int | None = None) -> dp_accounting.DpEvent:
        return PrivacyPlan.event(
            replace(as_it_is(self), noise_multiplier=1.4 * self.noise_multiplier), rounds
        )

    def calibrate(self, *, epsilon: float) -> PrivacyPlan:
        noise = as_it_is(self).calibrate(epsilon=epsilon).noise_multiplier
        return replace(self, noise_multiplier=noise / 1.4)


def as_it_is(plan: PrivacyPlan) -> PrivacyPlan:
    return PrivacyPlan(**vars(plan))


def every_record_a_patient(data: LocalData, plan: PrivacyPlan, source: RandomSource) -> Call:
    """Record-level clipping: the plan's unit stays the patient."""
    return replace(data, records_of=[np.array([row]) for row in range(len(data.labels))]), plan, source


def everybody(data: LocalData, plan: PrivacyPlan, source: RandomSource) -> Call:
    """No Poisson sampling: everybody takes part in every step, over the divisor of the sampled batch."""
    size = max(1, round(plan.expected_batch))
    return data, replace(plan, sample_rate=1.0, declared_size=size), source


def instead_of(source: RandomSource) -> RandomSource:
    """Reads the source as it should, and gives the same bytes each time that it is made."""
    same = coupled(b"same")()

    def read(count: int) -> bytes:
        source.read(count)
        return same.read(count)

    return RandomSource(read, private=source.private)


ELSEWHERE = np.random.default_rng(9)


# The defect, and all the checks that catch it: the others pass, and so cannot see it.
DEFECTS: dict[str, tuple[Train, type[PrivacyPlan], set[str]]] = {
    # Noise is drawn and not added.
    "no noise": (
        broken(lambda data, plan, source: (data, replace(plan, noise_multiplier=1e-6), source)),
        PrivacyPlan,
        {"canaries", "variance"},
    ),
    # As with privacy=off: nothing is clipped either.
    "no noise, no clipping": (
        broken(lambda data, plan, source: (data, replace(plan, noise_multiplier=0.0), source)),
        PrivacyPlan,
        CHECKS,
    ),
    "noise / 10": (
        broken(
            lambda data, plan, source: (
                data,
                replace(plan, noise_multiplier=plan.noise_multiplier / 10),
                source,
            )
        ),
        PrivacyPlan,
        {"canaries", "variance"},
    ),
    # About half of the declared patients are there, and a batch of five counts as five.
    "realised batch as divisor": (realised_divisor, PrivacyPlan, {"coupled", "variance", "clipping"}),
    "half the steps accounted": (train, HalfAccounted, {"counting", "variance"}),
    "twice the steps run": (
        broken(
            lambda data, plan, source: (
                data,
                replace(plan, steps_per_round=2 * plan.steps_per_round),
                source,
            )
        ),
        PrivacyPlan,
        {"counting", "variance", "coupled", "clipping"},
    ),
    "half the steps noised": (half_noised, PrivacyPlan, {"variance"}),
    "more noise accounted than added": (train, MoreNoiseAccounted, {"variance"}),
    "record-level clipping": (broken(every_record_a_patient), PrivacyPlan, {"clipping"}),
    # In every round again, which whoever sees two rounds can subtract.
    "noise used twice": (
        broken(lambda data, plan, source: (data, plan, instead_of(source))),
        PrivacyPlan,
        {"variance"},
    ),
    # Good noise, of which the source knows nothing: a seed, say, or torch's own generator.
    "noise from elsewhere": (
        broken(
            lambda data, plan, source: (data, plan, RandomSource(ELSEWHERE.bytes, private=source.private))
        ),
        PrivacyPlan,
        {"counting", "coupled", "clipping"},
    ),
}


@pytest.mark.parametrize("epsilon", [1.0, 3.0])
def test_correct_code_passes_with_a_bound_well_below_the_claim(epsilon: float) -> None:
    """privacy.md, rule 23: 0.3 to 0.5 at claim 1, 1.2 to 1.5 at claim 3, give or take one run's luck."""
    seeds = count(3, 40)
    results = [audit(make(epsilon), source=seeded(1, seed)) for seed in range(seeds)]
    assert [failed(result) for result in results] == [set()] * seeds
    bounds = [result.check("canaries").figures["lower_bound"] for result in results]
    expected = {1.0: 0.38, 3.0: 1.26}[epsilon]
    assert np.mean(bounds) == pytest.approx(expected, abs=0.6 / math.sqrt(seeds))
    assert max(bounds) < epsilon
    for result in results:
        assert result.epsilon == pytest.approx(epsilon, rel=1e-2)
        assert {check.name for check in result.checks} == CHECKS
        assert all(check.result == PASSED for check in result.checks)


@pytest.mark.parametrize(("name", "epsilon"), product(DEFECTS, [1.0, 3.0]))
def test_each_planted_defect_is_caught_by_the_checks_that_can_see_it(name: str, epsilon: float) -> None:
    """privacy.md, rules 23 and 24."""
    function, kind, caught_by = DEFECTS[name]
    for seed in range(count(1, 10)):
        result = audit(make(epsilon, kind), source=seeded(2, seed), train=function)
        assert failed(result) == caught_by, seed
        assert not result.passed


def test_sampling_everybody_under_a_sampled_claim_is_seen_by_the_canaries_alone() -> None:
    plan = make(1.0, sample_rate=0.1, rounds=10)
    assert failed(audit(plan, source=seeded(3))) == set()
    assert failed(audit(plan, source=seeded(3), train=broken(everybody))) == {"canaries"}


def test_a_claim_of_8_proves_nothing() -> None:
    """Even code that hides nothing stays below it: no failure, and no evidence."""
    result = audit(make(8.0), source=seeded(4), train=DEFECTS["no noise"][0])
    canaries = result.check("canaries")
    assert canaries.result == NOTHING
    assert canaries.figures["lower_bound"] == pytest.approx(canaries.figures["largest_possible_bound"])
    assert 3.5 < canaries.figures["largest_possible_bound"] < 4.5
    assert failed(result) == {"variance"}


def test_every_report_warns_and_is_json() -> None:
    result = audit(make(canaries := 3.0), source=operating_system())
    values = json.loads(json.dumps(result.report(), allow_nan=False))
    assert values["caution"] == CAUTION == "A low bound is not evidence of privacy."
    assert values["private_randomness"] is True
    assert values["epsilon"] <= canaries
    assert {check["name"] for check in values["checks"]} == CHECKS
    assert all(check["sees"] and check["figures"] for check in values["checks"])


def test_updates_of_nan_fail_and_are_reported() -> None:
    def spoilt(*_: object, **__: object) -> LocalUpdate:
        return LocalUpdate({WEIGHT: np.full((1, 3000), np.nan, dtype=np.float32)}, 2)

    result = audit(make(), source=seeded(6), train=spoilt)
    assert failed(result) >= {"variance", "counting", "coupled", "clipping"}
    assert result.report()["checks"][1]["figures"]["variance_of_the_run"] is None


def test_what_cannot_be_audited_is_refused() -> None:
    plan = make()
    for changes, name in (
        ({"guesses": 201}, "guesses"), ({"guesses": 1002}, "guesses"), ({"canaries": 50}, "canaries"),
        ({"canaries": 500}, "plan.declared_size"), ({"confidence": 1.0}, "confidence"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{name}=.*expected"):
            audit(plan, source=seeded(0), **changes)  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match="no claim to audit"):
        audit(replace(plan, noise_multiplier=0.0), source=seeded(0))
    with pytest.raises(PrivacyError, match="NonPrivateDpEvent cannot be audited"):
        composed_noise(dp_accounting.ComposedDpEvent((plan.event(), dp_accounting.NonPrivateDpEvent())))
    assert composed_noise(dp_accounting.ComposedDpEvent((plan.event(), plan.event()))) == (
        2 * plan.steps,
        pytest.approx(2 * plan.steps * plan.noise_multiplier**2),
    )


def test_the_p_value_is_the_paper_s() -> None:
    """Appendix D, written out as sums."""
    for canaries, guesses, right, epsilon, delta in (
        (1000, 200, 130, 0.5, 1e-4),
        (100, 20, 20, 2.0, 1e-3),
        (50, 10, 0, 1.0, 1e-5),
    ):
        chance = 1 / (1 + math.exp(-epsilon))
        mass = [math.comb(guesses, k) * chance**k * (1 - chance) ** (guesses - k) for k in range(guesses + 1)]
        steepest = max((sum(mass[right - i : right]) / i for i in range(1, right + 1)), default=0.0)
        expected = min(1.0, sum(mass[right:]) + 2 * canaries * delta * steepest)
        got = p_value(canaries=canaries, guesses=guesses, right=right, epsilon=epsilon, delta=delta)
        assert got == pytest.approx(expected, rel=1e-9)


def test_the_bound_is_where_the_p_value_crosses() -> None:
    settings = {"canaries": 1000, "guesses": 200, "delta": 1e-4}
    bounds = [lower_bound(**settings, right=right, confidence=0.95) for right in range(90, 201, 10)]  # type: ignore[arg-type]
    assert bounds[0] == bounds[1] == 0.0
    assert bounds[-1] == max(bounds)
    assert bounds == sorted(bounds)
    assert p_value(**settings, right=160, epsilon=bounds[7]) == pytest.approx(0.05, abs=1e-6)  # type: ignore[arg-type]


def test_the_bound_holds_as_often_as_it_says() -> None:
    """Randomised response attains the binomial of Theorem 3.1, so that the level is nearly used up and kept."""
    runs, epsilon = count(400, 5_000), 1.0
    draws = np.random.default_rng(8).binomial(200, 1 / (1 + math.exp(-epsilon)), size=runs)
    wrong = sum(
        lower_bound(canaries=200, guesses=200, right=int(right), delta=0.0, confidence=0.95) > epsilon
        for right in draws
    )
    assert wrong <= stats.binom.ppf(0.9999, runs, 0.05)
    assert wrong > 0


def test_guesses_are_the_extremes() -> None:
    scores = np.array([0.0, 5.0, 1.0, 4.0, 2.0, 3.0])
    included = np.array([False, True, True, True, False, False])
    assert right_guesses(scores, included, guesses=2) == 2
    assert right_guesses(scores, included, guesses=4) == 3
    assert right_guesses(-scores, included, guesses=2) == 0
    # Without a signal, by position alone.
    assert right_guesses(np.zeros(6), included, guesses=2) == 1


def test_canaries_are_orthogonal_and_beyond_the_clipping_norm() -> None:
    model = CanaryModel(6)
    data = canary_data(np.array([0, 2, 5]), width=6, max_grad_norm=0.5, records=[1, 3, 2])
    assert [len(records) for records in data.records_of] == [1, 3, 2]
    plan = make(declared_size=3, records_per_patient=9, steps_per_round=1, max_grad_norm=0.5)
    training = TrainingConfig(learning_rate=1.0, sample_rate=1.0, steps_per_round=1)
    update = train(
        model,
        data,
        model.zeros(),
        plan=replace(plan, noise_multiplier=1e-6),
        training=training,
        source=seeded(0),
    )
    assert np.allclose(update.delta[WEIGHT] * 3 / 0.5, [[1, 0, 1, 0, 0, 1]], atol=1e-4)


def test_coupled_sources_share_the_noise_whatever_else_is_read() -> None:
    create = coupled(b"key")
    first, second, other = create(), create(), coupled(b"other")()
    second.uniform(17)
    a, b, c = (source.read(800) for source in (first, second, other))
    assert a == b != c
    assert first.read(800) != a
    assert not first.private


def test_bytes_are_counted_where_they_leave_the_source() -> None:
    counter = Counted(seeded(0))
    values = counter.counting().uniform(1000)
    assert counter.total == 8000
    assert np.array_equal(values, seeded(0).uniform(1000))
