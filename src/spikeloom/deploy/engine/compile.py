"""From a trained network to the event engine: lowered, its layers timed, and verified step by step."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from spikeloom.deploy.engine.engine import Engine
from spikeloom.deploy.engine.ir import Conv
from spikeloom.deploy.engine.lossless import as_integers, quantized
from spikeloom.deploy.engine.lower import lower
from spikeloom.deploy.engine.verify import verify
from spikeloom.errors import UsageError

Stored = Literal["fp32", "bf16", "int8"]


def compile(
    model: nn.Module,
    example: Tensor,
    tune: bool = True,
    weights: Stored = "fp32",
    portable: bool | None = None,
) -> Engine:
    """An engine that runs a trained model by its spikes.

    Args:
        model: takes [N, ...] or [T, N, ...], gives logits [T, N, classes] or, of all steps, [N, classes]; runs in eval
            mode, with norms folded.
        example: real inputs: which layers run by events is decided by their time on the first images of these.
        tune: decide so; else all layers that can run by events do.
        weights: "bf16" rounds the weights of convolutions and linear layers: half the file, less to read where a
            layer's weights are many (`pack.FAR`), and logits that differ as rounded weights do. Sums stay float32.
            "int8" runs the integers of `quantized(model, example)`, to the bit with `portable=False`: a quarter of the
            file, and layers on spikes add up twice as many weights at a time.
        portable: True runs no layer by PyTorch's kernels, so that `spikeloom.runtime` gives the same bits on this
            processor; False runs those on real values by PyTorch's alone, which round as the network does (`exact`,
            `quantized`); None by whichever took less time.

    Every step of the engine is then run on what the network has there for two images of the example, and must give what
    the network gives: sums but for rounding, neurons the very spikes of these sums.

    Raises:
        UsageError: a layer that the engine does not know, or that says something else there; unknown `weights`; or no
            native kernels.
    """
    if weights not in get_args(Stored):
        raise UsageError(f"weights must be one of {', '.join(get_args(Stored))}, got {weights!r}")
    lowered = lower(quantized(model, example) if weights == "int8" else model, example)
    plan, tensors = lowered.plan, lowered.tensors
    if weights == "int8":
        plan, tensors = as_integers(plan, tensors)
    if weights == "bf16":
        rounded = {step.weight for step in plan.steps if isinstance(step, Conv)}
        tensors = {k: v.to(torch.bfloat16) if k in rounded else v for k, v in tensors.items()}
    engine = Engine(plan, tensors)
    if portable:
        engine = engine.with_ways("direct")
    engine = engine.tuned(example, portable=portable) if tune else engine.with_ways("event")
    verify(engine, lowered)
    return engine
