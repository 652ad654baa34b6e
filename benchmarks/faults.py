"""Inject faults into training runs: they must survive kills, signals, damaged files and full disks.

    python benchmarks/faults.py            # all trials, about 20 minutes
    python benchmarks/faults.py --quick    # a sixth of them

A tiny run (360 pairs, two epochs, a checkpoint every other step) is trained once without faults. Each trial trains it
again, injects a fault, and resumes with the same command. The final state must be bit-identical: weights, EMA,
optimizer, random number generators, progress and scores.
"""

import argparse
import contextlib
import ctypes
import functools
import hashlib
import io
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config
import train
from corpora.toy import toy_pairs
from runs import checkpoint, files
from runs import folder as run_folder
from runs.checkpoint import DamagedCheckpoint, load_checkpoint
from runs.folder import RunFolder

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
    digest = hashlib.sha256((run / "scores.jsonl").read_bytes())

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


# ---------------------------------------------------------------------------- kills

# Points around a save at which a process can be killed: the module, the function, and when.
POINTS = {
    "before the file is written": (torch, "save", "before"),
    "file half written": (torch, "save", "half"),
    "file written, no checksum": (checkpoint, "_seal", "before"),
    "checksum half written": (checkpoint, "_seal", "half"),
    "checksum written, not renamed": (os, "replace", "before"),
    "renamed": (os, "replace", "after"),
    "folder flushed": (files, "flush_folder", "after"),
    "saved, older checkpoints of the epoch not removed": (run_folder, "save_checkpoint", "after"),
    "saved, not validated": (train, "run_validation", "before"),
    "validated, score not written": (RunFolder, "write_scores", "before"),
    "score written, not pruned": (RunFolder, "prune", "before"),
}


