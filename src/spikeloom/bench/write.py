"""Benchmark results as files: JSON with the environment, a table in Markdown, a plot in HTML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spikeloom.errors import UsageError
from spikeloom.train.checkpoint import write_json
from spikeloom.train.run import environment

Json = dict[str, Any]


def write_results(folder: Path, name: str, tables: dict[str, list[Json]]) -> None:
    """Writes `name`.json and `name`.md into a folder.

    Raises:
        UsageError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror or error}; choose another with out=PATH") from None
    found = environment()
    write_json(folder / f"{name}.json", {"environment": found, **tables})
    machine = f"{found['processor']}, {found['threads']} threads, torch {found['torch']}, kernels {found['native']}"
    parts = [f"# {name}\n\nMeasured on {machine}. Medians, contenders in turn within one run.\n"]
    parts += [f"## {title}\n\n{markdown(rows)}\n" for title, rows in tables.items()]
    (folder / f"{name}.md").write_text("\n".join(parts))


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


def plot_psn_grid(rows: list[Json], path: Path) -> None:
    """The ratio of a serial LIF's time to a PSN's over N and T, two panels."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, subplot_titles=["inference", "training"])
    for column, key in enumerate(("inference_ratio", "training_ratio"), 1):
        for T in sorted({row["T"] for row in rows}):
            line = [row for row in rows if row["T"] == T]
            figure.add_trace(
                go.Scatter(
                    x=[row["N"] for row in line], y=[row[key] for row in line], name=f"T = {T}", legendgroup=str(T),
                    showlegend=column == 1, mode="lines+markers",
                ),
                row=1, col=column,
            )  # fmt: skip
    figure.update_xaxes(type="log", title="neurons")
    figure.update_yaxes(title="time of LIF / time of PSN", rangemode="tozero")
    figure.add_hline(1, line_dash="dot")
    figure.update_layout(title="A fused serial LIF against PSN, both Spikeloom's", template="plotly_white")
    figure.write_html(str(path), include_plotlyjs=True)
