"""Benchmark results as files: JSON with the environment, a table in Markdown; and their plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spikeloom.analyse.training_curves import COLORS
from spikeloom.files import PathLike, make_folder, write_json
from spikeloom.train.machine import environment

Json = dict[str, Any]


def write_results(folder: PathLike, name: str, tables: dict[str, list[Json]]) -> None:
    """Writes `name`.json and `name`.md into a folder; errors as `files.make_folder`."""
    folder = Path(folder)
    make_folder(folder, "with --out")
    found = environment()
    write_json(folder / f"{name}.json", {"environment": found, **tables}, rows=True)
    machine = f"{found['processor']}, {found['threads']} threads, torch {found['torch']}, kernels {found['native']}"
    parts = [f"# {name}\n\nMeasured on {machine}. Medians, contenders in turn within one run.\n"]
    parts += [f"## {title}\n\n{markdown(rows)}\n" for title, rows in tables.items()]
    (folder / f"{name}.md").write_text("\n".join(parts))


def earlier_results(folder: PathLike, name: str) -> dict[str, list[Json]]:
    """The tables that `write_results` wrote before, rows with the kernels that ran; none where it did not."""
    file = Path(folder) / f"{name}.json"
    tables = json.loads(file.read_text()) if file.is_file() else {}
    kernels = tables.pop("environment", {}).get("native")
    return {title: [{"kernels": kernels, **row} for row in rows] for title, rows in tables.items()}


def kept(old: list[Json], new: list[Json], *keys: str) -> list[Json]:
    """Rows that were measured before, less those that have the kernels and the keys of a new one, and the new ones."""
    new = [{"kernels": environment()["native"], **row} for row in new]
    keys = ("kernels", *keys)
    made = {tuple(row[key] for key in keys) for row in new}
    return [row for row in old if tuple(row[key] for key in keys) not in made] + new


def markdown(rows: list[Json]) -> str:
    """Rows with the same keys as a table."""
    if not rows:
        return "(empty)"
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in rows:
        values = ("" if row.get(key) is None else row[key] for key in keys)
        lines.append("| " + " | ".join("x".join(map(str, v)) if isinstance(v, list) else str(v) for v in values) + " |")
    return "\n".join(lines)


def plot_psn_grid(rows: list[Json]) -> Any:
    """The ratio of a serial LIF's time to a PSN's over N and T, two panels."""
    return _panels(
        rows,
        "T",
        "N",
        "inference",
        "training",
        "neurons",
        "time of LIF / time of PSN",
        "A fused serial LIF against PSN, both Spikeloom's",
    )


def plot_ratios(rows: list[Json]) -> Any:
    """The ratio of a network's time with LIF to its time with each parallel unit over T, two panels."""
    return _panels(
        [row for row in rows if row["neuron"] != "LIF"],
        "neuron",
        "T",
        "train",
        "test",
        "steps T",
        "time with LIF / time with the unit",
        "One network with a fused serial LIF, and with parallel units",
    )


def _panels(rows: list[Json], line: str, x: str, left: str, right: str, x_title: str, y_title: str, title: str) -> Any:
    """Two panels of ratios `<panel>_ratio` over x, one line for each value of `line`."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, subplot_titles=[left, right], shared_yaxes=True)
    for column, panel in enumerate((left, right), 1):
        for index, value in enumerate(dict.fromkeys(row[line] for row in rows)):
            points = [row for row in rows if row[line] == value]
            figure.add_trace(
                go.Scatter(
                    x=[row[x] for row in points],
                    y=[row[f"{panel}_ratio"] for row in points],
                    name=f"{line} = {value}" if line == "T" else str(value),
                    legendgroup=str(value),
                    showlegend=column == 1,
                    mode="lines+markers",
                    line={"color": COLORS[index % len(COLORS)]},
                ),
                row=1,
                col=column,
            )
    figure.update_xaxes(type="log", title=x_title, tickvals=sorted({row[x] for row in rows}))
    figure.update_yaxes(title=y_title, rangemode="tozero", row=1, col=1)
    figure.add_hline(1, line_dash="dot")
    figure.update_layout(title=title, template="plotly_white")
    return figure


def plot_paralif(rows: list[Json]) -> Any:
    """Times of ParaLIF and of serial LIF over the number of steps, both axes logarithmic."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for key, name in (
        ("plain_lif", "serial LIF, plain PyTorch"),
        ("fused_lif", "serial LIF, fused"),
        ("paralif", "ParaLIF-T"),
    ):
        figure.add_trace(
            go.Scatter(
                x=[row["length"] for row in rows], y=[row[f"{key}_ms"] for row in rows], name=name, mode="lines+markers"
            )
        )
    figure.update_xaxes(type="log", title="steps")
    figure.update_yaxes(type="log", title="ms, forward and backward")
    figure.update_layout(title="128 neurons, batch 1", template="plotly_white")
    return figure
