"""Ops of native kernels: direct calls in plain eager mode, custom ops for everything that traces or watches."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn

from spikeloom.documentation import page
from spikeloom.modes import tracing, transformed

_PLAIN = (Tensor, nn.Parameter)


def eager(x: Tensor) -> bool:
    """Whether x is computed here and now: no compiler, export, trace, transform or dispatch mode."""
    return (
        type(x) in _PLAIN
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0  # pyright: ignore[reportPrivateUsage]
        and not tracing()
        and not transformed()
    )


def direct(x: Tensor) -> bool:
    """Whether nothing needs to see the op, a profiler neither."""
    return eager(x) and not torch.autograd._profiler_enabled()  # pyright: ignore


class NativeOp:
    """An op with its gradient, from plain functions.

    A `torch.library` custom op can be traced, exported and profiled, but costs 50 microseconds a call, as much as a
    small layer. In plain eager mode the same functions therefore run in an autograd function of their own.

    Args:
        name: in the namespace `spikeloom`.
        forward: the op; its signature is the custom op's schema, its first argument a tensor. It may return None for
            one of several tensors that nobody wants; the custom op, which cannot, returns an empty one.
        fake: the same, for shapes alone.
        save: `(ctx, inputs, output)`, keeps what `differentiate` needs; None for an op without gradient.
        differentiate: `(ctx, *grads)` to the gradients of all inputs, of any type: autograd gives them their inputs'.
        run: `(ctx, *inputs)`, `forward` and `save` in one call where that takes less time.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        save: Callable[..., None] | None = None,
        differentiate: Callable[..., Any] | None = None,
        run: Callable[..., Any] | None = None,
    ):
        self._custom: Any = torch.library.custom_op(
            f"spikeloom::{name}", _of_tensors(forward), mutates_args=(), device_types="cpu"
        )
        self._custom.register_fake(_of_tensors(fake))
        # A custom op and an autograd function give plain tuples.
        result = get_type_hints(forward)["return"]
        self._named: Callable[[Any], Any] | None = _maker(result) if hasattr(result, "_fields") else None
        self._forward: Callable[..., Any] = forward
        if save is not None and differentiate is not None:
            differentiate = first_order(name)(differentiate)
            self._custom.register_autograd(differentiate, setup_context=save)
            self._forward = _function(name, forward, run or _saving(forward, save), differentiate, self._named)

    def __call__(self, x: Tensor, *inputs: Any) -> Any:
        if direct(x):
            return self._forward(x, *inputs)
        found = self._custom(x, *inputs)
        return found if self._named is None else self._named(found)


def native_op(
    name: str,
    fields: type[Any],
    allocate: Callable[[Any], Any],
    fill: Callable[[Any, Any], None],
    save: Callable[[Any, Any, Any], None] | None = None,
    differentiate: Callable[..., Any] | None = None,
) -> NativeOp:
    """An op whose results one function allocates, for real tensors and for fake ones, and another one fills.

    Args:
        name: in the namespace `spikeloom`.
        fields: a `NamedTuple` of the op's arguments, which are the custom op's schema; `inputs` below is one of these.
        allocate: `(inputs)` to the empty results: a tensor, or a `NamedTuple` of tensors, with None for those that
            nobody wants. It reads shapes, strides and settings, never values.
        fill: `(inputs, results)`, computes the results.
        save: `(ctx, inputs, results)`, keeps what `differentiate` needs; None for an op without gradient.
        differentiate: `(ctx, *grads)` to the gradients of all inputs.
    """
    types, result = get_type_hints(fields), get_type_hints(allocate)["return"]
    named_inputs = _maker(fields)
    named = _maker(result) if hasattr(result, "_fields") else None

    def forward(*given: Any) -> Any:
        inputs = named_inputs(given)
        results = allocate(inputs)
        fill(inputs, results)
        return results

    def fake(*given: Any) -> Any:
        return allocate(named_inputs(given))

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        assert save is not None
        save(ctx, named_inputs(inputs), output if named is None else named(output))

    def run(ctx: Any, *given: Any) -> Any:
        assert save is not None
        inputs = named_inputs(given)
        results = allocate(inputs)
        fill(inputs, results)
        save(ctx, inputs, results)
        return results

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in types])
    for function in (forward, fake):
        function.__signature__, function.__annotations__ = signature, {**types, "return": result}  # pyright: ignore
    return NativeOp(name, forward, fake, save and keep, differentiate, run)


