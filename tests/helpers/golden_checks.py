"""What tests against golden vectors compare, and by which tolerances."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from spikeloom.surrogates import SURROGATES, Surrogate


def surrogate_of(text: str) -> Surrogate:
    match = re.match(r"(\w+)\((\w+)=([\d.]+)\)", text)
    assert match, text
    name, argument, value = match.groups()
    options = {"closed": True} if "edge included" in text else {}
    return SURROGATES[name](**{argument: float(value)}, **options)


def check_outputs(got: Tensor, expected: Tensor, tolerance: str) -> None:
    """The manifest's tolerance of outputs, as its text states it."""
    if tolerance.startswith("exact"):
        assert torch.equal(got, expected)
        return
    rtol, atol = (float(v) for v in re.findall(r"[ra]tol ([\de.-]+)", tolerance))
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def check_gradients(got: Tensor | None, expected: Tensor, tolerance: str) -> None:
    assert got is not None
    rtol, atol = (float(v) for v in re.findall(r"[ra]tol ([\de.-]+)", tolerance))
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol * max(expected.abs().max().item(), 1e-30))


def options(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "v_threshold": settings["v_threshold"],
        "v_reset": settings["v_reset"],
        "surrogate": surrogate_of(settings["surrogate"]),
        "detach_reset": settings["detach_reset"],
    }
