"""Data-parallel training in several processes: torchrun --nproc-per-node N train.py …

torchrun sets the rank of each process and the number of processes (the world size) in the environment.
Without torchrun there is one process, and torch.distributed is never called.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from config import InputError

# Other processes wait while the first one prepares the data or validates, but not in the exchange of gradients.
TIMEOUT, GRADIENT_TIMEOUT = timedelta(hours=12), timedelta(minutes=10)

T = TypeVar("T")
Number = TypeVar("Number", int, float)


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def is_first() -> bool:
    """Whether this process has rank 0: it prepares the data, writes files and prints."""
    return rank() == 0


def own_device(device: torch.device) -> torch.device:
    """The GPU that belongs to this process. Raises InputError if its machine has fewer GPUs than processes."""
    if world_size() == 1 or device.type != "cuda":
        return device
    processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if processes > gpus:
        raise InputError(f"{processes} processes on a machine with {gpus} GPUs; use torchrun --nproc-per-node {gpus}")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Context with a process group, which exchanges GPU tensors through NCCL and others through gloo.

    If another process dies, this one raises InputError; the cause is in the output of the other one.
    """
    if world_size() == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield
        dist.barrier()  # a process that leaves early would close connections that others still use
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise InputError(
            f"process {rank()}: another process of this run has ended; its output gives the reason, "
            "and the same command resumes from the last checkpoint"
        ) from None
    finally:
        dist.destroy_process_group()


def first_then_others(work: Callable[[], T]) -> T:
    """Calls `work` in the first process, then in the others, which reuse the files that the first has written.

    If it raises InputError in the first process, that process reports it and the others exit without a message.
    """
    if world_size() == 1:
        return work()
    if is_first():
        try:
            result = work()
        except InputError:
            broadcast(False)
            raise
        broadcast(True)
        return result
    if not broadcast(None):
        sys.exit(2)
    return work()


def averaging_gradients(module: nn.Module, device: torch.device) -> nn.Module:
    """The module, wrapped in DistributedDataParallel if there are several processes."""
    if world_size() == 1:
        return module
    options = {"broadcast_buffers": False}  # the positional encodings never change
    if device.type == "cuda":
        broadcast(None)  # waits for the first process, which may still be validating
        options |= {"device_ids": [device.index], "process_group": dist.new_group(timeout=GRADIENT_TIMEOUT)}
    return DistributedDataParallel(module, **options)


def without_averaging(module: nn.Module) -> contextlib.AbstractContextManager:
    """Context in which gradients accumulate without communication: for all but the last batch of a step."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()


def broadcast(value: T) -> T:
    """The first process's value, in every process. Blocks until every process has called it."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: T) -> list[T]:
    """The values of all processes, ordered by rank. Blocks until every process has called it."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_processes(number: Number) -> Number:
    return all_reduce(number, "SUM")


def max_over_processes(number: Number) -> Number:
    return all_reduce(number, "MAX")


def all_reduce(number: Number, operation: str) -> Number:
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return type(number)(tensor.item())


def own_counts(batches: int, accumulation: int) -> Iterator[int]:
    """For each optimizer step of an epoch with `batches` batches, how many of them this process trains on.

    A step takes accumulation x world size batches; in the last step of an epoch a process may have none.
    """
    size = accumulation * world_size()
    for start in range(0, batches, size):
        yield len(range(start + rank(), min(start + size, batches), world_size()))


def own_batches(batches: Iterable[T], accumulation: int) -> Iterator[T]:
    """The batches that this process trains on.

    In a step that has none for it, the last batch of the step is repeated as a dummy, because every process must run
    a backward pass for the gradients to be exchanged.
    """
    batches = iter(batches)
    while step := list(islice(batches, accumulation * world_size())):
        yield from step[rank() :: world_size()] or step[-1:]
