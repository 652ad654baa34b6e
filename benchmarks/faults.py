"""Inject faults into training runs: they must survive kills, signals, damaged files, full disks and much else.

    python benchmarks/faults.py                        # all trials, about 45 minutes
    python benchmarks/faults.py --quick                # a sixth of them
    python benchmarks/faults.py --only mirror clock    # only kinds of faults with these words in their names

A tiny run (360 pairs, two epochs, a checkpoint every other step) is trained once without faults. Each trial trains it
again, injects a fault, and resumes with the same command. The final state must be bit-identical: weights, EMA,
optimizer, random number generators, progress and scores. Faults of single files and commands are tests; they are run
here as well, so that the table is complete.
"""

import argparse
import contextlib
import ctypes
import errno
import functools
import io
import itertools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from fault_runs import (
    READ_ONLY,
    ROOT,
    SPAWN,
    Bench,
    final_state,
    has_no_temporary_files,
    mount,
    newest_is_readable,
    train,
)
from tqdm import tqdm

from runs import checkpoint, files, mirror
from runs import folder as run_folder
from runs.folder import RunFolder

# ---------------------------------------------------------------------------- kills


def every_call(*_, **__) -> bool:
    return True


def writes_checkpoint(_, target: str | Path) -> bool:
    return Path(target).suffix == ".pt"


def is_checkpoint(path: Path, **_) -> bool:
    return path.suffix == ".pt" and not path.name.startswith(".")


class Point(NamedTuple):
    """A point at which a process can be killed: a function, and whether before, after, or when half of its file is
    written. `counts` tells which of its calls count."""

    owner: object
    name: str
    when: str
    counts: Callable[..., bool] = every_call


