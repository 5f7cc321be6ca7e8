"""Patient-level DP-SGD against one-patient-at-a-time backward passes, and variants that must be caught."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel

from fedmed.config import AdapterConfig
from fedmed.errors import PrivacyError
from fedmed.models.adapters import add_adapter
from fedmed.models.classifier import Classifier
from fedmed.optimizers import SGD
from fedmed.privacy.block_gradients import BlockGradients, Place
from fedmed.privacy.dpsgd import (
    PatientOptimizer,
    check_sound,
    private_step,
)
from fedmed.privacy.gaussian import BLOCK, bytes_for
from fedmed.privacy.patient_gradients import PatientGradients
from fedmed.privacy.randomness import RandomSource, seeded
from tests.fedmed.models import encoders
from tests.fedmed.privacy.test_accounting import make

CLIP = 0.5
PATIENTS = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 5])
LABELS = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0.0])


class Encoded(Classifier):
    """An encoder's first token, or where it has none its pooled output, through a linear head."""

    def __init__(self, encoder: nn.Module, *, positions: bool, pooler: bool) -> None:
        super().__init__()
        self.encoder, self.positions, self.pooler = encoder, positions, pooler
        self.head = nn.Linear(32, 1)

    def forward(self, **inputs: Tensor) -> Tensor:
        if self.positions:
            ids = inputs["input_ids"]
            inputs = {**inputs, "position_ids": torch.arange(ids.shape[1]).expand(len(ids), -1)}
        output = self.encoder(**inputs)
        pooled = output.pooler_output if self.pooler else output.last_hidden_state[:, 0]
        return self.head(pooled).squeeze(-1)


