"""What every strategy holds to, whatever its idea; and each is the one that Flower has under that name."""

import copy
import dataclasses
import itertools
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

import configs
from fedmed.compose import compose
from fedmed.config import StrategyConfig
from fedmed.flower.in_process import InProcessGrid
from strategies import STRATEGIES, Strategy, Update, build
from strategies.base import Arrays
from strategies.folder import Progress, RunFolder
from strategies.spool import Spool

SHAPES = {"head.weight": (1, 5), "head.bias": (1,), "block.lora_A": (3, 4), "scale": ()}
SITES = {"b site": 132, "a": 7, "C": 201}
OPTIONS = sorted(path.stem for path in (Path(configs.__file__).parent / "strategy").glob("*.yaml"))


def test_the_registry_is_what_can_be_configured() -> None:
    """None is forgotten by the suite below, and none can be named without being built."""
    assert OPTIONS
    assert sorted(STRATEGIES) == OPTIONS


@lru_cache
def config_of(kind: str) -> StrategyConfig:
    """The strategy's settings as `strategy=KIND` gives them."""
    config = compose([f"strategy={kind}", "tracking=none"]).strategy
    assert isinstance(config, StrategyConfig)
    assert config.kind == kind
    return config


@pytest.fixture(params=sorted(STRATEGIES))
def make(request: pytest.FixtureRequest) -> Callable[[], Strategy]:
    config = config_of(request.param)
    return lambda: build(config)


def draw(rng: np.random.Generator, scale: float = 1.0) -> Arrays:
    return {
        name: (scale * rng.normal(size=shape)).astype(np.float32).reshape(shape)
        for name, shape in SHAPES.items()
    }


def draw_updates(rng: np.random.Generator) -> dict[str, Update]:
    return {site: Update(draw(rng, 0.1), size) for site, size in SITES.items()}


def assert_equal(left: Arrays, right: Arrays) -> None:
    """The same names, and the same bits."""
    assert left.keys() == right.keys()
    for name, values in left.items():
        assert values.tobytes() == right[name].tobytes(), name
        assert values.shape == right[name].shape


def test_names_shapes_and_type_are_kept(make: Callable[[], Strategy]) -> None:
    rng, strategy = np.random.default_rng(1), make()
    arrays = draw(rng)
    for _ in range(3):
        arrays = strategy.aggregate(arrays, draw_updates(rng))
        assert all(isinstance(values, np.ndarray) for values in arrays.values())
        assert {name: values.shape for name, values in arrays.items()} == SHAPES
        assert all(values.dtype == np.float32 for values in arrays.values())
        assert all(np.isfinite(values).all() for values in arrays.values())


def test_the_order_in_which_replies_came_changes_no_bit(make: Callable[[], Strategy]) -> None:
    """Whatever the order, also where the sum of numbers depends on it: 1e20 - 1e20 + 1 is 1, 1 + 1e20 - 1e20 is 0."""
    arrays = draw(np.random.default_rng(2))
    sent = {site: {name: np.full(shape, size, np.float32) for name, shape in SHAPES.items()}
            for site, size in (("a", 1e20), ("b", 1.0), ("c", -1e20))}  # fmt: skip
    results = []
    for order in itertools.permutations(sent):
        strategy, result = make(), arrays
        for _ in range(2):
            result = strategy.aggregate(result, {site: Update(sent[site], 3) for site in order})
        results.append(result)
    assert len(results) == 6
    for result in results[1:]:
        assert_equal(result, results[0])


def test_only_the_ratio_of_declared_sizes_weighs(make: Callable[[], Strategy]) -> None:
    """Twice every size changes nothing; another ratio does."""
    rng = np.random.default_rng(3)
    arrays, updates = draw(rng), draw_updates(rng)
    doubled = {site: Update(update.delta, 2 * update.weight) for site, update in updates.items()}
    equal = {site: Update(update.delta, 1) for site, update in updates.items()}
    result = make().aggregate(arrays, updates)
    assert_equal(result, make().aggregate(arrays, doubled))
    assert any((result[name] != values).any() for name, values in make().aggregate(arrays, equal).items())


