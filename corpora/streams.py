"""Corpora that are read while training (`--stream`): local shards, and Hub datasets. Nothing is written to disk.

A shard is one file of the corpus. It is read in blocks of BLOCK consecutive pairs, so that a position in the corpus is
the number of a shard and the number of a block.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from config import Config, InputError, split_source
from corpora.files import DATA_VERSION, FORMATS, format_of, read_rows, text_of
from corpora.sources import open_hub

if TYPE_CHECKING:
    from datasets import Dataset

BLOCK = 1 << 10  # pairs; shards carry it as `block` to the worker processes
SAMPLE, SAMPLED_SHARDS = 100_000, 100  # pairs that tokenizers are trained on, and shards that they are taken from

Block = dict[str, list[str]]  # the columns src and tgt, up to BLOCK texts each


class LocalShards:
    """Files in one of FORMATS, with columns or fields named by the two languages."""

    def __init__(self, paths: list[str], languages: tuple[str, str]):
        self.paths, self.languages, self.block = paths, languages, BLOCK
        self.names = [os.path.basename(path) for path in paths]

    def blocks(self, shard: int, first: int = 0) -> Iterator[Block]:
        """The blocks of a shard from number `first` on. Raises InputError for a bad row, or if there are no pairs."""
        path, number = self.paths[shard], 0
        rows = read_rows(((path,),), self.languages, DATA_VERSION)
        try:
            number += sum(1 for _ in islice(rows, first * self.block))
            while block := list(islice(rows, self.block)):
                yield {side: [row[side] for row in block] for side in ("src", "tgt")}
                number += len(block)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path} cannot be read after row {number:,} ({error}); restore or remove it") from None
        if number == 0:
            raise InputError(f"{path} contains no pairs; restore or remove it")


class HubShards:
    """The files of a split of a Hub dataset."""

    def __init__(self, name: str, split: str, config: Config):
        self.dataset, _ = open_hub(name, split, config, streaming=True)
        self.languages, self.block = (config.lang_src, config.lang_tgt), BLOCK
        self.names = [f"{name}:{split} shard {shard}" for shard in range(self.dataset.num_shards)]

    def blocks(self, shard: int, first: int = 0) -> Iterator[Block]:
        """The blocks of a shard from number `first` on. Raises InputError for a row that lacks a language."""
        rows = self.dataset.shard(len(self.names), shard).skip(first * self.block)
        number = first * self.block
        try:
            for columns in rows.iter(self.block):
                block: Block = {"src": [], "tgt": []}
                for values in zip(*columns.values(), strict=True):
                    number += 1
                    row = dict(zip(columns, values, strict=True))
                    for side, lang in zip(block, self.languages, strict=True):
                        block[side].append(text_of(row, lang, f"{self.names[shard]} row {number}"))
                yield block
        except (OSError, ValueError, pa.ArrowException) as error:
            where = f"{self.names[shard]} after row {number:,}"
            raise InputError(f"{where}: cannot be read ({error}); check the network and the dataset") from None


def open_stream(config: Config) -> LocalShards | HubShards:
    """The shards of the training corpus.

    `datasource` is a folder, a pattern such as 'data/*.jsonl.gz', a file, several of these separated by commas, or a
    Hub dataset. Raises InputError if there are none, or for a format that cannot be read.
    """
    name, split = split_source(config.datasource)
    if name in ("toy", "patterns"):
        raise InputError(f"the {name} corpus is built in; leave out --stream")
    is_on_hub = name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not set("*?[,") & set(name)
    paths: dict[str, None] = {}  # a file that is named twice counts once
    for part in config.datasource.split(","):
        if not (files := local_files(part)) and is_on_hub:
            return HubShards(name, split or "train", config)
        if not files:
            raise InputError(f"no shards at {part!r}; give a folder, a pattern such as 'data/*.jsonl.gz', or files")
        paths.update(dict.fromkeys(map(os.path.abspath, files)))
    for path in paths:
        if format_of(path) not in FORMATS:
            raise InputError(f"{path} has another format; give shards of {', '.join(FORMATS)}")
        if not os.path.isfile(path):
            raise InputError(f"{path} is not a file; remove it, or give another pattern")
    return LocalShards(list(paths), (config.lang_src, config.lang_tgt))


def local_files(source: str) -> list[str]:
    """The files of a folder (of a split, as on the Hub), of a pattern, or the file itself; sorted by path."""
    if os.path.isfile(source):
        return [source]
    name, split = split_source(source)
    if not os.path.isdir(name):
        return sorted(glob.glob(source, recursive=True))
    from datasets import data_files

    patterns = data_files.sanitize_patterns(data_files.get_data_patterns(name))
    splits = data_files.DataFilesDict.from_patterns(patterns, base_path=name)
    if (split or "train") not in splits:
        raise InputError(f"{name} has no split {split or 'train'!r}; it has {', '.join(splits)}")
    return sorted(path for path in splits[split or "train"] if format_of(path) in FORMATS)


def load_sample(shards: LocalShards | HubShards) -> Dataset:
    """The first pairs of up to SAMPLED_SHARDS evenly spaced shards, SAMPLE pairs together, if the shards have as many.

    Reading them finds missing languages and empty shards before training.
    """
    from datasets import Dataset

    count = min(SAMPLED_SHARDS, len(shards.names))
    pairs: Block = {"src": [], "tgt": []}
    for shard in np.linspace(0, len(shards.names) - 1, count).astype(int).tolist():
        remaining = -(-SAMPLE // count)
        for block in shards.blocks(shard):
            for side in pairs:
                pairs[side] += block[side][:remaining]
            remaining -= len(block["src"])
            if remaining <= 0:
                break
    return Dataset.from_dict(pairs)


def names_hash(shards: LocalShards | HubShards) -> str:
    return hashlib.sha256("\n".join(shards.names).encode()).hexdigest()[:16]
