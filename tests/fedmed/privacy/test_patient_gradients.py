"""Each patient's gradient against autograd on that patient alone, whatever the order of the records."""

import pytest
import torch
from torch import Tensor, nn

from fedmed.errors import PrivacyError
from fedmed.models.row_linear import RowLinear
from fedmed.privacy import patient_gradients
from fedmed.privacy.jobs import Jobs
from fedmed.privacy.layer_gradients import REMEMBERED, RULES
from fedmed.privacy.patient_gradients import Owners, PatientGradients

# Unordered, of 1 to 3 records; number 4 is nobody's.
PATIENTS = torch.tensor([3, 0, 1, 3, 2, 0, 5, 3, 5])


class Network(nn.Module):
    """Twice through the same layer, 2-D and 3-D inputs, a layer that Opacus alone knows and one that is not used."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.first, self.unused = convolution, nn.Linear(3, 3)
        self.norm = nn.GroupNorm(2, convolution.out_channels)
        self.tokens = nn.Linear(convolution.out_channels, convolution.out_channels)
        self.layer_norm = nn.LayerNorm(convolution.out_channels)
        self.head = nn.Linear(convolution.out_channels, convolution.out_channels)
        self.row = RowLinear(convolution.out_channels, 2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.first(images))).flatten(2).transpose(1, 2)
        hidden = self.layer_norm(torch.tanh(self.tokens(hidden))).mean(dim=1)
        return self.row(self.head(torch.tanh(self.head(hidden)))).sum(dim=1)


def expected_gradients(
    model: nn.Module, parameters: list[nn.Parameter], images: Tensor, weights: Tensor
) -> Tensor:
    """The reference: (patients with records, entries), autograd on one patient at a time."""
    rows = []
    for patient in PATIENTS.unique():
        own = patient == PATIENTS
        loss = (model(images=images[own]) * weights[own]).mean()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for g, p in zip(found, parameters, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def assert_same_patients(found: Tensor, expected: Tensor) -> None:
    """Each patient once, in some order."""
    assert len(found) == len(expected)
    for patient in expected:
        assert int(torch.isclose(found, patient, atol=1e-5).all(dim=1).sum()) == 1
    assert expected.abs().max() > 0.01


def combined(wrapped: PatientGradients, losses: Tensor, patients: Tensor = PATIENTS) -> Tensor:
    """(patients, entries of all parameters in their order), whatever the blocks and whatever they leave out."""
    rows = []
    for gradients, layout in wrapped.combine(losses, patients):
        number = gradients.patients
        flat = torch.cat([part.movedim(1, 0).flatten(1) for part in gradients.computed()], dim=1)
        jobs = Jobs(gradients)
        compiled = [torch.from_numpy(jobs.gradient(patient).copy()) for patient in range(number)]
        torch.testing.assert_close(torch.stack(compiled), flat, atol=1e-5, rtol=1e-5)
        whole = {p: torch.zeros(number, *p.shape) for p in wrapped.parameters}
        first = 0
        for p, place in layout:
            entries = place.of(p).numel()
            for patient, values in zip(whole[p], flat[:, first : first + entries], strict=True):
                part = place.of(patient)
                part.copy_(values.view(part.shape))
            first += entries
        assert first == flat.shape[1]
        rows.append(torch.cat([own.flatten(1) for own in whole.values()], dim=1))
    return torch.cat(rows)


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 2}, {"dilation": (1, 2), "padding": (0, 1)}, {"bias": False}, {"groups": 2},
     {"padding": "valid"}, {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"},
     {"channels": 4, "groups": 4, "padding": (2, 1)}, {"last": True, "groups": 2},
     {"channels": 4, "groups": 4, "stride": (2, 1), "dilation": (1, 2), "padding": 2, "last": True},
     {"last": True, "stride": 2}, {"channels": 8}, {"channels": 9, "dilation": (1, 2), "padding": (2, 1)},
     {"channels": 8, "padding": 1, "padding_mode": "reflect", "last": True}, {"channels": 8, "stride": (2, 1)}],
)  # fmt: skip
@pytest.mark.parametrize(
    "frozen", [(), ("first.weight", "tokens.bias"), ("first.bias", "head.weight", "norm.bias")]
)
@pytest.mark.parametrize("entries", [1, 2_000])
def test_it_is_the_gradient_of_one_patient_at_a_time(
    options: dict, frozen: tuple[str, ...], entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One patient a block, or several; twice, as what is held is used again."""
    monkeypatch.setitem(patient_gradients.BLOCK_ENTRIES, "cpu", entries)
    torch.manual_seed(0)
    channels = options.get("channels", 2)
    named = {name: value for name, value in options.items() if name not in ("channels", "last")}
    model = Network(nn.Conv2d(channels, 4, (5, 3), **named))
    for name, p in model.named_parameters():
        p.requires_grad = name not in frozen
    wrapped = PatientGradients(model)
    for _ in range(2):
        images, weights = torch.randn(len(PATIENTS), channels, 9, 8), torch.rand(len(PATIENTS))
        if "last" in options:
            # As ConvNeXt has them in memory.
            images = images.contiguous(memory_format=torch.channels_last)
        got = combined(wrapped, wrapped(images=images) * weights)
        assert all(p.grad is None for p in model.parameters())
        assert_same_patients(got, expected_gradients(model, wrapped.parameters, images, weights))
    wrapped.close()


