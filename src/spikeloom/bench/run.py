"""The benchmarks that the command line offers, whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from spikeloom.analyse.plots import FOLDER, write_figure
from spikeloom.bench import audit, events, methods, neurons
from spikeloom.bench.write import plot_psn_grid, write_results
from spikeloom.files import PathLike

Json = dict[str, Any]


def bench_neurons(folder: PathLike, quick: bool, tell: Callable[[Json], None] | None) -> dict[str, list[Json]]:
    """Measures every neuron and writes tables, and unless `quick` the data of the PSN paper's speed figure.

    Args:
        folder: where `neurons.json`, `neurons.md` and `figures/psn_speed.json` go.
        quick: two lengths and few turns instead of all.
        tell: is given every row as it is measured.
    """
    steps = (4, 64) if quick else neurons.STEPS
    lengths = [10, 565] if quick else [10, 565, 2782, 5000]
    repeats = 5 if quick else 11
    shapes = [[T, 32, 256] for T in steps] + ([] if quick else [[4, 32, 64, 32, 32]])

    tables = {
        "neurons, forward and backward": _collect(neurons.rows(shapes, repeats), tell),
        "leaky integration, scan and FFT": _collect(neurons.filter_rows(steps, repeats), tell),
        "ParaLIF over a serial LIF": _collect(neurons.paralif_rows(lengths, repeats), tell),
    }
    if not quick:
        tables["serial LIF over PSN"] = _collect(neurons.psn_grid(repeats), tell)
    write_results(folder, "neurons", tables)
    if not quick:
        write_figure(Path(folder) / FOLDER / "psn_speed.json", plot_psn_grid(tables["serial LIF over PSN"]))
    return tables


def bench_events(
    folder: PathLike, quick: bool, tell: Callable[[Json], None] | None, data: PathLike | None = None
) -> dict[str, list[Json]]:
    """Measures how fast recordings are cut into frames and read.

    Args:
        folder: where `events.json` and `events.md` go.
        quick, tell: as `bench_neurons`.
        data: a folder with event files; without it only a made recording is cut.
    """
    repeats = 5 if quick else 11
    tables = {
        "frames, millions of events a second": _collect(events.frame_rows(data, repeats), tell),
        "reading": _collect(events.read_rows(data, repeats), tell),
    }
    write_results(folder, "events", tables)
    return tables


def bench_audit(folder: PathLike, quick: bool, tell: Callable[[Json], None] | None) -> dict[str, list[Json]]:
    """Measures what `analyse.audit` costs over a plain inference of the same batches.

    Args:
        folder: where `audit.json` and `audit.md` go.
        quick: the small network alone.
        tell: as `bench_neurons`.
    """
    cases, repeats = (audit.SMALL, 5) if quick else (audit.CASES, 11)
    tables = {"audit and inference, ms a batch": _collect(audit.rows(cases, repeats), tell)}
    write_results(folder, "audit", tables)
    return tables


def _collect(rows: Iterable[Json], tell: Callable[[Json], None] | None) -> list[Json]:
    found: list[Json] = []
    for row in rows:
        found.append(row)
        if tell is not None:
            tell(row)
    return found


def bench_methods(
    folder: PathLike, quick: bool, tell: Callable[[Json], None] | None, model: str = "report_sew_resnet34"
) -> dict[str, list[Json]]:
    """Measures time and peak memory of a training step over T: BPTT, SLTT, and SpikingJelly with BPTT.

    Args:
        folder: where `methods-<model>.json`, `.md` and `figures/methods-<model>.json` go.
        quick: T = 2 and 8 with small batches instead of all.
        tell: is given every row as it is measured.
        model: in the registry; it takes images.
    """
    steps, batch, turns = ((2, 8), 4, 1) if quick else (methods.STEPS, 8, 3)
    found = _collect(methods.rows(model, steps, batch, turns), tell)
    spreads: list[Json] = [
        {"contender": contender, "spread_percent": round(methods.spread(found, contender), 2)}
        for contender in dict.fromkeys(row["contender"] for row in found)
    ]
    tables = {"time and peak memory of a training step": found, "highest over lowest peak memory": spreads}
    write_results(folder, f"methods-{model}", tables)
    write_figure(Path(folder) / FOLDER / f"methods-{model}.json", methods.plot(found))
    return tables
