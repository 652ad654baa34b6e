"""Two nodes on one machine: torchrun on 127.0.0.1, with processes that are killed or hang and nodes that come and go.

    python benchmarks/cluster.py                          # all trials, about an hour on two cores
    python benchmarks/cluster.py --quick                  # one of each kind
    python benchmarks/cluster.py --only "slow" --jobs 3   # kinds with this in their name, three trials at a time

A tiny run (360 pairs, two epochs, a checkpoint every other step, two processes on gloo) is trained once without faults.
The final state of each trial must be bit-identical, except where the number of processes changes.
"""

import argparse
import contextlib
import functools
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LIMIT = 600  # seconds of a trial
ELASTIC = ("--rdzv-conf", "last_call_timeout=2,keep_alive_interval=1")  # torchrun notices a lost machine sooner


# ---------------------------------------------------------------------------- the training process


def run_worker() -> None:
    """train.py with the fault in the environment: FAULT="<rank> <point> <signal> <marker>". It happens once."""
    import train
    from compute import distributed
    from config import run_command
    from dataset import BilingualDataset
    from runs import folder as run_folder

    owners = {
        "join": distributed,
        "prepare": BilingualDataset,
        "step": train,
        "save": os,
        "validate": train,
        "mark": run_folder.RunFolder,
        "wait": train,
    }
    names = {
        "join": "joined",
        "prepare": "__init__",
        "step": "train_step",
        "save": "replace",
        "validate": "run_validation",
        "mark": "wait_for_mark",
        "wait": "out_of_patience",
    }
    rank, point, number, nth, marker = os.environ.get("FAULT", "-1 step 9 1 -").split()
    if int(rank) == distributed.rank() and not Path(marker).exists():
        inject(owners[point], names[point], int(number), int(nth), Path(marker))
    if pause := float(os.environ.get("PAUSE", 0)):
        step = train.train_step
        train.train_step = lambda *args: (time.sleep(pause), step(*args))[1]
    run_folder.MAX_DELAY = float(os.environ.get("MAX_DELAY", run_folder.MAX_DELAY))
    run_command(train.main)


def inject(owner, name: str, number: int, nth: int, marker: Path) -> None:
    """Makes this process send itself a signal when it calls a function for the n-th time."""
    original, calls = getattr(owner, name), iter(range(1, 1_000_000))

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        is_counted = name != "replace" or str(args[1]).endswith(".pt")
        if is_counted and next(calls) == nth:
            marker.touch()
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


if __name__ == "__main__" and "FAULT" in os.environ:
    run_worker()
    sys.exit()

# ---------------------------------------------------------------------------- two nodes

from fault_runs import FLAGS, SPAWN, final_state  # noqa: E402
from tqdm import tqdm  # noqa: E402

from corpora.toy import toy_pairs  # noqa: E402
from runs.checkpoint import load_checkpoint  # noqa: E402
from runs.folder import RunFolder  # noqa: E402

SPAWN.set_forkserver_preload(["train", "torch.distributed.run"])


