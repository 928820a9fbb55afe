"""Watching a network run: every matrix product that PyTorch carries out, by the name of its layer."""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
from collections.abc import Callable, Generator, Iterable
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spikeloom.analyse.audit.effective import count_nonzero, of_convolution, of_product
from spikeloom.analyse.audit.layer import SPIKES, Kind, Layer
from spikeloom.analyse.audit.layer_totals import LayerTotals, named
from spikeloom.analyse.audit.origins import UNSEEN, Origin, Origins, memory
from spikeloom.analyse.audit.value_types import REAL, SILENT, TensorSummary, summarise
from spikeloom.errors import UsageError
from spikeloom.layers import NormSpike
from spikeloom.neurons.base import Neuron
from spikeloom.neurons.lif import LIFBase
from spikeloom.neurons.recurrent import RecurrentLIF
from spikeloom.ops import backend
from spikeloom.stream import streaming

# Products that PyTorch does in one piece, whose parts cannot be seen.
_OPAQUE = {
    "mkldnn_rnn_layer",
    "_cudnn_rnn",
    "miopen_rnn",
    "_trilinear",
    "_int_mm",
    "_scaled_mm",
    "_grouped_mm",
    "_scaled_grouped_mm",
    "_weight_int8pack_mm",
    "_weight_int4pack_mm",
    "_transformer_encoder_layer_fwd",
    "_native_multi_head_attention",
}

_FIRED = ("binary", "ternary", "integer", "scaled")


