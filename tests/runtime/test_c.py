"""The example in C: compiled against the library of the runtime, under valgrind, and on damaged files."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.damaged_plans import changed_tensors, changed_text, write

from spikeloom import create_model
from spikeloom.deploy import Engine, compile
from spikeloom.ops import _dispatch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_dispatch.native is None, reason="NO NATIVE KERNELS: nothing writes these networks"),
    pytest.mark.skipif(
        None in (shutil.which("cmake"), shutil.which("cc")), reason="NO CMAKE OR COMPILER: nothing is tested in C"
    ),
]

ROOT = Path(__file__).parents[2]


def check(*words: str | Path, **options: str) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=os.environ | options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    check("cmake", "-S", ROOT / "native", "-B", folder, "-DSPIKELOOM_RUNTIME=ON", "-DSPIKELOOM_FUZZ=ON")
    return folder


@pytest.fixture(scope="module")
def engine() -> Engine:
    torch.manual_seed(0)
    x = torch.rand(3, 3, 16, 16)
    model = create_model("spikingformer_4_256", T=2, channels=16, heads=2, depth=1)
    return compile(model, x, tune=False, portable=True)


def test_the_example(build: Path, engine: Engine, tmp_path: Path) -> None:
    check("cmake", "--build", build, "--target", "spikeloom", "--parallel", "2")
    source, program = ROOT / "examples" / "c" / "run.c", tmp_path / "run"
    flags = ["-std=c99", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{ROOT / 'native' / 'include'}"]
    library = [f"-L{build}", "-lspikeloom", f"-Wl,-rpath,{build}"]
    check("cc", source, *flags, *library, "-o", program)
    net, image = tmp_path / "net", tmp_path / "image.bin"
    engine.save(net)
    x = torch.rand(1, 3, 16, 16)
    image.write_bytes(x.numpy().tobytes())
    found = np.array([float(line) for line in check(program, net, image).split()], np.float32)
    assert np.array_equal(found, engine(x).flatten().numpy())
    refused = subprocess.run([program, image], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "not a safetensors file" in refused.stderr
    (snippet,) = re.findall(r"```c\n(.*?)```", (ROOT / "docs" / "deploying.md").read_text(), re.DOTALL)
    (tmp_path / "page.c").write_text(snippet)
    check("cc", tmp_path / "page.c", *flags, *library, "-o", tmp_path / "page")
    refused = subprocess.run([tmp_path / "page"], capture_output=True, text=True, cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    shutil.copy(net, tmp_path / "net.safetensors")
    silence = subprocess.run([tmp_path / "page"], capture_output=True, text=True, cwd=tmp_path)
    assert float(silence.stdout) == pytest.approx(engine(torch.zeros(1, 3, 16, 16))[0, 0, 0].item(), rel=1e-4)
    if shutil.which("valgrind") is None:
        pytest.skip("NO VALGRIND: the memory of the C interface is checked by the sanitizers alone")
    check("valgrind", "--error-exitcode=9", "--leak-check=full", "-q", program, net, image)


def test_damaged_files(build: Path, engine: Engine, tmp_path: Path) -> None:
    """3,000 of them under sanitizers: one line and exit code 2, or logits."""
    check("cmake", "--build", build, "--target", "files_fuzz", "--parallel", "2")
    plan, tensors = json.loads(engine._plan.model_dump_json()), dict(engine.tensors)
    chance, found = random.Random(11), Counter[str]()
    for first in range(0, 3000, 100):
        files = [tmp_path / str(i) for i in range(100)]
        for i, path in enumerate(files, first):
            if i % 4:
                write(path, changed_text(plan, chance, i), tensors)
            else:
                write(path, json.dumps(plan), changed_tensors(tensors, chance))
        done = subprocess.run([build / "files_fuzz", *files], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, (first, done.stderr[-2000:])
        ended = [line[-1] for line in done.stdout.splitlines() if line.startswith("ended with ")]
        assert len(ended) == 100
        errors = done.stderr.splitlines()
        assert len(errors) == ended.count("2")
        assert all(line.startswith("error: ") for line in errors)
        found.update(ended)
    assert set(found) == {"0", "2"}
    assert found["2"] > 1500
    assert found["0"] > 100
