"""A site in a long-lived process: its data, prepared once, and one round of work at a time."""

import contextlib
import hashlib
import json
import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from fedmed.config import parse
from fedmed.data.dataset import SiteDataset
from fedmed.data.readers import read_site, version_of
from fedmed.devices import device_of
from fedmed.errors import ConfigError, DataError
from fedmed.metrics import ScoreCounts
from fedmed.models.activations import ActivationCache
from fedmed.models.build import build
from fedmed.models.classifier import Batch, Classifier
from fedmed.models.loading import check_digest, locate
from fedmed.privacy.histogram import HistogramPlan, metrics_plans, site_epsilon
from fedmed.privacy.plan import PrivacyPlan, declared_delta
from fedmed.privacy.randomness import RandomSource, operating_system, seeded
from fedmed.records import Arrays, Instruction, Quote
from fedmed.schema import to_dict
from fedmed.task import TaskConfig
from fedmed.training import LocalData, LocalUpdate, local_parts, logits, one_thread, patient_logits, train

log = logging.getLogger("fedmed.site")


@dataclass(frozen=True, kw_only=True)
class Own:
    """What a site's work goes by that no message holds.

    Attributes:
        split_key: of a site that has a folder; None: that of a simulated site, by its name.
        cache: where activations are kept; None: in this process alone.
        device: where networks compute, as `fedmed.devices.device_of` takes it.
    """

    split_key: bytes | None = field(default=None, repr=False)
    cache: ActivationCache | None = None
    device: str = "cpu"


def quote(instruction: Instruction, site: str) -> Quote:
    """What the run would cost this site, computed here; no data is opened.

    Raises:
        FedmedError: the model is not the pinned one, or the plan is not the one that was declared.
    """
    plan = own_plan(instruction, site)
    if instruction.model.pretrained:
        _check_model(json.dumps(to_dict(instruction.model)))
    private = not (instruction.privacy.seeded or instruction.task.declare == "from_data")
    # Refuses what is not worth its epsilon.
    histogram = metrics_plans(instruction.task, instruction.privacy).get(site)
    epsilon = site_epsilon(plan, histogram) if private and plan.noise_multiplier > 0 else None
    return Quote(site=site, declared_size=plan.declared_size, epsilon=epsilon)


def own_plan(instruction: Instruction, site: str) -> PrivacyPlan:
    """The site's plan out of the instruction, held against what the task, the training and privacy declare.

    Raises:
        ConfigError: it is not the declared one, or costs more than was asked for, or the round is not in it.
    """
    plan = instruction.plans.get(site)
    if plan is None:
        raise ConfigError(f"plans: none for site '{site}'")
    declared = {
        "unit": instruction.task.unit,
        "declared_size": instruction.task.declared_train(site),
        "sample_rate": instruction.training.sample_rate,
        "steps_per_round": instruction.training.steps_per_round,
        "records_per_patient": instruction.privacy.records_per_patient,
        "max_grad_norm": instruction.privacy.max_grad_norm,
        "delta": declared_delta(instruction.task, instruction.privacy, site),
    }
    if instruction.privacy.kind == "off":
        declared["noise_multiplier"] = 0.0
    elif instruction.privacy.noise_multiplier is not None:
        declared["noise_multiplier"] = instruction.privacy.noise_multiplier
    for name, value in declared.items():
        if getattr(plan, name) != value:
            raise ConfigError(f"plans.{site}.{name}={getattr(plan, name)}: expected {value}, as declared")
    if instruction.privacy.kind == "dp":
        if plan.noise_multiplier == 0:
            raise ConfigError(f"plans.{site}.noise_multiplier=0: expected > 0 with privacy=dp")
        asked = instruction.privacy.epsilon
        if asked is not None and _epsilon(plan) > asked:
            raise ConfigError(f"plans.{site}: costs epsilon {_epsilon(plan)}, the run asked for {asked}")
    if instruction.round > plan.rounds:
        raise ConfigError(f"round={instruction.round}: expected at most plans.{site}.rounds={plan.rounds}")
    return plan


@lru_cache(maxsize=64)
def _epsilon(plan: PrivacyPlan) -> float:
    return plan.epsilon()


@contextlib.contextmanager
def _full_memory_named() -> Iterator[None]:
    """Say in the site's log what to do where an accelerator's memory did not suffice."""
    try:
        yield
    except torch.OutOfMemoryError:
        log.error(
            "the accelerator's memory is full: end what else uses it (nvidia-smi), or set device: cpu for this site"
        )
        raise


@_full_memory_named()
def load(instruction: Instruction, own: Own) -> None:
    """Load the model, which reads no data."""
    _model(instruction, own)


def pseudonyms(instruction: Instruction, site: str, split_key: bytes) -> tuple[bytes, ...]:
    """The keyed hashes of all patients of the site's data; none where it names no patients. They never leave."""
    return _pseudonyms(*_key(instruction, site), site, split_key)


@lru_cache(maxsize=16)
def _pseudonyms(key: str, version: tuple[int, ...], site: str, split_key: bytes) -> tuple[bytes, ...]:
    del version
    return _read(parse("task", json.loads(key)["task"]), site, 0, split_key).pseudonyms


@_full_memory_named()
def work(instruction: Instruction, site: str, arrays: Arrays, own: Own = Own()) -> LocalUpdate:
    """One round of training at this site."""
    one_thread()
    plan = own_plan(instruction, site)
    if instruction.round < 1:
        raise ConfigError(f"round={instruction.round}: expected >= 1; round 0 trains nothing")
    training, _ = _parts(instruction, site, own)
    return train(
        _model(instruction, own),
        training,
        arrays,
        plan=plan,
        training=instruction.training,
        source=_source(instruction, site),
        proximal_mu=instruction.proximal_mu,
    )


