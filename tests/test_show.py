"""The page of `spikeloom show`: what it holds, that its packed spikes are those of a Recorder, and how it behaves."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.browser import Opened
from helpers.command_line import spikeloom
from helpers.made_events import five_bytes, made
from helpers.made_sets import write_wav
from PIL import Image
from torch import Tensor, nn

import spikeloom as package
from spikeloom.analyse import audit
from spikeloom.analyse.activity import record_activity
from spikeloom.analyse.input_pictures import input_pictures
from spikeloom.data import create_dataset
from spikeloom.data.cache import Counts
from spikeloom.data.frame_dataset import FrameDataset
from spikeloom.data.own_files import own_files
from spikeloom.errors import UsageError
from spikeloom.layers import Conv2d
from spikeloom.models.trained_weights import FOLDER
from spikeloom.neurons import GLIF, LIF, MLF, PSN, SPSN, LeakyIntegrator
from spikeloom.notebook import html_table
from spikeloom.show import show
from spikeloom.train.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")

DIGITS = "weights:report_sew_resnet34/digits"
HOSTILE = "</script><img src=x onerror=window.hit=1>"


def data_of(page: Path) -> Any:
    """What the page's script reads."""
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text)


def unpack(layer: Any) -> Tensor:
    """The values [steps, kept] of a layer, as the script decodes them."""
    packed, size = base64.b64decode(layer["bits"]), layer["steps"] * layer["kept"]
    plane = -(-size // 8)
    values = [
        sum(((packed[p * plane + (i >> 3)] >> (i & 7)) & 1) << p for p in range(layer["planes"])) for i in range(size)
    ]
    return torch.tensor(values).view(layer["steps"], layer["kept"])


def potential(layer: Any, step: int, level: int, neuron: int) -> float:
    """As the script decodes it."""
    i = (step * layer["levels"] + level) * layer["potentials"] + neuron
    a, b, c = base64.b64decode(layer["values"])[3 * (i >> 1) : 3 * (i >> 1) + 3]
    return layer["low"] + ((b >> 4) | (c << 4) if i & 1 else a | ((b & 15) << 8)) / 4095 * (
        layer["high"] - layer["low"]
    )


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a test image."""
    page = tmp_path_factory.mktemp("shown") / "digits.html"
    show(DIGITS, page, index=2)
    return page


def recorded() -> tuple[package.Recorder, Tensor]:
    model = package.create_model("report_sew_resnet34", weights="digits")
    dataset = create_dataset("digits", None, "test")
    with torch.no_grad(), package.Recorder(model, potentials=True) as record:
        logits = model(dataset.encode(dataset.batch([2])[0]))
    return record, logits


def test_the_spikes_and_potentials_of_a_page_are_those_of_a_recorder(digits: Path) -> None:
    layers = data_of(digits)["layers"]
    record, logits = recorded()
    assert [layer["name"] for layer in layers] == list(record.spikes)
    for layer, ([spikes], [potentials]) in zip(
        layers, zip(record.spikes.values(), record.potentials.values(), strict=True), strict=True
    ):
        assert layer["kept"] == layer["neurons"] == layer["potentials"]
        assert torch.equal(unpack(layer), spikes[:, 0].flatten(1).long())
        assert layer["rates"] == pytest.approx(spikes.flatten(1).mean(1).tolist(), abs=1e-6)
        for step, neuron in ((0, 0), (1, 3), (3, layer["kept"] - 1)):
            expected = float(potentials[step, 0].flatten()[neuron])
            assert potential(layer, step, 0, neuron) == pytest.approx(
                expected, abs=(layer["high"] - layer["low"]) / 8190 + 1e-6
            )
        assert layer["thresholds"] == [1.0]
    probabilities = (logits[:, 0].cumsum(0) / torch.arange(1, 5)[:, None]).softmax(1)
    found = data_of(digits)
    assert [found["classes"][row.index(max(row))] for row in found["probabilities"]] == found["leaders"]
    assert found["leaders"] == [str(n) for n in probabilities.argmax(1).tolist()]
    for name, column in zip(found["classes"], zip(*found["probabilities"], strict=True), strict=True):
        assert list(column) == pytest.approx(probabilities[:, int(name)].tolist(), abs=1e-5)


def test_the_page_is_one_file_without_addresses(digits: Path) -> None:
    text = digits.read_text()
    assert digits.stat().st_size < 400_000
    assert "https:" not in text
    assert "http:" not in text.replace("http://www.w3.org/2000/svg", "")  # a name, which nobody fetches
    assert "default-src 'none'" in text
    assert "<p>Nothing: all spikes and potentials of all layers are in this page.</p>" in text


class Several(nn.Module):
    """Neurons of several kinds in a row, and a readout."""

    def __init__(self) -> None:
        super().__init__()
        self.levels, self.matrix, self.gated = MLF(), PSN(3), GLIF(4, 3)
        self.soft, self.drawn, self.readout = LIF(v_threshold=0.5), SPSN(), LeakyIntegrator()

    def forward(self, x: Tensor) -> Tensor:
        x = self.levels(3 * x.expand(3, *x.shape)) + self.matrix(x.expand(3, *x.shape))
        return self.readout(self.drawn(self.soft(self.gated(x).flatten(2)[..., :10])))


def test_neurons_of_other_kinds() -> None:
    model, x = Several(), torch.rand(1, 4, 5, 6)
    found = record_activity(model, x)
    layers = {layer.name: layer for layer in found.layers}
    assert found.others == (("readout", "LeakyIntegrator"),)
    assert layers["levels"].planes == 2
    assert (layers["levels"].levels, layers["levels"].thresholds) == (3, (0.6, 1.6, 2.6))
    assert layers["matrix"].thresholds == (0.0,)
    assert (layers["gated"].potentials, layers["gated"].why) == (0, "GLIF does not tell its potentials")
    assert layers["soft"].thresholds == (0.5,)
    assert layers["drawn"].thresholds == ()
    with package.Recorder(model, potentials=True, only={"levels"}) as record:
        model(x)
    values, level = vars(layers["levels"]), record.potentials["levels"][0]
    assert torch.equal(unpack(values), record.spikes["levels"][0][:, 0].flatten(1).long())
    assert unpack(values).max() > 1
    for step, k, neuron in ((0, 0, 0), (1, 2, 7), (2, 1, 119)):
        expected = float(level[step, k, 0].flatten()[neuron])
        assert potential(values, step, k, neuron) == pytest.approx(
            expected, abs=(values["high"] - values["low"]) / 8000
        )
    assert record_activity(model, x).layers == found.layers  # spikes that are drawn are the same every time


def test_what_is_left_out_of_huge_layers_is_said() -> None:
    class Huge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.large, self.small = Conv2d(1, 40, 3, padding=1), LIF(v_threshold=0.1), LIF()

        def forward(self, x: Tensor) -> Tensor:
            x = self.large(self.conv(x.expand(8, *x.shape)))
            return self.small(x.mean((3, 4)))

    found = record_activity(Huge(), torch.rand(1, 1, 300, 300))
    large, small = found.layers
    assert (small.kept, small.potentials, small.left_out()) == (40, 40, "")
    assert large.kept == 9 * 300 * 300  # whole channels
    assert large.left_out().startswith("spikes of the first 9 of 40 channels and potentials of the first ")
    assert large.potentials % 300 == 0
    assert len(large.bits) + len(large.values) < 2_800_000
    assert large.rate == pytest.approx(found.rates["large"], abs=1e-6)  # of all neurons
    only = record_activity(Huge(), torch.rand(1, 1, 300, 300), ["small"])
    assert [layer.name for layer in only.layers] == ["small"]
    assert list(only.rates) == ["large", "small"]


@pytest.mark.slow
def test_the_page_of_a_large_network_is_small(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(tmp_path / "x.png")
    show("weights:report_sew_resnet34/cifar10", tmp_path / "page.html", tmp_path / "x.png")
    assert (tmp_path / "page.html").stat().st_size < 3_000_000


def test_recordings_and_sound(tmp_path: Path) -> None:
    (tmp_path / "own.bin").write_bytes(five_bytes(made(3000, 34, 34, 1)))
    found = show("weights:nmnist", tmp_path / "events.html", tmp_path / "own.bin")
    data, text = data_of(tmp_path / "events.html"), (tmp_path / "events.html").read_text()
    assert len(data["frames"]) == data["steps"] == 10
    assert len(set(data["frames"])) == 10
    assert "ON events red and OFF events blue" in text
    assert found.decision.truth is None
    assert found.source == str(tmp_path / "own.bin")
    samples = np.random.default_rng(0).integers(-9000, 9000, 3000).astype(np.int16)
    write_wav(tmp_path / "own.wav", samples)
    found = show("weights:paralif_shd/fsdd", tmp_path / "sound.html", tmp_path / "own.wav")
    data = data_of(tmp_path / "sound.html")
    assert (data["frames"], data["moving"], data["steps"]) == ([], True, 100)
    assert data["layers"][0]["picture"] is None  # a raster
    assert "its output is no spikes" in " ".join(found.left_out)


def test_pictures_of_each_kind_of_input(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), (255, 0, 0)).save(tmp_path / "red.png")

    def pictures(name: str, **options: Any) -> Any:
        dataset = own_files(name, options, [tmp_path / "red.png"], 10)
        return input_pictures(dataset, dataset.batch([0])[0][0])

    image = pictures("cifar10")
    assert (image.kind, image.words) == ("image", "Picture of 32 x 32 pixels, which the network sees at every step")
    (tmp_path / "again.png").write_bytes(base64.b64decode(image.pngs[0]))
    assert Image.open(tmp_path / "again.png").getpixel((5, 5)) == (255, 0, 0)
    assert pictures("sequential_cifar10").kind == "columns"
    labels = torch.zeros(1, dtype=torch.int64)
    noise = np.random.default_rng(0).integers(0, 9, (300, 2, 40, 40)).astype(np.uint8)
    frames = FrameDataset(Counts(noise, np.array([0, 300])), labels, name="x", title="x", classes=["a"])
    found = input_pictures(frames, frames.batch([0])[0][0])
    assert sum(map(len, found.pngs)) <= 220_000
    assert found.left_out.startswith("Only the first ")
    assert found.kind == "frames"


def test_the_command(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = spikeloom("show", DIGITS, "--index", "2", "--layer", "stem_spike.neuron", "--out", str(page), "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert found["page"] == str(page)
    assert found["class"] == found["leaders"][-1] == found["true_class"]
    assert found["probabilities"][-1][found["class"]] == found["probability"] > 0.5
    assert len(found["rates"]) == 31
    assert "30 layers that --layer does not name" in found["left_out"][0]
    assert [layer["name"] for layer in data_of(page)["layers"]] == ["stem_spike.neuron"]
    said = spikeloom("show", DIGITS, "--index", "2", f"--out={page}").out.splitlines()
    assert said[0].startswith("sample 2 of digits (scikit-learn): ")
    assert said[1] == f"page: {page}"


def test_the_page_lies_in_the_run_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FOLDER / "report_sew_resnet34" / "digits", tmp_path / "run")
    assert spikeloom("show", "run").out.endswith(f"page: {Path('run') / 'show.html'}\n")
    assert Path("run/show.html").is_file()
    assert Path("runs/report_sew_resnet34-digits/show.html") == Path(
        json.loads(spikeloom("show", DIGITS, "--json").out)["page"]
    )
    assert not (FOLDER / "report_sew_resnet34" / "digits" / "show.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--index", "100000"], "--index must lie from 0 to "),
        (["--layer", "stem_spike.neurons"], "no layer of neurons 'stem_spike.neurons'; did you mean stem_spike.neuron"),
        (["none.png"], "none.png: no such file"),
        (["folder"], "folder: a folder: name one of its files"),
        (["a.png", "b.png"], "show takes one file, got 2: a.png, b.png"),
        (["a.png", "--index", "1"], "--index is of the test data, and a.png is a file"),
        (["a.png", "data.size=20"], "data.* is of the test data, and a.png is a file"),
        (["size=20"], "unknown key 'size'"),
        (["--out", "nowhere/page.html"], "there is no folder nowhere"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    result = spikeloom("show", DIGITS, *words, *([] if "--out" in words else ["--out", "page.html"]))
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert message in result.err
    assert not (tmp_path / "page.html").exists()


def test_data_that_are_not_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPIKELOOM_DATA", raising=False)
    result = spikeloom("show", "weights:nmnist", f"--out={tmp_path / 'page.html'}")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "data.root=FOLDER" in result.err
    assert result.err.endswith("; or name a file to show\n")


def test_a_file_that_does_not_fit_the_network_is_one_line(tmp_path: Path) -> None:
    run, recording = tmp_path / "run", tmp_path / "a.bin"
    shutil.copytree(FOLDER / "colored_mnist_net" / "nmnist", run)
    settings = json.loads((run / "settings.json").read_text())
    settings["settings"]["data"]["size"] = 40
    (run / "settings.json").write_text(json.dumps(settings))
    recording.write_bytes(five_bytes(made(300, 34, 34, 1)))
    result = spikeloom("show", str(run), str(recording))
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert f"cannot take {recording} of shape (10, 1, 2, 40, 40)" in result.err


def test_a_network_without_a_decision() -> None:
    with pytest.raises(UsageError, match=r"gives no logits \[T, 1, classes\]"):
        record_activity(nn.Sequential(LIF()), torch.rand(3, 1, 2, 2))
    with pytest.raises(UsageError, match="ran no layer that fires"):
        record_activity(nn.Sequential(LeakyIntegrator()), torch.rand(3, 1, 2))


def test_notebooks_show_runs_and_audits(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "report_sew_resnet34" / "digits", tmp_path / HOSTILE)
    run = Run.open(tmp_path / HOSTILE)
    table: Any = run._repr_html_()  # pyright: ignore[reportPrivateUsage]
    assert "<img" not in table
    assert "onerror=window.hit=1&gt;" in table
    accuracy = json.loads((run.folder / "summary.json").read_text())["test_accuracy"]
    assert re.search(rf'<th scope="row">test accuracy</th><td style="[^"]*right">{accuracy:.2f} %</td>', table)
    (run.folder / "summary.json").write_text("{")
    assert "is not valid JSON" in run._repr_html_()  # pyright: ignore[reportPrivateUsage]
    (run.folder / "summary.json").unlink()
    table = run._repr_html_()  # pyright: ignore[reportPrivateUsage]
    assert re.search(r'<th scope="row">state</th><td style="[^"]*left">unfinished, ', table)
    found = audit(package.create_model("report_sew_resnet34", T=1), torch.rand(1, 3, 16, 16))
    table = found._repr_html_()  # pyright: ignore[reportPrivateUsage]
    assert table.count("<tr>") == 1 + len(found.rows)
    assert re.search(rf'<th scope="row">{found.rows[0].name}</th><td style="[^"]*left">real</td>', table)
    table = html_table("caption", [(f"row {n}", n) for n in range(50)])
    assert table.count("<tr>") == 41  # 40, and how many more there are
    assert "and 10 more" in table


# --- in a browser -----------------------------------------------------------------------------------------------------


def test_the_script_decodes_the_spikes_and_asks_for_nothing(browser: Any, digits: Path) -> None:
    opened = Opened(browser, digits, reduced_motion="reduce")
    decoded = opened("window.spikeloom.data.layers.map(layer => window.spikeloom.unpack(layer).join(''))")
    record, _ = recorded()
    for values, [spikes] in zip(decoded, record.spikes.values(), strict=True):
        assert torch.equal(torch.tensor(list(map(int, values))), spikes.flatten().long())
    layer = data_of(digits)["layers"][0]
    assert opened("window.spikeloom.potential(window.spikeloom.data.layers[0], 1, 0, 5)") == pytest.approx(
        potential(layer, 1, 0, 5), abs=1e-9
    )
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [digits.resolve().as_uri()]


def lit(opened: Opened, layer: int) -> int:
    """Points of a layer's picture that have the colour of a spike."""
    return opened(
        f"""(() => {{
            const canvas = document.querySelector('[data-layer="{layer}"] canvas');
            const {{ data }} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
            const on = getComputedStyle(document.documentElement).getPropertyValue('--on').trim();
            const hex = (i) => '#' + [0, 1, 2].map(k => data[i + k].toString(16).padStart(2, '0')).join('');
            let count = 0;
            for (let i = 0; i < data.length; i += 4) count += hex(i) === on;
            return count;
        }})()"""
    )


def test_it_is_played_stopped_and_stepped_by_key(browser: Any, digits: Path) -> None:
    opened = Opened(browser, digits, reduced_motion="reduce")
    step = "Number(document.getElementById('step').value)"
    opened.page.wait_for_timeout(700)
    assert (opened(step), opened("document.getElementById('play').textContent")) == (1, "Play")
    spikes = unpack(data_of(digits)["layers"][3])
    for key, expected in (("ArrowRight", 2), ("End", 4), ("ArrowRight", 4), ("ArrowLeft", 3), ("Home", 1)):
        opened.page.keyboard.press(key)
        assert opened(step) == expected
        assert opened("document.getElementById('at').textContent") == f"Step {expected} of 4"
        assert lit(opened, 3) == int(spikes[expected - 1].sum())
    opened.page.keyboard.press("Space")
    assert opened("document.getElementById('play').textContent") == "Stop"
    opened.until(f"{step} > 1")
    opened.page.keyboard.press("Space")
    assert opened("document.getElementById('play').textContent") == "Play"
    opened.page.locator("#last").click()
    assert opened(step) == 4
    # Without a wish for less motion it plays by itself.
    moving = Opened(browser, digits, reduced_motion="no-preference")
    moving.until(f"{step} > 1")
    moving.page.close()


def test_a_neuron_is_chosen_by_click_and_by_number(browser: Any, digits: Path) -> None:
    opened = Opened(browser, digits, reduced_motion="reduce")
    which, layers = "document.getElementById('which').textContent", data_of(digits)["layers"]
    opened.page.locator("#layer").select_option("2")
    opened.page.locator("#neuron").fill("70")
    opened.page.locator("#neuron").press("Enter")
    name = layers[2]["name"]
    assert opened(which) == f"Membrane potential of neuron 70 of {name} (channel 1, row 0, column 6)"
    fires = int(unpack(layers[2])[:, 70].sum())
    assert opened("document.querySelectorAll('#membrane .dot').length") == 4
    assert opened("document.querySelectorAll('#membrane .dot.spike').length") == fires
    assert opened("document.querySelectorAll('#membrane .threshold').length") == 1
    assert opened("document.querySelectorAll('#values tbody tr').length") == 4
    # 16 channels of 8 x 8 in a square with gaps of a point: the second channel begins at point 9.
    box = opened.page.locator("#canvas").bounding_box()
    point = box["width"] / opened("document.getElementById('canvas').width")
    opened.page.locator("#canvas").click(position={"x": 11.5 * point, "y": 2.5 * point})
    assert opened(which).endswith("(channel 1, row 2, column 2)")
    opened.page.locator('[data-layer="5"]').click()
    assert layers[5]["name"] in opened(which)
    opened.page.locator("#neuron").fill("99999999")
    opened.page.locator("#neuron").press("Enter")
    assert opened("document.getElementById('neuron').value") == str(layers[5]["kept"] - 1)
    assert opened.said == []


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(browser: Any, digits: Path, width: int, scheme: str) -> None:
    opened = Opened(browser, digits, width, color_scheme=scheme, reduced_motion="reduce")
    assert opened("document.documentElement.scrollWidth") == width
    assert opened("getComputedStyle(document.documentElement).colorScheme") == scheme
    assert opened("[...document.images].every(i => i.alt && i.naturalWidth > 0)")
    pictures = "[...document.querySelectorAll('canvas, svg:not([aria-hidden])')]"
    assert opened(f"{pictures}.every(e => e.role === 'img' && e.ariaLabel)")
    assert opened(f"{pictures}.every(e => e.getBoundingClientRect().width > 50)")
    assert opened("[...document.querySelectorAll('input, select')].every(e => e.labels.length || e.ariaLabel)")
    assert opened("document.querySelectorAll('h1').length") == 1
    opened.page.locator("#theme").click()
    assert opened("getComputedStyle(document.documentElement).colorScheme") != scheme
    assert lit(opened, 0) == int(unpack(data_of(digits)["layers"][0])[0].sum())  # drawn anew in the other colours


def test_markup_in_names_is_text(browser: Any, tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "report_sew_resnet34" / "digits", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    summary["classes"] = [HOSTILE] * 10
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    Image.new("L", (8, 8), 99).save(tmp_path / "<b>x.png")
    show(tmp_path / "run", tmp_path / "page.html", tmp_path / "<b>x.png")
    opened = Opened(browser, tmp_path / "page.html", reduced_motion="reduce")
    opened.page.keyboard.press("ArrowRight")
    assert opened("window.hit") is None
    assert opened("document.querySelectorAll('b, img').length") == 1
    assert HOSTILE in opened("document.querySelector('.answer').textContent")
    assert opened.said == []
