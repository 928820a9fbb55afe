"""A network's own loop: images and weights as they come, and convolutions that compute in channels-last memory."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from helpers.small_networks import EVENTS, SHAPES, SMALL
from torch import Tensor, nn

from spikeloom.encode import repeat
from spikeloom.layers import channels_last, repeats
from spikeloom.models import MODELS, create_model

NAMES = [
    "cifarnet",
    "colored_mnist_net",
    "ds_resnet20",
    "ghostnet_dfc",
    "masked_autoencoder",
    "ms_resnet20",
    "psn_cifar_net",
    "report_sew_resnet34",
    "report_vgg16",
    "sew_7b",
    "sew_resnet18",
    "sew_resnet_cifar",
    "spikformer_4_256",
    "spikformer_v2_2_64",
    "spikingformer_2_256_dvs",
    "spiking_probe",
    "syna_resnet18",
    "vggsnn",
]


def is_channels_last(x: Tensor) -> bool:
    """Whether PyTorch takes images [T, N, C, H, W] for channels-last, sizes of one or not."""
    y = x[0] if repeats(x) else x.flatten(0, 1)
    N, C, H, W = y.shape
    return y.stride() == (H * W * C, 1, W * C, C) or (N == 1 and y.stride()[1:] == (1, W * C, C)) or H * W == 1


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(("name", "channels"), [*((name, None) for name in NAMES), ("ms_resnet20", 1)])
def test_convolutions_compute_in_channels_last_memory(name: str, channels: int | None, images: int) -> None:
    options = dict(SMALL.get(name, {}))
    if "T" in inspect.signature(MODELS[name]).parameters:
        options["T"] = 2
    if channels is not None:
        options["in_channels"] = channels
    model = create_model(name, **options).train()
    x = torch.rand(images, *(SHAPES.get(name) or EVENTS.get(name) or (channels or 3, 32, 32)))
    x = torch.stack([x, 1 - x]) if name in EVENTS else x
    others: list[str] = []

    def check(which: str) -> Any:
        return lambda _, inputs, output: others.extend([which] if not is_channels_last(output) else [])

    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.out_channels > 1}
    for which, module in convolutions.items():
        module.register_forward_hook(check(which))
    weights = [p.stride() for p in model.parameters()]
    logits = model(x)
    assert convolutions
    assert others == []
    logits.square().sum().backward()
    # What optimisers, savers and pruning see is as PyTorch makes it.
    assert [p.stride() for p in model.parameters()] == weights
    assert all(p.is_contiguous() and (p.grad is None or p.grad.is_contiguous()) for p in model.parameters())


@pytest.mark.parametrize("shape", [(3, 2, 4, 5, 6), (1, 2, 4, 5, 6), (1, 1, 3, 5, 6), (1, 2, 1, 5, 6), (2, 1, 4, 1, 6)])
def test_channels_last_changes_the_order_alone(shape: tuple[int, ...]) -> None:
    T, _, C, _, W = shape
    x = torch.randn(shape, requires_grad=True)
    for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1), repeat(x[0], T), x[:, :, :, ::1]):
        y = channels_last(given)
        assert torch.equal(y, given)
        assert repeats(y) == repeats(given)
        assert (y[0] if len(y) == 1 or repeats(y) else y.flatten(0, 1)).stride()[1:] == (1, W * C, C)
        (found,) = torch.autograd.grad((y * y).sum(), x)
        torch.testing.assert_close(found, torch.autograd.grad((given * given).sum(), x)[0])
    already = x.detach().movedim(2, -1).contiguous().movedim(-1, 2)
    assert channels_last(already).data_ptr() == already.data_ptr()


def test_a_model_goes_through_savers_and_optimisers_that_want_contiguous_weights(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    model = create_model("ms_resnet20", T=1)
    x = torch.rand(2, 3, 32, 32)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    again = create_model("ms_resnet20", T=1)
    again.load_state_dict(load_file(tmp_path / "w.safetensors"))
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.nn.utils.parameters_to_vector(model.parameters()).numel() > 1000
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    before = model.stem.weight.detach().clone()
    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    assert not torch.equal(model.stem.weight, before)