def test_zero_updates_leave_the_arrays_as_they_are(make: Callable[[], Strategy]) -> None:
    arrays, strategy = draw(np.random.default_rng(4)), make()
    nothing = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    for _ in range(3):
        result = strategy.aggregate(arrays, {site: Update(nothing, size) for site, size in SITES.items()})
        assert_equal(result, arrays)


def test_inputs_are_not_changed(make: Callable[[], Strategy]) -> None:
    rng, strategy = np.random.default_rng(5), make()
    arrays = draw(rng)
    for _ in range(3):
        updates = draw_updates(rng)
        kept, kept_updates, kept_state = copy.deepcopy((arrays, updates, strategy.state()))
        state = strategy.state()
        result = strategy.aggregate(arrays, updates)
        assert_equal(arrays, kept)
        for site, update in updates.items():
            assert_equal(update.delta, kept_updates[site].delta)
        assert {k: v.tobytes() for k, v in state.items()} == {k: v.tobytes() for k, v in kept_state.items()}
        for name, values in result.items():
            assert not np.shares_memory(values, arrays[name])
        arrays = result


@pytest.mark.parametrize("through_folder", [False, True])
def test_a_restored_strategy_goes_on_bit_by_bit(
    make: Callable[[], Strategy], through_folder: bool, tmp_path: Path
) -> None:
    """A new process after every round, as if each had been killed, gives what one process gives."""
    rng = np.random.default_rng(6)
    start = draw(rng)
    rounds = [draw_updates(rng) for _ in range(6)]
    unbroken, whole = make(), start
    for updates in rounds:
        whole = unbroken.aggregate(whole, updates)

    folder = RunFolder(tmp_path)
    progress = Progress(round=0, arrays=start)
    for number, updates in enumerate(rounds, start=1):
        strategy = make()
        if progress.state:
            strategy.restore(progress.state)
        arrays = strategy.aggregate(progress.arrays, updates)
        progress = Progress(round=number, arrays=arrays, state=copy.deepcopy(strategy.state()))
        if through_folder:
            folder.save(progress)
            loaded = folder.load()
            assert loaded is not None
            progress = loaded
    assert_equal(progress.arrays, whole)


def test_one_site_s_update_is_applied_as_it_is() -> None:
    """FedAvg of one site is that site's own training, whatever its size."""
    rng = np.random.default_rng(7)
    arrays, update = draw(rng), draw(rng)
    for size in (1, 3, 607):
        result = build(config_of("fedavg")).aggregate(arrays, {"a": Update(update, size)})
        assert_equal(result, {name: arrays[name] + update[name] for name in arrays})


def flower_s(kind: str, config: StrategyConfig) -> flower.FedAvg:
    """Flower's strategy of that name under the same settings."""
    moments = {"eta": config.learning_rate, "tau": config.tau}
    betas = {"beta_1": config.beta_1, "beta_2": config.beta_2}
    theirs: dict[str, Callable[[], flower.FedAvg]] = {
        "fedavg": flower.FedAvg,
        "fedprox": lambda: flower.FedProx(proximal_mu=config.proximal_mu),
        "fedavgm": lambda: flower.FedAvgM(
            server_learning_rate=config.learning_rate, server_momentum=config.momentum
        ),
        "fedadam": lambda: flower.FedAdam(**moments, **betas),
        "fedyogi": lambda: flower.FedYogi(**moments, **betas),
        "fedadagrad": lambda: flower.FedAdagrad(**moments),
    }
    return theirs[kind]()


