"""From a trained network to a plan of the event engine, by the graph that `torch.export` makes of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from spikeloom.deploy.fold import fold
from spikeloom.deploy.plan import (
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
    Value,
    renumbered,
)
from spikeloom.deploy.tracing import place
from spikeloom.errors import UsageError
from spikeloom.ops import backend
from spikeloom.ops.scan_native import charge


def lower(model: nn.Module, example: Tensor) -> tuple[Plan, dict[str, Tensor]]:
    """A plan of the model in eval mode, norms folded, and its weights.

    Args:
        model: takes [N, ...] or [T, N, ...], gives logits [T, N, classes].
        example: an input.

    Raises:
        UsageError: the network has a layer that no step of a plan stands for.
    """
    folded = fold(model).float()
    axis, example = _batch_axis(folded, example.float())
    shapes = ({axis: torch.export.Dim("N", min=1, max=1 << 20)},)
    with torch.no_grad(), backend("native"):
        program = torch.export.export(folded, (example,), dynamic_shapes=shapes, strict=False)
    return _Lowering(program, axis).result()


def _batch_axis(model: nn.Module, example: Tensor) -> tuple[int, Tensor]:
    """Which axis of the input numbers the images, the one along which one more gives logits for one more; and an input
    with that one more, because an axis of one would be taken for a constant."""
    with torch.no_grad():
        images = model(example).shape[1]
        for axis in range(min(2, example.dim())):
            if example.shape[axis] == images:
                more = torch.cat([example, example.narrow(axis, 0, 1)], axis)
                with contextlib.suppress(ValueError, RuntimeError):  # a network of a fixed number of steps
                    if model(more).shape[1] == images + 1:
                        return axis, more
    raise UsageError(f"example {tuple(example.shape)}: the network must take [N, ...] or [T, N, ...] for any N")


@dataclass(frozen=True)
class _View:
    """How the graph sees a value: its last axes are, channels first,

    map [C, H, W] · row [C, W] (H = 1) · column [C, 1] and vector [C] (one place) · tokens [C, L] · tokens.T [L, C] ·
    heads [h, d, L] · heads.T [h, L, d] · tokens.heads [L, h, d] · flat, features of a map in PyTorch's order.
    """

    value: int
    form: str
    heads: int = 1

    @property
    def rank(self) -> int:
        ranks = {"map": 3, "row": 2, "column": 2, "vector": 1, "tokens": 2, "tokens.T": 2}
        return 3 if "heads" in self.form else ranks.get(self.form, 1)


@dataclass(frozen=True)
class _Product:
    """A product of two of q, k and v, before the third joins."""

    left: _View
    right: _View


class _Lowering:
    def __init__(self, program: torch.export.ExportedProgram, axis: int):
        self.steps: list[Step] = []
        self.values: list[Value] = []
        self.weights: dict[str, Tensor] = {}
        self.graph = program.graph
        self.env: dict[fx.Node, Any] = {}
        self.repeats = 1
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

    def _input(self, node: fx.Node, axis: int) -> _View:
        shape = [int(side) if isinstance(side, int) else 0 for side in node.meta["val"].shape[axis + 1 :]]
        forms = {1: "vector", 2: "row", 3: "map"}
        if len(shape) not in forms:
            raise UsageError(f"an input of {len(shape)} axes an image; the event engine takes [C], [C, L] or [C, H, W]")
        C, H, W = shape[0], shape[1] if len(shape) == 3 else 1, shape[-1] if len(shape) > 1 else 1
        self.values.append(Value(height=H, width=W, channels=C, static=axis == 0))
        if axis == 1:
            self.repeats = int(node.meta["val"].shape[0])
        return _View(0, forms[len(shape)])

    def result(self) -> tuple[Plan, dict[str, Tensor]]:
        for node in self.graph.nodes:
            if node.op == "call_function":
                self.env[node] = self._call(node)
            elif node.op == "output":
                found = self.env[node.args[0][0]]  # pyright: ignore
        if not isinstance(found, _View) or found.form != "vector":  # pyright: ignore[reportPossiblyUnboundVariable]
            raise UsageError("the event engine runs networks that give logits [T, N, classes]")
        steps = _fuse(self.steps, self.values, found.value)
        tensors = {name: self.weights[name] for step in steps for name in step.tensors()}
        return Plan(input=self.values[0], T=self.repeats, steps=steps), tensors

    # --- nodes --------------------------------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> Any:
        target: Any = node.target
        name = target.__name__ if not hasattr(target, "_schema") else target._schema.name.removeprefix("aten::")
        args = fx.map_arg(node.args, lambda n: self.env[n])
        kwargs = dict(fx.map_arg(node.kwargs, lambda n: self.env[n]))
        parts = [*args, *kwargs.values()]
        parts += [inner for part in parts if isinstance(part, (list, tuple)) for inner in part]  # pyright: ignore
        if name == "sym_size":
            return None  # the number of images
        if not any(isinstance(part, (_View, _Product, _Spikes)) for part in parts):
            return target(*args, **kwargs)
        handler = getattr(self, "_" + name.replace("::", "_").strip("_"), None)
        self._node = node
        if handler is None:
            raise self._cannot(name)
        try:
            return handler(*args, **kwargs)
        except (TypeError, KeyError, AttributeError, PlanError) as error:
            raise self._cannot(name, str(error)) from error

    def _layer(self) -> str:
        return place(self._node)[0] or "the model"

    def _cannot(self, name: str, why: str = "") -> UsageError:
        reason = f": {why}" if why else ""
        return UsageError(f"{self._layer()}: the event engine has no step for {name}{reason}; run the model itself")

    def _lead(self, view: _View, node: fx.Node | None = None) -> int:
        """How many axes stand before those of the view, in the node's first input."""
        source = node or next(arg for arg in self._node.all_input_nodes if isinstance(self.env[arg], (_View, _Product)))
        return source.meta["val"].dim() - view.rank

    def _emit(self, make: Callable[..., Step], form: str = "map", **fields: Any) -> _View:
        step = make(layer=self._layer(), out=(len(self.values),), **fields)
        made = step.infer([self.values[index] for index in step.reads()], self.weights)
        self.steps.append(step)
        self.values += made
        return _View(len(self.values) - 1, form)

    def _as_map(self, view: _View) -> int:
        """The value, where the graph sees channels of places as they are."""
        if view.form in ("map", "row", "vector", "column", "tokens"):
            return view.value
        raise TypeError(f"it reads {view.form}")

    # --- views --------------------------------------------------------------------------------------------------------

    def _alias(self, x: Any, *_: Any, **__: Any) -> Any:
        return x

    _contiguous = _clone = _dropout = _detach = _lift_fresh_copy = _alias

    def _expand(self, x: _View, sizes: Sequence[Any]) -> _View:
        value = self.values[x.value]
        if not value.static:
            raise TypeError("only a static image is repeated")
        self.repeats = int(sizes[0])
        return x

    def _select(self, x: _View, dim: int, index: int) -> _View:
        if dim != 0 or not self.values[x.value].static:
            raise TypeError("a part of a sequence")
        return x

    def _getitem(self, x: Any, index: int) -> Any:
        return x.view if index == 0 else None

    def _flatten(self, x: _View, start: int = 0, end: int = -1) -> _View:
        lead = self._lead(x)
        if (start, end) == (0, 1) and lead == 2:
            return x
        if end not in (-1, lead + x.rank - 1):
            raise TypeError("these axes")
        if start == lead + 1 and x.form in ("map", "tokens.heads"):
            return replace(x, form="tokens" if x.form == "map" else "tokens.T")
        if start == lead:
            value = self.values[x.value]
            if value.places == (1, 1):
                return replace(x, form="vector")
            return replace(x, form="flat")
        raise TypeError("these axes")

    def _unflatten(self, x: _View, dim: int, sizes: Sequence[Any]) -> _View:
        if dim == 0:
            return x
        value, lead = self.values[x.value], self._lead(x)
        last = dim in (-1, lead + x.rank - 1)
        if (len(sizes) == 2 and (x.form, dim) == ("tokens", lead)) or (x.form == "tokens.T" and last):
            heads = sizes[0] if sizes[0] > 0 else value.channels // sizes[1]
            return replace(x, form="heads" if x.form == "tokens" else "tokens.heads", heads=heads)
        if x.form == "tokens" and last and tuple(sizes) == value.places:
            return replace(x, form="map")
        raise TypeError("these axes")

    def _reshape(self, x: _View, sizes: Sequence[Any]) -> _View:
        value = self.values[x.value]
        if x.form in ("heads", "tokens", "map") and tuple(sizes[-3:]) == (value.channels, *value.places):
            return replace(x, form="map")
        raise TypeError("these axes")

    _view = _reshape

    def _mT(self, x: _View) -> _View:
        swapped = {"tokens": "tokens.T", "tokens.T": "tokens", "heads": "heads.T", "heads.T": "heads"}
        return replace(x, form=swapped[x.form])

    def _transpose(self, x: _View, first: int, second: int) -> _View:
        lead, swapped = self._lead(x), {"tokens.heads": "heads.T", "heads.T": "tokens.heads"}
        if {first % (lead + 3), second % (lead + 3)} != {lead, lead + 1}:
            raise TypeError("these axes")
        return replace(x, form=swapped[x.form])

    def _unsqueeze(self, x: _View, dim: int) -> _View:
        if dim not in (-1, self._lead(x) + x.rank):
            raise TypeError("these axes")
        return replace(x, form={"vector": "column", "column": "map"}[x.form])

    # --- layers -------------------------------------------------------------------------------------------------------

    def _weight(self, argument: int, tensor: Tensor | None, shape: tuple[int, ...] | None = None) -> str | None:
        if tensor is None:
            return None
        node = self._node.args[argument]
        name = self.names.get(node) if isinstance(node, fx.Node) else None  # pyright: ignore
        name = name or f"{self._layer()}.{argument}"
        self.weights[name] = tensor.detach().float().reshape(shape or tensor.shape).contiguous()
        return name

    def _conv2d(
        self, x: _View, weight: Tensor, bias: Tensor | None = None, stride: Sequence[int] = (1, 1),
        padding: Sequence[int] | str = (0, 0), dilation: Sequence[int] = (1, 1), groups: int = 1,
    ) -> _View:  # fmt: skip
        sides = {*stride}
        if len(sides) != 1 or {*dilation} != {1} or isinstance(padding, str):
            raise TypeError("its stride, dilation or padding")
        two = padding if len(padding) == 2 else (padding[0], padding[0])
        return self._emit(
            Conv, x=self._as_map(x), weight=self._weight(1, weight), bias=self._weight(2, bias), stride=sides.pop(),
            padding=(int(two[0]), int(two[1])), groups=groups,
        )  # fmt: skip

    def _conv1d(
        self, x: _View, weight: Tensor, bias: Tensor | None = None, stride: Sequence[int] = (1,),
        padding: Sequence[int] | str = (0,), dilation: Sequence[int] = (1,), groups: int = 1,
    ) -> _View:  # fmt: skip
        if {*dilation} != {1} or isinstance(padding, str) or stride[0] != 1:
            raise TypeError("its stride, dilation or padding")
        return self._emit(
            Conv, "row", x=self._as_map(x), weight=self._weight(1, weight, (*weight.shape[:2], 1, weight.shape[2])),
            bias=self._weight(2, bias), padding=(0, int(padding[0])), groups=groups,
        )  # fmt: skip

    def _linear(self, x: _View, weight: Tensor, bias: Tensor | None = None) -> _View:
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
        self, x: _View, v: Any, decay: Tensor | None, gain: Tensor | None, scale: Any, slope: Any,
        numbers: Sequence[float], _: bool,
    ) -> _Spikes:  # fmt: skip
        if scale is not None or v is not None:
            raise TypeError("a rectified charge")
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
        self, x: _View, kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,), ceil: bool = False,
    ) -> _View:  # fmt: skip
        fits = set(dilation) == {1} and not ceil
        return self._pool("max_pool", x, kernel, stride or kernel, padding, ceil, fits)

    def _avg_pool2d(
        self, x: _View, kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
        ceil: bool = False, count_include_pad: bool = True, divisor: int | None = None,
    ) -> _View:  # fmt: skip
        return self._pool(
            "avg_pool", x, kernel, stride or kernel, padding, ceil, divisor is None, count_padding=count_include_pad
        )  # fmt: skip

    def _pool(self, op: str, x: _View, kernel: Any, stride: Any, padding: Any, ceil: bool, fits: bool, **fields: Any):
        if not fits or any(len({*sides}) != 1 for sides in (kernel, stride, padding)):
            raise TypeError("its window")
        return self._emit(
            Pool, op=op, x=self._as_map(x), kernel=kernel[0], stride=stride[0], padding=padding[0], ceil=ceil, **fields
        )  # fmt: skip

    def _mean(self, x: _View, dims: Sequence[int], keepdim: bool = False, **_: Any) -> _View:
        rank, lead = x.rank, self._lead(x)
        places = {"map": {1, 2}, "tokens": {1}, "tokens.T": {0}, "row": {1}}[x.form]
        if {(dim - lead) % rank if dim >= 0 else dim + rank for dim in dims} != places:
            raise TypeError("a mean over these axes")
        return self._emit(Mean, x.form if keepdim else "vector", x=x.value)

    def _pad(self, x: _View, padding: Sequence[int], mode: str = "constant", value: float | None = None) -> _View:
        if x.form != "map" or len(padding) != 6 or any(padding[:4]) or mode != "constant" or value:
            raise TypeError("padding of places")
        return self._emit(PadChannels, x=x.value, before=padding[4], behind=padding[5])

    def _matmul(self, left: _View | _Product, right: _View | _Product) -> _View | _Product:
        if isinstance(left, _View) and isinstance(right, _View):
            return _Product(left, right)
        # V (K^T Q) or (V K^T) Q, for tokens in columns, and their transposes (Q K^T) V and Q (K^T V): the same sums.
        if isinstance(left, _View) and isinstance(right, _Product):
            parts = left, right.left, right.right
        elif isinstance(left, _Product) and isinstance(right, _View):
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

    def _map(self, op: str, x: _View, low: float = 0.0, high: float = 0.0) -> _View:
        return replace(x, value=self._emit(Map, op=op, x=x.value, low=low, high=high).value)

    def _relu(self, x: _View) -> _View:
        return self._map("relu", x)

    def _sigmoid(self, x: _View) -> _View:
        return self._map("sigmoid", x)

    def _hardtanh(self, x: _View, low: float = -1.0, high: float = 1.0) -> _View:
        return self._map("clamp", x, float(low), float(high))

    def _rsub(self, x: _View, other: float, alpha: float = 1.0) -> _View:
        if other == 1 and alpha == 1 and self.values[x.value].most == 1:
            return self._map("complement", x)
        return self._map("shift", self._map("scale", x, high=-float(alpha)), high=float(other))

    def _join(self, op: str, x: _View, y: _View) -> _View:
        if x.form != y.form:
            raise TypeError("operands of other axes")
        return replace(x, value=self._emit(Join, op=op, xs=(x.value, y.value)).value)

    def _number(self, y: Any) -> float | None:
        if isinstance(y, Tensor) and y.numel() == 1:
            return float(y.detach())
        return float(y) if isinstance(y, (int, float)) else None

    def _add(self, x: Any, y: Any, alpha: float = 1.0) -> _View:
        if isinstance(x, _View) and isinstance(y, _View):
            return self._join("add", x, y if alpha == 1 else self._map("scale", y, high=float(alpha)))
        view, number = (x, self._number(y)) if isinstance(x, _View) else (y, self._number(x))
        if number is None:
            raise TypeError("a tensor that is added")
        return self._map("shift", view, high=number * alpha)

    def _sub(self, x: Any, y: Any, alpha: float = 1.0) -> _View:
        found = self._or(x, y)
        return found if found is not None else self._add(x, y, -alpha)

    def _mul(self, x: Any, y: Any) -> _View:
        if isinstance(x, _View) and isinstance(y, _View):
            return self._join("mul", x, y)
        view, number = (x, self._number(y)) if isinstance(x, _View) else (y, self._number(x))
        if number is None:
            raise TypeError("a tensor that multiplies")
        last = self.steps[-1]
        if isinstance(last, Attention) and last.out[0] == view.value and last.scale == 1.0:
            self.steps[-1] = last.model_copy(update={"scale": number})
            return view
        return self._map("scale", view, high=number)

    def _or(self, x: Any, y: Any) -> _View | None:
        """`a + b - a b` of 0/1 spikes, the OR of a shortcut."""
        made = {step.out[0]: step for step in self.steps if isinstance(step, Join)}
        if not (isinstance(x, _View) and isinstance(y, _View)):
            return None
        both, product = made.get(x.value), made.get(y.value)
        if both is None or product is None or (both.op, product.op) != ("add", "mul"):
            return None
        if {*both.xs} != {*product.xs} or any(self.values[index].most != 1 for index in both.xs):
            return None
        return replace(x, value=self._emit(Join, op="or", xs=both.xs).value)

    def _cat(self, xs: Sequence[_View], dim: int = 0) -> _View:
        source = self._node.args[0][0]  # pyright: ignore
        assert isinstance(source, fx.Node)
        if dim != self._lead(xs[0], source) or any(x.form != xs[0].form for x in xs):
            raise TypeError("these axes")
        return replace(xs[0], value=self._emit(Join, op="cat", xs=tuple(x.value for x in xs)).value)


