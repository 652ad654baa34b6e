"""A copy of a run on another disk: Google Drive on Colab, or a network share.

The mirror holds the newest checkpoint, the weights of the best one without its optimizer, and all other files of the
run. If the machine is lost, only the training since the last copy is lost.

What is deleted or replaced on a mounted Drive goes to its trash, which counts as used space. Every file is therefore
emptied first. A copied checkpoint is verified before it gets its final name. (A mounted Drive may answer from a cache
on this machine and upload later; that cannot be seen from here.)
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from config import FIXED_FIELDS, Config, InputError
from runs.checkpoint import (
    DamagedCheckpoint,
    load_checkpoint,
    save_checkpoint,
    stored_digest,
    verify,
    without_optimizer,
)
from runs.files import temporary_path
from runs.folder import WEIGHTS_ONLY, RunFolder, checkpoint_age, ends_epoch, has_weights_only, warn_skipped, whole

TRAINER = uuid4().hex  # this process, in the mirrors that it writes
OLD = ".old.tmp"  # ending of a file that is being replaced, until its successor has the final name

# ---------------------------------------------------------------------------- before training


def check(mirror: RunFolder, run: RunFolder, config: Config) -> None:
    """Raises InputError if the run cannot be mirrored there, or if another one would be lost.

    Changes nothing but to undo replacements that a killed process had begun.
    """
    path, own = mirror.path.resolve(), run.path.resolve()
    parent = mirror.path.absolute().parent
    if not parent.is_dir():
        raise InputError(f"no folder {parent} for --mirror-dir; mount the Drive first, or create the folder")
    if path.exists() and not path.is_dir():
        raise InputError(f"--mirror-dir {mirror} is a file; give a folder")
    if path.is_relative_to(own) or own.is_relative_to(path):
        raise InputError(
            f"--mirror-dir {mirror} and the run folder {run} must not contain each other; give a folder elsewhere"
        )
    recover(mirror)
    if not mirror.checkpoints():
        return
    copied = mirror.load_config()
    changed = [name for name in FIXED_FIELDS if getattr(copied, name) != getattr(config, name)]
    if changed or not is_same_run(mirror, run):
        settings = f", trained with another {', '.join(changed)}" if changed else ""
        raise InputError(f"--mirror-dir {mirror} holds a copy of another run{settings}; give another folder")
    if config.preload == "none":
        raise InputError(f"--preload none would replace the copy in --mirror-dir {mirror}; give another folder")


def is_same_run(mirror: RunFolder, run: RunFolder) -> bool:
    """Whether the mirror is that of the run. A run without checkpoints is not yet any other run."""
    copies = {path.name: path for path in mirror.checkpoints()}
    own = {path.name: path for path in run.checkpoints()}
    if not own:
        return True
    if mirror.run_id and run.run_id:
        return mirror.run_id == run.run_id and not have_diverged(mirror, run)
    # Runs of earlier versions have no identity: one checkpoint must be the same.
    return any(stored_digest(copies[name]) == stored_digest(own[name]) for name in copies.keys() & own.keys())


def have_diverged(mirror: RunFolder, run: RunFolder) -> bool:
    """Whether the mirror is of a copy of the run's folder, trained in another way: the scores of a step then differ."""
    scores = {row["step"]: row for row in mirror.read_scores()}
    return any(scores.get(row["step"], row) != row for row in run.read_scores())


def restore(mirror: RunFolder, run: RunFolder) -> bool:
    """Copies the mirror to the run's folder if its newest checkpoint is later, as on a new machine; returns whether.

    A damaged checkpoint of the run counts as missing, and is replaced. Checkpoints that are damaged in the mirror are
    skipped with a warning. Raises InputError if files cannot be copied.
    """
    copies, own = mirror.checkpoints(), next(filter(is_intact, reversed(run.checkpoints())), None)
    if not copies or (own and checkpoint_age(own) >= checkpoint_age(copies[-1])):
        return False
    try:
        for path in mirror.other_files():
            copy_if_changed(path, run.path / path.relative_to(mirror.path))
        for path in copies:
            if has_weights_only(path) and is_intact(run.path / whole(path).name):
                continue
            target = run.path / path.name
            try:
                copy_if_changed(path, target) if is_intact(target) else copy_file(path, target)
            except DamagedCheckpoint as error:
                warn_skipped(path, error)
    except OSError as error:
        raise InputError(f"cannot restore the run from {mirror} ({error}); fix it, or omit --mirror-dir") from None
    return True


def is_intact(path: Path) -> bool:
    """Whether a file is a checkpoint that matches its checksum."""
    try:
        verify(path)
    except (DamagedCheckpoint, OSError):
        return False
    return True


@contextlib.contextmanager
def locked(mirror: RunFolder) -> Iterator[None]:
    """Creates the mirror and locks it. Raises InputError if another process on this machine writes it."""
    try:
        mirror.path.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write into --mirror-dir {mirror} ({error}); fix it, or omit --mirror-dir") from None
    with mirror.locked("--mirror-dir"):
        yield