def _maker(named: type[Any]) -> Callable[[Any], Any]:
    """From a tuple to a `NamedTuple` of its parts, in a third of the time of its constructor."""
    return functools.partial(tuple.__new__, named)


def op_with_weight(
    name: str,
    forward: Callable[..., Tensor],
    allocate: Callable[..., Tensor],
    backward: Callable[..., tuple[Tensor, Tensor]],
) -> NativeOp:
    """An op of x, a weight and settings whose gradient is an op too.

    Args:
        name: of the op; its gradient is `name`_backward.
        forward: `(x, weight, *settings)`.
        allocate: the same, to the empty result.
        backward: `(grad, x, weight, *settings, need)` to the gradients of x and weight; `need` has a bool for each, and
            where it is False an empty tensor is as good.
    """

    def fake_backward(grad: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
        none, need = x.new_empty(0), settings[-1]
        return torch.empty_like(x) if need[0] else none, torch.empty_like(weight) if need[1] else none

    gradient = NativeOp(f"{name}_backward", backward, fake_backward)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, *ctx.settings = inputs
        ctx.save_for_backward(x, weight)

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        need = list(ctx.needs_input_grad[:2])
        grads = gradient(grad, x, weight, *ctx.settings, need)
        return *(g if wanted else None for g, wanted in zip(grads, need, strict=True)), *[None] * len(ctx.settings)

    return NativeOp(name, forward, allocate, save, differentiate)


def _of_tensors(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The function with empty tensors instead of None among its results, and a signature that says so."""

    def run(x: Tensor, *inputs: Any) -> Any:
        found = forward(x, *inputs)
        return tuple(x.new_empty(0) if part is None else part for part in found) if isinstance(found, tuple) else found

    types, signature = get_type_hints(forward), inspect.signature(forward)
    result = types["return"]
    count = len(getattr(result, "_fields", get_args(result)))
    if count:
        result = tuple[(Tensor,) * count]
    parameters = [p.replace(annotation=types[p.name]) for p in signature.parameters.values()]
    run.__signature__ = signature.replace(parameters=parameters, return_annotation=result)
    return run


class _Final(torch.autograd.Function):
    """Gradients as they are; they depend on all that they were made from, and differentiating them is an error."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name} has no second derivative: for gradients of gradients run the forward pass inside "
            f"`with spikeloom.backend('reference'):`, see {page('neurons', 'which-implementation-runs')}"
        )


def first_order(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the `backward` of an autograd function whose gradients cannot be differentiated: any attempt raises.

    `once_differentiable` is not enough: it lets constant gradients pass, as those of a sum are, and its error is not
    on the way to inputs that `torch.autograd.grad` is asked for.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        def back(ctx: Any, *grads: Any) -> Any:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            # A graph of the gradient is made: somebody wants to differentiate twice.
            with torch.no_grad():
                found = backward(ctx, *grads)
            made = [gradient for gradient in found if gradient is not None]
            causes = [t for t in (*ctx.saved_tensors, *grads) if t is not None]
            final = iter(_Final.apply(name, len(made), *made, *causes))  # pyright: ignore[reportArgumentType]
            return tuple(None if gradient is None else next(final) for gradient in found)

        return back

    return decorate


def autograd_function(
    name: str, forward: Callable[..., Any], save: Callable[..., None], differentiate: Callable[..., Any]
) -> Callable[..., Any]:
    """What a `NativeOp` of these functions is in plain eager mode (`direct`)."""
    return _function(name, forward, _saving(forward, save), first_order(name)(differentiate), None)


def _saving(forward: Callable[..., Any], save: Callable[..., None]) -> Callable[..., Any]:
    def run(ctx: Any, *inputs: Any) -> Any:
        output = forward(*inputs)
        save(ctx, inputs, output)
        return output

    return run


def _function(
    name: str,
    forward: Callable[..., Any],
    run: Callable[..., Any],
    backward: Callable[..., Any],
    named: Callable[[Any], Any] | None,
) -> Callable[..., Any]:
    """An autograd function of `run`; where there are no gradients `forward` by itself."""
    methods = {"forward": staticmethod(run), "backward": staticmethod(backward)}
    function = type(name, (torch.autograd.Function,), methods)
    # Without what `Function.apply` does for transforms: there are none here.
    apply = super(torch.autograd.Function, function).apply  # pyright: ignore[reportAttributeAccessIssue]

    def call(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        found = apply(*inputs)
        return found if named is None else named(found)

    return call
