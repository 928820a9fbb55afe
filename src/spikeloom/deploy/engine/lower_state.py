"""The way from a graph to a plan of the event engine: what has been made so far, and what handlers need of it.

`engine.lower` has the table of the handlers: each says what a node of one operation becomes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_args, get_type_hints

import pydantic
import torch
from torch import Tensor, fx

from spikeloom.deploy.engine.fuse import Fused, fuse
from spikeloom.deploy.engine.ir import Map, Plan, PlanError, Step, Time, Value
from spikeloom.deploy.engine.views import View, all_same, plain, same
from spikeloom.deploy.exchange.graph import Aliases, place
from spikeloom.documentation import page
from spikeloom.errors import UsageError

Made = TypeVar("Made")
Handler = Callable[..., Any]
"""`handler(low, *args, **kwargs)`, with the arguments of the node, says how the graph sees the node's result."""


class Unsupported(UsageError):
    """An operation of a network that no step of a plan stands for.

    Attributes:
        layer: the module that computes it.
        op: the operation, as PyTorch names it.
        shape: of its first output; sizes that depend on the input are "T", "N", "T*N" or another expression.
        reason: what was found, and what is supported where that is short.
    """

    def __init__(self, layer: str, op: str, shape: tuple[int | str, ...], reason: str):
        super().__init__(layer, op, shape, reason)
        self.layer, self.op, self.shape, self.reason = layer, op, shape, reason

    def __str__(self) -> str:
        return (
            f"{self.layer}: the event engine has no step for {self.op}: {self.reason}; run the model itself, "
            f"see {page('deploying', 'the-event-engine')}"
        )


@dataclass(frozen=True)
class Lowered:
    """A plan, and the graph that it comes from.

    Attributes:
        plan, tensors: what an engine takes.
        fused: the steps of the plan, and the same with all their sums.
        program: the graph; `inputs` are its weights, `views` says which of its nodes are which value before fusing.
        example: two images on which the graph can be run.
    """

    plan: Plan
    tensors: dict[str, Tensor]
    fused: Fused
    program: torch.export.ExportedProgram
    inputs: dict[fx.Node, Any]
    views: dict[fx.Node, View]
    example: Tensor


@dataclass(frozen=True)
class Product:
    """A product of two of q, k and v, before the third joins."""

    left: View
    right: View


@dataclass(frozen=True)
class Spikes:
    """The results of a scan."""

    view: View


_KINDS: dict[type, str] = {
    View: "a value that depends on the input",
    Product: "a product of two values",
    Spikes: "the results of neurons",
    Tensor: "a constant tensor",
    float: "a number",
}


@functools.cache
def _parameters(handler: Handler) -> tuple[inspect.Signature, dict[str, tuple[type, ...]]]:
    """A handler's signature, and by the names of its arguments that are tensors the types that these may have."""
    hints = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(handler).items() if name != "return"}
    tensors = {View, Product, Spikes, Tensor}
    return inspect.signature(handler), {name: types for name, types in hints.items() if not tensors.isdisjoint(types)}


