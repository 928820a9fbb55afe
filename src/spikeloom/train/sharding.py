"""A model shared out among processes: each keeps a part of every parameter, gradient and moment (FSDP2).

This is PyTorch's own `fully_shard`; accelerate offers it on accelerators alone, and not on CPUs.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from spikeloom.layers.sync_batch_norm import processes

# PyTorch's modules for this take half a second to import, which a run of one process does not need to spend.


def shard(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shares a model out among all processes: each block of its lists, and then what is left.

    A block's parameters are whole while the block computes. One process keeps the model as it is.
    """
    if accelerator.num_processes == 1:
        return accelerator.prepare_model(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Logits are views; nothing writes into them.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    model = model.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return accelerator.prepare_model(model, evaluation_mode=True)  # its precision; the rest is done


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with parameters and children that stand in lists."""
    for child in module.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            yield from (part for part in child if [*part.children()] and [*part.parameters()])
        else:
            yield from _blocks(child)


def whole(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors put together from their parts, in the main process; the others help and get nothing.

    What is not shared out comes back as it is, in every process.
    """
    if processes(None) == 1:
        return dict(tensors)
    from torch.distributed.tensor import DTensor

    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            found[name] = tensor
            continue
        full = tensor.full_tensor()
        if dist.get_rank() == 0:
            found[name] = full.cpu()
    return found


def part_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor: that which it has of a parameter of the same shape."""
    if processes(None) == 1:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


@contextlib.contextmanager
def held_whole(model: nn.Module) -> Generator[None]:
    """Keeps all parameters whole in every process, so that each runs the model as often as it likes."""
    if processes(None) == 1:
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not parts[0], recurse=False)
            part.reshard()
