"""What a run survives: kills, signals, damaged files, full disks.

    python benchmarks/faults.py            # the whole plan, some minutes, and a table
    python benchmarks/faults.py --quick    # a sixth of it

A tiny run (360 pairs, two epochs, a checkpoint every other step) is trained once without disturbance.
Then it is trained again and again, each time disturbed somewhere and taken up by the same command,
and must end with the same final state to the bit: weights, optimizer, generators, position, scores.
"""

import argparse
import contextlib
import ctypes
import functools
import hashlib
import io
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
from config import weights_files
from corpora.toy import toy_pairs
from runs import checkpoint
from runs.checkpoint import DamagedCheckpoint, load_checkpoint, load_newest
from training import state

# Workers are forked from a server that has imported everything already: a start costs a fifth of a second.
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
    """A folder to work in, the corpus there, and the state in which an undisturbed run ends."""

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
        """The command line of train.py in a process of its own, to its end: the exit status."""
        process = self.begin(run, *more, disturb=disturb)
        process.join()
        return process.exitcode

    def begin(self, run: str, *more: str, disturb: Callable[[], None] | None = None, started=None):
        words = [word for name, value in self.flags.items() for word in (f"--{name}", str(value))]
        arguments = [*words, "--run-dir", str(self.folder / run), *more]
        log = self.folder / f"{run}.log"
        process = SPAWN.Process(target=command, args=(arguments, log, disturb, started))
        process.start()
        return process

    def fresh(self, run: str) -> Path:
        shutil.rmtree(self.folder / run, ignore_errors=True)
        (self.folder / f"{run}.log").unlink(missing_ok=True)
        return self.folder / run


def command(arguments: list[str], log: Path, disturb: Callable[[], None] | None, started) -> None:
    """Runs in the new process: train.py with these arguments, its output in a file."""
    torch.set_num_threads(1)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["train.py", *arguments]
    if disturb:
        disturb()
    if started:
        step = train.train_step
        train.train_step = lambda *args, **options: (started.set(), step(*args, **options))[1]
    config.run_command(train.main)


def final_state(run: Path) -> str:
    """A digest of all that counts in the newest checkpoint, and of the scores."""
    state = load_checkpoint(weights_files(run)[-1])
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

    for name in ("model", "learner", "optimizer", "progress", "rng"):
        add(state[name])
    return digest.hexdigest()


def newest_is_readable(run: Path) -> bool:
    files = weights_files(run)
    try:
        return not files or bool(load_checkpoint(files[-1]))
    except DamagedCheckpoint:
        return False


def clean(run: Path) -> bool:
    """No part of a file and no orphan is left."""
    return not list(run.glob(".*.tmp"))


# ---------------------------------------------------------------------------- kills

# Where a process can die around a save: the module, the function, and when.
POINTS = {
    "before the file is written": (torch, "save", "before"),
    "file half written": (torch, "save", "half"),
    "file written, not sealed": (checkpoint, "_seal", "before"),
    "seal half written": (checkpoint, "_seal", "half"),
    "sealed, not renamed": (os, "replace", "before"),
    "renamed": (os, "replace", "after"),
    "folder flushed": (checkpoint, "_flush_folder", "after"),
    "saved, older ones of the epoch still there": (state, "save_checkpoint", "after"),
    "saved, not validated": (train, "run_validation", "before"),
    "validated, score not written": (train, "write_scores", "before"),
    "score written, not pruned": (train, "prune", "before"),
}


