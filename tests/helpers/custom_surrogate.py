"""A surrogate that the kernels do not know."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spikeloom.surrogates import Surrogate


@dataclass(frozen=True)
class Gaussian(Surrogate):
    """One of a user's own, without a formula that kernels know; not even in x, to catch a wrong sign."""

    def primitive(self, x: Tensor) -> Tensor:
        return torch.special.erf(2 * x - 0.25)

    def derivative(self, x: Tensor) -> Tensor:
        return 4 / torch.pi**0.5 * torch.exp(-(2 * x - 0.25).square())
