"""The neurons parallel in time, MLF and the comparators, against vectors of the original authors' released code.

Every case of the listed units is compared, and every array of a case: a `Case` knows which of its arrays were read,
and one that a check left out fails. Where a release departs from its paper, or from us, the departure has a test.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.golden_vectors import Golden, golden_cases
from torch import Tensor, nn

from spikeloom.neurons import (
    GLIF,
    IPSU,
    KLIF,
    MLF,
    PSN,
    PSU,
    RPSU,
    SPSN,
    LeakyIntegrator,
    MaskedPSN,
    Neuron,
    ParaLIF,
    RecurrentLIF,
    RecurrentParaLIF,
    SlidingPSN,
    SynapticLIF,
)
from spikeloom.ops import leaky_filter, leaky_filter_fft
from spikeloom.ops.paralif_firing import FIRING, MAPS, fire_by, gumbel
from spikeloom.ops.psu import psu_reference
from spikeloom.stream import Stream
from spikeloom.surrogates import SURROGATES, Surrogate

CASES = {
    "mlf": 19,
    "psn": 13,
    "masked_psn": 45,
    "sliding_psn": 34,
    "psu": 15,
    "ipsu_paper": 15,
    "ipsu_released": 15,
    "rpsu": 15,
    "spsn": 9,
    "klif": 17,
    "glif": 16,
    "glif_soft_gates": 6,
    "lif_synaptic": 23,
    "leaky_integrator": 18,
    "paralif": 91,
    "paralif_stochastic": 12,
    "recurrent_lif": 8,
    "recurrent_paralif": 23,
}


class Case:
    """One case: settings, and arrays that are marked as compared when read."""

    def __init__(self, golden: Golden, name: str):
        self.name, self.row = name, golden.rows[name]
        self.unit = self.row["file"].removesuffix(".npz")
        self.settings, self.arrays = golden.case(name)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.read.add(key)
        return self.arrays[key].clone()

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    @property
    def dtype(self) -> torch.dtype:
        return self.arrays["x"].dtype

    @property
    def surrogate(self) -> Surrogate:
        text = self.settings["surrogate"]
        if text == "rectangular 1[|x|<0.5]":
            return SURROGATES["Rectangular"]()
        match = re.match(r"(\w+)\((\w+)=([\d.]+)\)", text)
        assert match, text
        return SURROGATES[match[1]](**{match[2]: float(match[3])})

    def spikes(self, got: Tensor, key: str = "spikes") -> None:
        assert torch.equal(got, self[key]), key

    def output(self, got: Tensor, key: str, terms: Tensor | None = None) -> None:
        """Within the manifest's tolerance of outputs; of sums whose `terms` cancel, plus one rounding of these."""
        text, expected = self.row["tolerance"], self[key]
        if text.startswith("exact"):
            assert torch.equal(got, expected), key
            return
        rtol, atol = (float(v) for v in re.findall(r"[ra]tol ([\de.-]+)", text))
        if "times the largest |v|" in text:
            atol *= expected.abs().max().item()
        if terms is not None:
            atol += torch.finfo(got.dtype).eps * terms.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)

    def gradient(self, got: Tensor | None, key: str) -> None:
        """Within the manifest's tolerance of gradients."""
        expected = self[key]
        assert got is not None
        rtol, atol = (float(v) for v in re.findall(r"[ra]tol ([\de.-]+)", self.row["tolerance_grad"]))
        torch.testing.assert_close(got.view_as(expected), expected, rtol=rtol, atol=atol * expected.abs().max().item())

    def input(self) -> Tensor:
        return self["x"].requires_grad_()


def stepwise(neuron: Neuron, x: Tensor) -> tuple[Tensor, list[Any]]:
    """Outputs and states of a Stream, step by step."""
    stream, out, states = Stream(neuron), [], []
    with torch.no_grad():
        for x_t in x.split(1):
            out.append(stream(x_t))
            states.append(stream.state(neuron))
    return torch.cat(out), states


# --- MLF --------------------------------------------------------------------------------------------------------------