class Lowering:
    """A graph on its way to a plan: `steps` so far, the `values` that they make, their `weights`.

    Attributes:
        length, batch: T and N, numbers or symbols; the length is None until a static image is repeated.
        node: of the graph, whose turn it is.
    """

    def __init__(self, program: torch.export.ExportedProgram, axis: int, handlers: Mapping[Any, Handler]):
        self.steps: list[Step] = []
        self.values: list[Value] = []
        self.weights: dict[str, Tensor] = {}
        self.program, self.graph = program, program.graph
        self.handlers = handlers
        self.env: dict[fx.Node, Any] = {}
        self.length: Any = None
        self.batch: Any = None
        signature = program.graph_signature
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = {**program.constants, **dict(program.named_buffers())}
        self.names: dict[fx.Node, str] = {}
        for node in self.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in named:
                self.names[node] = named[node.name]
                self.env[node] = program.state_dict.get(named[node.name], constants.get(named[node.name]))
            elif node.name in signature.inputs_to_lifted_tensor_constants:
                self.env[node] = constants[signature.inputs_to_lifted_tensor_constants[node.name]]
            else:
                self.env[node] = self._input(node, axis)
        self._aliases = Aliases(self.graph)

    def _input(self, node: fx.Node, axis: int) -> View:
        sizes = node.meta["val"].shape
        shape = [int(side) if isinstance(side, int) else 0 for side in sizes[axis + 1 :]]
        forms = {1: "vector", 2: "row", 3: "map"}
        if len(shape) not in forms:
            raise UsageError(f"an input of {len(shape)} axes an image; the event engine takes [C], [C, L] or [C, H, W]")
        C, H, W = shape[0], shape[1] if len(shape) == 3 else 1, shape[-1] if len(shape) > 1 else 1
        self.values.append(Value(height=H, width=W, channels=C, static=axis == 0))
        self.length, self.batch = None if axis == 0 else plain(sizes[0]), plain(sizes[axis])
        if isinstance(self.batch, int):
            raise UsageError(
                f"the network takes batches of {self.batch} images alone; the event engine runs any number"
            )
        return View(0, forms[len(shape)])

    def result(self, example: Tensor) -> Lowered:
        for node in self.graph.nodes:
            if node.op == "call_function":
                self.env[node] = self._call(node)
            elif node.op == "get_attr":  # a graph that an operation runs
                self.env[node] = operator.attrgetter(node.target)(self.program.graph_module)
        out: Any = next(node for node in self.graph.nodes if node.op == "output").args[0]
        found = self.env.get(out[0]) if len(out) == 1 else None
        lead = out[0].meta["val"].shape[:-1] if isinstance(found, View) else ()
        per_step = len(lead) == 2
        fits = all_same(lead, (self.length, self.batch) if per_step else (self.batch,))
        if not isinstance(found, View) or found.form != "vector" or not fits or found.value == 0:
            raise UsageError("the event engine runs networks that give logits [T, N, classes] or [N, classes]")
        fused = fuse(self.steps, self.values, found.value)
        tensors = {name: self.weights[name] for step in fused.steps for name in step.tensors()}
        static = self.values[0].static
        T = 1 if self.length is None else self.length if isinstance(self.length, int) else len(example)
        plan = Plan(
            input=self.values[0],
            T=T,
            steps=fused.steps,
            per_step=per_step,
            fixed_T=not static and isinstance(self.length, int),
        )
        views = {node: view for node, view in self.env.items() if isinstance(view, View)}
        inputs = {node: value for node, value in self.env.items() if node.op == "placeholder"}
        return Lowered(plan, tensors, fused, self.program, inputs, views, example)

    # --- nodes --------------------------------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> Any:
        """What a node becomes: a view of a value, what leads to one, a constant or a size."""
        self.node = node
        value = node.meta.get("val")
        if not isinstance(value, (Tensor, tuple, list)):
            return value  # numbers of images or steps, and what is asserted of them
        target: Any = node.target
        args = fx.map_arg(node.args, lambda n: self.env[n])
        kwargs = dict(fx.map_arg(node.kwargs, lambda n: self.env[n]))
        parts = [*args, *kwargs.values()]
        parts += [inner for part in parts if isinstance(part, (list, tuple)) for inner in part]  # pyright: ignore
        if not any(isinstance(part, (View, Product, Spikes)) for part in parts):
            if any(isinstance(part, (torch.SymInt, torch.SymFloat)) for part in parts):
                raise self.unsupported("it makes a constant that depends on the number of images or steps")
            return target(*args, **kwargs)
        handler = self.handlers.get(getattr(target, "overloadpacket", target))
        if handler is None:
            raise self.unsupported(f"an unknown operation, which makes {self.shown()}")
        if self._aliases.written_and_read(node):
            raise self.unsupported("it changes in place what something else reads")
        bound = self._bind(handler, args, kwargs)
        found = handler(*bound.args, **bound.kwargs)
        if isinstance(found, View) and not self.fits(found, node):
            sizes = list(found.sizes(self.values[found.value]))
            raise self.unsupported(f"it makes {self.shown()}, of other axes than {sizes} of a {found.form}")
        return found

    def _bind(self, handler: Handler, args: Sequence[Any], kwargs: dict[str, Any]) -> inspect.BoundArguments:
        """The node's arguments as the handler's, which are of the kinds that it takes."""
        signature, kinds = _parameters(handler)
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            raise self.unsupported(f"its arguments: {error}") from error
        for name, given in bound.arguments.items():
            for part in given if isinstance(given, (list, tuple)) else (given,):  # pyright: ignore
                if not isinstance(part, kinds.get(name, object)):
                    got = next((what for kind, what in _KINDS.items() if isinstance(part, kind)), repr(part))
                    takes = " or ".join(what for kind, what in _KINDS.items() if kind in kinds[name])
                    has = "is" if part is given else "holds"
                    raise self.unsupported(f"its argument {name} {has} {got}; it must be {takes}")
        return bound

    def unsupported(self, reason: str) -> Unsupported:
        """The error for the node whose turn it is."""
        target: Any = self.node.target
        op = target._schema.name.removeprefix("aten::") if hasattr(target, "_schema") else target.__name__
        return Unsupported(self.layer(), op, self._shape(), reason)

    def _shape(self) -> tuple[int | str, ...]:
        """The shape of the node's first output, with names for numbers of images and steps."""
        value = self.node.meta["val"]
        sizes = (value[0] if isinstance(value, (tuple, list)) else value).shape  # pyright: ignore
        names: list[tuple[Any, str]] = [(self.batch, "N")]
        if self.length is not None:
            names += [(self.length, "T"), (self.length * self.batch, "T*N")]

        def name(size: Any) -> int | str:
            found = next((name for number, name in names if same(size, number)), str(size))
            return found if isinstance(plain(size), torch.SymInt) else plain(size)

        return tuple(map(name, sizes))

    def shown(self) -> str:
        """The same as text."""
        return f"[{', '.join(map(str, self._shape()))}]"

    def fits(self, view: View, node: fx.Node) -> bool:
        """Whether the node's tensor has the axes that the view says."""
        shape = node.meta["val"].shape
        lead, last = shape[: len(shape) - view.rank], shape[len(shape) - view.rank :]
        value = self.values[view.value]
        leads = [] if self.length is None else [(self.length, self.batch), (self.length * self.batch,)]
        if value.static:
            leads += [(1, self.batch), (self.batch,)]
        return all_same(last, view.sizes(value)) and any(all_same(lead, one) for one in leads)

    def layer(self) -> str:
        return place(self.node)[0] or "the model"

    def lead(self, view: View, node: fx.Node | None = None) -> int:
        """How many axes stand before those of the view, in the node's first input."""
        return len(self.axes_before(view, node))

    def axes_before(self, view: View, node: fx.Node | None = None) -> Sequence[Any]:
        source = node or next(arg for arg in self.node.all_input_nodes if isinstance(self.env[arg], (View, Product)))
        shape = source.meta["val"].shape
        return shape[: len(shape) - view.rank]

    def all_steps(self, view: View) -> bool:
        """Whether the node's first input has a first axis of all steps."""
        return self.length is not None and all_same(self.axes_before(view), (self.length, self.batch))

    # --- what handlers add to the plan --------------------------------------------------------------------------------

    def emit(self, make: Callable[..., Step], form: str = "map", **fields: Any) -> View:
        """Adds a step; how the graph sees what it makes.

        Raises:
            Unsupported: no plan has such a step, or it does not fit its inputs.
        """
        step = self.part(make, layer=self.layer(), out=(len(self.values),), **fields)
        with self._limits():
            made = step.infer([self.values[index] for index in step.reads()], self.weights)
        self.steps.append(step)
        self.values += made
        return View(len(self.values) - 1, form)

    def part(self, make: Callable[..., Made], **fields: Any) -> Made:
        """A part of a plan.

        Raises:
            Unsupported: no plan has one with these numbers.
        """
        with self._limits():
            return make(**fields)

    @contextlib.contextmanager
    def _limits(self) -> Generator[None]:
        """Turns what a plan refuses into an error that names the node."""
        try:
            yield
        except PlanError as error:
            raise self.unsupported(str(error).removeprefix(f"{self.layer()}: ")) from error
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            got = f" {first['input']}" if isinstance(first["input"], (int, float)) else ""
            raise self.unsupported(f"its {where}{got}: {first['msg']}") from error

    def map(self, op: str, x: View, low: float = 0.0, high: float = 0.0) -> View:
        """A function of every element of x."""
        return replace(x, value=self.emit(Map, op=op, x=x.value, low=low, high=high).value)

    def time(self, op: str, x: View) -> View:
        """The mean, sum or last of all steps of x."""
        return replace(x, value=self.emit(Time, op=op, x=x.value).value)

    def as_map(self, view: View) -> int:
        """The value, where the graph sees channels of places as they are."""
        forms = ("map", "row", "vector", "tokens")
        if view.form not in forms:
            raise self.unsupported(f"it reads {view.form}; {', '.join(forms)} are supported")
        return view.value

    def constant(self, tensor: Tensor, what: str) -> str:
        """A name for a constant [H or 1, W or 1, C or 1]."""
        name = f"{self.layer()}.{what}.{len(self.steps)}"
        self.weights[name] = tensor.detach().float().contiguous()
        return name

    def weight(self, argument: int, tensor: Tensor | None, shape: tuple[int, ...] | None = None) -> str | None:
        """A name for the weight that is the node's argument of that number, in another shape if given."""
        if tensor is None:
            return None
        node = self.node.args[argument] if argument < len(self.node.args) else None
        name = self.names.get(node) if isinstance(node, fx.Node) else None
        name = name or f"{self.layer()}.{argument}"
        weight = tensor.detach().float().reshape(shape or tensor.shape).contiguous()
        if name in self.weights and not torch.equal(self.weights[name], weight):
            name = f"{name}.{len(self.steps)}"  # the same weight, for inputs in another order
        self.weights[name] = weight
        return name