WHILE_WRITING = list(POINTS)[1:5]  # points at which a temporary file exists


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(point: str, nth: int) -> None:
    """Makes this process kill itself when it reaches a point for the n-th time."""
    module, name, when = POINTS[point]
    original, calls = getattr(module, name), itertools.count(1)

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        if name == "replace" and not str(args[1]).endswith(".pt"):  # configs and scores are also renamed
            return original(*args, **kwargs)
        if name == "flush_folder" and not RunFolder(args[0]).checkpoints():  # the config, before training
            return original(*args, **kwargs)
        is_nth = next(calls) == nth
        if is_nth and when == "before":
            kill_self()
        result = original(*args, **kwargs)
        if is_nth and when == "half":  # half of the file that torch.save wrote, or half of the digest at its end
            path = args[-1]
            size = os.path.getsize(path)
            os.truncate(path, size // 2 if name == "save" else size - 32)
        if is_nth:
            kill_self()
        return result

    setattr(module, name, wrapper)


def kill_at_point(bench: Bench, point: str, nth: int) -> bool:
    """The run is killed when it reaches a point for the n-th time, and resumed."""
    run = bench.fresh("killed")
    status = bench.train("killed", disturb=functools.partial(die_at, point, nth))
    has_temporary_file = any(".pt." in path.name for path in run.glob(".*.tmp"))
    was_killed = status == -signal.SIGKILL and has_temporary_file == (point in WHILE_WRITING)
    return was_killed and newest_is_readable(run) and bench.train("killed") == 0 and has_expected_end(bench, run)


def kill_at_random(bench: Bench, rng: random.Random, seconds: float) -> bool:
    """The run is killed at a random time, possibly during startup, in a third of the trials twice, and resumed."""
    run = bench.fresh("killed")
    readable = True
    for _ in range(rng.choice([1, 1, 2])):
        process = bench.start("killed")
        process.join(rng.uniform(0, seconds))
        process.kill()
        process.join()
        readable = readable and newest_is_readable(run)
    return readable and bench.train("killed") == 0 and has_expected_end(bench, run)


def has_expected_end(bench: Bench, run: Path) -> bool:
    """Whether the final state is that of the run without faults and no temporary file is left."""
    return final_state(run) == bench.expected and has_no_temporary_files(run)


# ---------------------------------------------------------------------------- signals


def stopped_by_signal(bench: Bench, number: int, rng: random.Random, seconds: float) -> bool:
    """A signal at a random time after the first step began: the run saves, exits with 128 + number, and resumes."""
    while True:
        run, started = bench.fresh("signalled"), SPAWN.Event()
        process = bench.start("signalled", started=started)
        if not started.wait(120):
            process.kill()
            return False
        time.sleep(rng.uniform(0, seconds))
        if process.exitcode is None:
            os.kill(process.pid, number)
        process.join()
        if process.exitcode != 0:  # 0: it finished before the signal
            break
    is_saved = bool(RunFolder(run).checkpoints()) and newest_is_readable(run) and has_no_temporary_files(run)
    good = process.exitcode == 128 + number and is_saved
    return good and bench.train("signalled") == 0 and has_expected_end(bench, run)


# ---------------------------------------------------------------------------- damaged files


def damage_newest(bench: Bench, damage: Callable[[bytes], bytes]) -> bool:
    """Damages the newest checkpoint: it is reported and kept, and the previous checkpoint is loaded."""
    run = bench.folder / "damaged"
    if not run.exists():
        shutil.copytree(bench.folder / "whole", run)
        if bench.train("damaged", "--keep-checkpoints", "0", "--num-epochs", "4"):
            return False
    *_, previous, newest = RunFolder(run).checkpoints()
    intact = newest.read_bytes()
    corrupt = damage(intact)
    newest.write_bytes(corrupt)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as warnings:
            loaded, _ = RunFolder(run).load_newest()
        return loaded == previous and newest.read_bytes() == corrupt and str(newest) in warnings.getvalue()
    finally:
        newest.write_bytes(intact)


def flip(rng: random.Random, content: bytes) -> bytes:
    """The content with one random bit flipped."""
    changed = bytearray(content)
    changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def replace_newest(bench: Bench) -> bool:
    """The newest checkpoint is overwritten with the oldest one."""
    run = bench.folder / "damaged"
    return damage_newest(bench, lambda _: RunFolder(run).checkpoints()[0].read_bytes())


# ---------------------------------------------------------------------------- full disks


def mount(folder: Path, size: int) -> bool:
    """Mounts an empty file system of `size` bytes on the folder; returns False if not permitted (root on Linux)."""
    try:
        return ctypes.CDLL(None).mount(b"none", bytes(folder), b"tmpfs", 0, f"size={size}".encode()) == 0
    except AttributeError:
        return False


def limit_files(size: int) -> None:
    """Limits the files of this process to `size` bytes each; writing more raises an error, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@contextlib.contextmanager
def limited_space(bench: Bench, run: Path, extra: int) -> Iterator[Callable | None]:
    """Context in which the run has `extra` bytes of disk space left.

    If mounting is not permitted, yields a function with which the process limits the size of its files instead.
    """
    kept = run.rename(bench.fresh("kept"))
    run.mkdir()
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in kept.rglob("*") if path.is_file())
    mounted = mount(run, used + 8 * 4096 + extra)  # some pages for folders, config and event files
    if mounted:
        shutil.copytree(kept, run, dirs_exist_ok=True)
    else:
        run.rmdir()
        kept.rename(run)
    try:
        yield None if mounted else functools.partial(limit_files, extra)
    finally:
        if mounted:
            shutil.rmtree(kept)
            shutil.copytree(run, kept)
            ctypes.CDLL(None).umount(bytes(run))
            run.rmdir()
            kept.rename(run)


def disk_full(bench: Bench, fraction: float) -> bool:
    """With space for a fraction of a checkpoint, saving fails and no file is lost; with enough, the run resumes."""
    run = bench.fresh("full")
    status = bench.train("full", "--num-epochs", "1")
    before = {path: path.read_bytes() for path in RunFolder(run).checkpoints()}
    size = len(before[RunFolder(run).checkpoints()[-1]])
    with limited_space(bench, run, int(fraction * size)) as disturb:
        good = fails_cleanly(bench, run, before, disturb)
    return status == 0 and good and bench.train("full") == 0 and has_expected_end(bench, run)


def fails_cleanly(bench: Bench, run: Path, before: dict[Path, bytes], disturb: Callable | None = None) -> bool:
    """The run ends with one error line and status 2, and the files of `before` are unchanged."""
    log = bench.folder / "full.log"
    log.unlink()
    status = bench.train("full", disturb=disturb)
    errors = [line for line in log.read_text(encoding="utf8").splitlines() if line.startswith("error:")]
    unchanged = all(path.is_file() and path.read_bytes() == content for path, content in before.items())
    one_error = len(errors) == 1 and "Traceback" not in log.read_text(encoding="utf8")
    return status == 2 and one_error and unchanged and has_no_temporary_files(run)


# ---------------------------------------------------------------------------- trials


def plan(bench: Bench, share: float, seed: int = 0) -> list[tuple[str, list[Callable[[], bool]]]]:
    """The trials for each kind of fault: a fraction `share` of the full number."""
    rng = random.Random(seed)
    start = time.perf_counter()
    bench.fresh("timed")
    bench.train("timed")
    seconds = time.perf_counter() - start

    def trials(full: int) -> range:
        return range(max(1, round(share * full)))

    points = [(point, nth) for point in POINTS for nth in (1, 2)]
    points = rng.sample(points, len(trials(len(points)))) if share < 1 else points
    signals = [(signal.SIGINT, signal.SIGTERM)[i % 2] for i in trials(40)]
    space = (0.02, 0.3, 0.6, 0.9, 0.99)[: len(trials(5))]
    return [
        ("SIGKILL around a save", [functools.partial(kill_at_point, bench, *point) for point in points]),
        ("SIGKILL at a random time", [functools.partial(kill_at_random, bench, rng, seconds) for _ in trials(100)]),
        ("SIGINT or SIGTERM", [functools.partial(stopped_by_signal, bench, s, rng, seconds / 2) for s in signals]),
        (
            "checkpoint truncated",
            [lambda: damage_newest(bench, lambda b: b[: rng.randrange(1, len(b))]) for _ in trials(50)],
        ),
        ("one bit flipped", [lambda: damage_newest(bench, functools.partial(flip, rng)) for _ in trials(300)]),
        ("checkpoint emptied", [lambda: damage_newest(bench, lambda _: b"")]),
        ("replaced by an older one", [lambda: replace_newest(bench)]),
        ("disk full", [functools.partial(disk_full, bench, fraction) for fraction in space]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a sixth of the trials only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        bench = Bench.prepare(Path(folder))
        print(f"| {'fault':<24} | survived | trials | seconds |\n|{'-' * 26}|----------|--------|---------|")
        failures = 0
        for name, trials in plan(bench, 1 / 6 if arguments.quick else 1):
            start = time.perf_counter()
            survived = sum(trial() for trial in tqdm(trials, desc=name, leave=False))
            failures += len(trials) - survived
            seconds = time.perf_counter() - start
            print(f"| {name:<24} | {survived:>8} | {len(trials):>6} | {seconds:>7.0f} |", flush=True)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
