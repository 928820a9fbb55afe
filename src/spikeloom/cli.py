"""The command line. Nothing heavy is imported until a command needs it, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikeloom.errors import UsageError
from spikeloom.memory import keep_memory

if TYPE_CHECKING:
    from spikeloom.analyse import Audit, BlockInput, Target
    from spikeloom.train.recipe import Budget
    from spikeloom.train.run import Run

Json = dict[str, Any]

app = typer.Typer(
    name="spikeloom",
    help="Deep spiking neural networks: train them, measure them, reproduce published tables.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RECIPE[#ROW]] [KEY=VALUE]...", help="A recipe, and settings to override."),
]


def main() -> None:
    """The `spikeloom` command: a user's mistake is one line on standard error and exit code 2."""
    keep_memory()
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="spikeloom", standalone_mode=False)
    except UsageError as error:
        code = _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        # A wrong command or option: an exception of click's, of which typer may carry a copy of its own.
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        code = _fail(f"{describe()} (see 'spikeloom --help')")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> int:
    print(f"spikeloom: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


# --- commands ---------------------------------------------------------------------------------------------------------


@app.command()
def train(words: Words = None, as_json: AsJson = False) -> None:
    """Train a recipe (without one: quickstart/digits), or continue a run.

    \b
    spikeloom train
    spikeloom train quickstart/mnist data.root=DATA
    spikeloom train report/table2#s0t2b budget=smoke data.root=DATA train.precision=bf16
    spikeloom train resume=RUN

    Keys: seed, budget (smoke, short, hours, full), run (the folder to write), resume, and anything under
    data., model., neuron. and train. that a recipe may set.
    """
    name, values = _parse(words, "run", "resume")
    resume = values.pop("resume", None)
    if resume is not None:
        if name is not None or values:
            raise UsageError("resume=RUN continues a run with its own settings: give no recipe and no other key")
        run = _open(str(resume))
        if run.summary() is not None:
            raise UsageError(f"{run.folder} is finished; evaluate it with 'spikeloom evaluate {run.folder}'")
    else:
        run = _new_run(name or "quickstart/digits", values)
    from spikeloom.train.loop import Interrupted
    from spikeloom.train.loop import train as train_run

    with _progress(as_json) as progress, _stop_on_signal() as stop:
        try:
            summary = train_run(run, progress, stop)
        except Interrupted:
            print(f"stopped; continue with: spikeloom train resume={run.folder}", file=sys.stderr)
            raise typer.Exit(130) from None
    if not summary:
        return  # not the main process
    if as_json:
        print(json.dumps({"run": str(run.folder), **summary}), flush=True)
        _report_of_training(run, as_json)
        return
    classifies = summary["test_accuracy"] is not None
    found = f"accuracy {summary['test_accuracy']:.2f} %" if classifies else f"loss {summary['test_loss']:.4f}"
    best = f"best {summary['best_test_accuracy']:.2f} %" if classifies else "best loss"
    print(f"\n{run.title} ({run.budget}): test {found} on {summary['data']['test']}")
    print(f"  {best} at epoch {summary['best_epoch']} of {summary['epochs']}; "
          f"{summary['parameters']:,} parameters; {summary['seconds']:.0f} s")  # fmt: skip
    print(f"  run:   {run.folder}")
    if classifies:
        print(f"  next:  spikeloom evaluate {run.folder}")
    else:
        print(f"  drawn: {run.folder / 'pictures.png'}")
        print(f"  next:  another recipe with train.start_from={run.folder}")
    print(f"         tensorboard --logdir {run.folder / 'tensorboard'}", flush=True)
    _report_of_training(run, as_json)


def _report_of_training(run: Run, as_json: bool) -> None:
    """The last thing of `train`: whatever happens to it, the run is finished and its numbers are printed."""
    from spikeloom.analyse.report import write_report

    with _progress(as_json) as progress:
        try:
            page, problems = write_report([run.folder], {}, progress)
        except Exception as error:
            progress.warn(
                f"the run is complete, but not its report: {type(error).__name__}: {' '.join(str(error).split())}; "
                f"make it with: spikeloom report {shlex.quote(str(run.folder))}"
            )
            return
        for problem in problems:
            progress.warn(problem)
    if not as_json:
        print(f"  report: {page}")


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="data.* settings.")] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a trained run on its test data, with the firing rate of every layer.

    \b
    spikeloom evaluate RUN
    spikeloom evaluate RUN data.root=DATA --json
    """
    from spikeloom.train.recipe import check_settings, merge, parse_overrides

    opened = _open(run)
    overrides = parse_overrides(words or [])
    for key in overrides:
        if key != "data":
            raise UsageError(f"evaluate takes data.* settings only, got {key!r}")
    settings = check_settings(merge(opened.settings.model_dump(), overrides), run)
    from spikeloom.train.evaluate import evaluate_run

    with _progress(as_json) as progress:
        result = evaluate_run(opened, settings, progress)
    if as_json:
        print(json.dumps(result))
        return
    accuracy = "" if result["test_accuracy"] is None else f"accuracy {result['test_accuracy']:.2f} %, "
    print(f"{opened.title}: {accuracy}loss {result['test_loss']:.4f} on {result['data']}")
    print("  firing rate (spikes per neuron and step)")
    for layer, rate in result["rates"].items():
        print(f"  {100 * rate:6.2f} %  {layer}")


@app.command()
def audit(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="The folder of a run, or a model's name.")],
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what enters every layer of a network, whether it is spike-driven, and what it costs by each published rule.

    \b
    spikeloom audit RUN images=1000 data.root=DATA
    spikeloom audit report_sew_resnet34 data.name=digits data.size=32 model.T=4
    spikeloom audit report_ms_resnet34 input=3x32x32      # random inputs, untrained weights

    Keys: images (of the test data), batch, data.*; histograms (an HTML file, where to draw what enters q, k and v of
    a transformer's blocks); for a model also model.*, neuron.*, seed and input. Norms of an untrained model take the
    statistics of the first batch.
    """
    from spikeloom.analyse.audit import audit as audit_model
    from spikeloom.analyse.block_inputs import draw_block_inputs, watching_blocks
    from spikeloom.analyse.target import open_target
    from spikeloom.train.recipe import parse_overrides

    values = parse_overrides(words or [])
    drawing = values.pop("histograms", None)
    opened = open_target(target, values)
    with _progress(as_json) as progress, _running(opened):
        progress.work("auditing", opened.images)
        model = opened.ready(next(opened.batches())[0])
        with watching_blocks(model) as blocks:
            if drawing is not None and not blocks:
                raise UsageError(f"histograms= is for transformers: {opened.title} has no spiking self-attention")
            found = audit_model(model, _ticking(opened.batches(), progress))
    if drawing is not None:
        page = draw_block_inputs(blocks, f"What enters q, k and v: {opened.title} on {opened.data}").to_html()
        try:
            Path(str(drawing)).write_text(page, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"histograms={drawing} cannot be written: {error.strerror}") from None
    if as_json:
        inputs = [{**dataclasses.asdict(block), "nonzero": block.nonzero} for block in blocks]
        print(json.dumps({"target": opened.title, "data": opened.data, **found.to_json(), "block_inputs": inputs}))
    else:
        _print_audit(opened.title, opened.data, found, blocks)
        if drawing is not None:
            print(f"drawn: {drawing}")


