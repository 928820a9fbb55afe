"""The way from a graph to a plan of the event engine; what each operation becomes is in `engine.lower`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pydantic
import torch
from torch import Tensor, fx

from spikeloom.deploy.engine.fuse import Fused, fuse
from spikeloom.deploy.engine.ir import Map, Plan, PlanError, Step, Value
from spikeloom.deploy.engine.views import View, all_same, plain
from spikeloom.deploy.exchange.graph import Aliases, place
from spikeloom.errors import UsageError


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


class Lowering:
    """A graph on its way to a plan: `steps` so far, the `values` that they make, their `weights`.

    What a node of the graph becomes is said by the method of its operation's name, in a subclass.

    Attributes:
        length, batch: T and N, numbers or symbols; the length is None until a static image is repeated.
        node: of the graph, whose turn it is.
    """

    def __init__(self, program: torch.export.ExportedProgram, axis: int):
        self.steps: list[Step] = []
        self.values: list[Value] = []
        self.weights: dict[str, Tensor] = {}
        self.program, self.graph = program, program.graph
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
        target: Any = node.target
        name = target.__name__ if not hasattr(target, "_schema") else target._schema.name.removeprefix("aten::")
        self.node = node
        value = node.meta.get("val")
        if not isinstance(value, (Tensor, tuple, list)):
            return value  # numbers of images or steps, and what is asserted of them
        args = fx.map_arg(node.args, lambda n: self.env[n])
        kwargs = dict(fx.map_arg(node.kwargs, lambda n: self.env[n]))
        parts = [*args, *kwargs.values()]
        parts += [inner for part in parts if isinstance(part, (list, tuple)) for inner in part]  # pyright: ignore
        if not any(isinstance(part, (View, Product, Spikes)) for part in parts):
            if any(isinstance(part, torch.SymInt) for part in parts):
                raise self._cannot(name, "its size depends on the number of images or steps")
            return target(*args, **kwargs)
        handler = getattr(self, "_" + name.replace("::", "_").strip("_"), None)
        if handler is None:
            raise self._cannot(name)
        if self._aliases.written_and_read(node):
            raise self._cannot(name, "it changes in place what something else reads")
        try:
            found = handler(*args, **kwargs)
        except (TypeError, KeyError, AttributeError, PlanError) as error:
            raise self._cannot(name, str(error)) from error
        except pydantic.ValidationError as error:  # a side or a constant that no plan holds
            raise self._cannot(name, str(error.errors()[0]["msg"])) from error
        if isinstance(found, View) and not self.fits(found, node):
            raise self._cannot(name, f"it makes {list(node.meta['val'].shape)} of other axes")
        return found

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

    def _cannot(self, name: str, why: str = "") -> UsageError:
        reason = f": {why}" if why else ""
        return UsageError(f"{self.layer()}: the event engine has no step for {name}{reason}; run the model itself")

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

    def emit(self, make: Callable[..., Step], form: str = "map", **fields: Any) -> View:
        step = make(layer=self.layer(), out=(len(self.values),), **fields)
        made = step.infer([self.values[index] for index in step.reads()], self.weights)
        self.steps.append(step)
        self.values += made
        return View(len(self.values) - 1, form)

    def as_map(self, view: View) -> int:
        """The value, where the graph sees channels of places as they are."""
        if view.form in ("map", "row", "vector", "tokens"):
            return view.value
        raise TypeError(f"it reads {view.form}")

    def constant(self, tensor: Tensor, what: str) -> str:
        """A name for a constant [H or 1, W or 1, C or 1]."""
        name = f"{self.layer()}.{what}.{len(self.steps)}"
        self.weights[name] = tensor.detach().float().contiguous()
        return name

    def weight(self, argument: int, tensor: Tensor | None, shape: tuple[int, ...] | None = None) -> str | None:
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

    def map(self, op: str, x: View, low: float = 0.0, high: float = 0.0) -> View:
        return replace(x, value=self.emit(Map, op=op, x=x.value, low=low, high=high).value)
