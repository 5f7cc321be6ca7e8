"""Local training and evaluation as functions of arrays. No Flower here."""

import ctypes
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedmed.config import TrainingConfig
from fedmed.data.dataset import SiteDataset
from fedmed.devices import free_bytes, sent
from fedmed.models.classifier import INFERENCE_BATCH, Arrays, Batch, Classifier, select
from fedmed.optimizers import SGD, AdamW, Optimizer
from fedmed.privacy.dpsgd import PatientOptimizer, check_sound, private_step
from fedmed.privacy.patient_gradients import PatientGradients
from fedmed.privacy.plan import PrivacyPlan, check_sampler
from fedmed.privacy.randomness import RandomSource

# Where no physical batch size is set: bytes that a piece's activations and their gradients may take, of an accelerator
# the part of its free memory; its most records; and how many are tried first. Gradients of patients are held beside it,
# a block at a time.
PIECE_BYTES = 2**30
PIECE_PART = 1 / 4
LARGEST_PIECE = {"cpu": 256, "cuda": 2048}
FIRST_PIECE = 8
# glibc's malloc.h; tensors that are larger go back to the system at once, and so does what is free beyond it.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 256 * 2**20
PASSED_ON_BYTES = 2**20


@dataclass(frozen=True)
class LocalData:
    """One part (training or test) of a site, as the model reads it, on the host.

    Attributes:
        batch: named tensors, first dimension records.
        labels: (records,) float32.
        records_of: for each patient, the indices of the patient's records.
    """

    batch: Batch
    labels: Tensor
    records_of: list[NDArray[np.int64]]


@dataclass(frozen=True)
class LocalUpdate:
    """What a site's training gives: the change of each adapter array, and how many steps were noised."""

    delta: Arrays
    noise_draws: int


