"""Cases of the golden vectors: inputs, outputs and gradients computed with the original authors' code."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spikeloom.neurons import Neuron
from spikeloom.record import Recorder


class Golden:
    """Cases of the golden vectors: settings, tolerances and arrays as tensors.

    Args:
        folder: `golden/neurons` or `golden/networks`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        with (folder / "manifest.csv").open(newline="") as file:
            self.rows = {row["id"]: row for row in csv.DictReader(file)}

    def case(self, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        row = self.rows[name]
        with np.load(self.folder / row["file"], allow_pickle=False) as arrays:
            case = {k.split("/", 1)[1]: torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith(f"{name}/")}
        return json.loads(row["settings"]), case

    def network(self, name: str) -> GoldenNetwork:
        return GoldenNetwork(self.rows[name], self.arrays(self.rows[name]))

    def arrays(self, row: dict[str, str]) -> dict[str, Any]:
        with np.load(self.folder / row["file"], allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}


class GoldenNetwork:
    """A network, block or module of the golden vectors: `load` its weights into one of ours, then `check` that.

    Layers are matched by the order in which they run: convolutions, linear layers and norms among themselves (a norm
    counts as running right after the layer whose output it takes), and neurons among themselves.

        case = golden.network("sew_resnet18_add")
        model = create_model("sew_resnet18")
        case.load(model, lambda: model(case.input))
        case.check(model, lambda x: model(x).mean(0), case.input)

    Args:
        row: of the manifest.
        arrays: of the file.
    """

    def __init__(self, row: dict[str, str], arrays: dict[str, Any]):
        self.row, self.arrays = row, arrays
        self.input = torch.from_numpy(arrays["input"]).float()
        self.state = {str(name): self._array(str(name)) for name in arrays["state_order"]}
        for one, other in zip(arrays.get("alias_from", []), arrays.get("alias_to", []), strict=True):
            own = [name for name in self.state if name.startswith(f"{one}.")]
            self.state.update({f"{other}{name.removeprefix(str(one))}": self.state[name] for name in own})
        self.neurons = [str(name) for name in arrays.get("neuron_name", [])]
        firing = {name.split("#")[0] for name in self.neurons}
        order = dict.fromkeys(str(name) for name in arrays["exec_order"])
        # The arrays of a norm that wraps another are the inner one's; a norm without weights has statistics.
        inner = dict.fromkeys(name if self._holds(name) else f"{name}.bn" for name in order)
        self.layers = [name for name in inner if self._holds(name) and name not in firing]
        self.names: dict[str, tuple[nn.Module, str]] = {}

    def _holds(self, name: str) -> bool:
        return f"{name}.weight" in self.state or f"{name}.running_mean" in self.state

    def _array(self, name: str) -> Tensor:
        if f"param/{name}" in self.arrays:
            return torch.from_numpy(self.arrays[f"param/{name}"])
        shape = tuple(self.arrays[f"shape/{name}"])
        bits = torch.from_numpy(np.unpackbits(self.arrays[f"sign/{name}"]))[: int(np.prod(shape))]
        return ((bits.float() * 2 - 1) * float(self.arrays[f"scale/{name}"])).reshape(shape)

    @torch.no_grad()
    def load(self, model: nn.Module, run: Callable[[], Any], parameters: dict[str, str] | None = None) -> None:
        """Copies all weights and buffers.

        Args:
            model: of ours; what it has and the original has not stays as it is.
            run: calls the model once, to see its order.
            parameters: our names of the neurons' parameters by the original's, where they differ.
        """
        layers, neurons = running_order(model, run)
        assert len(layers) == len(self.layers), (self.layers, layers)
        # A neuron object that serves several calls is several of ours.
        assert len(neurons) == len(self.neurons), (self.neurons, neurons)
        calls = [name.split("#")[0] for name in self.neurons]
        for theirs, ours in [*zip(self.layers, layers, strict=True), *zip(calls, neurons, strict=True)]:
            own = {name: name.removeprefix(f"{theirs}.") for name in self.state if name.startswith(f"{theirs}.")}
            targets = dict(ours.named_parameters()) | dict(ours.named_buffers())
            for name, key in own.items():
                key = (parameters or {}).get(key, key)
                targets[key].copy_(self.state[name].view_as(targets[key]))
                self.names[name] = (ours, key)

    def check(self, model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> None:
        """Runs the model in the case's mode: spikes, output, and in train mode all gradients and running statistics.

        Args:
            model: loaded before.
            run: from x to the output in the shape of the original's.
            x: the input in our layout, of one layout with `grad_input`.
        """
        training = self.row["mode"] == "train"
        model.train(training)
        x = x.detach().clone().requires_grad_(training)
        with torch.set_grad_enabled(training), Recorder(model) as record:
            out = run(x)
        expected = torch.from_numpy(self.arrays["logits" if "logits" in self.arrays else "output"])
        torch.testing.assert_close(out.detach(), expected, rtol=0, atol=float(self.row["logit_atol"]))
        if self.row["spike_tolerance"]:
            counts = [spikes.flatten(1).double().sum(1) for calls in record.spikes.values() for spikes in calls]
            theirs = torch.from_numpy(self.arrays["neuron_count"]).double()
            if theirs.dim() == 1:  # neurons of different lengths: sums over the steps
                counts, theirs = [count.sum()[None] for count in counts], theirs[:, None]
            difference = (torch.stack(counts) - theirs).abs().amax(1)
            wrong = [f"{n}: {d:g}" for n, d in zip(self.neurons, difference.tolist(), strict=True) if d]
            assert not wrong, f"spikes of a step that differ: {wrong}"
        if training:
            (out * torch.from_numpy(self.arrays["loss_weights"])).sum().backward()
            self._check_gradients(x)

    def _check_gradients(self, x: Tensor) -> None:
        pairs = [("grad_input", x.grad)]
        for name, (module, key) in self.names.items():
            pairs.append((f"grad/{name}", getattr(getattr(module, key), "grad", None)))
            pairs.append((f"after/{name}", getattr(module, key)))
        compared: list[str] = []
        for name, got in pairs:
            if name in self.arrays:
                expected = torch.from_numpy(self.arrays[name])
                assert got is not None, name
                bound = 1e-4 * expected.abs().max().item() + 1e-30
                assert (got.detach().view_as(expected) - expected).abs().max() <= bound, name
                compared.append(name)
        # The rest may be the same arrays under other names.
        for key in {key for key in self.arrays if key.startswith(("grad/", "after/", "grad_input"))} - {*compared}:
            assert any(np.array_equal(self.arrays[key], self.arrays[name]) for name in compared), key


def running_order(model: nn.Module, run: Callable[[], Any]) -> tuple[list[nn.Module], list[nn.Module]]:
    """Convolutions, linear layers and norms, and apart from them neurons, in the order in which `run` calls them."""
    layers: list[nn.Module] = []
    neurons: list[nn.Module] = []
    outputs: dict[nn.Module, Any] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        order = neurons if isinstance(module, Neuron) else layers
        if module in outputs:
            return
        source = next((i for i, layer in enumerate(layers) if outputs[layer] is args[0]), None)
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm)
        order.insert(len(order) if source is None or not norm else source + 1, module)
        outputs[module] = output

    kinds = nn.modules.conv._ConvNd | nn.Linear | nn.modules.batchnorm._BatchNorm | nn.LayerNorm | Neuron
    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, kinds)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return layers, neurons


def shared_folder() -> Path:
    return Path(os.environ.get("SPIKELOOM_SHARED", Path(__file__).parents[3] / "shared"))


def golden_folder(kind: str) -> Golden:
    """The golden vectors of "neurons" or "networks"; skips, loudly, where they are not installed."""
    folder = shared_folder() / "golden" / kind
    if not (folder / "manifest.csv").exists():
        pytest.skip(
            f"GOLDEN VECTORS MISSING: no {folder}/manifest.csv; agreement with the original authors' code is NOT "
            f"tested (set SPIKELOOM_SHARED to the folder that holds golden/{kind})"
        )
    return Golden(folder)


def golden_cases(*files: str) -> list[str]:
    """Ids of the golden neuron cases in some files; one id that skips, loudly, where they are not installed."""
    folder = shared_folder() / "golden" / "neurons"
    if not (folder / "manifest.csv").exists():
        return ["missing"]
    return [name for name, row in Golden(folder).rows.items() if row["file"].removesuffix(".npz") in files]
