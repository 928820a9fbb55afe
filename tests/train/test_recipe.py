"""Recipes: all in the package are whole and can be trained; a wrong key is one line that names it."""

from __future__ import annotations

import csv
import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden_vectors import shared_folder

from spikeloom.analyse import MEASUREMENTS
from spikeloom.cli.progress import Quiet
from spikeloom.data import DATASETS
from spikeloom.data.transforms import TRANSFORMS
from spikeloom.errors import UsageError
from spikeloom.files import load_tensors
from spikeloom.models import MODELS
from spikeloom.neurons import NEURONS, make_factory
from spikeloom.registry import list_recipes
from spikeloom.reproduce import reproduce
from spikeloom.surrogates import SURROGATES
from spikeloom.train.build import build_datasets, build_model
from spikeloom.train.environments import PENALTIES
from spikeloom.train.losses import LOSSES
from spikeloom.train.methods import METHODS
from spikeloom.train.recipe import (
    BUDGETS,
    Budget,
    Recipe,
    check_settings,
    load_recipe,
    merge,
    parse_overrides,
)
from spikeloom.train.run import Run
from spikeloom.train.settings import Named, Settings, TrainSettings

SHARED = shared_folder()
RECIPES = {name: load_recipe(name) for name in list_recipes()}
TRAINED = [name for name, recipe in RECIPES.items() if not recipe.measures]
ROWS = [(name, row) for name in TRAINED for row in RECIPES[name].rows]
# Channels and classes of the data sets, to build models without files.
SHAPES = {
    "digits": (1, 10),
    "mnist": (1, 10),
    "sequential_mnist": (1, 10),
    "cifar10": (3, 10),
    "sequential_cifar10": (3, 10),
    "cifar100": (3, 100),
    "sequential_cifar100": (3, 100),
    "fsdd": (80, 10),
    "imagenet": (3, 1000),
    "nmnist": (2, 10),
    "cifar10_dvs": (2, 10),
    "dvs_gesture": (2, 11),
    "n_caltech101": (2, 101),
    "shd": (700, 20),
    "n_tidigits": (64, 11),
    "colored_mnist": (3, 2),
    "folder": (3, 2),
    "recordings": (2, 2),
    "audio": (80, 2),
    "arrays": (3, 2),
}


pytestmark = pytest.mark.usefixtures("one_thread")


# --- the recipes of the package ---------------------------------------------------------------------------------------


def test_every_data_set_has_its_shape_here() -> None:
    assert set(SHAPES) == set(DATASETS)


