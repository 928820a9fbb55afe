"""Against vectors computed with the original authors' released code (see the README beside the vectors)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.golden_checks import check_gradients, check_outputs, options, surrogate_of
from helpers.golden_vectors import Golden, golden_cases
from torch import Tensor

from spikeloom.layers import BatchNorm, TdBN
from spikeloom.neurons import IF, LIF, PLIF, Neuron
from spikeloom.ops import scan
from spikeloom.stream import Stream
from spikeloom.surrogates import ATan, FastSigmoid, QuadraticGate, Rectangular, Sigmoid, Surrogate

Settings = dict[str, Any]
Arrays = dict[str, Tensor]


def without_ties(potential: Tensor, v_threshold: float) -> Tensor:
    """Neurons [N, ...] whose potential never lies on the threshold: where `>` and `>=` are the same."""
    return ~(potential == v_threshold).any(0)


# --- surrogates -------------------------------------------------------------------------------------------------------


def released_surrogate(settings: Settings) -> Surrogate:
    name = settings["surrogate"]
    other = {
        "AtanGrad": lambda: ATan(settings["alpha"]),
        "QGateGrad": lambda: QuadraticGate(settings["alpha"]),
        "GateGrad": lambda: Rectangular(2 / settings["alpha"]),
        "SigmoidGrad": lambda: Sigmoid(settings["alpha"]),
        "atan": lambda: ATan(settings["scale"]),
        "fastsig": lambda: FastSigmoid(settings["scale"]),
    }
    return other[name]() if name in other else surrogate_of(name)


@pytest.mark.parametrize("name", golden_cases("surrogate"))
def test_surrogate(golden: Golden, name: str) -> None:
    settings, case = golden.case(name)
    surrogate, x = released_surrogate(settings), case["x"]
    # Sources that fire on strict > differ at x = 0 alone, which the vectors contain.
    strict = "strict" in golden.rows[name]["departures"] and settings["surrogate"] != "SigmoidGrad"
    compared = x != 0 if strict else torch.ones_like(x, dtype=torch.bool)
    assert (x == 0).any()
    assert torch.equal(surrogate(x)[compared], case["spikes"][compared])
    assert surrogate(torch.zeros(1)) == 1
    rtol = 1e-6 if x.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(surrogate.derivative(x), case["derivative"], rtol=rtol, atol=1e-7 * (rtol / 1e-6))
    if "primitive" in case and settings["surrogate"].split("(")[0] != "Rectangular":
        torch.testing.assert_close(surrogate.primitive(x), case["primitive"], rtol=1e-5, atol=1e-6)


# --- neurons ----------------------------------------------------------------------------------------------------------


def run(neuron: Neuron, case: Arrays, detach_every_step: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spikes, potentials before and after the reset, gradient of the input."""
    x = case["x"].clone().requires_grad_()
    stream, spikes, after = Stream(neuron), [], []
    for x_t in x.split(1):
        spikes.append(stream(x_t))
        after.append(stream.state(neuron).detach())
        if detach_every_step:
            stream.detach()
    steps = torch.cat(spikes)
    if not detach_every_step:
        out = neuron(x)
        assert torch.equal(out, steps), "whole = step by step"
    else:
        out = steps
    out.backward(case["grad_out"])
    assert x.grad is not None
    return out.detach(), neuron.potentials(case["x"]), torch.stack(after), x.grad


def check(golden: Golden, name: str, neuron: Neuron, settings: Settings, case: Arrays, sltt: bool = False) -> None:
    row = golden.rows[name]
    spikes, before, after, grad_x = run(neuron, case, detach_every_step=sltt)
    before_of_source = next((case[key] for key in ("u", "v", "v_before_reset") if key in case), None)
    if before_of_source is None:
        before_of_source = case["fire_arg"] + settings["v_threshold"]
    strict = "strict >" in row["departures"]
    kept = torch.ones_like(spikes[0], dtype=torch.bool)
    if strict:
        # A neuron that once lies on the threshold goes another way from there on; the others are compared whole.
        kept = without_ties(before_of_source, settings["v_threshold"])
        assert kept.any()
    assert torch.equal(spikes[:, kept], case["spikes"][:, kept])
    check_outputs(before[:, kept], before_of_source[:, kept], row["tolerance"])
    if "v_after_reset" in case:
        check_outputs(after[:, kept], case["v_after_reset"][:, kept], row["tolerance"])
    check_gradients(grad_x[:, kept], case["grad_x"][:, kept], row["tolerance_grad"])


@pytest.mark.parametrize("name", golden_cases("if"))
def test_if(golden: Golden, name: str) -> None:
    settings, case = golden.case(name)
    check(golden, name, IF(**options(settings)), settings, case)


@pytest.mark.parametrize("name", golden_cases("lif"))
def test_lif(golden: Golden, name: str) -> None:
    settings, case = golden.case(name)
    neuron = LIF(settings["tau"], settings["decay_input"], **options(settings))
    check(golden, name, neuron, settings, case)


@pytest.mark.parametrize("name", golden_cases("plif"))
def test_plif(golden: Golden, name: str) -> None:
    settings, case = golden.case(name)
    neuron = PLIF(settings.get("tau") or 2.0, settings["decay_input"], **options(settings))
    if settings.get("w") is None:
        torch.testing.assert_close(neuron.w.detach(), case["param_w"].float(), rtol=1e-6, atol=1e-7)
    neuron.w.data = case["param_w"].clone()
    neuron_grad = _parameter_gradient(neuron, case)
    check(golden, name, neuron, settings, case)
    check_gradients(neuron_grad, case["grad_w"], golden.rows[name]["tolerance_grad"])


