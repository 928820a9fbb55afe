"""Run folders that a disk, a crash or a person damaged: every command ends well or with one line that says what is
wrong."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spikeloom.analyse import write_report
from spikeloom.cli.progress import Quiet
from spikeloom.errors import DataFileError, UsageError
from spikeloom.train.evaluate import evaluate_run
from spikeloom.train.loop import Interrupted, train
from spikeloom.train.recipe import check_settings
from spikeloom.train.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, Any] = {
    "data": {"name": "digits", "subset": 32, "test_subset": 20, "size": 16},
    "model": {"name": "colored_mnist_net", "T": 2, "image_size": 16},
    "train": {"batch_size": 16, "epochs": 4, "optimizer": "adam", "lr": 0.003, "schedule": "constant"},
}
STEPS = 2  # of an epoch


def stop_after(steps: int) -> Callable[[], bool]:
    asked = iter(range(1, steps + 1))
    return lambda: next(asked) == steps


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole`, a finished run with its report, and `broken_off`, the same run within its third epoch."""
    home = tmp_path_factory.mktemp("runs")
    settings = check_settings(SETTINGS, "here")
    run = Run.plan(home / "whole", "quickstart/digits", "main", "full", settings)
    train(run, Quiet())
    write_report([run.folder], {}, Quiet())
    run = Run.plan(home / "broken_off", "quickstart/digits", "main", "full", settings)
    with pytest.raises(Interrupted):
        train(run, Quiet(), stop_after(2 * STEPS + 1))
    return home


def resume(folder: Path) -> None:
    run = Run.open(folder)
    with contextlib.suppress(Interrupted):  # where damaged settings say to go on for longer
        assert train(run, Quiet(), stop_after(3 * STEPS))["epochs"] == run.settings.train.epochs


def evaluate(folder: Path) -> None:
    run = Run.open(folder)
    evaluate_run(run, run.settings, Quiet())


def report(folder: Path) -> None:
    _, problems = write_report([folder], {}, Quiet())
    assert all("\n" not in problem for problem in problems)


# --- damages ----------------------------------------------------------------------------------------------------------


def flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 30))):
        changed[rng.randrange(len(changed))] ^= rng.randrange(1, 256)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def lose(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.choice((1, 10, 512)) :]


def zero(content: bytes, rng: random.Random) -> bytes:
    """A block that the disk never wrote."""
    start = rng.randrange(len(content))
    length = min(rng.choice((1, 16, 512)), len(content) - start)
    return content[:start] + bytes(length) + content[start + length :]


def repeat(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return content[: start + rng.choice((1, 20, 200))] + content[start:]


VALUES: list[Any] = [None, True, -1, 1.5, 1e300, 10**400, float("nan"), "", "x", "\u0000", [], [1], {}, {"name": "x"}]


def replace(content: bytes, rng: random.Random) -> bytes:
    """Another value, or another name of a value, somewhere in a line of JSON."""
    lines = content.decode().splitlines() if content.count(b"\n{") else [content.decode()]
    number = rng.randrange(len(lines))
    value = json.loads(lines[number])
    inner, outer, key = value, None, None
    while isinstance(inner, dict | list) and inner and (outer is None or rng.random() < 0.8):
        outer, key = inner, rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        inner = inner[key]
    if outer is None or rng.random() < 0.1:
        value = rng.choice(VALUES)
    elif isinstance(outer, dict) and rng.random() < 0.2:
        outer[f"{key}x"] = outer.pop(key)
    else:
        outer[key] = copy.deepcopy(rng.choice(VALUES))
    lines[number] = json.dumps(value)
    return "\n".join(lines).encode() + b"\n"


BYTES = [flip, cut, lose, zero, repeat]


def damage(path: Path, rng: random.Random) -> None:
    """Damages one file of a run."""
    content = path.read_bytes()
    kind = rng.choice([*BYTES, *[replace] * 3 * (path.suffix in (".json", ".jsonl")), "remove", "folder", "empty"])
    if not isinstance(kind, str):
        path.write_bytes(kind(content, rng))
        return
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()


# Which files matter to which command, and how many damages each gets.
COMMANDS: dict[str, tuple[Callable[[Path], None], str, dict[str, int]]] = {
    "resume": (resume, "broken_off", {"settings.json": 60, "metrics.jsonl": 120, "checkpoint.safetensors": 60}),
    "evaluate": (evaluate, "whole", {"settings.json": 60, "model.safetensors": 60}),
    "report": (
        report,
        "whole",
        {"settings.json": 40, "metrics.jsonl": 40, "summary.json": 60, "report.json": 160, "model.safetensors": 20},
    ),
}


def lines_of(folder: Path) -> list[bytes]:
    return (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)


METRICS: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "bytes that are no text": lambda lines: [b"\xff" + lines[0][1:], lines[1]],
    "a line cut short": lambda lines: [lines[0][:-20] + b"\n", lines[1]],
    "the last line lost": lambda lines: lines[:1],
    "all lost": lambda lines: [],
    "a line twice": lambda lines: [lines[0], *lines],
    "another epoch": lambda lines: [lines[0].replace(b'"epoch": 1', b'"epoch": 7'), lines[1]],
    "no epoch": lambda lines: [lines[0].replace(b'"epoch"', b'"epoc"'), lines[1]],
    "a word": lambda lines: [lines[0], lines[1].replace(b'"test_accuracy": ', b'"test_accuracy": "x", "y": ')],
    "another name": lambda lines: [lines[0], lines[1].replace(b"test_accuracy", b"text_accuracy")],
    "not an object": lambda lines: [b"[1]\n", lines[1]],
}


