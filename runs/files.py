"""Files of a run and of exports: written beside and renamed; read only if they are regular files of sensible size."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from config import InputError, explanation

MAX_TEXT_BYTES = 1 << 28  # far above any config, tokenizer or list of scores; a link to /dev/zero has no end

# ---------------------------------------------------------------------------- writing


def temporary_path(path: Path) -> Path:
    """Where a file is written before it is renamed to `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`. At the end it is flushed to disk and renamed; after an error, removed.

    A reader, also after a crash, sees the old file or the new one.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Makes the rename survive a power failure, where the system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file of a run. Raises InputError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf8", newline="\n")
    except OSError as error:
        raise InputError(f"cannot write {path} ({explanation(error)})") from None


RUN_FILES = r"config\.json|run_id|scores\.jsonl|distilled\.jsonl|tokenizer_.*\.json|tmodel_.*\.pt|model\.safetensors.*"


def check_outputs(outputs: Iterable[str], inputs: Iterable[str] = ()) -> None:
    """Raises InputError if a file that a command would write is one of its inputs or other outputs, or a run's.

    Empty names are ignored.
    """
    taken = {os.path.realpath(name) for name in inputs if name}
    for name in filter(None, outputs):
        path = Path(os.path.realpath(name))
        if str(path) in taken:
            raise InputError(f"{name} is named twice, and would be overwritten; give another file to write to")
        if path.is_file() and re.fullmatch(RUN_FILES, path.name):
            raise InputError(f"{name} is a file of a run, and would be overwritten; give another file to write to")
        taken.add(str(path))


@contextlib.contextmanager
def output_file(name: str | Path) -> Iterator[Path]:
    """Yields where to write a page, a picture or a table that a command was asked for.

    It is written as `replacing` does, to the target of a link, but directly to what is no file, such as /dev/stdout.
    """
    path = Path(os.path.realpath(name))
    if path.exists() and not path.is_file():
        yield path
        return
    with replacing(path) as temporary:
        yield temporary


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder, which becomes `folder` at the end and is removed after an error.

    The folder must be new or empty (`check_new_folder`). What a killed process has left there is removed first.
    """
    partial = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rmdir()  # it is empty; Windows does not replace folders
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new_folder(folder: Path) -> None:
    """Raises InputError if the folder exists and is not empty, or if the name is a broken link."""
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} already exists; give a new or an empty folder")


# ---------------------------------------------------------------------------- reading


def check_regular(path: Path, max_bytes: int | None = None) -> None:
    """Raises InputError for a folder, a device or a pipe, which might never end, and for a file above `max_bytes`."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; restore it")
    if max_bytes is not None and path.stat().st_size > max_bytes:
        raise InputError(f"{path} has {path.stat().st_size:,} bytes, the limit is {max_bytes:,}; restore it")


def read_run_file(path: Path) -> str:
    """The text of a file of a run. Raises InputError if it is not a regular file of UTF-8, or too large."""
    check_regular(path, MAX_TEXT_BYTES)
    try:
        return path.read_text(encoding="utf8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error}); restore it") from None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object in a text. Raises ValueError for anything else."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value
