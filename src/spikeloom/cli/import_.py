"""`spikeloom import`: weights that were trained elsewhere, as the folder of a run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from spikeloom.cli.arguments import AsJson, Settings, read_settings
from spikeloom.cli.progress import show_progress
from spikeloom.errors import UsageError


def import_(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Weights: safetensors, or a file of torch.save.")],
    name: Annotated[str, typer.Option("--model", metavar="NAME", help="The network: see spikeloom list models.")],
    folder: Annotated[Path, typer.Option("--out", metavar="PATH", help="The folder to write.")],
    words: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Make a run of weights from elsewhere: of SpikingJelly, or of any network whose layers come in the same order.

    \b
    spikeloom import sew34.pth --model sew_resnet34 --out runs/sew34 data=imagenet data.root=DATA model.T=4 neuron=IF
    spikeloom import net.safetensors --model report_vgg16 --out RUN data=cifar10 neuron=LIF neuron.tau=4

    Layers are matched by order and shape, and all must fit. A file of weights does not say which neurons it was trained
    with, for how many steps and on what: give data, and neuron and model.T unless they are the network's own. The
    accuracy on the test data is measured and tells whether they were right. No code of the file is run.

    Keys: data.*, model.*, neuron.*, seed and train.*, of which evaluations use batch_size, loss and precision.
    """
    values = read_settings(context, words, ("data", "model", "neuron", "seed", "train"))
    options = values.get("model", {})
    if not isinstance(options, dict) or "name" in options:
        raise UsageError(f"the model is {name}: give its options as model.KEY=VALUE")
    if "data" not in values:
        raise UsageError(
            "the data are missing: give data=NAME (see: spikeloom list datasets), which decides the classes"
        )
    values["model"] = {**options, "name": name}
    from spikeloom.train.imported import import_weights

    with show_progress() as progress:
        summary, match = import_weights(file, folder, values, progress)
    if as_json:
        print(json.dumps({"run": str(folder), **summary, "matched": match.matched}))
        return
    print(f"{name}: {len(match.matched)} tensors of {file}, {summary['parameters']:,} parameters")
    print(f"  neuron: {values.get('neuron', 'its own')}")
    print(f"  accuracy {summary['test_accuracy']:.2f} % on {summary['data']['test']}")
    print(f"  run:   {folder}")
    print(f"  next:  spikeloom audit {shlex.quote(str(folder))}")
