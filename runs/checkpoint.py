"""Checkpoint files: written atomically, verified when read, loaded without executing code.

A checkpoint is a `torch.save` file, that is, a zip archive. The archive comment, which zip readers skip, holds
the SHA-256 of all bytes before it, because `torch.load` does not detect flipped bits.

    schema      version of this format
    name        name of the file
    model       trained weights
    ema_model   exponential moving average of the weights, or None
    optimizer   state of the optimizer
    scaler      loss scale and number of skipped steps in fp16, otherwise empty
    progress    epoch, batch and step
    rng         states of the random number generators of each process
    config      all settings
    corpus      fingerprint of the training set
    tokenizers  source and target tokenizer, as JSON
"""

import contextlib
import hashlib
import os
import pickle
import struct
from pathlib import Path

import torch

from config import InputError

SCHEMA = 2
DIGEST_LENGTH = 64  # characters of a SHA-256 in hexadecimal


class DamagedCheckpoint(Exception):
    """The file is not what was written under this name, or is unsafe to load."""


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Writes the state to a temporary file beside `path`, flushes it to disk and renames it.

    After a crash, `path` is either the old file or the new one. Raises InputError if the file cannot be written, and
    then removes the temporary file.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        torch.save({"schema": SCHEMA, "name": path.name, **state}, temporary)
        _seal(temporary)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:  # a full disk raises either one, depending on when it is detected
        reason = error if isinstance(error, OSError) else f"{str(error).splitlines()[0]}; is the disk full?"
        raise InputError(
            f"cannot save {path} ({reason}); free some space or fix the folder's permissions; "
            "earlier checkpoints are unchanged"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """The verified state of a checkpoint, in the current schema.

    Raises DamagedCheckpoint, or InputError if the file was written by a newer version.
    """
    path = Path(path)
    verify(path)
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:  # raised by weights_only=True for anything but tensors and plain types
        raise DamagedCheckpoint("it contains objects other than tensors and plain types; not loaded") from None
    except Exception as error:  # EOFError, RuntimeError …
        raise DamagedCheckpoint(f"torch cannot read it ({str(error).splitlines()[0]})") from None
    if not isinstance(state, dict):
        raise DamagedCheckpoint("it is not a checkpoint of this project")
    if state.get("schema", 0) > SCHEMA:
        raise InputError(f"{path} was written by a newer version of this project; update the project")
    if state.get("name", path.name) != path.name:
        raise DamagedCheckpoint(f"it is {state['name']} under another name")
    return upgraded(state)


def upgraded(state: dict) -> dict:
    """The state in the current schema. Schema 1 kept the EMA in "model" and the trained weights in "learner"."""
    if state.get("schema") == 1:
        trained = state.pop("learner", None)
        state["ema_model"] = state["model"] if trained else None
        state["model"] = trained or state["model"]
    return state


def weights_for_inference(state: dict) -> dict[str, torch.Tensor]:
    """The weights that are evaluated and used for translation: the EMA if there is one."""
    return state["ema_model"] or state["model"]


def without_optimizer(state: dict) -> dict:
    """The part of the state that inference needs: a quarter to a third of its size."""
    weights = {"model": weights_for_inference(state), "ema_model": None, "optimizer": None, "rng": []}
    return {name: value for name, value in state.items() if name not in ("schema", "name")} | weights


def stored_digest(path: Path) -> bytes:
    """The checksum that the file holds."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - DIGEST_LENGTH))
        return file.read()


def verify(path: Path) -> None:
    """Raises DamagedCheckpoint unless the file matches the checksum that it holds."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        remaining = path.stat().st_size - DIGEST_LENGTH
        while remaining > 0 and (block := file.read(min(remaining, 1 << 20))):
            digest.update(block)
            remaining -= len(block)
        stored = file.read()
    if stored != digest.hexdigest().encode():
        raise DamagedCheckpoint("its checksum does not match: the file is truncated or modified")


def _seal(path: Path) -> None:
    """Writes the digest into the archive comment: its length into the last two bytes, then the text."""
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        if file.read() != b"\0\0":
            raise RuntimeError("torch.save wrote an archive comment of its own")
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", DIGEST_LENGTH))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Makes the rename survive a power failure, where the system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------------------- any file of a run


def temporary_path(path: Path) -> Path:
    """Where a file is written before it is renamed to `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_atomically(path: Path, text: str) -> None:
    """Writes a temporary file and renames it, so that a reader sees the old file or the new one.

    Raises InputError if the file cannot be written.
    """
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error}); free some space or choose another folder") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
