"""A recording played window by window: it says what the whole sequence says, in whatever portions the events come."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.browser import Opened
from helpers.command_line import spikeloom
from helpers.made_events import aedat2, aedat4, five_bytes, gappy, made
from torch import Tensor, nn

import spikeloom as package
from spikeloom import deploy
from spikeloom.data import Events, RecordingFrames, event_frames
from spikeloom.data.own_files import own_files
from spikeloom.data.recording_frames import WindowCutter
from spikeloom.deploy import SensorStream, WindowDecision
from spikeloom.errors import UsageError
from spikeloom.layers import Conv2d, Flatten, Linear
from spikeloom.models.trained_weights import FOLDER
from spikeloom.neurons import LIF, PSN
from spikeloom.play import play

pytestmark = pytest.mark.usefixtures("one_thread")

NMNIST = "weights:nmnist"
FRAMES = RecordingFrames("nmnist")


def recording(n: int = 3000, side: int = 34, span: int = 108_000) -> Events:
    """Events of 11 windows of 10 ms, the last of them cut short."""
    return made(n, side, side, 1, span)


def portions(events: Events, size: int) -> list[Events]:
    return [events.part(start, start + size) for start in range(0, len(events), size)]


def cut(parts: list[Events], window_ms: float) -> list[Events]:
    cutter = WindowCutter(window_ms)
    found = [window for part in parts for window in cutter.feed(part)]
    rest = cutter.close()
    return found if rest is None else [*found, rest]


def decided(network: Any, parts: list[Events], last: int | None = None) -> list[WindowDecision]:
    sensor = SensorStream(network, FRAMES, 10, last)
    return [decision for part in parts for decision in sensor.feed(part)] + sensor.close()


def frames_at_once(events: Events) -> Tensor:
    """[11, 1, 2, 34, 34]: the data set's own windows."""
    return event_frames(events, "windows", T=11, dt=10.0)[:, None].float()


@functools.cache
def network() -> nn.Module:
    return package.load(NMNIST).eval()


@functools.cache
def engine() -> deploy.Engine:
    return deploy.compile(network(), frames_at_once(recording())[2:6], tune=False)


@pytest.mark.parametrize("size", [1, 7, 997, 3000])
def test_windows_are_the_frames_of_the_data_set_in_portions_of_any_size(size: int) -> None:
    events = recording()
    windows = cut(portions(events, size), 10)
    assert torch.equal(torch.cat([FRAMES.window(window) for window in windows]), frames_at_once(events))
    assert sum(map(len, windows)) == len(events)


def test_a_late_event_counts_in_the_window_that_is_open() -> None:
    t = np.array([500, 10_400, 10_600, 10_450, 31_000])  # the fourth is of the first window, which is over
    events = Events(t, np.arange(5), np.zeros(5, np.int64), np.zeros(5, np.int64), 34, 34)
    for size in (1, 2, 5):
        assert [window.t.tolist() for window in cut(portions(events, size), 10)] == [
            [500, 10_400],
            [10_600, 10_450],
            [],
            [31_000],
        ]
    late = gappy(2000, 34, 34, 3, 30_000, late=True)
    whole = [window.t.tolist() for window in cut([late], 5)]
    assert whole == [window.t.tolist() for window in cut(portions(late, 61), 5)]
    assert sum(map(len, whole)) == 2000


def test_frames_have_the_options_of_the_data_set(tmp_path: Path) -> None:
    events = recording(span=9_000)
    (tmp_path / "own.bin").write_bytes(five_bytes(events))
    for options in ({"polarity": 0, "flatten": True}, {"size": 16}, {"size": 40, "resize": "nearest"}):
        data = own_files("nmnist", {"T": 1, **options}, [tmp_path / "own.bin"], 10)
        found = RecordingFrames("nmnist", options).window(events)
        assert torch.equal(found, data.encode(data.batch([0])[0]))
        assert found.shape == (1, 1, *RecordingFrames("nmnist", options).input_shape)
    turned = RecordingFrames("cifar10_dvs")
    (tmp_path / "own.aedat").write_bytes(aedat2(made(50, 128, 128)))
    data = own_files("cifar10_dvs", {"T": 1}, [tmp_path / "own.aedat"], 10)
    assert torch.equal(turned.window(turned.read(tmp_path / "own.aedat")), data.encode(data.batch([0])[0]))