WHILE_WRITING = list(POINTS)[1:5]  # a temporary file is there then


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(point: str, nth: int) -> None:
    """Makes this process kill itself when it comes to the point for the n-th time."""
    module, name, when = POINTS[point]
    original, calls = getattr(module, name), iter(range(1, 1 << 30))

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        if name == "replace" and not str(args[1]).endswith(".pt"):  # configs and scores are renamed too
            return original(*args, **kwargs)
        last = next(calls) == nth
        if last and when == "before":
            die()
        result = original(*args, **kwargs)
        if last and when == "half":  # of a file written by torch.save, or of the digest at its end
            path = args[-1]
            size = os.path.getsize(path)
            os.truncate(path, size // 2 if name == "save" else size - 32)
        if last:
            die()
        return result

    setattr(module, name, wrapper)


def kill_at_point(bench: Bench, point: str, nth: int) -> bool:
    run = bench.fresh("killed")
    status = bench.train("killed", disturb=functools.partial(die_at, point, nth))
    in_the_making = any(".pt." in path.name for path in run.glob(".*.tmp"))
    as_said = in_the_making == (point in WHILE_WRITING)
    readable = newest_is_readable(run)
    return status == -signal.SIGKILL and as_said and readable and bench.train("killed") == 0 and ends_well(bench, run)


def kill_at_random(bench: Bench, rng: random.Random, seconds: float) -> bool:
    """Killed at any moment of its life, start-up included; taken up again, and sometimes killed again."""
    run = bench.fresh("killed")
    readable = True
    for _ in range(rng.choice([1, 1, 2])):
        process = bench.begin("killed")
        process.join(rng.uniform(0, seconds))
        process.kill()
        process.join()
        readable = readable and newest_is_readable(run)
    return readable and bench.train("killed") == 0 and ends_well(bench, run)


def ends_well(bench: Bench, run: Path) -> bool:
    return final_state(run) == bench.expected and clean(run)


# ---------------------------------------------------------------------------- signals


def signalled(bench: Bench, number: int, rng: random.Random, seconds: float) -> bool:
    """A signal at any moment after the first step began: saved at a step's boundary, right exit status."""
    while True:
        run, started = bench.fresh("signalled"), SPAWN.Event()
        process = bench.begin("signalled", started=started)
        if not started.wait(120):
            process.kill()
            return False
        time.sleep(rng.uniform(0, seconds))
        if process.exitcode is None:
            os.kill(process.pid, number)
        process.join()
        if process.exitcode != 0:  # 0: it had finished before
            break
    saved = weights_files(run)
    good = process.exitcode == 128 + number and bool(saved) and newest_is_readable(run) and clean(run)
    return good and bench.train("signalled") == 0 and ends_well(bench, run)


# ---------------------------------------------------------------------------- damaged files


def damaged(bench: Bench, damage: Callable[[bytes], bytes]) -> bool:
    """The newest checkpoint is damaged: that is noticed, the one before is used, the bad file stays to be seen."""
    run = bench.folder / "damaged"
    if not run.exists():
        shutil.copytree(bench.folder / "whole", run)
        if bench.train("damaged", "--keep-checkpoints", "0", "--num-epochs", "4"):
            return False
    *_, before, newest = weights_files(run)
    whole = newest.read_bytes()
    newest.write_bytes(bad := damage(whole))
    try:
        with contextlib.redirect_stderr(io.StringIO()) as warnings:
            used, _ = load_newest(run)
        return used == before and newest.read_bytes() == bad and str(newest) in warnings.getvalue()
    finally:
        newest.write_bytes(whole)


def flip(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def swapped(bench: Bench) -> bool:
    run = bench.folder / "damaged"
    return damaged(bench, lambda _: weights_files(run)[0].read_bytes())


# ---------------------------------------------------------------------------- disks


def mount(folder: Path, size: int) -> bool:
    """Puts an empty file system of so many bytes over the folder, where the system lets us (root on Linux)."""
    try:
        return ctypes.CDLL(None).mount(b"none", bytes(folder), b"tmpfs", 0, f"size={size}".encode()) == 0
    except AttributeError:
        return False


def limit_files(size: int) -> None:
    """No file of this process may grow past so many bytes; to write more is an error, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@contextlib.contextmanager
def little_room(bench: Bench, run: Path, extra: int) -> Iterator[Callable | None]:
    """Leaves so many bytes beside the run's files; yields what a process must do to itself where nothing mounts."""
    kept = run.rename(bench.fresh("kept"))
    run.mkdir()
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in kept.rglob("*") if path.is_file())
    mounted = mount(run, used + 8 * 4096 + extra)  # a page or two for folders, config and event files
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


def disk_full(bench: Bench, share: float) -> bool:
    """Room for a share of a checkpoint: it is not saved, what was there stays, and with room the run goes on."""
    run = bench.fresh("full")
    begun = bench.train("full", "--num-epochs", "1")
    before = {path: path.read_bytes() for path in weights_files(run)}
    size = len(before[weights_files(run)[-1]])
    with little_room(bench, run, int(share * size)) as disturb:
        good = refused_and_unharmed(bench, run, before, disturb)
    return begun == 0 and good and bench.train("full") == 0 and ends_well(bench, run)


def refused_and_unharmed(bench: Bench, run: Path, before: dict, disturb: Callable | None = None) -> bool:
    log = bench.folder / "full.log"
    log.unlink()
    status = bench.train("full", disturb=disturb)
    errors = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    unharmed = all(path.is_file() and path.read_bytes() == content for path, content in before.items())
    return status == 2 and len(errors) == 1 and "Traceback" not in log.read_text() and unharmed and clean(run)


# ---------------------------------------------------------------------------- the plan


def plan(bench: Bench, share: float, seed: int = 0) -> list[tuple[str, list[Callable[[], bool]]]]:
    """Every group of trials, with `share` of the full number of each."""
    rng = random.Random(seed)
    begun = time.perf_counter()
    bench.fresh("timed")
    bench.train("timed")
    seconds = time.perf_counter() - begun

    def some(full: int) -> range:
        return range(max(1, round(share * full)))

    chosen = [(point, nth) for point in POINTS for nth in (1, 2)]
    chosen = rng.sample(chosen, len(some(len(chosen)))) if share < 1 else chosen
    signals = [(signal.SIGINT, signal.SIGTERM)[i % 2] for i in some(40)]
    rooms = (0.02, 0.3, 0.6, 0.9, 0.99)[: len(some(5))]
    return [
        ("SIGKILL around a save", [functools.partial(kill_at_point, bench, *point) for point in chosen]),
        ("SIGKILL at random", [functools.partial(kill_at_random, bench, rng, seconds) for _ in some(100)]),
        ("SIGINT and SIGTERM", [functools.partial(signalled, bench, s, rng, seconds / 2) for s in signals]),
        ("truncated", [lambda: damaged(bench, lambda b: b[: rng.randrange(1, len(b))]) for _ in some(50)]),
        ("a bit flipped", [lambda: damaged(bench, functools.partial(flip, rng)) for _ in some(300)]),
        ("empty", [lambda: damaged(bench, lambda _: b"")]),
        ("swapped", [lambda: swapped(bench)]),
        ("disk full", [functools.partial(disk_full, bench, room) for room in rooms]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a sixth of the plan")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        bench = Bench.prepare(Path(folder))
        print(f"| {'fault':<24} | good | of  | seconds |\n|{'-' * 26}|------|-----|---------|")
        failures = 0
        for name, trials in plan(bench, 1 / 6 if arguments.quick else 1):
            begun = time.perf_counter()
            good = sum(trial() for trial in tqdm(trials, desc=name, leave=False))
            failures += len(trials) - good
            print(f"| {name:<24} | {good:>4} | {len(trials):>3} | {time.perf_counter() - begun:>7.0f} |", flush=True)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
