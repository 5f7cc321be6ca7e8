"""PyTorch's update rules for a fixed list of parameters.

`torch.optim.Optimizer` loads the compiler (torch._dynamo: two seconds in every worker process) when it is made; the
functions below are what it calls, and load nothing.
"""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd


class Optimizer(Protocol):
    """Changes its parameters by what their `grad` says."""

    parameters: list[nn.Parameter]

    def step(self) -> None:
        """One step; every parameter has a gradient."""


class SGD:
    """As `torch.optim.SGD`, to the last bit."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        self.parameters = list(parameters)
        self._lr, self._momentum, self._weight_decay = lr, momentum, weight_decay
        self._momenta: list[Tensor | None] = [None for _ in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        sgd(
            list[Tensor](self.parameters), _gradients(self.parameters), self._momenta, lr=self._lr,
            momentum=self._momentum, weight_decay=self._weight_decay, dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip


class AdamW:
    """As `torch.optim.AdamW` with its defaults, to the last bit (Loshchilov and Hutter 2019, algorithm 2)."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        self.parameters = list(parameters)
        self._lr, self._weight_decay = lr, weight_decay
        self._means = [torch.zeros_like(p) for p in self.parameters]
        self._squares = [torch.zeros_like(p) for p in self.parameters]
        self._steps = [torch.tensor(0.0) for _ in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        adamw(
            list[Tensor](self.parameters), _gradients(self.parameters), self._means, self._squares, [], self._steps,
            lr=self._lr, weight_decay=self._weight_decay, beta1=0.9, beta2=0.999, eps=1e-8, amsgrad=False,
            maximize=False,
        )  # fmt: skip


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