def test_the_stream_says_what_the_engine_says_of_the_whole_sequence() -> None:
    events = recording()
    x = frames_at_once(events)
    whole = engine()(x)[:, 0]
    for size in (150, 3000):
        found = decided(engine(), portions(events, size))
        assert len(found) == 11
        assert torch.equal(torch.stack([decision.logits for decision in found]), whole)
    with torch.no_grad():
        expected = network()(x)[:, 0]
    itself = torch.stack([decision.logits for decision in decided(network(), [events])])
    torch.testing.assert_close(itself, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)
    assert len(set(whole.argmax(1).tolist())) > 1  # the windows differ


@pytest.mark.parametrize("last", [None, 1, 4])
def test_a_decision_is_of_its_horizon(last: int | None) -> None:
    events = recording()
    found = decided(engine(), [events], last)
    logits = torch.stack([decision.logits for decision in found]).double()
    for index, decision in enumerate(found):
        mean = logits[0 if last is None else max(0, index + 1 - last) : index + 1].mean(0)
        torch.testing.assert_close(decision.mean, mean)
        torch.testing.assert_close(decision.probabilities, mean.softmax(0))
        assert decision.label == int(mean.argmax())
        assert decision.end_ms == 10 * (index + 1)
        assert decision.latency_ms > 0


class Joined(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Joined(Flatten(), Linear(2312, 3), LIF()), "the network joins its steps"),
        (lambda: nn.Sequential(Flatten(), Linear(2312, 3), PSN(4)), "cannot run window by window on frames of 2x34x34"),
        (lambda: nn.Sequential(Conv2d(3, 4, 3), LIF(), Flatten(), Linear(9, 3)), "on frames of 2x34x34: "),
    ],
)
def test_a_network_that_cannot_step_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as info:
        SensorStream(make(), FRAMES)
    assert "\n" not in str(info.value)


def test_an_engine_that_joins_its_steps_is_refused() -> None:
    joined = deploy.compile(Joined(Flatten(), Linear(2312, 3), LIF()), frames_at_once(recording()), tune=False)
    with pytest.raises(UsageError, match="the network joins its steps"):
        SensorStream(joined, FRAMES)


def test_a_silence_without_end_is_refused() -> None:
    t = np.array([0, 2**50])
    events = Events(t, t * 0, t * 0, t * 0, 34, 34)
    with pytest.raises(UsageError, match=r"windows of 10 ms .* at most 1,000,000 go at once: take longer windows"):
        list(WindowCutter(10).feed(events))


def test_without_events_there_is_no_window() -> None:
    sensor = SensorStream(engine(), FRAMES)
    assert sensor.feed(recording().part(0, 0)) == sensor.close() == []


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.bin"
    path.write_bytes(five_bytes(recording()))
    return path


