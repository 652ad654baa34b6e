"""The checkpoint that a run resumes from, and whether it matches the current settings and corpus."""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from config import FIXED_FIELDS, Config, InputError
from dataset import BilingualDataset
from runs.checkpoint import DamagedCheckpoint, load_checkpoint
from runs.folder import RunFolder
from training.initial import load_initial_run
from translate import Translator, check_tokenizers


class ResumePoint(NamedTuple):
    """The checkpoint to resume from, or the run to start from, if any; the files to set aside before training."""

    path: Path | None
    state: dict | None
    conflicting: list[Path]
    initial: Translator | None = None


def find_resume_point(folder: RunFolder, config: Config) -> ResumePoint:
    """What `preload` selects: the newest readable checkpoint, that of an epoch, or none.

    Without a checkpoint, the run in `init_from`. Raises InputError if the checkpoint or that run is missing, damaged or
    has other settings.
    """
    files = folder.checkpoints()
    scores = [folder.scores_file] if folder.scores_file.is_file() else []
    if config.preload == "none":
        return ResumePoint(None, None, files + scores, load_initial_run(config))
    found = folder.load_newest() if config.preload == "latest" else load_epoch(folder, int(config.preload))
    if found is None:
        return ResumePoint(None, None, scores, load_initial_run(config))
    path, state = found
    check_same_settings(config, state["config"], path)
    later = files[files.index(path) + 1 :] if config.preload != "latest" else []
    return ResumePoint(path, state, later)


def load_epoch(folder: RunFolder, epoch: int) -> tuple[Path, dict]:
    path = folder.checkpoint(epoch + 1)
    if not path.is_file():
        available = ", ".join(file.name for file in folder.checkpoints()) or "none"
        raise InputError(f"no checkpoint {path}; available: {available}")
    try:
        return path, load_checkpoint(path)
    except DamagedCheckpoint as error:
        raise InputError(f"{path} is damaged ({error}); choose another epoch, or --preload latest") from None


def check_same_settings(config: Config, saved: dict, path: Path) -> None:
    """Raises InputError if one of FIXED_FIELDS differs from the saved settings."""
    saved = {**asdict(Config()), **saved}  # settings that did not exist yet had their defaults
    changed = [
        f"{name} {saved[name]!r} there, {getattr(config, name)!r} now"
        for name in FIXED_FIELDS
        if saved[name] != getattr(config, name)
    ]
    if changed:
        raise InputError(
            f"{path} was trained with other settings: {'; '.join(changed)}; "
            "give the same ones, another --run-dir, or --preload none"
        )


def check_same_data(folder: RunFolder, config: Config, train: BilingualDataset, resume_point: ResumePoint) -> None:
    """Raises InputError if the corpus or the tokenizers differ from those of the checkpoint."""
    path, state = resume_point.path, resume_point.state
    if state["corpus"] != train.fingerprint:
        raise InputError(
            f"the corpus has changed since {path} was saved ({state['corpus'].split()[0]} training pairs then, "
            f"{len(train)} now); restore it, or train in another --run-dir"
        )
    check_tokenizers(folder, config, state, path)
