"""The benchmark of training methods measures what it says, and its rival is the same network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from spikeloom import cli
from spikeloom.analyse import read_figure
from spikeloom.bench import methods
from spikeloom.bench.run import bench_methods
from spikeloom.errors import UsageError
from spikeloom.models import create_model


def test_peak_resident_memory_sees_an_allocation() -> None:
    before = methods._memory("VmHWM")
    size = before + 50_000_000  # more than has been resident so far
    block = torch.ones(size // 4)
    assert methods._memory("VmHWM") > before + 40_000_000
    del block
    assert methods._memory("VmHWM") > before + 40_000_000


def test_the_rival_is_the_same_network() -> None:
    pytest.importorskip("spikingjelly", reason="SPIKINGJELLY MISSING: the rival of bench methods is NOT compared")
    torch.manual_seed(2)
    ours = create_model("report_sew_resnet34", T=3)
    theirs = methods.rival(create_model("report_sew_resnet34", T=3))
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(2, 3, 32, 32)
    agreement = (ours(x) - theirs(x)).abs().max()
    assert agreement < 1e-3
    modules = {type(module).__module__.split(".")[0] for module in theirs.modules() if list(module.parameters(False))}
    assert modules == {"spikingjelly"}


def test_spread() -> None:
    rows = [{"contender": c, "peak_MB": p} for c, p in (("sltt", 200.0), ("bptt", 999.0), ("sltt", 206.0))]
    assert methods.spread(rows, "sltt") == pytest.approx(3)


def test_a_network_that_cannot_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "CONTENDERS", ("sltt",))  # each is measured in processes of its own
    with pytest.raises(UsageError, match=r"sltt with psn_cifar_net at T = 4 cannot be measured: .* can step"):
        list(methods.rows("psn_cifar_net", (4,), 1, 1))


@pytest.mark.slow
def test_peak_memory_of_sltt_is_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 3 % from T = 2 to T = 32, where that of BPTT grows."""
    monkeypatch.setattr(methods, "CONTENDERS", ("bptt", "sltt"))
    found = list(methods.rows("report_sew_resnet34", (2, 32), 16, 1))
    assert methods.spread(found, "sltt") < 3
    assert methods.spread(found, "bptt") > 100


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def rows(model: str, *rest: object) -> list[dict[str, object]]:
        return [
            {"model": model, "contender": c, "T": T, "batch": 4, "ms": 1.0, "peak_MB": 100.0 + T}
            for T in (2, 8)
            for c in methods.CONTENDERS
        ]

    monkeypatch.setattr(methods, "rows", rows)
    told: list[object] = []
    tables = bench_methods(tmp_path, True, told.append, "anything")
    assert len(told) == 6
    spreads = [{"contender": c, "spread_percent": 5.88} for c in methods.CONTENDERS]
    assert tables["highest over lowest peak memory"] == spreads
    assert json.loads((tmp_path / "methods-anything.json").read_text())["highest over lowest peak memory"] == spreads
    plot = read_figure(tmp_path / "figures" / "methods-anything.json")
    assert plot.layout.annotations[1].text == "peak resident memory, MB"
    assert plot.data[-1].y == (102, 108)
    monkeypatch.setattr(sys, "argv", ["spikeloom", "bench", "methods", f"--out={tmp_path}", "--model=sew_resnet18"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 0
    assert f"written: {tmp_path / 'methods-sew_resnet18.md'}" in capsys.readouterr().out
