"""`spikeloom audit`: what enters every layer of a network, and what it costs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Any

import typer

from spikeloom.cli.arguments import (
    AsJson,
    Batch,
    Images,
    Input,
    Settings,
    TargetName,
    check_output,
    read_target,
    running,
)
from spikeloom.cli.progress import show_progress
from spikeloom.cli.tables import print_audit
from spikeloom.errors import UsageError, cannot_write


def audit(
    context: typer.Context,
    target: TargetName,
    words: Settings = None,
    images: Images = None,
    batch: Batch = None,
    shape: Input = None,
    histograms: Annotated[
        Path | None,
        typer.Option("--histograms", metavar="PATH", help="Draw what enters q, k and v of a transformer's blocks."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what enters every layer of a network, whether it is spike-driven, and what it costs by each published rule.

    \b
    spikeloom audit RUN --images 1000 data.root=DATA
    spikeloom audit report_sew_resnet34 data.name=digits data.size=32 model.T=4
    spikeloom audit report_ms_resnet34 --input 3x32x32    # random inputs, untrained weights

    Keys: data.*; for a model also model.*, neuron.* and seed. Norms of an untrained model take the statistics of the
    first batch.
    """
    from spikeloom.analyse.audit.api import audit as audit_model
    from spikeloom.analyse.load import open_target
    from spikeloom.analyse.papers.attention_inputs import draw_block_inputs, watching_blocks

    values = read_target(context, words, images, batch, shape)
    check_output(histograms)
    opened = open_target(target, values)
    with show_progress() as progress, running(opened):
        progress.work("auditing", opened.images)
        model = opened.ready(next(opened.batches())[0])
        with watching_blocks(model) as blocks:
            if histograms is not None and not blocks:
                raise UsageError(f"--histograms is for transformers: {opened.title} has no spiking self-attention")
            found = audit_model(model, _ticking(opened.batches(), progress))
    if histograms is not None:
        page = draw_block_inputs(blocks, f"What enters q, k and v: {opened.title} on {opened.data}").to_html()
        try:
            histograms.write_text(page, encoding="utf-8")
        except OSError as error:
            raise cannot_write(histograms, error) from None
    if as_json:
        inputs = [{**dataclasses.asdict(block), "nonzero": block.nonzero} for block in blocks]
        print(json.dumps({"target": opened.title, "data": opened.data, **found.to_json(), "block_inputs": inputs}))
    else:
        print_audit(opened.title, opened.data, found, blocks)
        if histograms is not None:
            print(f"drawn: {histograms}")


def _ticking(batches: Any, progress: Any) -> Generator[Any]:
    for x, y in batches:
        yield x, y
        progress.advance(len(y))
