"""The Python in README and docs runs, their commands and links name what exists, their figures are those of results/.

Notes in docs/notes/ are of their day: only their links are checked.
"""

import contextlib
import functools
import importlib
import json
import re
import shlex
import statistics
from collections.abc import Iterable
from pathlib import Path

import pytest
import typer
from helpers.command_line import spikeloom

from spikeloom import cli
from spikeloom.cli.list import REGISTRIES
from spikeloom.registry import list_recipes
from spikeloom.reproduce import check_measure
from spikeloom.scores import as_markdown, scoreboard, summary
from spikeloom.train.recipe import load_recipe, parse_overrides
from spikeloom.train.settings import DataSettings, TrainSettings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LESSONS = sorted((ROOT / "docs" / "lessons").glob("*.md"))
NOTES = sorted((ROOT / "docs" / "notes").glob("*.md"))
LINKED = [*PAGES, *LESSONS, *NOTES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]


def _blocks(language: str) -> list:
    found = []
    for page in PAGES:
        for i, block in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)):
            found.append(pytest.param(block, id=f"{page.name}-{i}"))
    return found


@pytest.fixture
def kept_registries():
    """What an example registers is gone afterwards."""
    registries = [getattr(importlib.import_module(module), name) for module, name, _ in REGISTRIES.values()]
    before = [dict(registry._entries) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry._entries.clear()
        registry._entries.update(entries)


@pytest.mark.usefixtures("kept_registries")
@pytest.mark.parametrize("code", _blocks("python"))
def test_python_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_lines_beside_those_of_other_libraries_run():
    """The last column of each table of three and of Norse's, in the namespace of the page's first example."""
    page = (ROOT / "docs" / "from-spikingjelly-and-snntorch.md").read_text()
    known: dict = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], known)
    rows = [row for row in re.findall(r"^\|.*`.*\|$", page, re.MULTILINE) if row.count("|") == 4]
    cells = [row.split("|")[3].strip() for row in rows]
    norse = page.split("## From Norse")[1].split("\n## ")[0]
    cells += [row.split("|")[2].strip() for row in re.findall(r"^\|.*`.*\|$", norse, re.MULTILINE)]
    assert len(cells) >= 40
    for cell in cells:
        exec(compile(cell.strip("`"), cell, "exec"), known)


def _commands(names: str) -> list[str]:
    lines = [line for page in (*PAGES, *LESSONS) for line in page.read_text().splitlines()]
    found = [re.sub(r"^\$ (torchrun .* -m )?", "", line).split("#  ")[0].split("  # ")[0] for line in lines]
    found += re.findall(r"`(spikeloom [^`]*)`", "".join(page.read_text().replace("\n", " ") for page in PAGES))
    found += [load_recipe(name).command for name in list_recipes()]
    # What messages advise, as far as it stands in one line.
    source = [path.read_text() for path in (ROOT / "src").rglob("*.py")]
    found += re.findall(r"(spikeloom [a-z]+ [^`'\"\n{]*--[a-z][a-z-]*)", "\n".join(source))
    return sorted({line.strip() for line in found if re.match(rf"spikeloom ({names}) ", line)})


def _split(command: str) -> tuple[list[str], set[str]]:
    """The words of a command that are no options, and the names of its options."""
    options = {option.split("=")[0] for option in re.findall(r" (--[^ ]+)", command)}
    valued = "runs|resume|results|out|to|T|images|input|save|engine|events|window-ms|last|weights|import|picture"
    words = shlex.split(re.sub(rf" --({valued})[ =][^ ]+", "", command))[2:]
    return [word for word in words if not word.startswith("--")], options


@functools.cache
def _command_line():
    return typer.main.get_command(cli.app)


@pytest.mark.parametrize("command", _commands("[a-z]+"))
def test_options_of_commands_exist(command):
    name = command.split()[1]
    [known] = [c for c in _command_line().commands.values() if c.name == name]
    if group := getattr(known, "commands", None):
        known = group[command.split()[2]]
    options = {option for param in known.params for option in (*param.opts, *param.secondary_opts)}
    words, used = _split(command)
    assert used <= options | {"--import"}  # of all commands
    for word in words:
        assert f"--{word.split('=')[0]}" not in options or "=" not in word, f"{word} is an option"


