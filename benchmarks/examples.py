"""The networks of examples/ beside those of SpikingJelly and snnTorch: accuracy on MNIST, and seconds of training.

    python benchmarks/examples.py DATA                       # all pairs, one epoch, seeds 1 to 3; 1 thread
    python benchmarks/examples.py DATA csnn --epochs 3 --seeds 1 2 3 --threads 2
    python benchmarks/examples.py DATA --subset 2000 --seeds 1   # minutes: it runs
    python benchmarks/examples.py DATA "convnet count" --subset 10000 --seeds 1 2 --copies 4

Both networks of a pair start from the same weights and see the same batches in the same order, with the same optimiser
and rate; only the network, its loss and its neurons are the library's own. They take turns, seed by seed, in one
process. Accuracies are means with standard deviations over all starts. `--copies` trains every start several times, its
weights changed by a millionth: what differs then is chance, and what differs less between the libraries shows nothing.
Seconds are medians of the training loop, without reading data and testing. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikeloom.data import create_dataset
from spikeloom.memory import keep_memory
from spikeloom.models import copy_weights
from spikeloom.train import losses
from spikeloom.train.build import epoch_order

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # at import: of their optional parts
    import snntorch as snn
    import snntorch.functional as SF
    from snntorch import surrogate
    from spikingjelly.activation_based import functional, layer, neuron
    from spikingjelly.activation_based import surrogate as jelly

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import snntorch_convnet
import snntorch_leaky
import spikingjelly_csnn

Loss = Callable[[Tensor, Tensor], Tensor]


class Jelly(nn.Module):
    """SpikingJelly's CSNN of `examples/conv_fashion_mnist.py`."""

    def __init__(self, channels: int = 128, T: int = 4):
        super().__init__()
        self.T = T

        def fire() -> nn.Module:
            return neuron.IFNode(surrogate_function=jelly.ATan())

        self.layers = nn.Sequential(
            *(layer.Conv2d(1, channels, 3, padding=1, bias=False), layer.BatchNorm2d(channels), fire()),
            layer.MaxPool2d(2, 2),
            *(layer.Conv2d(channels, channels, 3, padding=1, bias=False), layer.BatchNorm2d(channels), fire()),
            *(layer.MaxPool2d(2, 2), layer.Flatten()),
            *(layer.Linear(channels * 7 * 7, channels * 4 * 4, bias=False), fire()),
            *(layer.Linear(channels * 4 * 4, 10, bias=False), fire()),
        )
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        functional.reset_net(self)
        return self.layers(x.expand(self.T, *x.shape))


class Leaky(nn.Module):
    """A network of snnTorch, run step by step as its tutorials do: spikes of the last layer, or its potentials."""

    def __init__(self, layers: list[nn.Module], T: int, membrane: bool = False):
        super().__init__()
        self.layers, self.T, self.membrane = nn.ModuleList(layers), T, membrane

    def forward(self, x: Tensor) -> Tensor:
        states = {part: part.init_leaky() for part in self.layers if isinstance(part, snn.Leaky)}
        found: list[Tensor] = []
        for _ in range(self.T):
            y, potential = x, x
            for part in self.layers:
                if isinstance(part, snn.Leaky):
                    y, potential = part(y, states[part])
                    states[part] = potential
                else:
                    y = part(y)
            found.append(potential if self.membrane else y)
        return torch.stack(found)


def their_convnet(T: int = 50) -> nn.Module:
    """Tutorial 6."""

    def fire() -> nn.Module:
        return snn.Leaky(beta=0.5, spike_grad=surrogate.fast_sigmoid(slope=25))

    convolutions = (nn.Conv2d(1, 12, 5), nn.MaxPool2d(2), fire(), nn.Conv2d(12, 64, 5), nn.MaxPool2d(2), fire())
    return Leaky([*convolutions, nn.Flatten(), nn.Linear(1024, 10), fire()], T)


def their_leaky(membrane: bool = False, T: int = 25) -> nn.Module:
    """Tutorial 5."""
    layers = [nn.Flatten(), nn.Linear(784, 1000), snn.Leaky(beta=0.95), nn.Linear(1000, 10), snn.Leaky(beta=0.95)]
    return Leaky(layers, T, membrane)


def each_step(out: Tensor, y: Tensor) -> Tensor:
    """Tutorial 5: the sum over steps of the cross-entropy of potentials. Adam does not see that ours is the mean."""
    return torch.stack([F.cross_entropy(step, y) for step in out]).sum()


def mean_square(out: Tensor, y: Tensor) -> Tensor:
    """Of firing rates minus one-hot labels."""
    return F.mse_loss(out.mean(0), F.one_hot(y, 10).float())


@dataclass(frozen=True)
class Pair:
    """An example here and there.

    Attributes:
        ours, theirs: make the network.
        our_loss, their_loss: of its output [T, N, 10] and labels.
        lr: of Adam.
    """

    ours: Callable[[], nn.Module]
    theirs: Callable[[], nn.Module]
    our_loss: Loss
    their_loss: Loss
    lr: float