@_full_memory_named()
def score(instruction: Instruction, site: str, arrays: Arrays, own: Own = Own()) -> ScoreCounts:
    """Exact score counts on the held-out patients: not covered by epsilon.

    Raises:
        ConfigError: the run declares another kind of metrics.
    """
    one_thread()
    own_plan(instruction, site)
    if instruction.privacy.metrics != "exact":
        raise ConfigError(f"privacy.metrics={instruction.privacy.metrics}: expected exact for exact counts")
    _, test = _parts(instruction, site, own)
    return ScoreCounts.of(logits(_model(instruction, own), test, arrays), test.labels.numpy())


@_full_memory_named()
def private_score(
    instruction: Instruction, site: str, arrays: Arrays, own: Own = Own()
) -> tuple[HistogramPlan, NDArray[np.float64]]:
    """A noisy histogram of the held-out patients' scores, drawn once a run: asked again, the same one.

    It is remembered as long as this process lives; a site with a ledger remembers it for good.

    Raises:
        ConfigError: the run declares another kind of metrics, or has been given metrics of another adapter.
    """
    one_thread()
    own_plan(instruction, site)
    if instruction.privacy.metrics != "private":
        raise ConfigError(f"privacy.metrics={instruction.privacy.metrics}: expected private for a histogram")
    plan = metrics_plans(instruction.task, instruction.privacy)[site]
    asked = plan, _digest(instruction, arrays)
    key = instruction.run_id, site
    if key not in _drawn:
        _, test = _parts(instruction, site, own)
        found = patient_logits(_model(instruction, own), test, arrays).astype(np.float64)
        probabilities = 1 / (1 + np.exp(-np.clip(found, -700, 700)))
        counts = plan.count(probabilities, test.labels.numpy(), test.records_of)
        _drawn[key] = asked, plan.release(counts, _source(instruction, site))
    before, drawn = _drawn[key]
    if before != asked:
        raise ConfigError("private metrics were drawn for another adapter of this run: once per run")
    return plan, drawn


# What was drawn, by run and site, and what for.
_drawn: dict[tuple[str, str], tuple[tuple[HistogramPlan, str], NDArray[np.float64]]] = {}


def _digest(instruction: Instruction, arrays: Arrays) -> str:
    """What a histogram depends on besides the records."""
    digest = hashlib.sha256(f"{_configuration(instruction)} {instruction.seed}".encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape} {arrays[name].dtype}".encode() + arrays[name].tobytes())
    return digest.hexdigest()


def _source(instruction: Instruction, site: str) -> RandomSource:
    """The operating system's generator; a seed only where the run is NOT PRIVATE by declaration."""
    if instruction.privacy.kind == "dp" and not instruction.privacy.seeded:
        return operating_system()
    return seeded(instruction.seed, zlib.crc32(site.encode()), instruction.round)


def _model(instruction: Instruction, own: Own) -> Classifier:
    model = build(instruction.task, instruction.model, instruction.adapter, device=device_of(own.device))
    # Frozen random matrices are not sent: the seed gives them.
    model.initialise(instruction.seed)
    return model


def _key(instruction: Instruction, site: str) -> tuple[str, tuple[int, ...]]:
    """What prepared records depend on: the configuration, and the data as it is now. A patient who was taken
    out of it takes part no more."""
    return _configuration(instruction), version_of(instruction.task, site)


def _configuration(instruction: Instruction) -> str:
    parts = {name: to_dict(getattr(instruction, name)) for name in ("task", "model", "adapter")}
    return json.dumps(parts)


def _parts(instruction: Instruction, site: str, own: Own) -> tuple[LocalData, LocalData]:
    # A site that computes each patient by itself does so from the first layer on.
    alone = instruction.training.physical_batch_size == 1
    return _split(*_key(instruction, site), site, instruction.seed, own, alone)


@lru_cache(maxsize=64)
def _split(
    key: str,
    version: tuple[int, ...],
    site: str,
    seed: int,
    own: Own,
    alone: bool,
) -> tuple[LocalData, LocalData]:
    task = parse("task", json.loads(key)["task"])
    batch, content = _prepared(key, version, site, own, alone)
    data = _read(task, site, seed, own.split_key)
    if data.manifest.content_sha256 != content:
        # One patient's rows would stand beside another one's labels.
        raise DataError("the data was replaced while it was read; ask again")
    return local_parts(batch, data)


@lru_cache(maxsize=16)
def _prepared(
    key: str,
    version: tuple[int, ...],
    site: str,
    own: Own,
    alone: bool,
) -> tuple[Batch, str]:
    """The site's records as the model reads them, kept between rounds and runs: the frozen part of the model is
    computed once. It does not depend on the split, and so not on the seed. Beside it the content that it is of."""
    del version
    parts = json.loads(key)
    task, model, adapter = (parse(name, parts[name]) for name in ("task", "model", "adapter"))
    data = _read(task, site, 0, own.split_key)
    network = build(task, model, adapter, device=device_of(own.device))
    batch = network.prepare(data, cache=own.cache, alone=alone)
    return batch, data.manifest.content_sha256


def _read(task: TaskConfig, site: str, seed: int, split_key: bytes | None) -> SiteDataset:
    # Whether there is anyone to train on is data: a site with a folder of its own then answers with noise.
    data = read_site(task, site, seed=seed, key=split_key, maybe_empty=split_key is not None)
    if data.test.all() or not data.test.any():
        log.warning(
            "no usable patient to train on, or none to hold out: does the run's declaration fit the table?"
        )
    return data


@lru_cache(maxsize=8)
def _check_model(model_json: str) -> None:
    model = parse("model", json.loads(model_json))
    check_digest(model, locate(model))
