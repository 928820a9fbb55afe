"""One network to one file, in the format asked for: what `spikeloom export` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spikeloom.deploy.exchange.nir_write import to_nir, write_nir
from spikeloom.deploy.exchange.onnx_write import to_onnx
from spikeloom.errors import UsageError
from spikeloom.files import PathLike


def export_file(
    model: nn.Module, example: Tensor, sequence: bool, to: str, path: PathLike, steps: int | None
) -> dict[str, Any]:
    """Writes a network and says what was written.

    Args:
        model, example: as `to_nir` and `to_onnx` take them.
        sequence: whether the example is [T, N, ...].
        to: "nir" or "onnx".
        path: of the file.
        steps: T, where it is not to be that of the example or of `model.T`.

    Returns:
        format, path, bytes, T, nodes; of ONNX the opset, of NIR the edges.

    Raises:
        UsageError: steps that the network or the example has not, or as `to_nir` and `to_onnx`.
    """
    if steps is not None:
        example = _of_steps(model, example, sequence, steps)
    if to == "onnx":
        onnx = to_onnx(model, example, path)
        found = {"T": onnx.steps, "nodes": onnx.nodes, "opset": onnx.opset}
    else:
        graph = to_nir(model, example)
        write_nir(graph, path)
        found = {"T": graph.metadata["T"], "nodes": len(graph.nodes), "edges": len(graph.edges)}
    return {"format": to, "path": str(path), "bytes": Path(path).stat().st_size, **found}


def _of_steps(model: nn.Module, example: Tensor, sequence: bool, steps: int) -> Tensor:
    """The example for a network of so many steps; of a static image the network itself is told."""
    if steps < 1:
        raise UsageError(f"T must be at least 1, got {steps}")
    if sequence:
        if steps > len(example):
            raise UsageError(f"the data have {len(example)} steps, so T cannot be {steps}: change the data's own steps")
        return example[:steps]
    if not isinstance(getattr(model, "T", None), int):
        raise UsageError(f"{type(model).__name__} does not repeat an image, so it has no T to set: leave out --T")
    model.T = steps  # pyright: ignore[reportArgumentType]
    return example