@pytest.mark.parametrize("command", _commands("train|reproduce"))
def test_commands_name_what_exists(command):
    words, options = _split(command)
    recipe = words.pop(0) if words and "=" not in words[0] else "quickstart/digits"
    overrides = parse_overrides(words)
    if not options.isdisjoint({"--resume", "--import"}) or recipe.startswith("./") or recipe == "RECIPE":
        return
    name, _, row = recipe.partition("#")
    loaded = load_recipe(name)
    budget = overrides.pop("budget", None)
    for each in [row] if row else loaded.rows:
        if loaded.measures:
            check_measure(loaded, each, budget, overrides)
        else:
            loaded.resolve(each, budget, overrides)


def test_the_check_of_digits_is_what_is_shown():
    page = (ROOT / "docs" / "own-data.md").read_text()
    [shown] = re.findall(r"```console\n\$ spikeloom data check digits\n(.*?)```", page, re.DOTALL)
    result = spikeloom("data", "check", "digits")
    assert result.code == 0
    assert [line.rstrip() for line in result.out.splitlines()] == shown.splitlines()


def test_there_are_examples():
    assert len(_blocks("python")) >= 4
    assert len(_commands("[a-z]+")) >= 40


def test_every_setting_of_training_is_explained():
    pages = "".join((ROOT / "docs" / f"{page}.md").read_text() for page in ("training", "few-epochs"))
    keys = [f"train.{key}" for key in TrainSettings.model_fields] + [f"data.{key}" for key in DataSettings.model_fields]
    assert [key for key in keys if f"`{key}" not in pages] == []


def test_the_scores_are_those_of_the_results():
    scores = scoreboard(ROOT / "results")
    assert (ROOT / "docs" / "scores.md").read_text() == as_markdown(scores), (
        "run: spikeloom reproduce --scores --out docs/scores.md"
    )
    readme = (ROOT / "README.md").read_text()
    for line in summary(scores):
        assert line in readme, f"README's scores are older than results/: {line}"


# --- links ------------------------------------------------------------------------------------------------------------


def _anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not fragment or fragment in _anchors(target), link


def test_every_note_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert [
        note.name for note in (ROOT / "docs" / "notes").glob("*.md") if f"docs/notes/{note.name})" not in readme
    ] == []


def test_performance_is_a_page():
    text = (ROOT / "docs" / "performance.md").read_text()
    assert len(text) <= 9000, "move what was tried to a note in docs/notes/"


# --- figures ----------------------------------------------------------------------------------------------------------


def _bench(name: str, table: str) -> list[dict]:
    return json.loads((ROOT / "results" / "bench" / f"{name}.json").read_text())[table]


def _only(rows: list[dict], **columns) -> dict:
    [row] = [row for row in rows if all(row[key] == value for key, value in columns.items())]
    return row


def _measured(row: str) -> dict:
    """What `results/` has of a row: "report/table1/s0t1b", "report/table3/s0t3a.short.seed2"."""
    path = ROOT / "results" / row
    [found] = (
        [path.parent / f"{path.name}.json"] if ".seed" in row else path.parent.glob(f"{path.name}.short.seed*.json")
    )
    return json.loads(found.read_text())["measured"]


