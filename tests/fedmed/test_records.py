"""What travels: values that are checked where they arrive, and nothing else."""

import dataclasses
import json
from collections import OrderedDict
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedmed.compose import compose
from fedmed.errors import ConfigError, FedmedError, RunError
from fedmed.metrics import CELLS, ScoreCounts
from fedmed.privacy.histogram import HistogramPlan
from fedmed.privacy.plan import make_plan
from fedmed.records import (
    PROTOCOL,
    Arrays,
    Instruction,
    Quote,
    Receipt,
    array_bytes,
    instruction_record,
    private_scores_record,
    quote_record,
    read_instruction,
    read_private_scores,
    read_quote,
    read_scores,
    read_update,
    scores_record,
    update_record,
)
from fedmed.schema import to_dict

RUNS = {
    "private table": ["model=logistic"],
    "text": ["model=minilm", "adapter=lora"],
    "not private": ["model=mlp", "adapter=full", "privacy=off", "strategy=fedprox"],
    "given noise": ["model=logistic", "privacy.epsilon=null", "privacy.noise_multiplier=2", "task=heart10"],
}


HISTOGRAM = HistogramPlan(unit="patient", bins=10, prevalence=0.5, noise_multiplier=2.5, delta=1e-5)


@lru_cache
def instruction_of(name: str) -> Instruction:
    config = compose([*RUNS[name], "tracking=none", "rounds=3"])
    plans = {site: make_plan(config, site) for site in config.task.declared_sizes}
    return Instruction.of(config, plans, run_id="20261121-101500-run", round=2)


def arrays() -> Arrays:
    """Of the shapes and layouts that adapters have."""
    values = np.arange(12, dtype=np.float32).reshape(3, 4) / 7
    return {"w": values, "transposed": values.T, "scalar": np.array(0.1, np.float32), "none": values[:0]}


def assert_equal(left: Arrays, right: Arrays) -> None:
    assert list(left) == list(right)
    for name, value in left.items():
        assert (value.shape, value.dtype) == (right[name].shape, right[name].dtype)
        assert value.tobytes() == right[name].tobytes()


@pytest.mark.parametrize("name", RUNS)
def test_an_instruction_arrives_as_it_was_sent(name: str) -> None:
    """Every setting of every group, as checked dataclasses, and the arrays to the bit."""
    sent = instruction_of(name)
    got, received = read_instruction(instruction_record(sent, arrays()))
    assert got == sent
    for field in dataclasses.fields(Instruction):
        assert type(getattr(got, field.name)) is type(getattr(sent, field.name))
    assert_equal(received, arrays())
    assert read_instruction(instruction_record(sent)) == (sent, {})


def test_answers_arrive_as_they_were_sent() -> None:
    for quote in (
        Quote(site="St. Mary's", declared_size=7, epsilon=2.5),
        Quote(site="b", declared_size=0, epsilon=None, refusal="plans.b: costs epsilon 4"),
    ):
        assert read_quote(quote_record(quote)) == quote
    receipt = Receipt(site="München", round=3, declared_size=99, noise_draws=1)
    got, received = read_update(update_record(receipt, arrays()))
    assert got == receipt
    assert_equal(received, arrays())
    counts = ScoreCounts(np.random.default_rng(0).integers(0, 9, size=(2, CELLS)))
    site, read = read_scores(scores_record("a", counts))
    assert site == "a"
    assert read.counts.dtype == np.int64
    assert np.array_equal(read.counts, counts.counts)


def test_only_text_and_numbers_travel() -> None:
    """One JSON text a record, in the protocol's version, beside arrays that NumPy reads without pickle."""
    counts = ScoreCounts(np.zeros((2, CELLS), np.int64))
    receipt = Receipt(site="a", round=1, declared_size=9, noise_draws=1)
    records = {
        "instruction": instruction_record(instruction_of("text"), arrays()),
        "quote": quote_record(Quote(site="a", declared_size=9, epsilon=1.0)),
        "receipt": update_record(receipt, arrays()),
        "scores": scores_record("a", counts),
        "private_scores": private_scores_record("a", HISTOGRAM, np.zeros((2, 10))),
    }
    for name, record in records.items():
        assert list(record.config_records) == [name]
        assert not record.metric_records
        assert list(record.config_records[name]) == ["json"]
        text = record.config_records[name]["json"]
        assert isinstance(text, str)
        assert json.loads(text)["protocol"] == PROTOCOL
        for values in record.array_records.values():
            assert {array.stype for array in values.values()} <= {"numpy.ndarray"}


def test_the_bytes_of_a_message_are_those_of_its_arrays() -> None:
    record = instruction_record(instruction_of("text"), arrays())
    assert array_bytes(record) == sum(len(Array(value).data) for value in arrays().values())
    assert array_bytes(instruction_record(instruction_of("text"))) == 0


def rewritten(change: dict[str, Any], *, drop: str = "") -> RecordDict:
    """An instruction whose text has been changed on the way."""
    record = instruction_record(instruction_of("private table"), arrays())
    values = json.loads(str(record.config_records["instruction"]["json"])) | change
    values.pop(drop, None)
    record["instruction"] = ConfigRecord({"json": json.dumps(values)})
    return record


@pytest.mark.parametrize("protocol", [0, PROTOCOL + 1, None, str(PROTOCOL), [PROTOCOL]])
def test_another_protocol_version_is_refused_with_what_to_do(protocol: object) -> None:
    with pytest.raises(
        ConfigError, match=rf"expected {PROTOCOL}; install the same fedmed version at both ends"
    ):
        read_instruction(rewritten({"protocol": protocol}))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Instruction)])
