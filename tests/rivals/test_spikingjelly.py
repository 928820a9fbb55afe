"""The same inputs in SpikingJelly 2.0: the same spikes and gradients."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikeloom import encode
from spikeloom.layers import Conv2d, Linear
from spikeloom.neurons import IF, LIF, PLIF
from spikeloom.surrogates import ATan, Sigmoid, Surrogate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # at import: of its optional parts
    sj: Any = pytest.importorskip(
        "spikingjelly.activation_based.neuron", reason="SpikingJelly is not installed: no comparison with it"
    )
    from spikingjelly.activation_based import functional, surrogate  # pyright: ignore

SURROGATES: dict[str, tuple[Surrogate, Any]] = {
    "ATan": (ATan(2.0), lambda: surrogate.ATan(alpha=2.0)),
    "Sigmoid": (Sigmoid(4.0), lambda: surrogate.Sigmoid(alpha=4.0)),
}
RESETS = [(0.0, True), (0.0, False), (-0.25, False), (None, True), (None, False)]


def theirs(kind: str, v_reset: float | None, detach: bool, function: Any, **settings: Any) -> Any:
    return getattr(sj, kind)(
        v_threshold=0.75, v_reset=v_reset, surrogate_function=function, detach_reset=detach, step_mode="m", **settings
    )


def ours(kind: str, v_reset: float | None, detach: bool, function: Surrogate, **settings: Any) -> nn.Module:
    common = {"v_threshold": 0.75, "v_reset": v_reset, "surrogate": function, "detach_reset": detach}
    if kind == "IFNode":
        return IF(**common)
    if kind == "LIFNode":
        return LIF(**settings, **common)
    return PLIF(settings["init_tau"], settings["decay_input"], **common)


CASES = [
    ("IFNode", {}),
    *(("LIFNode", {"tau": tau, "decay_input": d}) for tau in (2.0, 3.5) for d in (True, False)),
    *(("ParametricLIFNode", {"init_tau": tau, "decay_input": d}) for tau in (2.0, 3.5) for d in (True, False)),
]


def run(neuron: Any, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    x = x.clone().requires_grad_()
    out = neuron(x)
    out.backward(upstream)
    assert x.grad is not None
    return out.detach(), x.grad, getattr(getattr(neuron, "w", None), "grad", None)


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize(("v_reset", "detach"), RESETS)
@pytest.mark.parametrize(("kind", "settings"), CASES, ids=str)
def test_same_spikes_and_gradients(
    dyadic: Any, tracks: Any, kind: str, settings: dict[str, Any], v_reset: float | None, detach: bool, name: str
) -> None:
    own, other = SURROGATES[name]
    exact = settings.get("tau", settings.get("init_tau", 2.0)) == 2.0
    # Equal to the bit on the binary grid; in double precision elsewhere, where the two round differently.
    x = dyadic(8, 4, 50) if exact else torch.randn(8, 4, 50, dtype=torch.float64) * 2 + 0.5
    upstream = torch.randn_like(x)
    a, b = ours(kind, v_reset, detach, own, **settings), theirs(kind, v_reset, detach, other(), **settings)
    if not exact:
        a, b = a.double(), b.double()
        if kind == "ParametricLIFNode":
            torch.testing.assert_close(a.w.detach(), b.w.detach(), rtol=1e-6, atol=0)  # pyright: ignore
            a.w.data = b.w.data.clone()
    got, expected = run(a, x, upstream), run(b, x, upstream)
    assert 50 < expected[0].sum() < 1500
    assert torch.equal(got[0], expected[0])
    assert tracks(got[1], expected[1]) < (1e-5 if exact else 1e-10)
    assert (got[2] is None) == (expected[2] is None) == (kind != "ParametricLIFNode")
    if got[2] is not None:
        assert tracks(got[2], expected[2]) < (1e-4 if exact else 1e-9)


def test_same_network() -> None:
    """Convolution, LIF, linear, IF with the same weights; double precision, so that no rounding flips a spike."""
    conv, linear = nn.Conv2d(2, 6, 3), nn.Linear(96, 4)
    a = nn.Sequential(Conv2d(2, 6, 3), LIF(), nn.Flatten(2), Linear(96, 4), IF(0.2)).double()
    b = nn.Sequential(
        theirs_layer(conv),
        theirs("LIFNode", 0.0, True, surrogate.ATan(), tau=2.0),
        nn.Flatten(2),
        linear,
        sj.IFNode(v_threshold=0.2, surrogate_function=surrogate.ATan(), detach_reset=True, step_mode="m"),
    ).double()
    b[1].v_threshold = 1.0
    a[0].load_state_dict(conv.state_dict())
    a[3].load_state_dict(linear.state_dict())
    for _ in range(2):
        x = torch.randn(6, 3, 2, 6, 6, dtype=torch.float64) * 4
        functional.reset_net(b)  # theirs must be told; ours starts from rest by itself
        y, z = a(x), b(x)
        assert y.sum() > 3
        assert torch.equal(y, z)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    z.backward(upstream)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def theirs_layer(conv: nn.Conv2d) -> nn.Module:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    return Folded()


def test_latency_code() -> None:
    from spikingjelly.activation_based import encoding  # pyright: ignore

    x = torch.rand(3, 5)
    theirs = encoding.LatencyEncoder(T=8, enc_function="linear")
    assert torch.equal(encode.latency(x, 8), torch.stack([theirs(x) for _ in range(8)]))
