"""Checkpoints: written whole or not at all, verified when read, never trusted to run code.

A checkpoint is an ordinary `torch.save` file, which is a zip archive. Its archive comment, which zip
readers skip, holds the SHA-256 of all bytes before it, since `torch.load` notices no flipped bit.
"""

import contextlib
import hashlib
import json
import math
import os
import pickle
import struct
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn

from config import MODEL_BASENAME, Config, InputError, checkpoint_name, closes_epoch, weights_files, write_atomically

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

SCHEMA = 1
_DIGEST_LENGTH = 64  # a SHA-256 in hexadecimal


class DamagedCheckpoint(Exception):
    """The file is not what was written."""


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Writes the state beside `path`, flushes it to the disk, then renames it into place.

    A crash at any moment leaves the old file or the new one. Raises InputError where the disk will
    not take it; nothing is left behind then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save({"schema": SCHEMA, "name": path.name, **state}, temporary)
        _seal(temporary)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:  # a full disk is either, depending on where it strikes
        reason = error if isinstance(error, OSError) else f"{str(error).splitlines()[0]}; is the disk full?"
        raise InputError(
            f"cannot save {path} ({reason}); free some space or mend the folder's permissions; "
            "older checkpoints are untouched"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _seal(path: Path) -> None:
    """Puts the digest into the archive comment: its length in the archive's last two bytes, then the text."""
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        if file.read() != b"\0\0":
            raise RuntimeError("torch.save wrote an archive comment of its own")
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", _DIGEST_LENGTH))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Makes the rename itself last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def verify(path: Path) -> None:
    """Raises DamagedCheckpoint unless the file is byte for byte the one that was written."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = path.stat().st_size - _DIGEST_LENGTH
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
        stored = file.read()
    if stored != digest.hexdigest().encode():
        raise DamagedCheckpoint("its checksum does not match: the file is cut short or changed")


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """The verified state. Raises DamagedCheckpoint; InputError for one from a newer version."""
    path = Path(path)
    verify(path)
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:  # what weights_only=True says of anything but tensors and plain types
        raise DamagedCheckpoint("it holds more than numbers and text, which might run code; not opened") from None
    except Exception as error:  # EOFError, RuntimeError …
        raise DamagedCheckpoint(f"torch cannot read it ({str(error).splitlines()[0]})") from None
    if state.get("schema", 0) > SCHEMA:
        raise InputError(f"{path} was written by a newer version of this project; update it")
    if state.get("name", path.name) != path.name:
        raise DamagedCheckpoint(f"it is {state['name']} under another name")
    return state


def load_newest(run_dir: str | Path, device: torch.device | str = "cpu") -> tuple[Path, dict] | None:
    """The newest checkpoint that verifies, with its state; None where there is none at all.

    A damaged one is named and passed over. Raises InputError where all are damaged.
    """
    files = weights_files(run_dir)
    for path in reversed(files):
        try:
            return path, load_checkpoint(path, device)
        except DamagedCheckpoint as error:
            print(f"warning: {path} is passed over: {error}", file=sys.stderr)
    if files:
        raise InputError(f"no checkpoint in {run_dir} can be read; restore one, or train afresh with another --run-dir")
    return None


# ---------------------------------------------------------------------------- which one translates


def read_scores(run_dir: str | Path) -> list[dict]:
    """The lines of scores.jsonl, one for each validation, oldest first."""
    path = Path(run_dir) / "scores.jsonl"
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}); take the damaged line out, or restore the file") from None


def write_scores(run_dir: str | Path, rows: list[dict]) -> None:
    write_atomically(Path(run_dir) / "scores.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def merits(rows: list[dict], best_by: str) -> list[float]:
    """What makes one validation better than another: higher is better. By the loss, unless all were scored."""
    by_score = best_by != "loss" and all(best_by in row for row in rows)
    return [row[best_by] if by_score else -row["loss"] for row in rows]


def best_first(config: Config) -> list[Path]:
    """The run's checkpoints by their validation score, the newer of equals first; those without one come last."""
    rows = read_scores(config.folder)
    names = [checkpoint_name(row["epoch"], row["batch"], row["step"]) for row in rows]
    known = dict(zip(names, merits(rows, config.best_by), strict=True))
    newest_first = reversed(weights_files(config.folder))
    return sorted(newest_first, key=lambda path: known.get(path.name, -math.inf), reverse=True)


def load_chosen(config: Config, weights: str = "best", average: int = 1) -> tuple[Path, dict]:
    """The checkpoint whose weights translate: best, latest or an epoch's; its path and its state.

    With `average` its "model" is the mean over that many epochs (Vaswani et al., 2017, section 6.1).
    A damaged file is named and passed over. Raises InputError where too few are left.
    """
    files = candidates(config, weights, average)
    chosen: list[tuple[Path, dict]] = []
    for path in files:
        try:
            state = load_checkpoint(path)
        except FileNotFoundError:  # a trainer at work has just removed it
            continue
        except DamagedCheckpoint as error:
            print(f"warning: {path} is passed over: {error}", file=sys.stderr)
            continue
        if chosen:
            move_mean(chosen[0][1]["model"], state["model"], len(chosen) + 1)
            state = {}
        chosen.append((path, state))
        if len(chosen) == average:
            return chosen[0]
    if not files and average == 1:
        raise InputError(
            f"the run {config.folder} has no checkpoint yet; train it with python train.py --run-dir {config.folder}"
        )
    raise InputError(
        f"{len(chosen)} of the checkpoints in {config.folder} can be read, {average} wanted; "
        "lower --average, restore one, or train with a higher --keep-checkpoints"
    )


def candidates(config: Config, weights: str, average: int) -> list[Path]:
    """The files that may be used, the wanted one first; only those that close an epoch are averaged."""
    if average < 1:
        raise InputError(f"--average is {average}; give 1 or more")
    if weights in ("best", "latest"):
        files = best_first(config) if weights == "best" else weights_files(config.folder)[::-1]
        return files if average == 1 else [path for path in files if closes_epoch(path)]
    if average > 1:
        raise InputError(f"--average {average} goes with --weights best or latest, not with one epoch")
    files = weights_files(config.folder)
    found = [path for path in files if path.stem == f"{MODEL_BASENAME}{weights.zfill(2)}"]
    if not found:
        have = ", ".join(path.name for path in files) or "none"
        raise InputError(f"no weights {weights!r} in {config.folder}: give best, latest or one of {have}")
    return found


def move_mean(mean: dict[str, Tensor], new: dict[str, Tensor], count: int) -> None:
    """Takes the `count`-th set of weights into the mean of those before it. (Shared matrices have several names.)"""
    mean |= {name: weight + (new[name] - weight) / count for name, weight in mean.items()}


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Loads a state dict, with or without the prefixes that torch.compile and DistributedDataParallel add."""
    model.load_state_dict({name.removeprefix("_orig_mod.").removeprefix("module."): w for name, w in weights.items()})


def sweep(run_dir: str | Path) -> None:
    """Removes the temporary files that a killed process left."""
    for kind in (f"{MODEL_BASENAME}*.pt", "config.json", "tokenizer_*.json", "scores.jsonl"):
        for path in Path(run_dir).glob(f".{kind}.*.tmp"):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def only_trainer(run_dir: str | Path) -> Iterator[None]:
    """Holds the run's lock; raises InputError where another process does. The system frees it at the process' end."""
    path = Path(run_dir) / ".lock"
    with path.open("w") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"another process is training in {run_dir}; wait for it, or choose another --run-dir"
                ) from None
        yield


def set_aside(files: list[Path]) -> Path | None:
    """Moves files of a run into the folder set_aside beside them, never over an older one; says where."""
    for path in files:
        folder = path.parent / "set_aside"
        folder.mkdir(exist_ok=True)
        names = (f"{path.stem}{f'_{i}' if i else ''}{path.suffix}" for i in count())
        os.replace(path, next(folder / name for name in names if not (folder / name).exists()))
    return files[0].parent / "set_aside" if files else None
