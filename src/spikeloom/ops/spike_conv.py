"""Convolution of spikes: zeros left out where there are many, and gradients with fewer products.

Three passes choose for themselves between oneDNN and the kernels of `native/conv.cpp`:

- forward: "sparse" adds the weights' rows of active inputs, so 0/1 spikes and integers cost what they fire. It only
  changes the order of the sums; real-valued inputs have few zeros and go to oneDNN;
- weights' gradient: "sparse", over the list of active positions, or "minimal", 36 products instead of 144 (Winograd's
  F(4x4, 3x3));
- input's gradient: "minimal".

The choice is a rule in the shape, the type and the share of nonzero inputs, counted in a fixed sample of the images:
the same numbers always take the same way, so a resumed run ends where an unbroken one does. Its limits are measured
(docs/performance.md) on AVX-512; on other processors everything goes to oneDNN unless told otherwise.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeloom.ops import dispatch
from spikeloom.ops.layout import NATIVE_DTYPES, fresh
from spikeloom.ops.native_op import NativeOp

Pass = Literal["auto", "onednn", "sparse", "minimal"]

_WORK = 5e7  # multiply-adds below which a call's fixed costs decide
_SAMPLES = 16  # images whose nonzeros are counted


def spike_conv(
    x: Tensor,
    weight: Tensor,
    stride: int = 1,
    padding: int = 0,
    forward: Pass = "auto",
    weight_gradient: Pass = "auto",
    input_gradient: Pass = "auto",
) -> Tensor:
    """`torch.nn.functional.conv2d` of channels-last images, by the cheapest way for every pass.

    Args:
        x: [N, C, H, W], float32 or bfloat16.
        weight: [C', C, k, k] of the same type, k <= 3. Sums are float32 whatever the type.
        stride, padding: of both axes.
        forward, weight_gradient, input_gradient: "auto" for the rule, or one way where the shape allows it.

    Returns:
        [N, C', H', W'], channels-last.
    """
    return _conv(x, weight, stride, padding, " ".join((forward, weight_gradient, input_gradient)))


def takes(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Whether the op can help with x [N, C, H, W]: memory channels-last, kernels up to 3x3, and enough work."""
    O, C, kh, kw = weight.shape
    N, _, H, W = x.shape
    return (
        1 <= kh <= 3
        and 1 <= kw <= 3
        and padding < min(kh, kw)
        and x.dtype in NATIVE_DTYPES
        and x.stride() == (H * W * C, 1, W * C, C)
        and N * (H // stride) * (W // stride) * O * C * kh * kw >= _WORK
    )


def density(x: Tensor) -> float:
    """The share of nonzeros in every n-th image, in about `_SAMPLES` of them."""
    sample = x[:: max(1, x.shape[0] // _SAMPLES)]
    return torch.count_nonzero(sample).item() / max(1, sample.numel())


def _minimal(weight: Tensor, stride: int) -> bool:
    O, C, kh, kw = weight.shape
    return stride == 1 and kh == kw == 3 and O % 16 == 0 and C % 16 == 0


def _rule(x: Tensor, weight: Tensor, stride: int) -> list[str]:
    """The way of every pass: forward, weights' gradient, input's gradient."""
    if dispatch.native.level() != "avx512":
        return ["onednn"] * 3
    share, single = density(x), x.dtype == torch.float32
    O, C = weight.shape[:2]
    narrow = min(O, C) < 32
    minimal = single and _minimal(weight, stride)
    return [
        "sparse" if share < (0.5 if single else 0.0 if narrow else 0.25) else "onednn",
        "sparse" if share < 0.2 else "minimal" if minimal else "onednn",
        "minimal" if minimal else "onednn",
    ]


def _ways(x: Tensor, weight: Tensor, stride: int, wanted: str) -> list[str]:
    ways = wanted.split()
    if "auto" not in ways:
        return ways
    return [rule if way == "auto" else way for way, rule in zip(ways, _rule(x, weight, stride), strict=True)]


def _fields(x: Tensor, weight: Tensor, stride: int, padding: int) -> dict[str, Any]:
    """The kernels' arguments; the caller fills what it uses. The weight is float32."""
    names = ("weight_out", "weight_in", "weight_row", "weight_column")
    return {
        "dtype": NATIVE_DTYPES.index(x.dtype), "images": x.shape[0], "height": x.shape[2], "width": x.shape[3],
        "in": x.shape[1], "out": weight.shape[0], "kernel_height": weight.shape[2], "kernel_width": weight.shape[3],
        "stride": stride, "padding": padding, "x": x.data_ptr(), "weight": weight.data_ptr(),
        **dict(zip(names, weight.stride(), strict=True)), "y": 0, "grad_y": 0, "grad_x": 0, "grad_weight": 0,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def _channels_last(x: Tensor) -> Tensor:
    """x with the strides of channels-last memory, in its odd sizes too (one channel, one pixel)."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _fake(x: Tensor, weight: Tensor, stride: int, padding: int, wanted: str) -> Tensor:
    rows, columns = ((x.shape[i] + 2 * padding - weight.shape[i]) // stride + 1 for i in (2, 3))
    return x.new_empty(x.shape[0], rows, columns, weight.shape[0]).permute(0, 3, 1, 2)


def _forward(x: Tensor, weight: Tensor, stride: int, padding: int, wanted: str) -> Tensor:
    if _ways(x, weight, stride, wanted)[0] != "sparse":
        return F.conv2d(x, weight, None, stride, padding)
    x, w = _channels_last(x), weight.float()
    y = fresh(_fake(x, weight, stride, padding, wanted), x.dtype)
    dispatch.native.conv_forward(**_fields(x, w, stride, padding) | {"y": y.data_ptr()})
    return y


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, wanted: str, need: list[bool]
) -> tuple[Tensor, Tensor]:
    _, by_weight, by_input = _ways(x, weight, stride, wanted)
    none = x.new_empty(0)
    library = [need[0] and by_input == "onednn", need[1] and by_weight == "onednn", False]
    grad_x, grad_weight = none, none
    if any(library):
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, library
        )
    if need != library[:2]:
        x, grad, w = _channels_last(x), _channels_last(grad), weight.float()
        fields = _fields(x, w, stride, padding) | {"grad_y": grad.data_ptr()}
        if need[0] and not library[0]:
            grad_x = fresh(x, x.dtype)
            dispatch.native.conv_input(**fields | {"grad_x": grad_x.data_ptr()})
        if need[1] and not library[1]:
            found = torch.empty_like(w)
            kernel = dispatch.native.conv_minimal if by_weight == "minimal" else dispatch.native.conv_weight
            kernel(**fields | {"grad_weight": found.data_ptr()})
            grad_weight = found.to(weight.dtype)
    return none if grad_x is None else grad_x, none if grad_weight is None else grad_weight


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, stride: Any, padding: Any, wanted: Any,
                   need: list[bool]) -> tuple[Tensor, Tensor]:  # fmt: skip
    none = x.new_empty(0)
    return torch.empty_like(x) if need[0] else none, torch.empty_like(weight) if need[1] else none


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.settings = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    need = list(ctx.needs_input_grad[:2])
    grads = _conv_backward(grad, x, weight, *ctx.settings, need)
    return *(g if wanted else None for g, wanted in zip(grads, need, strict=True)), None, None, None


_conv = NativeOp("spike_conv", _forward, _fake, _save, _differentiate)
_conv_backward = NativeOp("spike_conv_backward", _backward, _fake_backward)
