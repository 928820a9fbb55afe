"""snnTorch's convolutional network (tutorial 6, 12C5-MP2-64C5-MP2-10) on MNIST, with its loss of rates or counts.

    python examples/snntorch_convnet.py DATA
    python examples/snntorch_convnet.py DATA --loss count

DATA/MNIST/raw holds the four IDX files; `--data digits` takes scikit-learn's digits, which need no files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from spikeloom.data import create_dataset
from spikeloom.errors import UsageError
from spikeloom.layers import Conv2d, Flatten, Linear, MaxPool2d, Repeat
from spikeloom.neurons import DelayedResetLIF
from spikeloom.surrogates import FastSigmoid
from spikeloom.train import fit

# Of the tutorial; the loss of counts is unsteady at that rate, and seeds differ by ten points.
LR = {"rate": 1e-2, "count": 2e-3}
LOSSES = {"rate": "tet", "count": "ce_count"}  # SF.ce_rate_loss, SF.ce_count_loss


def neuron() -> DelayedResetLIF:
    """`snn.Leaky(beta=0.5, spike_grad=surrogate.fast_sigmoid(slope=25))`."""
    return DelayedResetLIF(0.5, surrogate=FastSigmoid(25.0))


def convnet(T: int = 50) -> nn.Module:
    """Two convolutions and a linear layer; images [N, 1, 28, 28] are shown for T steps."""
    return Repeat(
        nn.Sequential(
            Conv2d(1, 12, 5),
            MaxPool2d(2),
            neuron(),
            Conv2d(12, 64, 5),
            MaxPool2d(2),
            neuron(),
            Flatten(),
            Linear(64 * 4 * 4, 10),
            neuron(),
        ),
        T,
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", help="folder of the data; SPIKELOOM_DATA without it")
    parser.add_argument("--data", default="mnist", choices=("mnist", "digits"))
    parser.add_argument("--subset", type=int, help="images of each part; all without it")
    parser.add_argument("--loss", default="rate", choices=tuple(LOSSES))
    parser.add_argument("--steps", type=int, default=50, help="T")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default="runs/snntorch_convnet", help="folder of the run")
    given = parser.parse_args(arguments)
    parts = [create_dataset(given.data, given.root, p, size=28, subset=given.subset) for p in ("train", "test")]
    return fit(
        convnet(given.steps),
        *parts,
        out=given.out,
        seed=given.seed,
        epochs=given.epochs,
        batch_size=128,
        loss=LOSSES[given.loss],
        optimizer="adam",
        lr=LR[given.loss],
        schedule="constant",
    )


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
