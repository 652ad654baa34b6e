"""The run that benchmarks/faults.py disturbs: training in new processes, and what is left on disk."""

import ctypes
import hashlib
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config
import train
from corpora.toy import toy_pairs
from runs.checkpoint import DamagedCheckpoint, load_checkpoint
from runs.folder import RunFolder

ROOT = Path(config.__file__).parent

# Processes are forked from a server that has already imported everything, so that each starts in 0.2 s.
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["train"])

FLAGS = {
    "preset": "toy", "validation-source": "", "d-model": 32, "encoder-layers": 1, "decoder-layers": 1, "num-heads": 2,
    "d-ff": 64, "dropout": 0.1, "attention-dropout": 0.1, "num-epochs": 2, "batch-tokens": 512, "warmup-steps": 5,
    "lr-schedule": "constant", "ema-decay": 0.9, "keep-checkpoints": 1, "save-every-steps": 2,
    "validation-sentences": 4, "validation-examples": 1, "device": "cpu",
}  # fmt: skip


@dataclass
class Bench:
    """A working folder with the corpus, the flags of the run, and its final state without faults."""

    folder: Path
    flags: dict = field(default_factory=dict)
    expected: str = ""

    @classmethod
    def prepare(cls, folder: Path, **flags) -> "Bench":
        bench = cls(folder, {**FLAGS, "datasource": str(folder / "pairs.tsv"), **flags})
        pairs = toy_pairs("en", "it", "train")[:400]
        folder.mkdir(exist_ok=True)
        text = "".join(f"{pair.src_text}\t{pair.tgt_text}\n" for pair in pairs)
        (folder / "pairs.tsv").write_text(text, encoding="utf8")
        bench.train("whole")
        bench.expected = final_state(folder / "whole")
        return bench

    def train(self, run: str, *more: str, disturb: Callable[[], None] | None = None) -> int:
        """Runs train.py in a new process to its end; returns the exit status. `disturb` is called before it starts."""
        process = self.start(run, *more, disturb=disturb)
        process.join()
        return process.exitcode

    def start(self, run: str, *more: str, disturb: Callable[[], None] | None = None, started=None):
        """Starts train.py in a new process. It sets the event `started` at the first training step."""
        flags = [word for name, value in self.flags.items() for word in (f"--{name}", str(value))]
        arguments = [*flags, "--run-dir", str(self.folder / run), *more]
        log = self.folder / f"{run}.log"
        process = SPAWN.Process(target=run_train, args=(arguments, log, disturb, started))
        process.start()
        return process

    def log(self, run: str) -> str:
        """What train.py has printed for a run."""
        return (self.folder / f"{run}.log").read_text(encoding="utf8")

    def fresh(self, run: str) -> Path:
        """The folder for a run, which is removed if it exists."""
        shutil.rmtree(self.folder / run, ignore_errors=True)
        (self.folder / f"{run}.log").unlink(missing_ok=True)
        return self.folder / run


def run_train(arguments: list[str], log: Path, disturb: Callable[[], None] | None, started) -> None:
    """Runs in the new process: train.py with these arguments, its output appended to a file."""
    torch.set_num_threads(1)
    with log.open("a", encoding="utf8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["train.py", *arguments]
    if disturb:
        disturb()
    if started:
        step = train.train_step

        def signaling_step(*args, **options):
            started.set()
            return step(*args, **options)

        train.train_step = signaling_step
    config.run_command(train.main)


def final_state(run: Path) -> str:
    """A digest of the state in the newest checkpoint and of the scores."""
    state = load_checkpoint(RunFolder(run).checkpoints()[-1])
    digest = hashlib.sha256(repr(RunFolder(run).read_scores()).encode())  # without the identity of the run

    def add(value) -> None:
        if isinstance(value, dict):
            for name in value:
                digest.update(str(name).encode())
                add(value[name])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        elif isinstance(value, torch.Tensor):
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())

    for name in ("model", "ema_model", "optimizer", "progress", "rng"):
        add(state[name])
    return digest.hexdigest()


def newest_is_readable(run: Path) -> bool:
    files = RunFolder(run).checkpoints()
    try:
        return not files or bool(load_checkpoint(files[-1]))
    except DamagedCheckpoint:
        return False


def has_no_temporary_files(run: Path) -> bool:
    return not list(run.glob(".*.tmp"))


# ---------------------------------------------------------------------------- file systems


READ_ONLY = 32 | 1  # flags of mount(2): remount what is there, read-only


def mount(folder: Path, size: int, flags: int = 0) -> bool:
    """Mounts an empty file system of `size` bytes on the folder; returns False if not permitted (root on Linux)."""
    try:
        return ctypes.CDLL(None).mount(b"none", bytes(folder), b"tmpfs", flags, f"size={size}".encode()) == 0
    except AttributeError:
        return False
