"""What a run would cost, before it starts: epsilon, noise and steps of each site, bytes, memory, seconds a step."""

import dataclasses
import math
import time
from typing import Any

import numpy as np
import psutil

from fedmed.config import RunConfig, StrategyConfig
from fedmed.data.readers import made_up
from fedmed.devices import device_of
from fedmed.models.build import build
from fedmed.privacy.plan import PrivacyPlan, check_sampler, make_plan
from fedmed.privacy.randomness import seeded
from fedmed.records import Instruction, array_bytes, instruction_record
from fedmed.resources import peak_resident
from fedmed.training import local_parts, one_thread, train
from strategies import build as build_strategy
from strategies.base import Arrays
from strategies.summary import privacy_statement

TIMED_STEPS = 3
SITE_PAYLOADS = 3


def forecast(config: RunConfig) -> dict[str, Any]:
    """The forecast of a run. No record is opened: the step is timed on made-up records of the declared sizes."""
    one_thread()
    plans = {site: make_plan(config, site) for site in config.task.declared_sizes}
    model = build(config.task, config.model, config.adapter)
    if config.private:
        check_sampler(plans.values(), parameters=model.trainable)
    instruction = Instruction.of(config, plans, run_id="forecast", round=1)
    arrays = model.initialise(config.seed)
    # Both ways the same arrays, as they travel: headers too.
    size = array_bytes(instruction_record(instruction, arrays))
    held = coordinator_payloads(config.strategy, arrays, sites=len(plans))
    coordinator = psutil.Process().memory_info().rss + held * size
    largest = max(plans.values(), key=lambda plan: plan.declared_size)
    prepare, step = _measure(config, largest)
    return {
        "privacy": privacy_statement(config, plans),
        "rounds": config.rounds,
        "steps_per_round": config.training.steps_per_round,
        "bytes_up_per_round": size * len(plans),
        "bytes_down_per_round": size * len(plans),
        "memory": {
            "payload_mb": size / 1e6,
            "coordinator_payloads": held,
            "all_updates_at_once": not build_strategy(config.strategy).weighted_sum,
            "coordinator_mb": coordinator / 1e6,
            # Beside what training takes: the message, the reply, and the copy of it that the ledger keeps.
            "site_mb": (peak_resident() + SITE_PAYLOADS * size) / 1e6,
        },
        "seconds": {
            "step": step,
            "prepare": prepare,
            "training_per_site": step * config.training.steps_per_round * config.rounds,
        },
    }


def coordinator_payloads(strategy: StrategyConfig, arrays: Arrays, *, sites: int) -> float:
    """How many times the adapter's bytes a round holds in memory at the coordinator, at most.

    While replies come in: the global adapter, whose message shares its bytes, and one reply, whole and in pieces. While
    they are aggregated: the adapter before and after, and one array of the strategy's new state.
    """
    kind = build_strategy(strategy)
    largest = max(values.size for values in arrays.values()) / sum(values.size for values in arrays.values())
    # A strategy's state has twice the bytes: float64.
    state = 2.0 * kind.moments
    updates = 0 if kind.weighted_sum else sites
    return max(3, 2 + state * largest + updates) + state + strategy.average_last - 1


def _measure(config: RunConfig, plan: PrivacyPlan) -> tuple[float, float]:
    """Seconds to prepare a site once, and median seconds of one training step, on this machine: one core, or its
    accelerator."""
    expected = max(1, math.ceil(plan.expected_batch))
    # Preparing is linear in the records: a sample of them is enough.
    records = min(plan.declared_size, max(expected, 32))
    data = made_up(config.task, records)
    model = build(config.task, config.model, config.adapter, device=device_of(config.federation.device))
    began = time.perf_counter()
    training, _ = local_parts(model.prepare(data), data)
    prepare = (time.perf_counter() - began) * plan.declared_size / records
    arrays = model.initialise(config.seed)
    one_step = dataclasses.replace(plan, steps_per_round=1, sample_rate=1.0)
    training.records_of[expected:] = []
    seconds = []
    for index in range(TIMED_STEPS):
        began = time.perf_counter()
        train(model, training, arrays, plan=one_step, training=config.training, source=seeded(index))
        seconds.append(time.perf_counter() - began)
    return prepare, float(np.median(seconds))