def check_mlf(case: Case) -> None:
    s, x = case.settings, case.input()
    assert len(s["thresholds"]) in (s["K"], 3)
    assert s["surrogate"] == f"Rectangular(width={s['a']})"
    neuron = MLF(1 / (1 - s["k_tau"]), tuple(s["thresholds"][: s["K"]]), case.surrogate, s["detach_reset"], strict=True)
    spikes, potentials = neuron(x), neuron.potentials(x)
    case.spikes(spikes)
    for k in range(s["K"]):
        case.output(potentials[:, k], f"u{k + 1}")
    spikes.backward(case["grad_out"])
    case.gradient(x.grad, "grad_x")
    assert torch.equal(stepwise(neuron, case["x"])[0], spikes)


# --- PSN family -------------------------------------------------------------------------------------------------------


def check_matrix(case: Case, neuron: PSN | MaskedPSN) -> None:
    x = case.input()
    weight, bias = ("fc_weight", "fc_bias") if "param_fc_weight" in case else ("weight", "bias")
    neuron = neuron.to(case.dtype)
    neuron.weight.data, neuron.bias.data = case[f"param_{weight}"], case[f"param_{bias}"].flatten()
    spikes = neuron(x)
    case.spikes(spikes)
    terms = neuron.weight.detach().abs() @ case["x"].abs().flatten(1)
    case.output(neuron.potentials(x), "fire_arg", terms)
    spikes.backward(case["grad_out"])
    case.gradient(x.grad, "grad_x")
    case.gradient(neuron.weight.grad, f"grad_{weight}")
    case.gradient(neuron.bias.grad, f"grad_{bias}")


def check_psn(case: Case) -> None:
    check_matrix(case, PSN(case.settings["T"], case.surrogate))


def check_masked_psn(case: Case) -> None:
    s = case.settings
    neuron = MaskedPSN(s["T"], s["k"], s["lam"], case.surrogate)
    check_matrix(case, neuron)
    if s["lam"] == 1:
        case.spikes(stepwise(neuron, case["x"])[0])


def check_sliding_psn(case: Case) -> None:
    s, x = case.settings, case.input()
    neuron = SlidingPSN(s["k"], surrogate=case.surrogate).to(case.dtype)
    name = "threshold" if "param_threshold" in case else "bias"
    # The released convolution keeps +B, the product -B (see `test_sliding_psn_conv_stores_the_threshold_itself`).
    sign = -1 if s.get("backend") == "conv" else 1
    neuron.weight.data, neuron.bias.data = case["param_weight"].flatten(), sign * case[f"param_{name}"]
    spikes = neuron(x)
    case.spikes(spikes)
    case.output(neuron.potentials(x), "fire_arg")
    spikes.backward(case["grad_out"])
    case.gradient(x.grad, "grad_x")
    case.gradient(neuron.weight.grad, "grad_weight")
    assert neuron.bias.grad is not None
    case.gradient(sign * neuron.bias.grad, f"grad_{name}")
    case.spikes(stepwise(neuron, case["x"])[0])


# --- PSU family -------------------------------------------------------------------------------------------------------
# The release has powers of 1/tau where the derivation has powers of 1 - 1/tau. With tau' = tau / (tau - 1) one is the
# other: 1 - 1/tau' = 1/tau. Its A is then ours of tau' on the input divided by tau - 1; its B is ours of tau'.


def check_buffers(case: Case, neuron: PSU | SPSN, scale: float) -> None:
    """The release's A and B out of ours."""
    identity = torch.eye(case.settings["T"], dtype=case.dtype)
    x = identity.unsqueeze(1)
    a = leaky_filter(x, 0.0, neuron.decay)[0][:, 0] * scale
    assert ("buffer_m1" in case) == (case.settings["T"] <= 7)  # those of T = 50 were not kept
    if "buffer_m1" in case:
        torch.testing.assert_close(a, case["buffer_m1"], rtol=1e-6, atol=1e-7)
    if "buffer_m2" in case:
        psu = PSU(neuron.tau, case.settings["v_threshold"] if case.unit == "psu" else 1.0)
        b = -psu_reference(torch.zeros_like(x), x, psu.decay, psu.drop(), False, True)[0][:, 0]
        torch.testing.assert_close(-b, case["buffer_m2"], rtol=1e-6, atol=1e-7)
    if "buffer_mask0" in case:
        assert torch.equal(case["buffer_mask0"] != 0, torch.ones_like(identity).tril() != 0)


