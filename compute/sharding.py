"""Sharded training (`--shard`): each of N processes keeps 1/N of the weights, gradients, optimizer state and EMA.

PyTorch's `fully_shard` (ZeRO stage 3, Rajbhandari et al., 2020) gathers the weights of a block before its
forward and its backward pass, and frees them afterwards. The gradients of a block are averaged, and each process keeps
its part. A sharded tensor is a `DTensor`: its shape is that of the whole, and operations on it return results for the
whole.

These modules of PyTorch are imported where they are used, because this takes a second.
"""

import os
import sys
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compute import distributed
from config import Config


def is_wanted(config: Config) -> bool:
    """Whether training is sharded; with one process, there is nothing to divide."""
    return config.shard and distributed.world_size() > 1


def shard(model: nn.Module, blocks: list[nn.Module], method: str, device: torch.device) -> None:
    """Replaces the parameters by this process's part of them, on the device; all processes must have equal ones.

    The parameters of each block are gathered for its `forward`, the others for `method` of the model.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(model, method)


def is_sharded(value: Any) -> bool:
    return hasattr(value, "full_tensor")  # a DTensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself or, if it is sharded, all of it. All processes must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def in_first_process(value: Any) -> Any:
    """The value with all of each sharded tensor in it, in CPU memory; None for these in the other processes.

    All processes must call it.
    """
    if is_sharded(value):
        tensor = value.full_tensor()
        return tensor.cpu() if distributed.is_first() else None
    if isinstance(value, dict):
        return {key: in_first_process(item) for key, item in value.items()}
    return value


def weights_in_first_process(model: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` of a sharded model, see `in_first_process`. Tied weights remain one tensor."""
    tensors = {parameter: in_first_process(parameter.detach()) for parameter in model.parameters()}
    return {name: tensors[parameter] for name, parameter in model.named_parameters(remove_duplicate=False)}


def divided_like(tensor: Tensor, example: Tensor | None) -> Tensor:
    """This process's part of a tensor that all processes have, if `example` is sharded; otherwise the tensor itself."""
    if not is_sharded(example):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(example.device)
    return distribute_tensor(tensor, example.device_mesh, example.placements, src_data_rank=None)  # no communication


def end_process(status: int) -> NoReturn:
    """Ends this process without Python's finalization, which gloo's threads could abort (see `distributed.joined`).

    Caches of PyTorch hold on to the process group after sharded training, so that these threads do not end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