def test_the_promised_recipes_are_there() -> None:
    names = list_recipes()
    assert names == sorted(set(names))
    assert {"quickstart/digits", "quickstart/mnist", "report/table1", "report/table2"} <= set(names)


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_is_whole(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert {"smoke", "short", "full"} <= set(recipe.budgets)
    assert recipe.title
    assert recipe.paper
    assert recipe.command.startswith("spikeloom ")
    assert name in recipe.command or name == "quickstart/digits"  # the recipe of `spikeloom train` alone
    for row in recipe.rows.values():
        assert row.system


def budgets_of(recipe: Recipe, row: str) -> list[Budget]:
    """The budgets of a row, from the smallest: not every recipe says how to spend hours on it."""
    return [b for b in BUDGETS if b in recipe.budgets or b in recipe.rows[row].budgets]


def test_a_budget_that_a_recipe_does_not_have() -> None:
    with pytest.raises(UsageError, match="quickstart/digits#main has no budget 'hours'; it has smoke, short, full"):
        load_recipe("quickstart/digits").resolve("main", "hours")


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_every_row_resolves_and_builds(name: str, row: str) -> None:
    recipe = RECIPES[name]
    models = []
    for budget in budgets_of(recipe, row):
        settings = recipe.resolve(row, budget)
        assert settings.model_dump() == recipe.resolve(row, budget).model_dump()
        models.append(size_of(settings))
    # A budget trains less, not another network.
    assert len(set(models)) == 1
    published = recipe.rows[row].published
    if "params_M" in published:
        decimals = len(str(published["params_M"]).partition(".")[2])
        assert models[0] / 1e6 == pytest.approx(float(published["params_M"]), abs=max(0.01, 0.5 / 10**decimals))


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_budgets_grow(name: str, row: str) -> None:
    recipe = RECIPES[name]
    epochs = [recipe.resolve(row, budget).train.epochs for budget in budgets_of(recipe, row)]
    assert epochs == sorted(epochs)
    assert recipe.resolve(row).model_dump() == recipe.resolve(row, recipe.budget).model_dump()


def shape_of(settings: Settings) -> tuple[int, int]:
    """Channels and classes of the data of some settings."""
    (channels, classes), options = SHAPES[settings.data.name], settings.data.options
    if options.get("flatten"):
        side = options.get("size", 34)
        channels = (1 if "polarity" in options else channels) * side * side
    return channels, classes - (options.get("other") is False)


SIZES: dict[str, int] = {}


def size_of(settings: Settings) -> int:
    """The number of parameters of a model, which is not drawn; of the same model once, as budgets and rows share it."""
    shape = shape_of(settings)
    key = f"{settings.model.model_dump_json()} {settings.neuron and settings.neuron.model_dump_json()} {shape}"
    if key not in SIZES:
        with torch.device("meta"):
            model = build_model(settings, *shape)
        assert all(parameter.is_meta for parameter in model.parameters())
        SIZES[key] = sum(parameter.numel() for parameter in model.parameters())
    return SIZES[key]


# What stands in no recipe by name, and why.
NOT_NAMED = {
    "LeakyIntegrator": "the readout of the networks of ParaLIF",
    "bptt": "the method of every recipe that names none",
    "FastSigmoid": "the surrogate of ParaLIF where none is named",
    "FlatATan": "the last neuron of spiking_resnet* with flat_end",
    "PiecewiseLinear": "the general form of Triangle",
    "DelayedResetLIF": "snnTorch's neuron, for networks that come from there",
    **dict.fromkeys(("spiking_vgg11", "spiking_vgg13", "spiking_vgg16", "spiking_vgg19"), "for SpikingJelly's weights"),
    **dict.fromkeys(("ce_count", "mse_count"), "snnTorch's losses of spike counts: no paper here uses them"),
    "energy": "takes a run's folder",
}


def test_everything_in_the_registries_stands_in_a_recipe() -> None:
    named: set[str] = set()

    def collect(value: object) -> None:
        if isinstance(value, dict):
            for each in value.values():
                collect(each)
        elif isinstance(value, list):
            for each in value:
                collect(each)
        elif isinstance(value, str):
            named.add(value)

    for name in list_recipes():
        recipe = load_recipe(name)
        for row in recipe.rows:
            for budget in budgets_of(recipe, row):
                resolve = recipe.resolve_measure if recipe.measures else recipe.resolve
                collect(resolve(row, budget).model_dump())
    registries = (MODELS, DATASETS, NEURONS, SURROGATES, TRANSFORMS, LOSSES, METHODS, PENALTIES, MEASUREMENTS)
    missing = {name for registry in registries for name in registry} - named - set(NOT_NAMED)
    assert not missing
    assert set(NOT_NAMED) <= {name for registry in registries for name in registry}


LONG = {  # rows of many seconds
    "psn/cifar10_dvs",
    "psu/cifar10_dvs",
    "quickstart/n_caltech101",
    "spikformer_v2/imagenet_pretrain",
    "syna/gesture",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in TRAINED]
)
def test_the_smallest_row_is_reproduced(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_of: Callable[[str], Path]
) -> None:
    monkeypatch.delenv("SPIKELOOM_DATA", raising=False)
    recipe = load_recipe(name)
    row = min(recipe.rows, key=lambda row: size_of(recipe.resolve(row, "smoke")))
    reduced: dict[str, Any] = {
        "data": {"subset": 8, "test_subset": 4},
        "train": {"batch_size": 4, "epochs": 1, "start_from": None},
    }
    planned = recipe.resolve(row, "smoke")
    reduced["data"]["root"] = str(data_of(planned.data.name))
    if isinstance(planned.data.options.get("resize"), int) and planned.data.name != "imagenet":
        reduced["data"]["resize"] = 32
    options = inspect.signature(MODELS[planned.model.name]).parameters
    # As far as there is a choice.
    smaller = {"depth": 1, "channels": 32, "heads": 4, "T": min(2, planned.model.options.get("T", 2))}
    own = {"T"} if "T" in planned.data.options or (planned.neuron and "T" in planned.neuron.options) else set()
    reduced["model"] = {key: value for key, value in smaller.items() if key in options and key not in own}
    settings = recipe.resolve(row, "smoke", reduced)
    classes = len(build_datasets(settings)[0].classes)  # made pictures of ImageNet are of a hundred
    before = build_model(settings, shape_of(settings)[0], classes).state_dict()
    places = (tmp_path / "runs", tmp_path / "results")
    [result] = reproduce(recipe, [row], "smoke", reduced, *places, Quiet(), lambda: False)
    assert result["epochs"] == 1
    assert result["parameters"] == size_of(settings) or classes != shape_of(settings)[1]
    accuracy = result["measured"]["acc"]
    reconstructs = settings.model.name == "masked_autoencoder"
    assert (accuracy is None) if reconstructs else (0 <= accuracy <= 100)
    [folder] = (tmp_path / "runs").glob("*/*")
    run = Run.open(folder)
    [record] = run.metrics()
    assert all(math.isfinite(value) for value in record.values() if value is not None)
    after, _ = load_tensors(run.weights)
    assert list(after) == sorted(before)
    assert any(not torch.equal(after[key], before[key]) for key in before if key.endswith("weight"))


