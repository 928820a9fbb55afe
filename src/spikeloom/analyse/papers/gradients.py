"""Gradients by depth: how their norm changes from block to block of a residual network (SEW ResNet, figures 6 to 8)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spikeloom.errors import UsageError
from spikeloom.layers import Block, MembraneBlock, NormSpike, PlainBlock


@dataclass(frozen=True)
class BlockGradient:
    """What reaches the input of a block in the backward pass.

    Attributes:
        block: its name; "output" for what the last block hands on.
        norm: `||dL/dS||_2` over all steps, images, channels and positions.
        same_shape: whether the shortcut is the identity.
    """

    block: str
    norm: float
    same_shape: bool


def residual_blocks(model: nn.Module) -> dict[str, Block]:
    """The residual blocks of a network by name, in their order.

    Raises:
        UsageError: it has none.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Block)}
    if not found:
        raise UsageError(f"{type(model).__name__} has no residual blocks: name a residual network")
    return found


def keeps_shape(block: Block) -> bool:
    """Whether the shortcut of a block is the identity; of a block without one, whether it could be."""
    if not isinstance(block, PlainBlock):
        return isinstance(block.shortcut, nn.Identity)
    first, last = (next(m for m in order if isinstance(m, nn.Conv2d)) for order in _ends(block.branch))
    return first.in_channels == last.out_channels and first.stride == (1, 1)


def _ends(branch: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    modules = list(branch.modules())
    return modules, modules[::-1]


def block_gradients(
    model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> list[BlockGradient]:
    """Norms of the gradients at the inputs of all blocks, from one backward pass.

    Args:
        model: a residual network, in the mode it shall run in. Its `.grad` stay as they are.
        x: [N, C, H, W] or [T, N, C, H, W].
        y: labels [N].
        loss: from logits [T, N, classes] and labels to a scalar.

    Returns:
        One entry a block, its input's, and a last one for the output of the last block; of membrane blocks those of
        the potential that their shortcut carries.
    """
    blocks = residual_blocks(model)
    seen: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[-1])

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        seen.append(output[-1] if isinstance(output, tuple) else output)

    handles = [block.register_forward_pre_hook(before) for block in blocks.values()]
    handles.append(list(blocks.values())[-1].register_forward_hook(after))
    if any(isinstance(block, MembraneBlock) for block in blocks.values()):
        # Watched neurons run apart from their norms, so that the gradient of a potential includes its spikes'.
        units = [module for module in model.modules() if isinstance(module, NormSpike)]
        handles += [unit.neuron.register_forward_hook(lambda *_: None) for unit in units]
    try:
        value = loss(model(x), y)
    finally:
        for handle in handles:
            handle.remove()
    gradients = torch.autograd.grad(value, seen, materialize_grads=True)
    norms = [gradient.double().norm().item() for gradient in gradients]
    rows = [(name, keeps_shape(block)) for name, block in blocks.items()]
    return [
        BlockGradient(name, norm, same) for (name, same), norm in zip([*rows, ("output", False)], norms, strict=True)
    ]


def identity_regions(gradients: list[BlockGradient]) -> list[list[BlockGradient]]:
    """Runs of at least two consecutive places between which all shortcuts are identities."""
    regions: list[list[BlockGradient]] = [[]]
    for place in gradients:
        regions[-1].append(place)
        if not place.same_shape:
            regions.append([])
    return [region for region in regions if len(region) > 1]


def growth(gradients: list[BlockGradient], part: Literal["all", "deep", "shallow"] = "all") -> float:
    """By how much the logarithm of the norm grows per block on the way back to the input, inside identity regions.

    The least-squares slope of every region, weighted by its blocks; 0 is flat, below 0 gradients vanish. `-inf` where
    a norm is 0.

    Args:
        gradients: of all blocks.
        part: of each region: all of it, its deepest third or its shallowest.

    Raises:
        UsageError: there are no such regions.
    """
    total, blocks = 0.0, 0
    for region in identity_regions(gradients):
        norms, third = [place.norm for place in region[::-1]], max(2, len(region) // 3)
        norms = {"all": norms, "deep": norms[:third], "shallow": norms[-third:]}[part]
        if 0 in norms:
            return -math.inf
        middle, last = (len(norms) - 1) / 2, len(norms) - 1
        slope = sum((i - middle) * math.log(norm) for i, norm in enumerate(norms))
        total += last * slope / sum((i - middle) ** 2 for i in range(len(norms)))
        blocks += last
    if not blocks:
        raise UsageError("every block of this network changes the shape: there are no identity regions to compare in")
    return total / blocks


def verdict(gradients: list[BlockGradient]) -> str:
    """What the norms do on the way back to the input, in a word or two.

    "flat" is less than 0.2 % a block, "explodes" above 20 %, "vanishes" reaches 0; "decays, then flat" loses at the
    deep end of the identity regions, and less than a tenth of that, a block, at their shallow ends.
    """
    rate, deep, shallow = growth(gradients), growth(gradients, "deep"), growth(gradients, "shallow")
    if rate == -math.inf:
        return "vanishes"
    if deep < -0.002 and abs(shallow) < abs(deep) / 10:
        return "decays, then flat"
    if abs(rate) < 0.002:
        return "flat"
    return "decays" if rate < 0 else "explodes" if rate > 0.2 else "grows slowly"


def draw_gradients(networks: Mapping[str, list[BlockGradient]], title: str) -> Any:
    """Norm against block, logarithmic, one line a network; blocks that change the shape are marked."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, rows in networks.items():
        marks = ["circle" if row.same_shape or row.block == "output" else "diamond-open" for row in rows]
        figure.add_scatter(
            x=list(range(len(rows))),
            y=[row.norm or None for row in rows],
            name=name,
            text=[row.block for row in rows],
            mode="lines+markers",
            marker_symbol=marks,
        )
    figure.update_layout(title=title, xaxis_title="block (open diamonds change the shape)", yaxis_title="|dL/dS|")
    figure.update_yaxes(type="log")
    return figure
