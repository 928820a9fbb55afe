"""From a trained network to a plan of the event engine, by the graph that `torch.export` makes of it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.deploy.engine import lower_arithmetic
from spikeloom.deploy.engine.ir import (
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
    Pool,
    Time,
)
from spikeloom.deploy.engine.lower_state import Lowered, Lowering, Product, Spikes
from spikeloom.deploy.engine.views import View, plain, same
from spikeloom.deploy.exchange.fold import fold
from spikeloom.deploy.exchange.fold_pairs import Norm
from spikeloom.deploy.exchange.graph import trace
from spikeloom.errors import UsageError
from spikeloom.ops.scan.native import charge
from spikeloom.ops.scan.params import ScanParams


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
        if isinstance(module, Norm):  # one that stays is then seen by itself, not as one op with its neurons
            module.register_forward_hook(lambda *_: None)
    # The numbers of steps and images are symbols where the network takes any.
    program = trace(folded, example, dict.fromkeys(range(axis + 1), torch.export.Dim.AUTO), "native")
    return _Network(program, axis).result(example)


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


class _Network(Lowering):
    """Handlers, by the names of PyTorch's operations; each gives how the graph sees the result."""

    # --- views --------------------------------------------------------------------------------------------------------

    def _alias(self, x: Any, *_: Any, **__: Any) -> Any:
        return x

    _contiguous = _clone = _dropout = _detach = _lift_fresh_copy = _alias

    def _to(self, x: View, *_: Any, **__: Any) -> View:
        if self.node.meta["val"].dtype != torch.float32:
            raise TypeError("another type of numbers")
        return x

    def _slice(self, x: View, *_: Any, **__: Any) -> View:
        return x  # of all that is there, or else its axes do not fit

    def _repeated(self, x: View) -> View:
        """A static image that stands T times one behind the other, in the node's output."""
        shape = self.node.meta["val"].shape
        if self.values[x.value].static and len(shape) == x.rank + 2 and self.length is None:
            self.length = plain(shape[0]) if isinstance(plain(shape[0]), int) else None
        return x

    def _expand(self, x: View, sizes: Sequence[Any], implicit: bool = False) -> View:
        return self._repeated(x)

    def _repeat(self, x: View, counts: Sequence[int]) -> View:
        if any(count != 1 for count in counts[1:]) or len(counts) != x.rank + 2 or self.all_steps(x):
            raise TypeError("repetitions of these axes")
        return self._repeated(x)

    def _stack(self, xs: Sequence[View], dim: int = 0) -> View:
        if dim != 0 or len(set(xs)) != 1 or self.lead(xs[0], self.node.all_input_nodes[0]) != 1:
            raise TypeError("a stack of what is not one image")
        return self._repeated(xs[0])

    def _select(self, x: View, dim: int, index: int) -> View:
        if dim == 0 and self.lead(x) == 2:
            if self.values[x.value].static:
                return x
            if (index == -1 or self.length == 1) and self.all_steps(x):
                return self._time("time_last", x)
        raise TypeError("a part of a sequence")

    def _time(self, op: str, x: View) -> View:
        """The mean, sum or last of all steps of x."""
        return replace(x, value=self.emit(Time, op=op, x=x.value).value)

    def _getitem(self, x: Any, index: int) -> Any:
        return x.view if index == 0 else None

    def _reshape(self, x: View, *_: Any, **__: Any) -> View:
        """Other axes in the same order: channels before places, or tokens before channels."""
        shape, value = self.node.meta["val"].shape, self.values[x.value]
        first = ("map", "vector", "tokens", "flat", "heads", "row")
        for form in (x.form, *(("tokens.T", "tokens.heads") if x.form in ("tokens.T", "tokens.heads") else first)):
            heads = shape[-3] if form == "heads" and len(shape) > 3 else shape[-2] if form == "tokens.heads" else 1
            if isinstance(heads, int) and value.channels % heads == 0:
                view = View(x.value, form, x.heads if form == x.form else heads)
                if self.fits(view, self.node):
                    return view
        raise TypeError("these axes")

    _view = _flatten = _unflatten = _unsqueeze = _squeeze = _reshape

    def _mT(self, x: View) -> View:
        swapped = {"tokens": "tokens.T", "tokens.T": "tokens", "heads": "heads.T", "heads.T": "heads"}
        return replace(x, form=swapped[x.form])

    def _transpose(self, x: View, first: int, second: int) -> View:
        lead = self.lead(x)
        axes, last = {first % (lead + x.rank), second % (lead + x.rank)}, lead + x.rank - 1
        if axes == {last - 1, last}:
            return self._mT(x)
        swapped = {"tokens.heads": "heads.T", "heads.T": "tokens.heads"}
        if axes != {lead, lead + 1}:
            raise TypeError("these axes")
        return replace(x, form=swapped[x.form])

    # --- layers -------------------------------------------------------------------------------------------------------

    def _conv2d(
        self,
        x: View,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] | str = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
    ) -> View:
        sides = {*stride}
        if len(sides) != 1 or {*dilation} != {1} or isinstance(padding, str):
            raise TypeError("its stride, dilation or padding")
        two = padding if len(padding) == 2 else (padding[0], padding[0])
        return self.emit(
            Conv,
            x=self.as_map(x),
            weight=self.weight(1, weight),
            bias=self.weight(2, bias),
            stride=sides.pop(),
            padding=(int(two[0]), int(two[1])),
            groups=groups,
        )

    def _conv1d(
        self,
        x: View,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sequence[int] = (1,),
        padding: Sequence[int] | str = (0,),
        dilation: Sequence[int] = (1,),
        groups: int = 1,
    ) -> View:
        if {*dilation} != {1} or isinstance(padding, str) or stride[0] != 1:
            raise TypeError("its stride, dilation or padding")
        tokens = self.values[x.value].height > 1
        if tokens and (weight.shape[2] > 1 or padding[0]):
            raise TypeError("a window of tokens that are places of a map")
        return self.emit(
            Conv,
            x.form if tokens else "row",
            x=self.as_map(x),
            weight=self.weight(1, weight, (*weight.shape[:2], 1, weight.shape[2])),
            bias=self.weight(2, bias),
            padding=(0, int(padding[0])),
            groups=groups,
        )

    def _linear(self, x: View, weight: Tensor, bias: Tensor | None = None) -> View:
        out, features = weight.shape
        index = x.value
        if x.form == "flat":
            value = self.values[index]
            weight = weight.view(out, value.channels, *value.places).permute(0, 2, 3, 1)
            index = self.emit(Flatten, x=index).value
        elif x.form not in ("vector", "tokens.T"):
            raise TypeError(f"it reads {x.form}")
        form = "tokens.T" if x.form == "tokens.T" else "vector"
        return self.emit(
            Conv, form, x=index, weight=self.weight(1, weight, (out, features, 1, 1)), bias=self.weight(2, bias)
        )

    def _spikeloom_scan(
        self,
        x: View,
        v: Any,
        decay: Tensor | None,
        gain: Tensor | None,
        scale: Any,
        slope: Any,
        numbers: Sequence[float],
        _: bool,
    ) -> Spikes:
        if scale is not None or v is not None:
            raise TypeError("a rectified charge")
        if self.length is None and same(self.axes_before(x)[0], 1):
            self.length = 1
        if not self.all_steps(x):
            raise TypeError("its first axis is not that of the steps: neurons take [T, N, ...]")
        params = ScanParams.unpack(numbers)
        kept, added, _scale = charge(decay, gain, None, params)
        neuron = Neuron(
            decay=float(kept),
            gain=float(added),
            threshold=params.thresholds,
            v_reset=params.v_reset,
            strict_firing=params.strict,
        )
        value = self.values[x.value]
        index = x.value
        if value.spikes:
            index = self.emit(Map, op="scale", x=index, high=1.0).value
        made = self.emit(Fire, x=index, keep_sum=False, neuron=neuron)
        return Spikes(replace(x, value=made.value))

    def _max_pool2d(
        self,
        x: View,
        kernel: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        ceil: bool = False,
    ) -> View:
        fits = set(dilation) == {1} and not ceil
        return self._pool("max_pool", x, kernel, stride or kernel, padding, ceil, fits)

    def _avg_pool2d(
        self,
        x: View,
        kernel: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        ceil: bool = False,
        count_include_pad: bool = True,
        divisor: int | None = None,
    ) -> View:
        return self._pool(
            "avg_pool", x, kernel, stride or kernel, padding, ceil, divisor is None, count_padding=count_include_pad
        )

    def _pool(self, op: str, x: View, kernel: Any, stride: Any, padding: Any, ceil: bool, fits: bool, **fields: Any):
        if not fits or any(len({*sides}) != 1 for sides in (kernel, stride, padding)):
            raise TypeError("its window")
        return self.emit(
            Pool, op=op, x=self.as_map(x), kernel=kernel[0], stride=stride[0], padding=padding[0], ceil=ceil, **fields
        )

    def _mean(self, x: View, dims: Sequence[int] | None, keepdim: bool = False, **_: Any) -> View:
        lead = self.lead(x)
        axes = {dim % (lead + x.rank) - lead for dim in dims or ()}
        steps = -lead in axes and self.all_steps(x)
        axes -= {-lead} if steps else set()
        places = {"map": {1, 2}, "tokens": {1}, "tokens.T": {0}, "row": {1}}.get(x.form)
        if axes and axes == places:
            x = self.emit(Mean, x.form if keepdim else "vector", x=x.value)
        elif axes or not steps:
            raise TypeError("a mean over these axes")
        return self._time("time_mean", x) if steps and not self.values[x.value].static else x

    def _sum(self, x: View, dims: Sequence[int] | None, keepdim: bool = False, **_: Any) -> View:
        if dims is None or [dim % (x.rank + 2) for dim in dims] != [0] or not self.all_steps(x):
            raise TypeError("a sum over these axes")
        return (
            self.map("scale", x, high=float(self.length)) if self.values[x.value].static else self._time("time_sum", x)
        )

    def _batch_norm(
        self,
        x: View,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        _: bool = False,
    ) -> View:
        if training or mean is None or variance is None:
            raise TypeError("a norm of batch statistics, whose result for an image depends on the others")
        if self.lead(x) != 1 or x.form not in ("map", "row", "vector", "tokens"):
            raise TypeError("these axes")
        # As PyTorch computes it.
        scale = (1 if weight is None else weight) / torch.sqrt(variance + eps)
        shift = (0 if bias is None else bias) - mean * scale
        names = {
            "weight": self.constant(scale.view(1, 1, -1), "weight"),
            "bias": self.constant(shift.view(1, 1, -1), "bias"),
        }
        return replace(x, value=self.emit(Affine, op="affine", x=x.value, **names).value)

    def _adaptive_avg_pool2d(self, x: View, sizes: Sequence[int]) -> View:
        if x.form != "map" or {*sizes} != {1}:
            raise TypeError("to more than one place")
        return self.emit(Mean, x=x.value)

    def _pad(self, x: View, padding: Sequence[int], mode: str = "constant", value: float | None = None) -> View:
        if x.form != "map" or len(padding) != 6 or any(padding[:4]) or mode != "constant" or value:
            raise TypeError("padding of places")
        return self.emit(PadChannels, x=x.value, before=padding[4], behind=padding[5])

    def _matmul(self, left: View | Product, right: View | Product) -> View | Product:
        if isinstance(left, View) and isinstance(right, View):
            return Product(left, right)
        # V (K^T Q) or (V K^T) Q, for tokens in columns, and their transposes (Q K^T) V and Q (K^T V): the same sums.
        if isinstance(left, View) and isinstance(right, Product):
            parts = left, right.left, right.right
        elif isinstance(left, Product) and isinstance(right, View):
            parts = left.left, left.right, right
        else:
            raise TypeError("a product of four")
        rows = parts[0].form == "heads.T"
        outer, inner = ("heads.T", "heads") if rows else ("heads", "heads.T")
        if tuple(part.form for part in parts) != (outer, inner, outer) or len({part.heads for part in parts}) != 1:
            raise TypeError("a product of these axes")
        q, k, v = parts if rows else reversed(parts)
        made = self.emit(Attention, q=q.value, k=k.value, v=v.value, heads=q.heads, scale=1.0)
        return replace(made, form=outer, heads=q.heads)

    # --- elements -----------------------------------------------------------------------------------------------------

    def _relu(self, x: View) -> View:
        return self.map("relu", x)

    def _sigmoid(self, x: View) -> View:
        return self.map("sigmoid", x)

    def _hardtanh(self, x: View, low: float = -1.0, high: float = 1.0) -> View:
        return self.map("clamp", x, float(low), float(high))

    _add, _sub, _rsub, _mul = lower_arithmetic.add, lower_arithmetic.sub, lower_arithmetic.rsub, lower_arithmetic.mul
    _div, _neg = lower_arithmetic.div, lower_arithmetic.neg

    def _cat(self, xs: Sequence[View], dim: int = 0) -> View:
        if dim == 0 and len(set(xs)) == 1:
            return self._repeated(xs[0])
        if dim != self.lead(xs[0], self.node.all_input_nodes[0]) or any(x.form != xs[0].form for x in xs):
            raise TypeError("these axes")
        return replace(xs[0], value=self.emit(Join, op="cat", xs=tuple(x.value for x in xs)).value)