def published_tables(*blocks: str) -> dict[str, dict[str, str]]:
    """Rows of blocks of the tables that were read from the documents; skips where they are not there."""
    path = SHARED / "spec" / "tables.md"
    if not path.is_file():
        pytest.skip(
            f"TABLES MISSING: no {path}; published numbers of the recipes are NOT checked "
            "(set SPIKELOOM_SHARED to the folder that holds spec/tables.md)"
        )
    lines: dict[str, dict[str, str]] = {}
    for block in blocks:
        text = path.read_text().split(f"## {block}.", 1)[1].split("```csv\n", 1)[1].split("```", 1)[0]
        lines |= {line["id"]: line for line in csv.DictReader(text.splitlines())}
    return lines


@pytest.mark.parametrize(
    ("name", "block", "count"), [("sew/table2", "C3", 10), ("sew/table4", "C5", 5), ("sew/table6", "C5", 3)]
)
def test_published_numbers_of_sew(name: str, block: str, count: int) -> None:
    own = {row: line for row, line in published_tables(block).items() if line["role"] == "own"}
    recipe = load_recipe(name)
    rows = {row_id: row for row_id, row in recipe.rows.items() if row_id in own}
    assert len(rows) == count
    assert not any("acc" in row.published for row_id, row in recipe.rows.items() if row_id not in own)
    for row_id, row in rows.items():
        line, settings = own[row_id], recipe.resolve(row_id, "full")
        numbers = {"acc": line.get("acc1") or line["acc"], "acc5": line.get("acc5"), "params_M": line["params_M"]}
        assert row.published == {key: float(value) for key, value in numbers.items() if value}
        assert line["g"].lower() in ("", settings.model.options.get("combine", "add"))
        if line.get("lr"):
            assert settings.train.lr == float(line["lr"])
        assert int(line["T"]) == settings.data.options.get("T", build_model_on_meta(settings).T)


def test_published_numbers_are_those_of_the_tables() -> None:
    tables = published_tables("C1")
    compared = 0
    for name in ("report/table1", "report/table2", "report/table4"):
        for row_id, row in load_recipe(name).rows.items():
            if row_id in ("inner_residual", "vanilla"):  # from the text, which gives no number; not in the document
                continue
            if row_id.endswith("_spikes"):  # another reading of a row
                continue
            line = tables[row_id]
            assert row.system == line["system"]
            numbers = {key: value for key, value in row.published.items() if key != "note"}
            expected = {key: float(line[key]) for key in ("acc", "params_M", "flops_M", "energy_uJ") if line[key]}
            assert numbers == expected
            settings = load_recipe(name).resolve(row_id, "full")
            assert settings.data.name == line["dataset"].lower().replace("-", "")
            assert int(line["T"]) == build_model_on_meta(settings).T
            compared += len(expected)
    assert compared == 38
    spikes = {"s0t1a_spikes", "s0t1b_spikes", "s0t1c_spikes"}
    assert {row for name, row in ROWS if name == "report/table1"} == {"s0t1a", "s0t1b", "s0t1c", "s0x1", *spikes}
    assert {row for name, row in ROWS if name == "report/table2"} == {"s0t2a", "s0t2b", "s0t2c", "vanilla"}


