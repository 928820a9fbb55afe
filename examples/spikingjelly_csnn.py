"""SpikingJelly's convolutional classifier (`conv_fashion_mnist`: its CSNN) on MNIST.

    python examples/spikingjelly_csnn.py DATA

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
from spikeloom.layers import Conv2d, Flatten, Linear, MaxPool2d, NormSpike, Repeat
from spikeloom.neurons import IF
from spikeloom.train import fit


def neuron() -> IF:
    return IF(detach_reset=False)  # in SpikingJelly the gradient passes the reset


def csnn(channels: int = 128, T: int = 4) -> nn.Module:
    """Two convolutions and two linear layers, spikes to the end; images [N, 1, 28, 28] are shown for T steps."""
    return Repeat(
        nn.Sequential(
            Conv2d(1, channels, 3, padding=1, bias=False),
            NormSpike(channels, neuron),
            MaxPool2d(2),  # 14 x 14
            Conv2d(channels, channels, 3, padding=1, bias=False),
            NormSpike(channels, neuron),
            MaxPool2d(2),  # 7 x 7
            Flatten(),
            Linear(channels * 7 * 7, channels * 4 * 4, bias=False),
            neuron(),
            Linear(channels * 4 * 4, 10, bias=False),
            neuron(),
        ),
        T,
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", help="folder of the data; SPIKELOOM_DATA without it")
    parser.add_argument("--data", default="mnist", choices=("mnist", "digits"))
    parser.add_argument("--subset", type=int, help="images of each part; all without it")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default="runs/spikingjelly_csnn", help="folder of the run")
    given = parser.parse_args(arguments)
    parts = [create_dataset(given.data, given.root, p, size=28, subset=given.subset) for p in ("train", "test")]
    return fit(
        csnn(given.channels),
        *parts,
        out=given.out,
        seed=given.seed,
        epochs=given.epochs,
        batch_size=128,
        loss="mse_onehot",  # of the firing rates
        optimizer="adam",
        lr=1e-3,
        schedule="cosine",
    )


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
