"""Per-patient gradients of a network in one forward and one backward pass, by Opacus's rules for its layers.

Opacus's own wrapper keeps every record's gradient of every parameter; here a layer's are added up by patient before the
next layer's are computed, and the backward pass leaves out the batch's gradient, which nobody reads.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from fedmed.errors import PrivacyError


@dataclass(frozen=True)
class Owners:
    """Whose each record is, with the patients ordered by how many records they have.

    Attributes:
        patient_of_record: (records,) int64 in [0, patients).
        groups: the patients first to last, all of whom have the same number of records: (patients, records) int64,
            the indices of each one's. Those without any are left out.
        patients: how many there are.
    """

    patient_of_record: Tensor
    groups: list[Tensor]
    patients: int

    @classmethod
    def of(cls, patient_of_record: Tensor, patients: int) -> "Owners":
        """From any numbering of the patients."""
        counts = torch.bincount(patient_of_record, minlength=patients)
        # Those without records last, where their gradient stays zero.
        order = torch.argsort(torch.where(counts > 0, counts, counts.max() + 1), stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(patients, device=order.device)
        own = place[patient_of_record]
        rows = torch.argsort(own, stable=True)
        sizes, many = torch.unique_consecutive(counts[order], return_counts=True)
        shapes = [(int(m), int(size)) for m, size in zip(many, sizes, strict=True) if size > 0]
        pieces = rows.split([m * size for m, size in shapes])
        return cls(own, [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)], patients)

    def sum(self, per_record: Tensor) -> Tensor:
        """(patients, *shape) of (records, *shape)."""
        summed = per_record.new_zeros(self.patients, *per_record.shape[1:])
        return summed.index_add_(0, self.patient_of_record, per_record)


# A layer's (patients, *shape) gradients from its input, its output's gradient and the owners of the records, where
# that is cheaper than to add up what Opacus gives for each record.
Rule = Callable[[Any, Tensor, Tensor, Owners], dict[Tensor, Tensor]]
PATIENT_RULES: dict[type[nn.Module], Rule] = {}


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

    def check(self) -> None:
        """Raise PrivacyError where a later layer wrote over them: the gradient would be of something else."""
        if self._versions() != self.versions:
            raise PrivacyError(
                f"a layer after a trainable {type(self.module).__name__} works in place (for example "
                "ReLU(inplace=True)), so that no gradient of one patient can be taken; set inplace=False"
            )


class PatientGradients:
    """A network that remembers what its trainable layers read and wrote, and nothing more: call it as the network."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._calls: list[_Call] = []
        trainable = (
            module
            for module in model.modules()
            if any(p.requires_grad for p in module.parameters(recurse=False))
        )
        self._hooks = [module.register_forward_hook(self._remember) for module in trainable]
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, **inputs: Tensor) -> Tensor:
        self._calls = []
        return self._model(**inputs)

    def _remember(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            self._calls.append(_Call(module, [value.detach() for value in inputs], output))

    def combine(self, losses: Tensor, patient_of_record: Tensor, patients: int) -> list[Tensor]:
        """Each patient's gradient of the mean loss over the records that it has here, by parameter.

        The order of the patients is not that of their numbers; it is the same for every parameter.

        Args:
            losses: (records,), of the last call.
            patient_of_record: (records,) int64 in [0, patients).

        Returns:
            (patients, *shape) for each of `parameters`.
        """
        owners = Owners.of(patient_of_record, patients)
        counts = torch.bincount(patient_of_record, minlength=patients)
        # The mean is taken here: the gradient of a record's share is its share of the gradient.
        mean = (losses / counts[patient_of_record]).sum()
        calls, self._calls = self._calls, []
        # Of the layers' outputs and not of the parameters: autograd then computes no gradient of the whole batch.
        for call in calls:
            call.check()
        outputs = torch.autograd.grad(mean, [call.output for call in calls], allow_unused=True)
        found: dict[Tensor, Tensor] = {}
        for call, gradient in zip(calls, outputs, strict=True):
            if gradient is None:
                continue
            for p, own in _by_patient(call.module, call.inputs, gradient, owners).items():
                if p.requires_grad:
                    found[p] = found[p] + own if p in found else own
        return [found[p] if p in found else p.new_zeros(patients, *p.shape) for p in self.parameters]

    def close(self) -> None:
        """Leave the network as it was."""
        for hook in self._hooks:
            hook.remove()
        self._calls = []


def _by_patient(
    module: nn.Module, inputs: list[Tensor], gradient: Tensor, owners: Owners
) -> dict[Tensor, Tensor]:
    if type(module) in PATIENT_RULES:
        return PATIENT_RULES[type(module)](module, inputs[0], gradient, owners)
    per_record = GradSampleModule.GRAD_SAMPLERS[type(module)](module, inputs, gradient)
    return {p: owners.sum(values) for p, values in per_record.items()}