def test_published_numbers_of_ds_resnet() -> None:
    tables = published_tables("C9", "C10", "C11")
    found = {row_id: row for n in (1, 2, 3) for row_id, row in load_recipe(f"ds_resnet/table{n}").rows.items()}
    found = {row_id: row for row_id, row in found.items() if row_id in tables or "acc" in row.published}
    # The rows of other papers are not run.
    assert set(found) == {row_id for row_id, line in tables.items() if line.get("role", "") != "cited"}
    for row_id, row in found.items():
        line = tables[row_id]
        keys = ("memory_GB", "sec_per_epoch", "hours", "acc", "params_M")
        expected = {key: float(line[key]) for key in keys if line.get(key)}
        assert {key: float(value) for key, value in row.published.items() if key != "note"} == expected
        if "params_M" not in expected:  # table 3 calls systems by other names
            assert row.system.split(",")[0] == line["system"]
    # Table 2: savings of memory and time; 100 epochs of table 1 take table 2's hours.
    numbers = {row_id: row.published for row_id, row in found.items()}
    for base, full, saved, faster in (
        ("s3t2a", "s3t2b", 46.68, 2.80),
        ("s3t2c", "s3t2d", 48.52, 1.31),
        ("s3t2e", "s3t2f", 10.46, 2.76),
    ):
        before, after = numbers[base], numbers[full]
        assert 100 * (1 - float(after["memory_GB"]) / float(before["memory_GB"])) == pytest.approx(saved, abs=0.005)
        assert float(before["hours"]) / float(after["hours"]) == pytest.approx(faster, abs=0.005)
    for one, hours in (("s3t1a", "s3t2a"), ("s3t1e", "s3t2b")):
        assert float(numbers[one]["sec_per_epoch"]) * 100 / 3600 == pytest.approx(
            float(numbers[hours]["hours"]), abs=0.006
        )


def build_model_on_meta(settings: Any) -> Any:
    with torch.device("meta"):
        return build_model(settings, *shape_of(settings))


def test_the_report_is_trained_as_the_report_says() -> None:
    for name, epochs, milestones in (
        ("report/table1", 190, [92, 136]),
        ("report/table2", 20, [10, 15]),
        ("report/table4", 190, [92, 136]),
    ):
        for row in load_recipe(name).rows:
            t = load_recipe(name).resolve(row, "full").train
            assert (t.optimizer, t.lr, t.momentum, t.weight_decay) == ("sgd", 0.1, 0.9, 1e-4)
            assert (t.batch_size, t.epochs, t.schedule, t.milestones, t.gamma) == (128, epochs, "step", milestones, 0.1)
            assert t.loss.name == "sdt"
    assert load_recipe("report/table2").resolve("s0t2a", "full").data.options["size"] == 32


# --- a mistake is one line --------------------------------------------------------------------------------------------


def digits() -> Recipe:
    return load_recipe("quickstart/digits")


