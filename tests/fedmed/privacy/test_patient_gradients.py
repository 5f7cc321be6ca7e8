"""Each patient's gradient against autograd on that patient alone, whatever the order of the records."""

import pytest
import torch
from torch import Tensor, nn

import fedmed.models.patient_conv  # noqa: F401
from fedmed.errors import PrivacyError
from fedmed.privacy.patient_gradients import PATIENT_RULES, Owners, PatientGradients

# Unordered, of 1 to 3 records; patient 4 has none.
PATIENTS = torch.tensor([3, 0, 1, 3, 2, 0, 5, 3, 5])


class Network(nn.Module):
    """Twice through the same layer, and a layer that is not used."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.first, self.unused = convolution, nn.Linear(3, 3)
        self.norm = nn.GroupNorm(2, convolution.out_channels)
        self.head = nn.Linear(convolution.out_channels, convolution.out_channels)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.first(images))).mean(dim=(2, 3))
        return self.head(torch.tanh(self.head(hidden))).sum(dim=1)


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 2}, {"dilation": (1, 2), "padding": (0, 1)}, {"bias": False}, {"groups": 2},
     {"padding": "valid"}, {"channels": 4, "groups": 4, "padding": (2, 1)}, {"last": True, "groups": 2},
     {"channels": 4, "groups": 4, "stride": (2, 1), "dilation": (1, 2), "padding": 2, "last": True},
     {"last": True, "stride": 2}],
)  # fmt: skip
@pytest.mark.parametrize("frozen", [(), ("first.weight",), ("first.bias", "head.weight")])
def test_it_is_the_gradient_of_one_patient_at_a_time(options: dict, frozen: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    channels = options.get("channels", 2)
    named = {name: value for name, value in options.items() if name not in ("channels", "last")}
    model = Network(nn.Conv2d(channels, 4, (5, 3), **named))
    for name, p in model.named_parameters():
        p.requires_grad = name not in frozen
    images, weights = torch.randn(len(PATIENTS), channels, 9, 8), torch.rand(len(PATIENTS))
    if "last" in options:
        # As ConvNeXt has them in memory.
        images = images.contiguous(memory_format=torch.channels_last)
    wrapped = PatientGradients(model)
    got = wrapped.combine(wrapped(images=images) * weights, PATIENTS, 6)
    wrapped.close()
    assert all(p.grad is None for p in model.parameters())
    expected = []
    for patient in range(6):
        rows = patient == PATIENTS
        if not rows.any():
            expected.append([torch.zeros_like(p) for p in wrapped.parameters])
            continue
        loss = (model(images[rows]) * weights[rows]).mean()
        own = torch.autograd.grad(loss, wrapped.parameters, allow_unused=True)
        expected.append(
            [torch.zeros_like(p) if g is None else g for g, p in zip(own, wrapped.parameters, strict=True)]
        )
    order = [0, 1, 2, 3, 4, 5]
    found = torch.cat([g.flatten(1) for g in got], dim=1)
    for patient in order:
        own = torch.cat([g.flatten() for g in expected[patient]])
        # In some order, and once.
        assert int(torch.isclose(found, own, atol=1e-5).all(dim=1).sum()) == 1, patient
    assert found.abs().max() > 0.01


def test_the_rule_for_convolutions_is_in_use() -> None:
    assert nn.Conv2d in PATIENT_RULES


def test_owners_group_patients_by_their_number_of_records() -> None:
    owners = Owners.of(PATIENTS, 6)
    assert [list(group.shape) for group in owners.groups] == [[2, 1], [2, 2], [1, 3]]
    first = 0
    for group in owners.groups:
        for place, rows in enumerate(group, start=first):
            assert len({int(PATIENTS[row]) for row in rows}) == 1
            assert owners.patient_of_record[rows].tolist() == [place] * len(rows)
        first += len(group)
    assert sorted(torch.cat([group.flatten() for group in owners.groups]).tolist()) == list(
        range(len(PATIENTS))
    )
    assert owners.sum(torch.ones(len(PATIENTS))).tolist() == [1, 1, 2, 2, 3, 0]


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
        wrapped.combine(losses, torch.tensor([0, 1]), 2)


def test_nothing_is_left_on_the_network() -> None:
    model = Network(nn.Conv2d(1, 4, 3))
    wrapped = PatientGradients(model)
    wrapped(images=torch.randn(2, 1, 6, 6))
    wrapped.close()
    assert not any(module._forward_hooks for module in model.modules())
