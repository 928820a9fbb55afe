"""Every row of every recipe runs at the smallest budget, and fills the columns that its table publishes.

On two samples, of real files where they are at hand and of made ones elsewhere: nothing is learnt, everything is run.
"""

from __future__ import annotations

import fnmatch
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spikeloom.cli.progress import Quiet
from spikeloom.registry import list_recipes
from spikeloom.reproduce import reproduce
from spikeloom.train.recipe import load_recipe, merge

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = {name: load_recipe(name) for name in list_recipes()}
ROWS = [f"{name}#{row}" for name, recipe in RECIPES.items() for row in recipe.rows]
# Published columns that no row at this budget fills, by recipe and column, and why.
EMPTY = {
    ("*", "note"): "words of the paper",
    ("*", "params_M_printed"): "the paper's own table contradicts it: params_M of the layout is compared instead",
    ("paralif/speed", "acceleration_plain_lif_at_5000"): "the smallest budget measures shorter sequences",
    ("report/table3", "acc_train1"): "of the epoch that the paper selects: above 70 %, which no epoch here reaches",
    ("report/table3", "acc_train2"): "as acc_train1",
    ("report/table3", "acc_test"): "as acc_train1",
    ("ms/imagenet", "acc_288"): "pictures of this budget are of less than half that side",
    **{
        ("neurobench/mackey_glass", f"{column} of {other}"): "a network that the benchmark cites"
        for other in ("LSTM", "ESN")
        for column in ("sMAPE", "effective MACs", "activation sparsity")
        if (column, other) != ("activation sparsity", "ESN")
    },
}
# Rows that measure trained networks: the option that takes the folders of runs, and the rows whose runs they are.
OF_RUNS: dict[str, tuple[str, list[str]]] = {
    "ds_resnet/figure7#figure7": ("runs", ["ds_resnet/table1#s3t1a", "ds_resnet/table1#s3t1e"]),
    "sew/figure4#figure11": ("networks", ["quickstart/nmnist#sew_7b"]),
    "spikingformer/figures3_4#spikformer": ("run", ["spikformer/table2#spikformer_8_512"]),
    "spikingformer/figures3_4#spikingformer": ("run", ["spikingformer/table1#spikingformer_8_512"]),
}


def reason(name: str, column: str) -> str | None:
    """Why a column of a recipe stays empty; None if it is filled."""
    return next((why for (recipe, key), why in EMPTY.items() if key == column and fnmatch.fnmatch(name, recipe)), None)


def test_what_stays_empty_is_published() -> None:
    for recipe, column in EMPTY:
        tables = [table for name, table in RECIPES.items() if fnmatch.fnmatch(name, recipe)]
        assert any(column in row.published for table in tables for row in table.rows.values()), (recipe, column)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    """The folder of a row's runs, which goes with the test: checkpoints of all rows together are tens of gigabytes."""
    yield tmp_path / "runs"
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)


def reduced(name: str, data_of: Callable[[str], Path]) -> dict[str, Any]:
    """Settings that train a row on two samples."""
    table, _, row = name.partition("#")
    settings = RECIPES[table].resolve(row, "smoke")
    base, _, base_row = (settings.train.start_from or "").partition("#")
    if base in RECIPES:
        data_of(RECIPES[base].resolve(base_row, "smoke").data.name)
    root = str(data_of(settings.data.name))
    each = 2 if settings.train.penalty is None else 4  # both environments' in a batch
    overrides = {"data": {"root": root, "subset": each, "test_subset": 2}, "train": {"batch_size": each}}
    return merge(overrides, {"data": {"sensor": [128, 128]}} if row == "recordings" else {})


def run_of(name: str, runs: Path, results: Path, data_of: Callable[[str], Path]) -> str:
    """The folder of a row's run, trained now."""
    table, _, row = name.partition("#")
    before = reduced(name, data_of)
    reproduce(RECIPES[table], [row], "smoke", before, runs, results, Quiet(), lambda: False)
    [folder] = (runs / table.replace("/", "-")).glob(f"{row}-smoke-*")
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_row_fills_its_columns(name: str, runs: Path, tmp_path: Path, data_of: Callable[[str], Path]) -> None:
    table, _, row = name.partition("#")
    if name in OF_RUNS:
        option, rows = OF_RUNS[name]
        folders = [run_of(each, runs, tmp_path / "others", data_of) for each in rows]
        overrides: dict[str, Any] = {"measure": {option: folders[0] if option == "run" else folders}}
    else:
        overrides = {} if RECIPES[table].measures else reduced(name, data_of)
    [record] = reproduce(RECIPES[table], [row], "smoke", overrides, runs, tmp_path, Quiet(), lambda: False)
    [path] = (tmp_path / table).glob("*.json")
    assert json.loads(path.read_text()) == record
    measured = record["measured"]
    filled = {column for column in record["published"] if measured.get(column) is not None}
    assert all(math.isfinite(measured[column]) for column in filled if not isinstance(measured[column], str))
    expected = {column for column in record["published"] if reason(table, column) is None}
    assert expected - filled == set(), "a column is not filled"
    assert filled - expected == set(), "a column is filled: take it out of EMPTY"
