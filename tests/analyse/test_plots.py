"""Figures as data: what is recorded is what is drawn."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io
import pytest
import torch

from spikeloom import analyse
from spikeloom.analyse import draw_figures, figure_data, read_figure, training_curves, write_figure
from spikeloom.errors import UsageError
from spikeloom.neurons import LIF


def figure() -> go.Figure:
    drawn = go.Figure(
        [
            go.Scatter(x=[1, 2, 3, 4], y=[1 / 3, 2.0, math.nan, math.inf], name="a & b</script>"),
            go.Heatmap(z=np.eye(2)),
        ]
    )
    return drawn.update_layout(title="title", xaxis_title="steps", yaxis={"type": "log", "domain": (0, 0.5)})


def drawn(page: Path) -> list[dict[str, Any]]:
    """The series in a page, as plotly reads them."""
    [start] = [match.end() for match in re.finditer(r"Plotly\.newPlot\(\s*\"[-0-9a-f]+\",\s*", page.read_text())]
    return json.JSONDecoder().raw_decode(page.read_text(), start)[0]


def test_the_data_of_a_figure() -> None:
    found = figure_data(figure())
    scatter, heatmap = found["data"]
    assert scatter == {"type": "scatter", "x": [1, 2, 3, 4], "y": [0.333333, 2, None, None], "name": "a & b</script>"}
    assert heatmap == {"type": "heatmap", "z": [[1, 0], [0, 1]]}
    assert found["layout"] == {
        "title": {"text": "title"},
        "xaxis": {"title": {"text": "steps"}},
        "yaxis": {"type": "log", "domain": [0, 0.5]},
    }


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "figures" / "a.json"
    write_figure(path, figure())
    assert figure_data(read_figure(path)) == figure_data(figure())
    text = path.read_text()
    write_figure(path, read_figure(path))
    assert path.read_text() == text
    assert len(text.splitlines()) == 5, "a series is a line, so that a change of one is a change of a line"
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_a_page_has_the_series_of_the_data(tmp_path: Path) -> None:
    metrics = [{"epoch": n, "train_accuracy": 10.0 * n, "test_accuracy": 7.0 * n} for n in (1, 2, 3)]
    curves = training_curves(metrics, "a run")
    write_figure(tmp_path / "curves.json", curves)
    write_figure(tmp_path / "other.json", figure())
    pages = draw_figures([tmp_path / "curves.json", tmp_path / "other.json"], tmp_path / "new" / "out")
    assert pages == [tmp_path / "new" / "out" / "curves.html", tmp_path / "new" / "out" / "other.html"]
    assert drawn(pages[0]) == figure_data(curves)["data"]
    assert [series["y"] for series in drawn(pages[0])] == [[7, 14, 21], [10, 20, 30]]
    assert len(drawn(pages[1])) == 2
    # Stands for itself: the library is inside.
    assert pages[0].stat().st_size > 1_000_000
    assert "<script src=" not in pages[0].read_text()


def test_notebooks_show_rasters_maps_and_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plotly.io.renderers, "default", "plotly_mimetype")
    spikes, current = torch.rand(4, 3, 5, 5).round(), analyse.probe_current(40)
    answers = analyse.responses({"LIF": LIF()}, current)
    for drawn in (
        analyse.draw_raster(spikes > 0),
        analyse.draw_raster(torch.zeros(4, 1)),
        analyse.draw_spike_maps({"a": spikes, "b": spikes > 0}),
        analyse.draw_responses(current, answers),
        analyse.draw_attention_rates([]),
        training_curves([{"epoch": 1, "test_accuracy": 7.0}], "a run"),
    ):
        assert isinstance(drawn, go.Figure)
        assert list(drawn._repr_mimebundle_()) == ["application/vnd.plotly.v1+json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "is no recorded figure: it needs the keys data and layout"),
        ('{"data": []}', "is no recorded figure"),
        ('{"data": [{"type": "no such"}], "layout": {}}', "is no figure that plotly can draw"),
        ('{"data": 3, "layout": {}}', "is no figure that plotly can draw"),
        ('{"data": [], "layout": {"no_such": 3}}', "is no figure that plotly can draw"),
    ],
)
def test_damaged_data(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UsageError, match=f"a.json {message}") as info:
        draw_figures([tmp_path / "a.json"], tmp_path / "out")
    assert "\n" not in str(info.value)
    assert not (tmp_path / "out").exists()


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    write_figure(tmp_path / "a.json", figure())
    with pytest.raises(UsageError, match=r"cannot write .*a\.json.*; choose another folder"):
        draw_figures([tmp_path / "a.json"], tmp_path / "a.json" / "below")
    with pytest.raises(UsageError, match=r"cannot read .*none\.json"):
        read_figure(tmp_path / "none.json")
