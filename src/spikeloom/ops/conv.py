"""Convolution of spikes: zeros left out where there are many, fewer products where there are not.

Each of the three passes, forward and the gradients of weights and input, chooses for itself between

- "sparse": the weights' rows of active inputs are added up, or for the weights' gradient the rows of the output's
  gradient. 0/1 spikes and integers cost what they fire, and only the order of the sums differs from a dense one;
- "winograd": 36 products instead of 144, Winograd's F(4x4, 3x3), for 3x3 without stride (not with less rounding: within
  3e-6 of the largest value where a direct sum in float32 is within 1e-6);
- "strided": all products, of a convolution with stride: for its two gradients alone;
- "onednn": PyTorch's own.

The choice is a rule in the shape, the type and the share of nonzero inputs, counted in a fixed sample of their rows:
the same numbers always take the same way, so a resumed run ends where an unbroken one does. Its limits are measured
on AVX-512 and on AVX2 (docs/notes/convolution-kernels.md); on other processors everything goes to oneDNN unless told
otherwise.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeloom.ops import _dispatch
from spikeloom.ops._bf16 import bf16_product, bfloat16_is_emulated, narrower_than_stride
from spikeloom.ops._custom_op import autograd_function, direct, op_with_weight
from spikeloom.ops._layout import NATIVE_DTYPES, dtype_number, empty_images, ordered, pointer

Pass = Literal["auto", "onednn", "sparse", "winograd", "strided"]

_WORK = 5e7  # multiply-adds below which a call's fixed costs decide
_CACHED = 1 << 17  # weights of "strided" gradients that stay in a core's cache
_SAMPLE = 1 << 14  # inputs whose nonzeros are counted


def spike_conv(
    x: Tensor,
    weight: Tensor,
    stride: int = 1,
    padding: int = 0,
    forward: Pass = "auto",
    weight_gradient: Pass = "auto",
    input_gradient: Pass = "auto",
) -> Tensor:
    """`torch.nn.functional.conv2d` of channels-last images, every pass by the way that is cheapest for it.

    Args:
        x: [N, C, H, W], float32 or bfloat16.
        weight: [C', C, k, k] of the same type, k <= 3. Sums are float32 whatever the type.
        stride, padding: of both axes.
        forward, weight_gradient, input_gradient: "auto" for the rule, or one way where the shape allows it.

    Returns:
        [N, C', H', W'], channels-last.
    """
    if padding == 0 and overruns(weight, (stride, stride)):
        x, stride = F.avg_pool2d(x, 1, stride), 1
    wanted = (forward, weight_gradient, input_gradient)
    chosen = _rule(x, weight, stride) if "auto" in wanted else wanted
    ways = (rule if way == "auto" else way for way, rule in zip(wanted, chosen, strict=True))
    return _conv(x, weight, stride, padding, " ".join(ways))


def spike_conv_through(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> tuple[Tensor, Tensor]:
    """`spike_conv`, and x for whoever else reads it: the gradient that comes back from there is added where the
    convolution's own is written, not in a pass by itself."""
    ways = " ".join(_rule(x, weight, stride))
    return (_conv_through if direct(x) else _conv_beside)(x, weight, stride, padding, ways)


def takes(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Whether the op can help with x [N, C, H, W]: channels-last memory, a kernel of 3x3 or 1x1, and enough work."""
    kernel = tuple(weight.shape[2:])
    N, C, H, W = x.shape
    return (
        (kernel == (3, 3) or (kernel == (1, 1) and stride == 1 and padding == 0 and min(weight.shape[:2]) >= 64))
        and padding <= 2
        and weight.shape[1] == C
        and min(H, W) + 2 * padding >= kernel[0]  # or PyTorch says what is wrong
        and x.dtype in NATIVE_DTYPES
        and x.stride() == (H * W * C, 1, W * C, C)
        and N * (H // stride) * (W // stride) * weight.numel() >= _WORK
    )


def overruns(weight: Tensor, stride: tuple[int, ...]) -> bool:
    """Whether oneDNN's gradient of the weight [C', C, k, k] of a convolution without groups and padding may write
    outside its memory: 1x1 with stride, of fewer channels than a vector has (docs/notes/onednn-weight-gradients.md).

    A pool over one position with that stride and then the convolution without it give the same numbers.
    """
    return max(stride) > 1 and weight.shape[1] < 16 and tuple(weight.shape[2:]) == (1, 1)


def density(x: Tensor) -> float:
    """The share of nonzeros in some rows of pixels, evenly spread over images [N, C, H, W] and over their heights."""
    N, _, H, _ = x.shape
    every = max(1, x.numel() // _SAMPLE)
    while math.gcd(every, H) > 1:
        every += 1
    sample = x.permute(0, 2, 3, 1).reshape(N * H, -1)[::every]
    return torch.count_nonzero(sample).item() / max(1, sample.numel())


def _rule(x: Tensor, weight: Tensor, stride: int) -> tuple[str, str, str]:
    """The way of every pass: forward, weights' gradient, input's gradient."""
    level = _dispatch.native.level()
    if level == "baseline":
        return "onednn", "onednn", "onednn"
    share, single, narrow = density(x), x.dtype == torch.float32, min(weight.shape[:2])
    if weight.shape[2] == 1:
        forward, gradient = (0.45, 0.4) if level == "avx2" else (0.4, 0.28) if single else (0.08, 0.13)
        return "sparse" if share < forward else "onednn", "sparse" if share < gradient else "onednn", "onednn"
    # Beyond, the transformed filters outgrow the cache. In bfloat16 oneDNN has instructions of twice the rate.
    single = single or level == "avx2"  # no instructions for it, so no difference
    even = all(width % 16 == 0 for width in weight.shape[:2])
    fits = even and stride == 1 and weight.shape[0] * weight.shape[1] <= (256 * 256 if single else 128 * 128)
    convolve = "winograd" if fits and (single or narrow >= 32) else "onednn"
    differentiate, back = "winograd" if fits else "onednn", convolve
    if level == "avx2":
        forward, gradient = _sparse_below_avx2(stride, narrow, fits)
        if stride > 1 and even and weight.numel() <= _CACHED:
            differentiate = back = "strided"
    else:
        forward, gradient = _sparse_below(single, stride, narrow, fits)
    return (
        "sparse" if share < forward else convolve,
        "sparse" if share < gradient else differentiate,
        back,
    )


def _sparse_below(single: bool, stride: int, narrow: int, winograd: bool) -> tuple[float, float]:
    """The shares of nonzeros below which "sparse" wins, forward and for the weights' gradient."""
    if stride > 1:
        if narrow < 32:
            return (0.3, 0.0) if single else (0.0, 0.0)
        return (0.5, 0.25) if single else (0.2, 0.16)
    if narrow < 32:
        return (0.25, 0.08) if single else (0.1, 0.02)
    if winograd:
        return (0.27, 0.2 if narrow < 64 else 0.27) if single else (0.25, 0.14 if narrow < 64 else 0.23)
    if single:
        return 0.45, 0.6
    return (0.13 if narrow > 256 else 0.3), 0.33


def _sparse_below_avx2(stride: int, narrow: int, winograd: bool) -> tuple[float, float]:
    """The same where vectors are half as wide, for float32 and for bfloat16, which has no instructions there."""
    if stride > 1:
        return 0.4, 0.2 if narrow < 32 else 0.35
    if not winograd:
        return 0.45, 0.9
    return 0.23, 0.05 if narrow < 32 else 0.11 if narrow < 64 else 0.16


def _fields(x: Tensor, weight: Tensor, stride: int, padding: int) -> dict[str, Any]:
    """The kernels' arguments; the caller fills what it uses. The weight is float32."""
    names = ("weight_out", "weight_in", "weight_row", "weight_column")
    return {
        "dtype": dtype_number(x.dtype),
        "images": x.shape[0],
        "height": x.shape[2],
        "width": x.shape[3],
        "in": x.shape[1],
        "out": weight.shape[0],
        "kernel_height": weight.shape[2],
        "kernel_width": weight.shape[3],
        "stride": stride,
        "padding": padding,
        "x": x.data_ptr(),
        "weight": weight.data_ptr(),
        **dict(zip(names, weight.stride(), strict=True)),
        "y": 0,
        "grad_y": 0,
        "grad_x": 0,
        "grad_skip": 0,
        "grad_weight": 0,
        "threads": torch.get_num_threads(),
    }


def _channels_last(x: Tensor) -> Tensor:
    """x with the strides of channels-last memory, in its odd sizes too (one channel, one pixel)."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _allocate(x: Tensor, weight: Tensor, stride: int, padding: int, ways: str) -> Tensor:
    rows, columns = ((x.shape[i] + 2 * padding - weight.shape[i]) // stride + 1 for i in (2, 3))
    return empty_images(x, (x.shape[0], weight.shape[0], rows, columns))


def _forward(x: Tensor, weight: Tensor, stride: int, padding: int, ways: str) -> Tensor:
    way = ways.split()[0]
    if way == "onednn":
        return bf16_product(lambda x, weight: F.conv2d(x, weight, None, stride, padding), x, weight)
    x, w = _channels_last(x), weight.float()
    y = _allocate(x, weight, stride, padding, ways)
    kernel = _dispatch.native.conv_forward_winograd if way == "winograd" else _dispatch.native.conv_forward_sparse
    kernel(**_fields(x, w, stride, padding) | {"y": y.data_ptr()})
    return y


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    ways: str,
    need: list[bool],
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of x, with `skip` added, and of the weight; empty where they are not needed."""
    _, by_weight, by_input = ways.split()
    none = x.new_empty(0)
    library = [need[0] and by_input == "onednn", need[1] and by_weight == "onednn", False]
    grad_x, grad_weight = none, none
    if any(library):
        operands = grad, x, weight
        if x.dtype == torch.bfloat16 and (bfloat16_is_emulated() or narrower_than_stride(x, (stride,))):
            operands = tuple(operand.float() for operand in operands)
        found = torch.ops.aten.convolution_backward(
            *operands, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, library
        )
        grad_x, grad_weight = (none if each is None else each.to(x.dtype) for each in found[:2])
        if library[0] and skip is not None:
            grad_x = grad_x.add_(skip)
    if need != library[:2]:
        native = _dispatch.native
        x, grad, w = _channels_last(x), _channels_last(grad), weight.float()
        fields = _fields(x, w, stride, padding) | {"grad_y": grad.data_ptr()}
        if need[0] and not library[0]:
            grad_x = empty_images(x, x.shape)
            skip = None if skip is None else ordered(skip, grad_x, x.dtype)
            kernel = native.conv_input_winograd if by_input == "winograd" else native.conv_input_strided
            kernel(**fields | {"grad_x": grad_x.data_ptr(), "grad_skip": pointer(skip)})
        if need[1] and not library[1]:
            found = torch.empty_like(w)
            kernels = {
                "winograd": native.conv_weight_winograd,
                "sparse": native.conv_weight_sparse,
                "strided": native.conv_weight_strided,
            }
            kernels[by_weight](**fields | {"grad_weight": found.data_ptr()})
            grad_weight = found.to(weight.dtype)
    return grad_x, grad_weight


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, ways: str, need: list[bool]
) -> tuple[Tensor, Tensor]:
    return _gradients(grad, x, weight, stride, padding, ways, need)


_conv = op_with_weight("spike_conv", _forward, _allocate, _backward)


def _conv_beside(x: Tensor, weight: Tensor, stride: int, padding: int, ways: str) -> tuple[Tensor, Tensor]:
    return _conv(x, weight, stride, padding, ways), x


def _forward_through(x: Tensor, weight: Tensor, stride: int, padding: int, ways: str) -> tuple[Tensor, Tensor]:
    return _forward(x, weight, stride, padding, ways), x


def _save_through(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, *ctx.settings = inputs
    ctx.save_for_backward(x, weight)


def _differentiate_through(ctx: Any, grad: Tensor, skip: Tensor) -> tuple[Any, ...]:
    need = list(ctx.needs_input_grad[:2])
    x, weight = ctx.saved_tensors
    stride, padding, ways = ctx.settings
    grads = _gradients(grad, x, weight, stride, padding, ways, need, skip)
    return *(g if wanted else None for g, wanted in zip(grads, need, strict=True)), None, None, None


_conv_through = autograd_function("spike_conv_through", _forward_through, _save_through, _differentiate_through)
