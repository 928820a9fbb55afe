"""The benchmarks measure what they say; their figures are not tested here."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.made_events import five_bytes, made

from spikeloom.analyse import read_figure
from spikeloom.bench import events, neurons, run, timing, write
from spikeloom.bench.timing import copies, medians, saved_bytes
from spikeloom.errors import UsageError
from spikeloom.neurons import LIF, NEURONS
from spikeloom.ops import backend
from spikeloom.surrogates import ATan


def test_every_neuron_is_measured() -> None:
    rows = list(neurons.rows([[3, 2, 8]], 5))
    assert [row["neuron"] for row in rows] == list(NEURONS)
    for row in rows:
        assert row["both_ms"] > 0
        assert row["saved_per_input_byte"] > 0
        assert row["shape"] == [3, 2, 8]


def test_images_leave_recurrent_layers_out() -> None:
    names = [row["neuron"] for row in neurons.rows([[2, 1, 3, 4, 4]], 5)]
    assert names == [name for name in NEURONS if not name.startswith("Recurrent")]


def test_lif_keeps_no_more_than_its_input() -> None:
    x = torch.randn(16, 4, 64, requires_grad=True)
    with backend("native"):
        assert saved_bytes(lambda: LIF()(x)) <= x.nbytes + 64
    with backend("reference"):
        assert saved_bytes(lambda: LIF()(x)) >= 2 * x.nbytes, "what is measured is what autograd keeps"


def test_plain_lif_is_the_fused_one() -> None:
    fused = NEURONS["SynapticLIF"](tau_mem=2e-3, tau_syn=1e-3, v_threshold=0.5)
    x = torch.rand(30, 1, 16)
    plain = neurons.plain_lif(x, float(fused.alpha), float(fused.beta), 0.5, ATan())
    assert torch.equal(plain, fused(x))
    assert plain.sum() > 10


def test_medians_take_turns_each_behind_its_own_run() -> None:
    order: list[str] = []
    found = medians({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 5)
    assert order == ["a", "b"] + ["a", "a", "b", "b"] * 5
    assert set(found) == {"a", "b"}


@pytest.mark.parametrize("T", [1, 4, 5])
def test_floor_moves_the_bytes_of_a_pass_that_saves_its_input(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []

    def fresh(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        made.append(torch.empty_like(x, dtype=dtype))
        return made[-1]

    monkeypatch.setattr(timing, "like", fresh)
    x, grad = torch.randn(T, 8), torch.randn(T, 8)
    copies(x, grad)()
    assert torch.equal(made[0], x)
    assert torch.equal(made[2], grad)
    # x, the output; the gradient, x again, x's gradient: five passes, of which a copy makes two.
    assert x.nbytes * 5 <= 2 * sum(part.nbytes for part in made) <= x.nbytes * 5 + x[0].nbytes


def test_memory_is_kept_where_glibc_is() -> None:
    code = "import sys; from spikeloom.memory import keep_memory; print(keep_memory())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc")


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neurons, "rows", lambda *_: iter([{"neuron": "LIF", "shape": [4, 1], "peer": None}]))
    monkeypatch.setattr(neurons, "filter_rows", lambda *_: iter([]))
    monkeypatch.setattr(neurons, "paralif_rows", lambda *_: iter([{"length": 1}]))
    monkeypatch.setattr(
        neurons, "psn_grid", lambda *_: iter([{"N": 4, "T": 2, "inference_ratio": 1.0, "training_ratio": 2.0}])
    )
    told: list[object] = []
    run.bench_neurons(tmp_path / "out", False, told.append)
    assert len(told) == 3
    saved = json.loads((tmp_path / "out" / "neurons.json").read_text())
    assert saved["environment"]["threads"] >= 1
    text = (tmp_path / "out" / "neurons.md").read_text()
    assert "| LIF | 4x1 |  |" in text
    assert len(read_figure(tmp_path / "out" / "figures" / "psn_speed.json").data) == 2


def test_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "made", lambda: made(2000, 20, 10))
    monkeypatch.setattr(events, "_AT_MOST", 2)
    for name, n in (("a/1.bin", 500), ("a/2.bin", 600), ("a/3.bin", 700), ("b/1.bin", 5)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(five_bytes(made(n, 34, 34)))
    tables = run.bench_events(tmp_path / "out", True, None, tmp_path)
    frames, reading = tables.values()
    # Recordings with fewer events than frames are left out of the cutting.
    assert [(row["recordings"], row["frames"], row["events"]) for row in frames] == [
        ("made, 128x128", "count", 2000),
        ("made, 128x128", "time", 2000),
        ("a", "count", 1100),
        ("a", "time", 1100),
    ]
    assert all(row["ours_Mev_per_s"] > 0 for row in frames)
    assert [(row["file"], row["events"]) for row in reading] == [("a/1.bin", 500), ("b/1.bin", 5)]
    assert "| a/1.bin | 500 |" in (tmp_path / "out" / "events.md").read_text()
    with pytest.raises(UsageError, match=r"no event files .* under .*out"):
        run.bench_events(tmp_path / "out", True, None, tmp_path / "out")


@pytest.mark.parametrize("rival", ["tonic", "spikingjelly"])
@pytest.mark.parametrize("frames", ["count", "time"])
def test_rivals_make_the_same_frames(rival: str, frames: str) -> None:
    """Otherwise their times could not be compared. tonic's parts by time overlap by an event at their ends."""
    pytest.importorskip(rival)
    e = made(997, 20, 10)
    found = events._contenders([e], frames)
    ours, theirs = np.asarray(found["ours"]()[0]), np.asarray(found[rival]()[0])
    assert theirs.shape == ours.shape
    if rival == "spikingjelly":
        assert np.array_equal(theirs, ours)
    else:
        assert np.abs(theirs - ours).sum() <= 40


def test_markdown_of_nothing() -> None:
    assert write.markdown([]) == "(empty)"


def test_results_of_earlier_measurements_stay(tmp_path: Path) -> None:
    assert write.earlier_results(tmp_path, "steps") == {}
    rows: list[write.Json] = [{"network": "a", "ms": 1}, {"network": "b", "ms": 2}]
    write.write_results(tmp_path, "steps", {"steps": rows})
    old = write.earlier_results(tmp_path, "steps")
    kernels = old["steps"][0]["kernels"]
    assert old == {"steps": [{"kernels": kernels, **row} for row in rows]}
    old["steps"].append({"kernels": "of another machine", "network": "a", "ms": 4})
    new = write.kept(old["steps"], [{"network": "a", "ms": 3}], "network")
    assert [(row["kernels"], row["network"], row["ms"]) for row in new] == [
        (kernels, "b", 2),
        ("of another machine", "a", 4),
        (kernels, "a", 3),
    ]