@dataclass(frozen=True)
class _Spikes:
    """The pair of results of a scan."""

    view: _View


def _fuse(steps: Sequence[Step], values: Sequence[Value], last: int) -> tuple[Step, ...]:
    """The steps that `last` needs, with neurons and shortcuts as part of the convolutions whose sums they take."""
    needed, kept = {last}, list[Step]()
    for step in reversed(steps):
        if needed.intersection(step.out):
            needed.update(step.reads())
            kept.append(step)
    order: list[Step | None] = [*reversed(kept)]

    def readers(value: int) -> list[int]:
        return [i for i, step in enumerate(order) if step is not None for index in step.reads() if index == value]

    for i, step in enumerate(order):
        if not isinstance(step, Conv) or step.residual is not None or step.neuron is not None:
            continue
        at, merged, sums = i, step, step.out[0]
        users = readers(sums)
        joins = order[users[0]] if len(users) == 1 and sums != last else None
        if isinstance(joins, Join) and joins.op == "add":
            other = joins.xs[1] if joins.xs[0] == sums else joins.xs[0]
            same = other != sums and (values[other].places, values[other].channels) == (
                values[sums].places, values[sums].channels,
            )  # fmt: skip
            if same:
                order[i], at, sums = None, users[0], joins.out[0]
                merged = merged.model_copy(update={"residual": other, "out": (sums,)})
                users = readers(sums)
        fires = [user for user in users if isinstance(order[user], Fire)]
        if fires:
            fire = order[fires[0]]
            assert isinstance(fire, Fire)
            keep = len(users) > 1 or sums == last
            out = (sums, *fire.out) if keep else fire.out
            merged = merged.model_copy(update={"neuron": fire.neuron, "keep_sum": keep, "out": out})
            order[fires[0]] = None
        order[at] = merged
    steps = [step for step in order if step is not None]
    numbers = {0: 0}
    for step in steps:
        for index in step.out:
            numbers[index] = len(numbers)
    return renumbered(steps, numbers.__getitem__)
