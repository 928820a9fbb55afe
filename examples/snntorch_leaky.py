"""snnTorch's fully connected network of leaky neurons (tutorial 5, 784-1000-10) on MNIST, with each of its losses.

    python examples/snntorch_leaky.py DATA                # cross-entropy of the output's membrane at every step
    python examples/snntorch_leaky.py DATA --loss rate    # of its spikes at every step
    python examples/snntorch_leaky.py DATA --loss count   # of how many there are

DATA/MNIST/raw holds the four IDX files; `--data digits` takes scikit-learn's digits, which need no files.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.data import create_dataset
from spikeloom.errors import UsageError
from spikeloom.layers import Flatten, Linear, Repeat
from spikeloom.neurons import DelayedResetLIF, LeakyIntegrator
from spikeloom.train import fit

LOSSES = {"membrane": "tet", "rate": "tet", "count": "ce_count"}


class Membrane(nn.Module):
    """The potential of `snn.Leaky(beta)` instead of its spikes; [T, N, ...] -> [T, N, ...].

    U[t] = beta U[t-1] + X[t] - S[t-1] is a leaky sum of X and of the resets, through which no gradient passes.
    """

    def __init__(self, beta: float):
        super().__init__()
        self.beta, self.neuron = beta, DelayedResetLIF(beta)
        self.filter = LeakyIntegrator(tau_mem=-0.001 / math.log(beta), tau_syn=None)  # times 1 - beta

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.neuron(x).detach()
        resets = torch.cat((torch.zeros_like(spikes[:1]), spikes[:-1]))
        return self.filter(x - resets) / (1 - self.beta)


def leaky(loss: str = "membrane", T: int = 25, beta: float = 0.95) -> nn.Module:
    """784-1000-10; the output layer gives its potential where that is what the loss is of, spikes otherwise."""
    last = Membrane(beta) if loss == "membrane" else DelayedResetLIF(beta)
    return Repeat(nn.Sequential(Flatten(), Linear(28 * 28, 1000), DelayedResetLIF(beta), Linear(1000, 10), last), T)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", help="folder of the data; SPIKELOOM_DATA without it")
    parser.add_argument("--data", default="mnist", choices=("mnist", "digits"))
    parser.add_argument("--subset", type=int, help="images of each part; all without it")
    parser.add_argument("--loss", default="membrane", choices=tuple(LOSSES))
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default="runs/snntorch_leaky", help="folder of the run")
    given = parser.parse_args(arguments)
    parts = [create_dataset(given.data, given.root, p, size=28, subset=given.subset) for p in ("train", "test")]
    return fit(
        leaky(given.loss),
        *parts,
        out=given.out,
        seed=given.seed,
        epochs=given.epochs,
        batch_size=128,
        loss=LOSSES[given.loss],
        optimizer="adam",
        lr=5e-4,
        schedule="constant",
    )


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
