"""First filters set by data: the principal components of the patches that a network's first convolution sees."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikeloom.errors import UsageError
from spikeloom.train.firing_rates import tried

_PATCHES = 200_000


class _Found(Exception):
    """Ends the forward pass at the first convolution."""


@torch.no_grad()
def whiten(model: nn.Module, x: Tensor) -> str:
    """Sets the filters of the first convolution to principal components of its inputs' patches, and their negatives.

    Neighbouring pixels are nearly equal, so drawn filters see little but brightness. Behind components and the
    norm that gives each the same variance, patches are white: no direction of them hides the others (Jordan 2024,
    "94% on CIFAR-10 in 3.29 seconds on a single GPU", section 3.2). A neuron fires for one sign alone, hence the
    negatives. The filters go on to learn. Of n filters n // 2 components are taken, the largest first; filters that are
    more than twice the patch's values stay as they were drawn.

    Args:
        model: its first convolution is the one that runs first.
        x: inputs as the model takes them.

    Returns:
        The name of the convolution.

    Raises:
        UsageError: no convolution in two dimensions runs, the first one is grouped, or images are smaller than it.
    """
    names = {module: name for name, module in model.named_modules()}
    seen: list[tuple[nn.Conv2d, Tensor]] = []

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> NoReturn:
        assert isinstance(module, nn.Conv2d)
        seen.append((module, args[0]))
        raise _Found

    handles = [module.register_forward_pre_hook(stop) for module in names if isinstance(module, nn.Conv2d)]
    try:
        with tried(model):
            model(x)
    except _Found:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if not seen or seen[0][0].groups > 1:
        raise UsageError("train.whiten: the network begins with no convolution of images that joins all their channels")
    conv, images = seen[0]
    conv.weight.copy_(_with_components(conv, images.flatten(0, -4)))
    return names[conv]


def _with_components(conv: nn.Conv2d, images: Tensor) -> Tensor:
    """The weights of a convolution, the first ones replaced."""
    if any(side < extent for side, extent in zip(images.shape[-2:], conv.kernel_size, strict=True)):
        raise UsageError(
            f"train.whiten: images of {tuple(images.shape[-2:])} are smaller than the kernel {conv.kernel_size}"
        )
    patches = F.unfold(images.float(), conv.kernel_size, conv.dilation).transpose(1, 2).flatten(0, 1)
    patches = patches[:: len(patches) // _PATCHES + 1].double()
    _, vectors = torch.linalg.eigh(patches.T @ patches)
    components = vectors.T.flip(0)[: conv.out_channels // 2].to(conv.weight)
    weight = conv.weight.detach().clone(memory_format=torch.preserve_format)
    weight[: 2 * len(components)] = torch.cat([components, -components]).view(-1, *weight.shape[1:])
    return weight
