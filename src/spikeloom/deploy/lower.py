"""From a trained network to a plan of the event engine, by the graph that `torch.export` makes of it."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spikeloom.deploy import arithmetic
from spikeloom.deploy.fold import fold
from spikeloom.deploy.fuse import Fused, fuse
from spikeloom.deploy.plan import (
    Affine,
    Attention,
    Conv,
    Fire,
    Flatten,
    Join,
    Map,
    Mean,
    Neuron,
    PadChannels,
    Plan,
    PlanError,
    Pool,
    Step,
    Time,
    Value,
)
from spikeloom.deploy.tracing import Aliases, place, trace
from spikeloom.deploy.views import View, all_same, plain, same
from spikeloom.errors import UsageError
from spikeloom.ops.scan_native import charge


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


def lower(model: nn.Module, example: Tensor) -> Lowered:
    """A plan of the model in eval mode, norms folded, and its weights.

    Args:
        model: takes [N, ...] or [T, N, ...], gives logits [T, N, classes] or [N, classes].
        example: an input.

    Raises:
        UsageError: the network has a layer that no step of a plan stands for.
    """
    twin = copy.deepcopy(model).eval().float()
    axis, example = two_images(twin, example.detach().float())
    folded = fold(twin, example.narrow(axis, 0, 1))
    for module in folded.modules():
        if isinstance(module, _BatchNorm):  # one that stays is then seen by itself, not as one op with its neurons
            module.register_forward_hook(lambda *_: None)
    # The numbers of steps and images are symbols where the network takes any.
    program = trace(folded, example, dict.fromkeys(range(axis + 1), torch.export.Dim.AUTO), "native")
    return _Lowering(program, axis).result(example)


def two_images(model: nn.Module, example: Tensor) -> tuple[int, Tensor]:
    """Which axis of the input numbers the images: the one along which two give logits for two; and an input of two
    images, because an axis of one would be taken for a constant. So would a single step, which is taken twice."""

    def logits(x: Tensor) -> tuple[int, ...]:
        # A network of a fixed number of steps or images does not take all.
        with torch.no_grad(), contextlib.suppress(ValueError, RuntimeError, IndexError):
            return tuple(model(x).shape)
        return ()

    for axis in range(min(2, example.dim())):
        one = example.narrow(axis, 0, 1)
        two = example.narrow(axis, 0, 2) if example.shape[axis] > 1 else torch.cat([one, one], axis)
        shapes = logits(one), logits(two)
        # [T, N, classes] or [N, classes]
        if {len(shape) for shape in shapes} in ({2}, {3}) and [shape[-2] for shape in shapes] == [1, 2]:
            if axis == 1 and example.shape[0] == 1 and logits(longer := torch.cat([two, two])):
                return axis, longer
            return axis, two
    raise UsageError(
        f"example {tuple(example.shape)}: the network must take [N, ...] or [T, N, ...] for any N, and give logits "
        "[T, N, classes] or [N, classes]"
    )


@dataclass(frozen=True)
class _Product:
    """A product of two of q, k and v, before the third joins."""

    left: View
    right: View


@dataclass(frozen=True)
class _Spikes:
    """The results of a scan."""

    view: View


class _Lowering:
    def __init__(self, program: torch.export.ExportedProgram, axis: int):
        self.steps: list[Step] = []
        self.values: list[Value] = []
        self.weights: dict[str, Tensor] = {}
        self.program, self.graph = program, program.graph
        self.env: dict[fx.Node, Any] = {}
        # T and N, numbers or symbols; T is None until a static image is repeated.
        self.T: Any = None
        self.N: Any = None
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
        self.T, self.N = None if axis == 0 else plain(sizes[0]), plain(sizes[axis])
        if isinstance(self.N, int):
            raise UsageError(f"the network takes batches of {self.N} images alone; the event engine runs any number")
        return View(0, forms[len(shape)])

    def result(self, example: Tensor) -> Lowered:
        for node in self.graph.nodes:
            if node.op == "call_function":
                self.env[node] = self._call(node)
        out: Any = next(node for node in self.graph.nodes if node.op == "output").args[0]
        found = self.env.get(out[0]) if len(out) == 1 else None
        lead = out[0].meta["val"].shape[:-1] if isinstance(found, View) else ()
        per_step = len(lead) == 2
        fits = all_same(lead, (self.T, self.N) if per_step else (self.N,))
        if not isinstance(found, View) or found.form != "vector" or not fits or found.value == 0:
            raise UsageError("the event engine runs networks that give logits [T, N, classes] or [N, classes]")
        fused = fuse(self.steps, self.values, found.value)
        tensors = {name: self.weights[name] for step in fused.steps for name in step.tensors()}
        static = self.values[0].static
        T = 1 if self.T is None else self.T if isinstance(self.T, int) else len(example)
        plan = Plan(
            input=self.values[0], T=T, steps=fused.steps, per_step=per_step,
            fixed_T=not static and isinstance(self.T, int),
        )  # fmt: skip
        views = {node: view for node, view in self.env.items() if isinstance(view, View)}
        inputs = {node: value for node, value in self.env.items() if node.op == "placeholder"}
        return Lowered(plan, tensors, fused, self.program, inputs, views, example)

    # --- nodes --------------------------------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> Any:
        target: Any = node.target
        name = target.__name__ if not hasattr(target, "_schema") else target._schema.name.removeprefix("aten::")
        self._node = node
        value = node.meta.get("val")
        if not isinstance(value, (Tensor, tuple, list)):
            return value  # numbers of images or steps, and what is asserted of them
        args = fx.map_arg(node.args, lambda n: self.env[n])
        kwargs = dict(fx.map_arg(node.kwargs, lambda n: self.env[n]))
        parts = [*args, *kwargs.values()]
        parts += [inner for part in parts if isinstance(part, (list, tuple)) for inner in part]  # pyright: ignore
        if not any(isinstance(part, (View, _Product, _Spikes)) for part in parts):
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
        if isinstance(found, View) and not self._fits(found, node):
            raise self._cannot(name, f"it makes {list(node.meta['val'].shape)} of other axes")
        return found

    def _fits(self, view: View, node: fx.Node) -> bool:
        """Whether the node's tensor has the axes that the view says."""
        shape = node.meta["val"].shape
        lead, last = shape[: len(shape) - view.rank], shape[len(shape) - view.rank :]
        value = self.values[view.value]
        leads = [] if self.T is None else [(self.T, self.N), (self.T * self.N,)]
        if value.static:
            leads += [(1, self.N), (self.N,)]
        return all_same(last, view.sizes(value)) and any(all_same(lead, one) for one in leads)

    def _layer(self) -> str:
        return place(self._node)[0] or "the model"

    def _cannot(self, name: str, why: str = "") -> UsageError:
        reason = f": {why}" if why else ""
        return UsageError(f"{self._layer()}: the event engine has no step for {name}{reason}; run the model itself")

    def _lead(self, view: View, node: fx.Node | None = None) -> int:
        """How many axes stand before those of the view, in the node's first input."""
        return len(self._axes_before(view, node))

    def _axes_before(self, view: View, node: fx.Node | None = None) -> Sequence[Any]:
        source = node or next(arg for arg in self._node.all_input_nodes if isinstance(self.env[arg], (View, _Product)))
        shape = source.meta["val"].shape
        return shape[: len(shape) - view.rank]

    def _all_steps(self, view: View) -> bool:
        """Whether the node's first input has a first axis of all steps."""
        return self.T is not None and all_same(self._axes_before(view), (self.T, self.N))

    def _emit(self, make: Callable[..., Step], form: str = "map", **fields: Any) -> View:
        step = make(layer=self._layer(), out=(len(self.values),), **fields)
        made = step.infer([self.values[index] for index in step.reads()], self.weights)
        self.steps.append(step)
        self.values += made
        return View(len(self.values) - 1, form)

    def _as_map(self, view: View) -> int:
        """The value, where the graph sees channels of places as they are."""
        if view.form in ("map", "row", "vector", "tokens"):
            return view.value
        raise TypeError(f"it reads {view.form}")

    def _constant(self, tensor: Tensor, what: str) -> str:
        """A name for a constant [H or 1, W or 1, C or 1]."""
        name = f"{self._layer()}.{what}.{len(self.steps)}"
        self.weights[name] = tensor.detach().float().contiguous()
        return name

    # --- views --------------------------------------------------------------------------------------------------------

    def _alias(self, x: Any, *_: Any, **__: Any) -> Any:
        return x

    _contiguous = _clone = _dropout = _detach = _lift_fresh_copy = _alias

    def _to(self, x: View, *_: Any, **__: Any) -> View:
        if self._node.meta["val"].dtype != torch.float32:
            raise TypeError("another type of numbers")
        return x

    def _slice(self, x: View, *_: Any, **__: Any) -> View:
        return x  # of all that is there, or else its axes do not fit

    def _repeated(self, x: View) -> View:
        """A static image that stands T times one behind the other, in the node's output."""
        shape = self._node.meta["val"].shape
        if self.values[x.value].static and len(shape) == x.rank + 2 and self.T is None:
            self.T = plain(shape[0]) if isinstance(plain(shape[0]), int) else None
        return x

    def _expand(self, x: View, sizes: Sequence[Any], implicit: bool = False) -> View:
        return self._repeated(x)

    def _repeat(self, x: View, counts: Sequence[int]) -> View:
        if any(count != 1 for count in counts[1:]) or len(counts) != x.rank + 2 or self._all_steps(x):
            raise TypeError("repetitions of these axes")
        return self._repeated(x)

    def _stack(self, xs: Sequence[View], dim: int = 0) -> View:
        if dim != 0 or len(set(xs)) != 1 or self._lead(xs[0], self._node.all_input_nodes[0]) != 1:
            raise TypeError("a stack of what is not one image")
        return self._repeated(xs[0])

    def _select(self, x: View, dim: int, index: int) -> View:
        if dim == 0 and self._lead(x) == 2:
            if self.values[x.value].static:
                return x
            if (index == -1 or self.T == 1) and self._all_steps(x):
                return self._time("time_last", x)
        raise TypeError("a part of a sequence")

    def _time(self, op: str, x: View) -> View:
        """The mean, sum or last of all steps of x."""
        return replace(x, value=self._emit(Time, op=op, x=x.value).value)

    def _getitem(self, x: Any, index: int) -> Any:
        return x.view if index == 0 else None

    def _reshape(self, x: View, *_: Any, **__: Any) -> View:
        """Other axes in the same order: channels before places, or tokens before channels."""
        shape, value = self._node.meta["val"].shape, self.values[x.value]
        first = ("map", "vector", "tokens", "flat", "heads", "row")
        for form in (x.form, *(("tokens.T", "tokens.heads") if x.form in ("tokens.T", "tokens.heads") else first)):
            heads = shape[-3] if form == "heads" and len(shape) > 3 else shape[-2] if form == "tokens.heads" else 1
            if isinstance(heads, int) and value.channels % heads == 0:
                view = View(x.value, form, x.heads if form == x.form else heads)
                if self._fits(view, self._node):
                    return view
        raise TypeError("these axes")

    _view = _flatten = _unflatten = _unsqueeze = _squeeze = _reshape

    def _mT(self, x: View) -> View:
        swapped = {"tokens": "tokens.T", "tokens.T": "tokens", "heads": "heads.T", "heads.T": "heads"}
        return replace(x, form=swapped[x.form])

    def _transpose(self, x: View, first: int, second: int) -> View:
        lead = self._lead(x)
        axes, last = {first % (lead + x.rank), second % (lead + x.rank)}, lead + x.rank - 1
        if axes == {last - 1, last}:
            return self._mT(x)
        swapped = {"tokens.heads": "heads.T", "heads.T": "tokens.heads"}
        if axes != {lead, lead + 1}:
            raise TypeError("these axes")
        return replace(x, form=swapped[x.form])

    # --- layers -------------------------------------------------------------------------------------------------------

    def _weight(self, argument: int, tensor: Tensor | None, shape: tuple[int, ...] | None = None) -> str | None:
        if tensor is None:
            return None
        node = self._node.args[argument] if argument < len(self._node.args) else None
        name = self.names.get(node) if isinstance(node, fx.Node) else None
        name = name or f"{self._layer()}.{argument}"
        weight = tensor.detach().float().reshape(shape or tensor.shape).contiguous()
        if name in self.weights and not torch.equal(self.weights[name], weight):
            name = f"{name}.{len(self.steps)}"  # the same weight, for inputs in another order
        self.weights[name] = weight
        return name

    def _conv2d(
        self, x: View, weight: Tensor, bias: Tensor | None = None, stride: Sequence[int] = (1, 1),
        padding: Sequence[int] | str = (0, 0), dilation: Sequence[int] = (1, 1), groups: int = 1,
    ) -> View:  # fmt: skip
        sides = {*stride}
        if len(sides) != 1 or {*dilation} != {1} or isinstance(padding, str):
            raise TypeError("its stride, dilation or padding")
        two = padding if len(padding) == 2 else (padding[0], padding[0])
        return self._emit(
            Conv, x=self._as_map(x), weight=self._weight(1, weight), bias=self._weight(2, bias), stride=sides.pop(),
            padding=(int(two[0]), int(two[1])), groups=groups,
        )  # fmt: skip

    def _conv1d(
        self, x: View, weight: Tensor, bias: Tensor | None = None, stride: Sequence[int] = (1,),
        padding: Sequence[int] | str = (0,), dilation: Sequence[int] = (1,), groups: int = 1,
    ) -> View:  # fmt: skip
        if {*dilation} != {1} or isinstance(padding, str) or stride[0] != 1:
            raise TypeError("its stride, dilation or padding")
        tokens = self.values[x.value].height > 1
        if tokens and (weight.shape[2] > 1 or padding[0]):
            raise TypeError("a window of tokens that are places of a map")
        return self._emit(
            Conv, x.form if tokens else "row", x=self._as_map(x), weight=self._weight(1, weight, (*weight.shape[:2], 1, weight.shape[2])),
            bias=self._weight(2, bias), padding=(0, int(padding[0])), groups=groups,
        )  # fmt: skip

    def _linear(self, x: View, weight: Tensor, bias: Tensor | None = None) -> View:
        out, features = weight.shape
        index = x.value
        if x.form == "flat":
            value = self.values[index]
            weight = weight.view(out, value.channels, *value.places).permute(0, 2, 3, 1)
            index = self._emit(Flatten, x=index).value
        elif x.form not in ("vector", "tokens.T"):
            raise TypeError(f"it reads {x.form}")
        form = "tokens.T" if x.form == "tokens.T" else "vector"
        return self._emit(
            Conv, form, x=index, weight=self._weight(1, weight, (out, features, 1, 1)), bias=self._weight(2, bias)
        )  # fmt: skip

    def _spikeloom_scan(
        self, x: View, v: Any, decay: Tensor | None, gain: Tensor | None, scale: Any, slope: Any,
        numbers: Sequence[float], _: bool,
    ) -> _Spikes:  # fmt: skip
        if scale is not None or v is not None:
            raise TypeError("a rectified charge")
        if self.T is None and same(self._axes_before(x)[0], 1):
            self.T = 1
        if not self._all_steps(x):
            raise TypeError("its first axis is not that of the steps: neurons take [T, N, ...]")
        # As `scan_native` packs them.
        v_reset, strict, thresholds = numbers[2], numbers[3], numbers[8:]
        kept, added, _scale = charge(decay, gain, None, numbers)
        neuron = Neuron(
            decay=float(kept), gain=float(added), threshold=tuple(map(float, thresholds)),
            v_reset=None if math.isnan(v_reset) else float(v_reset), strict_firing=bool(strict),
        )  # fmt: skip
        value = self.values[x.value]
        index = x.value
        if value.spikes:
            index = self._emit(Map, op="scale", x=index, high=1.0).value
        made = self._emit(Fire, x=index, keep_sum=False, neuron=neuron)
        return _Spikes(replace(x, value=made.value))

    def _max_pool2d(
        self, x: View, kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,), ceil: bool = False,
    ) -> View:  # fmt: skip
        fits = set(dilation) == {1} and not ceil
        return self._pool("max_pool", x, kernel, stride or kernel, padding, ceil, fits)

    def _avg_pool2d(
        self, x: View, kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
        ceil: bool = False, count_include_pad: bool = True, divisor: int | None = None,
    ) -> View:  # fmt: skip
        return self._pool(
            "avg_pool", x, kernel, stride or kernel, padding, ceil, divisor is None, count_padding=count_include_pad
        )  # fmt: skip

    def _pool(self, op: str, x: View, kernel: Any, stride: Any, padding: Any, ceil: bool, fits: bool, **fields: Any):
        if not fits or any(len({*sides}) != 1 for sides in (kernel, stride, padding)):
            raise TypeError("its window")
        return self._emit(
            Pool, op=op, x=self._as_map(x), kernel=kernel[0], stride=stride[0], padding=padding[0], ceil=ceil, **fields
        )  # fmt: skip

    def _mean(self, x: View, dims: Sequence[int] | None, keepdim: bool = False, **_: Any) -> View:
        lead = self._lead(x)
        axes = {dim % (lead + x.rank) - lead for dim in dims or ()}
        steps = -lead in axes and self._all_steps(x)
        axes -= {-lead} if steps else set()
        places = {"map": {1, 2}, "tokens": {1}, "tokens.T": {0}, "row": {1}}.get(x.form)
        if axes and axes == places:
            x = self._emit(Mean, x.form if keepdim else "vector", x=x.value)
        elif axes or not steps:
            raise TypeError("a mean over these axes")
        return self._time("time_mean", x) if steps and not self.values[x.value].static else x

    def _sum(self, x: View, dims: Sequence[int] | None, keepdim: bool = False, **_: Any) -> View:
        if dims is None or [dim % (x.rank + 2) for dim in dims] != [0] or not self._all_steps(x):
            raise TypeError("a sum over these axes")
        return self._map("scale", x, high=float(self.T)) if self.values[x.value].static else self._time("time_sum", x)

    def _batch_norm(
        self, x: View, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, variance: Tensor | None,
        training: bool, momentum: float, eps: float, _: bool = False,
    ) -> View:  # fmt: skip
        if training or mean is None or variance is None:
            raise TypeError("a norm of batch statistics, whose result for an image depends on the others")
        if self._lead(x) != 1 or x.form not in ("map", "row", "vector", "tokens"):
            raise TypeError("these axes")
        # As PyTorch computes it.
        scale = (1 if weight is None else weight) / torch.sqrt(variance + eps)
        shift = (0 if bias is None else bias) - mean * scale
        names = {"weight": self._constant(scale.view(1, 1, -1), "weight"), "bias": self._constant(shift.view(1, 1, -1), "bias")}
        return replace(x, value=self._emit(Affine, op="affine", x=x.value, **names).value)

    def _adaptive_avg_pool2d(self, x: View, sizes: Sequence[int]) -> View:
        if x.form != "map" or {*sizes} != {1}:
            raise TypeError("to more than one place")
        return self._emit(Mean, x=x.value)

    def _pad(self, x: View, padding: Sequence[int], mode: str = "constant", value: float | None = None) -> View:
        if x.form != "map" or len(padding) != 6 or any(padding[:4]) or mode != "constant" or value:
            raise TypeError("padding of places")
        return self._emit(PadChannels, x=x.value, before=padding[4], behind=padding[5])

    def _matmul(self, left: View | _Product, right: View | _Product) -> View | _Product:
        if isinstance(left, View) and isinstance(right, View):
            return _Product(left, right)
        # V (K^T Q) or (V K^T) Q, for tokens in columns, and their transposes (Q K^T) V and Q (K^T V): the same sums.
        if isinstance(left, View) and isinstance(right, _Product):
            parts = left, right.left, right.right
        elif isinstance(left, _Product) and isinstance(right, View):
            parts = left.left, left.right, right
        else:
            raise TypeError("a product of four")
        rows = parts[0].form == "heads.T"
        outer, inner = ("heads.T", "heads") if rows else ("heads", "heads.T")
        if tuple(part.form for part in parts) != (outer, inner, outer) or len({part.heads for part in parts}) != 1:
            raise TypeError("a product of these axes")
        q, k, v = parts if rows else reversed(parts)
        made = self._emit(Attention, q=q.value, k=k.value, v=v.value, heads=q.heads, scale=1.0)
        return replace(made, form=outer, heads=q.heads)

    # --- elements -----------------------------------------------------------------------------------------------------

    def _map(self, op: str, x: View, low: float = 0.0, high: float = 0.0) -> View:
        return replace(x, value=self._emit(Map, op=op, x=x.value, low=low, high=high).value)

    def _relu(self, x: View) -> View:
        return self._map("relu", x)

    def _sigmoid(self, x: View) -> View:
        return self._map("sigmoid", x)

    def _hardtanh(self, x: View, low: float = -1.0, high: float = 1.0) -> View:
        return self._map("clamp", x, float(low), float(high))

    _add, _sub, _rsub, _mul = arithmetic.add, arithmetic.sub, arithmetic.rsub, arithmetic.mul
    _div, _neg = arithmetic.div, arithmetic.neg

    def _cat(self, xs: Sequence[View], dim: int = 0) -> View:
        if dim == 0 and len(set(xs)) == 1:
            return self._repeated(xs[0])
        source = self._node.args[0][0]  # pyright: ignore
        assert isinstance(source, fx.Node)
        if dim != self._lead(xs[0], source) or any(x.form != xs[0].form for x in xs):
            raise TypeError("these axes")
        return replace(xs[0], value=self._emit(Join, op="cat", xs=tuple(x.value for x in xs)).value)
