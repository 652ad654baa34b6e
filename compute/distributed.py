"""Several processes that train as one: torchrun --nproc-per-node N train.py …

torchrun tells each process its rank and the number of processes, the world, in the environment.
Where it did not, there is one process, and nothing here touches torch.distributed.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from config import InputError

T = TypeVar("T")
Number = TypeVar("Number", int, float)


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def is_first() -> bool:
    """Whether this is the process that prepares data, writes files and speaks."""
    return rank() == 0


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process among those of its machine. Raises InputError where they are too few."""
    if world_size() == 1 or device.type != "cuda":
        return device
    here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if here > gpus:
        raise InputError(f"{here} processes on a machine with {gpus} GPUs; give torchrun --nproc-per-node {gpus}")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes for the length of the block; GPU tensors travel by NCCL, others by gloo.

    A process whose peer has died gets an InputError: the words to look for are the other's.
    """
    if world_size() == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=12))  # the first may validate for long
    try:
        yield
        dist.barrier()  # one that left early would tear down threads that another still talks to
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise InputError(
            f"process {rank()}: another process of this run has ended; its own words say why, "
            "and the same command goes on from the last checkpoint"
        ) from None
    finally:
        dist.destroy_process_group()


def first_then_others(work: Callable[[], T]) -> T:
    """Runs `work` in the first process, then in the others, which find what it has prepared.

    Where it raises InputError in the first, that one reports it and the others leave quietly.
    """
    if world_size() == 1:
        return work()
    if is_first():
        try:
            result = work()
        except InputError:
            from_first(False)
            raise
        from_first(True)
        return result
    if not from_first(None):
        sys.exit(2)
    return work()


def wrapped(learner: nn.Module, device: torch.device) -> nn.Module:
    """The learner, whose backward pass averages gradients over the processes."""
    if world_size() == 1:
        return learner
    return DistributedDataParallel(learner, device_ids=[device.index] if device.type == "cuda" else None)


def from_first(value: T) -> T:
    """The first process' value, in all of them; they wait for it here."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: T) -> list[T]:
    """The values of all processes, by rank, in each of them."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def total(number: Number) -> Number:
    """The sum over the processes."""
    return reduced(number, "SUM")


def largest(number: Number) -> Number:
    return reduced(number, "MAX")


def reduced(number: Number, operation: str) -> Number:
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return type(number)(tensor.item())


def own_counts(batches: int, accumulation: int) -> Iterator[int]:
    """How many of so many batches are this process' own in each optimizer step.

    A step takes accumulation x world of them; at an epoch's end some processes may have none.
    """
    size = accumulation * world_size()
    for start in range(0, batches, size):
        yield len(range(start + rank(), min(start + size, batches), world_size()))


def own_batches(batches: Iterable[T], accumulation: int) -> Iterator[T]:
    """This process' batches of those that all processes have alike; in a step without one, one to take in vain."""
    batches = iter(batches)
    while group := list(islice(batches, accumulation * world_size())):
        yield from group[rank() :: world_size()] or group[-1:]