class Unused(nn.Module):
    """A layer that only bright batches go through."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.sometimes = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(images))
        return (self.sometimes(hidden) if bool(images.sum() > 0) else hidden).sum(dim=1)


def test_a_layer_that_is_not_used_has_no_gradient_left_from_before() -> None:
    torch.manual_seed(0)
    model = Unused()
    wrapped = PatientGradients(model)
    images, weights = torch.rand(len(PATIENTS), 3), torch.rand(len(PATIENTS))
    for sign in (1, -1):
        got = combined(wrapped, wrapped(images=sign * images) * weights)
        assert_same_patients(got, expected_gradients(model, wrapped.parameters, sign * images, weights))


def test_records_in_order_and_not_give_the_same() -> None:
    """In order nothing is moved; the layers see each record alone here, so that the bits agree."""
    torch.manual_seed(0)
    model = Network(nn.Conv2d(1, 4, 3))
    images = torch.randn(len(PATIENTS), 1, 6, 6)
    wrapped = PatientGradients(model)
    order = Owners.of(PATIENTS).order
    assert order is not None
    assert Owners.of(PATIENTS[order]).order is None
    mixed = combined(wrapped, wrapped(images=images))
    ordered = combined(wrapped, wrapped(images=images[order]), PATIENTS[order])
    assert torch.allclose(mixed, ordered, atol=1e-6)


def test_a_convolution_that_opacus_would_pad_with_zeros_is_refused() -> None:
    wrapped = PatientGradients(Network(nn.Conv2d(2, 4, 3, groups=2, padding=1, padding_mode="circular")))
    losses = wrapped(images=torch.randn(2, 2, 6, 6))
    with pytest.raises(PrivacyError, match="circular"):
        wrapped.combine(losses, torch.tensor([0, 1]))


def test_the_rules_are_in_use() -> None:
    assert set(RULES) >= {nn.Linear, nn.Conv2d, nn.GroupNorm, RowLinear}


@pytest.mark.parametrize("most", [1, 2, 100])
def test_owners_group_patients_by_their_number_of_records(most: int) -> None:
    owners = Owners.of(PATIENTS)
    assert owners.groups == [(2, 1), (2, 2), (1, 3)]
    assert owners.counts.tolist() == [3, 2, 1, 3, 1, 2, 2, 3, 2]
    ordered = owners.ordered(PATIENTS)
    seen = []
    for block in owners.blocks(most):
        assert block.patients <= most
        for own in block.of(ordered):
            assert len(set(own.tolist())) == 1
            assert len(own) == int((own[0] == PATIENTS).sum())
            seen.append(int(own[0]))
    assert sorted(seen) == [0, 1, 2, 3, 5]


class Maps(nn.Module):
    """One convolution; with `twice` of the images side by side as well."""

    def __init__(self, channels: int, *, twice: bool, **options: object) -> None:
        super().__init__()
        self.layer, self.twice = nn.Conv2d(channels, 1, 3, bias=False, **options), twice  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        found = self.layer(images).tanh().sum(dim=(1, 2, 3))
        if self.twice:
            found = found + self.layer(images.repeat(1, 1, 3, 3)).tanh().sum(dim=(1, 2, 3))
        return found


@pytest.mark.parametrize("numbers", [[0], [0, 1, 2, 3], [1, 0, 2], [0, 2, 4]])
def test_patients_of_one_record_stay_as_they_are(numbers: list[int]) -> None:
    owners = Owners.of(torch.tensor(numbers))
    assert (owners.groups, owners.counts.tolist()) == ([(len(numbers), 1)], [1] * len(numbers))
    assert owners.ordered(torch.tensor(numbers)).tolist() == sorted(numbers)


@pytest.mark.parametrize(
    ("size", "options", "entries"),
    [((1, 1), {"padding": 1}, 1), ((2, 1), {"padding": 1}, 3), ((2, 2), {"padding": 1}, 9),
     ((2, 1), {"padding": 2, "stride": 2, "dilation": 2}, 1), ((5, 5), {}, 9),
     ((3, 3), {"padding": 1, "padding_mode": "reflect"}, 9)],
)  # fmt: skip
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("channels", [1, 8])
def test_weights_that_meet_padding_alone_are_left_out(
    size: tuple[int, int], options: dict, entries: int, twice: bool, channels: int
) -> None:
    """Of a map smaller than the kernel; but not where another call of the layer meets them."""
    torch.manual_seed(0)
    model = Maps(channels, twice=twice, **options)
    images, weights = torch.randn(len(PATIENTS), channels, *size), torch.rand(len(PATIENTS))
    # What decides is the shape: of nobody's record, too.
    wrapped = PatientGradients(model, {"images": images[:0]})
    gradients, _ = next(wrapped.combine(wrapped(images=images) * weights, PATIENTS))
    assert gradients.entries == channels * (9 if twice else entries)
    expected = expected_gradients(model, wrapped.parameters, images, weights)
    assert_same_patients(combined(wrapped, wrapped(images=images) * weights), expected)
    wrapped.close()
    # Without an example nothing is known, and nothing left out.
    wrapped = PatientGradients(model)
    assert not wrapped.live
    assert_same_patients(combined(wrapped, wrapped(images=images) * weights), expected)
    wrapped.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_what_is_live_does_not_depend_on_the_data() -> None:
    """Not on values, nor on who was drawn: else the weights that move would tell."""
    model = Maps(8, twice=False, padding=1)
    seen = [
        PatientGradients(model, {"images": values}).live[model.layer.weight]
        for values in (torch.zeros(3, 8, 1, 2), torch.full((1, 8, 1, 2), torch.nan), torch.ones(0, 8, 1, 2))
    ]
    assert seen == [(slice(0, 1), slice(0, 8), slice(1, 2), slice(0, 3))] * 3


def test_a_group_s_statistics_are_those_of_the_forward_pass_or_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = Network(nn.Conv2d(2, 4, 3))
    images, weights = torch.randn(len(PATIENTS), 2, 6, 6), torch.rand(len(PATIENTS))
    wrapped = PatientGradients(model)
    kept = combined(wrapped, wrapped(images=images) * weights)
    assert [len(call.inputs) for call in calls_of(wrapped, nn.GroupNorm, images)] == [3]
    monkeypatch.setitem(REMEMBERED, nn.GroupNorm, lambda *_: [])
    assert [len(call.inputs) for call in calls_of(wrapped, nn.GroupNorm, images)] == [1]
    assert torch.allclose(combined(wrapped, wrapped(images=images) * weights), kept, atol=1e-6)


def calls_of(wrapped: PatientGradients, kind: type, images: Tensor) -> list[patient_gradients._Call]:
    """What was remembered of layers of that kind."""
    wrapped(images=images)
    return [call for call in wrapped._calls if type(call.module) is kind]


def test_layers_that_lay_out_one_weight_in_two_ways_are_refused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, stride=2)
            self.two.weight = self.one.weight

        def forward(self, images: Tensor) -> Tensor:
            return self.one(images).sum(dim=(1, 2, 3)) + self.two(images).sum(dim=(1, 2, 3))

    wrapped = PatientGradients(Shared())
    losses = wrapped(images=torch.randn(2, 8, 5, 5))
    with pytest.raises(PrivacyError, match="give each its own"):
        next(wrapped.combine(losses, torch.tensor([0, 1])))


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(50, 50)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images)


def test_no_more_than_a_block_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of forty patients two at a time: their gradients are never all there."""
    wrapped = PatientGradients(Wide())
    monkeypatch.setitem(patient_gradients.BLOCK_ENTRIES, "cpu", 2 * 50 * 51)
    losses = wrapped(images=torch.randn(40, 50)).sum(dim=1)
    blocks = [gradients for gradients, _ in wrapped.combine(losses, torch.arange(40))]
    assert [gradients.patients for gradients in blocks] == [2] * 20
    parts = [part for gradients in blocks for part in gradients.computed()]
    # One memory for all.
    assert {part.untyped_storage().nbytes() for part in parts} == {4 * 2 * 50 * 51}
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