def network(family: str, adapter: AdapterConfig) -> tuple[Encoded, dict[str, Tensor]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    if family == "bert":
        encoder: nn.Module = BertModel(BertConfig(vocab_size=50, **sizes))
    elif family == "modernbert":
        encoder = encoders.modernbert_of(50)
    else:
        encoder = encoders.FAMILIES[family][0]()
        encoder = getattr(encoder, "vision_model", encoder)
    if "bert" in family:
        mask = (torch.arange(7)[None] < torch.randint(3, 8, (12, 1))).long()
        inputs = {"input_ids": torch.randint(0, 50, (12, 7)), "attention_mask": mask}
    else:
        inputs = {"pixel_values": torch.randn(12, 3, 16, 16)}
    with torch.no_grad():
        for parameter in encoder.parameters():
            # Norms' biases and blocks' scales start at zero or nearly so: their gradients too would say little.
            parameter.add_(0.1 * torch.randn_like(parameter))
    pooler = family in encoders.POOLING
    model = Encoded(add_adapter(encoder, adapter), positions=family == "bert", pooler=pooler)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.training_mode()
    return model, inputs


def losses(model: nn.Module, inputs: dict[str, Tensor], rows: Tensor) -> Tensor:
    logits = model(**{name: value[rows] for name, value in inputs.items()})
    return functional.binary_cross_entropy_with_logits(logits, LABELS[rows], reduction="none")


def slow_clipped_sum(model: Encoded, inputs: dict[str, Tensor], clip: float) -> dict[str, Tensor]:
    """The reference: one backward pass a patient, mean over the patient's records, clip, sum."""
    total = {name: torch.zeros_like(p) for name, p in model.adapter().items()}
    for patient in PATIENTS.unique():
        loss = losses(model, inputs, (patient == PATIENTS).nonzero().squeeze(-1)).mean()
        gradients = torch.autograd.grad(loss, list(model.adapter().values()), allow_unused=True)
        filled = [
            torch.zeros_like(p) if g is None else g for g, p in zip(gradients, total.values(), strict=True)
        ]
        norm = torch.sqrt(sum((g**2).sum() for g in filled))
        for name, gradient in zip(total, filled, strict=True):
            total[name] += gradient * min(1.0, clip / (norm.item() + 1e-6))
    return total


def chunks(
    model: nn.Module, inputs: dict[str, Tensor], cuts: list[list[int]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batch in pieces, each a list of patients; one forward pass at a time, as training does it."""
    for patients in cuts:
        rows = torch.cat([(p == PATIENTS).nonzero().squeeze(-1) for p in patients])
        numbers = torch.tensor([patients.index(int(p)) for p in PATIENTS[rows]])
        yield losses(model, inputs, rows), numbers


class Silent:
    """A source whose Gaussian is zero: what is left is the clipped sum over the divisor."""

    @staticmethod
    def normal(count: int) -> np.ndarray:
        return np.zeros(count)


def step(
    model: Encoded,
    batch: Callable[[nn.Module], Iterable[tuple[Tensor, Tensor]]],
    *,
    source: object = Silent,
    noise: float = 1.0,
    clip: float = CLIP,
) -> dict[str, Tensor]:
    """The gradient that one private step applies, by parameter."""
    plan = make(sample_rate=0.5, declared_size=12, max_grad_norm=clip, noise_multiplier=noise)
    seen: dict[str, Tensor] = {}

    def look() -> None:
        for name, p in model.adapter().items():
            assert p.grad is not None
            seen[name] = p.grad.clone()

    optimizer = PatientOptimizer(
        SGD(model.adapter().values(), lr=1.0),
        plan=plan,
        source=source,  # type: ignore[arg-type]
        before_step=look,
    )
    before = {name: p.detach().clone() for name, p in model.adapter().items()}
    wrapped = PatientGradients(model)
    private_step(wrapped, optimizer, batch(wrapped))
    wrapped.close()
    assert optimizer.noise_draws == 1
    for name, p in model.adapter().items():
        assert torch.allclose(p, before[name] - seen[name])
    return seen


ADAPTERS = {
    "lora": AdapterConfig(kind="lora", rank=4, last_blocks=2),
    "ffa_lora": AdapterConfig(kind="ffa_lora", rank=4, last_blocks=2),
    "head": AdapterConfig(kind="head"),
    "full": AdapterConfig(kind="full"),
    "full with embeddings": AdapterConfig(kind="full", embeddings=True),
}


CASES = [
    (family, adapter)
    for family in ("bert", "modernbert", *encoders.FAMILIES)
    for adapter in ADAPTERS
    # Of other image encoders no rule gives a patient's gradient of the embeddings.
    if "embeddings" not in adapter or family in ("bert", "modernbert", "vit")
]


@pytest.mark.parametrize(("family", "adapter"), CASES)
def test_clipped_sum_equals_one_patient_at_a_time(family: str, adapter: str) -> None:
    model, inputs = network(family, ADAPTERS[adapter])
    check_sound(model)
    expected = slow_clipped_sum(model, inputs, CLIP)
    got = step(model, lambda wrapped: chunks(wrapped, inputs, [[0, 1, 2], [3], [4, 5]]))
    assert len(expected) >= 2
    for name, values in expected.items():
        assert torch.allclose(got[name] * 6.0, values, atol=1e-5), name
    # Nothing that is compared is zero on both sides, but the parts of an encoder that its features do not read.
    assert sum(values.abs().max() > 1e-4 for values in expected.values()) >= 0.8 * len(expected)
    if "embeddings" in adapter:
        table = "tok_embeddings" if family == "modernbert" else "position"
        assert any(table in name and values.abs().max() > 0 for name, values in expected.items())


def test_unclipped_gradients_equal_one_patient_at_a_time() -> None:
    """Where every patient is clipped, a sum over the patient's records would pass for their mean."""
    model, inputs = network("bert", ADAPTERS["lora"])
    expected = slow_clipped_sum(model, inputs, 1e3)
    got = step(model, lambda wrapped: chunks(wrapped, inputs, [[0, 1, 2], [3], [4, 5]]), clip=1e3, noise=1e-3)
    for name, values in expected.items():
        assert torch.allclose(got[name] * 6.0, values, atol=1e-4), name


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("family", ["bert", "vit", "convnext"])
def test_layers_in_bf16_give_nearly_the_same_clipped_sum(family: str, adapter: str) -> None:
    """Clipping and sum are in float32 all the same: with one huge clip each patient's gradient is what is compared."""
    for clip in (CLIP, 1e3):
        model, inputs = network(family, ADAPTERS[adapter])
        expected = torch.cat([g.flatten() for g in slow_clipped_sum(model, inputs, clip).values()])

        def narrow(wrapped: nn.Module, inputs: dict[str, Tensor] = inputs) -> Iterator[tuple[Tensor, Tensor]]:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = wrapped(**inputs)
            yield (
                functional.binary_cross_entropy_with_logits(logits.float(), LABELS, reduction="none"),
                PATIENTS,
            )

        found = torch.cat([g.flatten() for g in step(model, narrow, clip=clip).values()]) * 6.0
        assert found.dtype == torch.float32
        assert 0 < (found - expected).norm() < 0.05 * expected.norm()


def test_the_oracle_catches_record_level_clipping() -> None:
    """The deliberately broken variant: every record its own patient."""
    model, inputs = network("bert", ADAPTERS["lora"])
    expected = slow_clipped_sum(model, inputs, CLIP)
    rows = torch.arange(12)
    got = step(model, lambda wrapped: [(losses(wrapped, inputs, rows), rows)])
    assert any(not torch.allclose(got[name] * 6.0, values, atol=1e-3) for name, values in expected.items())


def clipped_norm(gradients: Tensor, patients: Tensor, number: int) -> Tensor:
    """The clipped sum of made-up per-record gradients, through the real optimizer."""
    layer = nn.Linear(gradients.shape[1], 1, bias=False)
    plan = make(sample_rate=1.0, declared_size=1, max_grad_norm=CLIP)
    optimizer = PatientOptimizer(
        SGD(layer.parameters(), lr=1.0),
        plan=plan,
        source=Silent,  # type: ignore[arg-type]
    )
    counts = torch.bincount(patients, minlength=number)
    combined = torch.zeros(number, gradients.shape[1])
    combined.index_add_(0, patients, gradients / counts[patients, None])
    optimizer.accumulate(BlockGradients.at_hand([combined]), [(layer.weight, Place())])
    return optimizer.noised(optimizer.cells()).float()


def test_removing_one_patient_moves_the_sum_by_at_most_the_clip() -> None:
    """100 patients with 20 records each: clipping records instead would move it by up to 20 clips."""
    torch.manual_seed(0)
    directions = torch.randn(100, 1, 64).expand(100, 20, 64).reshape(2000, 64) * 5
    patients = torch.arange(100).repeat_interleave(20)
    everybody = clipped_norm(directions, patients, 100)
    without = clipped_norm(directions[20:], patients[20:] - 1, 99)
    assert (everybody - without).norm() <= CLIP * (1 + 1e-5)
    records = torch.arange(2000)
    all_records = clipped_norm(directions, records, 2000)
    fewer_records = clipped_norm(directions[20:], records[20:] - 20, 1980)
    assert (all_records - fewer_records).norm() > 15 * CLIP


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, 3e38])
def test_a_patient_with_absurd_gradients_cannot_spoil_the_sum(bad: float) -> None:
    """privacy.md, rule 4: a non-finite patient counts as zero, a huge one is clipped."""
    torch.manual_seed(0)
    gradients = torch.randn(6, 8) * 0.01
    patients = torch.tensor([0, 0, 1, 2, 2, 3])
    clean = clipped_norm(gradients[[0, 1, 2, 5]], torch.tensor([0, 0, 1, 2]), 3)
    gradients[3:5] = bad
    spoilt = clipped_norm(gradients, patients, 4)
    assert torch.isfinite(spoilt).all()
    assert (spoilt - clean).norm() <= CLIP * (1 + 1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_counts_a_non_finite_patient_as_zero(bad: float) -> None:
    """privacy.md, rule 4, through the step itself: one bad record of patient 3, in a piece with patient 2."""
    pieces = [[0, 1], [2, 3], [4, 5]]

    def spoilt(wrapped: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        for (values, numbers), piece in zip(chunks(wrapped, inputs, pieces), pieces, strict=True):
            factor = torch.ones_like(values)
            if 3 in piece:
                factor[-2] = bad
            yield values * factor, numbers

    model, inputs = network("bert", ADAPTERS["lora"])
    got = step(model, spoilt)
    model, inputs = network("bert", ADAPTERS["lora"])
    without = step(model, lambda wrapped: chunks(wrapped, inputs, [[0, 1], [2], [4, 5]]))
    for name, values in without.items():
        assert torch.allclose(got[name], values, atol=1e-6), name


@pytest.mark.parametrize("patients", [[], [0], [0, 1, 2, 3, 4, 5]])
def test_divisor_and_noise_do_not_depend_on_the_batch(patients: list[int]) -> None:
    """privacy.md, rules 5 and 24, coupled: with the same draws the noise part is the same for 0, 1, all."""
    model, inputs = network("bert", ADAPTERS["lora"])

    def batch(wrapped: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        return chunks(wrapped, inputs, [patients] if patients else [])

    quiet = step(network("bert", ADAPTERS["lora"])[0], batch) if not patients else step(model, batch)
    noisy = step(network("bert", ADAPTERS["lora"])[0], lambda w: batch(w), source=seeded(9), noise=2.0)
    source = seeded(9)
    parameters = list(model.adapter().values())
    drawn = torch.from_numpy(source.normal(sum(p.numel() for p in parameters)))
    parts = drawn.split([p.numel() for p in parameters])
    for (name, parameter), part in zip(model.adapter().items(), parts, strict=True):
        expected = (2.0 * CLIP * part.view_as(parameter) / 6.0).numpy()
        assert np.allclose((noisy[name] - quiet[name]).numpy(), expected, atol=1e-5), name


def test_an_empty_batch_still_adds_noise_and_steps() -> None:
    model, _ = network("bert", ADAPTERS["lora"])
    applied = step(model, lambda _: [], source=seeded(3), noise=2.0)
    values = torch.cat([g.flatten() for g in applied.values()])
    assert values.std() == pytest.approx(2.0 * CLIP / 6.0, rel=0.1)


def test_sum_and_noise_are_added_as_integers() -> None:
    """privacy.md, rule 10: what leaves is a whole number of cells, also where float32 has no room for them."""
    torch.manual_seed(0)
    layer = nn.Linear(4096, 1, bias=False).double()
    plan = make(sample_rate=1.0, declared_size=1, max_grad_norm=CLIP, noise_multiplier=2.0)
    optimizer = PatientOptimizer(SGD(layer.parameters(), lr=1.0), plan=plan, source=seeded(12))
    optimizer.accumulate(BlockGradients.at_hand([torch.randn(3, 4096)]), [(layer.weight, Place())])
    cells = optimizer.cells()
    assert cells.dtype == torch.int64
    expected = (cells.numpy() + plan.grid.noise(4096, seeded(12))) * plan.grid.cell
    assert np.array_equal(optimizer.noised(cells).numpy(), expected)


class Small(nn.Module):
    """Maps of one pixel: of each kernel its centre alone is live."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Conv2d(8, 4, 3, padding=1), nn.Linear(4, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(images)).flatten(1)).squeeze(1)


def one_step(wrapped: PatientGradients, optimizer: PatientOptimizer, patients: int) -> None:
    chunks = [(wrapped(images=torch.rand(patients, 8, 1, 1)), torch.arange(patients))] if patients else []
    private_step(wrapped, optimizer, chunks)


@pytest.mark.parametrize("patients", [0, 1, 20])
def test_which_weights_move_does_not_depend_on_who_was_drawn(patients: int) -> None:
    """Noise falls on what is live, in a step without anybody too, and on nothing else."""
    torch.manual_seed(0)
    model = Small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapped = PatientGradients(model, {"images": torch.zeros(0, 8, 1, 1)})
    source, plan = seeded(5), make(max_grad_norm=CLIP, noise_multiplier=2.0)
    drawn: list[int] = []
    counting = RandomSource(lambda size: drawn.append(size) or source.read(size), private=False)  # type: ignore[func-returns-value]
    optimizer = PatientOptimizer(
        SGD(model.parameters(), lr=1.0, weight_decay=0.0), plan=plan, source=counting, live=wrapped.live
    )
    one_step(wrapped, optimizer, patients)
    moved = {name: p.detach() != before[name] for name, p in model.named_parameters()}
    assert moved["layer.weight"][:, :, 1, 1].all()
    assert int(moved["layer.weight"].sum()) == 4 * 8
    assert all(moved[name].all() for name in ("layer.bias", "head.weight", "head.bias"))
    assert sum(drawn) == bytes_for(2 * (4 * 8 + 4 + 4 + 1))


def test_noise_elsewhere_than_the_gradients_is_refused() -> None:
    """An empty step would move other weights than one with patients, and so say that it was empty."""
    model = Small()
    wrapped = PatientGradients(model, {"images": torch.zeros(1, 8, 1, 1)})
    optimizer = PatientOptimizer(SGD(model.parameters(), lr=1.0), plan=make(), source=seeded(1))
    with pytest.raises(PrivacyError, match="elsewhere than the noise"):
        one_step(wrapped, optimizer, 2)


def test_splitting_a_batch_does_not_change_it() -> None:
    results = []
    for cuts in ([[0, 1, 2, 3, 4, 5]], [[p] for p in range(6)]):
        model, inputs = network("vit", ADAPTERS["lora"])
        results.append(step(model, lambda wrapped, i=inputs, c=cuts: chunks(wrapped, i, c)))
    for name in results[0]:
        assert torch.allclose(results[0][name], results[1][name], atol=1e-6)


def test_a_sum_does_not_depend_on_how_the_batch_was_split() -> None:
    """The same per-patient gradients in pieces of any size: the same integers, where floats would differ."""
    torch.manual_seed(0)
    gradients = torch.randn(24, 513) * torch.logspace(-4, 3, 24)[:, None]
    sums, floats = [], []
    for size in (1, 5, 24):
        layer = nn.Linear(513, 1, bias=False)
        optimizer = PatientOptimizer(
            SGD(layer.parameters(), lr=1.0), plan=make(max_grad_norm=CLIP), source=seeded(1)
        )
        for piece in gradients.split(size):
            optimizer.accumulate(BlockGradients.at_hand([piece]), [(layer.weight, Place())])
        sums.append(optimizer.cells())
        floats.append(torch.stack([piece.sum(dim=0) for piece in gradients.split(size)]).sum(dim=0))
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])
    # The deliberately broken variant.
    assert not torch.equal(floats[0], floats[1])


def test_more_patients_than_a_sum_can_hold_are_refused_across_pieces() -> None:
    layer = nn.Linear(2, 1, bias=False)
    # One gradient has 2^61 cells: three fit, four do not.
    plan = make(noise_multiplier=2.0**-41, declared_size=1)
    optimizer = PatientOptimizer(SGD(layer.parameters(), lr=1.0), plan=plan, source=seeded(1))
    for _ in range(3):
        optimizer.accumulate(BlockGradients.at_hand([torch.ones(1, 2)]), [(layer.weight, Place())])
    with pytest.raises(PrivacyError, match="sum of 4 gradients would overflow"):
        optimizer.accumulate(BlockGradients.at_hand([torch.ones(1, 2)]), [(layer.weight, Place())])


def test_noise_in_the_weights_has_the_variance_that_is_accounted() -> None:
    """A chi-squared test on directions that no patient touches rejects half the variance (rule 24)."""
    from scipy import stats

    model, _ = network("bert", ADAPTERS["lora"])
    applied = step(model, lambda _: [], source=seeded(11), noise=2.0)
    values = torch.cat([g.flatten() for g in applied.values()]).double().numpy() / (2.0 * CLIP / 6.0)
    statistic = float((values**2).sum())
    low, high = stats.chi2.interval(0.9999, len(values))
    assert low < statistic < high
    assert not low < statistic / 2 < high


@pytest.mark.parametrize(
    ("module", "fix"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "GroupNorm"),
        # Frozen weights, but its statistics are the batch's.
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).requires_grad_(False)), "GroupNorm"),
        (
            nn.Sequential(nn.Linear(4, 4), nn.InstanceNorm1d(4, track_running_stats=True)),
            "track_running_stats=False",
        ),
        (nn.ParameterList([nn.Parameter(torch.ones(2))]), "freeze it"),
    ],
)
def test_unsound_modules_are_refused_with_the_fix(module: nn.Module, fix: str) -> None:
    """privacy.md, rule 6."""
    with pytest.raises(PrivacyError, match=fix):
        check_sound(module)


def test_frozen_batch_norm_in_eval_mode_is_sound() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).requires_grad_(False).eval())
    check_sound(module)
    assert not module[1].training


def test_a_source_is_read_once_a_step_for_every_coordinate() -> None:
    """What the accountant composes is what was drawn: one Gaussian for every coordinate of every step."""
    drawn: list[int] = []
    words = seeded(1).read

    def read(count: int) -> bytes:
        drawn.append(count)
        return words(count)

    model, _ = network("bert", ADAPTERS["lora"])
    step(model, lambda _: [], source=RandomSource(read, private=True))
    coordinates = sum(p.numel() for p in model.adapter().values())
    assert coordinates < BLOCK
    # Two draws of the table a value.
    assert drawn == [bytes_for(2 * coordinates)]
