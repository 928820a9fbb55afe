"""Training methods leave the gradients that autograd gives, and return logits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spikeloom.layers import Flatten, Linear, NormSpike
from spikeloom.models import create_model
from spikeloom.neurons import LIF
from spikeloom.train.losses import Loss, sdt, tet
from spikeloom.train.methods import METHODS, bptt


def network() -> nn.Module:
    return nn.Sequential(Flatten(), Linear(12, 8), LIF(decay_input=False), Linear(8, 3))


def test_the_promised_methods_are_there() -> None:
    assert METHODS["bptt"] is bptt


@pytest.mark.parametrize("loss", [sdt, tet])
def test_bptt_leaves_the_gradients_of_autograd(loss: Loss) -> None:
    model, x, y = network(), torch.randn(4, 5, 3, 2, 2) * 2, torch.randint(3, (5,))
    reference = copy.deepcopy(model)
    value = loss(reference(x), y)
    expected = torch.autograd.grad(value, list(reference.parameters()))
    assert all(float(grad.abs().max()) > 0 for grad in expected)
    logits = bptt(model, x, y, loss)
    assert torch.equal(logits, reference(x).detach())
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_bptt_against_a_chain_rule_by_hand() -> None:
    # One linear layer, sdt: dL/dW = (1/T) sum_t (S(O_mean) - onehot) x(t)
    steps, images = 3, 4
    model = Linear(5, 3, bias=False)
    x, y = torch.randn(steps, images, 5), torch.randint(3, (images,))
    logits = bptt(model, x, y, sdt)
    error = (logits.mean(0).softmax(1) - torch.eye(3)[y]) / images
    expected = sum(error.T @ x_t for x_t in x) / steps
    torch.testing.assert_close(model.weight.grad, expected)


def test_gradients_are_added_to_those_there() -> None:
    model, y = network(), torch.randint(3, (5,))
    x, x2 = torch.randn(2, 4, 5, 3, 2, 2) * 2
    bptt(model, x, y, sdt)
    first = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    bptt(model, x2, y, sdt)
    second = [parameter.grad.clone() for parameter in model.parameters()]
    bptt(model, x, y, sdt)
    for parameter, a, b in zip(model.parameters(), first, second, strict=True):
        torch.testing.assert_close(parameter.grad, a + b)


def test_the_logits_carry_no_graph() -> None:
    model, y = network(), torch.randint(3, (5,))
    logits = bptt(model, torch.randn(4, 5, 3, 2, 2), y, sdt)
    assert logits.shape == (4, 5, 3)
    assert not logits.requires_grad
    assert logits.grad_fn is None


def test_the_loss_decides_the_scale() -> None:
    model, x, y = network(), torch.randn(4, 5, 3, 2, 2) * 2, torch.randint(3, (5,))
    bptt(model, x, y, sdt)
    whole = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    bptt(model, x, y, lambda logits, labels: sdt(logits, labels) / 2)
    for parameter, grad in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, grad / 2)


def test_a_static_image_reaches_every_parameter() -> None:
    model = create_model("report_sew_resnet34", in_channels=1, T=2)
    logits = bptt(model, torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]), sdt)
    assert logits.shape == (2, 4, 10)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_running_statistics_are_of_one_pass() -> None:
    model = nn.Sequential(NormSpike(2, LIF), Flatten(), Linear(8, 3))
    bptt(model, torch.randn(4, 5, 2, 2, 2), torch.randint(3, (5,)), sdt)
    assert model[0].norm.num_batches_tracked.item() == 1
