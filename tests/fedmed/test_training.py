"""Local training: what an update depends on, and what it must not."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedmed import training as training_module
from fedmed.compose import compose
from fedmed.config import RunConfig
from fedmed.data.table import read_site
from fedmed.errors import PrivacyError
from fedmed.models.build import build
from fedmed.models.classifier import Arrays, Classifier, TabularClassifier
from fedmed.privacy.dpsgd import PatientOptimizer
from fedmed.privacy.plan import PrivacyPlan, make_plan
from fedmed.privacy.randomness import RandomSource, operating_system, seeded
from fedmed.training import (
    LocalData,
    LocalUpdate,
    local_parts,
    logits,
    one_thread,
    set_adapter,
    train,
)
from tests.evidence import count

SITE = "Switzerland"


def setting(*overrides: str) -> tuple[RunConfig, Classifier, LocalData, PrivacyPlan]:
    config = compose(
        ["model=logistic", "tracking=none", "privacy.epsilon=null", "privacy.noise_multiplier=1", *overrides]
    )
    model = build(config.task, config.model, config.adapter)
    data = read_site(config.task, SITE, seed=0)
    training, _ = local_parts(model.prepare(data), data)
    return config, model, training, make_plan(config, SITE)


def update(
    run: tuple[RunConfig, Classifier, LocalData, PrivacyPlan], source: RandomSource, **changes: object
) -> LocalUpdate:
    config, model, data, plan = run
    return train(
        model,
        data,
        model.initialise(0),
        plan=plan,
        training=config.training,
        source=source,
        **changes,  # type: ignore[arg-type]
    )


def same(a: Arrays, b: Arrays, tolerance: float = 0.0) -> bool:
    return all(np.abs(a[name] - b[name]).max() <= tolerance for name in a)


def pre_noise_sums(run: tuple[RunConfig, Classifier, LocalData, PrivacyPlan], arrays: Arrays) -> np.ndarray:
    """What a step adds noise to, in cells: all parameters in one vector."""
    config, model, data, plan = run
    sums: list[np.ndarray] = []
    noised = PatientOptimizer.noised

    def seen(optimizer: PatientOptimizer, cells: torch.Tensor) -> torch.Tensor:
        sums.append(cells.double().numpy())
        return noised(optimizer, cells)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PatientOptimizer, "noised", seen)
        train(model, data, arrays, plan=plan, training=config.training, source=operating_system())
    return sums[0]


COLUMNS = ", ".join(f"c{n}: {{kind: numeric, low: 0, high: 100}}" for n in range(6))


def largest_change(*overrides: str, runs: int) -> float:
    """How far removing one patient moves the sum before noise, in clips, under weights made to blow rounding up.

    Their products with the features of other, known patients cancel, so that rounding decides the scores.
    """
    config = compose(
        ["task=csv", "task.path=none.csv", "task.patient_column=id", f"task.declared_sizes={{{SITE}: 600}}",
         f"task.columns={{{COLUMNS}}}", "task.blanks=drop", "tracking=none", "rounds=1", *overrides]
    )  # fmt: skip
    one_thread()
    model, plan = build(config.task, config.model, config.adapter), make_plan(config, SITE)
    rng, largest = np.random.default_rng(0), 0.0
    for _ in range(runs):
        number = int(rng.integers(20, 64))
        features = (rng.integers(0, 101, (number, 6)) / 50 - 1).astype(np.float32)
        labels = torch.from_numpy(rng.integers(0, 2, number).astype(np.float32))
        cancelling = (1e12 * np.linalg.svd(features[-5:].astype(np.float64))[2][-1]).astype(np.float32)
        arrays = {name: np.ones(tuple(p.shape), np.float32) for name, p in model.adapter().items()}
        for name, array in arrays.items():
            array[:] = cancelling if array.shape[-1] == 6 else 0 if name.endswith("bias") else 1
        sums = []
        for first in (0, 1):
            records_of = [np.array([n]) for n in range(number - first)]
            data = LocalData({"features": torch.from_numpy(features[first:])}, labels[first:], records_of)
            sums.append(pre_noise_sums((config, model, data, plan), arrays))
        largest = max(largest, float(np.linalg.norm(sums[0] - sums[1])) / plan.grid.bound)
    return largest


def test_no_adapter_makes_one_patient_s_removal_change_the_sum_by_more_than_the_clip() -> None:
    assert largest_change("model=logistic", runs=40) <= 1


def test_a_patient_computed_alone_is_no_matter_of_who_else_is_there() -> None:
    hidden = ("model=mlp", "model.hidden=1", "adapter=full")
    assert largest_change(*hidden, "training.physical_batch_size=1", runs=40) <= 1
    assert largest_change(*hidden, runs=40) > 1, "the weights are not made well enough to show anything"


def test_noise_draws_equal_the_events_that_are_composed() -> None:
    """privacy.md, rule 24: counted where the noise is drawn, over a whole run."""
    run = setting("training.steps_per_round=3", "rounds=4")
    drawn = sum(update(run, operating_system()).noise_draws for _ in range(4))
    event = run[3].event()
    assert drawn == event.count == run[3].steps == 12


def test_without_clipping_in_reach_and_noise_the_private_step_is_the_plain_one() -> None:
    for overrides in (["training.sample_rate=0.5", "training.steps_per_round=2"], ["model=mlp"]):
        *rest, plan = setting("privacy.max_grad_norm=1000", *overrides)
        private = update((*rest, dataclasses.replace(plan, noise_multiplier=1e-9)), seeded(4))
        plain = update((*rest, dataclasses.replace(plan, noise_multiplier=0.0)), seeded(4))
        # The sources differ once noise has been drawn, so only the first step's sample is shared.
        if "training.steps_per_round=2" not in overrides:
            assert same(private.delta, plain.delta, 1e-5)
        assert plain.noise_draws == 0


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_text_model_s_private_step_is_the_plain_one_too(adapter: str, hf_overrides: list[str]) -> None:
    """Also for the embedding tables, whose gradients need one row a record."""
    config, model, data, plan = setting(
        *hf_overrides, f"adapter={adapter}", "adapter.last_blocks=2", "adapter.embeddings=true",
        "privacy.max_grad_norm=1000", "training.learning_rate=1.0",
    )  # fmt: skip
    some = LocalData(data.batch, data.labels, [np.array([n]) for n in range(5)])
    arrays = model.initialise(0)
    # A constant head would see no change: a layer norm's output has a constant sum.
    arrays["head.weight"] += np.random.default_rng(0).normal(size=(1, 32)).astype(np.float32)
    private, plain = (
        train(model, some, arrays, plan=p, training=config.training, source=seeded(1))
        for p in (dataclasses.replace(plan, noise_multiplier=noise) for noise in (1e-9, 0.0))
    )
    assert same(private.delta, plain.delta, 1e-5)
    tables = [name for name in plain.delta if "position_embeddings" in name]
    assert bool(tables) is (adapter == "full")
    assert all(np.abs(plain.delta[name]).max() > 1e-3 for name in tables)


def test_the_plain_step_is_gradient_descent_on_the_mean_over_patients() -> None:
    config, model, data, plan = setting("training.learning_rate=1.0")
    plain = update((config, model, data, dataclasses.replace(plan, noise_multiplier=0.0)), seeded(0))
    model.initialise(0)
    model.zero_grad()
    loss = functional.binary_cross_entropy_with_logits(model(**data.batch), data.labels, reduction="sum")
    (loss / plan.declared_size).backward()
    for name, parameter in model.adapter().items():
        assert parameter.grad is not None
        assert np.allclose(plain.delta[name], -parameter.grad.numpy(), atol=1e-6)
    model.zero_grad()


def test_the_proximal_term_is_added_after_clipping_and_noise() -> None:
    """With mu > 0 the second step is pulled towards the start by exactly lr * mu * distance."""
    run = setting("training.steps_per_round=2", "training.learning_rate=0.1", "privacy.noise_multiplier=50")
    free, pulled = update(run, seeded(8)), update(run, seeded(8), proximal_mu=0.5)
    one_step = dataclasses.replace(run[3], steps_per_round=1)
    first = update((*run[:3], one_step), seeded(8))
    for name in free.delta:
        # The gradients of the two differ a little as well, since the second step starts elsewhere only later.
        assert np.allclose(pulled.delta[name], free.delta[name] - 0.1 * 0.5 * first.delta[name], atol=1e-5)


def test_a_private_update_differs_from_run_to_run_and_a_seeded_one_does_not() -> None:
    """privacy.md, rule 8."""
    run = setting()
    torch.manual_seed(0)
    first = update(run, operating_system())
    torch.manual_seed(0)
    assert not same(first.delta, update(run, operating_system()).delta)
    assert same(update(run, seeded(1)).delta, update(run, seeded(1)).delta)


def test_an_update_depends_on_training_records_alone() -> None:
    """privacy.md, rule 7: what else the process holds does not reach it."""
    run = setting()
    config, model, _, _ = run
    before = update(run, seeded(2))
    data = read_site(config.task, SITE, seed=0)
    labels = data.labels.copy()
    labels[data.test] = 1 - labels[data.test]
    changed = dataclasses.replace(data, labels=labels)
    training, test = local_parts(model.prepare(changed), changed)
    logits(model, test, {n: v + 1 for n, v in model.initialise(0).items()})
    after = update((config, model, training, run[3]), seeded(2))
    assert same(before.delta, after.delta)


class SharedNoise:
    """Its Gaussian does not depend on how many uniforms were drawn before: a coupling of two data sets."""

    private = False

    def __init__(self) -> None:
        self.uniform, self.normal = seeded(3).uniform, seeded(4).normal


def test_the_size_of_the_step_does_not_tell_how_many_patients_there_are() -> None:
    """privacy.md, rule 5: half of the patients, same declared size: the same divisor and the same noise."""
    config, model, data, plan = setting("privacy.noise_multiplier=1000")
    half = LocalData(data.batch, data.labels, data.records_of[: len(data.records_of) // 2])
    everybody = update((config, model, data, plan), SharedNoise())  # type: ignore[arg-type]
    fewer = update((config, model, half, plan), SharedNoise())  # type: ignore[arg-type]
    nobody = update((config, model, LocalData(data.batch, data.labels, []), plan), SharedNoise())  # type: ignore[arg-type]
    bound = (
        2
        * config.privacy.max_grad_norm
        * len(data.records_of)
        * config.training.learning_rate
        / plan.expected_batch
    )
    for other in (fewer, nobody):
        distance = np.sqrt(
            sum(float(np.sum((everybody.delta[n] - other.delta[n]) ** 2)) for n in other.delta)
        )
        assert distance <= bound
        assert other.noise_draws == 1


def test_at_most_k_records_of_a_patient_enter_a_step() -> None:
    config, model, data, plan = setting("privacy.records_per_patient=2", "training.physical_batch_size=3")
    crowded = LocalData(data.batch, data.labels, [np.arange(10), np.arange(10, 13), np.arange(13, 14)])
    seen: list[int] = []
    handle = model.head.register_forward_hook(lambda _m, _i, out: seen.append(len(out)))
    update((config, model, crowded, plan), seeded(5))
    handle.remove()
    assert sum(seen) == 2 + 2 + 1
    assert max(seen) <= 3


class Scripted:
    """A source that answers as told, so that anything chosen elsewhere than from it shows."""

    private = False

    def __init__(self, uniform: float, *, last: bool = True) -> None:
        self.value, self.last, self.uniforms = uniform, last, 0

    def uniform(self, number: int) -> np.ndarray:
        self.uniforms += 1
        return np.full(number, self.value)

    def choose(self, number: int, k: int) -> np.ndarray:
        return np.arange(number - k, number) if self.last else np.arange(k)

    @staticmethod
    def normal(number: int) -> np.ndarray:
        return np.zeros(number)


def records_seen(source: object, *overrides: str, groups: list[np.ndarray]) -> list[int]:
    """Which records enter the steps of one round, by their first feature."""
    config, model, data, plan = setting(*overrides)
    marked = data.batch["features"].clone()
    marked[:, 0] = torch.arange(len(marked))
    crowded = LocalData({"features": marked}, data.labels, groups)
    seen: list[int] = []
    handle = model.head.register_forward_hook(lambda _m, args, _o: seen.extend(args[0][:, 0].int().tolist()))
    update((config, model, crowded, plan), source)  # type: ignore[arg-type]
    handle.remove()
    return seen


def test_the_sample_and_the_k_records_come_from_the_site_s_source_alone() -> None:
    """privacy.md, rules 4 and 8: no global generator, no habit of taking the first."""
    groups = [np.arange(10), np.arange(10, 13), np.arange(13, 14)]
    settings = ["privacy.records_per_patient=2", "training.sample_rate=0.5", "training.steps_per_round=3"]
    nobody, everybody, others = Scripted(0.5), Scripted(0.4999), Scripted(0.0, last=False)
    assert records_seen(nobody, *settings, groups=groups) == []
    assert sorted(records_seen(everybody, *settings, groups=groups)) == sorted([8, 9, 11, 12, 13] * 3)
    assert sorted(records_seen(others, *settings, groups=groups)) == sorted([0, 1, 10, 11, 13] * 3)
    # Every step draws a sample of its own.
    assert nobody.uniforms == everybody.uniforms == 3


def test_a_batch_may_be_as_large_as_it_happens_to_be() -> None:
    """privacy.md, rule 4: a batch cut at a multiple of what is expected is no Poisson sample."""
    groups = [np.array([n]) for n in range(40)]
    seen = records_seen(Scripted(0.0), "training.sample_rate=0.05", groups=groups)
    assert sorted(seen) == list(range(40))


def test_steps_of_a_round_are_sampled_anew() -> None:
    groups = [np.array([n]) for n in range(40)]
    settings = ["training.sample_rate=0.5", "training.steps_per_round=20"]
    times = np.bincount(records_seen(seeded(3), *settings, groups=groups), minlength=40)
    # Twenty draws at 1/2; one sample used twenty times would give 0s and 20s.
    assert times.min() > 0
    assert times.max() < 20


def test_training_refuses_draws_that_delta_cannot_pay_for() -> None:
    """privacy.md, rule 10: before the data is used; a seeded run has no delta to pay with."""
    config, model, data, plan = setting()
    poor = dataclasses.replace(plan, delta=1e-17)
    with pytest.raises(PrivacyError, match="numerical error of"):
        update((config, model, data, poor), operating_system())
    update((config, model, data, poor), seeded(1))


def test_an_unsound_network_is_refused_before_it_is_trained() -> None:
    """privacy.md, rule 6: by training itself, not only by who remembers to ask."""
    config, _, data, plan = setting("model=mlp")
    model = TabularClassifier(config.task, config.model, config.adapter)
    model.hidden = torch.nn.Sequential(model.hidden, torch.nn.BatchNorm1d(config.model.hidden))
    model.built = {}
    with pytest.raises(PrivacyError, match="GroupNorm"):
        update((config, model, data, plan), seeded(0))


def test_the_records_of_a_patient_count_once_however_many_and_however_split() -> None:
    """privacy.md, rule 4: five equal records are combined before clipping, also across physical batches."""
    settings = ["privacy.records_per_patient=5", "privacy.max_grad_norm=0.01"]
    config, model, data, plan = setting(*settings, "training.physical_batch_size=3")
    once, often = (
        LocalData(data.batch, data.labels, [np.repeat(n, times) for n in range(4)]) for times in (1, 5)
    )
    expected = update((config, model, once, plan), Scripted(0.0))  # type: ignore[arg-type]
    got = update((config, model, often, plan), Scripted(0.0))  # type: ignore[arg-type]
    assert same(expected.delta, got.delta, 1e-6)
    assert max(np.abs(values).max() for values in got.delta.values()) > 1e-5


def test_dropout_is_off_while_training() -> None:
    """privacy.md, rule 8: it would be drawn from a generator that anybody may seed."""
    config, _, data, plan = setting("model=mlp")
    model = TabularClassifier(config.task, config.model, config.adapter)
    model.hidden = torch.nn.Sequential(model.hidden, torch.nn.Dropout(0.5))
    model.built = {}
    arrays = {name: values + 0.1 for name, values in model.initialise(0).items()}
    deltas = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        one = train(model, data, arrays, plan=plan, training=config.training, source=seeded(2))
        deltas.append(one.delta)
    assert same(*deltas)


def test_no_held_out_record_is_trained_on_and_none_lies_in_both_parts() -> None:
    config = setting()[0]
    data = read_site(config.task, SITE, seed=0)
    training, test = local_parts({"features": torch.arange(len(data.labels))[:, None]}, data)
    rows = [set(part.batch["features"].flatten().tolist()) for part in (training, test)]
    assert rows[0] == set(np.flatnonzero(~data.test).tolist())
    assert rows[1] == set(np.flatnonzero(data.test).tolist())
    for part in (training, test):
        assert sorted(np.concatenate(part.records_of).tolist()) == list(range(len(part.labels)))


def test_a_step_starts_from_the_arrays_that_were_sent() -> None:
    """privacy.md, rule 7: what an earlier run or another site left in the network does not reach an update."""
    config, model, data, plan = setting("model=mlp")
    arrays = model.initialise(0)
    first = train(model, data, arrays, plan=plan, training=config.training, source=seeded(2))
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    again = train(model, data, arrays, plan=plan, training=config.training, source=seeded(2))
    assert same(first.delta, again.delta)


def test_the_same_process_can_play_many_sites() -> None:
    """privacy.md, rule 7: an optimizer's state, sums or hooks of one site do not reach the next one's update."""
    run = setting("training.optimizer=adam", "training.steps_per_round=3")
    config, model, data, plan = run
    alone = update(run, seeded(5))
    other = LocalData(data.batch, 1 - data.labels, data.records_of[::2])
    update((config, model, other, plan), seeded(6))
    assert same(alone.delta, update(run, seeded(5)).delta)


def test_bf16_is_where_the_layers_compute_and_nowhere_else(hf_overrides: list[str]) -> None:
    updates = {}
    for precision in ("fp32", "bf16"):
        adapter = ["adapter=lora", "adapter.rank=4", "adapter.last_blocks=2", "task=heart"]
        config, model, data, plan = setting(*hf_overrides, *adapter, f"training.precision={precision}")
        seen: set[torch.dtype] = set()
        handle = model.head.register_forward_hook(lambda _layer, _read, out, s=seen: s.add(out.dtype))
        arrays = model.initialise(0)
        draws = np.random.default_rng(0)
        arrays = {name: a + draws.normal(0, 0.1, a.shape).astype(np.float32) for name, a in arrays.items()}
        updates[precision] = train(
            model, data, arrays, plan=plan, training=config.training, source=seeded(3)
        ).delta
        handle.remove()
        assert seen == {torch.float32}
        assert all(delta.dtype == np.float32 for delta in updates[precision].values())
    whole, narrow = (np.concatenate([a.ravel() for a in updates[p].values()]) for p in ("fp32", "bf16"))
    assert 0 < np.linalg.norm(narrow - whole) < 0.05 * np.linalg.norm(whole)


def test_splitting_into_physical_batches_changes_nothing() -> None:
    small, large = (
        update(setting(f"training.physical_batch_size={size}", "privacy.noise_multiplier=0.5"), seeded(6))
        for size in (7, 1000)
    )
    assert same(small.delta, large.delta, 1e-6)


def wrong_names(arrays: Arrays) -> Arrays:
    return {f"{name}x": values for name, values in arrays.items()}


def wrong_shapes(arrays: Arrays) -> Arrays:
    return {name: np.zeros((*values.shape, 2), dtype=np.float32) for name, values in arrays.items()}


@pytest.mark.parametrize("broken", [wrong_names, wrong_shapes])
def test_an_adapter_of_other_names_or_shapes_is_refused(broken: Callable[[Arrays], Arrays]) -> None:
    _, model, _, _ = setting()
    with pytest.raises(ValueError, match="adapter arrays"):
        set_adapter(model, broken(model.initialise(0)))


class Deep(Classifier):
    """A tower whose activations are known: each tanh keeps its output, and each layer after one reads the same."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        steps = [module for _ in range(layers) for module in (torch.nn.Linear(width, width), torch.nn.Tanh())]
        self.tower = torch.nn.Sequential(*steps)
        self.head = torch.nn.Linear(width, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(self.tower(features)).squeeze(-1)


@pytest.mark.parametrize("privacy", ["1", "0"])
def test_pieces_are_as_large_as_a_first_one_shows_that_they_may_be(privacy: str) -> None:
    config, _, _, plan = setting("training.steps_per_round=2", "training.sample_rate=1")
    width = count(256, 512)
    if privacy == "0":
        plan = dataclasses.replace(plan, noise_multiplier=0.0)
    model, data = (
        Deep(10, width),
        LocalData(
            {"features": torch.randn(100, width)}, torch.zeros(100), [np.array([n]) for n in range(100)]
        ),
    )
    arrays = {name: p.detach().numpy().copy() for name, p in model.adapter().items()}
    seen: list[int] = []
    model.head.register_forward_hook(lambda _m, _i, out: seen.append(len(out)))
    with pytest.MonkeyPatch.context() as patch:
        # Of ten activations of `width` floats, twice: about 25 records.
        patch.setattr(training_module, "PIECE_BYTES", 25 * 2 * 11 * 4 * width)
        train(model, data, arrays, plan=plan, training=config.training, source=seeded(0))
        first, second = seen[:2]
        assert first == training_module.FIRST_PIECE
        assert 20 <= second <= 26
        assert sum(seen) == 200
        assert max(seen) == second
        assert seen.count(second) >= 200 // second - 2
        declared = dataclasses.replace(config.training, physical_batch_size=50)
        seen.clear()
        train(model, data, arrays, plan=plan, training=declared, source=seeded(0))
    assert seen == [50] * 4
