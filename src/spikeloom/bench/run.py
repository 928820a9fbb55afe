"""The benchmarks that the command line offers, whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from spikeloom.bench import neurons
from spikeloom.bench.write import plot_psn_grid, write_results

Json = dict[str, Any]


def bench_neurons(folder: Path, quick: bool, tell: Callable[[Json], None] | None) -> dict[str, list[Json]]:
    """Measures every neuron and writes tables, and unless `quick` the plot of the PSN paper's speed figure.

    Args:
        folder: where `neurons.json`, `neurons.md` and `psn_speed.html` go.
        quick: two lengths and few turns instead of all.
        tell: is given every row as it is measured.
    """
    steps = (4, 64) if quick else neurons.STEPS
    lengths = [10, 565] if quick else [10, 565, 2782, 5000]
    repeats = 5 if quick else 11
    shapes = [[T, 32, 256] for T in steps] + ([] if quick else [[4, 32, 64, 32, 32]])

    def collect(rows: Iterable[Json]) -> list[Json]:
        found: list[Json] = []
        for row in rows:
            found.append(row)
            if tell is not None:
                tell(row)
        return found

    tables = {
        "neurons, forward and backward": collect(neurons.rows(shapes, repeats)),
        "leaky integration, scan and FFT": collect(neurons.filter_rows(steps, repeats)),
        "ParaLIF over a serial LIF": collect(neurons.paralif_rows(lengths, repeats)),
    }
    if not quick:
        tables["serial LIF over PSN"] = collect(neurons.psn_grid(repeats))
    write_results(folder, "neurons", tables)
    if not quick:
        plot_psn_grid(tables["serial LIF over PSN"]).write_html(str(folder / "psn_speed.html"), include_plotlyjs=True)
    return tables
