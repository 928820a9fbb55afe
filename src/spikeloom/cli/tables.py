"""The tables that commands print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from spikeloom.analyse import Audit, BlockInput
    from spikeloom.data.check import DataCheck
    from spikeloom.scores import Score

Json = dict[str, Any]


def print_names(lines: Mapping[str, str], as_json: bool) -> None:
    """Names in a column, a line about each beside it."""
    if as_json:
        print(json.dumps(lines))
        return
    width = max(map(len, lines), default=0)
    for name, line in lines.items():
        print(f"{name:{width}}  {line}")


def print_drawn(pages: list[Path], as_json: bool) -> None:
    """The pages of figures, a line each."""
    if as_json:
        print(json.dumps({"drawn": [str(page) for page in pages]}))
        return
    for page in pages:
        print(f"drawn: {page}")


def print_data_check(found: DataCheck, picture: Path | None) -> None:
    """The files of a data set, its parts, and what follows from them."""
    from rich.table import Table

    console = _console()
    console.print(found.title + (f" in {found.folder}" if found.folder else ""), markup=False, highlight=False)
    whole = [files for files in found.files if all(files.values())]
    for number, files in enumerate(whole[:1] or found.files):
        if number:
            console.print("  or")
        for path, there in files.items():
            mark = "found  " if there else "missing"
            console.print(f"  {mark}  {path}", markup=False, highlight=False, style=None if there else "red")
    if found.parts:
        table = Table()
        for column in ("part", "samples", "published", "classes", "a sample", "values"):
            numbers = column in ("samples", "published", "classes")
            table.add_column(column, justify="right" if numbers else "left", overflow="fold")
        for split, part in found.parts.items():
            table.add_row(
                split,
                f"{part.samples:,}",
                "" if part.published is None else f"{part.published:,}",
                f"{part.classes} of {found.classes}",
                f"{part.dtype} {'x'.join(map(str, part.shape))}",
                f"{part.low:.3g} to {part.high:.3g}",
            )
        console.print(table)
    if picture is not None and found.picture is not None:
        print(f"drawn: {picture}, a sample of {next(iter(found.parts.values())).label!r}")
    if found.usable:
        rest = found.incomplete()
        print(f"usable, another size than published: {', '.join(rest)}" if rest else "usable")


def _console() -> Console:
    """As wide as the terminal; without one as wide as its lines, so that a name stays whole in a file or a pipe."""
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else 1000)


def _absence(record: Json) -> str:
    """What stands for the numbers of a row that has none."""
    return "no data" if "missing" in record else "failed"


# What some tables publish beside size and accuracy.
_COLUMNS = {
    "acc5": "top-5 %",
    "energy_uJ": "energy uJ",
    "energy_mJ": "energy mJ",
    "ops_G": "operations G",
    "memory_GB": "memory GB",
    "sec_per_epoch": "s an epoch",
    "hours": "hours",
    "rate": "rate",
    "spikes_per_neuron": "spikes a neuron",
    "acc_288": "at 288x288 %",
    "attention_ops_M": "attention M",
    "attention_energy_uJ": "attention uJ",
    "shortcut_rates": "rates of shortcuts",
}


def print_table(title: str, paper: str, budget: str, records: list[Json]) -> None:
    from rich.table import Table

    table = Table(title=f"{title} (budget: {budget})", caption=f"{paper}. Published, then measured.")
    others = [key for key in _COLUMNS if any(record["published"].get(key) is not None for record in records)]
    columns = ("row", "system", "params M", "FLOPs M", "MACs M", "accuracy %")
    for column in (*columns, *(_COLUMNS[key] for key in others), "data", "time"):
        table.add_column(column, justify="left" if column in ("row", "system", "data") else "right", overflow="fold")

    def pair(record: Json, key: str, digits: int) -> str:
        published, measured = record["published"].get(key), record.get("measured", {}).get(key)
        shown = "-" if measured is None else measured if isinstance(measured, str) else f"{measured:.{digits}f}"
        return f"{'-' if published is None else published}\n{shown}"

    for record in records:
        measured = "measured" in record
        table.add_row(
            record["row"],
            record["system"],
            pair(record, "params_M", 3),
            pair(record, "flops_M", 2),
            pair({**record, "published": {"macs_M": ""}}, "macs_M", 2),
            pair(record, "acc", 2),
            *(pair(record, key, 3 if key == "rate" else 2) for key in others),
            record["data"]["train"] if measured else _absence(record),
            f"\n{record['seconds']:.0f} s" if measured else "",
        )
    _console().print(table)


def print_measured(title: str, paper: str, budget: str, records: list[Json]) -> None:
    from rich.table import Table

    console = _console()
    table = Table(title=f"{title} (budget: {budget})", caption=paper)
    for column in ("row", "system", "quantity", "published", "measured"):
        table.add_column(column, overflow="fold")

    def shown(value: Any) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    for record in records:
        if "measured" not in record:
            table.add_row(record["row"], record["system"], _absence(record))
            continue
        names = dict.fromkeys([*record["published"], *record["measured"]])
        for index, name in enumerate(names):
            first = (record["row"], record["system"]) if index == 0 else ("", "")
            table.add_row(*first, name, shown(record["published"].get(name)), shown(record["measured"].get(name)))
    console.print(table)
    for record in records:
        for figure in record.get("figures", ()):
            console.print(f"figure: {figure}", markup=False)


def print_scores(scores: list[Score]) -> None:
    from rich.table import Table

    table = Table(title="published accuracies, and the best that was measured here, in percent")
    for column in ("row", "system", "published", "measured", "budget", "of the training", "state"):
        numbers = column in ("published", "measured", "of the training")
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for score in scores:
        row, published = f"{score.table}#{score.row}", f"{score.published:g}"
        if score.measured is None:
            table.add_row(row, score.system, published, "", "", "", score.state)
            continue
        measured, share = f"{score.measured:.2f} ± {score.error:.2f}", f"{100 * score.share:.3g} %"
        table.add_row(row, score.system, published, measured, score.budget, share, score.state)
    _console().print(table)


def print_sweep(title: str, records: list[Json]) -> None:
    """The combinations of a sweep, best first."""
    from rich.table import Table

    table = Table(title=title)
    settings = list(records[0]["settings"])
    found = [key for key in ("validation_accuracy", "accuracy", "loss") if any(key in record for record in records)]
    for column in (*settings, *(key.replace("_", " ") for key in found), "deviation", "runs", "s a run"):
        table.add_column(column, justify="left" if column in settings else "right", overflow="fold")

    def shown(record: Json, key: str, digits: int) -> str:
        return "" if record.get(key) is None else f"{record[key]:.{digits}f}"

    for record in records:
        failed = f", {record['failed']} failed" if record["failed"] else ""
        table.add_row(
            *record["settings"].values(),
            *(shown(record, key, 4 if key == "loss" else 2) for key in found),
            shown(record, "deviation", 2),
            f"{record['runs']}{failed}",
            shown(record, "seconds", 0),
        )
    _console().print(table)


def print_comparison(records: list[Json]) -> None:
    """Runs, a line each, with the settings in which they differ."""
    from rich.table import Table

    table = Table()
    for column in records[0]:
        numbers = column in ("accuracy", "validation", "epochs", "seconds", "parameters")
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for record in records:
        table.add_row(*("" if value is None else str(value) for value in record.values()))
    _console().print(table)


def print_audit(title: str, data: str, found: Audit, blocks: list[BlockInput]) -> None:
    from rich.table import Table

    console = _console()
    table = Table(title=f"{title}: what enters each layer, for one image of {found.steps:g} steps")
    for column in ("layer", "input", "max", "rate %", "MACs M", "ACs M", "uJ", "dead"):
        table.add_column(column, justify="left" if column in ("layer", "input") else "right", overflow="fold")
    for row in found.rows:
        table.add_row(
            row.name,
            row.input,
            f"{row.max:.3g}",
            f"{100 * row.rate:.2f}",
            f"{row.macs / 1e6:.3f}",
            f"{row.acs / 1e6:.3f}",
            f"{row.energy_pj / 1e6:.3f}",
            f"{row.dead}/{row.channels}" if row.channels else "",
            style="red" if row.breaks else None,
        )
    console.print(table)
    if blocks:
        console.print(_block_table(blocks))
    energies = Table(title="energy of one image, by rule")
    for column in ("rule", "MACs M", "ACs M", "uJ"):
        energies.add_column(column, justify="left" if column == "rule" else "right")
    for name, energy in found.energies().items():
        energies.add_row(name, f"{energy.macs / 1e6:.3f}", f"{energy.acs / 1e6:.3f}", f"{energy.pj / 1e6:.3f}")
    console.print(energies)
    console.print(f"measured on {data}; {found.parameters:,} parameters", markup=False)
    for line in found.verdict():
        console.print(line, markup=False)


def _block_table(blocks: list[BlockInput]) -> Any:
    """The histogram of every block, in per cent of its values."""
    from rich.table import Table

    table = Table(title="what enters q, k and v of each block: % of values")
    shown = min(max(len(block.counts) for block in blocks), 10)
    rest = any(len(block.counts) > shown or block.others for block in blocks)
    for column in ("block", "not 0", *map(str, range(shown)), *(["other"] if rest else [])):
        table.add_column(column, justify="left" if column == "block" else "right", overflow="fold")
    for block in blocks:
        counts = block.counts + [0] * (shown - len(block.counts))
        parts = [block.total - counts[0], *counts[:shown], *([block.total - sum(counts[:shown])] if rest else [])]
        table.add_row(block.name, *(f"{100 * part / max(1, block.total):.2f}" for part in parts))
    return table
