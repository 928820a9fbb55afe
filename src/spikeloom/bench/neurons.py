"""`spikeloom bench neurons`: time and memory of every neuron, against bytes, LIF, and SpikingJelly."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.bench.timing import copies, forward_backward, medians, saved_bytes
from spikeloom.neurons import LIF, NEURONS, SynapticLIF
from spikeloom.ops import backend
from spikeloom.ops.leaky_integrator import leaky_filter, leaky_filter_fft

Json = dict[str, Any]

STEPS = (4, 16, 64, 256, 1024)
ORDER = 32  # of the masked and sliding PSN, as in the paper's sequential runs

_OPTIONS: dict[str, Callable[[int], Json]] = {
    "PSN": lambda T: {"T": T},
    "MaskedPSN": lambda T: {"T": T, "order": min(ORDER, T)},
    "SlidingPSN": lambda T: {"order": min(ORDER, T)},
    "IPSU": lambda T: {"T": T},
    "RPSU": lambda T: {"T": T},
    "GLIF": lambda T: {"T": T},
    "ParaLIF": lambda T: {"firing": "t"},
    "RecurrentParaLIF": lambda T: {"firing": "t"},
}


def make(name: str, T: int, channels: int) -> nn.Module:
    """A neuron layer of the registry for T steps of [N, channels, ...]."""
    options = _OPTIONS.get(name, lambda T: {})(T)
    if name == "GLIF":
        options["channels"] = channels
    if name in ("RecurrentLIF", "RecurrentParaLIF"):
        options["features"] = channels
    return NEURONS[name](**options)


class StepLIF(LIF):
    """LIF of PyTorch's operations at each step: what the papers on parallel neurons compare with."""

    def run(self, x: Tensor, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        with backend("reference"):
            return super().run(x, state, keep)


def peer(name: str, T: int) -> Callable[[Tensor], Tensor] | None:
    """SpikingJelly's layer of the same equations, from rest at every call; None where it has none."""
    try:
        # By name: an optional rival, which type checkers need not have.
        neuron: Any = importlib.import_module("spikingjelly.activation_based.neuron")
        surrogate: Any = importlib.import_module("spikingjelly.activation_based.surrogate")
    except ImportError:
        return None
    atan = surrogate.ATan()
    layers: dict[str, Callable[[], Any]] = {
        "IF": lambda: neuron.IFNode(surrogate_function=atan, detach_reset=True, step_mode="m"),
        "LIF": lambda: neuron.LIFNode(tau=2.0, surrogate_function=atan, detach_reset=True, step_mode="m"),
        "PLIF": lambda: neuron.ParametricLIFNode(surrogate_function=atan, detach_reset=True, step_mode="m"),
        "KLIF": lambda: neuron.KLIFNode(surrogate_function=atan, detach_reset=True, step_mode="m"),
        "PSN": lambda: neuron.PSN(T, surrogate_function=atan),
        "MaskedPSN": lambda: neuron.MaskedPSN(
            k=min(ORDER, T), T=T, lambda_init=1.0, surrogate_function=atan, step_mode="m"
        ),
        "SlidingPSN": lambda: neuron.SlidingPSN(k=min(ORDER, T), surrogate_function=atan, step_mode="m"),
    }
    if name not in layers:
        return None
    layer = layers[name]()

    def run(x: Tensor) -> Tensor:
        if hasattr(layer, "reset"):
            layer.reset()
        return layer(x)

    return run


def rows(shapes: list[list[int]], repeats: int, names: list[str] | None = None) -> Iterator[Json]:
    """Measures neurons on inputs of some shapes [T, N, C, ...], float32: one row a neuron and shape."""
    for shape in shapes:
        x = torch.randn(shape).requires_grad_()
        grad, data = torch.randn(shape), x.detach()
        for name in names or list(NEURONS):
            if len(shape) > 3 and name.startswith("Recurrent"):
                continue
            layer, lif = make(name, shape[0], shape[2]), make("LIF", shape[0], shape[2])
            contenders: dict[str, Callable[[], Any]] = {
                "forward": torch.no_grad()(lambda layer=layer, data=data: layer(data)),
                "both": forward_backward(layer, x, grad),
                "floor": copies(x, grad),
                "lif": forward_backward(lif, x, grad),
            }
            rival = peer(name, shape[0])
            if rival is not None:
                contenders["spikingjelly"] = forward_backward(rival, x, grad)
            found = medians(contenders, repeats)
            yield {
                "neuron": name,
                "shape": shape,
                **{f"{key}_ms": round(value, 3) for key, value in found.items()},
                "saved_per_input_byte": round(saved_bytes(lambda layer=layer, x=x: layer(x)) / data.nbytes, 2),
                "to_floor": round(found["both"] / found["floor"], 2),
                "to_lif": round(found["both"] / found["lif"], 2),
                "spikingjelly_to_ours": round(found["spikingjelly"] / found["both"], 2) if rival else None,
            }


def plain_lif(x: Tensor, alpha: float, beta: float, v_threshold: float, surrogate: Any) -> Tensor:
    """The serial LIF with a synaptic current as the equations say it, step by step in plain PyTorch."""
    synapse = membrane = torch.zeros_like(x[0])
    spikes: list[Tensor] = []
    for x_t in x:
        synapse = alpha * synapse + x_t
        membrane = beta * membrane + (1 - beta) * synapse
        s = surrogate(membrane - v_threshold, strict=True)
        spikes.append(s)
        membrane = membrane * (1 - s.detach())
    return torch.stack(spikes)


def paralif_rows(lengths: list[int], repeats: int) -> Iterator[Json]:
    """The setting of ParaLIF's timing figure: 128 neurons, batch 1, all time constants 1 ms; forward and backward."""
    for length in lengths:
        x = torch.rand(length, 1, 128).requires_grad_()
        grad = torch.rand(length, 1, 128)
        layer = NEURONS["ParaLIF"](firing="t", tau_mem=1e-3, tau_syn=1e-3)  # pyright: ignore[reportCallIssue]
        fused = SynapticLIF(tau_mem=1e-3, tau_syn=1e-3)
        alpha, beta, surrogate = float(fused.alpha), float(fused.beta), fused.surrogate
        found = medians(
            {
                "paralif": forward_backward(layer, x, grad),
                "fused_lif": forward_backward(fused, x, grad),
                "plain_lif": forward_backward(
                    lambda x, a=alpha, b=beta, s=surrogate: plain_lif(x, a, b, 1.0, s), x, grad
                ),
            },
            repeats,
        )
        yield {
            "length": length,
            **{f"{key}_ms": round(value, 3) for key, value in found.items()},
            "acceleration_over_plain_lif": round(found["plain_lif"] / found["paralif"], 1),
            "acceleration_over_fused_lif": round(found["fused_lif"] / found["paralif"], 2),
        }


def filter_rows(steps: tuple[int, ...], repeats: int) -> Iterator[Json]:
    """The scan against the FFT of the paper, forward and backward of the leaky integration alone, [T, 32, 256]."""
    for T in steps:
        x = torch.randn(T, 32, 256).requires_grad_()
        grad = torch.randn(T, 32, 256)
        found = medians(
            {
                "scan": forward_backward(lambda x: leaky_filter(x, 0.95, 0.95)[0], x, grad),
                "fft": forward_backward(lambda x: leaky_filter_fft(x, 0.95, 0.95), x, grad),
            },
            repeats,
        )
        yield {
            "T": T,
            **{f"{key}_ms": round(value, 3) for key, value in found.items()},
            "fft_to_scan": round(found["fft"] / found["scan"], 2),
        }


def psn_grid(repeats: int, largest: int = 1 << 18) -> Iterator[Json]:
    """The PSN paper's speed figure: time of a serial LIF over time of a PSN on [T, N], for inference and training.

    The serial LIF is fused, `ratio`, or one call of PyTorch's operations a step, `step_ratio`, as in the paper.
    """
    for exponent in range(8, largest.bit_length(), 2):
        for T in (2, 4, 8, 16, 32, 64):
            n = 1 << exponent
            x = torch.randn(T, n).requires_grad_()
            grad, data = torch.randn(T, n), x.detach()
            lif, psn, steps = make("LIF", T, n), make("PSN", T, n), StepLIF()
            no_grad = torch.no_grad()
            found = medians(
                {
                    "lif_inference": no_grad(lambda lif=lif, data=data: lif(data)),
                    "psn_inference": no_grad(lambda psn=psn, data=data: psn(data)),
                    "lif_training": forward_backward(lif, x, grad),
                    "psn_training": forward_backward(psn, x, grad),
                    "step_inference": no_grad(lambda steps=steps, data=data: steps(data)),
                    "step_training": forward_backward(steps, x, grad),
                },
                repeats,
                budget=2.0,
            )
            yield {
                "N": n,
                "T": T,
                **{f"{key}_ms": round(value, 4) for key, value in found.items()},
                **{
                    f"{part}_{ratio}": round(found[f"{serial}_{part}"] / found[f"psn_{part}"], 3)
                    for serial, ratio in (("lif", "ratio"), ("step", "step_ratio"))
                    for part in ("inference", "training")
                },
            }