POINTS = {  # around a save
    "before the file is written": Point(torch, "save", "before"),
    "file half written": Point(torch, "save", "half"),
    "file written, no checksum": Point(checkpoint, "_seal", "before"),
    "checksum half written": Point(checkpoint, "_seal", "half"),
    "checksum written, not renamed": Point(os, "replace", "before", writes_checkpoint),
    "renamed": Point(os, "replace", "after", writes_checkpoint),
    "folder flushed": Point(files, "flush_folder", "after", lambda folder: bool(RunFolder(folder).checkpoints())),
    "saved, older checkpoints of the epoch not removed": Point(run_folder, "save_checkpoint", "after"),
    "an older checkpoint removed": Point(Path, "unlink", "after", is_checkpoint),
    "saved, not validated": Point(train, "run_validation", "before"),
    "validation loss computed": Point(train, "validation_loss", "after"),
    "validation sentences translated": Point(train, "score", "before"),
    "validated, score not written": Point(RunFolder, "write_scores", "before"),
    "score written, not pruned": Point(RunFolder, "prune", "before"),
}
MIRROR_POINTS = {
    "before a file is copied": Point(shutil, "copy2", "before"),
    "half copied": Point(shutil, "copy2", "half"),
    "copied, not verified": Point(mirror, "verify", "before"),
    "old copy moved away": Point(os, "replace", "after", lambda _, target: str(target).endswith(".old.tmp")),
    "old copy emptied, not removed": Point(os, "truncate", "after"),
}
WHILE_WRITING = list(POINTS)[1:5]  # points at which a temporary file exists


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(name: str, nth: int) -> None:
    """Makes this process kill itself when it reaches a point for the n-th time."""
    point = (POINTS | MIRROR_POINTS)[name]
    original, calls = getattr(point.owner, point.name), itertools.count(1)

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        is_nth = point.counts(*args, **kwargs) and next(calls) == nth
        if is_nth and point.when == "before":
            kill_self()
        result = original(*args, **kwargs)
        if is_nth and point.when == "half":  # half of the file that was written, or half of the digest at its end
            path = args[-1]
            size = os.path.getsize(path)
            os.truncate(path, size - 32 if point.name == "_seal" else size // 2)
        if is_nth:
            kill_self()
        return result

    setattr(point.owner, point.name, wrapper)


def kill_at_point(bench: Bench, name: str, nth: int) -> bool:
    """The run is killed when it reaches a point for the n-th time, and resumed."""
    run = bench.fresh("killed")
    status = bench.train("killed", disturb=functools.partial(die_at, name, nth))
    has_temporary_file = any(".pt." in path.name for path in run.glob(".*.tmp"))
    was_killed = status == -signal.SIGKILL and has_temporary_file == (name in WHILE_WRITING)
    return was_killed and newest_is_readable(run) and bench.train("killed") == 0 and has_expected_end(bench, run)


def kill_while_mirroring(bench: Bench, name: str, nth: int, is_lost: bool) -> bool:
    """The run is killed while it is copied to its mirror, its folder is lost or not, and it is resumed."""
    run, copy = bench.fresh("mirrored"), bench.fresh("mirror")
    flags = "--mirror-dir", str(copy)
    status = bench.train("mirrored", *flags, disturb=functools.partial(die_at, name, nth))
    if is_lost:
        shutil.rmtree(run)
    good = status == -signal.SIGKILL and bench.train("mirrored", *flags) == 0
    return good and has_expected_end(bench, run) and has_expected_end(bench, copy)


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


def clock_set_back(bench: Bench, rng: random.Random, seconds: float) -> bool:
    """The run is killed, and resumed when the clock shows the day before: its files are from the future."""
    run, copy = bench.fresh("clock"), bench.fresh("clock mirror")
    flags = "--mirror-dir", str(copy)
    process = bench.start("clock", *flags)
    process.join(rng.uniform(seconds / 2, seconds))
    process.kill()
    process.join()
    tomorrow = time.time() + 86_400
    for path in (*run.rglob("*"), *copy.rglob("*")):
        os.utime(path, (tomorrow, tomorrow))
    return bench.train("clock", *flags) == 0 and has_expected_end(bench, run) and has_expected_end(bench, copy)


def folder_removed(bench: Bench, has_mirror: bool) -> bool:
    """The run's folder is removed while it trains: one line; the same command starts again, from the mirror if any."""
    run, copy, started = bench.fresh("removed"), bench.fresh("removed mirror"), SPAWN.Event()
    flags = ("--mirror-dir", str(copy)) if has_mirror else ()
    process = bench.start("removed", *flags, started=started)
    if not started.wait(120):
        process.kill()
        return False
    while not RunFolder(copy if has_mirror else run).checkpoints():
        time.sleep(0.01)
    while run.exists():  # the process may just be writing a file
        shutil.rmtree(run, ignore_errors=True)
    process.join()
    good = process.exitcode == 2 and has_one_error(bench, "removed")
    return good and bench.train("removed", *flags) == 0 and has_expected_end(bench, run)


def has_expected_end(bench: Bench, run: Path) -> bool:
    """Whether the final state is that of the run without faults and no temporary file is left."""
    return final_state(run) == bench.expected and has_no_temporary_files(run)


# ---------------------------------------------------------------------------- signals


def stopped_by_signal(bench: Bench, number: int, rng: random.Random, seconds: float) -> bool:
    """A signal at a random time after the first step began: the run saves, exits with 128 + number, and resumes."""
    for _ in range(20):
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
    (bench.folder / f"{run.name}.log").unlink()
    status = bench.train(run.name, disturb=disturb)
    unchanged = all(path.is_file() and path.read_bytes() == content for path, content in before.items())
    return status == 2 and has_one_error(bench, run.name) and unchanged and has_no_temporary_files(run)


def has_one_error(bench: Bench, run: str) -> bool:
    """Whether train.py has printed one error line, and no traceback."""
    log = bench.log(run)
    return log.count("\nerror: ") + log.startswith("error: ") == 1 and "Traceback" not in log


def set_variable(name: str, value: str) -> None:
    os.environ[name] = value
    tempfile.tempdir = None  # TMPDIR is read again


def full_cache(bench: Bench, variable: str) -> bool:
    """With a full disk under HF_HOME or TMPDIR, training ends with a line that names it, or does not need it."""
    run, copy = bench.fresh("cache"), bench.fresh("cache mirror")
    cache = bench.fresh("full cache")
    cache.mkdir()
    flags = "--mirror-dir", str(copy)  # which uses the temporary folder
    if not mount(cache, 8 * 4096):
        return False
    try:
        status = bench.train("cache", *flags, disturb=functools.partial(set_variable, variable, str(cache)))
    finally:
        ctypes.CDLL(None).umount(bytes(cache))
    told = status == 0 or (status == 2 and has_one_error(bench, "cache") and variable in bench.log("cache"))
    return told and bench.train("cache", *flags) == 0 and has_expected_end(bench, run)


# ---------------------------------------------------------------------------- permissions and I/O errors


def obey_permissions() -> None:
    """Drops all capabilities of this process: without them, permissions hold for root as well."""
    version_3, this_process = 0x20080522, 0
    header, nothing = (ctypes.c_uint32 * 2)(version_3, this_process), (ctypes.c_uint32 * 6)()
    capset = 126 if os.uname().machine == "x86_64" else 91
    if os.geteuid() == 0 and ctypes.CDLL(None).syscall(capset, header, nothing):
        raise OSError("cannot drop the capabilities")


def without_permission(bench: Bench, what: str, mode: int) -> bool:
    """A file or folder that may not be read or written is one error line and changes nothing; then the run resumes.

    Training may also do without it: the corpus is in the cache, and the config is written again.
    """
    run = bench.fresh("forbidden")
    status = bench.train("forbidden", "--num-epochs", "1")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    path = {"corpus": bench.folder / "pairs.tsv", "checkpoint": RunFolder(run).checkpoints()[-1]}.get(what, run / what)
    previous = path.stat().st_mode
    path.chmod(mode)
    try:
        if bench.train("forbidden", disturb=obey_permissions) == 0:
            return what in ("corpus", "config.json") and has_expected_end(bench, run)
    finally:
        path.chmod(previous)
    told = has_one_error(bench, "forbidden") and has_no_temporary_files(run)
    unchanged = all(path.read_bytes() == content for path, content in before.items())
    return status == 0 and told and unchanged and bench.train("forbidden") == 0 and has_expected_end(bench, run)


def read_only_file_system(bench: Bench) -> bool:
    run = bench.fresh("read only")
    status = bench.train("read only", "--num-epochs", "1")
    kept = run.rename(bench.fresh("kept"))
    run.mkdir()
    if not mount(run, 1 << 28):
        return False
    try:
        shutil.copytree(kept, run, dirs_exist_ok=True)
        mount(run, 1 << 28, READ_ONLY)
        good = fails_cleanly(bench, run, {path: path.read_bytes() for path in RunFolder(run).checkpoints()})
    finally:
        ctypes.CDLL(None).umount(bytes(run))
    run.rmdir()
    kept.rename(run)
    return status == 0 and good and bench.train("read only") == 0 and has_expected_end(bench, run)


WRITERS = {"checkpoint": (torch, "save", 2), "flush": (os, "fsync", 9), "rename": (os, "replace", 9)}


def fail_at(writer: str, number: int) -> None:
    """Makes the n-th call of a function raise an OSError, as a failing disk or a lost network share does."""
    owner, name, nth = WRITERS[writer]
    original, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        if next(calls) == nth:
            raise OSError(number, os.strerror(number))
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


def io_error(bench: Bench, writer: str, number: int) -> bool:
    """An I/O error while a file is written is one error line; then the run resumes."""
    run = bench.fresh("failing")
    status = bench.train("failing", disturb=functools.partial(fail_at, writer, number))
    told = status == 2 and has_one_error(bench, "failing") and has_no_temporary_files(run)
    return told and newest_is_readable(run) and bench.train("failing") == 0 and has_expected_end(bench, run)


# ---------------------------------------------------------------------------- faults that are tests

TESTS = {
    "two processes, one mirror or run": "test_mirror.py test_attack.py test_train.py -k 'test_02 or mirror or lock'",
    "losses or weights not finite": "test_attack.py test_train.py -k 'test_03 or not_finite or nonfinite'",
    "bad input, training from scratch": "test_attack.py -k 'test_04 or test_06'",
    "config and checkpoint disagree": "test_attack.py -k test_10",
    "sealed, but wrong content": "test_attack.py -k 'test_09 or test_30'",
    "corpus or validation set changed": "test_attack.py -k test_11",
    "special files and links": "test_attack.py -k test_21",
    "consoles, closed output": "test_commands.py -k 'console or utf8 or closed or closes or narrow'",
    "hostile text in pages": "test_page.py test_interpret.py test_widgets.py -k 'script or becomes_part or plain_text'",
    "memory of the CPU": "test_attack.py test_commands.py -k 'test_19 or test_22 or files_and_of_the_machine'",
    "export or conversion killed": "test_attack.py test_export.py -k 'test_13 or test_33 or flipped or test_34'",
    "huge lines and numbers": "test_attack.py -k 'test_18 or test_32 or test_15'",
    "JSON of another shape": "test_attack.py -k test_29",
}


def run_tests(selection: str) -> tuple[int, int]:
    """How many of the selected tests pass, and how many there are."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "", "-rN", "-v"]
    words = re.findall(r"'[^']*'|\S+", selection)
    command += [str(ROOT / "tests" / word) if word.endswith(".py") else word.strip("'") for word in words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    return counts.get("passed", 0), sum(counts.values())


# ---------------------------------------------------------------------------- trials


# All regularizers, several batches per step, data loader workers, and early stopping
COMBINATION = {
    "tokenizer": "bpe", "vocab-size": 300, "bpe-dropout": 0.1, "rdrop-alpha": 1.0, "accumulation-steps": 2,
    "num-workers": 2, "patience": 3,
}  # fmt: skip


def plan(bench: Bench, share: float, seed: int = 0) -> list[tuple[str, list[Callable[[], bool]]]]:
    """The trials for each kind of fault: a fraction `share` of the full number."""
    rng = random.Random(seed)
    start = time.perf_counter()
    bench.fresh("timed")
    bench.train("timed")
    seconds = time.perf_counter() - start

    def trials(full: int) -> range:
        return range(max(1, round(share * full)))

    def some(everything: Iterable) -> list:
        everything = list(everything)
        return rng.sample(everything, len(trials(len(everything))))

    points = some(itertools.product(POINTS, (1, 2)))
    mirror_points = some(itertools.product(MIRROR_POINTS, (1, 3, 6), (False, True)))
    signals = [(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[i % 3] for i in trials(42)]
    space = (0.02, 0.3, 0.6, 0.9, 0.99)[: len(trials(5))]
    failures = some(itertools.product(WRITERS, (errno.EIO, errno.ESTALE, errno.EDQUOT)))
    forbidden = ("corpus", 0), ("checkpoint", 0), ("config.json", 0), ("scores.jsonl", 0), ("", 0o500)
    combined = Bench.prepare(bench.folder / "combined", **COMBINATION)

    def trial(function: Callable[..., bool], *arguments, of: Bench = bench) -> Callable[[], bool]:
        return functools.partial(function, of, *arguments)

    return [
        ("SIGKILL around a save", [trial(kill_at_point, *point) for point in points]),
        ("SIGKILL at a random time", [trial(kill_at_random, rng, seconds) for _ in trials(100)]),
        ("SIGKILL, all options", [trial(kill_at_random, rng, 3 * seconds, of=combined) for _ in trials(30)]),
        ("SIGKILL while mirroring", [trial(kill_while_mirroring, *point) for point in mirror_points]),
        ("SIGINT, SIGTERM, SIGHUP", [trial(stopped_by_signal, number, rng, seconds / 2) for number in signals]),
        ("clock set back", [trial(clock_set_back, rng, seconds) for _ in trials(10)]),
        ("folder removed", [trial(folder_removed, has_mirror) for has_mirror in (False, True)]),
        (
            "checkpoint truncated",
            [lambda: damage_newest(bench, lambda b: b[: rng.randrange(1, len(b))]) for _ in trials(50)],
        ),
        ("one bit flipped", [lambda: damage_newest(bench, functools.partial(flip, rng)) for _ in trials(300)]),
        ("checkpoint emptied", [lambda: damage_newest(bench, lambda _: b"")]),
        ("replaced by an older one", [trial(replace_newest)]),
        ("disk full", [trial(disk_full, fraction) for fraction in space]),
        ("cache or TMPDIR full", [trial(full_cache, variable) for variable in ("HF_HOME", "TMPDIR")]),
        ("read-only file system", [trial(read_only_file_system)]),
        ("no permission", [trial(without_permission, *path_and_mode) for path_and_mode in forbidden]),
        ("I/O error", [trial(io_error, *failure) for failure in failures]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a sixth of the trials only")
    parser.add_argument("--only", nargs="+", default=[""], help="only kinds of faults whose names contain one of these")
    arguments = parser.parse_args()

    def report(name: str, count: Callable[[], tuple[int, int]]) -> bool:
        if not any(word in name for word in arguments.only):
            return True
        start = time.perf_counter()
        survived, trials = count()
        print(f"| {name:<32} | {survived:>8} | {trials:>6} | {time.perf_counter() - start:>7.0f} |", flush=True)
        return survived == trials > 0

    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        bench = Bench.prepare(Path(folder))
        print(f"| {'fault':<32} | survived | trials | seconds |\n|{'-' * 34}|----------|--------|---------|")
        good = True
        for name, trials in plan(bench, 1 / 6 if arguments.quick else 1):
            bar = tqdm(trials, desc=name, leave=False)
            good &= report(name, lambda bar=bar: (sum(trial() for trial in bar), len(bar)))
        for name, selection in TESTS.items():
            good &= report(name, functools.partial(run_tests, selection))
    sys.exit(not good)


if __name__ == "__main__":
    main()
