"""A verified copy of a run on another disk: Google Drive on Colab, or a network share.

A run is written to the local disk, then the files that have changed are copied. A copied checkpoint is verified
before it gets its final name. If the machine is lost, only the training since the last copy is lost.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from config import InputError
from runs.checkpoint import DamagedCheckpoint, temporary_path, verify
from runs.folder import RunFolder, checkpoint_age, warn_skipped

NOT_COPIED = (".lock",)


def check_mounted(mirror: RunFolder) -> None:
    """Raises InputError if the parent folder of the mirror does not exist."""
    parent = mirror.path.absolute().parent
    if not parent.is_dir():
        raise InputError(f"no folder {parent} for --mirror-dir; mount the Drive first, or create the folder")


def restore(mirror: RunFolder, run: RunFolder) -> bool:
    """Copies the mirror to the run's folder if its newest checkpoint is later, as on a new machine; returns whether.

    Checkpoints that are damaged in the mirror are skipped with a warning. Raises InputError if files cannot be copied.
    """
    copies, own = mirror.checkpoints(), run.checkpoints()
    if not copies or (own and checkpoint_age(own[-1]) >= checkpoint_age(copies[-1])):
        return False
    try:
        for source, target in changed_files(mirror.path, run.path):
            try:
                copy_file(source, target)
            except DamagedCheckpoint as error:
                warn_skipped(source, error)
    except OSError as error:
        raise InputError(f"cannot restore the run from {mirror} ({error}); fix it, or omit --mirror-dir") from None
    return True


def update(mirror: RunFolder, run: RunFolder) -> None:
    """Copies changed files to the mirror and removes checkpoints that the run no longer has; warns if that fails."""
    try:
        for source, target in changed_files(run.path, mirror.path):
            copy_file(source, target)
        kept = {path.name for path in run.checkpoints()}
        for path in mirror.checkpoints():
            if path.name not in kept:
                path.unlink()
    except (OSError, DamagedCheckpoint) as error:
        print(f"warning: the newest state was not copied to {mirror} ({error}); it is in {run}", file=sys.stderr)


def changed_files(source: Path, target: Path) -> Iterator[tuple[Path, Path]]:
    """Pairs of paths, in `source` and in `target`, of the files that are missing or different in `target`."""
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_file() and path.name not in NOT_COPIED and not path.name.endswith(".tmp") and differs(path, copy):
            yield path, copy


def differs(path: Path, copy: Path) -> bool:
    """Whether size or modification time (in whole seconds) differ, or there is no copy."""
    if not copy.is_file():
        return True
    a, b = path.stat(), copy.stat()
    return a.st_size != b.st_size or int(a.st_mtime) != int(b.st_mtime)


def copy_file(source: Path, target: Path) -> None:
    """Copies to a temporary name, verifies the copy of a checkpoint, then renames it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(target)
    try:
        shutil.copy2(source, temporary)
        if source.suffix == ".pt":
            verify(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
