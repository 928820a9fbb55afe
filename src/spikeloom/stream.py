"""State between calls: a plain call starts from rest, a `Stream` remembers.

Neurons keep nothing. While a Stream calls its model, each neuron asks `exchange` for the state it left
at the end of the previous call, and leaves the new one. The Stream owns all of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from spikeloom.documentation import page

State = Any
"""A tensor, or a tuple of tensors and numbers, as the neuron defines it; None is rest."""

Output = TypeVar("Output")


class _Local(threading.local):
    states: _States | None = None
    recomputing: bool = False
    detached: bool = False


_local = _Local()


class _States:
    """States before and after one call of a model."""

    def __init__(self, before: dict[nn.Module, State]):
        self.before = before
        self.after: dict[nn.Module, State] = {}


@contextmanager
def _using(states: _States | None) -> Generator[None]:
    outer, _local.states = _local.states, states
    try:
        yield
    finally:
        _local.states = outer


@contextmanager
def _recomputation() -> Generator[None]:
    outer, _local.recomputing = _local.recomputing, True
    try:
        yield
    finally:
        _local.recomputing = outer


def recomputing() -> bool:
    """Whether `checkpoint` is running a forward pass again: running statistics and records must not count it twice."""
    return not torch.compiler.is_compiling() and _local.recomputing


def streaming() -> bool:
    """Whether a Stream is calling its model in this thread."""
    return not torch.compiler.is_compiling() and _local.states is not None


@contextmanager
def detached_steps() -> Generator[None]:
    """Inside, neurons of this thread detach what they carry from step to step: gradients do not cross steps."""
    outer, _local.detached = _local.detached, True
    try:
        yield
    finally:
        _local.detached = outer


def at_rest() -> bool:
    """Whether neurons of this thread run whole sequences from rest: no Stream, no detached steps."""
    return torch.compiler.is_compiling() or (_local.states is None and not _local.detached)


def detaching() -> bool:
    """Whether this thread is inside `detached_steps`: a neuron then runs step by step, with `detach` between."""
    return not torch.compiler.is_compiling() and _local.detached


def exchange(module: nn.Module, run: Callable[[State], tuple[Output, State]]) -> Output:
    """Runs one neuron layer under the Stream of this thread: from the state it left, to the state it leaves."""
    states = _local.states
    assert states is not None
    if module in states.after:
        raise RuntimeError(
            f"this {type(module).__name__} ran twice in one call of a Stream; its states would mix: "
            "give each place in the network its own neuron"
        )
    output, state = run(states.before.get(module))
    states.after[module] = state
    return output


def previous_state(module: nn.Module) -> State:
    """The state from which a neuron layer runs in the present call: None without a Stream."""
    states = None if torch.compiler.is_compiling() else _local.states
    return None if states is None else states.before.get(module)


def detach(state: State) -> State:
    """A neuron's state without the graph that made it."""
    return _map(state, Tensor.detach)


def _map(state: State, function: Callable[[Tensor], Tensor]) -> State:
    if isinstance(state, Tensor):
        return function(state)
    return tuple(_map(s, function) for s in state) if isinstance(state, tuple) else state


def compiled_part(model: nn.Module) -> str | None:
    """The name of a module that `torch.compile` has made of another, "model" for the whole; None without any."""
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            return name or "model"
    return None


class Stream:
    """Calls a model step by step, or chunk by chunk, with state carried between the calls.

        stream = Stream(model)
        for x_t in x:                   # x: [T, N, ...]
            logits = stream(x_t[None])  # one step is a sequence of length 1
        stream.detach()                 # cut the graph here (truncated backpropagation through time)

    Each Stream has its own state: several may share one model, in several threads. A call that raises leaves the
    state as it was. Neurons that need the whole sequence at once raise and name a variant that can step.

    Args:
        model: any module built from Spikeloom's neurons. Not one wrapped by `torch.compile`: compiled code starts
            from rest at every call.

    Raises:
        TypeError: model is compiled.
        RuntimeError: a neuron runs twice in a call, or none of the model's neurons took part.
    """

    def __init__(self, model: nn.Module):
        if part := compiled_part(model):
            raise TypeError(
                f"a Stream cannot carry state through torch.compile (module {part!r}): "
                f"use Stream(model) with the model as it was before compile, see {page('neurons', 'state')}"
            )
        self.model = model
        self._states: dict[nn.Module, State] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        states = _States(self._states)
        with _using(states):
            output = self.model(*args, **kwargs)
        if not states.after:
            raise RuntimeError(
                "none of the model's neurons took part in this call of a Stream: is part of it compiled?"
            )
        self._states = {**self._states, **states.after}
        return output

    def detach(self) -> None:
        """Cuts the states from the graph that made them."""
        self._states = {module: detach(state) for module, state in self._states.items()}

    def reset(self) -> None:
        """Forgets everything: the next call starts from rest."""
        self._states = {}

    def __repr__(self) -> str:
        kept = f"{len(self._states)} layers of neurons remember" if self._states else "at rest"
        return f"Stream({type(self.model).__name__}, {kept})"

    def state(self, module: nn.Module) -> State:
        """The state that one neuron layer of the model left, None at rest."""
        return self._states.get(module)


def checkpoint(module: nn.Module, *args: Any) -> Any:
    """Runs `module(*args)` and computes it again in the backward pass, to save memory.

    Unlike `torch.utils.checkpoint`, the second run starts from the same neuron states as the first, also inside a
    Stream; gradients flow through the states; batch statistics are not updated twice.

    Args:
        module: holds every neuron that the computation uses.
        args: tensors for its forward.
    """
    outer = _local.states
    before = {} if outer is None else {m: outer.before[m] for m in module.modules() if m in outer.before}
    owners = list(before)
    after_owners: list[nn.Module] = []

    def run(inputs: tuple[Any, ...], states: tuple[State, ...]) -> tuple[Any, tuple[State, ...]]:
        # The neurons see the states handed in, so that they are inputs of the checkpointed function.
        inner = None if outer is None else _States(dict(zip(owners, states, strict=True)))
        with _using(inner):
            output = module(*inputs)
        if inner is None:
            return output, ()
        after_owners[:] = list(inner.after)
        return output, tuple(inner.after.values())

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _recomputation()

    output, after = torch.utils.checkpoint.checkpoint(
        run, args, tuple(before.values()), use_reentrant=False, context_fn=contexts
    )
    if outer is not None:
        for owner, state in zip(after_owners, after, strict=True):
            exchange(owner, lambda _, s=state: (None, s))
    return output
