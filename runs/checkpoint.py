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
    run_id      identity of the run
    config      all settings
    corpus      fingerprint of the training set
    stream      position in the training set, with --stream
    batches_per_step  number of batches of an optimizer step, of all processes
    validation  fingerprint of the validation set
    tokenizers  source and target tokenizer, as JSON
"""

import contextlib
import hashlib
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import InputError, explanation
from runs.files import replacing

SCHEMA = 2
DIGEST_LENGTH = 64  # characters of a SHA-256 in hexadecimal

# The type of each part. Checkpoints of earlier versions lack some of them.
PARTS = {
    "model": dict, "ema_model": dict | None, "optimizer": dict | None, "scaler": dict, "progress": dict, "rng": list,
    "run_id": str, "config": dict, "corpus": str, "stream": dict, "validation": str, "tokenizers": list,
}  # fmt: skip


class DamagedCheckpoint(Exception):
    """The file is not what was written under this name, or is unsafe to load."""


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Writes the state beside `path`, seals it with a checksum and renames it.

    After a crash, `path` is either the old file or the new one. Raises InputError if the weights are not finite or the
    file cannot be written.
    """
    path = Path(path)
    if name := not_finite(state):
        raise InputError(
            f"{name} is not finite after this step, so {path} was not saved; earlier checkpoints are unchanged: "
            "lower --lr, then run the same command again"
        )
    try:
        with replacing(path) as temporary:
            torch.save({"schema": SCHEMA, "name": path.name, **state}, temporary)
            _seal(temporary)
    except (OSError, RuntimeError) as error:  # a full disk raises either one, depending on when it is detected
        reason = explanation(error) or f"{str(error).splitlines()[0]}; is the disk full? Free some space"
        raise InputError(f"cannot save {path} ({reason}); earlier checkpoints are unchanged") from None


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
    if not isinstance(state, dict) or not isinstance(state.get("schema", 0), int):
        raise DamagedCheckpoint("it is not a checkpoint of this project")
    if state.get("schema", 0) > SCHEMA:
        raise InputError(f"{path} was written by a newer version of this project; update the project")
    if state.get("name", path.name) != path.name:
        raise DamagedCheckpoint(f"it is {state['name']} under another name")
    check_contents(state := upgraded(state))
    return state


def check_contents(state: dict) -> None:
    """Raises DamagedCheckpoint for a part of another type, and for tensors that training cannot have written."""
    for name in PARTS.keys() & state.keys():
        if not isinstance(state[name], PARTS[name]):
            raise DamagedCheckpoint(f"its part {name!r} is of type {type(state[name]).__name__}")
    for name in ("model", "ema_model"):
        items = (state.get(name) or {}).items()
        if not all(isinstance(k, str) and isinstance(w, Tensor) and w.is_floating_point() for k, w in items):
            raise DamagedCheckpoint(f"its part {name!r} has entries other than weights")
    for name, tensor in tensors_of(state):
        # an expanded tensor of a few bytes can stand for terabytes
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise DamagedCheckpoint(f"{name} is not a plain tensor")
    if name := not_finite(state):
        raise DamagedCheckpoint(f"{name} is not finite")


def require_parts(state: dict, path: Path, *names: str) -> None:
    """Raises InputError if the checkpoint at `path` lacks one of these parts."""
    if missing := [name for name in names if name not in state]:
        raise InputError(f"{path} has no {', '.join(missing)}; restore the file, or choose another checkpoint")


def tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dicts and lists, each with its place, such as optimizer.state.3.exp_avg."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_of(item, f"{name}.{key}" if name else str(key))


def not_finite(state: dict) -> str:
    """The name of a tensor of the model, its EMA or the optimizer that has NaN or infinity, or ""."""
    parts = {name: state.get(name) for name in ("model", "ema_model", "optimizer")}
    tensors = {name: tensor for name, tensor in tensors_of(parts) if tensor.dim()}  # not the numbers of steps
    if not tensors:
        return ""
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).tolist()  # one wait for a GPU
    return next((name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite), "")


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


def weights_crc32(weights: dict[str, Tensor]) -> int:
    """CRC-32 of all weights, which tells a checkpoint from others of the same step."""
    crc = 0
    for _, tensor in sorted(weights.items()):
        crc = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    return crc


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
    """Raises DamagedCheckpoint unless the file matches the checksum that it holds, and is not compressed."""
    if not path.is_file():
        raise DamagedCheckpoint("it is not a file")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        remaining = path.stat().st_size - DIGEST_LENGTH
        while remaining > 0 and (block := file.read(min(remaining, 1 << 20))):
            digest.update(block)
            remaining -= len(block)
        stored = file.read()
    if stored != digest.hexdigest().encode():
        raise DamagedCheckpoint("its checksum does not match: the file is truncated or modified")
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise DamagedCheckpoint("it is compressed, and could be of any size in memory")


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
