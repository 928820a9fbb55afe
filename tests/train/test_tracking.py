"""Trackers of accelerate: every epoch arrives once, under an identity that a resumed run keeps."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, get_args

import accelerate.tracking
import pytest
from accelerate.utils import LoggerType
from helpers.small_runs import SMALL, Told, resolved, run_of

from spikeloom.errors import UsageError
from spikeloom.train.loop import Interrupted, train
from spikeloom.train.settings import TrainSettings

pytestmark = pytest.mark.usefixtures("one_thread")


class Fake(accelerate.tracking.GeneralTracker):
    """Stands for a tracker's package."""

    name = "trackio"
    requires_logging_directory = False
    main_process_only = True
    begun: ClassVar[list[dict[str, Any]]] = []
    logged: ClassVar[list[tuple[int, dict[str, Any]]]] = []
    config: ClassVar[dict[str, Any]] = {}

    def __init__(self, run_name: str, **kwargs: Any):
        super().__init__()
        self.begun.append({"project": run_name, **kwargs})

    def start(self) -> None: ...

    @property
    def tracker(self) -> Any:
        return SimpleNamespace(name=self.begun[0]["name"])

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config.update(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        assert step is not None
        self.logged.append((step, values))

    def finish(self) -> None: ...


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    for kept in (Fake.begun, Fake.logged, Fake.config):
        kept.clear()
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [LoggerType.TRACKIO])
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "trackio", Fake)
    return Fake


def test_every_epoch_arrives_and_a_resumed_run_goes_on(tmp_path: Path, fake: type[Fake]) -> None:
    run = run_of(tmp_path / "mine", SMALL, train={"epochs": 3, "tracker": "trackio"})
    calls = iter(range(100))
    with pytest.raises(Interrupted):
        train(run, Told(), lambda: next(calls) == 5)
    assert json.loads((run.folder / "tracker.json").read_text()) == {"tracker": "trackio", "id": "mine"}
    train(run, Told())
    assert fake.begun == [{"project": "spikeloom", "name": "mine", "resume": "allow"}] * 2
    assert [step for step, _ in fake.logged] == [1, 2, 3]
    for (_, values), record in zip(fake.logged, run.metrics(), strict=True):
        assert values["train/loss"] == record["train_loss"]
        assert values["test/accuracy"] == record["test_accuracy"]
    assert fake.config["train.lr"] == "0.003"
    assert not (run.folder / "tensorboard").exists()


def test_the_identity_is_the_one_that_was_saved(tmp_path: Path, fake: type[Fake]) -> None:
    run = run_of(tmp_path / "mine", SMALL, train={"tracker": "trackio"})
    run.folder.mkdir()
    run.begin()
    (run.folder / "tracker.json").write_text('{"tracker": "trackio", "id": "other"}')
    train(run, Told())
    assert fake.begun[0]["name"] == "other"


@pytest.mark.parametrize("damaged", ["[]", '{"tracker": "trackio"}', "{"])
def test_a_damaged_identity(damaged: str, tmp_path: Path, fake: type[Fake]) -> None:
    run = run_of(tmp_path / "mine", SMALL, train={"tracker": "trackio"})
    run.folder.mkdir()
    run.begin()
    (run.folder / "tracker.json").write_text(damaged)
    with pytest.raises(UsageError, match=r"tracker\.json"):
        train(run, Told())


def test_a_package_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)
    run = run_of(tmp_path / "mine", SMALL, train={"tracker": "mlflow"})
    with pytest.raises(UsageError, match=r"train\.tracker=mlflow needs a package .* pip install mlflow-skinny"):
        train(run, Told())
    assert not run.folder.exists()


def test_a_tracker_that_does_not_start(tmp_path: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr(Fake, "start", refuse)
    run = run_of(tmp_path / "mine", SMALL, train={"tracker": "trackio"})
    with pytest.raises(UsageError, match=r"train\.tracker=trackio does not start: ConnectionError: no server"):
        train(run, Told())


def test_an_unknown_tracker() -> None:
    with pytest.raises(UsageError, match=r"train\.tracker: .* got 'tensorbored'"):
        resolved(SMALL, train={"tracker": "tensorbored"})


def test_the_names_are_those_of_accelerate() -> None:
    known = set(get_args(TrainSettings.model_fields["tracker"].annotation))
    assert known == set(map(str, accelerate.tracking.LOGGER_TYPE_TO_CLASS))