def begin(mirror: RunFolder, parameters: int, has_ema: bool) -> None:
    """Makes this process the one that writes the mirror, removes leftovers, and says how much space it will need.

    Raises InputError if the mirror cannot be written.
    """
    try:
        mirror.path.mkdir(exist_ok=True)
        mirror.trainer_file.write_text(TRAINER, encoding="utf8")
        for path in (*mirror.path.glob(".*.tmp"), *mirror.tensorboard.glob(".*.tmp")):
            discard(path)
        used = sum(path.stat().st_size for path in mirror.checkpoints())
        free = shutil.disk_usage(mirror.path).free
    except OSError as error:
        raise InputError(f"cannot write into --mirror-dir {mirror} ({error}); fix it, or omit --mirror-dir") from None
    needed, available = max_size(parameters, has_ema), free + used
    print(f"mirror       {mirror}: up to {needed / 1e6:,.0f} MB for checkpoints, {available / 1e6:,.0f} MB available")
    if needed > available:
        print(f"warning: {mirror} is too small for the run's copy; free some space", file=sys.stderr)


def max_size(parameters: int, has_ema: bool) -> int:
    """Bytes of two whole checkpoints, the old and the new one, and the best weights."""
    whole = parameters * (3 + has_ema)  # weights and Adam's two moments, and perhaps the EMA
    return 4 * (2 * whole + parameters)


# ---------------------------------------------------------------------------- while training


def update(mirror: RunFolder, run: RunFolder, best_by: str) -> None:
    """Copies what has changed and discards checkpoints that are neither the newest nor the best; warns if that fails.

    A new epoch is only copied: the update after its validation knows which checkpoint is the best.
    """
    try:
        if mirror.trainer_file.read_text(encoding="utf8") != TRAINER:
            raise InputError("another process writes this mirror now; stop one of the two")
        for path in run.other_files():
            copy_if_changed(path, mirror.path / path.relative_to(run.path))
        resumable = [path for path in run.checkpoints() if not has_weights_only(path)]
        newest = copy_first(reversed(resumable), lambda path: copy_if_changed(path, mirror.path / path.name))
        if ends_epoch(newest) and run.path / newest.name not in run.scored_checkpoints(best_by):
            return
        best = copy_first(run.best_first(best_by), lambda path: copy_best(path, mirror, newest))
        for path in mirror.checkpoints():
            if path not in (newest, best):
                discard(path)
    except (OSError, DamagedCheckpoint, InputError) as error:
        print(f"warning: the newest state was not copied to {mirror} ({error}); it is in {run}", file=sys.stderr)


def copy_first(paths: Iterable[Path], copy: Callable[[Path], Path]) -> Path:
    """Copies the first checkpoint that is not damaged, and returns the copy. Damaged ones are named in a warning."""
    for path in paths:
        try:
            return copy(path)
        except DamagedCheckpoint as error:
            warn_skipped(path, error)
    raise DamagedCheckpoint("no checkpoint of the run can be copied")


def copy_best(path: Path, mirror: RunFolder, newest: Path) -> Path:
    """Copies the weights of a checkpoint, unless it is the newest one, of which there is a whole copy."""
    if path.name == newest.name:
        return newest
    if has_weights_only(path):
        return copy_if_changed(path, mirror.path / path.name)
    target = mirror.path / f"{path.stem}{WEIGHTS_ONLY}.pt"
    if not (target.is_file() and has_same_time(path, target)):
        with TemporaryDirectory() as folder:
            weights = Path(folder, target.name)
            save_checkpoint(weights, without_optimizer(load_checkpoint(path)))
            shutil.copystat(path, weights)
            copy_file(weights, target)
    return target


# ---------------------------------------------------------------------------- files


def copy_if_changed(source: Path, target: Path) -> Path:
    """Copies a file unless there is a copy of the same size and time; returns the copy."""
    is_same = target.is_file() and source.stat().st_size == target.stat().st_size and has_same_time(source, target)
    if not is_same:
        copy_file(source, target)
    return target


def has_same_time(path: Path, copy: Path) -> bool:
    """Whether the modification times are equal, in whole seconds: some file systems keep no fractions."""
    return int(path.stat().st_mtime) == int(copy.stat().st_mtime)


def copy_file(source: Path, target: Path) -> None:
    """Copies to a temporary name, verifies the copy of a checkpoint, then renames it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = temporary_path(target), temporary_path(target).with_suffix(OLD)
    try:
        shutil.copy2(source, temporary)
        if source.suffix == ".pt":
            verify(temporary)
        if target.is_file():
            os.replace(target, old)
        os.replace(temporary, target)
    finally:
        put_back(old, target)
        discard(temporary)
        discard(old)


def put_back(old: Path, target: Path) -> None:
    """Undoes a replacement that failed, or whose process was killed, between its two renames."""
    if old.is_file() and not target.exists():
        os.replace(old, target)


def recover(mirror: RunFolder) -> None:
    """Puts back every file that a killed process had moved to replace it."""
    for folder in (mirror.path, mirror.tensorboard):
        for old in folder.glob(f".*{OLD}"):
            name = old.name.removeprefix(".").removesuffix(OLD).rpartition(".")[0]  # .NAME.PID.old.tmp
            put_back(old, old.with_name(name))


def discard(path: Path) -> None:
    """Deletes a file, if it exists, after emptying it: a Drive's trash then holds nothing of it."""
    if path.is_file():
        os.truncate(path, 0)
        path.unlink()
