"""The page on the engine's file: its reader, which knows nothing of the engine, gives what the engine gives."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.random_plans import RandomPlan
from helpers.small_networks import lively, shortened

from spikeloom import create_model
from spikeloom.deploy import Engine, compile
from spikeloom.deploy.engine.ir import PlanError
from spikeloom.ops import _dispatch

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(_dispatch.native is None, reason="NO NATIVE KERNELS: the event engine is not tested"),
]

PAGE = Path(__file__).parents[3] / "docs" / "engine-file.md"


@pytest.fixture(scope="module")
def read() -> Callable[[Path, np.ndarray], np.ndarray]:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    known: dict[str, Any] = {}
    exec(code.split("import tempfile")[0], known)
    return known["run"]


def test_random_plans(read: Callable[[Path, np.ndarray], np.ndarray], tmp_path: Path) -> None:
    steps = Counter[str]()
    for seed in range(150):
        torch.manual_seed(seed)
        made = RandomPlan(random.Random(seed))
        T = 1 + seed % 3
        try:
            engine = Engine(made.plan(T), made.tensors).with_ways("event")
        except PlanError:
            continue
        x = made.example(T, 2)
        engine.save(tmp_path / "engine")
        np.testing.assert_allclose(
            read(tmp_path / "engine", x.numpy()), engine(x), rtol=1e-4, atol=1e-4, err_msg=f"{seed}"
        )
        steps.update(step.op for step in engine.steps)
    assert len(steps) >= 16, steps


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("ghostnet_dfc", {"T": 2}, marks=pytest.mark.slow),
        ("report_sew_resnet34", {"T": 2}),
        ("spikingformer_4_256", {"T": 2, "channels": 32, "heads": 2, "depth": 1}),
    ],
)
def test_networks(name: str, options: dict[str, Any], weights: Any, read: Any, tmp_path: Path) -> None:
    x = torch.rand(2, 3, 32, 32)
    model = shortened(create_model(name, **options), 1)
    engine = compile(lively(model, x), x, tune=False, weights=weights)
    engine.save(tmp_path / "engine")
    found, expected = read(tmp_path / "engine", x.numpy()), engine(x)
    assert expected.std() > 0
    # A sum within a rounding error of the threshold may fire in one of them alone.
    assert np.isclose(found, expected, rtol=1e-3, atol=1e-3).mean() > 0.9


def test_every_step_has_its_line() -> None:
    from spikeloom.deploy.engine import ir

    known = {
        op
        for kind in vars(ir).values()
        if isinstance(kind, type) and issubclass(kind, ir._Step) and "op" in kind.model_fields
        for op in kind.model_fields["op"].annotation.__args__  # pyright: ignore[reportOptionalMemberAccess]
    }
    assert len(known) >= 23
    lines = "".join(re.findall(r"^\| `.*\|$", PAGE.read_text(), re.MULTILINE))
    assert not [op for op in known if f"`{op}`" not in lines]