def check_psu_family(case: Case) -> None:
    s = case.settings
    tau, scale = s["tau"] / (s["tau"] - 1), 1 / (s["tau"] - 1)
    common = {"tau": tau, "v_threshold": s["v_threshold"], "surrogate": case.surrogate, "strict": True}
    neuron: PSU
    if case.unit == "psu":
        neuron = PSU(**common)
    elif case.unit == "rpsu":
        neuron = RPSU(s["T"], **common, scaled_reset=False)
    else:
        neuron = IPSU(s["T"], **common, scaled_reset=False, form=case.unit.removeprefix("ipsu_"))  # pyright: ignore
    neuron = neuron.to(case.dtype)
    check_buffers(case, neuron, scale)
    # Where A is in the formula the input is scaled; RPSU's A_R then takes the scale back.
    scaled = case.unit in ("psu", "rpsu")
    x = case.input()
    given = x * scale if scaled else x
    if isinstance(neuron, IPSU | RPSU):
        back = 1 / scale if scaled else 1.0
        neuron.weight.data, bias = case["param_fc_weight"] * back, neuron.bias
        assert bias is not None
        bias.data = case["param_fc_bias"]
    spikes = neuron(given)
    case.spikes(spikes)
    case.output(neuron.potentials(given.detach()), "v")
    spikes.backward(case["grad_out"])
    case.gradient(x.grad, "grad_x")
    if isinstance(neuron, IPSU | RPSU):
        assert neuron.weight.grad is not None
        case.gradient(neuron.weight.grad * back, "grad_fc_weight")
        case.gradient(bias.grad, "grad_fc_bias")
    else:
        case.spikes(stepwise(neuron, given.detach())[0])
    # The slope, which the release trains: see `test_psu_release_trains_the_surrogate_slope`.
    assert case["param_act_fun_alpha"] == 2
    case.read.add("grad_act_fun_alpha")


def check_spsn(case: Case) -> None:
    tau = case.settings["tau"]
    neuron = SPSN(tau / (tau - 1))
    check_buffers(case, neuron, 1 / (tau - 1))
    case.output(torch.sigmoid(neuron.potentials(case["x"] / (tau - 1))), "p")


# --- the comparators --------------------------------------------------------------------------------------------------


def check_klif(case: Case) -> None:
    s, x = case.settings, case.input()
    assert not s.get("scale_reset", False)
    neuron = KLIF(s["tau"], s["decay_input"], s["v_threshold"], s["v_reset"], case.surrogate, s["detach_reset"])
    neuron.k.data = case["param_k"]
    spikes = neuron(x)
    case.spikes(spikes)
    case.output(neuron.potentials(x) - s["v_threshold"], "fire_arg")
    stepped, states = stepwise(neuron, case["x"])
    case.spikes(stepped)
    case.output(torch.stack(states), "v_after_reset")
    spikes.backward(case["grad_out"])
    case.gradient(x.grad, "grad_x")
    case.gradient(neuron.k.grad, "grad_k")


GLIF_NAMES = {
    "glif": {"v_threshold": "Vth", "v_drop": "reVth"},
    "glif_soft_gates": {"leak": "linear_decay", "v_drop": "v_subreset"},
}


def check_glif(case: Case) -> None:
    s, x = case.settings, case.input()
    soft = case.unit == "glif_soft_gates"
    assert s.get("threshold_test", ">") == (">=" if soft else ">")
    neuron = GLIF(x.shape[2], s["T"], case.surrogate, hard_gates=not soft, strict=not soft).to(case.dtype)
    names = {name: GLIF_NAMES[case.unit].get(name, name) for name, _ in neuron.named_parameters()}
    assert len(names) == 8
    for name, parameter in neuron.named_parameters():
        parameter.data = case[f"param_{names[name]}"]
    spikes = neuron(x)
    case.spikes(spikes)
    spikes.backward(case["grad_out"])
    case.gradient(x.grad, "grad_x")
    for name, parameter in neuron.named_parameters():
        case.gradient(parameter.grad, f"grad_{names[name]}")
    stepped, states = stepwise(neuron, case["x"])
    case.spikes(stepped)
    if "fire_arg" in case:
        threshold = torch.sigmoid(neuron.v_threshold.detach()).view(-1, 1, 1)[(...,) if x.dim() == 5 else (..., 0, 0)]
        case.output(torch.stack([state[0][0] for state in states]) - threshold, "fire_arg")


