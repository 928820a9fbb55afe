"""The GhostNets of the course report, table 4, and its SEW ResNet of Ghost modules.

A Ghost module (Han et al. 2020, "GhostNet") makes half of its maps by a convolution, and the other half from those by
a cheap, depthwise one:

    Y = SN(BN(Conv(x))),   GM(x) = [Y, SN(BN(Depthwise3x3(Y)))]

The report's versions multiply it: by a gate that looks along rows and columns (DFC, Tang et al. 2022, GhostNetV2), or
by two linear layers on the means of its channels (channel MLP). Blocks add spikes, as SEW ADD does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from spikeloom.layers import (
    BatchNorm,
    Conv2d,
    Dropout,
    GlobalAvgPool,
    Linear,
    NormSpike,
    PadShortcut,
    SEWBlock,
    concatenated,
    residual_stages,
)
from spikeloom.models._init import kaiming
from spikeloom.models._residual import ResidualNet
from spikeloom.models.course_report import classifier, report_lif
from spikeloom.models.registry import MODELS
from spikeloom.neurons import make_neuron

Unit = Callable[[int], nn.Module]
"""What follows a convolution, from its channels: a norm, or a norm and neurons."""
Where = Literal["gm1", "gm2", "both"]
"""Which of the two Ghost modules of a bottleneck are multiplied."""


class GhostModule(nn.Module):
    """`GM(x)`, times `gate(x)` if there is one.

    Args:
        in_channels, out_channels: where out_channels is odd, the last of the cheap maps is dropped.
        unit: behind both convolutions.
        kernel, stride: of the first convolution.
        gate: from x to a factor of the output's shape.

    Shapes: [T, N, C, H, W] -> [T, N, C', ceil(H / stride), ceil(W / stride)].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        unit: Unit,
        kernel: int = 1,
        stride: int = 1,
        gate: nn.Module | None = None,
    ):
        super().__init__()
        half = (out_channels + 1) // 2
        self.out_channels = out_channels
        self.gate = gate
        self.primary = nn.Sequential(Conv2d(in_channels, half, kernel, stride, kernel // 2, bias=False), unit(half))
        self.cheap = _depthwise(half, 3, 1, unit)

    def forward(self, x: Tensor) -> Tensor:
        gate = None if self.gate is None else self.gate(x)
        y = self.primary(x)
        out = concatenated(y, self.cheap(y))[:, :, : self.out_channels]
        return out if gate is None else out * gate


def _depthwise(channels: int, kernel: int | tuple[int, int], stride: int, unit: Unit) -> nn.Sequential:
    padding = kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)
    return nn.Sequential(
        Conv2d(channels, channels, kernel, stride, padding, groups=channels, bias=False), unit(channels)
    )


def dfc_gate(in_channels: int, out_channels: int, unit: Unit) -> nn.Sequential:
    """DFC: Conv1x1 - BN - depthwise 1x5 - BN - depthwise 5x1 - `unit`; the report neither pools nor upsamples."""
    return nn.Sequential(
        Conv2d(in_channels, out_channels, 1, bias=False),
        BatchNorm(out_channels),
        *_depthwise(out_channels, (1, 5), 1, BatchNorm),
        *_depthwise(out_channels, (5, 1), 1, unit),
    )


class ChannelWeights(nn.Module):
    """`y = x g(W2 a(W1 z))`, z the mean of each channel: squeeze-and-excitation, or the report's channel MLP.

    Args:
        channels: C.
        hidden: width between the two linear layers.
        activation: a.
        gate: g.

    Shapes: [T, N, C, H, W] -> the same.
    """

    def __init__(self, channels: int, hidden: int, activation: nn.Module, gate: nn.Module):
        super().__init__()
        self.weights = nn.Sequential(
            GlobalAvgPool(), Linear(channels, hidden), activation, Linear(hidden, channels), gate
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weights(x)[..., None, None]


class GhostBottleneck(nn.Module):
    """`branch(x) + shortcut(x)`, the branch GM1 - [depthwise, stride 2] - [SE] - GM2.

    With `residual_mlp` the MLP that follows has a residual of its own: `y = branch(x) + shortcut(x)`, `y + MLP(y)`.
    """

    def __init__(self, branch: nn.Module, shortcut: nn.Module, residual_mlp: nn.Module | None = None):
        super().__init__()
        self.branch, self.shortcut, self.residual_mlp = branch, shortcut, residual_mlp

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x) + self.shortcut(x)
        return y if self.residual_mlp is None else y + self.residual_mlp(y)


# Kernel, expanded channels, output channels, squeeze-and-excitation, stride.
ROWS = (
    (3, 16, 16, False, 1),
    (3, 48, 24, False, 2),
    (3, 72, 24, False, 1),
    (5, 72, 40, True, 2),
    (5, 120, 40, True, 1),
    (3, 240, 80, False, 2),
    (3, 200, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 480, 112, True, 1),
    (3, 672, 112, True, 1),
    (5, 672, 160, True, 2),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
)


class GhostBuilder:
    """Makes the parts of a GhostNet.

    Args:
        neuron: a factory.
        variant: "T", the CIFAR port that the report cites (SE of width exp / 4 with a clamped gate, shortcuts of
            kernel 3 with an activation, a head with a norm), or "H", the original.
        literal: neurons only where the ANN has a ReLU, so that block outputs are real numbers; else behind every
            norm of the main path, and at the end of shortcuts.
        spiking_se: neurons for the ReLU and the gate of the squeeze-and-excitation.
        spiking_output: as `spikeloom.models.course_report.report_vgg16`.
    """

    def __init__(
        self,
        neuron: Callable[[], nn.Module],
        variant: Literal["T", "H"],
        literal: bool,
        spiking_se: bool,
        spiking_output: bool = False,
    ):
        self.neuron, self.variant = neuron, variant
        self.spiking_se, self.spiking_output = spiking_se, spiking_output
        self.active: Unit = functools.partial(NormSpike, neuron=neuron)
        self.linear: Unit = BatchNorm if literal else self.active

    def bottleneck(
        self,
        in_channels: int,
        row: tuple[int, int, int, bool, int],
        gates: tuple[nn.Module | None, nn.Module | None] = (None, None),
        mlps: tuple[nn.Module | None, nn.Module | None] = (None, None),
        inner_residual: bool = False,
    ) -> GhostBottleneck:
        """A row of the table; `gates` multiply its Ghost modules, `mlps` follow them."""
        kernel, expanded, out_channels, squeeze, stride = row
        branch = nn.Sequential(GhostModule(in_channels, expanded, self.active, gate=gates[0]))
        if mlps[0] is not None:
            branch.append(mlps[0])
        if stride == 2:
            branch.append(_depthwise(expanded, kernel, 2, self.linear))
        if squeeze:
            branch.append(self.squeeze(expanded))
        branch.append(GhostModule(expanded, out_channels, self.linear, gate=gates[1]))
        if mlps[1] is not None and not inner_residual:
            branch.append(mlps[1])
        shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            port = self.variant == "T"
            shortcut = nn.Sequential(
                *_depthwise(in_channels, 3 if port else kernel, stride, self.active if port else BatchNorm),
                Conv2d(in_channels, out_channels, 1, bias=False),
                self.linear(out_channels),
            )
        return GhostBottleneck(branch, shortcut, mlps[1] if inner_residual else None)

    def squeeze(self, channels: int) -> ChannelWeights:
        hidden = channels // 4
        if self.variant == "H":
            # To the nearest multiple of 4, halves up, but not down by more than a tenth.
            hidden = (channels + 8) // 16 * 4
            hidden += 4 if hidden < 0.9 * channels / 4 else 0
        activation: nn.Module = nn.ReLU()
        gate: nn.Module = nn.Hardtanh(0.0, 1.0) if self.variant == "T" else nn.Hardsigmoid()
        if self.spiking_se:
            activation, gate = make_neuron(self.neuron, hidden), make_neuron(self.neuron, channels)
        return ChannelWeights(channels, hidden, activation, gate)

    def head(self, num_classes: int) -> nn.Module:
        if self.variant == "T":
            layers: tuple[nn.Module, ...] = (Linear(960, 1280, bias=False), self.active(1280))
        else:
            layers = (Linear(960, 1280), make_neuron(self.neuron, 1280))
        head = nn.Sequential(*layers, Dropout(0.2), Linear(1280, num_classes))
        return classifier(head, num_classes, self.neuron, self.spiking_output)

    def network(
        self, in_channels: int, num_classes: int, T: int, make: Callable[[int, int], GhostBottleneck]
    ) -> ResidualNet:
        """The whole network; `make` gives a bottleneck from its number and input channels."""
        blocks = nn.ModuleList()
        channels = 16
        for index, row in enumerate(ROWS):
            blocks.append(make(index, channels))
            channels = row[2]
        blocks.append(nn.Sequential(Conv2d(channels, 960, 1, bias=False), self.active(960)))
        model = ResidualNet(
            stem=Conv2d(in_channels, 16, 3, 2, 1, bias=False),
            stem_spike=NormSpike(16, self.neuron),
            blocks=blocks,
            head=self.head(num_classes),
            T=T,
        )
        kaiming(model, "fan_out", linear=False)
        return model


def _sigmoid_gate(channels: int) -> nn.Sequential:
    return nn.Sequential(BatchNorm(channels), nn.Sigmoid())


@MODELS.register
def ghostnet_snn(
    in_channels: int = 3,
    num_classes: int = 10,
    neuron: Callable[[], nn.Module] = report_lif,
    T: int = 6,
    variant: Literal["T", "H"] = "T",
    literal: bool = False,
    spiking_se: bool = False,
    spiking_output: bool = False,
) -> ResidualNet:
    """GhostNet-SNN, the strides of ImageNet on 32x32. Options: `GhostBuilder`."""
    ghost = GhostBuilder(neuron, variant, literal, spiking_se, spiking_output)
    return ghost.network(in_channels, num_classes, T, lambda i, channels: ghost.bottleneck(channels, ROWS[i]))


@MODELS.register
def ghostnet_dfc(
    in_channels: int = 3,
    num_classes: int = 10,
    neuron: Callable[[], nn.Module] = report_lif,
    T: int = 6,
    variant: Literal["T", "H"] = "T",
    literal: bool = False,
    spiking_se: bool = False,
    spiking_output: bool = False,
    where: Where = "gm1",
    first: int = 2,
    gate: Literal["spikes", "sigmoid"] = "spikes",
) -> ResidualNet:
    """GhostNet-DFC: DFC gates on the first Ghost modules of the bottlenecks from number `first` on.

    Args:
        gate: "spikes" multiplies spikes by spikes, so that of the module's few even fewer pass; "sigmoid" is the
            ordinary DFC's, real-valued.
    """
    ghost = GhostBuilder(neuron, variant, literal, spiking_se, spiking_output)
    end = ghost.active if gate == "spikes" else _sigmoid_gate

    def make(index: int, channels: int) -> GhostBottleneck:
        _, expanded, out_channels, *_ = ROWS[index]
        sizes = ((channels, expanded), (expanded, out_channels))
        gates = [
            dfc_gate(*size, end) if index >= first and where in (name, "both") else None
            for name, size in zip(("gm1", "gm2"), sizes, strict=True)
        ]
        return ghost.bottleneck(channels, ROWS[index], gates=(gates[0], gates[1]))

    return ghost.network(in_channels, num_classes, T, make)


@MODELS.register
def ghostnet_channel_mlp(
    in_channels: int = 3,
    num_classes: int = 10,
    neuron: Callable[[], nn.Module] = report_lif,
    T: int = 6,
    variant: Literal["T", "H"] = "T",
    literal: bool = False,
    spiking_se: bool = False,
    spiking_output: bool = False,
    where: Where = "gm2",
    ratio: float = 2.0,
    inner_residual: bool = False,
) -> ResidualNet:
    """GhostNet-ChannelMLP: Linear(C, ratio C) - SN - Linear(ratio C, C) weigh the channels of a Ghost module.

    `inner_residual` adds the MLP of the second Ghost module to the sum of branch and shortcut (figure 10).
    """
    ghost = GhostBuilder(neuron, variant, literal, spiking_se, spiking_output)

    def make(index: int, channels: int) -> GhostBottleneck:
        mlps = [
            ChannelWeights(width, hidden := round(ratio * width), make_neuron(neuron, hidden), nn.Identity())
            if where in (name, "both")
            else None
            for name, width in zip(("gm1", "gm2"), ROWS[index][1:3], strict=True)
        ]
        return ghost.bottleneck(channels, ROWS[index], mlps=(mlps[0], mlps[1]), inner_residual=inner_residual)

    return ghost.network(in_channels, num_classes, T, make)


def _no_norm(channels: int) -> nn.Module:
    return nn.Identity()


@MODELS.register
def report_sew_resnet34_ghost(
    in_channels: int = 3,
    num_classes: int = 10,
    neuron: Callable[[], nn.Module] = report_lif,
    T: int = 6,
    ghost_stem: bool = True,
    outer_norm: bool = True,
    spiking_output: bool = False,
) -> ResidualNet:
    """`report_sew_resnet34` with a Ghost module for every convolution.

    Without `ghost_stem` the stem stays a convolution. With `outer_norm` the network's own norm and neuron follow each
    module, whose halves have theirs too; without, the halves end in norms, and one neuron follows the module.
    `spiking_output`: as `spikeloom.models.course_report.report_vgg16`.
    """
    inner: Unit = functools.partial(NormSpike, neuron=neuron) if outer_norm else BatchNorm
    norm = BatchNorm if outer_norm else _no_norm

    def convolution(channels: int, width: int, stride: int) -> GhostModule:
        return GhostModule(channels, width, inner, kernel=3, stride=stride)

    def make(channels: int, width: int, stride: int) -> SEWBlock:
        branch = nn.Sequential(
            convolution(channels, width, stride), NormSpike(width, neuron, norm), convolution(width, width, 1)
        )
        shortcut = nn.Identity() if channels == width else PadShortcut(channels, width)
        return SEWBlock(branch, NormSpike(width, neuron, norm), shortcut)

    stem = convolution(in_channels, 16, 1) if ghost_stem else Conv2d(in_channels, 16, 3, padding=1, bias=False)
    model = ResidualNet(
        stem=stem,
        stem_spike=NormSpike(16, neuron, norm if ghost_stem else BatchNorm),
        blocks=residual_stages(make, 16, ((16, 5, 1), (32, 5, 2), (64, 5, 2))),
        head=classifier(Linear(64, num_classes), num_classes, neuron, spiking_output),
        T=T,
    )
    kaiming(model, "fan_in", linear=True)
    return model
