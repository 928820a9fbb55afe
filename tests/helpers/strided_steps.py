"""Trains strided 1x1 convolutions of few channels, and prints how far their gradients are from float64's.

A process of its own: oneDNN's own gradient writes outside its memory, and the process may die or hang.
"""

import contextlib
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeloom import backend
from spikeloom.layers import Conv2d, channels_last
from spikeloom.layers.stateless import fold
from spikeloom.ops import _dispatch
from spikeloom.ops.conv import spike_conv

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float64: 1e-12}
SIDE = 60


def check(name: str, found: list[Tensor], wanted: list[Tensor], limit: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        error = ((a.double() - b).norm() / b.norm()).item()
        print(f"error {name} {error:.1e}")
        assert error < limit, name


def step(channels: int, stride: int | tuple[int, int], way: str, dtype: torch.dtype = torch.float32) -> None:
    mode = "circular" if way == "circular" else "zeros"
    conv = Conv2d(channels, 8, 1, stride, 2 * (way == "circular"), bias=channels % 2 == 0, padding_mode=mode)
    conv.to(dtype)
    x = channels_last(torch.randn(2, 2, channels, SIDE, SIDE, dtype=dtype)).requires_grad_()
    run = torch.compile(conv, backend="aot_eager") if way == "compiled" else conv
    with (
        torch.autocast("cpu", torch.bfloat16) if way == "autocast" else contextlib.nullcontext(),
        backend("reference") if way == "reference" else contextlib.nullcontext(),
    ):
        y = run(x)
        with torch.no_grad():  # as before a recomputation in the backward pass
            assert torch.equal(y, run(x))
    inputs, grad = [x, *conv.parameters()], torch.randn_like(y)
    found = torch.autograd.grad(y, inputs, grad)
    exact = [each.detach().double().requires_grad_() for each in inputs]
    images = exact[0].flatten(0, 1)
    if mode == "circular":
        images = F.pad(images, (2, 2, 2, 2), mode)
    z = F.conv2d(images, *exact[1:], stride=stride)
    wanted = torch.autograd.grad(z, exact, grad.flatten(0, 1).double())
    limit = ROUNDING[torch.bfloat16 if way == "autocast" else dtype]
    check(f"{channels} {stride} {way} {dtype}", [y.flatten(0, 1), *found], [z, *wanted], limit)


def op(stride: int) -> None:
    x = fold(channels_last(torch.randn(1, 4, 5, SIDE, SIDE)))
    weight = torch.randn(8, 5, 1, 1, requires_grad=True)
    y = spike_conv(x, weight, stride, 0, "onednn", "onednn", "onednn")
    exact = weight.detach().double().requires_grad_()
    z = F.conv2d(x.double(), exact, None, stride)
    found, wanted = (torch.autograd.grad(out.sum(), at) for out, at in ((y, weight), (z, exact)))
    check(f"op {stride}", [y, *found], [z, *wanted], ROUNDING[torch.float32])


torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
step(2, 2, "plain")
step(3, (1, 2), "compiled")
step(4, (2, 1), "reference")
step(5, 4, "circular")
step(7, 3, "autocast")
step(6, 2, "plain", torch.bfloat16)
step(3, 2, "plain", torch.float64)
step(12, 2, "plain")
step(15, (2, 1), "reference")
step(16, 2, "plain")  # oneDNN's own, and right
if _dispatch.native is not None:
    op(2)