def one_line(info: pytest.ExceptionInfo[UsageError], *parts: str) -> None:
    message = str(info.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_options_of_a_default_need_no_name() -> None:
    recipe = load_recipe("report/table1")
    row = recipe.resolve("s0t1a", "full", parse_overrides(["train.loss.label_smoothing=0.1"]))
    assert row.train.loss == Named(name="sdt", label_smoothing=0.1)  # pyright: ignore[reportCallIssue]
    other = recipe.resolve("s0t1a", "full", parse_overrides(["train.loss.name=tet", "train.loss.label_smoothing=0.1"]))
    assert other.train.loss.name == "tet"
    # What a card or the scores say was changed can be typed.
    words = recipe.changes("s0t1a", "full", row.model_dump())
    assert words == ["train.loss.label_smoothing=0.1"]
    assert recipe.resolve("s0t1a", "full", parse_overrides(words)) == row


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        # unknown keys, at every level, with the nearest known one
        ("dta.root=/x", ["'dta'", "did you mean data"]),
        ("train.epoch=3", ["'train.epoch'", "did you mean epochs"]),
        ("train.batchsize=3", ["'train.batchsize'", "batch_size"]),
        ("data.subst=3", ["data digits", "'subst'", "did you mean subset or"]),
        ("data.download=true", ["data digits", "'download'"]),  # of other data sets
        ("model.t=3", ["model report_sew_resnet34", "'t'", "T"]),
        ("model.in_channels=3", ["model report_sew_resnet34", "'in_channels'"]),  # the data's
        ("model.neuron=LIF", ["'neuron'"]),
        ("neuron.name=LIF neuron.tua=3.0", ["neuron LIF", "'tua'", "did you mean tau?"]),
        ("train.loss.name=tet train.loss.lamb=0.1", ["train.loss tet", "'lamb'", "did you mean lam?"]),
        ("train.loss.name=sdt train.loss.logits=1", ["train.loss sdt", "'logits'"]),
        ("train.method.name=bptt train.method.k=1", ["train.method bptt", "'k'"]),
        ('train.augment=[{name="random_crop",pading=1}]', ["train.augment random_crop", "'pading'", "padding"]),
        # unknown names
        ("data.name=digit", ["data:", "unknown dataset 'digit'", "did you mean digits"]),
        ("model.name=report_sew_resnet43", ["unknown model 'report_sew_resnet43'", "report_sew_resnet34"]),
        ("neuron=LFI", ["neuron:", "unknown neuron 'LFI'", "LIF"]),
        ("train.loss=std", ["train.loss:", "unknown loss 'std'", "sdt"]),
        ("train.method=btpt", ["train.method:", "unknown training method 'btpt'", "did you mean bptt"]),
        ('train.augment=["random_corp"]', ["train.augment:", "unknown transform 'random_corp'", "random_crop"]),
        ("train.optimizer=sdg", ["train.optimizer", "'sgd'", "'sdg'"]),
        ("train.precision=fp16", ["train.precision", "'fp32'", "'bf16'", "'fp16'"]),
        # wrong types; nothing is converted
        ('train.epochs="3"', ["train.epochs", "integer", "'3'"]),
        ("train.epochs=3.0", ["train.epochs", "integer", "3.0"]),
        ("train.epochs=true", ["train.epochs", "integer", "True"]),
        ("train.epochs=soon", ["train.epochs", "integer", "'soon'"]),
        ("train.channels_last=1", ["train.channels_last", "boolean", "1"]),
        ('train.lr="0.1"', ["train.lr", "number", "'0.1'"]),
        ("seed=1.5", ["seed", "integer", "1.5"]),
        ("data.subset=many", ["data digits: subset", "integer", "'many'"]),
        ("data.root=3", ["data.root", "string", "3"]),
        ("model.T=2.5", ["model report_sew_resnet34: T", "integer", "2.5"]),
        ('neuron.name=LIF neuron.tau="2"', ["neuron LIF: tau", "number", "'2'"]),
        ("neuron.name=LIF neuron.surrogate=3", ["neuron LIF: surrogate", "3"]),
        ("train=3", ["train", "3"]),
        ("model=3", ["model", "3"]),
        ("train.augment=random_crop", ["train.augment", "list", "'random_crop'"]),
        # values out of their limits
        ("train.epochs=0", ["train.epochs", "greater than or equal to 1", "0"]),
        ("train.batch_size=-4", ["train.batch_size", "-4"]),
        ("train.lr=-0.1", ["train.lr", "greater than 0", "-0.1"]),
        ("train.lr=0.0", ["train.lr", "greater than 0"]),
        ("train.lr=nan", ["train.lr", "nan"]),
        ("train.lr=inf", ["train.lr", "inf"]),
        ("train.weight_decay=inf", ["train.weight_decay", "inf"]),
        ("train.momentum=1.0", ["train.momentum", "less than 1", "1.0"]),
        ("train.accumulate=0", ["train.accumulate", "0"]),
        ("seed=-1", ["seed", "-1"]),
        ("train.loss.label_smoothing=3.0", ["train.loss sdt: label_smoothing", "less than 1, got 3.0"]),
        ("train.loss.label_smoothing=-0.5", ["train.loss sdt: label_smoothing", "equal to 0, got -0.5"]),
        ("train.loss.name=tet train.loss.label_smoothing=1.0", ["label_smoothing", "less than 1, got 1.0"]),
        ("train.loss.name=tet train.loss.lam=1.5", ["train.loss tet: lam", "equal to 1, got 1.5"]),
        ("train.loss.name=mse_onehot train.loss.label_smoothing=3.0", ["label_smoothing", "less than 1"]),
        ("train.loss.name=ce_count train.loss.label_smoothing=3.0", ["label_smoothing", "less than 1"]),
        ("train.loss.name=mse_count train.loss.correct_rate=7.0", ["correct_rate", "equal to 1, got 7.0"]),
        ("train.loss.name=mse_count train.loss.incorrect_rate=-0.1", ["incorrect_rate", "equal to 0, got -0.1"]),
        ("train.loss=tet train.method.name=sltt_k train.method.k=0", ["train.method sltt_k: k", "equal to 1, got 0"]),
        # missing ones
        ('train.augment=[{name="random_crop"}]', ["train.augment random_crop", "padding is missing"]),
        ("train.augment=[{padding=1}]", ["train.augment", "name is missing"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(words: str, parts: list[str]) -> None:
    with pytest.raises(UsageError) as info:
        digits().resolve("main", None, parse_overrides(words.split(" ")))
    one_line(info, "quickstart/digits#main", *parts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train.patience=3", "train.patience needs a validation part to watch: give data.validation, such as 0.1"),
        (
            "train.total_batch=64 train.accumulate=2",
            "train.total_batch and train.accumulate cannot both be given: leave out accumulate, which follows",
        ),
        ("train.total_batch=65", "train.total_batch must be a multiple of train.batch_size, 32, got 65"),
        (
            "train.shard=true train.ema=0.9",
            "train.shard and train.ema cannot both be given, averaged weights are not shared out: leave one out",
        ),
        ("train.mix.p=0.5", "train.mix: mixup or cutmix must be above 0, such as train.mix.mixup=0.8"),
    ],
)
def test_settings_that_do_not_go_together_are_named_alone(words: str, message: str) -> None:
    with pytest.raises(UsageError) as info:
        digits().resolve("main", "smoke", parse_overrides(words.split(" ")))
    assert str(info.value) == f"quickstart/digits#main: {message}"


def test_a_model_that_cannot_be_is_named_once() -> None:
    with pytest.raises(UsageError) as info:
        build_model(digits().resolve("main", None, parse_overrides(["model.T=0"])), 1, 10)
    assert str(info.value) == "model report_sew_resnet34: T must be at least 1, got 0"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("neuron.name=LIF neuron.surrogate=Atan", ["unknown surrogate 'Atan'", "ATan"]),
        ('neuron.name=LIF neuron.surrogate={name="ATan",alfa=1.0}', ["surrogate ATan", "alfa"]),
        ('neuron.name=LIF neuron.surrogate={name="ATan",alpha=-1.0}', ["surrogate ATan", "alpha", "-1.0"]),
        ("neuron.name=LIF neuron.tau=1.0", ["neuron LIF", "tau must be greater than 1, got 1.0"]),
        ("neuron.name=PLIF neuron.tau=0.5", ["neuron PLIF", "tau must be greater than 1, got 0.5"]),
        ("neuron.name=LIF neuron.v_reset=1.0", ["neuron LIF", "v_reset must be below v_threshold"]),
    ],
)
def test_a_neuron_that_cannot_be_is_one_line(words: str, parts: list[str]) -> None:
    with pytest.raises(UsageError) as info:
        build_model(digits().resolve("main", None, parse_overrides(words.split(" "))), 1, 10)
    one_line(info, *parts)


