"""Batches of a corpus that is read while training (`--stream`).

The shards are read in another order in every epoch. Their blocks are divided among the *parts*: the data loader workers
of all processes. A part reads a buffer of `stream_buffer` pairs, encodes it, sorts it by length and divides it into
batches, which it shuffles, all as for a corpus on disk; meanwhile a thread reads the next buffer.

A buffer depends only on the settings, the epoch and its position. To resume, a part reads the buffer at hand again and
leaves out the batches that have been trained on, so that the batches are those of an uninterrupted run.
"""

import contextlib
import math
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from compute import distributed
from config import Config, InputError
from corpora.cleaning import clean
from corpora.files import DATA_VERSION
from corpora.streams import Block, HubShards, LocalShards, names_hash
from dataset import Batches, BilingualDataset, count_blank, encode_pairs
from training.log import print_line
from training.signals import starting_workers

# How workers are started. They use the thread pools of Arrow and of the tokenizers, which do not survive a fork of the
# training process: forked workers rarely hung or crashed (once in 160 tests). The fork server uses no pool.
STREAM_START_METHOD = "forkserver" if sys.platform == "linux" else "spawn"
PRELOADED = ["datasets", "pyarrow.parquet", "torch"]  # imported once by the fork server, not by each worker


class Counts(NamedTuple):
    """Numbers of pairs: read, and skipped or removed for each reason."""

    read: int = 0
    blank: int = 0
    long: int = 0
    length_ratio: int = 0

    def plus(self, other: "Counts") -> "Counts":
        return Counts(*map(sum, zip(self, other, strict=True)))


class Cursor(NamedTuple):
    """A position of a part: the buffer at hand, the batches taken from it, and the counts of all buffers begun so far.

    The buffer begins at block `block` of the shard that is at index `index` of the part's shards.
    """

    index: int = 0
    block: int = 0
    batch: int = 0
    counts: Counts = Counts()


class Work(NamedTuple):
    """The shards that are left in an epoch, each with its first block, and the number of parts that share them."""

    shards: list[tuple[int, int]]
    parts: int

    def of(self, part: int) -> tuple[list[tuple[int, int]], int, int]:
        """The shards of a part, and which of their blocks are its own: those with (index + block) % sharing == turn.

        Parts have shards of their own only where the numbers allow it: 100 shards and 6 parts make two groups, in which
        3 parts share 50 shards and each takes a third of the blocks. So all parts have about the same number of pairs.
        """
        groups = math.gcd(len(self.shards), self.parts)
        return self.shards[part % groups :: groups], part // groups, self.parts // groups

    def after(self, cursors: list[Cursor]) -> list[tuple[int, int]]:
        """What is left after the cursors of all parts, for another number of parts.

        Parts that share shards are not equally far: up to a buffer of each is read twice, and nothing is left out.
        """
        groups, left = math.gcd(len(self.shards), self.parts), []
        for group in range(groups):
            index, block, *_ = min(cursors[group::groups])
            begun, *others = self.shards[group::groups][index:]
            left += [(begun[0], max(block, begun[1])), *others]
        return left


ENCODED = pa.schema(
    [("src", pa.string()), ("tgt", pa.string()), ("src_ids", pa.list_(pa.int32())), ("tgt_ids", pa.list_(pa.int32()))]
)


class Buffer(BilingualDataset):
    """The pairs of some blocks, encoded in memory, and their `counts`."""

    def __init__(self, blocks: Iterable[Block], tokenizers: tuple[Tokenizer, Tokenizer], config: Config):
        from datasets import Dataset
        from datasets.table import InMemoryTable

        self.prepare(*tokenizers, config.seq_len, config.bpe_dropout, config.seed, config.batch_tokens)
        tables, self.counts = [], Counts()
        for block in blocks:
            pairs, removed = clean(Dataset.from_dict(block), config.max_length_ratio)
            encoded = encode_pairs(pairs[:], *tokenizers, config.seq_len, DATA_VERSION)
            tables.append(pa.table(encoded, ENCODED))
            blank = count_blank(pairs)
            long = len(pairs) - len(tables[-1]) - blank
            self.counts = self.counts.plus(Counts(len(block["src"]), blank, long, removed.length_ratio))
        self.encoded = Dataset(InMemoryTable(pa.concat_tables(tables))).with_format("arrow")


class Item(NamedTuple):
    """What a part yields: a batch, the worker that made it, and the cursor after it.

    Without a batch, all pairs of a buffer were skipped. `error` is the text of an InputError, which a worker process
    could not raise without its traceback.
    """

    worker: int
    cursor: Cursor
    batch: dict | None = None
    error: str = ""


