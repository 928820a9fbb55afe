"""The benchmark of audits measures what it says; its figures are not tested here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spikeloom import cli
from spikeloom.bench import audit

TINY = (audit.Case("shd_net", (3, 2, 700), batches=2), audit.Case("ms_resnet20", (1, 3, 8, 8)))


def test_both_kinds_of_network() -> None:
    sequence, images = audit.rows(TINY, 5)
    assert (sequence["network"], sequence["batch"], sequence["layers"]) == ("shd_net", [3, 2, 700], 4)
    assert (images["network"], images["layers"]) == ("ms_resnet20", 22)
    for row in (sequence, images):
        assert row["audit_to_inference"] == pytest.approx(row["audit_ms"] / row["inference_ms"], rel=0.02)
        assert row["silent"] == 0, "looking at silence would be cheaper"


def test_every_contender_runs_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made, runs = audit._made, list[int]()

    def counted(case: audit.Case) -> tuple[nn.Module, Tensor]:
        model, x = made(case)
        model.register_forward_pre_hook(lambda *_: runs.append(torch._C._len_torch_dispatch_stack()))
        return model, x

    def once(contenders: dict[str, Callable[[], object]], *_: object, **__: object) -> dict[str, float]:
        for run in contenders.values():
            run()
        return dict.fromkeys(contenders, 2.0)

    monkeypatch.setattr(audit, "_made", counted)
    monkeypatch.setattr(audit, "medians", once)
    (row,) = audit.rows(TINY[:1], 5)
    # Dispatch modes during each run: an inference has none; the last is the audit that tells the layers.
    assert runs == [0, 0, 1, 1, 1, 1, 1, 1]
    assert row["inference_ms"] == 1, "of one batch"


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(audit, "SMALL", TINY[:1])
    monkeypatch.setattr(sys, "argv", ["spikeloom", "bench", "audit", "--quick", f"--out={tmp_path}"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 0
    *told, written = capsys.readouterr().out.splitlines()
    assert written == f"written: {tmp_path / 'audit.md'}"
    saved = json.loads((tmp_path / "audit.json").read_text())
    assert saved["audit and inference, ms a batch"] == [json.loads(row) for row in told]
    assert "| shd_net | 3x2x700 | 2 | 4 |" in (tmp_path / "audit.md").read_text()
