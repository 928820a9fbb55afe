"""Linear layers whose weights reach back in time by delays that are learned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikeloom.checks import count
from spikeloom.neurons.base import Stateful
from spikeloom.stream import State

NARROWEST = 0.23  # steps: less than half a step, so that a delay is one step and hardly its neighbours
UNIT = 100.0  # steps: what a delay is kept in


class DelayedLinear(Stateful):
    """A linear layer without bias in which every weight has a delay (Hammouamri et al. 2024, Eqs. 6-9).

        Y[t, o] = sum_i w[o, i] sum_d g(d; p[o, i]) X[t - d, i],    g ~ exp(-(d - p)^2 / (2 sigma^2)), sum_d g = 1

    While training, a delay p is blurred by a Gaussian over the steps, so that it has a gradient. Its width falls from
    `steps` / 2 to 0.23 over the first quarter of training (`start_epoch`, as the released code). In evaluation p is
    rounded, and g is one step; `audit` still counts a convolution over all `steps`.

    Delays are kept in hundreds of steps: a step of Adam at the weights' rate of 1e-3 moves them by 0.1, which is the
    paper's rate for them.

    Args:
        in_features, out_features: of a step.
        steps: how many a weight can choose from; the longest delay is one less.

    Parameters: `weight` [out, in], Kaiming-uniform; `delay` [out, in], uniform from 0 to the longest. The buffer
    `sigma` is saved with them. Under a Stream it keeps the last `steps` - 1 inputs.

    Shapes: [T, N, in_features] -> [T, N, out_features].
    """

    sigma: Tensor

    def __init__(self, in_features: int, out_features: int, steps: int):
        super().__init__()
        shape = (count("out_features", out_features), count("in_features", in_features))
        self.steps = count("steps", steps)
        self.weight = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(shape), nonlinearity="relu"))
        self.delay = nn.Parameter(torch.rand(shape) * (steps - 1) / UNIT)
        self.register_buffer("sigma", torch.tensor(max(steps / 2, NARROWEST)))

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Narrows the blur, by the same factor each epoch of the first quarter."""
        first = max(self.steps / 2, NARROWEST)
        done = min(1.0, 4 * epoch / epochs)
        self.sigma.fill_(first * (NARROWEST / first) ** done)

    def kernel(self) -> Tensor:
        """The weights over delays, the longest first: [out, in, steps]."""
        delay = (UNIT * self.delay).clamp(0, self.steps - 1)
        back = torch.arange(self.steps - 1, -1, -1, device=delay.device, dtype=delay.dtype)
        if self.training:
            g = torch.softmax(-0.5 * ((back - delay.unsqueeze(2)) / self.sigma.to(delay)).square(), 2)
        else:
            g = (back == delay.round().unsqueeze(2)).to(delay.dtype)
        return self.weight.unsqueeze(2) * g

    def run(self, x: Tensor, state: Tensor | None, keep: bool) -> tuple[Tensor, State]:
        if x.dim() != 3 or x.shape[2] != self.weight.shape[1]:
            raise ValueError(f"DelayedLinear takes [T, N, {self.weight.shape[1]}], got shape {tuple(x.shape)}")
        if state is not None and state.shape[1] != x.shape[1]:
            raise ValueError(
                f"DelayedLinear carries the inputs of a batch of {state.shape[1]}, got {x.shape[1]}: use a new Stream"
            )
        seen = x if state is None else torch.cat([state, x])
        missing = self.steps - 1 - (seen.shape[0] - x.shape[0])
        y = F.conv1d(F.pad(seen.permute(1, 2, 0), (missing, 0)), self.kernel())
        # Copied, so that a step of a chunk does not keep the whole.
        queue = seen[max(0, seen.shape[0] - self.steps + 1) :].clone() if keep else None
        return y.permute(2, 0, 1), queue

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}, steps={self.steps}"