def test_an_instruction_with_a_key_missing_is_refused(name: str) -> None:
    with pytest.raises(FedmedError):
        read_instruction(rewritten({}, drop=name))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a key more": ({"code": "import os"}, "instruction: expected the keys"),
    "a key more in a group": ({"training": {"steps_per_round": 1, "hook": "os.system"}}, r"training\.hook"),
    "another kind": ({"model": {"kind": "pickle"}}, r"model\.kind=pickle"),
    "another type": ({"training": {"steps_per_round": "1"}}, r"training\.steps_per_round='1'"),
    "a truth for a number": ({"training": {"steps_per_round": True}}, r"training\.steps_per_round=True"),
    "out of range": ({"training": {"sample_rate": 2.0}}, r"training\.sample_rate=2\.0"),
    "a plan out of range": ({"plans": {"a": {"rounds": 0}}}, r"plans\.a"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_instruction_that_no_coordinator_of_this_version_sends_is_refused(name: str) -> None:
    change, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        read_instruction(rewritten(change))


def test_a_site_is_not_asked_for_what_is_not_trained() -> None:
    """Sounds are embedded where they are, by whoever sits there."""
    run = [
        "task=sound",
        "task.path=recordings",
        "task.declared_sizes={a: 100}",
        "model=hear",
        "tracking=none",
    ]
    config = compose([*run, f"model.revision={'c' * 40}", f"model.sha256={'a' * 64}"])
    asked = Instruction.of(config, {"a": make_plan(config, "a")}, run_id="x", round=0)
    with pytest.raises(ConfigError, match=r"^task\.kind=sound: expected table or image: "):
        read_instruction(instruction_record(asked, arrays()))


def test_a_message_without_its_record_is_refused() -> None:
    for read in (read_instruction, read_quote, read_update, read_scores, read_private_scores):
        with pytest.raises(RunError, match="is fedmed the same version at both ends"):
            read(RecordDict())  # type: ignore[operator]


@pytest.mark.parametrize(
    "counts",
    [
        np.zeros((2, CELLS - 1), np.int32),
        np.zeros((1, CELLS), np.int32),
        np.zeros((2, CELLS, 1), np.int32),
        np.zeros((2, CELLS), np.float32),
        np.zeros((2, CELLS), np.int64),
        np.full((2, CELLS), -1, np.int32),
    ],
)
def test_counts_that_cannot_be_added_are_refused(counts: np.ndarray) -> None:
    record = scores_record("a", ScoreCounts(np.zeros((2, CELLS), np.int64)))
    record["counts"] = ArrayRecord(OrderedDict(counts=Array(counts)))
    with pytest.raises(RunError, match="score counts are misshapen, of another type or negative"):
        read_scores(record)


def test_a_private_histogram_arrives_as_it_was_drawn() -> None:
    counts = np.random.default_rng(0).normal(size=(2, 10)) * 1e3
    record = private_scores_record("St. Mary's", HISTOGRAM, counts)
    site, plan, read = read_private_scores(record)
    assert (site, plan) == ("St. Mary's", HISTOGRAM)
    assert (read.dtype, read.tobytes()) == (np.dtype(np.float64), counts.tobytes())
    # Neither kind of scores is taken for the other.
    with pytest.raises(RunError, match="a message without 'scores'"):
        read_scores(record)
    with pytest.raises(RunError, match="a message without 'private_scores'"):
        read_private_scores(scores_record("a", ScoreCounts(np.zeros((2, CELLS), np.int64))))


@pytest.mark.parametrize(
    "counts",
    [
        np.zeros((2, 9)), np.zeros((20,)), np.zeros((2, 10, 1)), np.zeros((2, 10), np.float32),
        np.zeros((2, 10), np.int64), np.full((2, 10), np.nan), np.full((2, 10), np.inf),
    ],
)  # fmt: skip
def test_a_private_histogram_that_cannot_be_added_is_refused(counts: np.ndarray) -> None:
    record = private_scores_record("a", HISTOGRAM, counts)
    with pytest.raises(RunError, match="misshapen, of another type or not finite"):
        read_private_scores(record)


PRIVATE_BAD: dict[str, tuple[dict[str, Any], str]] = {
    "marked exact": ({"release": "exact"}, "not marked as a private release"),
    "a key more": ({"counts": [1, 2]}, "expected a site's name, a release and a plan"),
    "no name": ({"site": 3}, "expected a site's name"),
    "a plan with too many bins": ({"plan": to_dict(HISTOGRAM) | {"bins": 40}}, r"histogram\.bins=40"),
    "a plan with a key more": ({"plan": to_dict(HISTOGRAM) | {"seed": 1}}, r"histogram\.seed"),
    "a plan of another type": ({"plan": to_dict(HISTOGRAM) | {"delta": "0"}}, r"histogram\.delta='0'"),
}


@pytest.mark.parametrize("name", PRIVATE_BAD)
def test_private_scores_that_no_site_of_this_version_sends_are_refused(name: str) -> None:
    change, message = PRIVATE_BAD[name]
    record = private_scores_record("a", HISTOGRAM, np.zeros((2, 10)))
    values = json.loads(str(record.config_records["private_scores"]["json"])) | change
    record["private_scores"] = ConfigRecord({"json": json.dumps(values)})
    with pytest.raises(FedmedError, match=message):
        read_private_scores(record)


def test_private_scores_hold_one_array() -> None:
    record = private_scores_record("a", HISTOGRAM, np.zeros((2, 10)))
    record["more"] = ArrayRecord(OrderedDict(counts=Array(np.zeros(3))))
    with pytest.raises(RunError, match="expected one array"):
        read_private_scores(record)
