"""`spikeloom audit`: what enters every layer of a network, and what it costs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Any

import typer

from spikeloom.cli.arguments import AsJson, running
from spikeloom.cli.progress import show_progress
from spikeloom.cli.tables import print_audit
from spikeloom.errors import UsageError


def audit(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="The folder of a run, or a model's name.")],
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what enters every layer of a network, whether it is spike-driven, and what it costs by each published rule.

    \b
    spikeloom audit RUN images=1000 data.root=DATA
    spikeloom audit report_sew_resnet34 data.name=digits data.size=32 model.T=4
    spikeloom audit report_ms_resnet34 input=3x32x32      # random inputs, untrained weights

    Keys: images (of the test data), batch, data.*; histograms (an HTML file, where to draw what enters q, k and v of
    a transformer's blocks); for a model also model.*, neuron.*, seed and input. Norms of an untrained model take the
    statistics of the first batch.
    """
    from spikeloom.analyse.audit import audit as audit_model
    from spikeloom.analyse.block_inputs import draw_block_inputs, watching_blocks
    from spikeloom.analyse.target import open_target
    from spikeloom.train.recipe import parse_overrides

    values = parse_overrides(words or [])
    drawing = values.pop("histograms", None)
    opened = open_target(target, values)
    with show_progress(as_json) as progress, running(opened):
        progress.work("auditing", opened.images)
        model = opened.ready(next(opened.batches())[0])
        with watching_blocks(model) as blocks:
            if drawing is not None and not blocks:
                raise UsageError(f"histograms= is for transformers: {opened.title} has no spiking self-attention")
            found = audit_model(model, _ticking(opened.batches(), progress))
    if drawing is not None:
        page = draw_block_inputs(blocks, f"What enters q, k and v: {opened.title} on {opened.data}").to_html()
        try:
            Path(str(drawing)).write_text(page, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"histograms={drawing} cannot be written: {error.strerror}") from None
    if as_json:
        inputs = [{**dataclasses.asdict(block), "nonzero": block.nonzero} for block in blocks]
        print(json.dumps({"target": opened.title, "data": opened.data, **found.to_json(), "block_inputs": inputs}))
    else:
        print_audit(opened.title, opened.data, found, blocks)
        if drawing is not None:
            print(f"drawn: {drawing}")


def _ticking(batches: Any, progress: Any) -> Generator[Any]:
    for x, y in batches:
        yield x, y
        progress.advance(len(y))
