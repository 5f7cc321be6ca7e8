"""DP-SGD with the patient as the unit: combine a patient's gradients, then clip (privacy.md, rules 4 to 8).

Each patient's gradients (`fedmed.privacy.patient_gradients`) are clipped, summed and noised as integers, and the noise
comes from the site's own source.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from fedmed.errors import PrivacyError
from fedmed.optimizers import Optimizer
from fedmed.privacy.block_gradients import BlockGradients, Live, Place
from fedmed.privacy.clipping import ClippedSum, load_compiled, noised
from fedmed.privacy.layer_gradients import has_rule
from fedmed.privacy.patient_gradients import Layout, PatientGradients
from fedmed.privacy.plan import PrivacyPlan
from fedmed.privacy.randomness import RandomSource
from fedmed.privacy.step_noise import StepNoise


class PatientOptimizer:
    """Takes steps on clipped, summed and noised gradients of patients, on the plan's integer grid (rule 10).

    `noise_draws` counts the steps that were noised, so that what ran can be held against what was accounted.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        plan: PrivacyPlan,
        source: RandomSource,
        live: Live | None = None,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            live: the parts of parameters that are trained, whatever the data; what is outside gets neither gradient nor
                noise. None: all of them.
            before_step: called when the noisy gradient is in every `p.grad`; may change it.
        """
        self.parameters = optimizer.parameters
        self.grid = plan.grid
        self.noise_draws = 0
        self._optimizer = optimizer
        self._live = live or {}
        self._before_step = before_step
        self._divisor = plan.expected_batch
        self._patients = 0
        self._layout: Layout = []
        self._sum: ClippedSum | None = None
        self._totals: dict[nn.Parameter, tuple[Place, Tensor]] = {}
        # Before the network takes memory: what is loaded in its midst keeps that from being used again.
        load_compiled()
        self._noise = StepNoise(
            sum(Place(self._live.get(p, ())).of(p).numel() for p in self.parameters), grid=self.grid, source=source,
            device=self.parameters[0].device, steps=plan.steps_per_round,
        )  # fmt: skip
        # Kept from step to step, as fresh pages cost more than what is written to them.
        self._applied = [torch.empty_like(p) for p in self.parameters]

    def accumulate(self, gradients: BlockGradients, layout: Layout) -> None:
        """Add the clipped and truncated gradients of a block's patients to the step's sum.

        Args:
            layout: what they are of; the same object as long as it is the same. What is not there is zero.

        Raises:
            PrivacyError: with those before they are more than the grid can sum, or the noise would not fall where they
                are.
        """
        self._patients += gradients.patients
        self.grid.check_fits(self._patients)
        if self._sum is None or layout is not self._layout:
            self._drain()
            if any(place.region != self._live.get(p, ()) for p, place in layout):
                # Whether anybody was drawn would show in which weights move.
                raise PrivacyError("gradients lie elsewhere than the noise of a step without patients would")
            self._layout = layout
            self._sum = ClippedSum(gradients.entries, grid=self.grid, device=gradients.device)
        self._sum.add(gradients)

    def _drain(self) -> None:
        """Move what was summed so far to its parameters' totals."""
        if self._sum is not None:
            shapes = [place.of(p) for p, place in self._layout]
            for (p, place), cells in zip(self._layout, _split(self._sum.cells(), shapes), strict=True):
                before = self._totals.get(p)
                self._totals[p] = place, cells if before is None else before[1] + cells
        self._sum = None

    def _places(self) -> list[Place]:
        """How each parameter's part of `cells` is laid out: as the gradients were."""
        whole = {p: Place(self._live.get(p, ())) for p in self.parameters}
        return [self._totals[p][0] if p in self._totals else whole[p] for p in self.parameters]

    def cells(self) -> Tensor:
        """(entries of all parameters that are live,) int64: the step's sum so far, before its noise."""
        self._drain()
        return torch.cat(
            [
                self._totals[p][1].flatten()
                if p in self._totals
                else torch.zeros(place.of(p).numel(), dtype=torch.int64, device=p.device)
                for p, place in zip(self.parameters, self._places(), strict=True)
            ]
        )

    def noised(self, cells: Tensor) -> Tensor:
        """(entries,) float64: a sum with the plan's Gaussian. From here on everything is post-processing."""
        self.noise_draws += 1
        return noised(cells, self._noise.take(), grid=self.grid)

    def step(self) -> None:
        """One step with noise, however many patients were accumulated."""
        # The divisor is public: the expected number of patients, not how many there were (rule 5).
        gradient = self.noised(self.cells()).div_(self._divisor)
        places = self._places()
        self._patients, self._totals = 0, {}
        parts = [place.of(whole) for whole, place in zip(self._applied, places, strict=True)]
        for p, whole, part, own in zip(
            self.parameters, self._applied, parts, _split(gradient, parts), strict=True
        ):
            if part.numel() < whole.numel():
                whole.zero_()
            part.copy_(own)
            p.grad = whole
        self._before_step()
        self._optimizer.step()
        for p in self.parameters:
            p.grad = None

    def close(self) -> None:
        """After the last step."""
        self._noise.close()


def _split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What lies one after the other, in the shapes of others."""
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
            one chunk. They are consumed one at a time. The sum of given gradients does not depend on how the batch
            was split, to the last bit; a gradient may, in its last bits, on what went through the network with it.
    """
    for losses, patient_of_record in chunks:
        for gradients, layout in model.combine(losses, patient_of_record):
            optimizer.accumulate(gradients, layout)
            # And with them all that the network read and wrote, before the noise takes its memory.
            del gradients
    optimizer.step()


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
        if trainable and not has_rule(type(module)):
            raise PrivacyError(
                f"{name} ({kind}) has trainable parameters without a per-sample gradient rule; freeze it "
                "(adapter=lora, or adapter.embeddings=false) or register one in fedmed/models/grad_samplers.py"
            )