def one_thread(*, trains: bool = True) -> None:
    """Use one core: results then do not depend on how many processes play the sites.

    Args:
        trains: freed memory stays at hand, since every step frees and asks for the same tensors: pages that the system
            clears anew cost a tenth of a step. False: it goes back at once, of a process that passes messages on.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
    _keep_freed_memory(KEPT_BYTES if trains else PASSED_ON_BYTES)


@lru_cache(maxsize=1)
def _keep_freed_memory(size: int) -> None:
    """Blocks of up to `size` bytes stay with this process when they are freed."""
    # mallopt is glibc's; elsewhere the allocator's own ways do.
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, size)
        libc.mallopt(M_MMAP_THRESHOLD, size)


def local_parts(batch: Batch, data: SiteDataset) -> tuple[LocalData, LocalData]:
    """The training and the test part of a site whose records a model has prepared as `batch`."""

    def part(indices: NDArray[np.int64]) -> LocalData:
        patients = data.patients[indices]
        records_of = [np.flatnonzero(patients == code) for code in dict.fromkeys(patients.tolist())]
        chosen = torch.from_numpy(indices)
        return LocalData(select(batch, chosen), torch.from_numpy(data.labels[indices]), records_of)

    return part(data.part(test=False)), part(data.part(test=True))


def set_adapter(model: Classifier, arrays: Mapping[str, NDArray[np.float32]]) -> None:
    """Copy arrays into the adapter; names and shapes must agree."""
    parameters = model.adapter()
    if arrays.keys() != parameters.keys():
        raise ValueError("adapter arrays are misnamed")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if tuple(arrays[name].shape) != tuple(parameter.shape):
                raise ValueError("adapter arrays are misshapen")
            # A copy, of one array at a time: what a message holds is read-only, which PyTorch does not know.
            parameter.copy_(torch.from_numpy(np.array(arrays[name], dtype=np.float32)))


def train(
    model: Classifier,
    data: LocalData,
    arrays: Arrays,
    *,
    plan: PrivacyPlan,
    training: TrainingConfig,
    source: RandomSource,
    proximal_mu: float = 0.0,
) -> LocalUpdate:
    """One round at one site: `plan.steps_per_round` steps from the global `arrays`.

    With a noise multiplier above zero the update is a DP-SGD output under `plan`; the number of steps, the
    divisor and the noise do not depend on the data. With zero nothing is clipped and nothing is private.
    """
    set_adapter(model, arrays)
    model.training_mode()
    parameters = list(model.adapter().values())
    optimizer = _optimizer(parameters, training)
    start = [p.detach().clone() for p in parameters]

    def pull_back() -> None:
        # FedProx (Li et al. 2020, eq. 2), after clipping and noise: it reads shared values alone.
        if proximal_mu:
            for p, origin in zip(parameters, start, strict=True):
                assert p.grad is not None
                p.grad += proximal_mu * (p.detach() - origin)

    if plan.noise_multiplier > 0:
        draws = _train_private(model, data, optimizer, pull_back, plan, training, source)
    else:
        _train_plain(model, data, optimizer, pull_back, plan, training, source)
        draws = 0
    delta = {
        name: (p.detach() - origin).cpu().numpy()
        for (name, p), origin in zip(model.adapter().items(), start, strict=True)
    }
    return LocalUpdate(delta, draws)


class _Room:
    """How many records may be in memory at once: as declared, else by what a first piece was seen to hold."""

    def __init__(self, training: TrainingConfig, device: torch.device) -> None:
        self._device = device
        self._measured = training.physical_batch_size is not None
        self._bf16 = training.precision == "bf16"
        self.limit = training.physical_batch_size or FIRST_PIECE

    def losses(self, model: Callable[..., Tensor], data: LocalData, rows: Tensor) -> Tensor:
        """As `_losses`; of the first piece what is kept for the backward pass is added up."""
        if self._measured:
            return _losses(model, data, rows, device=self._device, bf16=self._bf16)
        kept: dict[int, int] = {}

        def keep(value: Tensor) -> Tensor:
            # Nor what is a view of a weight.
            if not isinstance(value if value._base is None else value._base, nn.Parameter):
                storage = value.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            found = _losses(model, data, rows, device=self._device, bf16=self._bf16)
        # Twice: what the layers wrote has a gradient each.
        record = max(1, 2 * sum(kept.values()) // len(rows))
        on_host = self._device.type == "cpu"
        most = PIECE_BYTES if on_host else int(PIECE_PART * free_bytes(self._device))
        self.limit = max(1, min(LARGEST_PIECE["cpu" if on_host else "cuda"], most // record))
        self._measured = True
        return found


def _train_private(
    model: Classifier,
    data: LocalData,
    optimizer: Optimizer,
    pull_back: Callable[[], None],
    plan: PrivacyPlan,
    training: TrainingConfig,
    source: RandomSource,
) -> int:
    check_sound(model)
    # Whatever a seed repeats is NOT PRIVATE, and has no delta.
    if source.private:
        check_sampler([plan], parameters=model.trainable)
    # Of the batch the shape alone is read, which the task's configuration says.
    wrapped = PatientGradients(model, data.batch)
    private = PatientOptimizer(optimizer, plan=plan, source=source, live=wrapped.live, before_step=pull_back)
    room = _Room(training, model.device)
    try:
        for _ in range(plan.steps_per_round):
            chunks = _chunks(data, plan, room, source)
            private_step(wrapped, private, ((room.losses(wrapped, data, rows), of) for rows, of, _ in chunks))
    finally:
        wrapped.close()
        private.close()
    return private.noise_draws


def _train_plain(
    model: Classifier,
    data: LocalData,
    optimizer: Optimizer,
    pull_back: Callable[[], None],
    plan: PrivacyPlan,
    training: TrainingConfig,
    source: RandomSource,
) -> None:
    room = _Room(training, model.device)
    for _ in range(plan.steps_per_round):
        for p in optimizer.parameters:
            p.grad = torch.zeros_like(p)
        for rows, patient_of_record, patients in _chunks(data, plan, room, source):
            counts = torch.bincount(patient_of_record, minlength=patients)[patient_of_record]
            losses = room.losses(model, data, rows)
            (losses / sent(counts, losses.device) / plan.expected_batch).sum().backward()
        pull_back()
        optimizer.step()
    for p in optimizer.parameters:
        p.grad = None


def _chunks(
    data: LocalData, plan: PrivacyPlan, room: _Room, source: RandomSource
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """A step's records, split into pieces of about `room.limit` records with every patient in one piece.

    Yields:
        record indices, the patient of each (counted within the piece), and the piece's number of patients.
    """
    rows: list[NDArray[np.int64]] = []
    size = 0
    for patient in plan.sample_patients(len(data.records_of), source):
        records = data.records_of[patient]
        if len(records) > plan.records_per_patient:
            records = records[source.choose(len(records), plan.records_per_patient)]
        if rows and size + len(records) > room.limit:
            yield _chunk(rows)
            rows, size = [], 0
        rows.append(records)
        size += len(records)
    if rows:
        yield _chunk(rows)


def _chunk(rows: list[NDArray[np.int64]]) -> tuple[Tensor, Tensor, int]:
    # In the order in which their gradients are taken: nothing is then moved.
    rows = sorted(rows, key=len)
    patient = np.repeat(np.arange(len(rows)), [len(records) for records in rows])
    return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(patient), len(rows)


def _losses(
    model: Callable[..., Tensor], data: LocalData, rows: Tensor, *, device: torch.device, bf16: bool
) -> Tensor:
    """(records,) binary cross-entropy: a sum over patients, so that each has a gradient of its own."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        logits = model(**select(data.batch, rows, device))
    labels = sent(data.labels, device, rows)
    return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def _optimizer(parameters: list[nn.Parameter], training: TrainingConfig) -> Optimizer:
    # RunConfig has filled in the adapter's default.
    assert training.learning_rate is not None
    settings = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    if training.optimizer == "adam":
        return AdamW(parameters, **settings)
    return SGD(parameters, momentum=training.momentum, **settings)


@torch.no_grad()
def logits(model: Classifier, data: LocalData, arrays: Arrays) -> NDArray[np.float32]:
    """(records,) logits of a part under the given adapter."""
    set_adapter(model, arrays)
    model.eval()
    rows = torch.arange(len(data.labels))
    if not len(rows):
        # Attention cannot reshape a batch of none.
        return np.zeros(0, dtype=np.float32)
    return _scores(model, data, rows).numpy()


@torch.no_grad()
def patient_logits(model: Classifier, data: LocalData, arrays: Arrays) -> NDArray[np.float32]:
    """As `logits`, but each patient's records go through the model alone.

    A batch's arithmetic depends in its last bits on what else is in it: removing one patient could move another's
    score over the edge of a bin.
    """
    set_adapter(model, arrays)
    model.eval()
    found = torch.zeros(len(data.labels))
    for records in data.records_of:
        rows = torch.from_numpy(records)
        found[rows] = _scores(model, data, rows)
    return found.numpy()


def _scores(model: Classifier, data: LocalData, rows: Tensor) -> Tensor:
    """(rows,) logits, on the host."""
    pieces = rows.split(INFERENCE_BATCH)
    return torch.cat([model(**select(data.batch, piece, model.device)) for piece in pieces]).cpu()