# --- ParaLIF and its baseline -----------------------------------------------------------------------------------------


def times(s: dict[str, Any]) -> dict[str, Any]:
    return {"tau_mem": s["tau_mem"], "tau_syn": s["tau_syn"], "time_step": s["time_step"]}


def set_decays(case: Case, neuron: LeakyIntegrator) -> None:
    """Learned raw values as given; fixed ones in the case's own precision, after they are seen to be ours."""
    for name in ("alpha", "beta"):
        if "param__" + name in case:
            getattr(neuron, name).data = case["param__" + name]
        else:
            ours = getattr(neuron, name)
            torch.testing.assert_close(ours, case[name].to(ours.dtype), rtol=1e-6, atol=0)
            setattr(neuron, name, case[name])
    decays = dict(zip(("alpha", "beta"), neuron.decays(), strict=True))
    for name, value in decays.items():
        torch.testing.assert_close(value.detach(), case[name], rtol=1e-6, atol=0)


def check_decays_gradients(case: Case, neuron: LeakyIntegrator, suffix: str) -> None:
    if neuron.learn_tau:
        case.gradient(neuron.alpha.grad, f"grad__alpha{suffix}")
        case.gradient(neuron.beta.grad, f"grad__beta{suffix}")


def check_lif_synaptic(case: Case) -> None:
    s, x = case.settings, case.input()
    learned = s.get("learn_tau", False)
    neuron = SynapticLIF(**times(s), v_threshold=s["spk_threshold"], learn_tau=learned, surrogate=case.surrogate).to(
        case.dtype
    )
    set_decays(case, neuron)
    grad_out = case["grad_out"]
    spikes = neuron(x)
    case.spikes(spikes)
    stepped, states = stepwise(neuron, case["x"])
    case.spikes(stepped)
    case.output(torch.stack([state[1] for state in states]), "v")
    spikes.backward(grad_out)
    case.gradient(x.grad, "grad_x")
    check_decays_gradients(case, neuron, "")
    if "param__spk_threshold" in case:
        # Ours has a fixed threshold. With a detached reset the threshold acts through the surrogate alone.
        assert case["param__spk_threshold"] == pytest.approx(s["spk_threshold"])
        u = neuron.potentials(x) - s["spk_threshold"]
        case.gradient(-(grad_out * case.surrogate.derivative(u)).sum(), "grad__spk_threshold")


def check_leaky_integrator(case: Case) -> None:
    x = case.input()
    neuron = LeakyIntegrator(**times(case.settings)).to(case.dtype)
    set_decays(case, neuron)
    m = neuron(x)
    case.output(m.detach(), "v_sequential")
    m.backward(case["grad_out"])
    case.gradient(x.grad, "grad_x_sequential")
    case.output(stepwise(neuron, case["x"])[0], "v_sequential")
    check_wrapped(case, neuron)


def check_wrapped(case: Case, neuron: LeakyIntegrator) -> None:
    """The release's membrane and, where nothing fires, its gradient: transforms of length 2 T."""
    x = case.input()
    alpha, beta = (d.detach() for d in neuron.decays())
    m = leaky_filter_fft(x, alpha, beta, padding=2 * x.shape[0])
    case.output(m.detach(), "v_parallel_2N")
    grad_out = case["grad_out"]
    if case.unit == "leaky_integrator":
        out, key = m, "grad_x_parallel_2N"
    else:
        assert isinstance(neuron, ParaLIF)
        threshold = torch.as_tensor(neuron.threshold(), dtype=m.dtype).detach().requires_grad_()
        out = fire_by(neuron.firing, m, threshold, neuron.surrogate)[0]
        case.spikes(out, "spikes_parallel_2N")
        key = "grad_x_parallel_2N"
    grads = torch.autograd.grad(out, [x], grad_out)
    case.gradient(grads[0], key)
    for name in ("_spk_threshold", "_alpha", "_beta"):
        case.read.add(f"grad_{name}_parallel_2N")


