"""Watching a network run: every matrix product that PyTorch carries out, by the name of its layer."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spikeloom.analyse.energy import SPIKES, Kind, Layer, Operand, Role
from spikeloom.analyse.looking import REAL, Look, look, merge
from spikeloom.errors import UsageError
from spikeloom.layers import NormSpike
from spikeloom.neurons.base import Neuron
from spikeloom.neurons.if_lif import Threshold
from spikeloom.neurons.recurrent import RecurrentLIF
from spikeloom.ops import backend

# Products that PyTorch does in one piece, whose parts cannot be seen.
_OPAQUE = {
    "mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn", "_trilinear", "_int_mm", "_scaled_mm", "_grouped_mm",
    "_scaled_grouped_mm", "_weight_int8pack_mm", "_weight_int4pack_mm", "_transformer_encoder_layer_fwd",
    "_native_multi_head_attention",
}  # fmt: skip

# Operations that hand on what they receive; views need no entry, they share memory.
_THROUGH = {
    "clone", "_to_copy", "cat", "stack", "copy_", "constant_pad_nd", "index", "index_select", "repeat", "roll", "flip",
    "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "reflection_pad2d", "gather",
}  # fmt: skip

_CAUSES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("convolution", "addmm", "mm", "bmm", "baddbmm", "scaled_dot_product"), "a layer without a neuron behind it"),
    (("scan", "gated_scan", "band", "norm_scan"), "a neuron that fires integers"),
    (("batch_norm", "cudnn_batch_norm", "layer_norm", "group_norm"), "a norm without a neuron behind it"),
    (("add", "sub", "rsub"), "a sum ({shortcut} shortcut)"),
    (("avg_pool", "adaptive_avg_pool", "mean"), "average pooling"),
    (("mul",), "a product with {values} values (a gate or a scale)"),
    (("relu", "gelu", "silu", "sigmoid", "tanh", "softmax", "hardtanh", "clamp"), "an activation that does not spike"),
)


@dataclass
class _Origin:
    """The operation that wrote a piece of memory, in which module, and what was seen there."""

    op: str
    module: str
    looks: dict[Any, Look] = field(default_factory=dict)

    def explain(self, operand: Operand) -> str:
        """What made these values."""
        if self.op == "input":
            return "the data themselves"
        name = self.op.strip("_").removeprefix("native_").strip("_")
        values, shortcut = ("real", "membrane") if operand.input == "real" else (operand.input, "ADD")
        for starts, text in _CAUSES:
            if name.startswith(starts):
                return f"{text.format(values=values, shortcut=shortcut)} in {self.module or 'the model'}"
        return f"{name} in {self.module or 'the model'}"


_MERGED = 32  # looks that are kept apart: merging costs as much as a look
_UNSEEN = _Origin("a tensor from outside", "")


@dataclass
class _Entry:
    """One layer: sums over batches, and the calls of the present batch."""

    name: str
    kind: Kind
    encoder: bool
    seen: list[list[Look]]  # of each operand, to be merged
    why: list[str]
    operations: float = 0.0
    bias: float = 0.0
    outputs: float = 0.0
    runs: int = 0  # rows of its input: images x steps x tokens
    product: tuple[int, int, int] | None = None
    calls: list[list[Look]] = field(default_factory=list)
    by_step: Tensor | None = None  # summed over images


class Ledger:
    """What the layers of a network received, by name; `watching` fills it, `layers` reads it.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module):
        self._modules = {module: name for name, module in model.named_modules()}
        self._owners = dict(model.named_modules(remove_duplicate=False))
        tensors = [*model.named_buffers(), *model.named_parameters()]
        self._weights = {_memory(tensor): name for name, tensor in tensors}
        self._entries: dict[Any, _Entry] = {}
        self._products: dict[str, int] = {}
        self._running: list[nn.Module] = []
        self._neurons = 0
        self._origins: dict[int, _Origin] = {}
        self.spiking = any(map(_is_neuron, self._modules))
        self.opaque: dict[str, None] = {}

    @contextlib.contextmanager
    def attached(self) -> Generator[None]:
        """Follows which module runs, inside the block; `watching` needs it."""
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
    def watching(self, x: Tensor) -> Generator[None]:
        """Books what runs inside the block; x are the data."""
        self._origins = {_memory(x): _Origin("input", "")}
        self._running, self._neurons = [], 0
        with _Watch(self):
            yield

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)
        self._neurons += _is_neuron(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        while self._running:  # a module that raised leaves those inside it
            left = self._running.pop()
            self._neurons -= _is_neuron(left)
            if left is module:
                break

    def close(self, images: int, steps: int) -> None:
        """Adds the batch that ran, of so many images and steps, to the sums."""
        for entry in self._entries.values():
            if entry.calls:
                entry.runs += sum(len(looks[0].rows) for looks in entry.calls)
                self._add_steps(entry, images, steps)
                for index, seen in enumerate(entry.seen):
                    seen += [looks[index] for looks in entry.calls]
                    if len(seen) >= _MERGED:
                        seen[:] = [merge(seen)]
                entry.calls = []
        self._origins = {}

    def _add_steps(self, entry: _Entry, images: int, steps: int) -> None:
        rows = [looks[0].rows for looks in entry.calls]
        if len(entry.seen) > 1:
            return  # which operand drives a product is known at the end only
        if len(rows) == steps:
            means = torch.stack([mean.double().mean() for mean in rows])
        elif len(rows) == 1 and len(rows[0]) % steps == 0:
            means = rows[0].double().view(steps, -1).mean(1)
        else:
            return
        entry.by_step = images * means + (0.0 if entry.by_step is None else entry.by_step)

    def most_runs(self) -> int:
        """The most rows that a convolution had in the batch that ran."""
        runs = [sum(len(looks[0].rows) for looks in e.calls) for e in self._entries.values() if e.kind == "conv"]
        return max(runs, default=0)

    def layers(self, images: int, steps: int, folded: set[str]) -> list[Layer]:
        """The layers in the order in which they first ran, per image.

        Args:
            images, steps: all images that ran, and T.
            folded: layers whose bias is not counted.

        Raises:
            UsageError: a name in `folded` is none of them.
        """
        entries = list(self._entries.values())
        unknown = folded - {entry.name for entry in entries}
        if unknown:
            raise UsageError(f"folded_biases names {sorted(unknown)[0]!r}, which is no layer that ran")
        return [_layer(entry, images, steps, entry.name in folded, entry is entries[-1]) for entry in entries]

    # --- told by the dispatch mode ------------------------------------------------------------------------------------

    def wrote(self, op: str, reads: list[Tensor], results: Any, mutates: bool) -> None:
        """An operation finished: memory that it made, or changed, comes from it."""
        known = {_memory(tensor) for tensor in reads}
        source = reads[-1] if op == "copy_" else reads[0] if op in _THROUGH and reads else None
        origin = self._origins.get(_memory(source)) if source is not None else None
        op, module = (op, self.where()) if origin is None else (origin.op, origin.module)
        for tensor in _tensors(results):
            memory = _memory(tensor)
            if mutates or memory not in known:  # else a view
                self._origins[memory] = _Origin(op, module)

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, transposed: bool) -> None:
        """A convolution ran."""
        operations = x.numel() * weight[0].numel() if transposed else out.numel() * weight[0].numel()
        self._layer("conv", x, weight, operations, bias, out)

    def product(self, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """[n, k] was multiplied with [k, m], or a batch of them."""
        operations = out.numel() * a.shape[-1]
        linear = bool(self._running) and isinstance(self._running[-1], nn.Linear)
        if linear or self._name(b) is not None:
            self._layer("linear", a.flatten(0, -2), b, operations, bias, out)
        elif self._name(a) is not None:
            self._layer("linear", b.transpose(-2, -1).flatten(0, -2), a, operations, bias, out)
        else:
            self.pair(a, b, operations, out.numel())

    def pair(self, a: Tensor, b: Tensor, operations: int, outputs: int) -> None:
        """Two computed tensors, [..., n, k] and [..., k, m], were multiplied."""
        if self._neurons:
            return
        entry = self._pair_entry("", (a.shape[-2], a.shape[-1], b.shape[-1]))
        operands = [(self._origin(t), self._look(t, False, True)) for t in (a, b)]
        self._book(entry, operands, operations, 0, outputs)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """softmax(Q K^T) V ran in one operation, [..., n, d], [..., m, d] and [..., m, e]."""
        n, m = q.shape[-2], k.shape[-2]
        count = q.numel() // q.shape[-1]  # softmaxes, each over m
        self.pair(q, k.transpose(-2, -1), q.numel() * m, count * m)
        if not self._neurons:
            softmax = Look(count * m, 0.0, 1.0, REAL, count, count, count * m, torch.full((len(q),), 1 / m), None)
            entry = self._pair_entry("softmax", (n, m, v.shape[-1]))
            operands = [(_Origin("softmax", self.where()), softmax), (self._origin(v), self._look(v, False, True))]
            self._book(entry, operands, count * m * v.shape[-1], 0, count * v.shape[-1])

    def _pair_entry(self, part: str, product: tuple[int, int, int]) -> _Entry:
        module = self.where()
        key = (module, part, _site())
        entry = self._entries.get(key)
        if entry is None:
            number = self._products[module] = self._products.get(module, 0) + 1
            name = f"{module}:matmul{'' if number == 1 else number}"
            entry = self._open(key, name, "matmul", False, 2)
            entry.product = product
        return entry

    def _layer(self, kind: Kind, x: Tensor, weight: Tensor, operations: int, bias: Tensor | None, out: Tensor) -> None:
        name = self._name(weight)
        owner = self._owners.get(name.rpartition(".")[0]) if name is not None else None
        if self._neurons and (owner is None or _is_neuron(owner)):
            return
        running = self._running[-1] if self._running else None
        if name is None or (running is not None and any(_memory(p) == _memory(weight) for p in _own(running))):
            name = self.where() or name or kind
        name = name.removesuffix(".weight")
        key = (kind, name)
        entry = self._entries.get(key)
        if entry is None:
            first = not self._entries or self._origin(x).op == "input"
            entry = self._open(key, name, kind, first, 1)
        seen = self._look(x, True, not entry.encoder)
        self._book(entry, [(self._origin(x), seen)], operations, 0 if bias is None else out.numel(), out.numel())

    def _open(self, key: Any, name: str, kind: Kind, encoder: bool, operands: int) -> _Entry:
        entry = self._entries[key] = _Entry(name, kind, encoder, [[] for _ in range(operands)], [""] * operands)
        return entry

    def _book(
        self, entry: _Entry, operands: list[tuple[_Origin, Look]], operations: int, bias: int, outputs: int
    ) -> None:
        entry.calls.append([seen for _, seen in operands])
        entry.operations += operations
        entry.bias += bias
        entry.outputs += outputs
        for index, (origin, seen) in enumerate(operands):
            operand = seen.operand()
            if not entry.why[index] and operand.input not in SPIKES:
                entry.why[index] = origin.explain(operand)

    def _look(self, x: Tensor, channels: bool, may_scale: bool) -> Look:
        origin = self._origins.get(_memory(x))
        if origin is None:
            return look(x, channels, may_scale)
        key = (x.data_ptr(), x.shape, x.stride(), channels, may_scale)
        if key not in origin.looks:
            origin.looks[key] = look(x, channels, may_scale)
        return origin.looks[key]

    def _origin(self, tensor: Tensor) -> _Origin:
        return self._origins.get(_memory(tensor), _UNSEEN)

    def where(self) -> str:
        return self._modules[self._running[-1]] if self._running else ""

    def _name(self, tensor: Tensor) -> str | None:
        return self._weights.get(_memory(tensor))


def _layer(entry: _Entry, images: int, steps: int, folded: bool, last: bool) -> Layer:
    looks = [merge(seen) for seen in entry.seen if seen]
    operands = tuple(seen.operand() for seen in looks)
    role: Role = "encoder" if entry.encoder else "classifier" if last and entry.kind == "linear" else "body"
    ran = float(steps) if entry.kind == "matmul" else min(entry.runs / images, float(steps))
    operations = entry.operations / images
    layer = Layer(
        entry.name, entry.kind, operands, role, operations, 0.0 if folded else entry.bias / images,
        entry.outputs / images, ran,
    )  # fmt: skip
    changes: dict[str, Any] = {}
    if entry.product is not None:
        n, k, m = entry.product
        changes["shape"] = (operations / (ran * n * k * m), n, k, m)
    if entry.by_step is not None and layer.input != "real":
        changes["rates"] = tuple((entry.by_step / images).tolist())
    if looks[0].channels is not None:
        counts = looks[0].channels
        full = looks[0].elements // len(counts)
        changes |= {
            "channels": len(counts), "dead": int((counts == 0).sum()), "saturated": int((counts == full).sum()),
        }  # fmt: skip
    if layer.input not in SPIKES:
        pooled = role == "classifier" and layer.input == "scaled"
        changes |= {
            "why": "; ".join(dict.fromkeys(filter(None, entry.why))),
            "breaks": role != "encoder" and not pooled,
        }
    return replace(layer, **changes)


# --- PyTorch's side ---------------------------------------------------------------------------------------------------


class _Watch(TorchDispatchMode):
    """Sees every operation below autograd, after composite ones were taken apart."""

    def __init__(self, ledger: Ledger):
        super().__init__()
        self._ledger = ledger
        self._plain: set[Any] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view:  # shares the memory of what it views, and so its origin
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        product = _PRODUCTS.get(name) or (_attention if name.startswith("_scaled_dot_product_") else None)
        if product is None and func not in self._plain:
            # Inside inference_mode PyTorch hands over whole composite operations.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            self._plain.add(func)
        result = func(*args, **kwargs)
        if product is not None:
            product(self._ledger, result, *args, **kwargs)
        elif name in _OPAQUE:
            self._ledger.opaque.setdefault(f"{name} in {self._ledger.where() or 'the model'}")
        if name == "norm_scan":  # norm, residual, neuron and the ADD of its spikes, with two results
            _, residual, add = args[:3]
            self._ledger.wrote(name if add is None else "add", [], result[0], False)
            self._ledger.wrote("batch_norm" if residual is None else "add", [], result[1:], False)
            return result
        self._ledger.wrote(name, list(_tensors((args, kwargs))), result, func._schema.is_mutable)
        return result


def _convolution(
    ledger: Ledger, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any,
    dilation: Any, transposed: bool, output_padding: Any, groups: int,
) -> None:  # fmt: skip
    ledger.convolution(x, weight, bias, out, transposed)


def _mm(ledger: Ledger, out: Tensor, a: Tensor, b: Tensor, **options: Any) -> None:
    ledger.product(a, b, None, out)


def _addmm(ledger: Ledger, out: Tensor, bias: Tensor, a: Tensor, b: Tensor, **options: Any) -> None:
    ledger.product(a, b, bias, out)


def _mv(ledger: Ledger, out: Tensor, a: Tensor, b: Tensor) -> None:
    ledger.product(a, b[:, None], None, out)


def _addmv(ledger: Ledger, out: Tensor, bias: Tensor, a: Tensor, b: Tensor, **options: Any) -> None:
    ledger.product(a, b[:, None], bias, out)


def _dot(ledger: Ledger, out: Tensor, a: Tensor, b: Tensor) -> None:
    ledger.product(a[None], b[:, None], None, out)


def _attention(ledger: Ledger, out: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> None:
    ledger.attention(q, k, v)


_PRODUCTS: dict[str, Callable[..., None]] = {
    "convolution": _convolution, "mm": _mm, "bmm": _mm, "addmm": _addmm, "baddbmm": _addmm, "mv": _mv,
    "addmv": _addmv, "dot": _dot,
}  # fmt: skip


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            if isinstance(part, Tensor):
                yield part
            elif isinstance(part, tuple | list | dict):
                yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _memory(tensor: Tensor) -> int:
    """What a tensor shares with its views."""
    return tensor.untyped_storage().data_ptr()


def _fused(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """Norms and neurons that run as one operation as long as nobody looks between; they hold no products."""
    units = [module for module in modules if isinstance(module, NormSpike) and isinstance(module.neuron, Threshold)]
    return {part for unit in units for part in (unit.norm, unit.neuron)}


def _own(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _is_neuron(module: nn.Module) -> bool:
    """Ours, SpikingJelly's or snnTorch's neurons."""
    theirs = ("spikingjelly.activation_based.neuron", "snntorch._neurons")
    return isinstance(module, Neuron) or any(kind.__module__.startswith(theirs) for kind in type(module).__mro__)


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
