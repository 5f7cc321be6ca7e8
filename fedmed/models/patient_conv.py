"""Per-patient gradients of a convolution without those of each image."""

import torch
from opacus.grad_sample.conv import compute_conv_grad_sample
from torch import Tensor, nn
from torch.nn import functional

from fedmed.privacy.patient_gradients import PATIENT_RULES, Owners


def conv2d(layer: nn.Conv2d, images: Tensor, backprops: Tensor, owners: Owners) -> dict[Tensor, Tensor]:
    """One matrix product a patient, over the places of all its images: its gradient is written once, not once an image.

    Args:
        images: (records, channels, rows, columns).
        backprops: (records, width, rows, columns).
    """
    depthwise = layer.groups == layer.in_channels == layer.out_channels > 1
    if (
        (layer.groups != 1 and not depthwise)
        or layer.padding_mode != "zeros"
        or isinstance(layer.padding, str)
    ):
        # Opacus reads the memory of an image as if its channels came first (ConvNeXt has them last).
        per_record = compute_conv_grad_sample(layer, [images.contiguous()], backprops)
        return {p: owners.sum(values) for p, values in per_record.items()}
    flat = backprops.flatten(2)
    found: dict[Tensor, Tensor] = {}
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = owners.sum(flat.sum(dim=2))
    if not layer.weight.requires_grad:
        return found
    if depthwise:
        return {layer.weight: owners.sum(_depthwise(layer, images, backprops)), **found}
    patches = functional.unfold(images, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    summed = flat.new_zeros(owners.patients, flat.shape[1], patches.shape[1])
    first = 0
    for rows in owners.groups:
        last = first + len(rows)
        own = (
            values[rows.flatten()].unflatten(0, rows.shape).transpose(1, 2).flatten(2)
            for values in (flat, patches)
        )
        left, right = own
        torch.bmm(left, right.transpose(1, 2), out=summed[first:last])
        first = last
    return {layer.weight: summed.view(-1, *layer.weight.shape), **found}


def _depthwise(layer: nn.Conv2d, images: Tensor, backprops: Tensor) -> Tensor:
    """(records, channels, 1, *kernel): each channel by itself, one place of the kernel after the other."""
    assert not isinstance(layer.padding, str)
    (down, across), (step, stride), (far, wide) = layer.padding, layer.stride, layer.dilation
    padded = functional.pad(images, (across, across, down, down))
    rows, columns = (
        (size - 1) * by + 1 for size, by in zip(backprops.shape[2:], (step, stride), strict=True)
    )
    places = [
        torch.einsum(
            "nchw,nchw->nc",
            padded[:, :, far * i : far * i + rows : step, wide * j : wide * j + columns : stride],
            backprops,
        )
        for i in range(layer.kernel_size[0])
        for j in range(layer.kernel_size[1])
    ]
    return torch.stack(places, dim=2).view(len(images), *layer.weight.shape)


PATIENT_RULES[nn.Conv2d] = conv2d
