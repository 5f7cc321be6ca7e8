"""Between fedmed's values and Flower's records: the only serialiser.

Messages carry values, never code: configuration as JSON text that is parsed into checked dataclasses, and
arrays. A message of another protocol version is refused.
"""

import dataclasses
import hashlib
import io
import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedmed.config import (
    AdapterConfig,
    PrivacyConfig,
    RunConfig,
    TrainingConfig,
    parse,
)
from fedmed.errors import ConfigError, RunError, require
from fedmed.metrics import CELLS, ScoreCounts
from fedmed.model import ModelConfig
from fedmed.privacy.histogram import HistogramPlan
from fedmed.privacy.plan import PrivacyPlan
from fedmed.schema import from_dict, to_dict, type_in_words
from fedmed.task import TaskConfig

PROTOCOL = 1
Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """What a site is asked to do in a round. Round 0 asks for a quote: nothing is trained, no data is opened."""

    run_id: str
    round: int
    seed: int
    proximal_mu: float
    task: TaskConfig
    model: ModelConfig
    adapter: AdapterConfig
    privacy: PrivacyConfig
    training: TrainingConfig
    # One plan a site, by the site's name.
    plans: dict[str, PrivacyPlan]

    @classmethod
    def of(
        cls, config: RunConfig, plans: Mapping[str, PrivacyPlan], *, run_id: str, round: int
    ) -> "Instruction":
        """The instruction of a run's round."""
        return cls(
            run_id=run_id,
            round=round,
            seed=config.seed,
            proximal_mu=float(config.strategy.proximal_mu),
            task=config.task,
            # What is written about a model is for people: two runs that differ in it alone are the same to a site.
            model=config.model.bare() if config.model.pretrained else config.model,
            adapter=config.adapter,
            privacy=config.privacy,
            training=config.training,
            plans=dict(plans),
        )


@dataclass(frozen=True, kw_only=True)
class Quote:
    """A site's answer to round 0: what the run would cost it by its own accounting, or why it refuses."""

    site: str
    declared_size: int
    # None where the run adds no noise.
    epsilon: float | None
    refusal: str | None = None
    # Why the run has to wait, where a person at the site must approve it first.
    waiting: str | None = None


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What stands beside a site's update: public values only."""

    site: str
    round: int
    declared_size: int
    noise_draws: int


def instruction_record(instruction: Instruction, arrays: Arrays | None = None) -> RecordDict:
    """The content of a message to a site."""
    values = {
        field.name: getattr(instruction, field.name)
        for field in dataclasses.fields(Instruction)
        if field.name not in ("task", "model", "adapter", "privacy", "training", "plans")
    }
    for group in ("task", "model", "adapter", "privacy", "training"):
        values[group] = to_dict(getattr(instruction, group))
    values["plans"] = {site: to_dict(plan) for site, plan in instruction.plans.items()}
    return _record("instruction", values, arrays)


def read_instruction(content: RecordDict) -> tuple[Instruction, Arrays]:
    """The instruction of a message and its arrays.

    Raises:
        ConfigError: another protocol version, a missing or unknown key, a value out of range.
    """
    values = _values("instruction", content)
    names = {field.name for field in dataclasses.fields(Instruction)}
    if values.keys() != names:
        raise ConfigError(f"instruction: expected the keys {', '.join(sorted(names))}")
    for name, expected in {"run_id": str, "round": int, "seed": int, "proximal_mu": float}.items():
        # Exactly: NaN, 1.5 and true slip through comparisons with a whole number.
        if type(values[name]) is not expected:
            raise ConfigError(f"instruction.{name}: expected {type_in_words(expected)}")
    # A person at a site reads it on a terminal, and the ledger keeps it.
    word = 0 < len(values["run_id"]) <= 200 and values["run_id"].isprintable()
    require(word, "instruction.run_id", "…", "1 to 200 printable characters")
    require(0 <= values["proximal_mu"] < math.inf, "instruction.proximal_mu", values["proximal_mu"], ">= 0")
    for group in ("task", "model", "adapter", "privacy"):
        values[group] = parse(group, values[group])
    require(
        values["task"].trained, "task.kind", values["task"].kind, "table or image: no run trains on others"
    )
    values["training"] = from_dict(TrainingConfig, values["training"], where="training")
    # A run fills it in; without it training would fail after data was opened.
    rate = values["training"].learning_rate
    require(rate is not None, "instruction.training.learning_rate", "null", "a number > 0")
    values["plans"] = {
        site: from_dict(PrivacyPlan, plan, where=f"plans.{site}") for site, plan in values["plans"].items()
    }
    return Instruction(**values), arrays_of(content)


