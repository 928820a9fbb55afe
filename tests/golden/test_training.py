"""Losses, penalties and gradients of whole networks against vectors from the original authors' released code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.golden_checks import check_gradients, check_outputs, options
from helpers.golden_vectors import Golden, golden_cases
from torch import Tensor, nn

from spikeloom.layers import AvgPool2d, Conv2d, Flatten, Linear
from spikeloom.neurons import LIF
from spikeloom.train.losses import irm, tet
from spikeloom.train.methods import METHODS


@pytest.mark.parametrize("name", golden_cases("tet_loss"))
def test_tet(golden: Golden, name: str) -> None:
    settings, case = golden.case(name)
    logits = case["logits"].clone().requires_grad_()
    loss = tet(logits, case["labels"], lam=settings["lam"], target=settings["phi"])
    check_outputs(loss.detach(), case["loss"], f"{golden.rows[name]['tolerance']}, atol 1e-12")
    loss.backward()
    check_gradients(logits.grad, case["grad_logits"], golden.rows[name]["tolerance_grad"])


@pytest.mark.parametrize("name", golden_cases("irm_penalty"))
def test_irm(golden: Golden, name: str) -> None:
    """Released with one logit a sample: here it is the second of two, the first being 0."""
    _, case = golden.case(name)
    logits = case["logits"].clone().requires_grad_()
    both = torch.cat([torch.zeros_like(logits), logits], 1)[None]
    penalty = irm(both, case["labels"][:, 0].long(), estimator="square")
    row = golden.rows[name]
    tolerance = row["tolerance"] if row["tolerance"] == "exact" else f"{row['tolerance']}, atol 1e-9"
    check_outputs(penalty.detach(), case["penalty"], tolerance)
    penalty.backward()
    check_gradients(
        logits.grad,
        case["grad_logits_penalty"],
        "rtol 1e-4, atol 1e-5" if row["tolerance"] == "exact" else row["tolerance_grad"],
    )


def network(settings: dict[str, Any], case: dict[str, Tensor]) -> nn.Sequential:
    def neuron() -> LIF:
        return LIF(settings["tau"], settings["decay_input"], **options(settings))

    if settings["net"].startswith("Conv"):
        model = nn.Sequential(
            Conv2d(2, 4, 3, padding=1),
            neuron(),
            AvgPool2d(2),
            Conv2d(4, 3, 3, padding=1, bias=False),
            neuron(),
            Flatten(),
            Linear(27, 5),
        )
    else:
        a, b, c, d = (int(width) for width in settings["net"].split()[1].strip(",").split("-"))
        model = nn.Sequential(Linear(a, b), neuron(), Linear(b, c), neuron(), Linear(c, d))
    weights = {key.removeprefix("param_"): value for key, value in case.items() if key.startswith("param_")}
    model.to(case["x"].dtype).load_state_dict({f"{k[0]}.{k[2:]}": v for k, v in weights.items()})
    return model


CASES = [(name, "online") for name in golden_cases("sltt", "sltt_k", "bptt")]
CASES += [(name, "multi_step_detached") for name in golden_cases("sltt")]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_networks(golden: Golden, name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, case = golden.case(name)
    arguments: dict[str, Any] = {"mode": mode} if settings["method"] == "sltt" else {}
    if settings["method"] == "sltt_k":
        drawn = case["gradient_steps"]
        monkeypatch.setattr(torch, "randperm", lambda steps: drawn)
        arguments = {"k": len(drawn)}
    target: Any = "onehot" if settings["mse_target"] == "one-hot" else settings["mse_target"]
    losses: list[Tensor] = []

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        losses.append(tet(logits, y, lam=settings["lam"], target=target))
        return losses[-1]

    model = network(settings, case)
    logits = METHODS[settings["method"]](model, case["x"], case["labels"], loss, **arguments)
    row = golden.rows[name]
    check_outputs(logits, case["logits"], row["tolerance"])
    if settings["method"] == "sltt" and mode == "online":
        check_outputs(torch.stack(losses).detach() / settings["T"], case["losses"], row["tolerance"])
    for parameter, weight in model.named_parameters():
        check_gradients(weight.grad, case[f"grad_{parameter.replace('.', '_')}"], row["tolerance_grad"])
