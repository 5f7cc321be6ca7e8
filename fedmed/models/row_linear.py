"""The linear head of every model, computed for each record alone."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmed.privacy.layer_gradients import RULES, linear


class RowLinear(nn.Linear):
    """As `nn.Linear`, but a record's output is, to the last bit, what it is without the other records.

    A matrix product rounds a row by where it stands in the batch. Weights whose products with a known patient's
    features cancel, which a coordinator can send, blow that rounding up to another score: removing one patient
    would then change the gradients of others by all that clipping allows.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(records, out) of (records, in)."""
        if len(input) == 0:
            return super().forward(input)
        # Never in bf16, whatever the layers before it compute in.
        with torch.autocast(input.device.type, enabled=False):
            return _Rows.apply(input.to(self.weight.dtype), self.weight, self.bias)


class _Rows(torch.autograd.Function):
    """One step of autograd in place of one a record."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return torch.stack([functional.linear(row, weight, bias) for row in input])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        rows = None
        if ctx.needs_input_grad[0]:
            # With one output each entry is one product; a sum over several is taken for each record alone.
            rows = gradient * weight if len(weight) == 1 else torch.stack([row @ weight for row in gradient])
        return (
            rows,
            gradient.T @ input if ctx.needs_input_grad[1] else None,
            gradient.sum(dim=0) if ctx.needs_input_grad[2] else None,
        )


RULES[RowLinear] = linear
