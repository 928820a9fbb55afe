"""Lowering of layers: convolutions, neurons, pools, norms, attention, activations: handlers of `lower`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spikeloom.deploy.engine.ir import Affine, Attention, Conv, Fire, Flatten, Map, Mean, Neuron, PadChannels, Pool
from spikeloom.deploy.engine.lower_state import Lowering, Product, Spikes
from spikeloom.deploy.engine.views import View, same
from spikeloom.ops.scan.native import charge
from spikeloom.ops.scan.params import ScanParams


def conv2d(
    low: Lowering,
    x: View,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] | str = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> View:
    sides = {*stride}
    if len(sides) != 1 or {*dilation} != {1} or isinstance(padding, str):
        raise low.unsupported(
            f"stride {list(stride)}, dilation {list(dilation)}, padding {_shown(padding)}; one stride for both axes, "
            "no dilation and padding in numbers are supported"
        )
    two = padding if len(padding) == 2 else (padding[0], padding[0])
    return low.emit(
        Conv,
        x=low.as_map(x),
        weight=low.weight(1, weight),
        bias=low.weight(2, bias),
        stride=sides.pop(),
        padding=(int(two[0]), int(two[1])),
        groups=groups,
    )


def conv1d(
    low: Lowering,
    x: View,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] | str = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> View:
    if {*dilation} != {1} or isinstance(padding, str) or stride[0] != 1:
        raise low.unsupported(
            f"stride {list(stride)}, dilation {list(dilation)}, padding {_shown(padding)}; stride 1, no dilation and "
            "padding in numbers are supported"
        )
    tokens = low.values[x.value].height > 1
    if tokens and (weight.shape[2] > 1 or padding[0]):
        raise low.unsupported("a window of tokens that are places of a map; one token at a time is supported")
    return low.emit(
        Conv,
        x.form if tokens else "row",
        x=low.as_map(x),
        weight=low.weight(1, weight, (*weight.shape[:2], 1, weight.shape[2])),
        bias=low.weight(2, bias),
        padding=(0, int(padding[0])),
        groups=groups,
    )


def _shown(padding: Sequence[int] | str) -> str:
    return padding if isinstance(padding, str) else str(list(padding))


def linear(low: Lowering, x: View, weight: Tensor, bias: Tensor | None = None) -> View:
    if weight.dim() != 2:
        raise low.unsupported(f"a weight of {weight.dim()} axes; [out, in] is supported")
    out, features = weight.shape
    index = x.value
    if x.form == "flat":
        value = low.values[index]
        weight = weight.view(out, value.channels, *value.places).permute(0, 2, 3, 1)
        index = low.emit(Flatten, x=index).value
    elif x.form not in ("vector", "tokens.T"):
        raise low.unsupported(f"it reads {x.form}; flat, vector, tokens.T are supported")
    form = "tokens.T" if x.form == "tokens.T" else "vector"
    return low.emit(Conv, form, x=index, weight=low.weight(1, weight, (out, features, 1, 1)), bias=low.weight(2, bias))


def scan(
    low: Lowering,
    x: View,
    v: Any,
    decay: Tensor | None,
    gain: Tensor | None,
    scale: Any,
    slope: Any,
    numbers: Sequence[float],
    return_v: bool,
) -> Spikes:
    """Neurons: `ops.scan.scan`."""
    if scale is not None:
        raise low.unsupported("a rectified charge; that of IF and LIF is supported")
    if v is not None:
        raise low.unsupported("potentials to start with; neurons that start from rest are supported")
    if low.length is None and same(low.axes_before(x)[0], 1):
        low.length = 1
    if not low.all_steps(x):
        raise low.unsupported("its first axis is not that of the steps: neurons take [T, N, ...]")
    params = ScanParams.unpack(numbers)
    kept, added, _scale = charge(decay, gain, None, params)
    neuron = low.part(
        Neuron,
        decay=float(kept),
        gain=float(added),
        threshold=params.thresholds,
        v_reset=params.v_reset,
        strict_firing=params.strict,
    )
    value = low.values[x.value]
    index = x.value
    if value.spikes:
        index = low.emit(Map, op="scale", x=index, high=1.0).value
    made = low.emit(Fire, x=index, keep_sum=False, neuron=neuron)
    return Spikes(replace(x, value=made.value))


# --- pools and padding ------------------------------------------------------------------------------------------------


def max_pool2d(
    low: Lowering,
    x: View,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> View:
    if {*dilation} != {1} or ceil_mode:
        raise low.unsupported(f"dilation {list(dilation)}, ceil_mode={ceil_mode}; neither is supported")
    return _pool(low, "max_pool", x, kernel_size, stride or kernel_size, padding)


def avg_pool2d(
    low: Lowering,
    x: View,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> View:
    if divisor_override is not None:
        raise low.unsupported(f"divisor_override={divisor_override}; a mean is supported")
    fields: Any = {"ceil": ceil_mode, "count_padding": count_include_pad}
    return _pool(low, "avg_pool", x, kernel_size, stride or kernel_size, padding, **fields)


def _pool(low: Lowering, op: str, x: View, kernel: Any, stride: Any, padding: Any, **fields: Any) -> View:
    if any(len({*sides}) != 1 for sides in (kernel, stride, padding)):
        raise low.unsupported(
            f"a window of {list(kernel)}, stride {list(stride)}, padding {list(padding)}; square ones are supported"
        )
    return low.emit(Pool, op=op, x=low.as_map(x), kernel=kernel[0], stride=stride[0], padding=padding[0], **fields)


def adaptive_avg_pool2d(low: Lowering, x: View, output_size: Sequence[int]) -> View:
    if x.form != "map" or {*output_size} != {1}:
        raise low.unsupported(f"a {x.form} to {list(output_size)} places; a map to one place is supported")
    return low.emit(Mean, x=x.value)


def pad(low: Lowering, x: View, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> View:
    if x.form != "map" or len(pad) != 6 or any(pad[:4]) or mode != "constant" or value:
        raise low.unsupported(
            f"padding {list(pad)} of a {x.form} in mode {mode} with {value or 0}; channels of zeros are supported"
        )
    return low.emit(PadChannels, x=x.value, before=pad[4], behind=pad[5])


# --- norms, attention, activations ------------------------------------------------------------------------------------


def batch_norm(
    low: Lowering,
    x: View,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = False,
) -> View:
    if training or running_mean is None or running_var is None:
        raise low.unsupported(
            "a norm of batch statistics, whose result for an image depends on the others; running ones are supported"
        )
    if low.lead(x) != 1 or x.form not in ("map", "row", "vector", "tokens"):
        raise low.unsupported(f"it reads {x.form}; map, row, vector, tokens behind one axis of images are supported")
    # As PyTorch computes it.
    scale = (1 if weight is None else weight) / torch.sqrt(running_var + eps)
    shift = (0 if bias is None else bias) - running_mean * scale
    names = {
        "weight": low.constant(scale.view(1, 1, -1), "weight"),
        "bias": low.constant(shift.view(1, 1, -1), "bias"),
    }
    return replace(x, value=low.emit(Affine, op="affine", x=x.value, **names).value)


def matmul(low: Lowering, x: View | Product, y: View | Product) -> View | Product:
    """V (K^T Q) or (V K^T) Q, for tokens in columns, and their transposes (Q K^T) V and Q (K^T V): the same sums."""
    if isinstance(x, View) and isinstance(y, View):
        return Product(x, y)
    if isinstance(x, View) and isinstance(y, Product):
        parts = x, y.left, y.right
    elif isinstance(x, Product) and isinstance(y, View):
        parts = x.left, x.right, y
    else:
        raise low.unsupported("a product of four values; one of three is supported")
    rows = parts[0].form == "heads.T"
    outer, inner = ("heads.T", "heads") if rows else ("heads", "heads.T")
    forms = tuple(part.form for part in parts)
    if forms != (outer, inner, outer) or len({part.heads for part in parts}) != 1:
        raise low.unsupported(
            f"a product of these axes: {', '.join(forms)}; those of q, k and v in heads are supported, Q (K^T V)"
        )
    q, k, v = parts if rows else reversed(parts)
    made = low.emit(Attention, q=q.value, k=k.value, v=v.value, heads=q.heads, scale=1.0)
    return replace(made, form=outer, heads=q.heads)


def relu(low: Lowering, x: View) -> View:
    return low.map("relu", x)


def sigmoid(low: Lowering, x: View) -> View:
    return low.map("sigmoid", x)


def hardtanh(low: Lowering, x: View, min_val: float = -1.0, max_val: float = 1.0) -> View:
    return low.map("clamp", x, float(min_val), float(max_val))
