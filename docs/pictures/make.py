"""Makes the README's pictures: spikes of a trained network, speed against rivals, and the page of the report.

    python docs/pictures/make.py

Weights come with the package, digits with scikit-learn, and times from results/bench. The drawings of docs/inside are
written by hand.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import spikeloom

HERE = Path(__file__).parent
BENCH = HERE.parents[1] / "results" / "bench"
STYLE = """<style>
  .bg { fill: #ffffff; } .ink { fill: #1d2733; } .soft { fill: #5b6875; } .off { fill: #e8edf2; }
  .on { fill: #c96f2f; } .ours { fill: #2a7fba; } .rival { fill: #aab6c1; }
  text { font: 14px system-ui, sans-serif; } .small { font-size: 12px; } .bold { font-weight: 600; }
  @media (prefers-color-scheme: dark) {
    .bg { fill: #16191d; } .ink { fill: #e4e9ee; } .soft { fill: #a3afba; } .off { fill: #242b32; }
    .on { fill: #e07b39; } .ours { fill: #5aa9dd; } .rival { fill: #55626e; }
  }
</style>"""


def svg(name: str, width: int, height: int, title: str, parts: list[str], style: str = "") -> None:
    """Writes a picture that is readable on a light and on a dark page."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    lines = [f'{head} role="img" aria-labelledby="t">', f'<title id="t">{title}</title>', STYLE, style]
    lines += [f'<rect class="bg" width="{width}" height="{height}" rx="10"/>', *parts, "</svg>"]
    (HERE / f"{name}.svg").write_text("\n".join(line for line in lines if line) + "\n")


def text(x: float, y: float, words: str, kind: str = "ink", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{words}</text>'


def rect(x: float, y: float, width: float, height: float, kind: str, more: str = "") -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"{more}/>'


# --- spikes -----------------------------------------------------------------------------------------------------------

LAYER, CELL, SECONDS = "stem_spike.neuron", 5, 1.0


def spikes(index: int = 5) -> None:
    """A digit, what 16 channels of the first layer fire at each of four steps, and the decision after each."""
    digits = spikeloom.data.create_dataset("digits", None, "test")
    x, y = digits.batch([index])
    model = spikeloom.create_model("report_sew_resnet34", weights="digits")
    with spikeloom.Recorder(model, spikes=True, only={LAYER}) as record, torch.no_grad():
        logits = model(x)[:, 0]
    fired = record.spikes[LAYER][0][:, 0].bool()  # [T, channels, H, W]
    T, channels = fired.shape[:2]
    beliefs = [logits[: t + 1].mean(0).softmax(0) for t in range(T)]
    picture = (x[0, 0] - x.min()) / (x.max() - x.min())
    parts = [text(20, 30, "input", "ink bold"), text(195, 30, "spikes of the first layer", "ink bold")]
    parts.append(text(520, 30, "decision", "ink bold"))
    for row in range(8):
        for column in range(8):
            shade = f' fill-opacity="{picture[row, column].item():.2f}"'
            parts.append(rect(20 + 18 * column, 50 + 18 * row, 17, 17, "ink", shade))
    for channel in range(channels):
        left, top = 195 + (channel % 6) * 50, 50 + channel // 6 * 50
        parts.append(rect(left - 1, top - 1, 8 * CELL + 2, 8 * CELL + 2, "off", ' rx="2"'))
    for t in range(T):
        parts.append(f'<g class="step s{t}">')
        for channel, row, column in fired[t].nonzero().tolist():
            left, top = 195 + (channel % 6) * 50 + column * CELL, 50 + channel // 6 * 50 + row * CELL
            parts.append(rect(left, top, CELL, CELL, "on"))
        for digit, belief in enumerate(beliefs[t].tolist()):
            parts.append(rect(545, 50 + 15 * digit, max(1, 150 * belief), 11, "ours" if digit == int(y) else "rival"))
        parts += [text(195, 225, f"step {t + 1} of {T}", "soft small"), "</g>"]
    parts += [text(525, 60 + 15 * digit, str(digit), "soft small") for digit in range(10)]
    total = SECONDS * T
    frames = "\n".join(f"  .s{t} {{ animation-delay: {SECONDS * t:g}s; }}" for t in range(T))
    share = 100 / T
    style = f"""<style>
  .step {{ opacity: 0; animation: play {total:g}s steps(1) infinite; }}
  @keyframes play {{ 0% {{ opacity: 1; }} {share:g}% {{ opacity: 0; }} }}
{frames}
  @media (prefers-reduced-motion: reduce) {{ .step {{ animation: none; }} .s{T - 1} {{ opacity: 1; }} }}
</style>"""
    rate = 100 * fired.float().mean().item()
    title = f"A handwritten {int(y)}, the spikes of 16 channels at each of {T} steps, and the decision after each step"
    parts.append(text(20, 225, f"{rate:.0f} % fire at a step", "soft small"))
    svg("spikes", 720, 240, title, parts, style)


# --- speed ------------------------------------------------------------------------------------------------------------


def _only(rows: list[dict[str, Any]], **columns: Any) -> dict[str, Any]:
    [row] = [row for row in rows if all(row[key] == value for key, value in columns.items())]
    return row


def speed() -> None:
    """A training step and an inference beside their rivals."""
    steps = json.loads((BENCH / "training.json").read_text())["training steps"]
    networks = json.loads((BENCH / "inference.json").read_text())["networks"]
    step = _only(steps, network="report_sew_resnet34", precision="fp32", kernels="avx2")
    run = _only(networks, kernels="avx2", run="report/table1#s0t1a (short)", batch=64)
    training = [("Spikeloom", "ours_ms"), ("the same with ReLU", "relu_ms"), ("SpikingJelly", "spikingjelly_ms")]
    inference = [("Spikeloom's engine", "engine_ms"), ("torch.compile", "compiled_ms"), ("PyTorch", "dense_ms")]
    inference += [("SpikingJelly", "spikingjelly_ms"), ("ONNX Runtime", "onnx_ms")]
    parts: list[str] = []
    top = 30
    for title, row, bars in (
        ("A training step of SEW-ResNet-34, 64 images, T = 6", step, training),
        ("Inference of a spiking VGG-16, 64 images", run, inference),
    ):
        parts.append(text(20, top, title, "ink bold"))
        longest = max(row[key] for _, key in bars)
        for place, (name, key) in enumerate(bars):
            y = top + 14 + 24 * place
            parts.append(text(150, y + 13, name, "ink small", "end"))
            parts.append(rect(160, y, 440 * row[key] / longest, 17, "rival" if place else "ours", ' rx="3"'))
            parts.append(text(168 + 440 * row[key] / longest, y + 13, f"{row[key]:.0f} ms", "soft small"))
        top += 14 + 24 * len(bars) + 36
    parts.append(
        text(20, top - 10, "Two cores of an AMD EPYC of 2021 (AVX2), float32, recorded in results/bench", "soft small")
    )
    svg("speed", 720, top + 6, "Milliseconds of a training step and of an inference, beside rivals", parts)


# --- report -----------------------------------------------------------------------------------------------------------


def report() -> None:
    """Firing rates and spikes on the report's page of the digits network, as Chromium shows it."""
    from playwright.sync_api import sync_playwright

    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "spikeloom", "report", "weights:digits"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    [page] = folder.rglob("report.html")
    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path="/usr/bin/chromium")
        sheet = browser.new_page(viewport={"width": 1100, "height": 900}, color_scheme="light")
        sheet.goto(page.as_uri())
        sheet.wait_for_timeout(1500)
        top = sheet.locator("#rates").bounding_box()["y"]
        clip = {"x": 0, "y": top, "width": 1100, "height": 940}
        sheet.screenshot(path=HERE / "report.jpg", type="jpeg", quality=70, full_page=True, clip=clip)
        browser.close()


if __name__ == "__main__":
    for draw in (spikes, speed, report):
        draw()