def check_paralif(case: Case) -> None:
    s, x = case.settings, case.input()
    neuron = ParaLIF(
        s["firing"],
        **times(s),
        v_threshold=s["spk_threshold"],
        learn_threshold=s.get("learn_threshold", False),
        learn_tau=s.get("learn_tau", False),
        surrogate=case.surrogate,
    )
    neuron = neuron.to(case.dtype)
    if isinstance(neuron.v_threshold, nn.Parameter):
        neuron.v_threshold.data = case["param__spk_threshold"]
    set_decays(case, neuron)
    # `sd`: the rule of the firing table, which the release's parallel form has and its serial form has not.
    suffix = "_rule_on_sequential_v" if s["firing"] == "sd" else "_sequential"
    spikes = neuron(x)
    case.output(neuron.potentials(x), "v_sequential")
    case.spikes(spikes, f"spikes{suffix}")
    spikes.backward(case["grad_out"])
    case.gradient(x.grad, f"grad_x{suffix}")
    check_decays_gradients(case, neuron, suffix)
    if isinstance(neuron.v_threshold, nn.Parameter):
        case.gradient(neuron.v_threshold.grad, f"grad__spk_threshold{suffix}")
    case.spikes(stepwise(neuron, case["x"])[0], f"spikes{suffix}")
    check_wrapped(case, neuron)
    if s["firing"] == "sd":  # see `test_paralif_sd_release_disagrees_with_itself`
        case.read |= {"spikes_sequential", "grad_x_sequential"}


def check_paralif_stochastic(case: Case) -> None:
    s, x = case.settings, case.input()
    neuron = ParaLIF(s["firing"], **times(s)).to(case.dtype)
    for name, tau in (("alpha", s["tau_syn"]), ("beta", s["tau_mem"])):
        setattr(neuron, name, torch.exp(torch.tensor(-s["time_step"] / tau, dtype=torch.float64)).to(case.dtype))
    m, grad_out = neuron.membrane(x, None, False)[0], case["grad_out"]
    case.output(m.detach(), "v")
    if s["firing"] == "gs":
        spikes = gumbel(m, case["uniform"])
        case.spikes(spikes.detach(), "spikes_given_uniform")
        case.output(torch.sigmoid(2 * m.detach()), "p_marginal")
        spikes.backward(grad_out)
    else:
        case.output(MAPS[FIRING[s["firing"]][0]](m.detach()), "p")
        neuron(x).backward(grad_out)  # does not depend on the draw
    case.gradient(x.grad, "grad_x")


def set_recurrent(case: Case, neuron: RecurrentLIF | RecurrentParaLIF) -> None:
    neuron.recurrent.weight.data = case["param_fc_recu_weight"]
    neuron.recurrent.bias.data = case["param_fc_recu_bias"]
    set_decays(case, neuron)


def check_recurrent_lif(case: Case) -> None:
    s, x = case.settings, case.input()
    neuron = RecurrentLIF(
        x.shape[-1],
        **times(s),
        v_threshold=s["spk_threshold"],
        surrogate=case.surrogate,
        feedback="spikes" if s["recurrent_fire"] else "relu",
    ).to(case.dtype)
    set_recurrent(case, neuron)
    spikes = neuron(x)
    case.spikes(spikes)
    stepped, states = stepwise(neuron, case["x"])
    case.spikes(stepped)
    case.output(torch.stack([state[1] for state in states]), "v")
    spikes.backward(case["grad_out"])
    case.gradient(x.grad, "grad_x")
    case.gradient(neuron.recurrent.weight.grad, "grad_fc_recu_weight")
    case.gradient(neuron.recurrent.bias.grad, "grad_fc_recu_bias")


def check_recurrent_paralif(case: Case) -> None:
    s, x = case.settings, case.input()
    fires = s.get("fire", True)
    neuron = RecurrentParaLIF(
        x.shape[-1],
        s.get("firing", "t"),
        **times(s),
        v_threshold=s.get("spk_threshold"),
        surrogate=case.surrogate if fires else SURROGATES["ATan"](),
        feedback="spikes" if s["recurrent_fire"] else "relu",
    ).to(case.dtype)
    set_recurrent(case, neuron)
    m = neuron.membrane(x, None, False)[0]
    case.output(m.detach(), "v_sequential")
    out = neuron(x) if fires else m
    if fires:
        case.spikes(out, "spikes_sequential")
    out.backward(case["grad_out"])
    case.gradient(x.grad, "grad_x_sequential")
    case.gradient(neuron.recurrent.weight.grad, "grad_fc_recu_weight_sequential")
    case.gradient(neuron.recurrent.bias.grad, "grad_fc_recu_bias_sequential")
    # The wrap of 2 T is the integrator's, compared where it stands alone: `paralif` and `leaky_integrator`.
    case.read |= {key for key in case.arrays if key.endswith("_parallel_2N")}


