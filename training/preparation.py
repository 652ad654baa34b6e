"""Preparing a run: its lock, its resume point, and its encoded corpus."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from tokenizers import Tokenizer

from compute import distributed
from compute.device import get_device
from config import Config
from corpora.sources import count_shared, load_split
from corpora.streams import load_sample, open_stream
from dataset import BilingualDataset, encode_splits, save_tokenizers
from runs import mirror
from runs.folder import RunFolder
from training.distillation import distilled
from training.estimate import check_shared_memory
from training.log import warn
from training.resume import ResumePoint, check_same_data, find_resume_point
from training.streaming import StreamedPairs

if TYPE_CHECKING:
    from datasets import Dataset


class Prepared(NamedTuple):
    """Device, data, tokenizers and resume point of a run."""

    device: torch.device
    train: BilingualDataset | StreamedPairs
    validation: BilingualDataset
    tokenizer_src: Tokenizer
    tokenizer_tgt: Tokenizer
    resume_point: ResumePoint


def prepare(config: Config, folder: RunFolder, resources: contextlib.ExitStack) -> Prepared:
    """Locks the folder, finds the checkpoint to resume from, loads the corpus and encodes it.

    Raises InputError for bad input, before an existing run is changed; a newly created folder is then removed.
    """
    is_first = distributed.is_first()
    missing = [path for path in (folder.path, *folder.path.absolute().parents) if is_first and not path.exists()]
    if is_first:
        resources.enter_context(locked_folder(config, folder))
    else:
        folder.wait_for_mark(distributed.attempt, distributed.rank())
    # Only under the lock: another process may have just created the folder.
    with removing_on_error(missing, keep_if=folder.distilled_file):
        device = distributed.own_device(get_device(config.device))
        if is_first and config.mirror_dir and mirror.restore(RunFolder(config.mirror_dir), folder):
            print(f"restored from {config.mirror_dir}")
        resume_point = find_resume_point(folder, config)
        shards = open_stream(config) if config.stream else None
        train_pairs = load_sample(shards) if shards else load_split(config, "train")
        validation_pairs = load_split(config, "validation")
        if is_first:
            warn_shared_pairs(train_pairs, validation_pairs)
        if config.distill_from:
            train_pairs = distilled(train_pairs, config, folder, resume_point.state is not None)
        data = encode_splits(config, train_pairs, validation_pairs)
        if shards:
            data = (StreamedPairs(config, shards, len(train_pairs), data[0], *data[2:]), *data[1:])
        if resume_point.state:
            check_same_data(folder, config, *data[:2], resume_point)
        elif is_first:
            if aside := folder.set_aside(resume_point.conflicting):
                print(f"training from scratch: the files of an earlier run were moved to {aside}")
            save_tokenizers(config, *data[2:])
        if is_first and distributed.world_size() > 1:
            folder.mark(distributed.attempt)
    return Prepared(device, *data, resume_point)


@contextlib.contextmanager
def removing_on_error(folders: list[Path], keep_if: Path) -> Iterator[None]:
    """If an error is raised, removes the first of these folders with its files, and the others if empty.

    They are kept if the file `keep_if` exists by then: translating the corpus again would take long.
    """
    try:
        yield
    except Exception:
        if not keep_if.exists():
            with contextlib.suppress(OSError):
                for folder in folders[:1]:
                    shutil.rmtree(folder, ignore_errors=True)
                for parent in folders[1:]:
                    parent.rmdir()
        raise


@contextlib.contextmanager
def locked_folder(config: Config, folder: RunFolder) -> Iterator[None]:
    """Creates the run's folder and locks it for this process."""
    folder.check_writable()
    check_shared_memory(config)
    if config.mirror_dir:
        mirror.check(RunFolder(config.mirror_dir), folder, config)
    folder.create()
    with folder.locked():
        folder.sweep()
        yield


def warn_shared_pairs(train_pairs: Dataset, validation_pairs: Dataset) -> None:
    if shared := count_shared(train_pairs, validation_pairs):
        warn(f"validation pairs that are also in the training set: {shared:,}; scores will be too optimistic")
