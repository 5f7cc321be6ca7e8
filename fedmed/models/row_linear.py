"""The linear head of every model, computed for each record alone."""

import torch
from opacus.grad_sample import register_grad_sampler
from opacus.grad_sample.linear import compute_linear_grad_sample
from torch import Tensor, nn
from torch.nn import functional


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
        return torch.stack([functional.linear(row, self.weight, self.bias) for row in input])


register_grad_sampler(RowLinear)(compute_linear_grad_sample)
