"""The update rules are PyTorch's, and load no compiler."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedmed.optimizers import SGD, AdamW, Optimizer

RULES: dict[
    str,
    tuple[Callable[[list[nn.Parameter]], Optimizer], Callable[[list[nn.Parameter]], torch.optim.Optimizer]],
]
RULES = {
    "sgd": (lambda p: SGD(p, lr=0.3), lambda p: torch.optim.SGD(p, lr=0.3)),
    "sgd with momentum and decay": (
        lambda p: SGD(p, lr=0.3, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, weight_decay=0.1),
    ),
    "adamw": (
        lambda p: AdamW(p, lr=0.03, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_steps_are_pytorch_s_to_the_last_bit(rule: str) -> None:
    sides = [[nn.Parameter(torch.linspace(-1, 1, 7)), nn.Parameter(torch.ones(2, 3))] for _ in (0, 1)]
    optimizers = [make(parameters) for make, parameters in zip(RULES[rule], sides, strict=True)]
    draws = torch.Generator().manual_seed(0)
    for _ in range(5):
        for parameters in zip(*sides, strict=True):
            gradient = torch.randn(parameters[0].shape, generator=draws)
            for p in parameters:
                p.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*sides, strict=True))


def test_a_private_step_of_the_small_network_loads_neither_compiler_nor_opacus() -> None:
    """Two seconds each, in every worker process."""
    code = """
import sys, torch
from torch import nn
from fedmed.optimizers import SGD
from fedmed.privacy.dpsgd import PatientOptimizer, check_sound, private_step
from fedmed.privacy.patient_gradients import PatientGradients
from fedmed.privacy.plan import PrivacyPlan
from fedmed.privacy.randomness import operating_system
plan = PrivacyPlan(unit="patient", declared_size=20, sample_rate=0.5, records_per_patient=1, max_grad_norm=1.0,
    noise_multiplier=1.0, steps_per_round=1, rounds=1, delta=1e-5)
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 1))
check_sound(model)
wrapped = PatientGradients(model)
optimizer = PatientOptimizer(SGD(model.parameters(), lr=1.0), plan=plan, source=operating_system())
losses = wrapped(input=torch.ones(3, 1, 8, 8)).squeeze(-1)
private_step(wrapped, optimizer, [(losses, torch.arange(3))])
print([name for name in ("opacus", "torch._dynamo") if name in sys.modules])
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "[]\n"