def quote_record(quote: Quote) -> RecordDict:
    """The content of a site's answer to round 0."""
    return _record("quote", to_dict(quote))


def read_quote(content: RecordDict) -> Quote:
    """A site's answer to round 0."""
    return from_dict(Quote, _values("quote", content), where="quote")


def update_record(receipt: Receipt, delta: Arrays) -> RecordDict:
    """The content of a site's reply to a round: the adapter's change and its receipt."""
    return _record("receipt", to_dict(receipt), delta)


def read_update(content: RecordDict) -> tuple[Receipt, Arrays]:
    """A site's receipt and the change of its adapter."""
    return from_dict(Receipt, _values("receipt", content), where="receipt"), arrays_of(content)


def scores_record(site: str, counts: ScoreCounts) -> RecordDict:
    """The content of a site's evaluation, marked as an exact release."""
    record = _record("scores", {"site": site, "release": "exact"})
    record["counts"] = ArrayRecord(OrderedDict(counts=Array(counts.counts.astype(np.int32))))
    return record


def read_scores(content: RecordDict) -> tuple[str, ScoreCounts]:
    """A site's name and its exact score counts."""
    site = _values("scores", content)["site"]
    counts = _array(_arrays(content, "counts")["counts"])
    if counts.shape != (2, CELLS) or counts.dtype != np.int32 or (counts < 0).any():
        raise RunError("score counts are misshapen, of another type or negative")
    return site, ScoreCounts(counts.astype(np.int64))


def private_scores_record(site: str, plan: HistogramPlan, counts: NDArray[np.float64]) -> RecordDict:
    """The content of a site's private evaluation: the noisy histogram and the plan that it was drawn by."""
    record = _record("private_scores", {"site": site, "release": "private", "plan": to_dict(plan)})
    record["histogram"] = ArrayRecord(OrderedDict(counts=Array(counts)))
    return record


def read_private_scores(content: RecordDict) -> tuple[str, HistogramPlan, NDArray[np.float64]]:
    """A site's name, its plan and its noisy histogram.

    Raises:
        ConfigError: a plan out of range.
        RunError: another release, or counts that are misshapen, of another type or not finite.
    """
    values = _values("private_scores", content)
    if values.keys() != {"site", "release", "plan"} or type(values["site"]) is not str:
        raise RunError("private scores: expected a site's name, a release and a plan")
    if values["release"] != "private":
        raise RunError("private scores that are not marked as a private release")
    plan = from_dict(HistogramPlan, values["plan"], where="histogram")
    arrays = [name for name, record in content.items() if isinstance(record, ArrayRecord)]
    if arrays != ["histogram"] or list(_arrays(content, "histogram")) != ["counts"]:
        raise RunError("private scores: expected one array")
    counts = _array(_arrays(content, "histogram")["counts"])
    good = isinstance(counts, np.ndarray) and counts.dtype == np.float64 and counts.shape == (2, plan.bins)
    if not good or not np.isfinite(counts).all():
        raise RunError("a private histogram is misshapen, of another type or not finite")
    return values["site"], plan, counts


def ended_record(run: str) -> RecordDict:
    """The content of a site's answer to the end of a run."""
    return _record("ended", {"run": run})


def read_ended(content: RecordDict) -> str:
    """The run that a site has put away."""
    return str(_values("ended", content)["run"])


def head_record(digest: str, signature: str, drawn: int | None) -> ConfigRecord:
    """What a site's ledger ends with: its coordinator keeps it, so that a later truncation shows.

    Args:
        drawn: how many rounds of the run that the reply belongs to were charged, so that the coordinator says the same.
    """
    record = ConfigRecord({"head": digest, "signature": signature})
    if drawn is not None:
        record["drawn"] = drawn
    return record


def read_drawn(content: RecordDict) -> int | None:
    """How many rounds of the run its site's ledger was charged for; None where the reply does not say."""
    record = _texts(content, "ledger")
    drawn = None if record is None else record.get("drawn")
    if drawn is None:
        return None
    if type(drawn) is not int or drawn < 0:
        raise RunError("a malformed ledger receipt")
    return drawn


