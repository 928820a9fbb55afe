"""What a training step moves in memory beside its convolutions and fused ops."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers.small_networks import shortened
from torch.profiler import ProfilerActivity, profile

import spikeloom
from spikeloom.ops._bf16 import bfloat16_is_emulated
from spikeloom.train.losses import sdt

# What copies activations and may: the ancestors' names, and why.
ALLOWED = {
    "subsample": "a shortcut without parameters, and its gradient",
    "MeanBackward1": "the gradient of the global pool, the same at all positions",
    "aten::mean": "the pool's sum is float32",
}
if bfloat16_is_emulated():
    ALLOWED["spikeloom::spike_conv"] = "this processor has no bfloat16: where oneDNN convolves, it is in float32"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["report_sew_resnet34", "report_ms_resnet34", "report_vanilla_resnet34"])
def test_no_activation_is_copied_or_cast_in_silence(native: object, name: str, precision: str) -> None:
    """Items of the smallest activation's size, seen by the profiler through one training step."""
    # Two blocks of each kind: the profiler takes its time for every event.
    model = shortened(spikeloom.create_model(name)).to(memory_format=torch.channels_last)  # pyright: ignore
    x = torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (8,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(x)
        sdt(logits.float(), labels).backward()
        optimizer.step()

    step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        step()
    smallest = 6 * 8 * 64 * 8 * 8  # of the last stage; larger than any weight
    assert smallest > max(p.numel() for p in model.parameters())
    found: Counter[str] = Counter()
    convolutions = 0
    for event in seen.events() or []:
        convolutions += event.name in ("aten::convolution", "spikeloom::spike_conv")
        sizes = [torch.Size(shape).numel() for shape in event.input_shapes or [] if shape]
        if event.name != "aten::copy_" or max(sizes, default=0) < smallest:
            continue
        above, names = event.cpu_parent, list[str]()
        while above is not None:
            names.append(above.name)
            above = above.cpu_parent
        if not any(allowed in name for allowed in ALLOWED for name in names):
            found[" < ".join([*names[:3], str(event.input_shapes[0])])] += 1
    assert convolutions > 16, "the profiler saw no network"
    # One: the pool's gradient comes to the last neuron in a layout of its own.
    assert sum(found.values()) <= 1, "\n".join(f"{count} x {where}" for where, count in found.items())
