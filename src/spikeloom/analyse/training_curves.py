"""Figures of a training run: what its epochs measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_FEW = 40  # epochs up to which each gets a mark


def training_curves(records: list[Json], title: str) -> Any:
    """Accuracies of all parts over the epochs, and the penalty where there is one (course report, figures 5 and 6).

    Args:
        records: of a run's epochs, as in its `metrics.jsonl`.
        title: of the figure.

    Returns:
        A plotly figure; a penalty is on an axis of its own, on the right.
    """
    figure = metric_curves({"": records}, "accuracy", "accuracy, %")
    if "train_penalty" in records[0]:
        x, y = [r["epoch"] for r in records], [r["train_penalty"] for r in records]
        figure.add_scatter(x=x, y=y, name="penalty", yaxis="y2", mode="lines", line={"color": "#777777", "dash": "dot"})
        figure.update_layout(yaxis2={"title": "penalty, without its weight", "overlaying": "y", "side": "right"})
    figure.update_layout(title=title, template="plotly_white", yaxis_range=[0, 100])
    return figure


def metric_curves(runs: Mapping[str, list[Json]], what: str, axis: str) -> Any:
    """One measure of every part (train, test, environments) over the epochs of one or more runs.

    Args:
        runs: records of epochs, as in `metrics.jsonl`, by the name of the run.
        what: "accuracy", "loss" or "penalty": the end of the records' keys. Epochs without it are left out.
        axis: title of its axis.

    Returns:
        A plotly figure; a colour a part, or of several runs a colour a run and a dash a part.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    dashes = ("solid", "dot", "dash", "dashdot")
    for index, (run, records) in enumerate(runs.items()):
        keys = dict.fromkeys(key for record in records for key in record if key.endswith(f"_{what}"))
        # The test part first: it is what one looks for.
        for number, key in enumerate(sorted(keys, key=lambda key: not key.startswith("test"))):
            points = [(record["epoch"], record[key]) for record in records if record.get(key) is not None]
            if not points:
                continue
            part, several = key.removesuffix(f"_{what}"), len(runs) > 1
            figure.add_scatter(
                x=[epoch for epoch, _ in points],
                y=[value for _, value in points],
                name=f"{part}, {run}" if several else part,
                mode="lines+markers" if len(points) <= _FEW else "lines",
                line={
                    "color": COLORS[(index if several else number) % len(COLORS)],
                    "dash": dashes[number % len(dashes)] if several else "solid",
                },
            )
    longest = max((len(records) for records in runs.values()), default=0)
    figure.update_xaxes(title="epoch", dtick=1 if longest <= 10 else None)
    figure.update_yaxes(title=axis)
    return figure