class OpTrace:
    """What the layers of a network received, by name; `recording` fills it, `layers` reads it.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module):
        self._modules = {module: name for name, module in model.named_modules()}
        self._owners = dict(model.named_modules(remove_duplicate=False))
        tensors = [*model.named_buffers(), *model.named_parameters()]
        self._weights = {memory(tensor): name for name, tensor in tensors}
        self._entries: dict[Any, LayerTotals] = {}
        self._products: dict[str, int] = {}
        self._running: list[nn.Module] = []
        self._neurons = 0
        self._ran: dict[nn.Module, int] = {}  # steps that each neuron took, in the batch that ran
        self.origins = Origins()
        self.spiking = any(map(_is_neuron, self._modules))
        self.opaque: dict[str, None] = {}
        self.fired, self.activations = 0, 0  # what neurons gave: how much of it is not 0, and how much it is
        self._recurrent = contextlib.ExitStack()

    @contextlib.contextmanager
    def attached(self) -> Generator[None]:
        """Follows which module runs, inside the block; `recording` needs it."""
        handles: list[Any] = []
        fast = torch.backends.mha.get_fastpath_enabled()
        with contextlib.ExitStack() as stack:
            fused = _fused(self._modules)
            for module in self._modules:
                if module in fused:
                    continue
                handles.append(module.register_forward_pre_hook(self._enter))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
            torch.backends.mha.set_fastpath_enabled(False)  # it does a whole layer in one operation
            if any(isinstance(module, RecurrentLIF) for module in self._modules):
                stack.enter_context(backend("reference"))  # the native scan holds the recurrent product
            try:
                yield
            finally:
                torch.backends.mha.set_fastpath_enabled(fast)
                for handle in handles:
                    handle.remove()

    @contextlib.contextmanager
    def recording(self, x: Tensor) -> Generator[None]:
        """Books what runs inside the block; x are the data."""
        self.origins = Origins(x)
        self._running, self._neurons, self._ran = [], 0, {}
        with _OpTracer(self):
            yield

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)
        if isinstance(module, nn.RNNBase):
            self._recurrent.enter_context(_in_products())
        fires = _is_neuron(module)
        if self._neurons == 0 and (fires or isinstance(module, NormSpike)) and args and isinstance(args[0], Tensor):
            before, now = self._ran.get(module, 0), _steps_of(module, args[0])
            # Without a Stream each call of ours starts from rest: a second one is another layer, not more steps.
            rests = isinstance(module, Neuron | NormSpike) and not streaming()
            self._ran[module] = max(before, now) if rests else before + now
        self._neurons += fires

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._neurons == 1 and _fires(module):
            self.saw(output[0] if isinstance(output, tuple) else output)
        while self._running:  # a module that raised leaves those inside it
            left = self._running.pop()
            self._neurons -= _is_neuron(left)
            if left is module:
                break
        if isinstance(module, nn.RNNBase):
            self._recurrent.close()

    def close(self, images: int, steps: int) -> None:
        """Adds the batch that ran, of so many images and steps, to the sums."""
        for entry in self._entries.values():
            if entry.calls:
                entry.close(images, steps)
        self.origins = Origins()

    def steps(self, images: int) -> int:
        """T of the batch that ran, where neither input nor logits have an axis for it.

        The steps that neurons took; of neurons that are no modules, how often a layer of spikes ran. A network
        without spikes has one step, whatever its layers do.
        """
        if self._ran:
            return max(statistics.multimode(self._ran.values()))
        entries = [entry for entry in self._entries.values() if entry.calls]
        if not any(call[0].operand().input in _FIRED for e in entries if not e.encoder for call in e.calls):
            return 1
        rows = [sum(len(summaries[0].rows) for summaries in e.calls) // images for e in entries if e.kind == "conv"]
        return max([1, *(rows or [len(e.calls) for e in entries if e.kind == "linear"])])

    def layers(self, images: int, steps: float, folded: set[str]) -> list[Layer]:
        """The layers in the order in which they first ran, per image.

        Args:
            images, steps: all images that ran, and T.
            folded: layers whose bias is not counted.

        Raises:
            UsageError: a name in `folded` is none of them.
        """
        entries = named(list(self._entries.values()))
        unknown = folded - entries.keys()
        if unknown:
            raise UsageError(f"folded_biases names {sorted(unknown)[0]!r}, which is no layer that ran")
        last = list(entries)[-1:]
        return [entry.layer(name, images, steps, name in folded, [name] == last) for name, entry in entries.items()]

    def saw(self, spikes: Tensor) -> None:
        """Neurons gave these."""
        self.fired += count_nonzero(spikes)
        self.activations += spikes.numel()

    # --- told by the dispatch mode ------------------------------------------------------------------------------------

    def convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, transposed: bool, geometry: tuple[Any, ...]
    ) -> None:
        """A convolution ran, of a geometry as `effective.of_convolution` takes it."""
        operations = x.numel() * weight[0].numel() if transposed else out.numel() * weight[0].numel()
        effective = functools.partial(of_convolution, x, weight, transposed, geometry)
        self._layer("conv", x, weight, operations, effective, bias, out)

    def product(self, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """[n, k] was multiplied with [k, m], or a batch of them."""
        operations = out.numel() * a.shape[-1]
        linear = bool(self._running) and isinstance(self._running[-1], nn.Linear)
        if linear or self._name(b) is not None:
            self._layer("linear", a.flatten(0, -2), b, operations, lambda _: of_product(a, b), bias, out)
        elif self._name(a) is not None:
            x = b.transpose(-2, -1).flatten(0, -2)
            self._layer("linear", x, a, operations, lambda _: of_product(a, b), bias, out)
        else:
            self.pair(a, b, operations, out.numel())

    def pair(self, a: Tensor, b: Tensor, operations: int, outputs: int) -> None:
        """Two computed tensors, [..., n, k] and [..., k, m], were multiplied."""
        if self._neurons:
            return
        entry = self._pair_entry("", (a.shape[-2], a.shape[-1], b.shape[-1]))
        operands = [(self.origins.of(t), self._summarise(t, False, True)) for t in (a, b)]
        self._book(entry, operands, operations, of_product(a, b), 0, outputs)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """softmax(Q K^T) V ran in one operation, [..., n, d], [..., m, d] and [..., m, e]."""
        n, m = q.shape[-2], k.shape[-2]
        count = q.numel() // q.shape[-1]  # softmaxes, each over m
        self.pair(q, k.transpose(-2, -1), q.numel() * m, count * m)
        if not self._neurons:
            softmax = TensorSummary(
                count * m, 0.0, 1.0, REAL, count, count, count * m, torch.full((len(q),), 1 / m), None
            )
            entry = self._pair_entry("softmax", (n, m, v.shape[-1]))
            operands = [
                (Origin("softmax", self.where()), softmax),
                (self.origins.of(v), self._summarise(v, False, True)),
            ]
            effective = n * count_nonzero(v) * (count // n * m * v.shape[-1] / v.numel())
            self._book(entry, operands, count * m * v.shape[-1], effective, 0, count * v.shape[-1])

    def _pair_entry(self, part: str, product: tuple[int, int, int]) -> LayerTotals:
        module = self.where()
        key = (module, part, _site())
        entry = self._entries.get(key)
        if entry is None:
            number = self._products[module] = self._products.get(module, 0) + 1
            name = f"{module}:matmul{'' if number == 1 else number}"
            entry = self._open(key, name, name, "matmul", False, 2)
            entry.product = product
        return entry

    def _layer(
        self,
        kind: Kind,
        x: Tensor,
        weight: Tensor,
        operations: int,
        effective: Callable[[bool], float],
        bias: Tensor | None,
        out: Tensor,
    ) -> None:
        name = self._name(weight)
        owner = self._owners.get(name.rpartition(".")[0]) if name is not None else None
        if self._neurons and (owner is None or _is_neuron(owner)):
            return
        running = self._running[-1] if self._running else None
        module = name or kind
        if name is None or (running is not None and any(memory(p) == memory(weight) for p in _own(running))):
            module = self.where() or name or kind
        # A weight that is computed is known by its place; the three of attention may be parts of one.
        part = weight.storage_offset() if isinstance(running, nn.MultiheadAttention) else 0
        key = (kind, module, _site()) if name is None else (kind, module, name, weight.shape, part)
        entry = self._entries.get(key)
        if entry is None:
            first = not self._entries or self.origins.of(x).op == "input"
            entry = self._open(key, module.removesuffix(".weight"), name or module, kind, first, 1)
        seen = self._summarise(x, True, not entry.encoder)
        spikes = seen.scale in (SILENT, 1.0) and seen.minimum >= 0 and seen.maximum <= 1
        biases = 0 if bias is None else out.numel()
        self._book(entry, [(self.origins.of(x), seen)], operations, effective(spikes), biases, out.numel())

    def _open(self, key: Any, name: str, weight: str, kind: Kind, encoder: bool, operands: int) -> LayerTotals:
        seen = [list[TensorSummary]() for _ in range(operands)]
        entry = self._entries[key] = LayerTotals(name, weight, kind, encoder, seen, [""] * operands)
        return entry

    def _book(
        self,
        entry: LayerTotals,
        operands: list[tuple[Origin, TensorSummary]],
        operations: int,
        effective: float,
        bias: int,
        outputs: int,
    ) -> None:
        entry.calls.append([seen for _, seen in operands])
        entry.operations += operations
        entry.effective += effective
        entry.bias += bias
        entry.outputs += outputs
        for index, (origin, seen) in enumerate(operands):
            operand = seen.operand()
            if not entry.why[index] and operand.input not in SPIKES:
                entry.why[index] = origin.explain(operand)

    def _summarise(self, x: Tensor, channels: bool, may_scale: bool) -> TensorSummary:
        origin, windows = self.origins.of(x), self.origins.windows(x)
        key = (x.data_ptr(), x.shape, x.stride(), channels, may_scale)
        found = origin.summaries.get(key)
        if found is None:
            sizes = windows if isinstance(windows, Tensor) else None
            found = summarise(x, channels, may_scale and windows is not None, sizes)
            if origin is not UNSEEN:
                origin.summaries[key] = found
        return found

    def where(self) -> str:
        return self._modules[self._running[-1]] if self._running else ""

    def _name(self, tensor: Tensor) -> str | None:
        return self._weights.get(memory(tensor))


# --- PyTorch's side ---------------------------------------------------------------------------------------------------


_PLAIN: set[Any] = set()  # operations that are no composites of others, as far as they were met


class _OpTracer(TorchDispatchMode):
    """Sees every operation below autograd, after composite ones were taken apart."""

    def __init__(self, trace: OpTrace):
        super().__init__()
        self._trace = trace

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        product = _PRODUCTS.get(name) or (_attention if name.startswith("_scaled_dot_product_") else None)
        if product is None and func not in _PLAIN:
            # Inside inference_mode PyTorch hands over whole composite operations.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            _PLAIN.add(func)
        if func.is_view:  # shares the memory of what it views, and so its origin
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if product is not None:
            product(self._trace, result, *args, **kwargs)
        elif name in _OPAQUE:
            self._trace.opaque.setdefault(f"{name} in {self._trace.where() or 'the model'}")
        module, origins = self._trace.where(), self._trace.origins
        if name == "norm_scan":  # norm, residual, neuron and the ADD of its spikes, with two results
            _, residual, add = args[:3]
            self._trace.saw(result[0] if add is None else result[0] - add)
            known = add is None or isinstance(origins.windows(add), float)
            origins.set(result[0], name if add is None else "add", module, 1.0 if known else None)
            for other in result[1:]:
                origins.set(other, "batch_norm" if residual is None else "add", module)
            return result
        origins.wrote(func, module, args, kwargs, result)
        return result


def _convolution(
    trace: OpTrace,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> None:
    trace.convolution(x, weight, bias, out, transposed, (stride, padding, dilation, output_padding, groups))


def _mm(trace: OpTrace, out: Tensor, a: Tensor, b: Tensor, **options: Any) -> None:
    trace.product(a, b, None, out)


def _addmm(trace: OpTrace, out: Tensor, bias: Tensor, a: Tensor, b: Tensor, **options: Any) -> None:
    trace.product(a, b, bias, out)


def _mv(trace: OpTrace, out: Tensor, a: Tensor, b: Tensor) -> None:
    trace.product(a, b[:, None], None, out)


def _addmv(trace: OpTrace, out: Tensor, bias: Tensor, a: Tensor, b: Tensor, **options: Any) -> None:
    trace.product(a, b[:, None], bias, out)


def _dot(trace: OpTrace, out: Tensor, a: Tensor, b: Tensor) -> None:
    trace.product(a[None], b[:, None], None, out)


def _attention(trace: OpTrace, out: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> None:
    trace.attention(q, k, v)


_PRODUCTS: dict[str, Callable[..., None]] = {
    "convolution": _convolution,
    "mm": _mm,
    "bmm": _mm,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "mv": _mv,
    "addmv": _addmv,
    "dot": _dot,
}


def _fused(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """Norms and neurons that run as one operation as long as no hook is registered between; they hold no products."""
    units = [module for module in modules if isinstance(module, NormSpike) and isinstance(module.neuron, LIFBase)]
    return {part for unit in units for part in (unit.norm, unit.neuron)}


def _own(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _is_neuron(module: nn.Module) -> bool:
    """Ours, SpikingJelly's or snnTorch's neurons."""
    theirs = ("spikingjelly.activation_based.neuron", "snntorch._neurons")
    return isinstance(module, Neuron) or any(kind.__module__.startswith(theirs) for kind in type(module).__mro__)


def _fires(module: nn.Module) -> bool:
    return _is_neuron(module) and getattr(module, "fires", True)


def _steps_of(module: nn.Module, x: Tensor) -> int:
    """Time steps in one call of a neuron: ours take sequences, SpikingJelly's if they are told so."""
    ours = isinstance(module, Neuron | NormSpike)
    return len(x) if ours or getattr(module, "step_mode", "s") == "m" else 1


@contextlib.contextmanager
def _in_products() -> Generator[None]:
    """Inside the block PyTorch computes recurrent layers from products that can be seen, not in one piece."""
    libraries: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
    before = [library.enabled for library in libraries]
    try:
        for library in libraries:
            library.enabled = False
        yield
    finally:
        for library, enabled in zip(libraries, before, strict=True):
            library.enabled = enabled


_TORCH = sys.modules["torch"].__path__[0]
_CALL = nn.Module._call_impl.__code__  # pyright: ignore[reportPrivateUsage]


def _site() -> tuple[tuple[CodeType, int], ...]:
    """Where in the running module's code this product stands: the same one in every turn of a loop over time."""
    frame, found = sys._getframe(1), []  # pyright: ignore[reportPrivateUsage]
    while frame is not None and frame.f_code is not _CALL:
        if not frame.f_code.co_filename.startswith((_TORCH, __file__)):
            found.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(found)
