"""Training methods leave the gradients that autograd gives, and return logits."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikeloom.encode import as_sequence
from spikeloom.errors import UsageError
from spikeloom.layers import Flatten, Linear, NormSpike, TdBN
from spikeloom.models import create_model, list_models
from spikeloom.neurons import LIF, MLF, NEURONS, make_neuron
from spikeloom.stream import Stream, detach, detached_steps
from spikeloom.train.losses import Loss, sdt, tet
from spikeloom.train.methods import METHODS, bptt, sltt, sltt_k


def network() -> nn.Module:
    return nn.Sequential(Flatten(), Linear(12, 8), LIF(decay_input=False), Linear(8, 3))


def test_the_promised_methods_are_there() -> None:
    assert (METHODS["bptt"], METHODS["sltt"], METHODS["sltt_k"]) == (bptt, sltt, sltt_k)


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


# --- SLTT -------------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, method: Any, *arguments: Any, **options: Any) -> tuple[list[Tensor], Tensor]:
    """What a method leaves in `.grad` of a copy of the model, and the logits that it returns."""
    model = copy.deepcopy(model)
    logits = method(model, *arguments, **options)
    return [parameter.grad for parameter in model.parameters()], logits


WHOLE = ("PSN", "IPSU", "RPSU", "RecurrentParaLIF")  # need the whole sequence at once
OPTIONS: dict[str, dict[str, Any]] = {
    "PSN": {"T": 4},
    "MaskedPSN": {"T": 4, "order": 2},
    "SlidingPSN": {"order": 2},
    "IPSU": {"T": 4},
    "RPSU": {"T": 4},
    "GLIF": {"T": 4},
    "ParaLIF": {"firing": "t"},
    "RecurrentParaLIF": {"firing": "t"},
}


def with_neuron(name: str) -> nn.Module:
    neuron = make_neuron(functools.partial(NEURONS[name], **OPTIONS.get(name, {})), 8)
    return nn.Sequential(Flatten(), Linear(12, 8), neuron, Linear(8, 3))


@pytest.mark.parametrize("mode", ["online", "multi_step_detached"])
@pytest.mark.parametrize("name", WHOLE)
def test_neurons_that_cannot_step(name: str, mode: Any) -> None:
    with pytest.raises(RuntimeError, match="can step"):
        sltt(with_neuron(name), torch.randn(4, 5, 3, 2, 2), torch.randint(3, (5,)), tet, mode=mode)


@pytest.mark.parametrize("name", [name for name in NEURONS if name not in (*WHOLE, "SPSN")])  # SPSN draws
def test_sltt_is_backpropagation_with_detached_states(name: str) -> None:
    torch.manual_seed(1)
    model = with_neuron(name)
    x, y = torch.randn(4, 5, 3, 2, 2) * 2, torch.randint(3, (5,))
    reference = copy.deepcopy(model)
    stream = Stream(reference)
    total = torch.zeros(())
    for x_t in x:
        total = total + tet(stream(x_t[None]), y, lam=0.1) / 4
        stream.detach()
    expected = torch.autograd.grad(total, list(reference.parameters()), allow_unused=True)
    assert sum(float(grad.abs().sum()) for grad in expected if grad is not None) > 0
    loss = functools.partial(tet, lam=0.1)
    for mode in ("online", "multi_step_detached"):
        found, logits = gradients(model, sltt, x, y, loss, mode=mode)
        torch.testing.assert_close(logits, model(x).detach())
        for grad, wanted in zip(found, expected, strict=True):
            if wanted is None or not wanted.any():
                assert grad is None or not grad.any()
            else:
                torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-6)


def test_mlf_cuts_both_of_its_temporal_paths() -> None:
    """Every level's carried potential, and the factor 1 - o that multiplies it: a step's gradient is of its input."""
    neuron = MLF()
    x = (torch.randn(3, 4) * 2).requires_grad_()
    with detached_steps():
        neuron(x[:, None])[-1].sum().backward()
    assert x.grad is not None
    assert x.grad[-1].any()
    assert not x.grad[:-1].any()


@pytest.mark.parametrize("loss", [sdt, tet])
@pytest.mark.parametrize("method", [sltt, sltt_k])
def test_one_step_is_bptt(method: Any, loss: Loss) -> None:
    model, x, y = network(), torch.randn(1, 5, 3, 2, 2) * 2, torch.randint(3, (5,))
    expected, logits = gradients(model, bptt, x, y, loss)
    found, again = gradients(model, method, x, y, loss)
    assert torch.equal(logits, again)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_sltt_nears_bptt_as_the_leak_grows() -> None:
    torch.manual_seed(3)
    x, y = torch.randn(6, 32, 3, 2, 2) * 2, torch.randint(3, (32,))
    found = []
    for tau in (4.0, 2.0, 1.2, 1.02):
        torch.manual_seed(4)
        model = nn.Sequential(Flatten(), Linear(12, 64), LIF(tau, decay_input=False), Linear(64, 3))
        flat = [torch.cat([g.flatten() for g in gradients(model, m, x, y, tet)[0][:2]]) for m in (bptt, sltt)]
        found.append(torch.nn.functional.cosine_similarity(flat[0], flat[1], 0).item())
    assert found[0] > 0
    assert found == sorted(found)
    assert found[-1] > 0.99


@pytest.mark.parametrize("k", [1, 2, 4, 9])
def test_sltt_k_keeps_the_factor_of_all_steps(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = network(), torch.randn(4, 5, 3, 2, 2) * 2, torch.randint(3, (5,))
    whole, logits = gradients(model, sltt, x, y, tet)
    sums, draws = [torch.zeros_like(g) for g in whole], list(itertools.combinations(range(4), min(k, 4)))
    for drawn in draws:
        rest = [t for t in range(4) if t not in drawn]
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randperm", lambda steps, order=(*drawn, *rest): torch.tensor(order))
            found, again = gradients(model, sltt_k, x, y, tet, k=k)
        assert torch.equal(again, logits)
        sums = [total + grad for total, grad in zip(sums, found, strict=True)]
    for total, grad in zip(sums, whole, strict=True):
        torch.testing.assert_close(total / len(draws), min(k, 4) / 4 * grad)


def test_sltt_k_draws_anew() -> None:
    model, x, y = network(), torch.randn(6, 5, 3, 2, 2) * 2, torch.randint(3, (5,))
    called: list[int] = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        called.append(len(logits))
        return tet(logits, labels)

    first, second = (gradients(model, sltt_k, x, y, loss, k=2)[0] for _ in range(2))
    assert called == [1] * 4
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        sltt_k(model, x, y, tet, k=0)


@pytest.mark.parametrize("shape", [(4, 1, 16, 16), (3, 4, 1, 16, 16), (4, 4, 1, 16, 16), (2, 2, 2, 16, 16)])
def test_images_and_sequences(shape: tuple[int, ...]) -> None:
    model = create_model("colored_mnist_net", in_channels=shape[-3], num_classes=10, T=3, image_size=16)
    images = shape[0 if len(shape) == 4 else 1]
    logits = sltt(model, torch.randn(shape), torch.arange(images), tet)
    assert logits.shape == (3 if len(shape) == 4 else shape[0], images, 10)


def test_features_and_sequences_of_features() -> None:
    model = create_model("shd_net", in_channels=6, num_classes=3, T=5, neuron=LIF)
    y = torch.tensor([0, 1, 2, 0])
    assert sltt(model, torch.randn(4, 6), y, tet).shape == (5, 4, 3)
    assert sltt(model, torch.randn(2, 4, 6), y, tet).shape == (2, 4, 3)
    assert sltt(model, torch.randn(4, 4, 6), y, tet).shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("name", "shape", "steps"),
    [
        ("sequential_cifar_net", (4, 4, 3, 32), 4),  # columns, as many steps as images
        ("sequential_cifar_net", (3, 3, 32), 2),  # one step repeated, as many images as channels
        ("paralif_nmnist", (4, 4, 34, 34), 4),
        ("paralif_nmnist", (4, 4, 1, 34, 34), 4),
        ("colored_mnist_net", (3, 3, 28, 28), 2),
    ],
)
def test_axes_of_equal_size_are_told_apart(name: str, shape: tuple[int, ...], steps: int) -> None:
    options = {"sequential_cifar_net": {"channels": 8}, "colored_mnist_net": {"in_channels": 3}}.get(name, {})
    neuron = {"neuron": LIF} if name == "paralif_nmnist" else {}
    model = create_model(name, num_classes=10, T=2, **options, **neuron).eval()
    x, y = 3 * torch.rand(shape), torch.arange(shape[0])
    wanted, logits = gradients(model, sltt, x, y, tet, mode="multi_step_detached")
    for method in (sltt, functools.partial(sltt_k, k=4)):
        found, online = gradients(model, method, x, y, tet)
        assert online.shape == (steps, len(y), 10)
        torch.testing.assert_close(online, logits)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_model_of_ones_own_is_asked_where_sizes_do_not_tell() -> None:
    class Own(nn.Module):
        T = 3

        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(as_sequence(x, self.T, dims=4))

    model, y = Own(), torch.arange(3)
    assert sltt(model, torch.randn(3, 1, 3, 4), y, tet).shape == (3, 3, 3)
    assert sltt(model, torch.randn(4, 3, 1, 3, 4), y, tet).shape == (4, 3, 3)
    for shape in ((3, 3, 2, 2), (3, 3, 3, 2, 2)):
        with pytest.raises(UsageError, match=r"of 3 images may be \[N, ...\] or \[T, N, ...\].*Own\.dims"):
            sltt(model, torch.randn(shape), y, tet)
    model.dims = 4  # pyright: ignore
    assert sltt(model, torch.randn(3, 3, 2, 2), y, tet).shape == (3, 3, 3)
    assert sltt(model, torch.randn(3, 3, 3, 2, 2), y, tet).shape == (3, 3, 3)


@pytest.mark.parametrize("name", sorted(set(list_models()) - {"masked_autoencoder"}))
def test_every_model_says_how_many_axes_a_batch_has(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert not hasattr(model, "T") or model.dims in (2, 3, 4)


@pytest.mark.parametrize("eps_outside", [False, True])
def test_statistics_online_are_of_each_step(eps_outside: bool) -> None:
    norm = functools.partial(TdBN, v_threshold=0.6, eps_outside=eps_outside)
    model = nn.Sequential(NormSpike(2, LIF, norm), Flatten(), Linear(8, 3))
    x, y = 3 * torch.randn(4, 5, 2, 2, 2) + torch.arange(4).view(4, 1, 1, 1, 1), torch.randint(3, (5,))
    seen: list[Tensor] = []
    model[0].neuron.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    by_step, by_sequence = copy.deepcopy(model), copy.deepcopy(model)
    sltt(by_step, x, y, tet)
    assert [u.shape[0] for u in seen] == [1] * 4
    for u in seen:  # every step alone has mean 0 and deviation alpha v_threshold
        torch.testing.assert_close(u.mean((0, 1, 3, 4)), torch.zeros(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(u.std((0, 1, 3, 4), correction=0), torch.full((2,), 0.6), atol=1e-3, rtol=0)
    assert by_step[0].norm.num_batches_tracked.item() == 4
    expected = torch.zeros(2)
    for x_t in x:
        expected = 0.9 * expected + 0.1 * x_t.mean((0, 2, 3))
    torch.testing.assert_close(by_step[0].norm.running_mean, expected)
    seen.clear()
    sltt(by_sequence, x, y, tet, mode="multi_step_detached")
    assert by_sequence[0].norm.num_batches_tracked.item() == 1
    assert torch.cat(seen).mean((0, 1, 3, 4)).abs().max() < 1e-5
    assert torch.cat(seen)[0].mean((0, 2, 3)).abs().min() > 0.05  # a step alone has another mean


@pytest.mark.parametrize("neuron", [LIF, MLF])
def test_detached_steps_of_norm_and_neuron_in_one(neuron: Any) -> None:
    """The fused pair gives way: gradients are those of the neuron alone, detached by hand."""
    model = nn.Sequential(NormSpike(2, neuron), Flatten(), Linear(8, 3))
    x, y = 3 * torch.randn(4, 5, 2, 2, 2), torch.randint(3, (5,))
    reference, spikes, state = copy.deepcopy(model), list[Tensor](), None
    for u in reference[0].norm(x):
        s, state = reference[0].neuron.run(u[None], detach(state), True)
        spikes.append(s)
    sdt(reference[1:](torch.cat(spikes)), y).backward()
    found, _ = gradients(model, sltt, x, y, sdt, mode="multi_step_detached")
    whole, _ = gradients(model, bptt, x, y, sdt)
    for grad, parameter in zip(found, reference.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)
    assert not torch.allclose(found[0], whole[0])


def test_detached_steps_end_with_their_block() -> None:
    x = torch.ones(2, 1, 1, requires_grad=True)
    with pytest.raises(ZeroDivisionError), detached_steps():
        _ = 1 / 0
    LIF(decay_input=False, v_threshold=2.5)(x)[-1].sum().backward()
    assert x.grad is not None
    assert x.grad[0].any()


@pytest.mark.parametrize("method", [sltt, functools.partial(sltt_k, k=2)])
def test_several_processes_exchange_gradients_once(method: Any, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        plain = network()
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
        exchanged: list[int] = []

        def count(state, bucket):  # torch reads annotations here
            exchanged.append(bucket.index())
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        model.register_comm_hook(None, count)
        x, y = torch.randn(4, 5, 3, 2, 2) * 2, torch.randint(3, (5,))
        for turn in range(1, 3):
            model.zero_grad()
            torch.manual_seed(turn)
            method(model, x, y, tet)
            assert len(exchanged) == turn
            torch.manual_seed(turn)
            expected, _ = gradients(plain, method, x, y, tet)
            for parameter, grad in zip(model.parameters(), expected, strict=True):
                torch.testing.assert_close(parameter.grad, grad)
    finally:
        torch.distributed.destroy_process_group()