def _table(page: str, *columns: str) -> list[dict[str, str]]:
    """The rows of the one table of docs/`page`.md that has these columns."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", (ROOT / "docs" / f"{page}.md").read_text(), re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in block.splitlines()]
        if set(columns) <= set(head):
            found.append([dict(zip(head, row, strict=True)) for row in rows])
    [table] = found
    return table


def _check(cell: str, values: Iterable[float | None]) -> None:
    """The numbers of a cell are these values, rounded to the digits that it shows; None has no number."""
    shown = re.findall(r"\d+(?:\.\d+)?", cell)
    expected = [value for value in values if value is not None]
    assert len(shown) == len(expected), (cell, expected)
    for number, value in zip(shown, expected, strict=True):
        half = 0.5 * 10.0 ** -len(number.partition(".")[2])
        assert abs(float(number) - value) <= half * 1.001, (cell, expected)


def _kernels(cell: str) -> str:
    return cell.lower().replace("-", "")


def test_training_steps_are_those_recorded():
    recorded = [row for row in _bench("training", "training steps") if row.get("relu_ms")]
    shown = _table("performance", "kernels", "ReLU", "SpikingJelly")
    assert len(shown) == len(recorded)
    for row in shown:
        found = _only(
            recorded,
            kernels=_kernels(row["kernels"]),
            network=row["network"].strip("`"),
            precision=row["precision"],
        )
        _check(row["ours"], [found["ours_ms"]])
        _check(row["ReLU"], [found["relu_ms"]])
        _check(row["SpikingJelly"], [found["spikingjelly_ms"]])
        _check(row["ours / ReLU"], [found["ours_to_relu"]])
        _check(row["SpikingJelly / ours"], [found["spikingjelly_ms"] / found["ours_ms"]])
        peaks = [found[f"{contender}_peak_MB"] for contender in ("ours", "relu", "spikingjelly")]
        _check(row["peak MB, in this order"], peaks)


SHAPES = {
    "T = 4, 8,192 neurons": [4, 32, 256],
    "T = 1024, 8,192 neurons": [1024, 32, 256],
    "T = 4, 2.1 million neurons": [4, 32, 64, 32, 32],
}


def test_times_of_neurons_are_those_recorded():
    recorded = _bench("neurons", "neurons, forward and backward")
    for row in _table("performance", "neuron", *SHAPES):
        for column, shape in SHAPES.items():
            if row[column]:
                found = _only(recorded, neuron=row["neuron"], shape=shape)
                _check(row[column], [found["both_ms"], found.get("spikingjelly_to_ours")])
        long = _only(recorded, neuron=row["neuron"], shape=SHAPES["T = 1024, 8,192 neurons"])
        _check(row["kept at T = 1024"], [long["saved_per_input_byte"]])


def test_times_of_parallel_neurons_over_lif_are_those_recorded():
    recorded = _bench("neurons", "neurons, forward and backward")
    for row in _table("performance", "neuron", "T = 16"):
        for T in (4, 16, 64, 256, 1024):
            _check(row[f"T = {T}"], [_only(recorded, neuron=row["neuron"], shape=[T, 32, 256])["to_lif"]])


RUNS = {
    "report_vgg16": "report/table1#s0t1a (short)",
    "report_sew_resnet34": "report/table1#s0t1b (short)",
    "report_ms_resnet34": "report/table1#s0t1c (short)",
    "ghostnet_snn": "report/table4#s0t4a (short)",
    "sew_7b": "quickstart/nmnist#sew_7b (short)",
    "ds_resnet20": "ds_resnet/table1#s3t1a (short)",
    "spikingformer_4_256": "spikingformer/table2#spikingformer_4_256_cifar10 (short)",
}


def test_times_of_the_engine_are_those_recorded():
    networks, half = _bench("inference", "networks"), _bench("inference", "half the spikes")
    shown = _table("performance", "engine", "dense")
    assert [row["network"].strip("`") for row in shown] == list(RUNS)
    for row in shown:
        run = RUNS[row["network"].strip("`")]
        one, many = (_only(networks, kernels="avx2", run=run, batch=batch) for batch in (1, 64))
        _check(row["active inputs"], [100 * many["active"]])
        for column, key in (("engine", "engine"), ("dense", "dense"), ("compiled", "compiled"), ("bf16", "bf16")):
            _check(row[column], [many[f"{key}_ms"]])
        _check(row["SpikingJelly"], [many.get("spikingjelly_ms")])
        _check(row["ONNX"], [many.get("onnx_ms")])
        _check(row["times faster"], [one_or_many["engine times faster"] for one_or_many in (many, one)])
        _check(row["half"], [100 * _only(half, kernels="avx2", run=run)["less"]])


def test_time_and_memory_of_methods_are_those_recorded():
    shown = _table("training", "T = 4", "32")
    for row, next_row in zip(shown[::2], shown[1::2], strict=True):
        model = row[""].split("`")[1]
        recorded = _bench(f"methods-{model}", "time and peak memory of a training step")
        contenders = ("bptt", "sltt", "spikingjelly")[: row[""].count(",")]
        for column, T in (("T = 4", 4), ("8", 8), ("16", 16), ("32", 32)):
            found = [_only(recorded, contender=contender, T=T) for contender in contenders]
            _check(row[column], [each["ms"] for each in found])
            _check(next_row[column], [each["peak_MB"] for each in found])


ACCURACIES = {
    ("convnets", "trained on"): [
        *(["report/table1/s0x1"], ["report/table1/s0t1b"], ["report/table1/s0t1c"]),
        *(["report/table2/vanilla"], ["report/table2/s0t2b"], ["report/table2/s0t2c"]),
        *(["report/table4/s0t4a"], ["report/table4/s0t4b"], ["report/table4/s0t4c"]),
        *([f"ms/cifar_depth/{block}{depth}"] for depth in (20, 56) for block in ("vanilla", "membrane", "sew")),
        *([f"sew/table9/s1t9{row}{kind}" for row in "abc"] for kind in ("", "_spiking")),
    ],
    ("transformers", "accuracy"): [
        [f"spikformer_v2/finetune/{row}"] for row in ("pretrained", "scratch", "scratch_as_long")
    ],
    ("transformers", "MNIST, 64 channels"): [
        ["spikingformer/small/spikformer_mnist"],
        ["spikingformer/small/spikingformer_mnist"],
    ],
    ("transformers", "CIFAR-10, 128 channels"): [
        ["spikingformer/small/spikformer_cifar10"],
        ["spikingformer/small/spikingformer_cifar10"],
    ],
}


@pytest.mark.parametrize(("page", "column"), ACCURACIES)
def test_accuracies_of_tables_are_those_recorded(page, column):
    shown = _table(page, column)
    value = "test accuracy" if column == "trained on" else column
    for row, results in zip(shown, ACCURACIES[page, column], strict=True):
        _check(row[value], [_measured(result)["acc"] for result in results])


def test_accuracies_of_colored_mnist_are_those_recorded():
    readings = ("by_label", "by_label_100", "by_label_before_linears_100", "over_batch")
    rows = dict.fromkeys(("s0t3a", "s0t3b", "s0t3c", *readings, "s0t3d", "s0t3e", "s0t3f", "erm", "grayscale"), (1,))
    rows |= dict.fromkeys(("s0t3a", "s0t3b", "s0t3c", "erm"), (1, 2, 3))
    results = [f"{row}.short.seed{seed}" for row, seeds in rows.items() for seed in seeds]
    parts = ("train1", "train2", "test")
    for row, result in zip(_table("colored-mnist", "epoch chosen"), results, strict=True):
        found = _measured(f"report/table3/{result}")
        _check(row["measured by the same choice"], [found[f"acc_{part}"] for part in parts])
        if row["last epoch"] == "the chosen one":
            assert found["acc_epoch"] == found["last_epoch"]
        else:
            _check(row["last epoch"], [found[f"last_{part}"] for part in parts])
        _check(row["epoch chosen"], [found["acc_epoch"]])


def _claims() -> list:
    """Sentences of docs with their figures from results/."""
    training = _bench("training", "training steps")
    neurons = _bench("neurons", "neurons, forward and backward")
    psn, serial = _bench("neurons", "serial LIF over PSN"), _bench("neurons", "ParaLIF over a serial LIF")[-1]
    fft = _bench("neurons", "leaky integration, scan and FFT")[-1]
    networks, whole = _bench("inference", "networks"), _bench("inference", "the whole test set")
    half = [row for row in _bench("inference", "half the spikes") if row["kernels"] == "avx2"]

    def step(network: str, precision: str, kernels: str) -> dict:
        return _only(training, network=network, precision=precision, kernels=kernels)

    def floor(neuron: str, shape: list[int]) -> float:
        return _only(neurons, neuron=neuron, shape=shape)["to_floor"]

    def mean(kernels: str) -> str:
        rows = [_only(networks, run="geometric mean", kernels=kernels, batch=batch) for batch in (64, 1)]
        plain, sparse = ([row[key] for row in rows] for key in ("engine times faster", "at 4% active times faster"))
        return "{:.1f} ({:.1f})|{:.1f} ({:.1f})".format(*plain, *sparse)

    compiled = [step("sew18", *key)["spikingjelly_compiled_ms"] for key in (("fp32", "avx512"), ("bf16", "avx512"))]
    inference, both = ([row[f"{kind}_ratio"] for row in psn] for kind in ("inference", "training"))
    ahead = sum(max(pair) < 1 for pair in zip(inference, both, strict=True))
    _, long, wide = SHAPES.values()
    same = [row["engine: same prediction %"] for row in whole]
    apart = max(abs(row["network %"] - row["engine %"]) for row in whole)
    lif = _only(neurons, neuron="RecurrentLIF", shape=long)["to_lif"]
    bf16 = step("spikformer_4_256", "bf16", "avx2")
    many, one = (
        _only(networks, run="geometric mean", kernels="avx512", batch=batch)["int8 engine than best int8"]
        for batch in (64, 1)
    )
    before, after = (sum(row[key] for row in half) for key in ("event layers ms", "then ms"))
    assert all(row["exact weights, engine: largest difference"] == 0 for row in whole)
    avx2, avx512 = mean("avx2").split("|"), mean("avx512").split("|")

    methods = {
        (row["model"], row["contender"], row["T"]): row
        for model in ("ds_resnet20", "report_sew_resnet34")
        for row in _bench(f"methods-{model}", "time and peak memory of a training step")
    }
    memory = [methods["ds_resnet20", method, 4]["peak_MB"] for method in ("sltt", "bptt")]
    time = [methods["report_sew_resnet34", method, 2]["ms"] for method in ("sltt", "bptt")]
    for model, T in (("report_sew_resnet34", 4), ("ds_resnet20", 8)):
        for steps in (2, 4, 8, 16, 32):
            bptt, sltt = (methods[model, method, steps] for method in ("bptt", "sltt"))
            assert (sltt["peak_MB"] < bptt["peak_MB"]) == (steps >= T)
            assert (sltt["ms"] < bptt["ms"]) == ((model, steps) == ("report_sew_resnet34", 2))
    spread = {
        _only(_bench(f"methods-{model}", "highest over lowest peak memory"), contender="sltt")["spread_percent"]
        for model in ("ds_resnet20", "report_sew_resnet34")
    }
    against_steps = _measured("psn/speed/main.short.seed1")["training_step_ratio_largest"]
    fsdd = [_measured(row)["acc"] for row in ("psu/fsdd/psu", "paralif/fsdd/gs", "paralif/fsdd/t")]

    audits = _bench("audit", "audit and inference, ms a batch")
    batches = [row for row in audits if row["batches"] == 1]
    single = _only(audits, batches=16)
    ratio = {row["network"]: row["audit_to_inference"] for row in batches}
    low, high = min(ratio.values()), max(ratio.values())

    irm, similar, before_linears, plain = (
        [_measured(f"report/table3/{row}.short.seed{seed}")["acc_test"] for seed in (1, 2, 3)]
        for row in ("s0t3a", "s0t3b", "s0t3c", "erm")
    )
    errors = [statistics.stdev(found) / 3**0.5 for found in (similar, plain, before_linears)]
    gaps = [_measured(f"report/table3/{row}") for row in ("s0t3b.short.seed1", "s0t3d", "s0t3e", "s0t3f")]
    gap = [row["acc_train1"] - row["acc_train2"] for row in gaps]
    found = [
        ("performance", f"`sew18` took {compiled[0]:.0f} ms (fp32) and {compiled[1]:.0f} ms (bf16) with AVX-512"),
        ("performance", f"{step('sew18', 'fp32', 'avx2')['spikingjelly_compiled_ms']:.0f} ms (fp32) with AVX2"),
        ("performance", f"LIF takes {floor('LIF', wide):.2f} and MLF {floor('MLF', wide):.2f} times as long as plain"),
        ("performance", f"at T = 1024 LIF {floor('LIF', long):.2f} and MLF {floor('MLF', long):.2f} times"),
        ("performance", f"LIF is faster than PSN in {ahead} of {len(psn)} cells"),
        ("performance", f"PSN has {max(inference):.2f} to {min(inference):.3f} times LIF's speed in inference"),
        ("performance", f"{max(both):.2f} to {min(both):.3f} times in training"),
        ("performance", f"PSN trains up to {against_steps:.0f} times faster (`psn/speed`, AVX-512)"),
        ("performance", f"ParaLIF is {serial['acceleration_over_plain_lif']:.0f} times faster at 5,000 steps"),
        ("performance", f"{serial['acceleration_over_fused_lif']:.1f} times faster than the fused LIF with the same"),
        ("performance", f"{fft['fft_to_scan']:.0f} times faster than by FFT at T = 1024"),
        ("performance", f"The geometric mean is {avx2[0]}; with thresholds"),
        ("performance", f"4 % of the inputs are active, {avx2[1]}. With AVX-512 it is {avx512[0]} and {avx512[1]},"),
        ("performance", f"it is {many:.1f} ({one:.1f}) times as fast as the best int8 rival"),
        ("performance", f"agree in {min(same):.2f} to {max(same)} % of the predictions"),
        ("performance", f"accuracies differ by at most {apart:.2f} points"),
        ("performance", f"RecurrentLIF takes {lif:.0f} times as long as LIF at T = 1024"),
        (
            "performance",
            f"SpikingJelly's Spikformer takes {bf16['spikingjelly_ms'] / bf16['ours_ms']:.1f} times as long",
        ),
        ("performance", f"take off {100 * (1 - after / before):.0f} % in all seven networks"),
        ("performance", f"event layers of 8 images, {before:.1f} to {after:.1f} ms"),
        ("training", "{:.0f} MB against {:.0f}".format(*memory)),
        ("training", "at T = 2 ({:.0f} ms against {:.0f})".format(*time)),
        ("training", f"does not grow with T ({spread.pop()} % from T = 2 to 32, both networks)"),
        ("training", "PSU {:.1f} %, ParaLIF-GS {:.1f} %, ParaLIF-T {:.1f} %".format(*fsdd)),
        ("measuring", f"it took {low:.1f} to {high:.1f} times a plain inference of the same batch"),
        ("measuring", f"{ratio['report_vgg16']:.1f} for `report_vgg16`, whose convolutions are wide"),
        ("measuring", f"{ratio['report_sew_resnet34']:.1f} for `report_sew_resnet34`"),
        ("measuring", f"{ratio['spikingformer_4_256']:.1f} for `spikingformer_4_256` and for `shd_net` at T = 100"),
        ("measuring", f"an inference of {single['inference_ms']:.1f} ms, takes {single['audit_ms']:.1f} ms"),
        ("measuring", f"({single['audit_to_inference']:.1f} times), where a dispatch mode"),
        ("measuring", f"takes {single['mode_ms']:.1f} ms ({single['mode_to_inference']:.1f} times)"),
        ("colored-mnist", f"{sum(irm) / 3:.1f} on average over three seeds against 41.2"),
        ("colored-mnist", f"{sum(similar) / 3:.1f} on average against 42.1,"),
        ("colored-mnist", f"and no penalty at all has {sum(plain) / 3:.1f}"),
        ("colored-mnist", f"over three seeds {errors[0]:.1f} and {errors[1]:.1f})"),
        ("colored-mnist", f"Before both linear layers it is {sum(before_linears) / 3:.1f} ({errors[2]:.1f})"),
        ("colored-mnist", "({:.0f}, {:.0f}, {:.0f} and {:.0f} points)".format(*gap)),
    ]
    return [pytest.param(page, claim, id=f"{page}-{i}") for i, (page, claim) in enumerate(found)]


@pytest.mark.parametrize(("page", "claim"), _claims())
def test_sentences_have_the_figures_recorded(page, claim):
    assert claim in " ".join((ROOT / "docs" / f"{page}.md").read_text().split())


def _named_files() -> list[str]:
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Where things are")[1].split("\n## ")[0]
    cells = [line.split("|")[2] for line in section.splitlines() if line.startswith("|")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_files_of_everyday_changes_exist():
    names = _named_files()
    assert len(names) >= 24
    missing = [
        name for name in names if not any((root / name).is_file() for root in (ROOT / "src" / "spikeloom", ROOT))
    ]
    assert not missing


def test_names_of_the_architecture_exist():
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## How it works")[1].split("### How to time")[0]
    names = [name for name in re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)+)`", section) if not name.startswith("torch.")]
    assert len(names) >= 25
    for name in names:
        parts = name.split(".")
        for count in range(len(parts), 0, -1):
            with contextlib.suppress(ModuleNotFoundError):
                found = importlib.import_module(".".join(("spikeloom", *parts[:count])))
                break
        for part in parts[count:]:
            found = getattr(found, part)
