"""Sequence-level knowledge distillation (Kim and Rush, 2016, section 3.2): training on the translations of another run.

With `--distill-from`, the target side of the training pairs is what the teacher translates. The student then learns
a simpler distribution of targets, which narrows the gap between greedy search and beam search.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from compute import distributed
from config import Config, InputError, counted, explanation
from corpora.files import load_file
from runs.checkpoint import weights_crc32
from runs.folder import RunFolder
from training.log import print_line, shows_bars
from translate import Translator

if TYPE_CHECKING:
    from datasets import Dataset

BEAM_SIZE, LENGTH_PENALTY = 5, 0.6
PAIRS_AT_A_TIME = 2_000  # translated between two writes, which is what a kill can lose
MAX_LINE = 1 << 24  # bytes; a longer line in the file of translations is damage
REPORT_EVERY = 300  # seconds between lines of progress where no bar is shown


def distilled(pairs: Dataset, config: Config, folder: RunFolder, has_checkpoint: bool) -> Dataset:
    """The pairs, each target replaced by the translation of the run `distill_from`.

    The first process makes the translations once and keeps them in the run's folder; after an interruption it resumes.
    Once the run has a checkpoint, the teacher is no longer needed. Raises InputError if the teacher cannot be used, or
    for translations of other pairs or by other weights.
    """
    path = folder.distilled_file
    if distributed.is_first() and not has_checkpoint:
        teacher, identity = load_teacher(config, folder)
        done = count_finished(path, pairs, config, identity)
        translate_rest(pairs, done, teacher, identity, path)
    if path.is_symlink() or not path.is_file():
        raise InputError(f"{path} with the training targets of this run is missing; restore it")
    found = load_file(path, config)
    if len(found) != len(pairs):
        raise InputError(f"{path} has {len(found):,} translations for {len(pairs):,} pairs; restore the file")
    return found


def load_teacher(config: Config, folder: RunFolder) -> tuple[Translator, str]:
    """The best weights of `distill_from`, and their checksum.

    Raises InputError for a run that cannot be loaded, for the student itself, and for other languages.
    """
    try:
        teacher = Translator.load(config.distill_from, config.device)
    except InputError as error:
        raise InputError(f"--distill-from {config.distill_from}: {error}") from None
    if teacher.folder.path.resolve() == folder.path.resolve():
        raise InputError(f"{config.distill_from} is the run of the teacher; give the student another --run-dir")
    languages = teacher.config.lang_src, teacher.config.lang_tgt
    if languages != (config.lang_src, config.lang_tgt):
        raise InputError(
            f"{config.distill_from} translates {languages[0]} to {languages[1]}; give --distill-from a run that "
            f"translates {config.lang_src} to {config.lang_tgt}"
        )
    identity = f"{weights_crc32(teacher.model.state_dict()):08x}"  # of the weights in fp32, the same on every machine
    teacher.use_precision("auto")
    return teacher, identity


def count_finished(path: Path, pairs: Dataset, config: Config, identity: str) -> int:
    """The number of pairs that are translated already; removes the line that a killed process has not finished.

    Raises InputError unless the file holds translations of the first pairs by these weights.
    """
    if not os.path.lexists(path):
        return 0
    if path.is_symlink() or not path.is_file():
        raise InputError(f"{path} is not a regular file; remove it")
    count = end = 0
    sources = sources_of(pairs)
    with path.open("r+b") as file:
        while (line := file.readline(MAX_LINE)).endswith(b"\n"):
            source, teacher = parse_line(line, count, path, config)
            if teacher != identity:
                raise InputError(
                    f"{path} was translated with weights other than the current best ones of {config.distill_from}; "
                    "remove it to translate again"
                )
            if source != next(sources, None):
                raise InputError(
                    f"line {count + 1:,} of {path} is not pair {count + 1:,} of {config.datasource}; "
                    "restore the corpus and its settings, or remove the file to translate again"
                )
            count, end = count + 1, end + len(line)
        if line:
            if not line.startswith(b"{") or len(line) == MAX_LINE:
                raise damaged(path, count)
            file.truncate(end)
    return count


def sources_of(pairs: Dataset) -> Iterator[str]:
    for start in range(0, len(pairs), PAIRS_AT_A_TIME):
        yield from pairs[start : start + PAIRS_AT_A_TIME]["src"]


def parse_line(line: bytes, number: int, path: Path, config: Config) -> tuple[str, str]:
    """The source sentence and the teacher of a line."""
    try:
        row = json.loads(line)
        source, target, teacher = row[config.lang_src], row[config.lang_tgt], row["teacher"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise damaged(path, number) from None
    if not isinstance(target, str):
        raise damaged(path, number)
    return source, teacher


def damaged(path: Path, number: int) -> InputError:
    return InputError(f"{path} is damaged in line {number + 1:,}; remove it to translate again")


def translate_rest(pairs: Dataset, done: int, teacher: Translator, identity: str, path: Path) -> None:
    """Appends the translations of the pairs from `done` on.

    Blank lines replace translations of sentences too long for the teacher, and translations that repeat themselves
    where the source does not, because the student would learn to do so. Training skips these pairs.
    """
    if done == len(pairs):
        return
    config, long, repetitive, reported = teacher.config, 0, 0, time.monotonic()
    print_line(
        f"distilling   {counted(len(pairs) - done, 'pair')}, translated by {teacher.folder} (beam {BEAM_SIZE}); "
        "if interrupted, the same command resumes"
    )
    bar = tqdm(total=len(pairs), initial=done, unit="pair", desc="Distilling", disable=not shows_bars(), leave=False)
    with bar:
        for start in range(done, len(pairs), PAIRS_AT_A_TIME):
            sources = pairs[start : start + PAIRS_AT_A_TIME]["src"]
            readable = [source if teacher.fits(source) else "" for source in sources]
            long += sum(source.strip() != "" and not text for source, text in zip(sources, readable, strict=True))
            found = teacher.translate(readable, BEAM_SIZE, LENGTH_PENALTY)
            lines = []
            for source, target in zip(sources, found, strict=True):
                if is_repetitive(target) and not is_repetitive(source):
                    repetitive, target = repetitive + 1, ""
                lines.append({config.lang_src: source, config.lang_tgt: target, "teacher": identity})
            append(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            bar.update(len(sources))
            if not shows_bars() and time.monotonic() - reported > REPORT_EVERY:
                reported = time.monotonic()
                print_line(f"distilling   {start + len(sources):,} of {len(pairs):,} pairs")
    if long:
        print_line(
            f"             {counted(long, 'sentence')} longer than the {config.seq_len} tokens of the teacher: skipped"
        )
    if repetitive:
        print_line(f"             {counted(repetitive, 'repetitive translation')}: skipped")


def is_repetitive(text: str) -> bool:
    """Whether a word or a pair of words occurs three times in a row, as in a translation stuck in a loop."""
    words = text.split()
    return any(
        words[i : i + n] == words[i + n : i + 2 * n] == words[i + 2 * n : i + 3 * n]
        for n in (1, 2)
        for i in range(len(words) - 3 * n + 1)
    )


def append(path: Path, text: str) -> None:
    try:
        with path.open("a", encoding="utf8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"cannot write {path} ({explanation(error)}); the same command resumes") from None
