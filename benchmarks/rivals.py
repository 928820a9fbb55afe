"""The contenders of `inference.py`: the event engine in float32 and int8, and dense ways of running one network.

All but the engine run the network with its norms folded. What leaves PyTorch leaves it as one ONNX file, which ONNX
Runtime and OpenVINO read, in float32 and quantised. Quantisers see real images. Neither the conversion nor the
calibration is timed. The configurations are those of an engineer who wants the fastest network that keeps its accuracy;
what was tried stands beside each.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.deploy import Engine, compile, fold
from spikeloom.deploy.exchange.graph import quiet, reason_of
from spikeloom.layers import Conv2d
from spikeloom.neurons import IF, LIF, MLF, PLIF
from spikeloom.ops import backend

Json = dict[str, Any]
Run = Callable[[], Any]
Contender = Callable[[Tensor], Run]
"""Takes an input, lays it out as it likes, and gives what runs the network on it, to logits."""

FLOAT32 = ("dense", "spikingjelly", "compiled", "onnx", "openvino")
BFLOAT16 = ("bf16", "openvino_bf16")
INT8 = ("onnx_int8", "openvino_int8")


class Unable(Exception):
    """Why a contender does not run here."""


def contenders(
    model: nn.Module, engine: Engine, x: Tensor, calibration: list[Tensor], leave_out: set[str]
) -> dict[str, Contender]:
    """Everything that runs the network, by name; a rival that cannot is left out with a line that says why.

    Args:
        model: the network.
        engine: made from it.
        x: an input, on which every rival is tried.
        calibration: inputs of one image each, by which quantisers choose ranges.
        leave_out: names of contenders that are not wanted.
    """
    own = fold(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    dense = with_dense_convolutions(own)
    found: dict[str, Contender] = {
        "engine": lambda x: functools.partial(engine, channels_last(x)),
        "network": eager(own),
        "dense": eager(dense),
        "bf16": eager(dense, torch.autocast("cpu", torch.bfloat16)),
    }
    onnx = functools.cache(lambda: onnx_file(model, x))
    rivals: dict[str, Callable[[], Contender]] = {
        "engine_int8": lambda: engine_int8(model, x),
        "spikingjelly": lambda: eager(with_peers(dense)),
        "compiled": lambda: torch_compiled(dense),
        "onnx": lambda: onnx_runtime(onnx()),
        "onnx_int8": lambda: onnx_runtime(onnx_int8(onnx(), calibration)),
        "openvino": lambda: openvino(onnx(), "f32"),
        "openvino_bf16": lambda: openvino(onnx(), "bf16"),
        "openvino_int8": lambda: openvino(onnx(), "int8", calibration),
    }
    for name, make in rivals.items():
        if name in leave_out:
            continue
        try:
            contender = make()
            contender(x)()
        except Exception as error:  # whatever a rival cannot do, the others are measured
            print(f"{name} is left out: {reason_of(error)}", flush=True)
        else:
            found[name] = contender
    return {name: contender for name, contender in found.items() if name not in leave_out}


def engine_int8(model: nn.Module, x: Tensor) -> Contender:
    integers = compile(model, x, weights="int8")
    return lambda x: functools.partial(integers, channels_last(x))


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


# --- PyTorch ----------------------------------------------------------------------------------------------------------


class Peer(nn.Module):
    """SpikingJelly's neuron with the constants of one of ours, from rest at every call."""

    def __init__(self, ours: IF | LIF | PLIF):
        super().__init__()
        from spikingjelly.activation_based import neuron

        common: Json = {"v_threshold": ours.v_threshold, "v_reset": ours.v_reset, "step_mode": "m"}
        if isinstance(ours, PLIF):
            self.neuron = neuron.ParametricLIFNode(decay_input=ours.decay_input, **common)
            self.neuron.w.data = ours.w.data
        elif isinstance(ours, LIF):
            self.neuron = neuron.LIFNode(tau=ours.tau, decay_input=ours.decay_input, **common)
        else:
            self.neuron = neuron.IFNode(**common)

    def forward(self, x: Tensor) -> Tensor:
        self.neuron.reset()
        return self.neuron(x)


def with_peers(model: nn.Module) -> nn.Module:
    """The model with SpikingJelly's neurons.

    Raises:
        Unable: it has none like these.
    """
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, MLF):
                raise Unable("SpikingJelly has no neurons like MLF")
            if isinstance(child, (IF, LIF, PLIF)):
                setattr(module, name, Peer(child))
    return model