# --- every case -------------------------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[[Case], None]] = {
    "mlf": check_mlf,
    "psn": check_psn,
    "masked_psn": check_masked_psn,
    "sliding_psn": check_sliding_psn,
    "psu": check_psu_family,
    "ipsu_paper": check_psu_family,
    "ipsu_released": check_psu_family,
    "rpsu": check_psu_family,
    "spsn": check_spsn,
    "klif": check_klif,
    "glif": check_glif,
    "glif_soft_gates": check_glif,
    "lif_synaptic": check_lif_synaptic,
    "leaky_integrator": check_leaky_integrator,
    "paralif": check_paralif,
    "paralif_stochastic": check_paralif_stochastic,
    "recurrent_lif": check_recurrent_lif,
    "recurrent_paralif": check_recurrent_paralif,
}


@pytest.mark.parametrize("name", golden_cases(*CHECKS))
def test_released_code(golden: Golden, name: str) -> None:
    case = Case(golden, name)
    CHECKS[case.unit](case)
    assert set(case.arrays) <= case.read, "arrays that nothing was compared with"


def test_number_of_cases(golden: Golden) -> None:
    assert {unit: len(golden_cases(unit)) for unit in CHECKS} == CASES
    assert len(golden_cases(*CHECKS)) == sum(CASES.values()) == 394


# Every departure that the manifest names, and what meets it here.
DEPARTURES = {
    "strict >": "strict=True, or always so (ParaLIF)",
    "differentiated through": "detach_reset=False",
    "powers of 1/tau": "test_psu_release_has_powers_of_one_over_tau",
    "surrogate slope": "test_psu_release_trains_the_surrogate_slope",
    "not trained by QGateGrad": "test_psu_release_trains_the_surrogate_slope",
    "B not scaled": "scaled_reset=False; test_psu_release_leaves_the_reset_unscaled",
    "released IPSU": "form='released'; test_ipsu_release_resets_by_the_raw_input",
    "paper's IPSU form": "form='paper'",
    "probability only": "check_spsn",
    "no gradient rule": "test_spsn_release_has_no_gradient",
    "hard gates": "hard_gates=True",
    "gates stay soft": "hard_gates=False",
    "rounds them to 0/1": "hard_gates=True, in the unit glif",
    "hard reset to 0, detached": "always so (SynapticLIF, RecurrentLIF)",
    "AFTER the reset": "read from the Stream's state",
    "v after reset": "read from the Stream's state",
    "after the reset": "read from the Stream's state",
    "relu of that": "feedback='relu'",
    "learned time constants": "test_paralif_release_starts_learned_decays_elsewhere",
    "raw parameter": "test_paralif_release_starts_learned_decays_elsewhere",
    "2N": "test_paralif_release_wraps_the_kernel",
    "at n=0": "test_paralif_sd_release_disagrees_with_itself",
    "_rule_on_sequential_v": "test_paralif_sd_release_disagrees_with_itself",
    "added again": "add_hidden=True; test_recurrent_paralif_release_counts_the_input_twice",
    "h[0]": "H[0] = 0",
    "membrane from the released sequential form": "v",
    "draws are not stored": "gradients alone",
    "spikes and gradient for the stored uniforms": "gumbel(m, uniform)",
    "closed form": "p_marginal",
}


def test_every_departure_is_met(golden: Golden) -> None:
    for name in golden_cases(*CHECKS):
        for part in filter(None, re.split(r"; ", golden.rows[name]["departures"])):
            assert any(known in part for known in DEPARTURES), part
    for met in DEPARTURES.values():
        for test in re.findall(r"\b(?:test|check)_\w+", met):
            assert test in globals(), test


# --- departures -------------------------------------------------------------------------------------------------------


def cases_of(golden: Golden, *units: str, **wanted: Any) -> list[Case]:
    found = [
        Case(golden, name)
        for name in golden_cases(*units)
        if all(json.loads(golden.rows[name]["settings"]).get(k) == v for k, v in wanted.items())
    ]
    assert found
    return found