def run_node(arguments: list[str], log: Path, environment: dict[str, str], niceness: int) -> None:
    """Runs in a new process: torchrun with these arguments."""
    from torch.distributed.run import main

    with log.open("a", encoding="utf8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment
    os.nice(niceness)
    main(arguments)


def processes_of(trial: str) -> dict[int, int]:
    """The training processes of a trial: rank and process id."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (process / "environ").read_bytes().split(b"\0")
            if f"TORCHELASTIC_RUN_ID={trial}".encode() in variables:
                found |= {int(v.removeprefix(b"RANK=")): int(process.name) for v in variables if v.startswith(b"RANK=")}
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class Trial:
    """One run on two nodes with one process each, or on one node with two."""

    bench: "Bench"
    name: str
    form: str = "c10d"  # or static
    nodes: str = "2"
    restarts: int = 0
    fault: str = "-1 step 9 1"
    environment: dict = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    running: dict = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.bench.folder / self.name

    def log(self, node: int) -> str:
        return (self.bench.folder / f"{self.name}.{node}.log").read_text(encoding="utf8")

    def start(self, node: int, *flags: str, niceness: int = 0, run: Path | None = None) -> None:
        static = ["--master-addr", "127.0.0.1", "--master-port", str(self.port), "--node-rank", str(node)]
        c10d = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{self.port}", *ELASTIC]
        processes = "2" if self.nodes == "1" else "1"
        torchrun = ["--nnodes", self.nodes, "--nproc-per-node", processes, "--rdzv-id", self.name]
        torchrun += [*(c10d if self.form == "c10d" else static), "--max-restarts", str(self.restarts), __file__]
        values = {**FLAGS, "datasource": self.bench.folder / "pairs.tsv", "run-dir": run or self.run}
        flags = [*(word for name, value in values.items() for word in (f"--{name}", str(value))), *flags]
        environment = {"OMP_NUM_THREADS": "1", "HF_HOME": str(self.bench.folder / "cache"), **self.environment}
        environment["FAULT"] = f"{self.fault} {self.run}.fault"
        log = self.bench.folder / f"{self.name}.{node}.log"
        self.running[node] = SPAWN.Process(target=run_node, args=([*torchrun, *flags], log, environment, niceness))
        self.running[node].start()

    def end(self) -> list[int]:
        """Waits for the end; returns the exit statuses, -9 for a node that did not end."""
        deadline = time.monotonic() + LIMIT
        for process in self.running.values():
            process.join(max(0, deadline - time.monotonic()))
            if process.exitcode is None:
                self.kill()
        return [process.exitcode for process in self.running.values()]

    def kill(self) -> None:
        for process in self.running.values():
            process.kill()
        for pid in processes_of(self.name).values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def has_expected_end(self) -> bool:
        logs = "".join(self.log(node) for node in self.running)
        return "terminate called" not in logs and final_state(self.run) == self.bench.expected

    def wait_for_checkpoint(self) -> None:
        deadline = time.monotonic() + LIMIT
        while not RunFolder(self.run).checkpoints() and time.monotonic() < deadline:
            time.sleep(0.5)


@dataclass
class Bench:
    """A working folder with the corpus, and the final state of a run without faults."""

    folder: Path
    expected: str = ""
    loss: float = 0.0
    count: int = 0

    def __post_init__(self):
        pairs = toy_pairs("en", "it", "train")[:400]
        text = "".join(f"{pair.src_text}\t{pair.tgt_text}\n" for pair in pairs)
        (self.folder / "pairs.tsv").write_text(text, encoding="utf8")
        whole = self.trial(nodes="1")
        whole.start(0)
        if whole.end() != [0]:
            sys.exit(whole.log(0))
        self.expected, self.loss = final_state(whole.run), RunFolder(whole.run).read_scores()[-1]["loss"]

    def trial(self, **options) -> Trial:
        self.count += 1
        return Trial(self, f"trial{self.count}_{os.getpid()}", **options)


# ---------------------------------------------------------------------------- kinds of trials


def clean_end(bench: Bench, form: str) -> bool:
    """Both nodes end with status 0 and the expected state."""
    trial = bench.trial(form=form)
    for node in (0, 1):
        trial.start(node)
    return trial.end() == [0, 0] and trial.has_expected_end()


def slow_node(bench: Bench, form: str) -> bool:
    """The same, with one node at a lower priority that is stopped for half of the time."""
    trial = bench.trial(form=form)
    trial.start(0)
    trial.start(1, niceness=5)
    ended = threading.Event()

    def stop_and_continue() -> None:
        while not ended.wait(1.5):
            if pid := processes_of(trial.name).get(1):
                for number in (signal.SIGSTOP, signal.SIGCONT):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                    time.sleep(1.5 * (number == signal.SIGSTOP))

    thread = threading.Thread(target=stop_and_continue)
    thread.start()
    statuses = trial.end()
    ended.set()
    thread.join()
    return statuses == [0, 0] and trial.has_expected_end()


def killed(bench: Bench, fault: str, form: str, nodes: str) -> bool:
    """A process is killed once, and torchrun restarts all."""
    cache = tempfile.mkdtemp(dir=bench.folder)  # nothing is prepared yet
    trial = bench.trial(form=form, nodes=nodes, restarts=3, fault=fault, environment={"HF_HOME": cache})
    for node in range(int(nodes)):
        trial.start(node)
    statuses = trial.end()
    shutil.rmtree(cache)
    return set(statuses) == {0} and Path(f"{trial.run}.fault").exists() and trial.has_expected_end()


def hung(bench: Bench, rank: int, form: str, nodes: str) -> bool:
    """A process is stopped for good: the other one names it, and torchrun restarts both."""
    trial = bench.trial(form=form, nodes=nodes, restarts=3, fault=f"{rank} step {int(signal.SIGSTOP)} 3")
    for node in range(int(nodes)):
        trial.start(node, "--ddp-timeout", "10")
    statuses = trial.end()
    named = any(f"error: process {rank} (" in trial.log(node) for node in trial.running)
    return set(statuses) == {0} and named and trial.has_expected_end()


def fewer(bench: Bench) -> bool:
    """A node is lost: the other one continues with as many batches per step."""
    trial = bench.trial(nodes="1:2", restarts=3, environment={"PAUSE": "0.5"})
    for node in (0, 1):
        trial.start(node)
    trial.wait_for_checkpoint()
    trial.running[1].kill()
    os.kill(processes_of(trial.name)[1], signal.SIGKILL)
    return trial.end() == [0, -signal.SIGKILL] and continued(trial, "2 before, 1 now")


def more(bench: Bench) -> bool:
    """A node joins: both share the batches of a step."""
    # Without this variable, torchrun of PyTorch 2.13 publishes its store's address once, and a late node cannot join.
    environment = {"PAUSE": "3", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    trial = bench.trial(nodes="1:2", restarts=3, environment=environment)
    trial.start(0, "--accumulation-steps", "2")
    trial.wait_for_checkpoint()
    trial.start(1, "--accumulation-steps", "2")
    return trial.end() == [0, 0] and continued(trial, "1 before, 2 now")


def continued(trial: Trial, line: str) -> bool:
    """Whether the run ended after as many steps, and with nearly the loss of the run without faults."""
    scores = RunFolder(trial.run).read_scores()
    state = load_checkpoint(RunFolder(trial.run).checkpoints()[-1])
    is_close = abs(scores[-1]["loss"] - trial.bench.loss) < 0.2
    return (
        f"processes    {line}" in "".join(map(trial.log, trial.running)) and is_close and state["batches_per_step"] == 2
    )


def late_folder(bench: Bench) -> bool:
    """The run folder appears on the second node some seconds after the first has created it."""
    trial = bench.trial()
    view = bench.folder / f"{trial.name}.view"
    trial.start(0)
    trial.start(1, run=view)
    while not (trial.run / ".trainer").exists() and trial.running[0].exitcode is None:
        time.sleep(0.2)
    time.sleep(5)
    view.symlink_to(trial.run)
    return trial.end() == [0, 0] and trial.has_expected_end()


def missing_folder(bench: Bench) -> bool:
    """The second node does not have it: one line says so, and both end."""
    trial = bench.trial(environment={"MAX_DELAY": "5"})
    trial.start(0)
    trial.start(1, run=bench.folder / "elsewhere")
    statuses = trial.end()
    return all(s == 1 for s in statuses) and trial.log(1).count("error: process 1 on ") == 1


# A process is killed at the n-th call of a function: rank, point, signal, n.
KILLS = {
    "in a step": ["0 step 9 3", "1 step 9 6"],
    "in a save": ["0 save 9 2", "1 step 9 4"],  # another process has just sent its part of the state
    "in validation": ["0 validate 9 1", "1 wait 9 2"],
    "in the first preparation": ["0 prepare 9 2", "1 mark 9 1"],
    "while joining": ["0 join 9 1", "1 join 9 1"],
}


def plan(quick: bool) -> Iterator[tuple[str, list[Callable[[Bench], bool]]]]:
    forms = (("c10d", "2"), ("static", "2"), ("c10d", "1"))
    clean, slow = (1, 1) if quick else (20, 5)
    for form in ("c10d", "static"):
        yield f"two nodes, {form}", [functools.partial(clean_end, form=form)] * clean
        yield f"two nodes, one slow, {form}", [functools.partial(slow_node, form=form)] * slow
    for place, faults in KILLS.items():
        trials = [functools.partial(killed, fault=fault, form=f, nodes=n) for fault in faults for f, n in forms]
        yield f"SIGKILL {place}", trials[:1] if quick else trials
    stops = [functools.partial(hung, rank=rank, form="c10d", nodes=nodes) for rank in (0, 1) for nodes in ("1", "2")]
    yield "a process hangs", stops[:1] if quick else stops
    yield "two nodes become one", [fewer] * (1 if quick else 3)
    yield "one node becomes two", [more] * (1 if quick else 3)
    yield "run folder appears late", [late_folder] * (1 if quick else 3)
    yield "run folder is missing", [missing_folder]


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Context with processes beside that are always busy."""
    processes = [SPAWN.Process(target=spin, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    yield
    for process in processes:
        process.kill()


def spin() -> None:
    while True:
        random.random()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one trial of each kind")
    parser.add_argument("--only", default="", help="only kinds whose name matches this regular expression")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    parser.add_argument("--folder", help="an existing folder for runs and logs, which are kept")
    parser.add_argument("--busy", type=int, default=os.cpu_count(), help="busy processes beside")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as resources:
        folder = arguments.folder or resources.enter_context(tempfile.TemporaryDirectory(prefix="cluster_"))
        resources.enter_context(busy_processes(arguments.busy))
        bench, failures = Bench(Path(folder)), 0
        print(f"| {'trial':<32} | good | trials | seconds |\n|{'-' * 34}|------|--------|---------|", flush=True)
        for name, trials in plan(arguments.quick):
            if not re.search(arguments.only, name):
                continue
            start = time.perf_counter()
            with ThreadPoolExecutor(arguments.jobs) as pool:
                results = pool.map(lambda trial: trial(bench), trials)
                good = sum(tqdm(results, total=len(trials), desc=name, leave=False))
            failures += len(trials) - good
            seconds = time.perf_counter() - start
            print(f"| {name:<32} | {good:>4} | {len(trials):>6} | {seconds:>7.0f} |", flush=True)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
