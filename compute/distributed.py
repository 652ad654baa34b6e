"""Data-parallel training in several processes: torchrun --nproc-per-node N train.py …

torchrun sets the rank of each process and the number of processes (the world size) in the environment.
Without torchrun there is one process, and torch.distributed is never called.
"""

import contextlib
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import islice
from typing import TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from compute.heartbeat import Heartbeat
from config import InputError

JOIN_TIMEOUT = timedelta(minutes=1)  # to connect processes that have all started
PATIENCE = timedelta(hours=12)  # others wait while the first one prepares the data, validates or saves

T = TypeVar("T")
Number = TypeVar("Number", int, float)


def world_size() -> int:
    return from_environment("WORLD_SIZE", default=1)


def rank() -> int:
    return from_environment("RANK", default=0)


def from_environment(name: str, default: int) -> int:
    """A number that torchrun sets. Raises InputError if it is none."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise InputError(f"the environment has {name}={value}; start with torchrun, which sets it, or unset it")
    return int(value)


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


# ---------------------------------------------------------------------------- joining and leaving

attempt = ""  # a text that all processes agree on when they join, another one after each restart
patient_group: dist.ProcessGroup | None = None  # in which processes wait for the first one, up to PATIENCE


@contextlib.contextmanager
def process_group(seconds: float) -> Iterator[None]:
    """Context with a process group, which exchanges GPU tensors through NCCL and others through gloo.

    Raises InputError if another process dies or does not join; the cause is in the output of the other one. Ends this
    process if another one does not respond for `seconds` (see `Heartbeat`).
    """
    if world_size() == 1:
        yield
        return
    try:
        with joined(timedelta(seconds=seconds)):
            yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise InputError(
            f"process {rank()}: another process of this run has ended or does not respond; its output gives the "
            "reason, and the same command resumes from the last checkpoint"
        ) from None


@contextlib.contextmanager
def joined(timeout: timedelta) -> Iterator[None]:
    """Context in which this process is connected to the others. In a training step, they wait up to 2 x `timeout`."""
    global attempt, patient_group
    check_environment()
    # Functions of this module have the process group of its first import as a default value. DistributedDataParallel
    # imports it; the group would then outlive `destroy_process_group`, and gloo's threads, if they are still busy when
    # Python ends, abort the process.
    import torch.distributed.nn

    stores = [next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))[0] for _ in range(2)]
    attempt = agree_on_attempt(stores[0], timeout)
    store, own_store = (dist.PrefixStore(attempt, store) for store in stores)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=JOIN_TIMEOUT)
    heartbeat = Heartbeat(own_store, rank(), world_size(), timeout.total_seconds())
    try:
        sum_over_processes(0)  # all are connected; `dist.barrier` would use a GPU, which is not chosen yet
        heartbeat.start()
        dist.distributed_c10d._set_pg_timeout(2 * timeout)  # the heartbeat comes first, because it names the process
        patient_group = dist.new_group(timeout=PATIENCE, backend="gloo")
        yield
        heartbeat.stop()  # the store may end with the first process
        sum_over_processes(0)  # a process that leaves early would close connections that others still use
    finally:
        heartbeat.stop()
        patient_group = None
        dist.destroy_process_group()


def check_environment() -> None:
    """Raises InputError if the environment lacks what torchrun sets, or has impossible values."""
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise InputError(f"the environment has WORLD_SIZE but no {', '.join(missing)}; start with torchrun")
    if rank() >= world_size() or not 0 < from_environment("MASTER_PORT", default=0) < 2**16:
        found = " ".join(f"{name}={os.environ[name]}" for name in ("WORLD_SIZE", "RANK", "MASTER_PORT"))
        raise InputError(f"the environment has {found}, which is impossible; start with torchrun")
    require_address(os.environ["MASTER_ADDR"])


def require_address(host: str) -> None:
    """Waits until the name of a machine can be resolved. Raises InputError if that takes longer than JOIN_TIMEOUT."""
    deadline = time.monotonic() + JOIN_TIMEOUT.total_seconds()
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError):  # the name of a machine that is starting may appear later
            if time.monotonic() > deadline:
                raise InputError(
                    f"the name {host} (MASTER_ADDR, the machine of process 0) cannot be resolved; correct it, or give "
                    "its IP address"
                ) from None
            time.sleep(1)


def agree_on_attempt(store: dist.Store, timeout: timedelta) -> str:
    """A random text of the first process, in every process. Raises InputError if one does not come.

    torchrun's store outlives the processes that it restarts, with all their entries, and the number of restarts differs
    between machines (PyTorch issue 135712). So every process asks under a random name, which the first one answers.
    """
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        timeout = min(timeout, JOIN_TIMEOUT)  # if that fails, torchrun tries again
    own = uuid4().hex
    if not is_first():
        store.set(f"asks/{rank()}", own)
        store.wait([f"answer/{own}"], timeout)
        answer = store.get(f"answer/{own}").decode()
        store.set(f"{answer}/{rank()}", "here")
        store.wait([f"{answer}/complete"], timeout)
        return answer
    missing, deadline = set(range(1, world_size())), time.monotonic() + timeout.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            names = ", ".join(map(str, sorted(missing)))
            raise InputError(f"process {names} of {world_size()} has not joined within {timeout.seconds} s")
        for other in missing:
            if store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", own)
        missing = {other for other in missing if not store.check([f"{own}/{other}"])}
        time.sleep(0.1)
    store.set(f"{own}/complete", "")
    return own


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
    broadcast(None)  # waits for the first process, which may still be validating
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # from PyTorch 2.13 on, this option has another name
        # The positional encodings never change.
        device_ids = {"device_ids": [device.index]} if device.type == "cuda" else {}
        return DistributedDataParallel(module, broadcast_buffers=False, **device_ids)


def without_averaging(module: nn.Module) -> contextlib.AbstractContextManager:
    """Context in which gradients accumulate without communication: for all but the last batch of a step."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()


def broadcast(value: T) -> T:
    """The first process's value, in every process. Blocks until every process has called it."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=patient_group)
    return values[0]


def gather(value: T) -> list[T]:
    """The values of all processes, ordered by rank. Blocks until every process has called it."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value, group=patient_group)
    return values


def sum_over_processes(number: Number) -> Number:
    """The sum of the processes' numbers. Only within a step, because the others do not wait for long (see `joined`)."""
    return all_reduce(number, "SUM", None)


def max_over_processes(number: Number) -> Number:
    """The largest number of all processes. Blocks until every process has called it."""
    return all_reduce(number, "MAX", patient_group)


def all_reduce(number: Number, operation: str, group: dist.ProcessGroup | None) -> Number:
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(tensor, getattr(dist.ReduceOp, operation), group)
    return type(number)(tensor.item())


def own_counts(batches: int, batches_per_step: int) -> Iterator[int]:
    """For each optimizer step of an epoch with `batches` batches, how many of them this process trains on.

    The batches of a step are dealt out in turn; a process may have none in the last step of an epoch.
    """
    for start in range(0, batches, batches_per_step):
        yield len(range(start + rank(), min(start + batches_per_step, batches), world_size()))


def own_batches(batches: Iterable[T], batches_per_step: int) -> Iterator[T]:
    """The batches that this process trains on.

    In a step that has none for it, the last batch of the step is repeated as a dummy, because every process must run
    a backward pass for the gradients to be exchanged.
    """
    batches = iter(batches)
    while step := list(islice(batches, batches_per_step)):
        yield from step[rank() :: world_size()] or step[-1:]
