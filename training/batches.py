"""The batches of each optimizer step, dealt out to the processes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch

from compute import distributed
from config import Config, InputError
from dataset import Batches, BilingualDataset, make_loader
from training.signals import starting_workers
from training.state import Progress
from training.streaming import StreamedPairs


class StepBatches(NamedTuple):
    """The batches of one optimizer step that this process trains on."""

    batches: list[dict]  # equally many in every process
    dummies: int  # number of batches at the end with weight 0: other processes have more than this one
    consumed: int  # number of batches of all processes in this step
    is_last: bool = False  # of the epoch

    @classmethod
    def of(cls, found: list[dict], own: int, passes: int, consumed: int, is_last: bool) -> StepBatches:
        """Of one or more batches, the first `own` count; the last one is repeated up to `passes` batches."""
        return cls(found + found[-1:] * (passes - len(found)), passes - own, consumed, is_last)


def optimizer_steps(
    train: BilingualDataset | StreamedPairs, size: int, config: Config, progress: Progress, device: torch.device
) -> Iterator[StepBatches]:
    """Yields the steps of the epoch, from the batch of `progress` on. A step has `size` batches of all processes."""
    if config.stream:
        passes = math.ceil(size / distributed.world_size())
        with explained_worker_loss(config):
            for own, consumed, is_last in train.steps(size, pin_memory=device.type == "cuda"):
                yield StepBatches.of(own or [train.sample[[0]]], len(own), passes, consumed, is_last)
        return
    batches, start = Batches(train, config, progress.epoch), progress.batch
    own = distributed.own_batches(batches.starting_at(start), size)
    with starting_workers() if config.num_workers else contextlib.nullcontext():
        loader = iter(make_loader(train, own, config.num_workers, pin_memory=device.type == "cuda"))
    for count in distributed.own_counts(len(batches) - start, size):
        consumed = min(size, len(batches) - start)
        passes = math.ceil(consumed / distributed.world_size())  # with --shard, each one needs all processes
        with explained_worker_loss(config):
            found = list(islice(loader, max(1, count)))
        yield StepBatches.of(found, count, passes, consumed, consumed == len(batches) - start)
        start += size


@contextlib.contextmanager
def explained_worker_loss(config: Config) -> Iterator[None]:
    """Context in which the error of a data loader worker that was killed becomes an InputError."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            "a data loader worker was killed, possibly because memory ran out; "
            f"lower --num-workers ({config.num_workers}) and resume with the same command"
        ) from None