@dataclass
class Reader(torch.utils.data.IterableDataset):
    """Yields the items of the parts of one process, or in a data loader worker, those of its part."""

    config: Config
    shards: LocalShards | HubShards
    tokenizers: tuple[Tokenizer, Tokenizer]
    epoch: int
    work: Work
    cursors: list[Cursor]  # one per worker of this process
    turn: int  # the worker whose batch is the next
    first_part: int  # of this process

    def __iter__(self) -> Iterator[Item]:
        info = torch.utils.data.get_worker_info()
        # The data loader asks its workers in turn, from its first one on.
        worker = (self.turn + info.id) % len(self.cursors) if info else 0
        try:
            yield from self.items(worker)
        except InputError as error:
            yield Item(worker, self.cursors[worker], error=str(error))

    def items(self, worker: int) -> Iterator[Item]:
        """The items of one part. The next buffer is read in a thread."""
        part, taken = self.first_part + worker, self.cursors[worker].batch
        buffers = self.buffers(part, self.cursors[worker])
        with ThreadPoolExecutor(1) as thread:
            upcoming = thread.submit(next, buffers, None)
            while (found := upcoming.result()) is not None:
                upcoming = thread.submit(next, buffers, None)
                config, buffer, before, after = found
                batches = list(Batches(buffer, config, self.epoch)) if len(buffer) else []
                for number, positions in enumerate(batches[taken:], start=taken + 1):
                    cursor = before._replace(batch=number, counts=after.counts) if number < len(batches) else after
                    yield Item(worker, cursor, buffer[positions])
                if not batches:
                    yield Item(worker, after)
                taken = 0

    def buffers(self, part: int, cursor: Cursor) -> Iterator[tuple[Config, Buffer, Cursor, Cursor]]:
        """The buffers of a part from the cursor on: config with a seed of its own, buffer, cursors before and after."""
        blocks, size = self.blocks(part, cursor), max(1, self.config.stream_buffer // self.shards.block)
        while read := list(islice(blocks, size)):
            places, texts = zip(*read, strict=True)
            seeds = np.random.SeedSequence((self.config.seed, self.epoch, part, cursor.index, cursor.block))
            config = replace(self.config, seed=int(seeds.generate_state(1)[0]))
            buffer = Buffer(texts, self.tokenizers, config)
            # A buffer that was begun before is in the counts already.
            counts = cursor.counts if cursor.batch else cursor.counts.plus(buffer.counts)
            after = Cursor(*places[-1], counts=counts)
            yield config, buffer, cursor, after
            cursor = after

    def blocks(self, part: int, cursor: Cursor) -> Iterator[tuple[tuple[int, int], Block]]:
        """The blocks of a part from the cursor on, each with the index of its shard and the next block's number."""
        shards, turn, sharing = self.work.of(part)
        for index, (shard, first) in islice(enumerate(shards), cursor.index, None):
            if index == cursor.index:
                first = max(first, cursor.block)
            for number, block in enumerate(self.shards.blocks(shard, first), start=first):
                if (index + number) % sharing == turn:
                    yield (index, number + 1), block


class StreamedPairs:
    """The training pairs of a stream: yields the batches of each optimizer step, and remembers its position.

    Batches are as those of `BilingualDataset`. Tokenizers were trained on the `first_pairs` pairs of `load_sample`, of
    which `sample` holds some, encoded, for estimates.
    """

    def __init__(
        self,
        config: Config,
        shards: LocalShards | HubShards,
        first_pairs: int,
        sample: BilingualDataset,
        *tokenizers: Tokenizer,
    ):
        self.config, self.shards, self.first_pairs, self.tokenizers = config, shards, first_pairs, tokenizers
        self.sample = sample
        self.workers, self.epoch = max(1, config.num_workers), -1

    @property
    def parts(self) -> int:
        return distributed.world_size() * self.workers

    @property
    def fingerprint(self) -> str:
        """Number and names of the shards, and the fingerprint of the sample. Later rows of the shards may be mended."""
        return f"{len(self.shards.names)} shards {names_hash(self.shards)} {self.sample.fingerprint}"

    def begin_epoch(self, epoch: int) -> None:
        """Starts an epoch, unless the restored position is in it."""
        if epoch != self.epoch:
            order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.shards.names))
            self.start(epoch, [(shard, 0) for shard in order.tolist()], Counts())

    def start(self, epoch: int, shards: list[tuple[int, int]], counts: Counts) -> None:
        """Divides these shards, each with its first block, among the parts."""
        self.epoch, self.work, self.turn = epoch, Work(shards, self.parts), 0
        self.cursors = [
            Cursor(counts=counts if distributed.is_first() and w == 0 else Counts()) for w in range(self.workers)
        ]

    def state_dict(self) -> dict:
        """The position as lists of numbers. All processes must call it."""
        cursors = [[c.index, c.block, c.batch, list(c.counts)] for c in self.cursors]
        return {
            "epoch": self.epoch,
            "shards": [list(shard) for shard in self.work.shards],
            "processes": distributed.gather({"turn": self.turn, "cursors": cursors}),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores a position, exactly if the numbers of processes and workers are those of before.

        With others, the shards that are left are divided again: the epoch continues in another order.
        """
        cursors = [
            [Cursor(index, block, batch, Counts(*counts)) for index, block, batch, counts in process["cursors"]]
            for process in state["processes"]
        ]
        everyone = [cursor for own in cursors for cursor in own]
        check_position(state, everyone, len(self.shards.names))
        work = Work([tuple(shard) for shard in state["shards"]], len(everyone))
        if [len(own) for own in cursors] == [self.workers] * distributed.world_size():
            self.epoch, self.work, rank = state["epoch"], work, distributed.rank()
            self.cursors, self.turn = cursors[rank], state["processes"][rank]["turn"]
            return
        print_line(
            f"the rest of the epoch is read in another order, by {self.parts} readers instead of {len(everyone)}"
        )
        counts = Counts()
        for cursor in everyone:
            counts = counts.plus(cursor.counts)
        self.start(state["epoch"], work.after(everyone), counts)

    def steps(self, size: int, pin_memory: bool) -> Iterator[tuple[list[dict], int, bool]]:
        """For each optimizer step of the rest of the epoch: the batches of this process, of which there may be none,
        the number of batches of all processes, and whether it is the last step.

        A step has `size` batches, and at least one per process, until the pairs run out. When it is yielded, the
        position is that after it. All processes must take all steps.
        """
        items, share = self.items(pin_memory), max(1, len(range(distributed.rank(), size, distributed.world_size())))
        taken, total = self.take(items, share)
        while total:
            upcoming, upcoming_total = self.take(items, share)
            self.advance(taken if upcoming_total else taken + upcoming)
            yield [item.batch for item in taken if item.batch], total, upcoming_total == 0
            taken, total = upcoming, upcoming_total

    def items(self, pin_memory: bool) -> Iterator[Item]:
        position = self.epoch, self.work, list(self.cursors), self.turn, distributed.rank() * self.workers
        reader = Reader(self.config, self.shards, self.tokenizers, *position)
        workers = self.config.num_workers
        multiprocessing.set_forkserver_preload(PRELOADED)
        with starting_workers() if workers else contextlib.nullcontext():
            loader = DataLoader(
                reader,
                batch_size=None,
                collate_fn=as_it_is,
                num_workers=workers,
                multiprocessing_context=STREAM_START_METHOD if workers else None,
                worker_init_fn=prepare_worker,
                pin_memory=pin_memory,
                generator=torch.Generator(),
            )
            items = iter(loader)
        try:
            for item in items:
                if item.error:
                    raise InputError(item.error)
                yield item
        finally:
            del items  # ends the workers at once, also while a traceback keeps this frame

    def take(self, items: Iterator[Item], share: int) -> tuple[list[Item], int]:
        """The items of this process's next step with `share` batches, and the number of batches of all processes."""
        taken, missing = [], share
        while missing and (item := next(items, None)):
            taken.append(item)
            missing -= item.batch is not None
        return taken, distributed.sum_over_processes(share - missing)

    def advance(self, items: list[Item]) -> None:
        for item in items:
            self.cursors[item.worker] = item.cursor
            self.turn = (item.worker + 1) % self.workers

    def summary(self) -> str:
        """The pairs read and skipped in this epoch so far. All processes must call it."""
        counts = Counts(*(distributed.sum_over_processes(sum(c.counts[i] for c in self.cursors)) for i in range(4)))
        removed = f", {counts.length_ratio:,} by --max-length-ratio" if self.config.max_length_ratio else ""
        return (
            f"pairs read in this epoch: {counts.read:,}; skipped: {counts.blank:,} with a blank side, "
            f"{counts.long:,} with more than {self.config.seq_len} tokens (--seq-len){removed}"
        )


def check_position(state: dict, cursors: list[Cursor], shards: int) -> None:
    """Raises ValueError for a position that no run can have saved."""
    left = [number for shard in state["shards"] for number in shard]
    numbers = [number for cursor in cursors for number in (*cursor[:3], *cursor.counts)]
    if any(type(number) is not int or number < 0 for number in (state["epoch"], *left, *numbers)):
        raise ValueError("its position in the stream is not made of numbers from 0 on")
    if not cursors or any(shard >= shards for shard, _ in state["shards"]):
        raise ValueError("its position in the stream is in other shards")
    if any(cursor.index > len(state["shards"]) for cursor in cursors):
        raise ValueError("its position in the stream is beyond the last shard")
    if any(p["turn"] not in range(len(p["cursors"])) for p in state["processes"]):
        raise ValueError("its position in the stream is that of a missing worker")


def as_it_is(item: Item) -> Item:
    return item


def prepare_worker(worker: int) -> None:
    """Leaves the other cores to the training process and the other workers, and ends with the training process.

    PyTorch's own check for the latter waits for the end of the fork server, which waits for that of its workers.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.excepthook = report_error_of_worker
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def report_error_of_worker(*error) -> None:
    """Replaces `sys.excepthook` in a worker: says nothing if a batch cannot be sent because the parent was killed."""
    parent = multiprocessing.parent_process()
    parent.join(timeout=1)  # its sockets may close a little before it has ended
    if parent.is_alive():
        sys.__excepthook__(*error)
