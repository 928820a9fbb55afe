"""Shared fixtures: seeds, the native library, reference files kept beside the repository."""

from __future__ import annotations

import os

# Tests run in as many processes as the machine has cores (pyproject.toml), so each computes on one: threads that wait
# for each other on cores that are taken cost several times the work. Before PyTorch is imported, which reads it once.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # of tests of two threads: they do not spin on a taken core
    os.environ.pop("COLUMNS", None)  # a terminal's width, which such a process has not

import contextlib
import gc
import logging
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden_vectors import Golden, golden_folder, shared_folder

from spikeloom.ops import _dispatch

QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

# pytest listens to every logger, and PyTorch writes traces of all that it exports or compiles once somebody listens.
logging.getLogger("torch.__trace").addHandler = lambda hdlr: None
# Exported graphs would keep, at every node, where it comes from: a walk through all frames of pytest.
torch.fx.config.do_not_emit_stack_traces = True


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Modules and tests stay to the end: to look through them for garbage took a fourth of the time of collection."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    # `torch.manual_seed` also queues seeds for accelerators that are not there, with a traceback each: 0.4 ms.
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Frames that tests make do not go to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPIKELOOM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch computes on one core while a module's tests run: sums are then added in one order everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def native() -> Iterator[Any]:
    """The native library; its instruction level and the number of threads are restored afterwards."""
    if _dispatch.native is None:
        pytest.skip("spikeloom is installed WITHOUT its native kernels: nothing of them is tested")
    level, threads = _dispatch.native.level(), torch.get_num_threads()
    yield _dispatch.native
    _dispatch.native.set_level(level)
    torch.set_num_threads(threads)


@pytest.fixture
def dirty_memory() -> Iterator[None]:
    """Every new tensor starts as NaN: what a kernel does not write shows."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture
def dyadic() -> Callable[..., torch.Tensor]:
    """Random multiples of 1/8, on which the arithmetic of `tau = 2` and `T <= 16` is exact."""

    def make(*shape: int, low: float = -1.0, high: float = 2.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randint(round(low * 8), round(high * 8) + 1, shape).to(dtype) / 8

    return make


@pytest.fixture
def tracks() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """The largest difference of two tensors, relative to the largest value of the second."""

    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        assert a.shape == b.shape
        a, b = a.double(), b.double()
        assert a.isfinite().all()
        return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() if a.numel() else 0.0

    return difference


@pytest.fixture(scope="session")
def data_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """The root of a data set by its name: one for all, of real files where they are at hand, or else of made ones.

    Each set of a user's own files has a root of its own.
    """
    from helpers.made_sets import MADE, SAME_FILES
    from torchvision.datasets import CIFAR100

    from spikeloom.data import SOURCES

    common, real = tmp_path_factory.mktemp("data"), shared_folder() / "data"
    roots: dict[str, Path] = {"digits": common}

    def find(name: str) -> Path:
        files = SAME_FILES.get(name, name)
        if files in roots:
            return roots[files]
        source = SOURCES[files]
        if source.classes and source.is_in(real):
            top = next(iter(next(paths for paths in source.found(real) if all(paths.values())))).split("/")[0]
            (common / top).symlink_to(real / top)
            roots[files] = common
        else:
            roots[files] = MADE[files](common if source.classes else tmp_path_factory.mktemp(files))
        return roots[files]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("train_list", "test_list", "meta"):
            patch.setattr(CIFAR100, name, getattr(CIFAR100, name))  # made files have other checksums
        yield find


@pytest.fixture(scope="session")
def golden() -> Golden:
    """The golden vectors of neurons."""
    return golden_folder("neurons")


@pytest.fixture(scope="session")
def golden_networks() -> Golden:
    """The golden vectors of networks, blocks and modules."""
    return golden_folder("networks")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a network."""
    playwright = pytest.importorskip("playwright.sync_api", reason="PLAYWRIGHT IS MISSING: the page is not looked at")
    system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as tool:
        if system is None and not Path(tool.chromium.executable_path).exists():
            pytest.skip("NO CHROMIUM ON THIS MACHINE: the page is not looked at; install the package chromium")
        with contextlib.closing(tool.chromium.launch(executable_path=system, args=list(QUIET))) as found:
            yield found
