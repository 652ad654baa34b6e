"""Sequence-level knowledge distillation (Kim and Rush, 2016, section 3.2): training on the translations of another run.

With `--distill-from`, the target side of the training pairs is what the teacher translates. The student then learns
one translation per sentence instead of many, so that greedy search comes closer to beam search.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

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


def distilled(pairs: Dataset, config: Config, folder: RunFolder) -> Dataset:
    """The pairs, each target replaced by the translation of the run `distill_from`.

    The translations are made once and kept in the run's folder. If this was interrupted, it resumes. Raises InputError
    if the teacher cannot be used, or the translations are of other pairs.
    """
    path = folder.distilled_file
    done = drop_partial_line(path)
    if done < len(pairs):
        teacher = load_teacher(config, folder)
        identity = f"{weights_crc32(teacher.model.state_dict()):08x}"
        if done and named_teacher(path) != identity:
            raise InputError(f"{path} was begun with another run than {config.distill_from}; remove it to begin again")
        translate_rest(pairs, done, teacher, identity, path)
    found = load_file(path, config)
    size = 10_000
    same = len(found) == len(pairs) and all(
        found[start : start + size]["src"] == pairs[start : start + size]["src"] for start in range(0, len(pairs), size)
    )
    if not same:
        raise InputError(f"{path} has translations of other pairs than {config.datasource}; remove it to begin again")
    return found


def load_teacher(config: Config, folder: RunFolder) -> Translator:
    """The best weights of `distill_from`. Raises InputError for the run itself, and for other languages."""
    teacher = Translator.load(config.distill_from, config.device, precision="auto")
    if teacher.folder.path.resolve() == folder.path.resolve():
        raise InputError(f"{config.distill_from} is the run of the teacher; give the student another --run-dir")
    languages = teacher.config.lang_src, teacher.config.lang_tgt
    if languages != (config.lang_src, config.lang_tgt):
        raise InputError(
            f"{config.distill_from} translates {languages[0]} to {languages[1]}; give another --distill-from"
        )
    return teacher


def drop_partial_line(path: Path) -> int:
    """Removes the line that a killed process has not finished; returns the number of lines."""
    if not os.path.lexists(path):
        return 0
    if path.is_symlink() or not path.is_file():
        raise InputError(f"{path} is not a regular file; remove it")
    with path.open("r+b") as file:
        count = end = 0
        for line in file:
            if line.endswith(b"\n"):
                count, end = count + 1, end + len(line)
        file.truncate(end)
    return count


def named_teacher(path: Path) -> str:
    """The teacher named in the first line."""
    with path.open(encoding="utf8") as file:
        try:
            return str(json.loads(file.readline()).get("teacher"))
        except (ValueError, AttributeError):
            raise InputError(f"{path} is damaged; remove it to translate again") from None


def translate_rest(pairs: Dataset, done: int, teacher: Translator, identity: str, path: Path) -> None:
    """Appends the translations of the pairs from `done` on; those of sentences too long for the teacher are blank."""
    config, long = teacher.config, 0
    print_line(f"distilling   {counted(len(pairs) - done, 'pair')}, translated by {teacher.folder} (beam {BEAM_SIZE})")
    bar = tqdm(total=len(pairs), initial=done, unit="pair", desc="Distilling", disable=not shows_bars(), leave=False)
    with bar:
        for start in range(done, len(pairs), PAIRS_AT_A_TIME):
            sources = pairs[start : start + PAIRS_AT_A_TIME]["src"]
            readable = [source if fits(source, teacher) else "" for source in sources]
            long += sum(source.strip() != "" and not text for source, text in zip(sources, readable, strict=True))
            targets = teacher.translate(readable, BEAM_SIZE, LENGTH_PENALTY)
            lines = (
                {config.lang_src: source, config.lang_tgt: target, "teacher": identity}
                for source, target in zip(sources, targets, strict=True)
            )
            append(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            bar.update(len(sources))
    if long:
        print_line(
            f"             {counted(long, 'sentence')} exceed the {config.seq_len} tokens of the teacher: skipped"
        )


def fits(source: str, teacher: Translator) -> bool:
    try:
        teacher.encode(source)
    except InputError:
        return False
    return True


def append(path: Path, text: str) -> None:
    try:
        with path.open("a", encoding="utf8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"cannot write {path} ({explanation(error)}); the same command resumes") from None