@pytest.mark.parametrize(
    "words",
    [
        "neuron.name=IF",
        "neuron.name=LIF neuron.tau=3",
        "train.lr=1",
        "model.T=1",
        "train.loss.name=tet train.loss.lam=0.05",
        "train.warmup_epochs=0",
    ],
)
def test_right_settings_are_taken(words: str) -> None:
    settings = digits().resolve("main", None, parse_overrides(words.split(" ")))
    for word in words.split(" "):
        key, value = word.split("=")
        found: Any = settings.model_dump()
        for part in key.split("."):
            found = found[part]
        assert str(found) in (value, f"{value}.0")


def test_what_is_missing_is_named() -> None:
    values = digits().resolve("main").model_dump(exclude_none=True)
    for key in ("data", "model", "train"):
        with pytest.raises(UsageError, match=rf"^here: {key} is missing$"):
            check_settings({k: v for k, v in values.items() if k != key}, "here")
    for key in ("epochs", "batch_size", "lr"):
        short = {**values, "train": {k: v for k, v in values["train"].items() if k != key}}
        with pytest.raises(UsageError, match=rf"^here: train\.{key} is missing$"):
            check_settings(short, "here")
    with pytest.raises(UsageError, match=r"^here: model\.name is missing; add model=NAME \(spikeloom list models\)$"):
        check_settings({**values, "model": {"T": 1}}, "here")


def test_settings_survive_their_file() -> None:
    values = digits().resolve("main", "smoke", parse_overrides(["neuron.name=LIF", "neuron.tau=3.0"]))
    assert check_settings(values.model_dump(exclude_none=True), "here") == values


def test_neuron_factory() -> None:
    settings = digits().resolve(
        "main", None, parse_overrides(["neuron={name='LIF',tau=3.0,v_reset=-0.5,surrogate={name='Sigmoid',alpha=2.0}}"])
    )
    assert settings.neuron is not None
    factory = make_factory(settings.neuron.name, settings.neuron.options)
    first, second = factory(), factory()
    assert first is not second
    assert (first.tau, first.v_reset, type(first.surrogate).__name__, first.surrogate.alpha) == (
        3.0,
        -0.5,
        "Sigmoid",
        2.0,
    )
    # The settings are still what was asked for.
    assert settings.neuron.options["surrogate"] != first.surrogate


