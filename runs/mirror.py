"""A second copy of a run on a disk that outlives the machine: a Drive on Colab, a network share.

A run is written where it is trained, which is fast and certain; what has changed is then copied, and
each checkpoint's copy is verified before it takes its name. A lost connection costs what was trained
since the last copy.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from config import InputError, checkpoint_age, weights_files
from runs.checkpoint import DamagedCheckpoint, verify

NOT_COPIED = (".lock",)


def check_mounted(mirror_dir: str) -> None:
    """Raises InputError where the folder that should hold the copy is not there, before anything is trained."""
    parent = Path(mirror_dir).absolute().parent
    if not parent.is_dir():
        raise InputError(f"no folder {parent} for --mirror-dir; mount the Drive first, or make the folder")


def fetch(mirror_dir: str, run_dir: Path) -> bool:
    """Brings the run back where the copy is ahead of what is here, say on a new machine; whether it was.

    A checkpoint that is damaged there is named and left out. Raises InputError where the folder cannot be read.
    """
    there, here = weights_files(mirror_dir), weights_files(run_dir)
    if not there or (here and checkpoint_age(here[-1]) >= checkpoint_age(there[-1])):
        return False
    try:
        for path, copy in changed(Path(mirror_dir), run_dir):
            try:
                copy_file(path, copy)
            except DamagedCheckpoint as error:
                print(f"warning: {path} is passed over: {error}", file=sys.stderr)
    except OSError as error:
        raise InputError(f"{mirror_dir} cannot be brought back ({error}); mend it, or leave --mirror-dir out") from None
    return True


def push(run_dir: Path, mirror_dir: str) -> None:
    """Copies what has changed, then removes the checkpoints that the run has removed. A Drive that fails is told."""
    try:
        for path, copy in changed(run_dir, Path(mirror_dir)):
            copy_file(path, copy)
        kept = {path.name for path in weights_files(run_dir)}
        for path in weights_files(mirror_dir):
            if path.name not in kept:
                path.unlink()
    except (OSError, DamagedCheckpoint) as error:
        print(f"warning: {mirror_dir} has no copy of the newest state ({error}); it is in {run_dir}", file=sys.stderr)


def changed(source: Path, target: Path) -> Iterator[tuple[Path, Path]]:
    """The files of a run that the other side has not, or has otherwise, with their place there."""
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_file() and path.name not in NOT_COPIED and not path.name.endswith(".tmp") and differs(path, copy):
            yield path, copy


def differs(path: Path, copy: Path) -> bool:
    if not copy.is_file():
        return True
    a, b = path.stat(), copy.stat()
    return a.st_size != b.st_size or int(a.st_mtime) != int(b.st_mtime)


def copy_file(path: Path, copy: Path) -> None:
    """Copies under another name, verifies what arrived, then gives it the name."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    temporary = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
    try:
        shutil.copy2(path, temporary)
        if path.suffix == ".pt":
            verify(temporary)
        os.replace(temporary, copy)
    finally:
        temporary.unlink(missing_ok=True)
