"""DP-SGD with the patient as the unit: combine a patient's gradients, then clip (privacy.md, rules 4 to 8).

Opacus's optimizer takes the steps, on gradients that are each patient's (`fedmed.privacy.patient_gradients`); they are
clipped, summed and noised as integers, and the noise comes from the site's own source.
"""

from collections.abc import Iterable

import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import Tensor, nn

from fedmed.errors import PrivacyError
from fedmed.privacy.clipping import ClippedSum, noised
from fedmed.privacy.patient_gradients import Layout, PatientGradients
from fedmed.privacy.plan import PrivacyPlan
from fedmed.privacy.randomness import RandomSource


class PatientOptimizer(DPOptimizer):
    """Opacus's optimizer with clipping, sum and noise on the plan's integer grid (privacy.md, rule 10).

    `p.summed_grad` is int64, in cells, however many pieces a batch comes in. `noise_draws` counts the steps
    that were noised, so that what ran can be held against what was accounted.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, plan: PrivacyPlan, source: RandomSource) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            expected_batch_size=plan.expected_batch,
        )
        self.grid = plan.grid
        self.source = source
        self.noise_draws = 0
        self._patients = 0
        self._layout: Layout = []
        self._sum: ClippedSum | None = None

    def accumulate(self, gradients: Tensor, layout: Layout) -> None:
        """Add the clipped and truncated gradients of patients to the step's sum.

        Args:
            gradients: (patients, entries).
            layout: what lies in a row; the same object as long as it is the same. What is not there is zero.

        Raises:
            PrivacyError: with those before they are more than the grid can sum.
        """
        self._patients += len(gradients)
        self.grid.check_fits(self._patients)
        if self._sum is None or layout is not self._layout:
            self._drain()
            self._layout = layout
            self._sum = ClippedSum(gradients.shape[1], grid=self.grid, device=gradients.device)
        self._sum.add(gradients)

    def _drain(self) -> None:
        """Move what was summed so far to `p.summed_grad`."""
        for p in self.params:
            if p.summed_grad is None:
                p.summed_grad = torch.zeros(p.shape, dtype=torch.int64, device=p.device)
        if self._sum is not None:
            regions = [p.summed_grad[region] for p, region in self._layout]  # type: ignore[attr-defined]
            for region, cells in zip(regions, _split(self._sum.cells(), regions), strict=True):
                region += cells
        self._sum = None

    def clip_and_accumulate(self) -> None:
        """As `accumulate`, of what Opacus's way leaves in `p.grad_sample`; the sum is then in `p.summed_grad`."""
        for p in self.params:
            _check_processed_flag(p.grad_sample)
        if len(self.grad_samples[0]):
            gradients = torch.cat([g.flatten(1) for g in self.grad_samples], dim=1)
            self.accumulate(gradients, [(p, ()) for p in self.params])
        self._drain()
        for p in self.params:
            _mark_as_processed(p.grad_sample)

    def add_noise(self) -> None:
        """Sum of clipped gradients plus the plan's Gaussian, into `p.grad`."""
        for p in self.params:
            _check_processed_flag(p.summed_grad)
        flat = torch.cat([p.summed_grad.flatten() for p in self.params])
        gradient = noised(flat, grid=self.grid, source=self.source)
        for p, own in zip(self.params, _split(gradient, self.params), strict=True):
            p.grad = own.to(p.dtype)
            _mark_as_processed(p.summed_grad)
        self.noise_draws += 1
        self._patients = 0


def _split(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """What lies in a row, in the shapes of others."""
    parts = flat.split([one.numel() for one in like])
    return [part.view(one.shape) for part, one in zip(parts, like, strict=True)]


def private_step(
    model: PatientGradients,
    optimizer: PatientOptimizer,
    chunks: Iterable[tuple[Tensor, Tensor]],
) -> None:
    """One noised step. An empty batch still adds noise and steps.

    Args:
        chunks: per-record losses (records,) and the patient of each record, numbered from 0; every patient lies in
            one chunk. They are consumed one at a time: the sum of the clipped gradients does not depend on how the
            batch was split, to the last bit.
    """
    for losses, patient_of_record in chunks:
        for gradients, layout in model.combine(losses, patient_of_record):
            optimizer.accumulate(gradients, layout)
    # Opacus's step then clips nobody, so that empty and full batches go the same way.
    for p in model.parameters:
        p.grad_sample = torch.zeros(0, *p.shape, dtype=p.dtype, device=p.device)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def check_sound(model: nn.Module) -> None:
    """Refuse what per-patient gradients cannot describe.

    Raises:
        PrivacyError: names the module and the fix.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        trainable = any(p.requires_grad for p in module.parameters(recurse=False))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (trainable or module.training):
            raise PrivacyError(
                f"{name} ({kind}) mixes the patients of a batch; replace it with GroupNorm, or leave it frozen "
                "in eval() mode"
            )
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
            raise PrivacyError(f"{name} ({kind}) keeps statistics of the data; set track_running_stats=False")
        if trainable and type(module) not in GradSampleModule.GRAD_SAMPLERS:
            raise PrivacyError(
                f"{name} ({kind}) has trainable parameters without a per-sample gradient rule; freeze it "
                "(adapter=lora, or adapter.embeddings=false) or register one in fedmed/models/grad_samplers.py"
            )
