"""Figures of a training run: what its epochs measured."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def training_curves(records: list[Json], title: str) -> Any:
    """Accuracies of all parts over the epochs, and the penalty where there is one (document 000, figures 5 and 6).

    Args:
        records: of a run's epochs, as in its `metrics.jsonl`.
        title: of the figure.

    Returns:
        A plotly figure; a penalty is on an axis of its own, on the right.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    epochs = [record["epoch"] for record in records]
    parts = [key for key in records[0] if key.endswith("_accuracy")]
    colors = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
    for index, key in enumerate(parts):
        figure.add_trace(
            go.Scatter(
                x=epochs, y=[record[key] for record in records], name=key.removesuffix("_accuracy"),
                mode="lines", line={"color": colors[index % len(colors)]},
            )
        )  # fmt: skip
    if "train_penalty" in records[0]:
        values = [record["train_penalty"] for record in records]
        line = {"color": "#000000", "dash": "dot"}
        figure.add_trace(go.Scatter(x=epochs, y=values, name="penalty", yaxis="y2", mode="lines", line=line))
        figure.update_layout(yaxis2={"title": "penalty, without its weight", "overlaying": "y", "side": "right"})
    figure.update_xaxes(title="epoch")
    figure.update_layout(title=title, template="plotly_white", yaxis={"title": "accuracy, %", "range": [0, 100]})
    return figure
