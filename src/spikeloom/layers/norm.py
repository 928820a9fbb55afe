"""Batch normalisation over time, batch and space, alone or as one unit with the neuron behind it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikeloom.checks import number
from spikeloom.encode import floating
from spikeloom.errors import UsageError
from spikeloom.layers.stateless import axes_of, each_step, has_hooks, repeats
from spikeloom.layers.sync_batch_norm import moments, processes
from spikeloom.neurons.base import check_state, make_neuron
from spikeloom.neurons.lif import LIFBase
from spikeloom.ops import _dispatch
from spikeloom.ops._layout import NATIVE_DTYPES
from spikeloom.ops.norm_scan import NormScan, norm_scan
from spikeloom.stream import detaching, exchange, recomputing, streaming


class _Conversion:
    """Refuses `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, which asks for this attribute of each norm that it takes
    apart: what it makes would take N for C, and lose the scale of a `TdBN`."""

    _CODE = nn.SyncBatchNorm.convert_sync_batchnorm.__func__.__code__  # pyright: ignore[reportFunctionMemberAccess]

    def __get__(self, norm: object, kind: type) -> Any:
        if norm is not None and sys._getframe(1).f_code is self._CODE:  # pyright: ignore[reportPrivateUsage]
            raise UsageError(
                f"torch.nn.SyncBatchNorm cannot replace {kind.__name__}, which takes sequences [T, N, C, ...]: use "
                "spikeloom.layers.sync_norms(model), or train.sync_norm=true in a recipe"
            )
        raise AttributeError(f"{kind.__name__!r} object has no attribute 'qconfig'")


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation of [T, N, C, ...], statistics per channel over all other axes.

    Weights and buffers are those of `torch.nn.BatchNorm2d`. One element per channel gives zero before weight and
    bias, where `torch.nn` raises. A repeated image is normalised once, as if it had been repeated.

    Args:
        channels: C.
        eps, momentum: as `torch.nn`; with a momentum of None running statistics are means over all batches.

    Attributes:
        synced, process_group: whether statistics are those of all processes of a group (`sync_norms`).
    """

    qconfig = _Conversion()
    synced: bool = False
    process_group: Any = None

    running_mean: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]
    running_var: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]
    num_batches_tracked: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float | None = 0.1):
        super().__init__(channels, eps, momentum)

    # Where eps stands: inside the square root.
    eps_outside = False

    def scaled_weight(self) -> Tensor:
        """What multiplies the normalised input."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        input = self.check(input)
        # PyTorch's gradient of images in channels-last memory takes all of these for contiguous.
        weight, old_mean, old_variance = (
            each.contiguous() for each in (self.scaled_weight(), self.running_mean, self.running_var)
        )
        if not self.training:
            return each_step(
                lambda y: F.batch_norm(y, old_mean, old_variance, weight, self.bias, False, 0.0, self.eps), input
            )
        steps = input.shape[0] if repeats(input) else 1
        if self.synced and processes(self.process_group) > 1:
            return each_step(lambda y: self._by(y, *self._moments(y, steps)), input)

        def normalise(y: Tensor) -> Tensor:
            count = y.numel() // y.shape[1]
            shape = (-1, *(1,) * (y.dim() - 2))
            if count == 1:
                self.track(y.detach().flatten().float(), torch.zeros_like(self.running_var))
                # The weight has its part in the graph, and no effect.
                return y * 0 * weight.to(y.dtype).view(shape) + self.bias.to(y.dtype).view(shape)
            mean, variance = torch.zeros_like(old_mean), torch.zeros_like(old_variance)
            # With momentum 1 the buffers receive the batch's own statistics, variance with the factor n / (n - 1).
            z = F.batch_norm(y, mean, variance, weight, self.bias, True, 1.0, self.eps)
            self.track(mean, variance * ((count - 1) * steps / (count * steps - 1)))
            return z

        return each_step(normalise, input)

    def check(self, x: object) -> Tensor:
        """x as floating-point numbers; refuses what is no sequence [T, N, C, ...] of as many channels."""
        x = floating(x, self)
        if x.dim() < 3 or x.shape[2] != self.num_features:
            name, got = type(self).__name__, tuple(x.shape)
            raise ValueError(f"{name} takes a sequence [T, N, {self.num_features}, ...], got shape {got}")
        return x

    def _moments(self, y: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Mean and variance [C] of a batch y that counts `steps` times, by which the running ones are moved."""
        if self.synced and processes(self.process_group) > 1:
            mean, variance, count = moments(y, steps, self.process_group)
            self.track(mean, variance * (count / (count - 1).clamp_min(1)).to(variance.dtype))
        else:
            axes = [0, *range(2, y.dim())]
            variance, mean = torch.var_mean(y if y.dtype == torch.float64 else y.float(), axes, correction=0)
            number = y.numel() // y.shape[1] * steps
            self.track(mean, variance * (number / max(number - 1, 1)))
        return mean, variance

    def _by(self, y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """y [N, C, ...] normalised by mean and variance [C]."""
        shape = (1, -1, *(1,) * (y.dim() - 2))
        if self.eps_outside:
            # The square root has no gradient at 0: a constant channel, or a single element.
            deviation = variance.clamp_min(torch.finfo(torch.float32).tiny).sqrt() + self.eps
        else:
            deviation = (variance + self.eps).sqrt()
        factor = self.scaled_weight() / deviation
        return ((y - mean.view(shape)) * factor.view(shape) + self.bias.view(shape)).to(y.dtype)

    @torch.no_grad()
    def track(self, mean: Tensor, variance: Tensor) -> None:
        """Lets the running statistics follow a batch's mean and unbiased variance [C]."""
        if recomputing():
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


class TdBN(BatchNorm):
    """Threshold-dependent batch normalisation (Zheng et al. 2021, tdBN, Eqs. 6-8): std `alpha v_threshold` at first.

    Args:
        channels: C.
        v_threshold: of the neuron behind.
        alpha: 1, or `1 / sqrt(n)` where n normalised branches are added before a neuron.
        form: "multiplier", `y = weight alpha v_threshold xh + bias` with weight from 1; or "affine",
            `y = weight xh + bias` with weight from `alpha v_threshold` (SpikingJelly, MS-ResNet). The same function
            at first, with another learning rate of the weight.
        eps_outside: divide by `sqrt(var) + eps` instead of `sqrt(var + eps)` (released DS-ResNet code).
        eps, momentum: as `BatchNorm`.

    Shapes: [T, N, C, ...] -> [T, N, C, ...].
    """

    def __init__(
        self,
        channels: int,
        v_threshold: float = 1.0,
        alpha: float = 1.0,
        form: Literal["multiplier", "affine"] = "multiplier",
        eps_outside: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ):
        super().__init__(channels, eps, momentum)
        if form not in ("multiplier", "affine"):
            raise ValueError(f"form must be 'multiplier' or 'affine', got {form!r}")
        scale = number("alpha", alpha, above=0) * number("v_threshold", v_threshold, above=0)
        self.scale = scale if form == "multiplier" else 1.0
        self.eps_outside = eps_outside
        if form == "affine":
            nn.init.constant_(self.weight, scale)

    def scaled_weight(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, input: Tensor) -> Tensor:
        if not self.eps_outside:
            return super().forward(input)
        input = self.check(input)
        steps = input.shape[0] if repeats(input) else 1

        def normalise(y: Tensor) -> Tensor:
            return self._by(y, *(self._moments(y, steps) if self.training else (self.running_mean, self.running_var)))

        return each_step(normalise, input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}, eps_outside={self.eps_outside}"


class NormSpike(nn.Module):
    """Normalisation, an optional residual added to it, and the neuron: one unit.

        U = norm(X) + residual,    S = neuron(U),    output S + add

    On the CPU, batch norms with IF, LIF, PLIF or MLF neurons run as one op (`ops.norm_scan`); any other pair, and one
    whose modules somebody watches through hooks, runs as written.

    Args:
        channels: C of the input.
        neuron: makes the neuron layer.
        norm: makes the normalisation from `channels`.

    Shapes: input, residual and add [T, N, C, ...] -> [T, N, C, ...], spikes where nothing is added to them.
    """

    def __init__(
        self,
        channels: int,
        neuron: Callable[[], nn.Module],
        norm: Callable[[int], nn.Module] = BatchNorm,
    ):
        super().__init__()
        self.norm = norm(channels)
        self.neuron = make_neuron(neuron, channels)

    def forward(self, x: Tensor, residual: Tensor | None = None, add: Tensor | None = None) -> Tensor:
        """The spikes, with `add` added to them: a shortcut that joins behind the neuron."""
        return self._run(x, residual, add, False)[0]

    def with_sum(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The spikes, and the sum of norm and residual that caused them: what a membrane shortcut carries on."""
        spikes, total = self._run(x, residual, None, True)
        assert total is not None
        return spikes, total

    def _run(
        self, x: Tensor, residual: Tensor | None, add: Tensor | None, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        norm, neuron, x = self.norm, self.neuron, floating(x, self)
        if isinstance(norm, BatchNorm) and isinstance(neuron, LIFBase) and _one_op(norm, neuron, x, residual, add):
            return _fused(norm, neuron, x, residual, add, wanted)
        u = norm(x)
        if residual is not None:
            u = u + residual
        spikes = neuron(u)
        return spikes if add is None else spikes + add, u


def _one_op(norm: BatchNorm, neuron: LIFBase, x: Tensor, residual: Tensor | None, add: Tensor | None) -> bool:
    """Whether norm and neuron are a pair that the fused op knows, on inputs that it takes, and nobody looks between."""
    return (
        axes_of(x) >= 3
        and x.numel() > 0
        and x.shape[2] == norm.num_features
        and type(neuron).run is LIFBase.run
        and neuron.scale() is None
        and not (norm.synced and norm.training and processes(norm.process_group) > 1)
        and neuron.surrogate.formula is not None
        and norm.weight.dtype == torch.float32
        and all(y is None or (y.dtype == x.dtype and y.shape == x.shape) for y in (residual, add))
        and not has_hooks(norm, neuron)
        and not detaching()
        and _dispatch.choose("norm_scan", x, NATIVE_DTYPES) == "native"
    )


def _fused(
    norm: BatchNorm, neuron: LIFBase, x: Tensor, residual: Tensor | None, add: Tensor | None, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    levels = (len(neuron.v_threshold),) if isinstance(neuron.v_threshold, tuple) else ()
    one, keep = not levels, streaming()

    def run(state: Tensor | None) -> tuple[NormScan, Tensor | None]:
        check_state(neuron, state, x, levels)
        v = state.unsqueeze(0) if one and state is not None else state
        found = norm_scan(
            x,
            residual,
            add,
            v,
            norm.scaled_weight(),
            norm.bias,
            None if norm.training else (norm.running_mean, norm.running_var),
            norm.eps,
            norm.eps_outside,
            *neuron.charge(),
            neuron.scan_params(),
            wanted,
            keep,
        )
        if not keep or found.v is None:
            return found, None
        return found, found.v.squeeze(0) if one else found.v

    found = exchange(neuron, run) if keep else run(None)[0]
    if norm.training:
        count = x.numel() // x.shape[2]
        norm.track(found.mean, found.variance * (count / max(count - 1, 1)))
    return found.spikes, found.sum


def sync_norms(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Lets the norms of a model take their batch statistics over all processes, and returns the model.

    In training and with several processes only. Norms of `torch.nn` become `torch.nn.SyncBatchNorm`, which needs an
    accelerator. A norm and the neurons behind it are then two operations, not one.

    Args:
        model: every process has it, and calls it the same number of times.
        process_group: whose statistics; None for all processes.
    """
    if isinstance(model, BatchNorm):
        model.synced, model.process_group = True, process_group
    elif isinstance(model, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
        return nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group)
    for name, child in model.named_children():
        model.add_module(name, sync_norms(child, process_group))
    return model


@contextmanager
def measuring(model: nn.Module) -> Generator[None]:
    """Inside the block the norms of a model, also of `torch.nn`, forget their running statistics and take the means
    over all that passes them, whatever their momentum; nothing else of the model changes."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]  # pyright: ignore[reportPrivateUsage]
    before = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        yield
    finally:
        for norm, (momentum, training) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.train(training)


def add_to_branches(count: int) -> float:
    """tdBN's alpha where `count` normalised branches are added before a neuron (Zheng et al. 2021, Sec. 3.3)."""
    return 1 / math.sqrt(count)
