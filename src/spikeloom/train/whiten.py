"""First filters set by data: the principal components of the patches of images that a network's first layer sees."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikeloom.errors import UsageError

_PATCHES = 200_000


def first_convolution(model: nn.Module) -> nn.Conv2d:
    """The convolution of a network that stands first.

    Raises:
        UsageError: there is none of images that joins all their channels.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            return module
    raise UsageError("train.whiten: the network has no convolution of images that joins all their channels")


def check_images(conv: nn.Conv2d, x: Tensor) -> None:
    """Refuses inputs that have no patches for the first convolution to see.

    Args:
        conv: as `first_convolution` finds it.
        x: inputs as the model takes them.

    Raises:
        UsageError: they are no images, have other channels, or are smaller than the kernel.
    """
    if x.dim() < 4 or x.shape[-3] != conv.in_channels:
        raise UsageError(
            f"train.whiten: the first convolution takes images of {conv.in_channels} channels, and inputs are "
            f"{list(x.shape)}"
        )
    if any(side < extent for side, extent in zip(x.shape[-2:], conv.kernel_size, strict=True)):
        raise UsageError(f"train.whiten: inputs {list(x.shape)} are smaller than the kernel, {conv.kernel_size}")


@torch.no_grad()
def whiten(conv: nn.Conv2d, x: Tensor) -> None:
    """Sets the filters of the first convolution to principal components of images' patches, and their negatives.

    Neighbouring pixels are nearly equal, so drawn filters see little but brightness. Behind components and the norm
    that gives each the same variance, patches are white: no direction of them hides the others (Jordan 2024, "94% on
    CIFAR-10 in 3.29 seconds on a single GPU", section 3.2). A neuron fires for one sign alone, hence the negatives.
    Of n filters n // 2 components are taken, the largest first; filters that are more than twice the values of a patch
    stay as they were drawn.

    Args:
        conv: as `first_convolution` finds it.
        x: images [..., C, H, W] as the model takes them.
    """
    patches = F.unfold(x.flatten(0, -4).float(), conv.kernel_size, conv.dilation).transpose(1, 2).flatten(0, 1)
    patches = patches[:: len(patches) // _PATCHES + 1].double()
    _, vectors = torch.linalg.eigh(patches.T @ patches)
    components = vectors.T.flip(0)[: conv.out_channels // 2].to(conv.weight)
    filters = torch.cat([components, -components]).unflatten(1, conv.weight.shape[1:])
    conv.weight[: len(filters)] = filters