@pytest.mark.parametrize("name", METRICS)
def test_records_of_epochs_that_are_done(home: Path, tmp_path: Path, name: str) -> None:
    """A summary of some epochs as if of all would be wrong: the run goes on with all records or, when told, without."""
    folder = Path(shutil.copytree(home / "broken_off", tmp_path / "run"))
    lines = lines_of(folder)
    assert len(lines) == 2
    (folder / "metrics.jsonl").write_bytes(b"".join(METRICS[name](lines)))
    words = r"metrics\.jsonl is damaged: the records of the 2 epochs .* or delete it to continue without them$"
    for _ in range(2):
        with pytest.raises(DataFileError, match=words):
            resume(folder)
    (folder / "metrics.jsonl").write_bytes(b"".join(lines))
    summary = train(Run.open(folder), Quiet())
    whole = json.loads((home / "whole" / "summary.json").read_text())
    changing = dict.fromkeys(("seconds", "memory_MB", "environment"))
    assert summary | changing == whole | changing


def test_records_that_were_deleted(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(home / "broken_off", tmp_path / "run"))
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(Interrupted):
        train(Run.open(folder), Quiet(), stop_after(STEPS))  # and once more, when it has records again
    assert "has no records of its first 2 epochs: its summary is of the others" in capsys.readouterr().err
    summary = train(Run.open(folder), Quiet())
    assert (summary["epochs"], len(lines_of(folder))) == (4, 2)
    assert summary["best_epoch"] in (3, 4)
    for name in ("metrics.jsonl", "summary.json", "model.safetensors"):
        (folder / name).unlink()
    with pytest.raises(DataFileError, match="there is nothing to summarise"):
        train(Run.open(folder), Quiet())


def test_records_after_the_checkpoint_do_not_matter(home: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(home / "broken_off", tmp_path / "run"))
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"epoch": 3, "tr\xff')
    resume(folder)
    assert [record["epoch"] for record in Run.open(folder).metrics()] == [1, 2, 3, 4]


def test_a_checkpoint_of_something_else(home: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(home / "broken_off", tmp_path / "run"))
    shutil.copy(home / "whole" / "model.safetensors", folder / "checkpoint.safetensors")
    with pytest.raises(DataFileError, match=r"checkpoint\.safetensors is not the checkpoint of a run"):
        resume(folder)


@pytest.mark.parametrize("name", ["tensorboard", "seconds.json", "model.safetensors", "summary.json", ".lock"])
def test_something_else_in_the_place_of_a_file(home: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(home / "broken_off", tmp_path / "run"))
    if name == "tensorboard":
        shutil.rmtree(folder / name)
        (folder / name).touch()
    else:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
    with pytest.raises(UsageError, match=rf"^cannot (write|make) .*{'run' if name == '.lock' else name}: ") as info:
        resume(folder)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("content", ["null", "[]", '{"epochs": 4}', "[" * 100_000])
def test_a_damaged_summary(home: Path, tmp_path: Path, content: str) -> None:
    folder = Path(shutil.copytree(home / "whole", tmp_path / "run"))
    assert (Run.open(folder).summary() or {})["epochs"] == 4
    (folder / "summary.json").write_text(content)
    with pytest.raises(DataFileError, match=r"summary\.json is not ") as info:
        Run.open(folder).summary()
    assert "\n" not in str(info.value)


def test_seconds_go_on(home: Path, tmp_path: Path) -> None:
    """They are kept apart from the checkpoint; without them, those of the last whole epoch count."""
    folder = Path(shutil.copytree(home / "broken_off", tmp_path / "run"))
    last = Run.open(folder).metrics()[-1]["seconds"]
    assert Run.open(folder).seconds() > last
    (folder / "seconds.json").write_text("1000.5")
    assert Run.open(folder).seconds() == 1000.5
    assert train(Run.open(folder), Quiet())["seconds"] > 1000.5
    for content in ("x", "[]", "null"):
        (folder / "seconds.json").write_text(content)
        assert Run.open(folder).seconds() > 1000.5
    (folder / "metrics.jsonl").unlink()
    assert Run.open(folder).seconds() == 0


@pytest.mark.slow
@pytest.mark.parametrize(("command", "name"), [(c, name) for c, (_, _, names) in COMMANDS.items() for name in names])
def test_random_damages(home: Path, tmp_path: Path, command: str, name: str) -> None:
    run, state, counts = COMMANDS[command]
    failures: list[str] = []
    for seed in range(counts[name]):
        folder = tmp_path / str(seed)
        shutil.copytree(home / state, folder, ignore=shutil.ignore_patterns("tensorboard"))
        damage(folder / name, random.Random(f"{command} {name} {seed}"))
        try:
            run(folder)
        except UsageError as error:
            if "\n" in str(error):
                failures.append(f"{seed}: {error}")
        except Exception as error:
            failures.append(f"{seed}: {type(error).__name__}: {error}")
        if list(folder.glob(".*")):
            failures.append(f"{seed}: left {list(folder.glob('.*'))}")
        shutil.rmtree(folder)
    assert not failures, "\n".join(failures)
