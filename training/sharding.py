"""A run's weights divided among its processes (FSDP2), for models that one device cannot hold.

Every layer of both towers is divided by itself and put together for its own pass alone; embeddings, heads and time
conditioning for a pass of the model. Gradients and the optimiser's state are divided as the weights are. What is to be
stored is put together tensor by tensor, on the host of the main process.
"""

from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate

from ..modeling_twotower import TwoTowerForBlockDiffusion


def shard(model: TwoTowerForBlockDiffusion, device: torch.device) -> None:
    """Leave to each process its part of every parameter, on its device of the kind of `device`."""
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in (*model.context_tower.layers, *model.denoiser_tower.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, put together if it is divided, which takes all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(value: Any, keep: bool) -> Any:
    """
    Tensors in dicts and lists with those that are divided put together, which takes all processes.

    Args:
        value: tensors that are not divided, and what else is in it, stay as they are.
        keep: whether this process wants them, on its host; else None stands for those that are divided.
    """
    if isinstance(value, DTensor):
        together = whole(value)
        return together.cpu() if keep else None
    if isinstance(value, dict):
        return {name: gathered(each, keep) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(each, keep) for each in value)
    return value


def divided_as(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that all have, if the parameter of its shape is divided; else all of it."""
    if not isinstance(parameter, DTensor):
        return tensor
    everywhere = DTensor.from_local(tensor.to(parameter.device), parameter.device_mesh, [Replicate()], run_check=False)
    return everywhere.redistribute(placements=parameter.placements)


__all__ = ["divided_as", "gathered", "shard", "whole"]
