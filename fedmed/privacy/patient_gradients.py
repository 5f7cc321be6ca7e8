"""Per-patient gradients of a network in one forward and one backward pass, some patients at a time.

Opacus's own wrapper keeps every record's gradient of every parameter. Here what the layers read and the gradients of
what they wrote are kept, and blocks of patients are taken from them, so that no more than a block's gradients are held
at once; the backward pass leaves out the batch's gradient, which nobody reads.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedmed.devices import CPU, sent
from fedmed.errors import PrivacyError
from fedmed.privacy.block_gradients import (
    Block,
    BlockGradients,
    Gradient,
    Memory,
    Place,
    Region,
    Small,
)
from fedmed.privacy.layer_gradients import REMEMBERED, layer_gradients, live_kernel, may_be_dead

# Entries of gradients that are held at once, but at least one patient's: 128 MB, on an accelerator 1 GB.
BLOCK_ENTRIES = {"cpu": 2**25, "cuda": 2**28}

# What lies in gradients, one after the other: parts of parameters.
Layout = list[tuple[nn.Parameter, Place]]


@dataclass(frozen=True)
class Owners:
    """Whose each record is, the records ordered by their owners, those with few records first.

    Attributes:
        counts: (records,) int64: how many records the owner of each has, in the order that was given.
        order: (records,) int64: which record comes where; None where they were in order.
        groups: (patients, records of each), in that order. Patients without records are left out.
    """

    counts: Tensor
    order: Tensor | None
    groups: list[tuple[int, int]]

    @classmethod
    def of(cls, patient_of_record: Tensor, device: torch.device = CPU) -> "Owners":
        """From any numbering of the patients, (records,) int64, on the host; its own tensors are on the device."""
        patients = len(patient_of_record)
        if patients and torch.equal(patient_of_record, torch.arange(patients)):
            # One record each, as in most batches.
            return cls(torch.ones_like(patient_of_record, device=device), None, [(patients, 1)])
        own = torch.bincount(patient_of_record)
        counts = own[patient_of_record]
        order = torch.argsort(counts * len(own) + patient_of_record, stable=True)
        sizes, records = torch.unique_consecutive(counts[order], return_counts=True)
        groups = [(int(many) // int(size), int(size)) for size, many in zip(sizes, records, strict=True)]
        in_order = torch.equal(order, torch.arange(len(order)))
        return cls(sent(counts, device), None if in_order else sent(order, device), groups)

    def ordered(self, values: Tensor) -> Tensor:
        """(records, …) in order."""
        return values if self.order is None else values[self.order]

    def blocks(self, most: int) -> Iterator[Block]:
        """All patients, at most that many at a time."""
        first = 0
        for patients, records in self.groups:
            for start in range(0, patients, most):
                block = Block(first, min(most, patients - start), records)
                yield block
                first += block.patients * records


@dataclass(frozen=True)
class _Call:
    """What a trainable layer read and wrote."""

    module: nn.Module
    inputs: list[Tensor]
    output: Tensor
    versions: list[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", self._versions())

    def _versions(self) -> list[int]:
        return [value._version for value in (*self.inputs, self.output)]

    def check(self, records: int) -> None:
        """Raise PrivacyError where rows are not records, or a later layer wrote over them: the gradient would be of
        someone or something else."""
        rows = {len(value) if value.dim() else 0 for value in (*self.inputs, self.output)}
        if rows != {records}:
            found = ", ".join(map(str, sorted(rows)))
            raise PrivacyError(
                f"a trainable {type(self.module).__name__} reads or writes {found} rows for {records} records, so that "
                "no row is known to be one patient's; freeze it"
            )
        if self._versions() != self.versions:
            raise PrivacyError(
                f"a layer after a trainable {type(self.module).__name__} works in place (for example "
                "ReLU(inplace=True)), so that no gradient of one patient can be taken; set inplace=False"
            )


class PatientGradients:
    """A network that remembers what its trainable layers read and wrote, and nothing more: call it as the network.

    Attributes:
        live: of parameters that are not wholly live, the part outside of which every patient's gradient is zero.
    """

    def __init__(self, model: nn.Module, example: Mapping[str, Tensor] | None = None) -> None:
        """
        Args:
            example: inputs of one record or more, of which the shape alone is read: all records' is the same. Without
                it all parameters are taken to be live.
        """
        self._model = model
        self.live = {} if example is None else _live(model, example)
        self._calls: list[_Call] = []
        trainable = (
            module
            for module in model.modules()
            if any(p.requires_grad for p in module.parameters(recurse=False))
        )
        self._hooks = [module.register_forward_hook(self._remember) for module in trainable]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._memory = Memory()

    def __call__(self, **inputs: Tensor) -> Tensor:
        self._calls = []
        return self._model(**inputs)

    def _remember(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            read = [value.detach() for value in inputs]
            if type(module) in REMEMBERED:
                read += REMEMBERED[type(module)](module, read[0], output)
            self._calls.append(_Call(module, read, output))

    def combine(self, losses: Tensor, patient_of_record: Tensor) -> Iterator[tuple[BlockGradients, Layout]]:
        """Each patient's gradient of the mean loss over the records that it has here, some patients at a time.

        The order of the patients is not that of their numbers. What the layout leaves out is zero.

        Args:
            losses: (records,), of the last call.
            patient_of_record: (records,) int64, numbers from 0, on the host.

        Yields:
            a block's gradients, not computed yet, and what they are of, one object for all.

        Raises:
            PrivacyError: a layer works in place on what a trainable one read or wrote, or the first dimension of
                that is not the records.
        """
        owners = Owners.of(patient_of_record, losses.device)
        # The mean is taken here: the gradient of a record's share is its share of the gradient.
        mean = (losses / owners.counts).sum()
        calls, self._calls = self._calls, []
        # Of the layers' outputs and not of the parameters: autograd then computes no gradient of the whole batch.
        for call in calls:
            call.check(len(losses))
        outputs = torch.autograd.grad(mean, [call.output for call in calls], allow_unused=True)
        found: dict[Tensor, list[Gradient]] = {}
        with torch.no_grad():
            for call, gradient in zip(calls, outputs, strict=True):
                if gradient is None:
                    continue
                inputs = [owners.ordered(value) for value in call.inputs]
                own = layer_gradients(call.module, inputs, owners.ordered(gradient), self.live)
                for p, one in own.items():
                    found.setdefault(p, []).append(one)
        return self._blocks(owners, {p: found[p] for p in self.parameters if p in found}, losses.device)

    def _blocks(
        self, owners: Owners, found: dict[nn.Parameter, list[Gradient]], device: torch.device
    ) -> Iterator[tuple[BlockGradients, Layout]]:
        small = {p: own[0] for p, own in found.items() if len(own) == 1 and isinstance(own[0], Small)}
        large = {p: own for p, own in found.items() if p not in small}
        layout = [(p, own[0].place) for p, own in (large | {p: [own] for p, own in small.items()}).items()]
        sums = list(large.values())
        if small:
            # Written at once.
            sums.append([Small(torch.cat([own.values for own in small.values()], dim=1))])
        if any(one.place != own[0].place or one.shape != own[0].shape for own in sums for one in own):
            raise PrivacyError("convolutions of different strides share their weights; give each its own")
        dtype = torch.promote_types(torch.float32, self.parameters[0].dtype)
        entries = sum(math.prod(own[0].shape) for own in sums)
        most = max(1, BLOCK_ENTRIES.get(device.type, BLOCK_ENTRIES["cuda"]) // max(1, entries))
        for block in owners.blocks(most):
            yield (
                BlockGradients(block=block, sums=sums, dtype=dtype, device=device, memory=self._memory),
                layout,
            )

    def close(self) -> None:
        """Leave the network as it was."""
        for hook in self._hooks:
            hook.remove()
        self._calls = []


@torch.no_grad()
def _live(model: nn.Module, example: Mapping[str, Tensor]) -> dict[Tensor, Region]:
    """Of kernels larger than the maps they meet; by one pass of zeros, so that nothing of the data is in it."""
    found: dict[Tensor, list[Region]] = {}

    def see(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        found.setdefault(layer.weight, []).append(live_kernel(layer, inputs[0].shape[2:], output.shape[2:]))

    hooks = [
        module.register_forward_hook(see)
        for module in model.modules()
        if isinstance(module, nn.Conv2d) and module.weight.requires_grad and may_be_dead(module)
    ]
    try:
        if hooks:
            device = next(model.parameters()).device
            model(
                **{
                    name: torch.zeros(1, *values.shape[1:], dtype=values.dtype, device=device)
                    for name, values in example.items()
                }
            )
    finally:
        for hook in hooks:
            hook.remove()
    return {p: _hull(p, regions) for p, regions in found.items()}


def _hull(p: Tensor, regions: list[Region]) -> Region:
    """The smallest region that holds them all."""
    ranges = [[range(size)[own] for size, own in zip(p.shape, region, strict=True)] for region in regions]
    return tuple(
        slice(min(own.start for own in side), max(own.stop for own in side))
        for side in zip(*ranges, strict=True)
    )
