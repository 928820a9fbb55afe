"""Statistics over several processes: two of a part each are one of the whole batch, values, gradients, buffers."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spikeloom.encode import repeat
from spikeloom.errors import UsageError
from spikeloom.layers import BatchNorm, Conv2d, NormSpike, TdBN, sync_norms
from spikeloom.models import create_model
from spikeloom.neurons import LIF

CASES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "BatchNorm": (lambda: BatchNorm(4), False),
    "BatchNorm of a repeated image": (lambda: BatchNorm(4), True),
    "TdBN": (lambda: TdBN(4, 0.5, 0.7), False),
    "TdBN, eps outside": (lambda: TdBN(4, 0.5, 0.7, eps_outside=True), False),
    "TdBN, eps outside, of a repeated image": (lambda: TdBN(4, 0.5, eps_outside=True), True),
    "NormSpike": (lambda: NormSpike(4, lambda: LIF(v_threshold=0.3)), False),
    "NormSpike, TdBN": (lambda: NormSpike(4, LIF, functools.partial(TdBN, v_threshold=2.0)), False),
    "NormSpike with a residual": (lambda: Residual(NormSpike(4, LIF)), False),
    # Where one process has a fused op, to rounding: the sum alone, for a spike may flip.
    "float32": (lambda: Residual(NormSpike(4, lambda: LIF(v_threshold=1e9))).float(), False),
}
SHARES = (3, 5)  # images of the first process, and of the second


class Residual(nn.Module):
    def __init__(self, unit: NormSpike):
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        spikes, total = self.unit.with_sum(x, x.roll(1, 0))
        return spikes + 0.1 * total


def case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer, an input [T, N, C, H, W] or [N, C, H, W], and the gradient of its output."""
    torch.manual_seed(1)
    make, repeated = CASES[name]
    layer = (make() if name == "float32" else make().double()).train()
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    # The second process's images are of another mean: statistics of each by itself would be far off.
    x = torch.randn(4, sum(SHARES), 4, 3, 2, dtype=torch.float64) + 3
    x[:, SHARES[0] :] *= 2
    x = x.to(next(layer.parameters()).dtype)
    return layer, (x[0] if repeated else x), torch.randn_like(x)


def found(layer: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Any]:
    x = x.clone().requires_grad_()
    y = layer(x if x.dim() == 5 else repeat(x, 4))
    y.backward(upstream)
    gradients = [p.grad for p in layer.parameters()]
    return {"y": y.detach(), "x": x.grad, "parameters": gradients, "buffers": list(layer.buffers())}


class Net(nn.Module):
    """A convolution, a unit and a mean: what DDP makes of gradients of the loss's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(Conv2d(4, 4, 1), NormSpike(4, LIF), Conv2d(4, 2, 1), TdBN(2, 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).mean((0, 3, 4))


def trained(model: nn.Module, x: Tensor) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in (*model.parameters(), *model.buffers())])


def net_and_batch() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(2)
    return Net().double().train(), torch.randn(3, 8, 4, 3, 3, dtype=torch.float64) * torch.arange(1.0, 9).view(
        8, 1, 1, 1
    )


def work(rank: int, folder: str) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    part = slice(0, SHARES[0]) if rank == 0 else slice(SHARES[0], None)
    results: dict[str, Any] = {}
    for name in CASES:
        layer, x, upstream = case(name)
        layer = sync_norms(layer)
        results[name] = found(layer, x[part] if x.dim() == 4 else x[:, part], upstream[:, part])
    net, batch = net_and_batch()
    results["trained"] = trained(DistributedDataParallel(sync_norms(net)), batch[:, 4 * rank : 4 * rank + 4])
    layer = sync_norms(BatchNorm(4).eval())
    results["eval"] = layer(torch.ones(1, 1 + rank, 4))  # by running statistics: nobody waits for anybody
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import test_sync; child = os.fork()\n"
        "test_sync.work(int(not child), sys.argv[2]); sys.exit(child and os.waitpid(child, 0)[1])"
    )
    words = [sys.executable, "-c", code, str(Path(__file__).parent), str(folder)]
    started = subprocess.Popen(words, start_new_session=True)
    try:
        assert started.wait(timeout=120) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_of_the_whole_batch(results: list[dict[str, Any]], name: str) -> None:
    one, two = found(*case(name)), [result[name] for result in results]
    tolerance = 1e-4 if name == "float32" else 1e-10
    close = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    close(torch.cat([part["y"] for part in two], 1), one["y"])
    close(torch.cat([part["x"] for part in two], one["x"].dim() - 4), one["x"])
    for first, second, expected in zip(*(part["parameters"] for part in (*two, one)), strict=True):
        close(first + second, expected)
    for first, second, expected in zip(*(part["buffers"] for part in (*two, one)), strict=True):
        close(first, expected)
        close(second, expected)
    # A test of statistics that each process has by itself would see them.
    layer, x, upstream = case(name)
    part = slice(0, SHARES[0])
    alone = found(layer, x[part] if x.dim() == 4 else x[:, part], upstream[:, part])
    assert (alone["y"] - two[0]["y"]).abs().max() > 0.05


def test_two_processes_train_as_one(results: list[dict[str, Any]]) -> None:
    net, batch = net_and_batch()
    before = torch.cat([p.detach().flatten() for p in (*net.parameters(), *net.buffers())])
    expected = trained(net, batch)
    assert (expected - before).abs().max() > 0.1
    for result in results:
        torch.testing.assert_close(result["trained"], expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(result["eval"], torch.full_like(result["eval"], (1 + 1e-5) ** -0.5))


# --- one process ------------------------------------------------------------------------------------------------------


def test_one_process_has_its_own_statistics() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 4, 5, 5)
    for make in (lambda: NormSpike(4, LIF), lambda: TdBN(4, eps_outside=True)):
        plain, synced = make().train(), sync_norms(make().train())
        assert torch.equal(synced(x), plain(x))


def test_what_becomes_synced() -> None:
    model = sync_norms(nn.Sequential(NormSpike(4, LIF), nn.BatchNorm2d(3), nn.ModuleList([TdBN(2)])))
    assert [type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__ or "BN" in type(m).__name__] == [
        "NormSpike",
        "BatchNorm",
        "SyncBatchNorm",
        "TdBN",
    ]
    assert all(m.synced for m in model.modules() if isinstance(m, BatchNorm))
    assert isinstance(sync_norms(nn.BatchNorm1d(3)), nn.SyncBatchNorm)


@pytest.mark.parametrize(
    "model",
    [BatchNorm(4), TdBN(4), NormSpike(4, LIF), nn.Sequential(nn.ReLU(), BatchNorm(4))],
    ids=lambda m: type(m).__name__,
)
def test_torchs_conversion_is_refused(model: nn.Module) -> None:
    before = re.sub(r"\s", "", repr(model))
    kind = next(type(m).__name__ for m in model.modules() if isinstance(m, BatchNorm))
    with pytest.raises(
        UsageError, match=rf"^torch.nn.SyncBatchNorm cannot replace {kind}, .*spikeloom.layers.sync_norms"
    ):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert re.sub(r"\s", "", repr(model)) == before
    # Nobody else who asks for the attribute is told so.
    norm = next(m for m in model.modules() if isinstance(m, BatchNorm))
    assert not hasattr(norm, "qconfig")
    norm.qconfig = "theirs"  # pyright: ignore
    assert norm.qconfig == "theirs"


def test_a_network_of_a_paper() -> None:
    model = sync_norms(create_model("tdbn_resnet19"))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(isinstance(m, TdBN) and m.synced for m in norms)
