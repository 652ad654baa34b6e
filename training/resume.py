"""The checkpoint that a run resumes from, and whether it matches the current settings and corpus."""

from pathlib import Path
from typing import NamedTuple

from compute import distributed
from config import FIXED_FIELDS, Config, InputError, changed_settings
from dataset import Batches, BilingualDataset
from runs.checkpoint import DamagedCheckpoint, require_parts
from runs.folder import RunFolder
from training.initial import languages, load_initial_run
from training.state import TrainingState
from training.streaming import StreamedPairs
from translate import Translator, check_tokenizers

RESUMED_PARTS = ("model", "ema_model", "optimizer", "progress", "rng", "config", "corpus", "tokenizers")


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
    scores = [folder.scores_file] if folder.read_scores() else []
    if config.preload == "none":
        others = (folder.config_file, folder.run_id_file, *map(folder.tokenizer_file, languages(config)))
        return ResumePoint(None, None, files + scores + [p for p in others if p.is_file()], load_initial_run(config))
    found = folder.load_newest() if config.preload == "latest" else load_epoch(folder, int(config.preload))
    if found is None:
        return ResumePoint(None, None, scores, load_initial_run(config))
    path, state = found
    require_parts(state, path, *RESUMED_PARTS)
    folder.check_score_of(path, state)
    check_same_settings(config, state["config"], path)
    later = files[files.index(path) + 1 :] if config.preload != "latest" else []
    return ResumePoint(path, state, later)


def batches_per_step(config: Config, resume_point: ResumePoint) -> int:
    """The number of batches of an optimizer step, of all processes together.

    A run keeps the number that it began with, also with more or fewer processes. Raises InputError for a wrong number.
    """
    state = resume_point.state or {}
    processes = len(state["rng"]) if state else distributed.world_size()
    batches = state.get("batches_per_step", config.accumulation_steps * processes)  # earlier versions did not save it
    if type(batches) is not int or batches < 1:
        raise InputError(f"{resume_point.path} has {batches!r} batches per step; resume from another with --preload")
    return batches


def load_epoch(folder: RunFolder, epoch: int) -> tuple[Path, dict]:
    path = folder.checkpoint(epoch + 1)
    if not path.is_file():
        available = ", ".join(file.name for file in folder.checkpoints()) or "none"
        raise InputError(f"no checkpoint {path}; available: {available}")
    try:
        return path, folder.load(path)
    except DamagedCheckpoint as error:
        raise InputError(f"{path} is damaged ({error}); choose another epoch, or --preload latest") from None


def check_same_settings(config: Config, saved: dict, path: Path) -> None:
    """Raises InputError if one of FIXED_FIELDS differs from the saved settings."""
    if changed := changed_settings(saved, config, FIXED_FIELDS):
        raise InputError(
            f"{path} was trained with other settings: {changed}; "
            "give the same ones, another --run-dir, or --preload none"
        )


def check_same_data(
    folder: RunFolder,
    config: Config,
    train: BilingualDataset | StreamedPairs,
    validation: BilingualDataset,
    resume_point: ResumePoint,
) -> None:
    """Raises InputError if the corpus or the tokenizers differ from those of the checkpoint."""
    path, state = resume_point.path, resume_point.state
    check_tokenizers(folder, config, state, path)  # first, because other tokenizers change the fingerprints below
    # Earlier versions saved the first part of the fingerprint only, or none of the validation set.
    if not train.fingerprint.startswith(state["corpus"] or "?"):
        raise InputError(
            f"the corpus has changed since {path} was saved ({size_of(state['corpus'])} then, "
            f"{size_of(train.fingerprint)} now); restore it, or train in another --run-dir"
        )
    if state.get("validation", validation.fingerprint) != validation.fingerprint:
        raise InputError(
            f"the validation set has changed since {path} was saved ({size_of(state['validation'])} "
            f"then, {len(validation)} now); restore it, or train in another --run-dir"
        )


def size_of(fingerprint: str) -> str:
    """The first two words of a fingerprint: 24000 pairs, or 100 shards of a stream."""
    return " ".join(fingerprint.split()[:2])


def load_state(
    state: TrainingState, config: Config, train: BilingualDataset | StreamedPairs, resume_point: ResumePoint
) -> None:
    """Restores the checkpoint's state. Raises InputError if its values do not fit the model or the corpus."""
    path, saved = resume_point.path, resume_point.state
    try:
        state.load_state_dict(saved)
        progress = state.progress
        if config.stream:
            train.load_state_dict(saved["stream"])
        elif progress.batch and progress.batch >= len(Batches(train, config, progress.epoch)):
            raise ValueError(f"it is at batch {progress.batch} of an epoch")
        is_complete = not progress.step or len(saved["optimizer"]["state"]) == len(list(state.model.parameters()))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} does not fit this model ({reason}); restore the file, or resume from another epoch with --preload"
        ) from error
    if not is_complete:
        raise InputError(f"{path} lacks a part of the optimizer's state; restore the file, or choose another --preload")
