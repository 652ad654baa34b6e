"""The files of a run: where they are, what they are called, and how they are read and written.

config.json                   the settings, except INVOCATION_FIELDS (config.py)
tokenizer_en.json, …          the tokenizer of each language
tmodel_07.pt                  checkpoint after epoch 7
tmodel_07_step_00001200.pt    checkpoint within epoch 7
tmodel_07_weights.pt          the weights of one, without the optimizer, restored from a mirror (runs/mirror.py)
scores.jsonl                  one line per validation
distilled.jsonl               the training pairs as translated by the run in --distill-from
tensorboard/                  curves
model.safetensors             the weights of an exported run, instead of checkpoints
model.safetensors.sha256      checksums of the weights, the config and the tokenizers
set_aside/                    files that an earlier training in this folder left
run_id                        a random text that tells this run from all others
.lock                         locked by the training process
.trainer                      in a mirror: the process that writes it; with several processes: which of their attempts
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout
from torch import Tensor

from config import INVOCATION_FIELDS, Config, InputError, reject_unknown, split_source
from runs.checkpoint import (
    DamagedCheckpoint,
    load_checkpoint,
    require_parts,
    save_checkpoint,
    weights_crc32,
    weights_for_inference,
)
from runs.files import parse_object, read_run_file, sha256, write_atomically

WEIGHTS_FOLDER = Path("weights")
PRETRAINED = (Path("pretrained/toy.en-it"), Path("pretrained/toy.en-de"))  # written by pretrained/make.py
MODEL_BASENAME = "tmodel_"
WEIGHTS_ONLY = "_weights"
WEIGHTS_FILE = "model.safetensors"
SET_ASIDE = "set_aside"
MAX_DELAY = 70  # seconds until a file is visible on all machines: NFS keeps listings of folders for up to 60 s
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # errors of file systems without locks


class RunFolder:
    """The folder of one run. It can be moved, because nothing in it depends on its path."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def of(cls, config: Config) -> "RunFolder":
        """The folder of a config's run: run_dir, or weights/<corpus>.<src>-<tgt>."""
        if config.run_dir:
            return cls(config.run_dir)
        corpus = Path(split_source(config.datasource)[0]).name
        corpus = re.sub(r"(?i)\.(tsv|csv|jsonl|parquet|xlsx|tmx)(\.gz)?$", "", corpus)
        corpus = re.sub(r"[^A-Za-z0-9._-]", "_", corpus)
        return cls(WEIGHTS_FOLDER / f"{corpus}.{config.lang_src}-{config.lang_tgt}")

    @classmethod
    def find(cls, name: str | Path = "") -> "RunFolder":
        """The run at this path or in the Hugging Face Hub repository NAME/NAME; by default `most_recent`.

        Raises InputError if a repository cannot be downloaded, or if there is no trained run.
        """
        if not name:
            return cls.most_recent()
        is_path = Path(name).parent.is_dir() or Path(name).parent == WEIGHTS_FOLDER
        if is_path or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
            return cls(name)
        try:
            from huggingface_hub import snapshot_download  # imported here because it takes half a second

            return cls(snapshot_download(str(name), allow_patterns=[f"{WEIGHTS_FILE}*", "*.json"]))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"no folder {name}, and no such repository on the Hugging Face Hub ({reason})") from None

    @classmethod
    def most_recent(cls) -> "RunFolder":
        """The most recently trained run under weights/; without one, the first pretrained run, named on stderr.

        Raises InputError if there is neither.
        """
        if runs := cls.trained():
            return runs[0]
        if not (runs := cls.pretrained()):
            raise InputError("no trained run in weights/; train one first: python train.py --preset toy")
        print(f"no trained run in weights/; using {runs[0]}, which comes with the project", file=sys.stderr)
        return runs[0]

    @classmethod
    def trained(cls) -> list["RunFolder"]:
        """The trained runs under weights/, the most recently trained first."""
        runs = [cls(path) for path in WEIGHTS_FOLDER.glob("*") if cls(path).config_file.is_file()]
        runs = [run for run in runs if run.checkpoints()]
        return sorted(runs, key=lambda run: run.checkpoints()[-1].stat().st_mtime, reverse=True)

    @classmethod
    def pretrained(cls) -> list["RunFolder"]:
        """The exported toy runs that come with the project. They cannot be trained further (see `check_writable`)."""
        return [run for run in map(cls, PRETRAINED) if run.exported_weights.is_file()]

    # ------------------------------------------------------------------------ files

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def has_config(self) -> bool:
        """Whether there is anything of this name: what is no regular file is an error when it is read."""
        return os.path.lexists(self.config_file)

    @property
    def scores_file(self) -> Path:
        return self.path / "scores.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def trainer_file(self) -> Path:
        return self.path / ".trainer"

    @property
    def distilled_file(self) -> Path:
        return self.path / "distilled.jsonl"

    @property
    def run_id_file(self) -> Path:
        return self.path / "run_id"

    @property
    def exported_weights(self) -> Path:
        return self.path / WEIGHTS_FILE

    @property
    def checksum_file(self) -> Path:
        return self.path / f"{WEIGHTS_FILE}.sha256"

    def tokenizer_file(self, lang: str) -> Path:
        return self.path / f"tokenizer_{lang}.json"

    def checkpoint(self, epoch: int, batch: int = 0, step: int = 0) -> Path:
        """The checkpoint file for this progress, as defined in training/state.py.

        `epoch` and `batch` are the next ones to train: with `batch` 0, the file is named after the completed epoch.
        """
        name = f"{epoch:02d}_step_{step:08d}" if batch else f"{epoch - 1:02d}"
        return self.path / f"{MODEL_BASENAME}{name}.pt"

    def checkpoints(self) -> list[Path]:
        """All checkpoints, oldest first: sorted by number (100 after 99), the end of an epoch after its steps.

        Folders, pipes, devices and broken links of such a name are none.
        """
        found = filter(checkpoint_age, self.path.glob(f"{MODEL_BASENAME}*.pt"))
        return sorted((path for path in found if path.is_file()), key=checkpoint_age)

    def epoch_checkpoints(self) -> list[Path]:
        """The checkpoints at the end of an epoch, oldest first."""
        return [path for path in self.checkpoints() if ends_epoch(path)]

    def other_files(self) -> list[Path]:
        """All files but checkpoints, what was set aside, temporary files, locks and links, at any depth."""
        skipped = {self.path / ".lock", self.trainer_file, *self.checkpoints()}
        found = (path for path in sorted(self.path.rglob("*")) if path.is_file() and not path.is_symlink())
        files = (path for path in found if path not in skipped)
        aside = self.path / SET_ASIDE
        return [path for path in files if not path.name.endswith(".tmp") and aside not in path.parents]

    # ------------------------------------------------------------------------ identity, config and scores

    @property
    def run_id(self) -> str:
        """The identity of the run, or "" if it has none yet."""
        return read_run_file(self.run_id_file).strip() if os.path.lexists(self.run_id_file) else ""

    def save_run_id(self, known: str = "") -> None:
        """Gives the run an identity if it has none: the one that is known from its checkpoint, or a new one."""
        if not self.run_id:
            write_atomically(self.run_id_file, (known or uuid4().hex) + "\n")

    def check_identity(self, run_id: str) -> None:
        """Raises InputError or ValueError if what belongs to the run `run_id` does not belong to this one."""
        if not self.run_id and run_id:
            raise InputError(f"{self.run_id_file} is missing; restore it: a text file with {run_id}")
        if run_id != self.run_id:
            raise ValueError("it belongs to another run than run_id beside it")

    def save_config(self, config: Config) -> None:
        kept = {k: v for k, v in dataclasses.asdict(config).items() if k not in INVOCATION_FIELDS}
        write_atomically(self.config_file, json.dumps(kept, indent=2) + "\n")

    def load_config(self) -> Config:
        """The config of the run. Raises InputError if config.json is missing or invalid."""
        path = self.config_file
        if not self.has_config:
            raise InputError(
                f"no run in {str(self)!r}: it has no config.json; train one, "
                f"for example with python train.py --preset toy --run-dir {self}"
            )
        try:
            values = parse_object(read_run_file(path))
            reject_unknown(values)
            # Runs written before these settings existed kept every checkpoint and had one dropout probability.
            inner = dict.fromkeys(("attention_dropout", "feed_forward_dropout"), values.get("dropout", 0.1))
            return Config(**{"keep_checkpoints": 0, **inner, **values, "run_dir": str(self)})
        except (ValueError, TypeError, InputError) as error:
            raise InputError(f"{path}: {error}; restore the file, or train in another --run-dir") from None

    def read_scores(self) -> list[dict]:
        """One dict per validation, oldest first: epoch, batch, step, CRC-32 of the weights, loss, bleu, chrf, …

        Raises InputError if the file is damaged.
        """
        path = self.scores_file
        if not os.path.lexists(path):
            return []
        try:
            rows = [parse_object(line) for line in read_run_file(path).splitlines()]
            for row in rows:
                self.check_identity(row.pop("run_id", self.run_id))
                check_score(row)
            return rows
        except ValueError as error:
            raise InputError(f"{path} cannot be read ({error}); remove the damaged line, or restore the file") from None

    def write_scores(self, rows: list[dict]) -> None:
        identity = {"run_id": self.run_id} if self.run_id else {}
        write_atomically(self.scores_file, "".join(json.dumps(row | identity) + "\n" for row in rows))

    def drop_scores_after(self, step: int) -> None:
        """Removes the scores of later steps, which were written before training resumed from this step."""
        rows = self.read_scores()
        kept = [row for row in rows if row["step"] <= step]
        if kept != rows:
            self.write_scores(kept)

    # ------------------------------------------------------------------------ writing checkpoints

    def save(self, state: dict, best_by: str = "loss") -> Path:
        """Writes a checkpoint and returns its path.

        Removes all within epochs except this one, the one before it, and the best of the run if it is one of them.
        """
        path = self.checkpoint(**state["progress"])
        save_checkpoint(path, {**state, "run_id": self.run_id})
        within_epoch = [file for file in self.checkpoints() if not ends_epoch(file)]
        position = within_epoch.index(path) if path in within_epoch else -1
        keep = [*within_epoch[max(0, position - 1) : position + 1], self.best_first(best_by)[0]]
        for old in within_epoch:
            if old not in keep:
                old.unlink(missing_ok=True)
        return path

    def prune(self, keep: int, best_by: str) -> None:
        """Removes the checkpoints of all epochs except the latest `keep` (0: all) and the best."""
        if keep:
            epochs = self.epoch_checkpoints()
            best = next((path for path in self.best_first(best_by) if path in epochs), None)
            for path in epochs[:-keep]:
                if path != best:
                    path.unlink(missing_ok=True)

    def set_aside(self, files: list[Path]) -> Path | None:
        """Moves files into set_aside/ without overwriting earlier ones; returns that folder, or None if no files."""
        folder = self.path / SET_ASIDE
        for path in files:
            folder.mkdir(exist_ok=True)
            names = (f"{path.stem}{f'_{i}' if i else ''}{path.suffix}" for i in count())
            os.replace(path, next(folder / name for name in names if not (folder / name).exists()))
        return folder if files else None

    def sweep(self) -> None:
        """Removes temporary files that a killed process has left behind."""
        for kind in (f"{MODEL_BASENAME}*.pt", "config.json", "tokenizer_*.json", "scores.jsonl"):
            for path in self.path.glob(f".{kind}.*.tmp"):
                path.unlink(missing_ok=True)

    # ------------------------------------------------------------------------ reading checkpoints

    def load(self, path: Path) -> dict:
        """The state of a checkpoint. Raises DamagedCheckpoint, also if it belongs to another run."""
        state = load_checkpoint(path)
        if self.run_id and state.get("run_id", self.run_id) != self.run_id:
            raise DamagedCheckpoint("it belongs to another run than run_id beside it")
        return state

    def check_score_of(self, path: Path, state: dict) -> None:
        """Raises InputError if the score of this step was measured with other weights, in another copy of the run."""
        step = state.get("progress", {}).get("step")
        scored = next((row for row in self.read_scores() if row["step"] == step), {})
        measured = scored.get("weights_crc32")  # earlier versions did not save it
        if measured is not None and measured != weights_crc32(weights_for_inference(state)):
            raise InputError(
                f"{path} and the score of step {step} in {self.scores_file.name} are from different copies of this "
                "run; restore one of them, or remove that line"
            )

    def load_newest(self) -> tuple[Path, dict] | None:
        """Path and state of the newest checkpoint that training can resume from; None if there is no checkpoint.

        Damaged ones are skipped with a warning. Raises InputError if there are checkpoints, but none of these.
        """
        files = [path for path in self.checkpoints() if not has_weights_only(path)]
        for path in reversed(files):
            try:
                return path, self.load(path)
            except DamagedCheckpoint as error:
                warn_skipped(path, error)
        if self.checkpoints():
            raise InputError(f"no checkpoint in {self} can be read; restore one, or train in another --run-dir")
        return None

    def load_weights(
        self, weights: str = "best", average: int = 1, best_by: str = "loss"
    ) -> tuple[Path, dict[str, Tensor], dict]:
        """Weights for inference: the path of their checkpoint, the weights, and the checkpoint's whole state.

        `weights` is best (by the validation score `best_by`), latest or an epoch number. With `average` above 1 they
        are the mean over that many epochs, the best or the latest ones (Vaswani et al., 2017, section 6.1), and path
        and state are those of the first. Damaged files are skipped with a warning. Raises InputError if too few remain.
        """
        files = self.candidates(weights, average, best_by)
        loaded: list[tuple[Path, dict]] = []
        mean: dict[str, Tensor] = {}
        for path in files:
            try:
                state = self.load(path)
                require_parts(state, path, "model", "ema_model")
                self.check_score_of(path, state)
            except (FileNotFoundError, DamagedCheckpoint) as error:
                if os.path.lexists(path):
                    warn_skipped(path, error)
                continue
            update_mean(mean, weights_for_inference(state), len(loaded) + 1)
            loaded.append((path, state if not loaded else {}))
            if len(loaded) == average:
                return loaded[0][0], mean, loaded[0][1]
        if not all(map(os.path.lexists, files)):  # a training process has removed some in the meantime
            return self.load_weights(weights, average, best_by)
        if not files and average == 1:
            raise InputError(f"the run {self} has no checkpoint yet; train it with python train.py --run-dir {self}")
        if len(files) == 1 and average == 1:
            raise InputError(f"{files[0]} cannot be read; restore it, or choose other --weights")
        if average == 1:
            raise InputError(f"no checkpoint in {self} can be read; restore one")
        raise InputError(
            f"{len(loaded)} of the checkpoints in {self} can be read, --average needs {average}; "
            "lower --average, restore one, or train with a higher --keep-checkpoints"
        )

    def candidates(self, weights: str, average: int, best_by: str) -> list[Path]:
        """Checkpoints in order of preference; only those at the end of an epoch may be averaged.

        Raises InputError for invalid arguments.
        """
        if average < 1:
            raise InputError(f"--average is {average}; give 1 or more")
        if weights in ("best", "latest"):
            files = self.best_first(best_by) if weights == "best" else self.checkpoints()[::-1]
            return files if average == 1 else [path for path in files if ends_epoch(path)]
        if average > 1:
            raise InputError(f"--average {average} goes with --weights best or latest, not with one epoch")
        files = self.checkpoints()
        name = f"{MODEL_BASENAME}{weights.zfill(2)}" if weights else ""
        found = [path for path in files if whole(path).stem == name]
        if not found:
            available = ", ".join(path.name for path in files) or "none"
            raise InputError(f"no weights {weights!r} in {self}: give best, latest or one of {available}")
        return found

    def best_first(self, best_by: str) -> list[Path]:
        """The checkpoints by validation score, best first; the newest first among ties; those without a score last."""
        score = self.scored_checkpoints(best_by)
        newest_first = reversed(self.checkpoints())
        return sorted(newest_first, key=lambda path: score.get(whole(path), -math.inf), reverse=True)

    def scored_checkpoints(self, best_by: str) -> dict[Path, float]:
        """The checkpoints that were validated, removed ones included, with one number each, higher is better."""
        rows = self.read_scores()
        paths = [self.checkpoint(row["epoch"], row["batch"], row["step"]) for row in rows]
        return dict(zip(paths, merits(rows, best_by), strict=True))

    # ------------------------------------------------------------------------ exported weights

    def write_checksum(self) -> None:
        """Writes the SHA-256 of each file that translation needs, in the format of sha256sum."""
        files = (self.exported_weights, self.config_file, *sorted(self.path.glob("tokenizer_*.json")))
        write_atomically(self.checksum_file, "".join(f"{sha256(file)}  {file.name}\n" for file in files))

    def verify_export(self) -> None:
        """Raises InputError if a file does not match its checksum, as after a mix of two exports.

        Earlier exports have a checksum of the weights, or none.
        """
        if not self.checksum_file.is_file():
            return
        lines = [line.partition("  ") for line in read_run_file(self.checksum_file).splitlines()]
        if WEIGHTS_FILE not in [name for *_, name in lines]:
            raise InputError(f"{self.checksum_file} has no checksum of {WEIGHTS_FILE}; copy the folder again")
        for digest, _, name in lines:
            file = self.path / Path(name).name
            if not file.is_file() or sha256(file) != digest:
                raise InputError(f"{file} does not match {self.checksum_file.name}; copy the folder again")

    # ------------------------------------------------------------------------ one process at a time

    def check_writable(self) -> None:
        """Raises InputError if no run can be written to this folder. Creates nothing."""
        existing = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise InputError(f"{existing} is a file; choose another --run-dir")
        if self.exported_weights.is_file():
            raise InputError(f"{self} holds exported weights, which cannot be trained; choose another --run-dir")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise InputError(f"cannot write into {existing}; fix its permissions or choose another --run-dir")

    def create(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot create {self} ({error}); choose another --run-dir") from None

    def mark(self, text: str) -> None:
        """Writes a text by which other machines recognize this folder."""
        write_atomically(self.trainer_file, text)

    def wait_for_mark(self, text: str, rank: int) -> None:
        """Waits until this process sees the mark of the first one. Raises InputError if it does not appear."""
        deadline = time.monotonic() + MAX_DELAY
        while not (self.trainer_file.is_file() and read_run_file(self.trainer_file) == text):
            if time.monotonic() > deadline:
                raise InputError(
                    f"process {rank} on {socket.gethostname()} does not see in {self.path.absolute()} what the first "
                    f"process has written there ({MAX_DELAY} s); give a --run-dir on a disk that all machines share"
                )
            time.sleep(0.2)

    @contextlib.contextmanager
    def locked(self, flag: str = "--run-dir") -> Iterator[None]:
        """Holds the lock of a run or, with another `flag`, of a mirror; it is released when the process ends.

        Raises InputError if another process holds it. Warns if the file system has no locks, as some network ones.
        """
        file = self.path / ".lock"
        if file.exists() and not file.is_file():
            raise InputError(f"{file} is a pipe, a device or a folder; remove it")
        lock = FileLock(file, timeout=0, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            raise InputError(f"another process is training in {self}; wait for it, or choose another {flag}") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"warning: no lock on {self} ({error}); do not start a second training in it", file=sys.stderr)
        try:
            yield
        finally:
            lock.release()


def checkpoint_age(path: Path) -> tuple[int, float] | None:
    """Epoch and step in the name of a checkpoint, a sort key for the order of training; None for other names."""
    match = re.fullmatch(rf"{MODEL_BASENAME}(\d+)(?:_step_(\d+))?({WEIGHTS_ONLY})?\.pt", path.name)
    return match and (int(match[1]), int(match[2]) if match[2] else math.inf)


def has_weights_only(path: Path) -> bool:
    """Whether a checkpoint holds weights without the state of the optimizer, by its name."""
    return path.stem.endswith(WEIGHTS_ONLY)


def whole(path: Path) -> Path:
    """The path of the whole checkpoint that the weights in this file are from."""
    return path.with_stem(path.stem.removesuffix(WEIGHTS_ONLY))


def ends_epoch(path: Path) -> bool:
    """Whether a checkpoint was saved at the end of an epoch."""
    return "_step_" not in path.name


def merits(rows: list[dict], best_by: str) -> list[float]:
    """One number per validation, higher is better: the score `best_by` if every row has it, otherwise -loss.

    A score that is not finite is worse than all others.
    """
    by_score = best_by != "loss" and all(best_by in row for row in rows)
    values = [row[best_by] if by_score else -row["loss"] for row in rows]
    return [value if math.isfinite(value) else -math.inf for value in values]


def check_score(row: dict) -> None:
    """Raises ValueError unless the row is one of scores.jsonl."""
    for name in ("epoch", "batch", "step"):
        if type(row.get(name)) is not int or row[name] < 0:
            raise ValueError(f"{name} is {row.get(name)!r}")
    for name, value in row.items():
        if type(value) not in (int, float):
            raise ValueError(f"{name} is {value!r}")
    if "loss" not in row:
        raise ValueError("it has no loss")


def update_mean(mean: dict[str, Tensor], new: dict[str, Tensor], count: int) -> None:
    """Updates the dict `mean` to the mean of `count` sets of weights, of which `new` is the last.

    The tensors are not changed in place, because a tied matrix appears under several names.
    """
    mean |= {name: mean[name] + (weight - mean[name]) / count if count > 1 else weight for name, weight in new.items()}


def warn_skipped(path: Path, error: DamagedCheckpoint | FileNotFoundError) -> None:
    print(f"warning: {path} is skipped: {error}", file=sys.stderr)


# ---------------------------------------------------------------------------- functions of the tutorial


def get_weights_file_path(config: Config, epoch: int | str) -> str:
    """The checkpoint at the end of an epoch, such as weights/toy.en-it/tmodel_07.pt."""
    return str(RunFolder.of(config).checkpoint(int(epoch) + 1))


def latest_weights_file_path(config: Config) -> str | None:
    """The newest checkpoint, or None."""
    files = RunFolder.of(config).checkpoints()
    return str(files[-1]) if files else None
