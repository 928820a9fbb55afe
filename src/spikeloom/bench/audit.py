"""`spikeloom bench audit`: what an audit costs over a plain inference of the same batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spikeloom.analyse.audit.api import audit
from spikeloom.analyse.calibrate import calibrated
from spikeloom.bench.timing import medians
from spikeloom.models import create_model
from spikeloom.neurons import LIF

Json = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A network of the registry, the shape of a batch, [N, C, H, W] or spikes [T, N, features], and how many."""

    model: str
    shape: tuple[int, ...]
    batches: int = 1


# Single sequences take a millisecond: there an audit's fixed work shows.
SMALL = (Case("shd_net", (100, 64, 700)), Case("shd_net", (100, 1, 700), batches=16))
CASES = (
    *SMALL,
    Case("report_sew_resnet34", (32, 3, 32, 32)),
    Case("report_vgg16", (32, 3, 32, 32)),
    Case("ms_resnet20", (32, 3, 32, 32)),
    Case("ds_resnet20", (16, 3, 32, 32)),
    Case("spikingformer_4_256", (16, 3, 32, 32)),
)


class _Look(TorchDispatchMode):
    """The least that sees every operation."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def rows(cases: tuple[Case, ...], repeats: int) -> Iterator[Json]:
    """One row a case: milliseconds a batch of an inference, of one under a mode that does nothing, and of an audit.

    Without a dispatch mode an audit could see nothing, and under any mode convolutions are PyTorch's own instead of
    `ops.conv`: the second says what that alone costs, or spares. Weights are not trained, but norms
    have the batch's statistics, and networks without norms a low threshold, so that spikes reach all layers: silence
    would be looked at faster.
    """
    for case in cases:
        model, x = _made(case)
        batches = [x] * case.batches
        look = functools.partial(audit, model, batches, 1 if x.dim() == 3 else 0)
        contenders: dict[str, Callable[[], Any]] = {
            "inference": functools.partial(_infer, model, batches),
            "mode": functools.partial(_infer_seen, model, batches),
            "audit": look,
        }
        found = {name: ms / case.batches for name, ms in medians(contenders, repeats, budget=5.0).items()}
        layers = look().rows
        yield {
            "network": case.model,
            "batch": list(case.shape),
            "batches": case.batches,
            "layers": len(layers),
            "silent": sum(layer.input == "silent" for layer in layers),
            **{f"{name}_ms": round(ms, 3) for name, ms in found.items()},
            "mode_to_inference": round(found["mode"] / found["inference"], 2),
            "audit_to_inference": round(found["audit"] / found["inference"], 2),
        }


def _made(case: Case) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.rand(case.shape)
    if x.dim() == 3:
        model = create_model(case.model, neuron=functools.partial(LIF, v_threshold=0.05), T=len(x))
        return model.eval(), (x < 0.1).float()
    return calibrated(create_model(case.model), x), x


@torch.no_grad()
def _infer(model: nn.Module, batches: list[Tensor]) -> None:
    for x in batches:
        model(x)


def _infer_seen(model: nn.Module, batches: list[Tensor]) -> None:
    with _Look():
        _infer(model, batches)
