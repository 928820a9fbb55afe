"""The speed figures of the papers on parallel neurons, as measurements that recipes name."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch

from spikeloom.analyse import MEASUREMENTS, Measured
from spikeloom.bench.neurons import StepLIF, paralif_rows, psn_grid
from spikeloom.bench.timing import medians
from spikeloom.bench.write import plot_paralif, plot_psn_grid, plot_ratios
from spikeloom.errors import UsageError
from spikeloom.models import create_model
from spikeloom.neurons import NEURONS, make_neuron

Json = dict[str, Any]


@MEASUREMENTS.register
def psn_speed(largest: int = 1 << 18, repeats: int = 11) -> Measured:
    """Time of a serial LIF layer over that of a PSN layer on [T, N] (Fang et al. 2023, PSN, speed figure).

    Ratios are of the fused LIF, step ratios of one that calls PyTorch's operations step by step, as the paper's.

    Args:
        largest: number of neurons N, a power of 4; from 2^8 on.
        repeats: timed turns.
    """
    rows = list(psn_grid(repeats, largest))
    values: dict[str, float | str | bool | None] = {}
    for key in ("inference_ratio", "training_ratio", "inference_step_ratio", "training_step_ratio"):
        ratios = [row[key] for row in rows]
        values |= {f"{key}_smallest": min(ratios), f"{key}_median": statistics.median(ratios)}
        values[f"{key}_largest"] = max(ratios)
        values[f"{key}_cells_where_psn_is_faster"] = f"{sum(ratio > 1 for ratio in ratios)} of {len(rows)}"
    return Measured(values, {"serial LIF over PSN": rows}, {"speed": plot_psn_grid(rows)})


@MEASUREMENTS.register
def paralif_speed(lengths: list[int] | None = None, repeats: int = 11) -> Measured:
    """ParaLIF over serial LIF, 128 neurons, batch 1 (Yarga and Wood 2024, ParaLIF, timing figure).

    Args:
        lengths: numbers of steps; without them ten, evenly spaced from 10 to 5,000.
        repeats: timed turns.
    """
    lengths = lengths or [10 + (4990 * i + 4) // 9 for i in range(10)]
    rows = list(paralif_rows(lengths, repeats))
    last = rows[-1]
    values = {
        f"acceleration_{key}_at_{last['length']}": last[f"acceleration_over_{key}"]
        for key in ("plain_lif", "fused_lif")
    }
    return Measured(values, {"ParaLIF over a serial LIF": rows}, {"speed": plot_paralif(rows)})


_STEPS = "LIF, step by step"


def _psu_neuron(name: str, T: int) -> Callable[..., Any]:
    options: Json = {"T": T} if name in ("IPSU", "RPSU") else {}
    if name == "LIF":
        options["v_reset"] = None
    if name != "SPSN":
        options["v_threshold"] = 0.5
    return functools.partial(NEURONS[name], **options)


@MEASUREMENTS.register
def psu_speed(
    input_shape: list[int],
    model: str = "shd_net",
    batch_size: int = 64,
    steps: list[int] | None = None,
    neurons: list[str] | None = None,
    repeats: int = 5,
) -> Measured:
    """Time of a network with LIF over that of the same network with parallel units (PSU paper, speed figures).

    LIF is one fused scan, and for the step ratios PyTorch's operations at each step, as the paper's.

    Args:
        input_shape: of one step of one sample, such as [700].
        model: in the registry; called on [T, N, ...].
        batch_size: N.
        steps: numbers of steps T.
        neurons: compared with LIF; those of the paper without them.
        repeats: timed turns.

    Raises:
        UsageError: a neuron that cannot be made so.
    """
    names = neurons or ["PLIF", "SPSN", "PSU", "IPSU", "RPSU"]
    rows: list[Json] = []
    for T in steps or [4, 8, 16, 32, 64]:
        x = torch.rand(T, batch_size, *input_shape)
        networks: dict[str, Any] = {}
        for name in ["LIF", *names]:
            try:
                make_neuron(_psu_neuron(name, T), 1)
            except (TypeError, ValueError) as error:
                raise UsageError(f"psu_speed: neuron {name}: {error}") from None
            networks[name] = create_model(model, neuron=_psu_neuron(name, T), T=T, in_channels=input_shape[0])
        steps_alone = functools.partial(StepLIF, v_reset=None, v_threshold=0.5)
        networks[_STEPS] = create_model(model, neuron=steps_alone, T=T, in_channels=input_shape[0])

        def train(network: Any, x: torch.Tensor = x) -> None:
            network.train()(x).mean(0).square().sum().backward()

        @torch.no_grad()
        def test(network: Any, x: torch.Tensor = x) -> None:
            network.eval()(x)

        times = {
            key: medians({name: functools.partial(run, net) for name, net in networks.items()}, repeats)
            for key, run in (("train", train), ("test", test))
        }
        rows += [
            {
                "neuron": name,
                "T": T,
                **{f"{key}_ms": round(found[name], 3) for key, found in times.items()},
                **{f"{key}_ratio": round(found["LIF"] / found[name], 3) for key, found in times.items()},
                **{f"{key}_step_ratio": round(found[_STEPS] / found[name], 3) for key, found in times.items()},
            }
            for name in networks
        ]
    longest = [row for row in rows if row["T"] == rows[-1]["T"] and row["neuron"] not in ("LIF", _STEPS)]
    values = {
        f"{row['neuron']}_{key}_at_{row['T']}": row[key]
        for row in longest
        for key in ("train_ratio", "test_ratio", "train_step_ratio", "test_step_ratio")
    }
    return Measured(values, {"LIF over parallel units": rows}, {"speed": plot_ratios(rows)})