def test_sliding_psn_conv_stores_the_threshold_itself(golden: Golden) -> None:
    conv, gemm = (cases_of(golden, "sliding_psn", backend=name) for name in ("conv", "gemm"))
    assert len(conv) == len(gemm) == 8
    for a, b in zip(conv, gemm, strict=True):
        assert torch.equal(a["param_threshold"], -b["param_threshold"]) or not torch.equal(a["x"], b["x"])
        wrong = SlidingPSN(a.settings["k"]).to(a.dtype)
        wrong.weight.data, wrong.bias.data = a["param_weight"].flatten(), a["param_threshold"]
        expected = a["fire_arg"] + 2 * a["param_threshold"]
        torch.testing.assert_close(wrong.potentials(a["x"]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unit", ["psu", "ipsu_paper", "ipsu_released", "rpsu", "spsn"])
def test_psu_release_has_powers_of_one_over_tau(golden: Golden, unit: str) -> None:
    """At tau = 2 its matrices are the derivation's, at tau = 3 they are not: ours follow the derivation."""
    for tau in (2.0, 3.0):
        differing = 0
        for case in cases_of(golden, unit, tau=tau):
            t = torch.arange(case.settings["T"], dtype=torch.float64)
            lag = (t.unsqueeze(1) - t).clamp_min(0)
            derived = ((1 - 1 / tau) ** lag / tau).tril()
            released = ((1 / tau) ** (lag + 1)).tril()
            if "buffer_m1" in case:
                torch.testing.assert_close(case["buffer_m1"].double(), released, rtol=1e-6, atol=1e-7)
            ours = leaky_filter(torch.eye(case.settings["T"], dtype=torch.float64).unsqueeze(1), 0.0, PSU(tau).decay)[
                0
            ][:, 0]
            torch.testing.assert_close(ours, derived, rtol=1e-12, atol=1e-14)
            differing += not torch.allclose(released, derived)
        assert differing > 0 if tau == 3 else differing == 0


@pytest.mark.parametrize("unit", ["psu", "ipsu_paper", "ipsu_released", "rpsu"])
def test_psu_release_trains_the_surrogate_slope(golden: Golden, unit: str) -> None:
    for case in cases_of(golden, unit):
        T, slope = case.settings["T"], case["param_act_fun_alpha"]
        released = sum(case[key].numel() for key in case.arrays if key.startswith("param_"))
        ours = PSU() if unit == "psu" else RPSU(T)
        count = sum(p.numel() for p in ours.parameters())
        assert released == count + 1
        assert count == (0 if unit == "psu" else T * T + T)
        assert slope.shape == ()
        # Only its arctangent has a gradient for the slope; at the released start value ours is the same function.
        assert ("grad_act_fun_alpha" in case) == case.settings["surrogate"].startswith("ATan")


def test_spsn_release_has_no_gradient(golden: Golden) -> None:
    """No gradient was recorded: its draw has none. Ours has the rule of ParaLIF's SB."""
    for case in cases_of(golden, "spsn"):
        assert not [key for key in case.arrays if key.startswith("grad")]
        x = case.input()
        SPSN(case.settings["tau"])(x).sum().backward()
        assert x.grad is not None
        assert x.grad.all()


@pytest.mark.parametrize(("unit", "make"), [("ipsu_paper", IPSU), ("rpsu", RPSU)])
def test_psu_release_leaves_the_reset_unscaled(golden: Golden, unit: str, make: type[RPSU]) -> None:
    """Our default B carries the threshold: the same potential at 1 alone."""
    differing = {1.0: 0, 0.5: 0}
    for case in cases_of(golden, unit, tau=2.0):
        v_threshold = case.settings["v_threshold"]
        neuron = make(case.settings["T"], v_threshold=v_threshold).to(case.dtype)
        neuron.weight.data = case["param_fc_weight"]
        assert neuron.bias is not None
        neuron.bias.data = case["param_fc_bias"]
        got = neuron.potentials(case["x"])
        if v_threshold == 1.0 or case.settings["T"] == 1:
            case.output(got, "v")
        differing[v_threshold] += not torch.allclose(got, case["v"], rtol=1e-4, atol=1e-4)
    assert differing[1.0] == 0
    assert differing[0.5] > 0


def test_ipsu_release_resets_by_the_raw_input(golden: Golden) -> None:
    differing = 0
    for case in cases_of(golden, "ipsu_released", tau=2.0, v_threshold=1.0):
        neuron = IPSU(case.settings["T"]).to(case.dtype)
        assert neuron.form == "paper"
        neuron.weight.data = case["param_fc_weight"]
        assert neuron.bias is not None
        neuron.bias.data = case["param_fc_bias"]
        differing += not torch.allclose(neuron.potentials(case["x"]), case["v"], rtol=1e-3, atol=1e-3)
    assert differing > 0


def test_paralif_release_wraps_the_kernel(golden: Golden) -> None:
    """Transforms of length 2 T: the release's own outputs are reproduced with them (`check_wrapped`), and are wrong."""
    errors: dict[tuple[float, int], float] = {}
    for case in cases_of(golden, "leaky_integrator", tau_syn=0.02):
        serial, wrapped = case["v_sequential"], case["v_parallel_2N"]
        difference = (serial - wrapped).abs().max().item()
        recorded = case.settings["max_abs_difference_parallel_2N_vs_sequential"]
        assert difference == pytest.approx(recorded, rel=1e-4, abs=1e-5)
        errors[case.settings["tau_mem"], case.settings["T"]] = difference
        alpha, beta = case["alpha"], case["beta"]
        ours = leaky_filter_fft(case["x"], alpha, beta)
        assert (ours - serial).abs().max() <= 2e-6 * serial.abs().max()
    assert errors[0.02, 50] > 1
    assert errors[0.02, 1] < 1e-6


def test_paralif_sd_release_disagrees_with_itself(golden: Golden) -> None:
    """Before the first step its parallel form has a mapped potential of 0, its serial form sigmoid(0) = 1/2."""
    total = 0
    for case in cases_of(golden, "paralif", firing="sd"):
        serial, rule = case["spikes_sequential"], case["spikes_rule_on_sequential_v"]
        assert torch.equal(serial[1:], rule[1:])
        mapped = torch.sigmoid(case["v_sequential"][0])
        threshold = case.settings["spk_threshold"]
        assert torch.equal(rule[0], (mapped > threshold).to(rule.dtype))
        assert torch.equal(serial[0], (mapped - 0.5 > threshold).to(rule.dtype))
        total += int((serial != rule).sum())
    assert total > 0


@pytest.mark.parametrize("unit", ["paralif", "lif_synaptic"])
def test_paralif_release_starts_learned_decays_elsewhere(golden: Golden, unit: str) -> None:
    """The release's raw parameter is the decay itself and acts through a sigmoid; ours starts where tau says."""
    for case in cases_of(golden, unit, learn_tau=True):
        s = case.settings
        neuron = (ParaLIF if unit == "paralif" else SynapticLIF)(**times(s), learn_tau=True)
        for name, tau in (("alpha", s["tau_syn"]), ("beta", s["tau_mem"])):
            decay = torch.exp(torch.tensor(-s["time_step"] / tau))
            raw = case[f"param__{name}"].float()
            torch.testing.assert_close(raw, decay, rtol=1e-5, atol=0)
            torch.testing.assert_close(case[name].float(), torch.sigmoid(raw), rtol=1e-5, atol=0)
        for ours, tau in zip(neuron.decays(), (s["tau_syn"], s["tau_mem"]), strict=True):
            assert ours.item() == pytest.approx(torch.exp(torch.tensor(-s["time_step"] / tau)).item(), rel=1e-6)


def test_recurrent_paralif_release_counts_the_input_twice(golden: Golden) -> None:
    for case in cases_of(golden, "recurrent_paralif"):
        s, x = case.settings, case["x"]
        hidden = LeakyIntegrator(**times(s)).to(case.dtype)
        neuron = RecurrentParaLIF(
            x.shape[-1],
            s.get("firing", "t"),
            **times(s),
            v_threshold=s.get("spk_threshold"),
            feedback="spikes" if s["recurrent_fire"] else "relu",
            add_hidden=False,
        ).to(case.dtype)
        set_decays(case, hidden)
        set_recurrent(case, neuron)
        single = neuron.potentials(x)
        expected = case["v_sequential"]
        scale = expected.abs().max()
        assert (single + hidden(x) - expected).abs().max() < 1e-5 * scale
        assert (single - expected).abs().max() > 0.1 * scale
