"""What every neuron layer is: parameters, and a run over a sequence from a given state."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spikeloom.encode import floating
from spikeloom.errors import UsageError
from spikeloom.stream import State, at_rest, detach, exchange, streaming


class Stateful(nn.Module):
    """A layer whose output depends on the steps before.

    A subclass defines `run`. It keeps no state: a plain call starts from rest, and under a `Stream` the state
    comes from, and goes back to, the Stream.
    """

    def run(self, x: Tensor, state: State, keep: bool) -> tuple[Tensor, State]:
        """Runs x from `state` (None: rest); returns the output and, if `keep`, the state after the last step."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The output of a sequence.

        Raises:
            TypeError: x is no real tensor.
            ValueError: x has no steps, or a shape that the layer does not take.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():  # pyright: ignore[reportUnnecessaryIsInstance]
            x = floating(x, self)
        if x.dim() < 2 or x.shape[0] == 0:
            raise ValueError(f"neurons take a sequence [T, N, ...] of at least one step, got shape {tuple(x.shape)}")
        if at_rest():
            return self.run(x, None, False)[0]
        if streaming():
            return exchange(self, lambda state: self.run(x, state, True))
        return self._run_detached(x)

    def _run_detached(self, x: Tensor) -> Tensor:
        state, outputs = None, list[Tensor]()
        for x_t in x:
            output, state = self.run(x_t[None], detach(state), True)
            outputs.append(output)
        return torch.cat(outputs)


class Neuron(Stateful):
    """A layer of neurons, one per element of x[0].

    Shapes: input [T, N, ...] -> output [T, N, ...]. Integers and booleans become the default float type.

    Attributes:
        fires: whether the output is spikes, whose mean is a firing rate; a leaky readout gives its potential.
    """

    fires: ClassVar[bool] = True

    def _potentials(self, x: Tensor, state: State) -> Tensor:
        """What `potentials` gives, of a floating-point x."""
        raise NotImplementedError(f"{type(self).__name__} does not expose its potentials")

    @property
    def has_potentials(self) -> bool:
        """Whether `potentials` gives them; neurons without such a method refuse."""
        return type(self)._potentials is not Neuron._potentials

    def potentials(self, x: Tensor, state: State = None) -> Tensor:
        """The potentials [T, N, ...] that decide the spikes of `run(x, state)`, without gradients."""
        with torch.no_grad():
            return self._potentials(floating(x, self), state)


def check_state(module: nn.Module, state: Tensor | None, x: Tensor, extra: tuple[int, ...] = ()) -> None:
    """Refuses a carried state of another batch than x's; `extra` are the state's own leading axes."""
    if state is not None and state.shape != (*extra, *x.shape[1:]):
        raise ValueError(
            f"{type(module).__name__} carries the state of a batch of shape {tuple(state.shape[len(extra) :])}, but a "
            f"step is now {tuple(x.shape[1:])}: use a new Stream, or stream.reset(), for another batch"
        )


def check_factory(factory: object) -> None:
    """Refuses what cannot make a layer of neurons for every place in a network.

    Raises:
        UsageError: a name, a layer, or anything else that is not a class or function.
    """
    if callable(factory) and not isinstance(factory, nn.Module):
        return
    given = repr(factory) if isinstance(factory, str) else f"a {type(factory).__name__}"
    raise UsageError(
        f"neuron must be a class or function that makes a new layer for every place in the network, such as "
        f"spikeloom.neurons.LIF or `lambda: LIF(tau=4.0)`, got {given}"
    )


def make_neuron(factory: Callable[..., nn.Module], channels: int) -> nn.Module:
    """A neuron layer from a factory; one that takes `channels` or `features` (GLIF, recurrent layers) is told.

    Raises:
        UsageError: it is no factory (`check_factory`), needs other arguments, or makes no layer.
    """
    check_factory(factory)
    parameters = inspect.signature(factory).parameters
    told = {name: channels for name in ("channels", "features") if name in parameters}
    needs = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if missing := [name for name in needs if name not in told]:
        name = getattr(factory, "__name__", type(factory).__name__)
        given = ", ".join(f"{key}=..." for key in missing)
        raise UsageError(f"neuron {name} needs {' and '.join(missing)}: give lambda: {name}({given})")
    made = factory(**told)
    if not isinstance(made, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(f"neuron must make a layer, a torch.nn.Module; it made {made!r}")
    return made


def describe(**settings: Any) -> str:
    """`name=value` pairs for `extra_repr`."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())