@pytest.mark.parametrize("spoil", ["output", "input"])
def test_layers_that_work_in_place_are_refused(spoil: str) -> None:
    """Autograd would give the gradient of what stands there now, without a word."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, values: Tensor) -> Tensor:
            hidden = self.first(values)
            if spoil == "output":
                return self.second(hidden.relu_()).squeeze(1)
            values.mul_(2)
            return self.second(hidden).squeeze(1)

    wrapped = PatientGradients(InPlace())
    losses = wrapped(values=torch.randn(2, 3))
    with pytest.raises(PrivacyError, match="in place"):
        wrapped.combine(losses, torch.tensor([0, 1]))


def test_nothing_is_left_on_the_network() -> None:
    model = Network(nn.Conv2d(1, 4, 3))
    wrapped = PatientGradients(model)
    wrapped(images=torch.randn(2, 1, 6, 6))
    wrapped.close()
    assert not any(module._forward_hooks for module in model.modules())


class Folded(nn.Module):
    """Parts of images side by side in one dimension, as an encoder with windows has them; no layer has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(images.flatten(0, 1)))
        return self.head(hidden.unflatten(0, (len(images), -1)).mean(dim=1)).squeeze(1)


def test_rows_that_are_not_records_are_nobody_s_gradient() -> None:
    """The first rows would be taken for the patients': removing one would move the gradients of all who follow."""
    torch.manual_seed(0)
    wrapped = PatientGradients(Folded())
    images = torch.randn(6, 3, 4)
    with pytest.raises(PrivacyError, match="a trainable Linear reads or writes 18 rows for 6 records"):
        wrapped.combine(wrapped(images=images), torch.arange(6))
    # The deliberately broken variant: without the check nothing else notices.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patient_gradients._Call, "check", lambda *_: None)
        whole, without = (
            combined(wrapped, wrapped(images=own), torch.arange(len(own))) for own in (images, images[1:])
        )
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in zip(whole[1:], without, strict=True))