def test_unknown_recipes_and_rows() -> None:
    with pytest.raises(UsageError) as info:
        load_recipe("report/tabel2")
    one_line(info, "unknown recipe 'report/tabel2'", "report/table2")
    with pytest.raises(UsageError) as info:
        load_recipe("report/table2").resolve("s0t2d")
    one_line(info, "recipe report/table2 has no row 's0t2d'", "s0t2a")


# --- recipe files -----------------------------------------------------------------------------------------------------

MINIMAL = """
title = "A title"
paper = "A paper"
command = "spikeloom train x.toml"

[settings]
data = "digits"
model = "report_sew_resnet34"

[settings.train]
epochs = 1
batch_size = 8
lr = 0.1

[budgets.smoke]
[budgets.short]
[budgets.full]

[rows.one]
system = "One"
"""


def write(folder: Path, text: str) -> str:
    path = folder / "x.toml"
    path.write_text(text)
    return str(path)


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    settings = load_recipe(write(tmp_path, MINIMAL)).resolve("one")
    assert settings.train == TrainSettings(epochs=1, batch_size=8, lr=0.1)
    assert (settings.data.name, settings.model.name, settings.seed) == ("digits", "report_sew_resnet34", 1)


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ('title = "A title"', 'titel = "A title"', ["unknown key 'titel'", "did you mean title?"]),
        ('title = "A title"', "", ["title is missing"]),
        ('paper = "A paper"', "paper = 3", ["paper", "string", "3"]),
        ("[budgets.smoke]", "[budgets.smok]", ["budgets.smok", "'smoke', 'short', 'hours' or 'full'"]),
        ('system = "One"', "", ["rows.one.system is missing"]),
        ('system = "One"', "system = 1", ["rows.one.system", "string"]),
        ('system = "One"', 'system = "One"\npublished = { acc = [1] }', ["rows.one.published.acc", "[1]"]),
        ('[rows.one]\nsystem = "One"', "[rows]", ["rows", "at least 1"]),
        ("epochs = 1", "epochs = ", ["not valid TOML", "line 11"]),
        ("epochs = 1", "epochs = 1\nepochs = 2", ["not valid TOML"]),
    ],
)
def test_a_mistake_in_a_recipe_file(tmp_path: Path, old: str, new: str, parts: list[str]) -> None:
    assert MINIMAL.count(old) == 1
    with pytest.raises(UsageError) as info:
        load_recipe(write(tmp_path, MINIMAL.replace(old, new)))
    one_line(info, "x.toml", *parts)


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ('system = "One"', 'system = "One"\nmodle = "x"', ["#one", "unknown key 'modle'", "did you mean model?"]),
        ("[budgets.smoke]", "[budgets.smoke]\ntrain.epoch = 1", ["#one", "'train.epoch'", "epochs"]),
        ('system = "One"', 'system = "One"\nbudgets.smoke.dta.subset = 3', ["#one", "unknown key 'dta'", "data"]),
        ('data = "digits"', "", ["#one", "data is missing"]),
    ],
)
def test_a_mistake_in_the_settings_of_a_recipe_file(tmp_path: Path, old: str, new: str, parts: list[str]) -> None:
    assert MINIMAL.count(old) == 1
    recipe = load_recipe(write(tmp_path, MINIMAL.replace(old, new)))
    with pytest.raises(UsageError) as info:
        recipe.resolve("one", "smoke")
    one_line(info, "x.toml", *parts)


def test_all_missing_keys_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as info:
        load_recipe(write(tmp_path, 'title = "Mine"\n[settings]\nmodel = "report_vgg16"\ntrain.lr = 0.1\n'))
    one_line(
        info,
        "x.toml: paper, command, budgets, rows, settings.data",
        "settings.train.epochs, settings.train.batch_size are missing",
    )
    # What a row gives is not missing.
    rest = MINIMAL.replace('paper = "A paper"', "").replace('data = "digits"', "")
    with pytest.raises(UsageError, match=r"x\.toml: paper is missing$"):
        load_recipe(write(tmp_path, rest.replace('system = "One"', 'system = "One"\ndata = "digits"')))
    with pytest.raises(UsageError, match=r"x\.toml#one: data, train\.lr are missing$"):
        load_recipe(write(tmp_path, MINIMAL.replace('data = "digits"', "").replace("lr = 0.1", ""))).resolve("one")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as info:
        load_recipe(str(tmp_path / "none.toml"))
    one_line(info, "there is no recipe file", "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00 = 1")
    with pytest.raises(UsageError) as info:
        load_recipe(str(tmp_path / "binary.toml"))
    one_line(info, "binary.toml")


