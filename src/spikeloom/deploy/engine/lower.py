"""From a trained network to a plan of the event engine, by the graph that `torch.export` makes of it."""

from __future__ import annotations

import contextlib
import copy
import operator
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.deploy.engine import lower_arithmetic as arithmetic
from spikeloom.deploy.engine import lower_layers as layers
from spikeloom.deploy.engine import lower_views as views
from spikeloom.deploy.engine.lower_state import Handler, Lowered, Lowering
from spikeloom.deploy.exchange.fold import fold
from spikeloom.deploy.exchange.fold_pairs import Norm
from spikeloom.deploy.exchange.graph import trace
from spikeloom.errors import UsageError

aten = torch.ops.aten

OPERATIONS: dict[Any, Handler] = {
    # --- in other axes: lower_views -----------------------------------------------------------------------------------
    aten.alias: views.alias,
    aten.clone: views.alias,
    aten.contiguous: views.alias,
    aten.detach: views.alias,
    aten.detach_: views.alias,
    aten.dropout: views.dropout,
    aten.dropout_: views.dropout,
    aten.lift_fresh_copy: views.alias,
    aten.to: views.to,
    operator.getitem: views.getitem,
    aten.expand: views.expand,
    aten.repeat: views.repeat,
    aten.stack: views.stack,
    aten.cat: views.cat,
    aten.select: views.select,
    aten.slice: views.slice,
    aten.reshape: views.reshape,
    aten.view: views.reshape,
    aten.flatten: views.reshape,
    aten.unflatten: views.reshape,
    aten.squeeze: views.reshape,
    aten.squeeze_: views.reshape,
    aten.unsqueeze: views.reshape,
    aten.unsqueeze_: views.reshape,
    aten.mT: views.mT,
    aten.transpose: views.transpose,
    aten.transpose_: views.transpose,
    # --- layers: lower_layers -----------------------------------------------------------------------------------------
    aten.conv1d: layers.conv1d,
    aten.conv2d: layers.conv2d,
    aten.linear: layers.linear,
    torch.ops.spikeloom.scan: layers.scan,
    aten.max_pool2d: layers.max_pool2d,
    aten.avg_pool2d: layers.avg_pool2d,
    aten.adaptive_avg_pool2d: layers.adaptive_avg_pool2d,
    aten._adaptive_avg_pool2d: layers.adaptive_avg_pool2d,
    aten.pad: layers.pad,
    aten.batch_norm: layers.batch_norm,
    aten.matmul: layers.matmul,
    aten.relu: layers.relu,
    aten.relu_: layers.relu,
    aten.sigmoid: layers.sigmoid,
    aten.sigmoid_: layers.sigmoid,
    aten.hardtanh: layers.hardtanh,
    aten.hardtanh_: layers.hardtanh,
    # --- sums and products: lower_arithmetic --------------------------------------------------------------------------
    aten.add: arithmetic.add,
    aten.add_: arithmetic.add,
    aten.sub: arithmetic.sub,
    aten.sub_: arithmetic.sub,
    aten.rsub: arithmetic.rsub,
    aten.neg: arithmetic.neg,
    aten.neg_: arithmetic.neg,
    aten.mul: arithmetic.mul,
    aten.mul_: arithmetic.mul,
    aten.div: arithmetic.div,
    aten.div_: arithmetic.div,
    aten.mean: arithmetic.mean,
    aten.sum: arithmetic.sum,
}
"""What each operation of a graph becomes: by its overload packet, or by the function that a node calls."""


def lower(model: nn.Module, example: Tensor) -> Lowered:
    """A plan of the model in eval mode, norms folded, and its weights.

    Args:
        model: takes [N, ...] or [T, N, ...], gives logits [T, N, classes] or [N, classes].
        example: an input.

    Raises:
        Unsupported: the network has an operation that no step of a plan stands for.
        UsageError: the network cannot be traced, or takes or gives something else.
    """
    twin = copy.deepcopy(model).eval().float()
    axis, example = two_images(twin, example.detach().float())
    folded = fold(twin, example.narrow(axis, 0, 1))
    for module in folded.modules():
        if isinstance(module, Norm):  # one that stays is then seen by itself, not as one op with its neurons
            module.register_forward_hook(lambda *_: None)
    # The numbers of steps and images are symbols where the network takes any.
    program = trace(folded, example, dict.fromkeys(range(axis + 1), torch.export.Dim.AUTO), "native")
    return Lowering(program, axis, OPERATIONS).result(example)


def two_images(model: nn.Module, example: Tensor) -> tuple[int, Tensor]:
    """Which axis of the input numbers the images: the one along which two give logits for two; and an input of two
    images, because an axis of one would be taken for a constant. So would a single step, which is taken twice."""

    def logits(x: Tensor) -> tuple[int, ...]:
        # A network of a fixed number of steps or images does not take all.
        with torch.no_grad(), contextlib.suppress(ValueError, RuntimeError, IndexError):
            return tuple(model(x).shape)
        return ()

    for axis in range(min(2, example.dim())):
        one = example.narrow(axis, 0, 1)
        two = example.narrow(axis, 0, 2) if example.shape[axis] > 1 else torch.cat([one, one], axis)
        shapes = logits(one), logits(two)
        # [T, N, classes] or [N, classes]
        if {len(shape) for shape in shapes} in ({2}, {3}) and [shape[-2] for shape in shapes] == [1, 2]:
            if axis == 1 and example.shape[0] == 1 and logits(longer := torch.cat([two, two])):
                return axis, longer
            return axis, two
    raise UsageError(
        f"example {tuple(example.shape)}: the network must take [N, ...] or [T, N, ...] for any N, and give logits "
        "[T, N, classes] or [N, classes]"
    )