def _parameter_gradient(neuron: PLIF, case: Arrays) -> Tensor | None:
    neuron(case["x"]).backward(case["grad_out"])
    grad, neuron.w.grad = neuron.w.grad, None
    return grad


@pytest.mark.parametrize("name", golden_cases("lif_ms_resnet", "lif_stbp", "lif_tet"))
def test_lif_of_the_networks(golden: Golden, name: str) -> None:
    """Released with strict `>`: compared where no potential lies on the threshold."""
    settings, case = golden.case(name)
    neuron = LIF(1 / (1 - settings["decay"]), settings["decay_input"], **options(settings))
    check(golden, name, neuron, settings, case)


@pytest.mark.parametrize("name", golden_cases("lif_sltt", "lif_bptt_sltt"))
def test_lif_of_sltt(golden: Golden, name: str) -> None:
    settings, case = golden.case(name)
    neuron = LIF(settings["tau"], settings["decay_input"], **options(settings))
    check(golden, name, neuron, settings, case, sltt=settings["carried_state_detached"])


@pytest.mark.parametrize("name", golden_cases("lif_soft_braincog", "plif_soft_braincog"))
def test_soft_reset_beside_psu(golden: Golden, name: str) -> None:
    """Released with strict `>`, soft reset, detached: compared where no potential lies on the threshold."""
    settings, case = golden.case(name)
    common = {"v_threshold": settings["v_threshold"], "v_reset": None, "surrogate": surrogate_of(settings["surrogate"])}
    if "param_w" not in case:
        check(golden, name, LIF(settings["tau"], **common), settings, case)
        return
    neuron = PLIF(settings["tau"], **common)
    neuron.w.data = case["param_w"].clone()
    grad = _parameter_gradient(neuron, case)
    check(golden, name, neuron, settings, case)
    assert without_ties(case["v"], settings["v_threshold"]).all()
    check_gradients(grad, case["grad_w"], golden.rows[name]["tolerance_grad"])


@pytest.mark.parametrize("name", golden_cases("lif_no_reset"))
def test_lif_without_reset(golden: Golden, name: str) -> None:
    """An unreachable threshold leaves the charge alone; its potentials, and their gradients, then fire elsewhere."""
    settings, case = golden.case(name)
    row, tau = golden.rows[name], settings["tau"]
    x, v, potentials = case["x"].clone().requires_grad_(), None, []
    for x_t in x.split(1):
        _, v = scan(x_t, v, 1 - 1 / tau, 1 / tau, 1e30, 0.0, Rectangular(), True)
        assert v is not None
        potentials.append(v)
    u = torch.stack(potentials) - settings["v_threshold"]
    spikes = surrogate_of(settings["surrogate"])(u)
    assert torch.equal(spikes, case["spikes"])
    check_outputs(u.detach(), case["fire_arg"], row["tolerance"])
    spikes.backward(case["grad_out"])
    check_gradients(x.grad, case["grad_x"], row["tolerance_grad"])


# --- normalisation ----------------------------------------------------------------------------------------------------

TDBN = ("tdbn_affine_init", "tdbn_multiplier", "tdbn_mlf", "tdbn_ms_resnet", "tdbn_tet")


def norm_of(unit: str, channels: int, settings: Settings) -> BatchNorm:
    common = {"eps": settings["eps"], "momentum": settings["momentum"]}
    if unit == "tdbn_tet":
        return BatchNorm(channels, **common)
    form = "affine" if unit in ("tdbn_affine_init", "tdbn_ms_resnet") else "multiplier"
    return TdBN(
        channels, settings["v_threshold"], settings["alpha"], form=form, eps_outside=unit == "tdbn_mlf", **common
    )


@pytest.mark.parametrize("name", golden_cases(*TDBN))
def test_tdbn(golden: Golden, name: str) -> None:
    settings, case = golden.case(name)
    row, x = golden.rows[name], case["x"].clone().requires_grad_()
    unit = row["file"].removesuffix(".npz")
    norm = norm_of(unit, x.shape[2], settings).to(x.dtype).train()
    if "initial_weight" in case:
        torch.testing.assert_close(norm.weight.detach(), case["initial_weight"].to(x.dtype))
        torch.testing.assert_close(norm.bias.detach(), case["initial_bias"].to(x.dtype))
    if unit == "tdbn_affine_init":
        assert norm.weight.detach().unique().item() == pytest.approx(settings["alpha"] * settings["v_threshold"])
    norm.weight.data, norm.bias.data = case["param_weight"].clone(), case["param_bias"].clone()
    y = norm(x)
    check_outputs(y.detach(), case["y_train"], row["tolerance"])
    y.backward(case["grad_out"])
    for got, key in ((x.grad, "grad_x"), (norm.weight.grad, "grad_weight"), (norm.bias.grad, "grad_bias")):
        check_gradients(got, case[key], row["tolerance_grad"])
    for key in ("running_mean", "running_var"):
        check_outputs(getattr(norm, key), case[key], row["tolerance"])
    with torch.no_grad():
        if "y_train_second" in case:
            check_outputs(norm(case["x"] * 1.5 - 0.25), case["y_train_second"], row["tolerance"])
            for key in ("running_mean", "running_var"):
                check_outputs(getattr(norm, key), case[f"{key}_second"], row["tolerance"])
        norm.eval()
        check_outputs(norm(case["x"]), case["y_eval"], row["tolerance"])