def test_none_switches_off_what_a_recipe_sets() -> None:
    recipe = load_recipe("psn/cifar10")
    assert recipe.resolve("psn").train.mix is not None
    assert recipe.resolve("psn", None, parse_overrides(["train.mix=none"])).train.mix is None
    assert recipe.resolve("lif", None, parse_overrides(["neuron=none"])).neuron is None
    assert recipe.resolve("psn", "smoke", parse_overrides(["data.test_subset=none"])).data.test_subset is None
    with pytest.raises(UsageError, match=r"train\.epochs: .*, got 'none'"):  # which must be there
        recipe.resolve("psn", None, parse_overrides(["train.epochs=none"]))


def test_order_of_overrides(tmp_path: Path) -> None:
    text = MINIMAL.replace("[budgets.smoke]", "[budgets.smoke]\ntrain.epochs = 3\ntrain.batch_size = 3\nseed = 3")
    text += "train.epochs = 2\ntrain.batch_size = 2\ntrain.lr = 0.2\nseed = 2\nbudgets.smoke.train.batch_size = 4\n"
    text += "budgets.smoke.seed = 4\n"
    recipe = load_recipe(write(tmp_path, text))
    plain = recipe.resolve("one", "short")
    assert (plain.train.epochs, plain.train.batch_size, plain.train.lr, plain.seed) == (2, 2, 0.2, 2)
    smoke = recipe.resolve("one", "smoke", {"seed": 5})
    assert (smoke.train.lr, smoke.train.epochs, smoke.train.batch_size, smoke.seed) == (0.2, 3, 4, 5)


# --- merging and the words of the command line ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "over", "merged"),
    [
        ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
        ({"a": 1}, {"a": 2}, {"a": 2}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}, {"a": {"b": 1, "c": 3}}),
        ({"a": {"name": "x", "c": 2}}, {"a": "y"}, {"a": "y"}),  # a name replaces a whole table
        ({"a": "x"}, {"a": {"c": 3}}, {"a": {"name": "x", "c": 3}}),  # a table adds options to a name
        ({"a": "x"}, {"a": {"name": "y"}}, {"a": {"name": "y"}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": 1}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": {"b": {"c": 1, "d": 1}}}, {"a": {"b": {"c": 2}}}, {"a": {"b": {"c": 2, "d": 1}}}),
    ],
)
def test_merge(base: dict[str, Any], over: dict[str, Any], merged: dict[str, Any]) -> None:
    untouched = repr((base, over))
    assert merge(base, over) == merged
    assert repr((base, over)) == untouched


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ([], {}),
        (["seed=3"], {"seed": 3}),
        (["train.lr=1e-3", "train.epochs=3"], {"train": {"lr": 1e-3, "epochs": 3}}),
        (["train.epochs=1", "train.epochs=2"], {"train": {"epochs": 2}}),
        (["data.root=/some/place", "run=runs/a"], {"data": {"root": "/some/place"}, "run": "runs/a"}),
        (["a=true", "b=True", "c="], {"a": True, "b": "True", "c": ""}),
        (['a="3"', "b='x y'"], {"a": "3", "b": "x y"}),
        (["a=b=c"], {"a": "b=c"}),
        (
            ['train.augment=[{name="random_crop",padding=4}]'],
            {"train": {"augment": [{"name": "random_crop", "padding": 4}]}},
        ),
        (["neuron=LIF", "neuron.tau=3.0"], {"neuron": {"name": "LIF", "tau": 3.0}}),
        (["neuron.tau=3.0", "neuron=IF"], {"neuron": "IF"}),
        (["data.root=C:\\new"], {"data": {"root": "C:\\new"}}),
    ],
)
def test_parse_overrides(words: list[str], values: dict[str, Any]) -> None:
    assert parse_overrides(words) == values


@pytest.mark.parametrize("word", ["seed", "=3", ".a=3", "a.=3", "a..b=3", "--epochs"])
def test_parse_overrides_refuses_other_words(word: str) -> None:
    with pytest.raises(UsageError, match="expected key=value, got") as info:
        parse_overrides(["seed=1", word])
    one_line(info, repr(word))


@pytest.mark.parametrize("key", ["subset", "test_subset"])
def test_too_large_a_part_is_named_as_it_was_asked_for(key: str) -> None:
    settings = digits().resolve("main", "smoke", {"data": {key: 10_000}})
    with pytest.raises(UsageError) as error:
        build_datasets(settings)
    assert re.fullmatch(
        rf"data\.{key} must be an integer from 1 to \d+, the number of images of digits \(scikit-learn\), got 10000 "
        rf"\(yours, or the budget's\): give another data\.{key}",
        str(error.value),
    )