def with_dense_convolutions(model: nn.Module) -> nn.Module:
    """The model with PyTorch's convolutions: ours leave out zeros, in training and here."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Conv2d):
            module.dense = True
    return model


def eager(model: nn.Module, precision: torch.autocast | None = None) -> Contender:
    """A network as PyTorch runs it."""

    def on(x: Tensor) -> Run:
        x = channels_last(x)

        def run() -> Tensor:
            with torch.no_grad():
                if precision is None:
                    return model(x)
                with precision:
                    return model(x)

        return run

    return on


def torch_compiled(model: nn.Module) -> Contender:
    """A network on the plain equations, compiled for every shape anew."""
    by_shape = functools.cache(lambda shape: torch.compile(copy.deepcopy(model)))

    def on(x: Tensor) -> Run:
        x = channels_last(x)
        compiled = by_shape(x.shape)

        def run() -> Tensor:
            with torch.no_grad(), backend("reference"):
                return compiled(x)

        return run

    return on


# --- ONNX Runtime -----------------------------------------------------------------------------------------------------


def onnx_file(model: nn.Module, x: Tensor) -> bytes:
    """The network in ONNX, with norms folded: what stands between a convolution and its norm keeps runtimes from it."""
    from spikeloom.deploy.exchange.onnx_write import to_onnx

    with tempfile.TemporaryDirectory() as folder:
        return to_onnx(fold(model), x, Path(folder) / "net.onnx").path.read_bytes()


def onnx_runtime(onnx: bytes) -> Contender:
    """ONNX Runtime on a file, with as many threads as PyTorch has, for the batch of the input."""
    import onnxruntime

    (inputs,) = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"]).get_inputs()
    axis = inputs.shape.index("batch")

    @functools.cache
    def session(batch: int) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        options.add_free_dimension_override_by_name("batch", batch)
        return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])

    def on(x: Tensor) -> Run:
        feed = {"input": x.contiguous().numpy()}
        own = session(x.shape[axis])
        return lambda: own.run(None, feed)[0]

    return on


def onnx_int8(onnx: bytes, calibration: list[Tensor]) -> bytes:
    """The file with convolutions and products in int8, by ONNX Runtime's static quantisation.

    Format and types are those that its documentation recommends for x86 with VNNI. Only convolutions and products are
    quantised: with all operators (the default) the neurons' arithmetic has a pair of conversions round every operator,
    which takes 1.5 to 2 times as long, and accuracy is no better. Activations as signed numbers take longer as well.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds: Iterator[Json] = ({"input": x.numpy()} for x in calibration)

        def get_next(self) -> Any:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder, quiet():
        plain, inferred, quantised = (Path(folder) / f"{name}.onnx" for name in ("plain", "inferred", "quantised"))
        plain.write_bytes(onnx)
        quant_pre_process(plain, inferred, skip_symbolic_shape=True)
        quantize_static(
            inferred,
            quantised,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return quantised.read_bytes()


# --- OpenVINO ---------------------------------------------------------------------------------------------------------


@functools.cache
def openvino_core() -> Any:
    """The one of this process, which stays.

    A core puts a stack for signals in place of the one there, and puts that back when it goes. Of two cores the second
    one so puts back the stack of the first, which may be gone: the next signal ended the process.
    """
    import openvino as ov

    return ov.Core()


def openvino(onnx: bytes, precision: str, calibration: list[Tensor] | None = None) -> Contender:
    """OpenVINO on a file, for the shape of the input, in one request at a time with as many threads as PyTorch has.

    Args:
        onnx: the file.
        precision: "f32", "bf16" or "int8".
        calibration: inputs for the ranges of int8.

    Raises:
        Unable: the processor has no instructions for bf16.
    """
    core = openvino_core()
    model = core.read_model(onnx)
    has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16" and not has_bf16:
        raise Unable("this processor has no bfloat16 instructions")
    if precision == "int8":
        assert calibration is not None
        model = openvino_int8(model, calibration)
        # What stays a floating-point number. In float32 it takes up to twice as long, and accuracy is no better.
        precision = "bf16" if has_bf16 else "f32"
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }

    @functools.cache
    def request(shape: tuple[int, ...]) -> Any:
        own = model.clone()
        own.reshape(shape)
        return core.compile_model(own, "CPU", settings).create_infer_request()

    def on(x: Tensor) -> Run:
        feed = {"input": x.contiguous().numpy()}
        own = request(tuple(x.shape))
        return lambda: own.infer(feed)["logits"]

    return on


def openvino_int8(model: Any, calibration: list[Tensor]) -> Any:
    """The model with convolutions and products in int8, by NNCF's post-training quantisation.

    The preset is NNCF's for convolutional networks, symmetric. The neurons' arithmetic, whose nodes are named
    LAYER/STEP, stays as it is: quantised (the default) it takes longer, as conversions stand round every operator, and
    accuracy is no better.
    """
    import nncf

    inputs = [x.numpy() for x in calibration]
    with quiet():
        return nncf.quantize(
            model,
            nncf.Dataset(inputs),
            preset=nncf.QuantizationPreset.PERFORMANCE,
            subset_size=len(inputs),
            ignored_scope=nncf.IgnoredScope(patterns=[".*/.*"], validate=False),
        )


def logits(run: Run) -> Tensor:
    """Mean logits over time, [N, classes]."""
    found = torch.as_tensor(run()).float()
    return found.mean(0) if found.dim() == 3 else found