def read_head(content: RecordDict) -> tuple[str, str] | None:
    """The ledger's head in a reply: its hash and the site's signature; None from a site without a ledger."""
    record = _texts(content, "ledger")
    if record is None:
        return None
    head, signature = record.get("head"), record.get("signature")
    if not (
        isinstance(head, str) and isinstance(signature, str) and len(head) == 64 and len(signature) <= 512
    ):
        raise RunError("a malformed ledger receipt")
    return head, signature


def digest(content: RecordDict) -> str:
    """A sha256 over everything in a message's content, the same for equal contents."""
    found = hashlib.sha256()
    for part in _parts(content):
        found.update(part)
    return found.hexdigest()


def to_bytes(content: RecordDict) -> bytes:
    """The content as bytes: a header in JSON on a line of its own, then the arrays' bytes in its order.

    Raises:
        RunError: it holds records of another kind than texts and arrays.
    """
    return b"".join(_parts(content))


def _parts(content: RecordDict) -> Iterator[bytes]:
    header: list[Any] = []
    parts: list[bytes] = []
    for name, record in sorted(content.items()):
        if isinstance(record, ConfigRecord):
            header.append([name, dict(record)])
        elif isinstance(record, ArrayRecord):
            header.append(
                [name, [[k, a.dtype, list(a.shape), a.stype, len(a.data)] for k, a in record.items()]]
            )
            parts += [array.data for array in record.values()]
        else:
            raise RunError(f"a message holds a {type(record).__name__}")
    yield json.dumps(header, sort_keys=True, allow_nan=False).encode()
    yield b"\n"
    yield from parts


def from_bytes(data: bytes) -> RecordDict:
    """The content that `to_bytes` was given."""
    at = data.index(b"\n") + 1
    content = RecordDict()
    for name, values in json.loads(data[: at - 1]):
        if isinstance(values, dict):
            content[name] = ConfigRecord(values)
            continue
        arrays = OrderedDict()
        for key, dtype, shape, stype, size in values:
            # Each is copied once: what remains is not.
            arrays[key] = Array(dtype=dtype, shape=tuple(shape), stype=stype, data=data[at : at + size])
            at += size
        content[name] = ArrayRecord(arrays)
    return content


def array_bytes(content: RecordDict) -> int:
    """The bytes of all arrays in a message: what travels besides a few hundred bytes of text."""
    records = [record for record in content.values() if isinstance(record, ArrayRecord)]
    return sum(len(array.data) for record in records for array in record.values())


def _record(name: str, values: dict[str, Any], arrays: Arrays | None = None) -> RecordDict:
    text = json.dumps({"protocol": PROTOCOL, **values})
    record = RecordDict({name: ConfigRecord({"json": text})})
    if arrays is not None:
        record["arrays"] = ArrayRecord(OrderedDict((key, Array(value)) for key, value in arrays.items()))
    return record


def _values(name: str, content: RecordDict) -> dict[str, Any]:
    texts = _texts(content, name)
    if texts is None:
        raise RunError(f"a message without '{name}'; is fedmed the same version at both ends?")
    values = json.loads(str(texts["json"]))
    protocol = values.pop("protocol", None)
    if protocol != PROTOCOL:
        raise ConfigError(
            f"protocol={protocol}: expected {PROTOCOL}; install the same fedmed version at both ends"
        )
    return values


def arrays_of(content: RecordDict) -> Arrays:
    """A message's arrays over its own bytes: read-only, and no copy of them (`Array.numpy` makes one).

    Raises:
        RunError, ValueError: the bytes of one are no array of numbers.
    """
    return {name: _array(array) for name, array in _arrays(content, "arrays").items()}


# Not by `content.array_records` or `config_records`: what these give refers to itself, and would keep a message's bytes
# in memory until Python next looks for such cycles.


def _arrays(content: RecordDict, name: str) -> Mapping[str, Array]:
    record = content.get(name)
    return record if isinstance(record, ArrayRecord) else {}


def _texts(content: RecordDict, name: str) -> ConfigRecord | None:
    record = content.get(name)
    return record if isinstance(record, ConfigRecord) else None


def _array(array: Array) -> NDArray[Any]:
    if array.stype != "numpy.ndarray":
        raise RunError("an array of another serialiser")
    file = io.BytesIO(array.data)
    if np.lib.format.read_magic(file) != (1, 0):
        # An archive, too, ends here: NumPy opens it as something that looks like a mapping.
        raise RunError("an array of another format")
    shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise RunError("an array of objects")
    flat = np.frombuffer(array.data, dtype, count=math.prod(shape), offset=file.tell())
    return flat.reshape(shape, order="F" if columns_first else "C")