def test_the_command(file: Path, tmp_path: Path) -> None:
    page, words = tmp_path / "page.html", ["run", NMNIST, "--events", str(file), "--window-ms", "10", "--last=3"]
    result = spikeloom(*words, "--out", str(page), "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert (found["windows"], found["events"], found["by"], found["why"]) == (11, 3000, "engine", "")
    expected = decided(network(), [recording()], 3)
    for step, decision in zip(found["decisions"], expected, strict=True):
        assert (step["end_ms"], step["events"]) == (decision.end_ms, decision.events)
        assert step["class"] == str(decision.label)
        assert step["probability"] == pytest.approx(float(decision.probabilities.max()), abs=1e-4)
        assert step["mean_logit"] == pytest.approx(float(decision.mean.max()), abs=1e-4)
        assert step["spikes"] > 0
    assert found["class"] == found["decisions"][-1]["class"]
    assert found["seconds"] == pytest.approx(0.108, abs=0.001)
    assert found["real_time_factor"] == pytest.approx(found["seconds"] / found["computing_s"])
    assert found["events_per_second"] == pytest.approx(3000 / found["computing_s"])
    assert 0 < found["latency_ms"]["p50"] <= found["latency_ms"]["p99"]
    assert found["events_a_frame"] == 300  # T = 10 frames of equal count
    text = page.read_text()
    assert text.count('<script type="application/json">') == 4
    for word in ("Decision over time", "Events over time", "Spikes over time", "Latency over time", str(file)):
        assert word in text
    said = spikeloom(*words).out
    assert said.startswith(f"quickstart/nmnist on {file}: {found['class']}\n")
    assert "by the mean logits of the last 3 windows" in said
    assert "times real time" in said
    assert "page:" not in said


def test_an_engine_s_file_is_taken(file: Path, tmp_path: Path) -> None:
    engine().save(tmp_path / "net.safetensors")
    found = play(NMNIST, file, engine=tmp_path / "net.safetensors")
    logits = torch.stack([decision.logits for decision in found.decisions])
    assert torch.equal(logits, engine()(frames_at_once(recording()))[:, 0])
    assert (found.by, found.window_ms, found.page, found.spikes) == ("engine", 10.0, None, ())


def test_where_the_engine_cannot_the_network_runs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UsageError("head.0: no step\nfor it")

    monkeypatch.setattr(deploy, "compile", refuse)
    found = play(NMNIST, file)
    assert (found.by, found.why) == ("network", "head.0: no step for it")
    expected = [decision.label for decision in decided(network(), [recording()])]
    assert [decision.label for decision in found.decisions] == expected
    said = spikeloom("run", NMNIST, "--events", str(file)).out
    assert "  the engine cannot run this network: head.0: no step for it\n" in said


def test_a_window_is_as_long_as_in_training(file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(FOLDER / "colored_mnist_net" / "nmnist", run)
    settings = json.loads((run / "settings.json").read_text())
    settings["settings"]["data"] |= {"frames": "windows", "dt": 27.0}
    (run / "settings.json").write_text(json.dumps(settings))
    found = play(run, file)
    assert (found.window_ms, len(found.decisions)) == (27.0, 4)
    assert found.frame_events == 750


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--events", "none.bin"], "none.bin: cannot be read: No such file"),
        (["--events", "empty.bin"], "empty.bin: at byte 0 of 0: the file is empty"),
        (["--events", "silent.aedat"], "silent.aedat: no events to play"),
        (["--events", "wide.bin"], "outside the sensor of 34x34"),
        (["--events", "wide.bin", "--window-ms", "0"], "window_ms must be a number from 0.001 to 1e+06 milliseconds"),
        (["--events", "wide.bin", "--window-ms=-3"], "window_ms must be a number from 0.001"),
        (["--events", "wide.bin", "--last", "0"], "'--last'"),
        (["--events", "wide.bin", "--images", "3"], "--images is of the test data, and --events plays a recording"),
        (["--events", "wide.bin", "data.T=3"], "data.T=3 is of the test data, and --events plays a recording"),
        (["--events", "wide.bin", "--out", "nowhere/page.html"], "there is no folder nowhere"),
        (["--window-ms", "3"], "--window-ms is of a recording: add --events FILE"),
        (["events=wide.bin"], "events= is an option: write --events wide.bin"),
        (["window_ms=10"], "window_ms= is an option: write --window-ms 10"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.bin").touch()
    Path("silent.aedat").write_bytes(aedat4(made(0, 34, 34)))
    Path("wide.bin").write_bytes(five_bytes(made(50, 128, 128)))
    result = spikeloom("run", NMNIST, *words)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert message in result.err


def test_a_network_for_pictures_takes_no_events(file: Path) -> None:
    result = spikeloom("run", "weights:report_sew_resnet34/digits", "--events", str(file))
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "a network for digits takes no events: those that do are for nmnist, " in result.err


def test_the_page_draws_and_asks_for_nothing(browser: Any, file: Path, tmp_path: Path) -> None:
    play(NMNIST, file, out=tmp_path / "page.html")
    opened = Opened(browser, tmp_path / "page.html")
    assert opened("document.querySelectorAll('.main-svg').length") >= 4
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith(("data:", "blob:"))] == [
        (tmp_path / "page.html").resolve().as_uri()
    ]