# Beside the defaults: settings at which each of them counts.
OTHER: dict[str, dict[str, float]] = {
    "fedavgm": {"learning_rate": 0.3, "momentum": 0.5},
    "fedadam": {"learning_rate": 0.02, "beta_1": 0.6, "beta_2": 0.8, "tau": 0.05},
    "fedyogi": {"learning_rate": 0.02, "beta_1": 0.6, "beta_2": 0.8, "tau": 0.05},
    "fedadagrad": {"learning_rate": 0.02, "tau": 0.05},
}


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("kind", sorted(STRATEGIES))
def test_it_is_flower_s_strategy_of_that_name(kind: str, other: bool) -> None:
    """The reference is flwr.serverapp.strategy, given whole models where fedmed's sites send differences."""
    config = dataclasses.replace(config_of(kind), **(OTHER.get(kind, {}) if other else {}))
    ours, theirs = build(config), flower_s(kind, config)
    rng = np.random.default_rng(8)
    arrays = draw(rng)
    model = {name: values.astype(np.float64) for name, values in arrays.items()}
    # It lends messages their identity; nothing is sent through it.
    grid = InProcessGrid(lambda **_: None, nodes=len(SITES))  # type: ignore[arg-type]
    for number in range(1, 6):
        updates = draw_updates(rng)
        sent = theirs.configure_train(number, record(model), ConfigRecord(), grid)
        replies = [
            reply_to(message, {name: model[name] + update.delta[name] for name in model}, update.weight)
            for message, update in zip(sent, updates.values(), strict=True)
        ]
        aggregated, _ = theirs.aggregate_train(number, replies)
        assert aggregated is not None
        model = {name: array.numpy() for name, array in aggregated.items()}
        arrays = ours.aggregate(arrays, updates)
        for name, values in arrays.items():
            np.testing.assert_allclose(values, model[name], rtol=0, atol=1e-6)
    # A silent oracle would prove nothing: the model has moved by more than the tolerance.
    assert any(
        (np.abs(model[name] - values) > 1e-3).any() for name, values in draw(np.random.default_rng(8)).items()
    )


def record(arrays: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(values)) for name, values in arrays.items()})


def reply_to(message: Message, arrays: dict[str, np.ndarray], weight: float) -> Message:
    assert message.metadata.message_type == MessageType.TRAIN
    content = RecordDict({"arrays": record(arrays), "metrics": MetricRecord({"num-examples": weight})})
    return Message(content, reply_to=message)


# The slow, obvious way: whole arrays, one site after the other.


def whole_mean(updates: dict[str, Update]) -> dict[str, np.ndarray]:
    total = sum(update.weight for update in updates.values())
    mean: dict[str, np.ndarray] = {}
    for site in sorted(updates):
        share = updates[site].weight / total
        for name, values in updates[site].delta.items():
            term = share * values.astype(np.float64)
            mean[name] = mean[name] + term if name in mean else term
    return mean


def whole_step(
    kind: str, config: StrategyConfig, mean: np.ndarray, kept: dict[str, np.ndarray], round: int
) -> Any:
    """The step of an array by the published formulas; `kept` is the state of that array."""
    if kind in ("fedavg", "fedprox"):
        return mean
    if kind == "fedavgm":
        kept["v"] = config.momentum * kept.get("v", 0.0) + mean
        return config.learning_rate * kept["v"]
    b1, b2, zero = config.beta_1, config.beta_2, np.zeros_like(mean)
    m, v = kept.get("m", zero), kept.get("v", zero)
    kept["m"] = b1 * m + (1 - b1) * mean
    squared = mean**2
    kept["v"] = {
        "fedadam": lambda: b2 * v + (1 - b2) * squared,
        "fedyogi": lambda: v - (1 - b2) * squared * np.sign(v - squared),
        "fedadagrad": lambda: v + squared,
    }[kind]()
    rate = config.learning_rate
    if kind == "fedadam":
        t = round + 1
        rate = float(rate * (np.sqrt(1 - b2**t) / (1 - b1**t)))
    return rate * kept["m"] / (np.sqrt(kept["v"]) + config.tau)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("kind", sorted(STRATEGIES))
def test_block_by_block_gives_the_bits_of_whole_arrays(
    kind: str, on_disk: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In blocks that end within arrays, from replies in memory or on disk, over several rounds."""
    monkeypatch.setattr("strategies.base.BLOCK", 5)
    config, strategy = config_of(kind), build(config_of(kind))
    rng = np.random.default_rng(11)
    arrays = expected = draw(rng)
    kept: dict[str, dict[str, np.ndarray]] = {name: {} for name in SHAPES}
    for number in range(1, 5):
        updates = draw_updates(rng)
        mean = whole_mean(updates)
        expected = {
            name: np.asarray(values + whole_step(kind, config, mean[name], kept[name], number), np.float32)
            for name, values in expected.items()
        }
        if on_disk:
            spool = Spool(tmp_path / "replies", "asked", list(SITES))
            for site, update in updates.items():
                spool.add(site, dict(update.delta))
            updates = spool.updates(SITES)
        arrays = strategy.aggregate(arrays, updates)
        assert_equal(arrays, expected)
