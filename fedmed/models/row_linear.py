"""The linear head of every model, computed for each record alone."""

from typing import Any

import torch
from torch import Tensor, nn

from fedmed.privacy.layer_gradients import RULES, linear


class RowLinear(nn.Linear):
    """As `nn.Linear`, but a record's output is, to the last bit, what it is without the other records.

    A matrix product rounds a row by where it stands in the batch. Weights whose products with a known patient's
    features cancel, which a coordinator can send, blow that rounding up to another score: removing one patient
    would then change the gradients of others by all that clipping allows.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(records, out) of (records, in)."""
        # Never in bf16, whatever the layers before it compute in.
        with torch.autocast(input.device.type, enabled=False):
            return _Rows.apply(input.to(self.weight.dtype), self.weight, self.bias)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        scores = _sum(input[:, None] * weight)
        return scores if bias is None else scores + bias

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        return (
            _sum(gradient[:, None] * weight.T) if ctx.needs_input_grad[0] else None,
            gradient.T @ input if ctx.needs_input_grad[1] else None,
            gradient.sum(dim=0) if ctx.needs_input_grad[2] else None,
        )


def _sum(values: Tensor) -> Tensor:
    """Over the last dimension, half onto half: additions entry by entry, whose bits no neighbour can change."""
    while (width := values.shape[-1]) > 1:
        half = width // 2
        folded = values[..., :half] + values[..., half : 2 * half]
        if width % 2:
            folded[..., 0] += values[..., -1]
        values = folded
    return values.squeeze(-1)


RULES[RowLinear] = linear