PAIRS = {
    "csnn": Pair(spikingjelly_csnn.csnn, Jelly, losses.mse_onehot, mean_square, 1e-3),
    "convnet rate": Pair(snntorch_convnet.convnet, their_convnet, losses.tet, SF.ce_rate_loss(), 1e-2),
    "convnet count": Pair(snntorch_convnet.convnet, their_convnet, losses.ce_count, SF.ce_count_loss(), 2e-3),
    "leaky membrane": Pair(snntorch_leaky.leaky, lambda: their_leaky(True), losses.tet, each_step, 5e-4),
    "leaky rate": Pair(lambda: snntorch_leaky.leaky("rate"), their_leaky, losses.tet, SF.ce_rate_loss(), 5e-4),
    "leaky count": Pair(lambda: snntorch_leaky.leaky("count"), their_leaky, losses.ce_count, SF.ce_count_loss(), 5e-4),
}


@torch.no_grad()
def nudge(model: nn.Module, copy: int) -> None:
    """Changes the weights by a millionth of themselves, at random; of copy 0 nothing."""
    generator = torch.Generator().manual_seed(copy)
    for weight in model.parameters() if copy else ():
        weight.mul_(1 + 1e-6 * torch.randn(weight.shape, generator=generator))


def same_start(theirs: nn.Module, ours: nn.Module) -> None:
    """Gives our network the weights of theirs, whatever its last neurons are."""
    leaky = {name for name, part in theirs.named_modules() if isinstance(part, snn.Leaky)}
    copy_weights({k: v for k, v in theirs.state_dict().items() if k.rpartition(".")[0] not in leaky}, ours)


def train(model: nn.Module, loss: Loss, lr: float, data: Any, epochs: int, seed: int, batch: int = 128) -> float:
    """Trains a model, and returns the seconds that its steps took."""
    optimizer, seconds = torch.optim.Adam(model.parameters(), lr), 0.0
    for epoch in range(epochs):
        for indices in epoch_order(len(data), seed, epoch).split(batch):
            x, y = data.batch(indices.tolist())
            started = time.perf_counter()
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
            seconds += time.perf_counter() - started
    return seconds


@torch.no_grad()
def accuracy(model: nn.Module, data: Any, batch: int = 500) -> float:
    """In percent, by the largest mean over steps."""
    model.eval()
    right = 0
    for indices in torch.arange(len(data)).split(batch):
        x, y = data.batch(indices.tolist())
        right += int((model(x).mean(0).argmax(1) == y).sum())
    return 100 * right / len(data)


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.2f}" + (f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder of MNIST")
    parser.add_argument("pairs", nargs="*", help=f"some of {', '.join(PAIRS)}, by their first words; all without it")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--copies", type=int, default=1, help="of every seed's start")
    parser.add_argument("--subset", type=int, help="training images; all without it")
    parser.add_argument("--test-subset", type=int, help="test images; all without it")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    names = [name for name in PAIRS if not given.pairs or name.startswith(tuple(given.pairs))]
    if not names:
        parser.error(f"no pair of that name; there are {', '.join(PAIRS)}")
    torch.set_num_threads(given.threads)
    keep_memory()  # for every contender, as `fit` does
    training = create_dataset("mnist", given.root, "train", subset=given.subset)
    test = create_dataset("mnist", given.root, "test", subset=given.test_subset)
    print(
        f"{len(training)} images, {given.epochs} epochs, seeds {given.seeds}, {given.copies} of each, "
        f"{given.threads} threads"
    )
    print("| example | ours, % | theirs, % | ours, s | theirs, s | theirs / ours |\n|---|---|---|---|---|---|")
    for name in names:
        pair, found = PAIRS[name], [list[tuple[float, float]](), list[tuple[float, float]]()]
        for seed, copy in itertools.product(given.seeds, range(given.copies)):
            torch.manual_seed(seed)
            theirs, ours = pair.theirs(), pair.ours()
            nudge(theirs, copy)
            same_start(theirs, ours)
            ours.to(memory_format=torch.channels_last)  # as `fit` does
            turns = [(ours, pair.our_loss), (theirs, pair.their_loss)]
            for results, (model, loss) in zip(found, turns, strict=True):
                seconds = train(model, loss, pair.lr, training, given.epochs, seed)
                results.append((accuracy(model, test), seconds))
        accuracies = [spread([accuracy for accuracy, _ in results]) for results in found]
        our_time, their_time = (statistics.median(seconds for _, seconds in results) for results in found)
        figures = f"{' | '.join(accuracies)} | {our_time:.1f} | {their_time:.1f}"
        print(f"| {name} | {figures} | {their_time / our_time:.2f} |", flush=True)


if __name__ == "__main__":
    main()
