"""NeuroBench's chaotic function prediction (Yik et al. 2025): a spiking network that continues a series by itself."""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikeloom.analyse.audit.api import audit
from spikeloom.analyse.measurements import MEASUREMENTS, Measured
from spikeloom.data import mackey_glass
from spikeloom.layers import Linear, Repeat
from spikeloom.neurons import LIF
from spikeloom.train.methods import bptt

PART = 750  # points to train on, and to forecast: ten Lyapunov times each


def smape(prediction: Tensor, target: Tensor) -> float:
    """Symmetric mean absolute percentage error, `200 mean(|p - y| / (|p| + |y|))`, from 0 to 200."""
    return 200 * float(((prediction - target).abs() / (prediction.abs() + target.abs())).mean())


class Forecaster(nn.Module):
    """The next value of a series from its last ones: two hidden layers of LIF, and the mean output of T steps.

    Args:
        series: what it was trained on, of which mean, deviation and size of steps are kept.
        window: values that it sees.
        width: neurons of a hidden layer.
        T: steps for which the window is shown.

    Shapes: [N, window] of values -> the next ones [N].
    """

    mean: Tensor
    deviation: Tensor
    change: Tensor

    def __init__(self, series: Tensor, window: int = 50, width: int = 128, T: int = 8):
        super().__init__()
        layers = (Linear(window, width), LIF(), Linear(width, width), LIF(), Linear(width, 1))
        self.net = Repeat(nn.Sequential(*layers), T)
        self.window = window
        self.register_buffer("mean", series.mean())
        self.register_buffer("deviation", series.std())
        self.register_buffer("change", series.diff().std())

    def normalised(self, x: Tensor) -> Tensor:
        """What the layers receive."""
        return (x - self.mean) / self.deviation

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1] + self.change * self.net(self.normalised(x)).mean(0)[:, 0]

    def learn(self, series: Tensor, epochs: int, lr: float, noise: float = 0.0) -> None:
        """Learns every next value of a series, all windows at once, by Adam with a cosine schedule.

        Args:
            series: [steps].
            epochs, lr: passes over all windows, and the first learning rate.
            noise: deviation of what is added to each value that is seen, of the series' own. A network that continues a
                series sees its own errors, and has to have learned how to go back from them.
        """
        clean, y = series[:-1].unfold(0, self.window, 1), series[self.window :]
        optimizer = torch.optim.Adam(self.parameters(), lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs, 1))
        for _ in range(epochs):
            x = clean + noise * self.deviation * torch.randn_like(clean)
            changes = (y - x[:, -1]) / self.change
            optimizer.zero_grad()
            bptt(self.net, self.normalised(x), changes, lambda out, y: F.mse_loss(out.mean(0)[:, 0], y))
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def continued(self, series: Tensor, count: int) -> Tensor:
        """The next `count` values of a series, each from those before it, own predictions among them."""
        values = series[-self.window :]
        for _ in range(count):
            values = torch.cat((values, self(values[None, -self.window :])))
        return values[self.window :]


@MEASUREMENTS.register
def mackey_glass_forecast(
    series: int = 30,
    epochs: int = 1000,
    window: int = 50,
    width: int = 128,
    T: int = 8,
    lr: float = 3e-3,
    noise: float = 0.01,
) -> Measured:
    """Ten Lyapunov times of Mackey-Glass, forecast from ten: sMAPE, and NeuroBench's figures of one prediction.

    Args:
        series: how many, each half a Lyapunov time behind the one before, with a network of its own.
        epochs: passes over the 700 windows of a series.
        window, width, T: of the network.
        lr: the first learning rate.
        noise: as `Forecaster.learn`.
    """
    first = [75 * n // 2 for n in range(series)]
    values = mackey_glass(first[-1] + 2 * PART + 1).float()
    measured, errors, model = Measured(), list[float](), None
    for start in first:
        known, coming = values[start:][: PART + 1], values[start + PART + 1 :][:PART]
        model = Forecaster(known[:PART], window, width, T)
        model.learn(known[:PART], epochs, lr, noise)
        errors.append(smape(model.continued(known, PART), coming))
    assert model is not None
    # One prediction is one image of an audit: the windows of the last series.
    found = audit(model.net, model.normalised(values[first[-1] :][:PART].unfold(0, window, 1)))
    mean = values[:PART].mean().expand(PART)
    measured.values = {
        "sMAPE": statistics.mean(errors),
        "deviation over series": statistics.stdev(errors) if series > 1 else None,
        "sMAPE of a constant, the mean": smape(mean, values[PART + 1 :][:PART]),
        "footprint": found.footprint,
        "activation sparsity": found.activation_sparsity,
        "effective MACs": found.effective_macs,
        "effective ACs": found.effective_acs,
        "dense operations": sum(row.operations for row in found.rows),
    }
    rows: list[dict[str, Any]] = [{"first point": n, "sMAPE": e} for n, e in zip(first, errors, strict=True)]
    measured.tables["series"] = rows
    return measured