@contextlib.contextmanager
def _running(opened: Target) -> Generator[None]:
    """What a network cannot take is the user's mistake: its data do not fit it."""
    try:
        yield
    except UsageError:
        raise
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"{opened.title} cannot run on {opened.data}: {error}") from None


def _ticking(batches: Any, progress: Any) -> Generator[Any]:
    for x, y in batches:
        yield x, y
        progress.advance(len(y))


@app.command()
def run(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="The folder of a run, or a model's name.")],
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings.")] = None,
    show_plan: Annotated[bool, typer.Option("--plan", help="Show every layer: how it runs, and why.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a trained network by its spikes on the test data, beside the network itself.

    \b
    spikeloom run RUN images=1000 data.root=DATA
    spikeloom run RUN save=engine.safetensors --plan
    spikeloom run RUN engine=engine.safetensors compare=false

    Keys: images (of the test data, 1000), batch (32), data.*; save (write the engine to a file), engine (take it from
    one), weights (fp32; bf16: half the file, other roundings; exact: rounded until no sum of spikes rounds,
    and the engine says to the bit what PyTorch says), compare (run the network itself as well, true); for a model also
    model.*, neuron.*, seed and input.
    """
    from spikeloom import deploy
    from spikeloom.analyse.target import open_target
    from spikeloom.deploy.running import run_by_events
    from spikeloom.train.recipe import parse_overrides

    values = parse_overrides(words or [])
    save, file, compare = values.pop("save", None), values.pop("engine", None), values.pop("compare", True)
    weights = values.pop("weights", "fp32")
    if weights not in ("fp32", "bf16", "exact"):
        raise UsageError(f"weights must be fp32, bf16 or exact, got {weights!r}")
    if file is not None and weights == "bf16":
        raise UsageError("weights=bf16 says how an engine is made; engine= has its own: leave one of them out")
    if not isinstance(compare, bool):
        raise UsageError(f"compare must be true or false, got {compare!r}")
    opened = open_target(target, values)
    with _progress(as_json) as progress, _running(opened):
        progress.work("running", opened.images)
        example = next(opened.batches())[0]
        model = opened.ready(example)
        if weights == "exact":
            model = deploy.exact(model, example)
        made = "bf16" if weights == "bf16" else "fp32"
        engine = deploy.compile(model, example, weights=made) if file is None else deploy.load(str(file))
        if save is not None:
            engine.save(str(save))
        found = run_by_events(engine, opened.batches(), model if compare else None, progress.advance)
    if as_json:
        print(json.dumps({"target": opened.title, "data": opened.data, **found, "plan": engine.layers()}))
        return
    if show_plan:
        print(engine.plan())
    print(f"{opened.title} on {opened.data}")
    print(f"  by events   accuracy {found['accuracy']:6.2f} %   {found['ms']:8.3f} ms an image")
    if compare:
        name = "the network" if weights != "exact" else "in PyTorch "
        print(f"  {name} accuracy {found['model_accuracy']:6.2f} %   {found['model_ms']:8.3f} ms an image")
        print(
            f"  the same prediction for {found['same']:.2f} % of images; mean logits within 1e-4 for "
            f"{found['close']:.2f} %, largest difference {found['difference']:.2g}"
        )
    if save is not None:
        print(f"  written: {save}")


@app.command()
def export(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="The folder of a run, or a model's name.")],
    to: Annotated[str, typer.Option("--to", metavar="nir|onnx", help="The format.")],
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="PATH", help="The file to write.")] = None,
    steps: Annotated[int | None, typer.Option("--T", metavar="N", help="Steps; by default the network's own.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a network for other tools: ONNX with its T steps unrolled, or a NIR graph of one step.

    \b
    spikeloom export RUN --to onnx                          # RUN/model.onnx
    spikeloom export report_ms_resnet34 --to nir --out net.nir input=3x32x32
    spikeloom export RUN --to onnx --T 4 data.root=DATA

    The shape of an input is that of the data, as `audit` finds them. What a format cannot express is an error that
    names the layer. Keys: data.*; for a model also model.*, neuron.*, seed and input.
    """
    from spikeloom.analyse.target import open_target
    from spikeloom.deploy.export import export_file
    from spikeloom.registry import nearest
    from spikeloom.train.recipe import parse_overrides

    if to not in ("nir", "onnx"):
        raise UsageError(f"unknown format {to!r}; {nearest(to, ('nir', 'onnx'))}")
    opened = open_target(target, {"images": 1, **parse_overrides(words or [])})
    path = out or (Path(target) / f"model.{to}" if Path(target).is_dir() else Path(f"{target}.{to}"))
    with _progress(as_json) as progress:
        progress.work(f"writing {to.upper()}", 1)
        written = export_file(opened.model, next(opened.batches())[0], opened.sequence, to, path, steps)
        progress.advance(1)
    if as_json:
        print(json.dumps({"target": opened.title, **written}))
        return
    opset = f"opset {written['opset']}, " if to == "onnx" else ""
    print(f"{opened.title}: {to.upper()}, {opset}{written['nodes']} nodes, T = {written['T']}, "
          f"{written['bytes'] / 1e6:.2f} MB")  # fmt: skip
    print(f"  written: {path}")


@app.command()
def report(
    words: Annotated[list[str], typer.Argument(metavar="RUN [RUN]... [KEY=VALUE]...", help="Folders and settings.")],
    as_json: AsJson = False,
) -> None:
    """Write one HTML page about a run, or several side by side: curves, confusion, audit, spikes, how to repeat it.

    \b
    spikeloom report RUN                            # RUN/report.html, which training has written already
    spikeloom report RUN OTHER                      # RUN/compared.html
    spikeloom report RUN images=500 data.root=DATA  # measure it anew on these images

    Keys: out (the file to write), images (of the test data), data.*. The page needs no network.
    """
    from spikeloom.analyse.report import write_report
    from spikeloom.registry import nearest
    from spikeloom.train.recipe import parse_overrides

    folders = [Path(word) for word in words if "=" not in word or Path(word).is_dir()]
    values = parse_overrides([word for word in words if Path(word) not in folders])
    for key in values:
        if key not in ("out", "images", "data"):
            raise UsageError(f"unknown key {key!r}; {nearest(key, ('out', 'images', 'data'))}")
    if not folders:
        raise UsageError("name the folder of a run, for example 'spikeloom report runs/RUN'")
    out = values.pop("out", None)
    with _progress(as_json) as progress:
        page, problems = write_report(folders, values, progress, None if out is None else Path(str(out)))
        for problem in problems:
            progress.warn(problem)
    print(json.dumps({"report": str(page), "problems": problems}) if as_json else f"report: {page}")


@app.command()
def reproduce(words: Words = None, as_json: AsJson = False) -> None:
    """Train or measure every row of a published table and print published beside measured.

    \b
    spikeloom reproduce report/table2 budget=smoke data.root=DATA
    spikeloom reproduce report/table2#s0t2b budget=short data.root=DATA

    Finished rows are taken from their run folders, interrupted ones are continued. Numbers go to results/ (or
    results=PATH), run folders to runs/ (or run=PATH).
    """
    name, values = _parse(words, "run", "results")
    if name is None:
        raise UsageError("name a table, for example 'spikeloom reproduce report/table2'; see 'spikeloom list recipes'")
    from spikeloom.train.recipe import load_recipe

    recipe_name, _, row = name.partition("#")
    recipe = load_recipe(recipe_name)
    budget = _budget(values) or recipe.budget
    runs, results = Path(str(values.pop("run", "runs"))), Path(str(values.pop("results", "results")))
    from spikeloom.reproduce import reproduce as run_table
    from spikeloom.train.loop import Interrupted

    with _progress(as_json) as progress, _stop_on_signal() as stop:
        try:
            records = run_table(
                recipe, [row] if row else list(recipe.rows), budget, values, runs, results, progress, stop
            )
        except Interrupted:
            print("stopped; the same command continues", file=sys.stderr)
            raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(records))
        return
    if recipe.measures or "figures" in records[0]:
        _print_measured(recipe.title, recipe.paper, budget, records)
    else:
        _print_table(recipe.title, recipe.paper, budget, records)
    print(f"results: {results / recipe.name}")


@app.command()
def bench(
    what: Annotated[str, typer.Argument(metavar="neurons|methods|events|audit", help="What to measure.")] = "neurons",
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="quick=true, out=PATH.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine: time and memory of every neuron, against the bytes that must move and SpikingJelly.

    \b
    spikeloom bench neurons              # minutes; tables and a plot go to results/bench
    spikeloom bench neurons quick=true   # seconds: T = 4 and 64, no plot
    spikeloom bench methods              # BPTT and SLTT over T; another network with model=NAME
    spikeloom bench events data=DATA     # reading event files and cutting them into frames, beside tonic
    spikeloom bench audit                # what an audit costs over an inference of the same batches

    Install the extra `bench` to have the rivals in the same run.
    """
    from spikeloom.registry import nearest
    from spikeloom.train.recipe import parse_overrides

    own = {"neurons": (), "methods": ("model",), "events": ("data",), "audit": ()}
    if what not in own:
        raise UsageError(f"unknown benchmark {what!r}; {nearest(what, own)}")
    values = parse_overrides(words or [])
    known = ("quick", "out", *own[what])
    for key in values:
        if key not in known:
            raise UsageError(f"unknown key {key!r}; {nearest(key, known)}")
    from spikeloom.bench.run import bench_audit, bench_events, bench_methods, bench_neurons

    quick = values.get("quick", False)
    if not isinstance(quick, bool):
        raise UsageError(f"quick must be true or false, got {quick!r}")
    folder = Path(str(values.get("out", "results/bench")))
    tell = None if as_json else lambda row: print(json.dumps(row), flush=True)
    stem = what
    if what == "methods":
        model = str(values.get("model", "report_sew_resnet34"))
        tables, stem = bench_methods(folder, quick, tell, model), f"methods-{model}"
    elif what == "events":
        tables = bench_events(folder, quick, tell, Path(str(values["data"])) if "data" in values else None)
    elif what == "audit":
        tables = bench_audit(folder, quick, tell)
    else:
        tables = bench_neurons(folder, quick, tell)
    if as_json:
        print(json.dumps(tables))
    else:
        print(f"written: {folder / stem}.md")


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(metavar="models|recipes|datasets|neurons")],
    as_json: AsJson = False,
) -> None:
    """List what can be named: models, recipes, datasets, neurons."""
    entries = _entries(what)
    if as_json:
        print(json.dumps(entries))
        return
    width = max(map(len, entries), default=0)
    for name, line in entries.items():
        print(f"{name:{width}}  {line}")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show versions, the processor's kernels, threads, and which data sets are found."""
    from spikeloom.doctor import examine

    found = examine()
    if as_json:
        print(json.dumps(found))
        return
    width = max(map(len, found))
    for key, value in found.items():
        print(f"{key:{width}}  {value}")


# --- arguments --------------------------------------------------------------------------------------------------------


def _parse(words: list[str] | None, *more: str) -> tuple[str | None, Json]:
    """The recipe, if the first word is one, and the settings, with `more` keys of the command's own."""
    from spikeloom.registry import nearest
    from spikeloom.train.recipe import parse_overrides

    words = list(words or [])
    name = words.pop(0) if words and "=" not in words[0] else None
    values = parse_overrides(words)
    known = ("seed", "budget", "data", "model", "neuron", "train", "measure", *more)
    for key in values:
        if key not in known:
            raise UsageError(f"unknown key {key!r}; {nearest(key, known)}")
    return name, values


def _budget(values: Json) -> Budget | None:
    from spikeloom.registry import nearest
    from spikeloom.train.recipe import BUDGETS

    budget = values.pop("budget", None)
    if budget not in (None, *BUDGETS):
        raise UsageError(f"unknown budget {budget!r}; {nearest(str(budget), BUDGETS)}")
    return budget


def _open(folder: str) -> Run:
    from spikeloom.train.run import Run

    return Run.open(Path(folder))


def _new_run(name: str, values: Json) -> Run:
    import datetime

    from spikeloom.train.recipe import load_recipe
    from spikeloom.train.run import Run

    recipe_name, _, row = name.partition("#")
    recipe = load_recipe(recipe_name)
    if not row:
        if len(recipe.rows) > 1:
            raise UsageError(
                f"{recipe_name} has several rows: name one, as in '{recipe_name}#{next(iter(recipe.rows))}' "
                f"({', '.join(recipe.rows)}), or use 'spikeloom reproduce {recipe_name}'"
            )
        row = next(iter(recipe.rows))
    budget = _budget(values) or recipe.budget
    folder = values.pop("run", None)
    settings = recipe.resolve(row, budget, values)
    if folder is None:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        stem = "-".join([*recipe.name.removesuffix(".toml").split("/"), *([] if row == "main" else [row]), stamp])
        folder = f"runs/{stem}"
    return Run.plan(Path(_agree(str(folder))), recipe.name, row, budget, settings)


def _agree(folder: str) -> str:
    """The main process's folder: the clocks of several need not agree."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return folder
    from accelerate.utils import broadcast_object_list

    from spikeloom.train.build import make_accelerator

    make_accelerator("fp32")
    shared: list[Any] = [folder]
    broadcast_object_list(shared)
    return str(shared[0])


def _entries(what: str) -> dict[str, str]:
    from spikeloom.registry import nearest

    kinds = ("models", "recipes", "datasets", "neurons")
    if what == "recipes":
        from spikeloom.train.recipe import list_recipes, load_recipe

        return {name: load_recipe(name).title for name in list_recipes()}
    if what == "models":
        from spikeloom.models import MODELS as registry
    elif what == "neurons":
        from spikeloom.neurons import NEURONS as registry
    elif what == "datasets":
        from spikeloom.data import DATASETS as registry
    else:
        raise UsageError(f"unknown list {what!r}; {nearest(what, kinds)}")
    return {name: (registry[name].__doc__ or "").strip().split("\n")[0] for name in registry}


# --- what people see --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(quiet: bool) -> Generator[Any]:
    from spikeloom.show import Quiet, Shown

    if quiet or int(os.environ.get("RANK", "0")) > 0:
        yield Quiet()
        return
    shown = Shown()
    try:
        yield shown
    finally:
        shown.close()


@contextlib.contextmanager
def _stop_on_signal() -> Generator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM end a run at the next step, with a checkpoint; a second one ends it at once."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_table(title: str, paper: str, budget: str, records: list[Json]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{title} (budget: {budget})", caption=f"{paper}. Published, then measured.")
    for column in ("row", "system", "params M", "FLOPs M", "MACs M", "accuracy %", "data", "time"):
        table.add_column(column, justify="left" if column in ("row", "system", "data") else "right", overflow="fold")

    def pair(record: Json, key: str, digits: int) -> str:
        published, measured = record["published"].get(key), record["measured"][key]
        shown = "-" if measured is None else f"{measured:.{digits}f}"
        return f"{'-' if published is None else published}\n{shown}"

    for record in records:
        table.add_row(
            record["row"], record["system"], pair(record, "params_M", 3), pair(record, "flops_M", 2),
            f"\n{record['measured']['macs_M']:.2f}", pair(record, "acc", 2), record["data"]["train"],
            f"\n{record['seconds']:.0f} s",
        )  # fmt: skip
    Console().print(table)


def _print_measured(title: str, paper: str, budget: str, records: list[Json]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{title} (budget: {budget})", caption=paper)
    for column in ("row", "system", "quantity", "published", "measured"):
        table.add_column(column, overflow="fold")

    def shown(value: Any) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    for record in records:
        names = dict.fromkeys([*record["published"], *record["measured"]])
        for index, name in enumerate(names):
            first = (record["row"], record["system"]) if index == 0 else ("", "")
            table.add_row(*first, name, shown(record["published"].get(name)), shown(record["measured"].get(name)))
    console.print(table)
    for record in records:
        for figure in record["figures"]:
            console.print(f"figure: {figure}", markup=False)


def _print_audit(title: str, data: str, found: Audit, blocks: list[BlockInput]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{title}: what enters each layer, for one image of {found.steps:g} steps")
    for column in ("layer", "input", "max", "rate %", "MACs M", "ACs M", "uJ", "dead"):
        table.add_column(column, justify="left" if column in ("layer", "input") else "right", overflow="fold")
    for row in found.rows:
        table.add_row(
            row.name, row.input, f"{row.max:.3g}", f"{100 * row.rate:.2f}", f"{row.macs / 1e6:.3f}",
            f"{row.acs / 1e6:.3f}", f"{row.energy_pj / 1e6:.3f}", f"{row.dead}/{row.channels}" if row.channels else "",
            style="red" if row.breaks else None,
        )  # fmt: skip
    console.print(table)
    if blocks:
        console.print(_block_table(blocks))
    energies = Table(title="energy of one image, by rule")
    for column in ("rule", "MACs M", "ACs M", "uJ"):
        energies.add_column(column, justify="left" if column == "rule" else "right")
    for name, energy in found.energies().items():
        energies.add_row(name, f"{energy.macs / 1e6:.3f}", f"{energy.acs / 1e6:.3f}", f"{energy.pj / 1e6:.3f}")
    console.print(energies)
    console.print(f"measured on {data}; {found.parameters:,} parameters", markup=False)
    for line in found.verdict():
        console.print(line, markup=False)


def _block_table(blocks: list[BlockInput]) -> Any:
    """The histogram of every block, in per cent of its values."""
    from rich.table import Table

    table = Table(title="what enters q, k and v of each block: % of values")
    shown = min(max(len(block.counts) for block in blocks), 10)
    rest = any(len(block.counts) > shown or block.others for block in blocks)
    for column in ("block", "not 0", *map(str, range(shown)), *(["other"] if rest else [])):
        table.add_column(column, justify="left" if column == "block" else "right", overflow="fold")
    for block in blocks:
        counts = block.counts + [0] * (shown - len(block.counts))
        parts = [block.total - counts[0], *counts[:shown], *([block.total - sum(counts[:shown])] if rest else [])]
        table.add_row(block.name, *(f"{100 * part / max(1, block.total):.2f}" for part in parts))
    return table
