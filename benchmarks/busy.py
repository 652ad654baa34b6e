"""Measure training and decoding alone and beside a busy process, for several settings of OpenMP.

    python benchmarks/busy.py --data FOLDER/train.lc.norm.tok   # aligned text, .en and .de
    python benchmarks/busy.py                                   # synthetic text for the Multi30k model

Each setting runs in its own process, because OpenMP reads the environment when it is loaded. In each round every
process runs in turn, first alone and then beside a process that is always busy. Prints target tokens per second
(medians over the rounds), and the medians of the ratios to PyTorch's default, alone, in the same round.

The machine must be idle otherwise. As root, `chrt -r 1 python benchmarks/busy.py` keeps other processes off the cores.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers import SIZES, ModelSize, ThisProject, count_tokens
from workload import describe_machine, markdown_table, timing_parser, training_batches

from compute.threads import share_cores
from config import get_config
from dataset import PAD, Batches, get_ds

CPU = torch.device("cpu")
TASKS = ("multi30k training", "toy training", "multi30k greedy")
MULTI30K, TOY = (SIZES["tiny"], 10_000), (ModelSize(d_model=128, layers=2, heads=8, d_ff=256), 600)
DEFAULT, SHARED = "PyTorch's default", "share_cores"
SETTINGS = {
    DEFAULT: {},
    SHARED: {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
BATCHES = 40
UNMEASURED = 3.0  # seconds at the start of each measurement, in which share_cores adapts


# ---------------------------------------------------------------------------- the measured process


def work(task: str, setting: str, batches_file: str) -> None:
    """Runs the task for as many seconds as each line of stdin says, and prints target tokens per second."""
    run_batch, batches = prepare(task, torch.load(batches_file))
    if setting == SHARED:
        share_cores()
    stream = cycle(batches)
    run_for(UNMEASURED, run_batch, stream)
    print("ready", flush=True)
    for line in sys.stdin:
        run_for(UNMEASURED, run_batch, stream)
        print(run_for(float(line), run_batch, stream), flush=True)


def prepare(task: str, batches: list[dict]) -> tuple[Callable[[dict], object], list[dict]]:
    """A function that trains on a batch or translates it, and the batches."""
    project = ThisProject(*(TOY if task.startswith("toy") else MULTI30K), CPU)
    if task.endswith("training"):
        return project.step, batches
    project.prepare_for_decoding()

    @torch.inference_mode()
    def translate(batch: dict) -> None:
        lengths = (batch["label"] != PAD).sum(1) - 1
        project.decode(batch["encoder_input"], lengths, beam_size=1)

    return translate, batches


def run_for(seconds: float, run_batch: Callable[[dict], object], batches) -> float:
    """Target tokens per second."""
    tokens, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        batch = next(batches)
        run_batch(batch)
        tokens += count_tokens([batch])[1]
    return tokens / (time.perf_counter() - start)


# ---------------------------------------------------------------------------- the measurement


def compare(task: str, settings: list[str], batches: list[dict], rounds: int, seconds: float) -> str:
    """The table of all settings."""
    with tempfile.NamedTemporaryFile() as file:
        torch.save(batches, file.name)
        workers = {setting: start_worker(task, setting, file.name) for setting in settings}
    speeds = {(setting, is_busy): [] for setting in settings for is_busy in (False, True)}
    try:
        for _ in range(rounds):
            for is_busy in (False, True):
                for setting in settings:
                    speeds[setting, is_busy].append(measure(workers[setting], seconds, is_busy))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    rows = []
    for setting in settings:
        row = [setting]
        for is_busy in (False, True):
            values = speeds[setting, is_busy]
            ratios = [value / alone for value, alone in zip(values, speeds[settings[0], False], strict=True)]
            row += [f"{statistics.median(values):,.0f}", f"{statistics.median(ratios):.2f}"]
        rows.append(row)
    return markdown_table(rows, ["", "alone", "ratio", "beside a busy process", "ratio"])


def start_worker(task: str, setting: str, batches_file: str) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    worker = subprocess.Popen(
        [sys.executable, __file__, "--work", task, setting, batches_file],
        env={**environment, **SETTINGS[setting]},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    worker.stdout.readline()
    return worker


def measure(worker: subprocess.Popen, seconds: float, is_busy: bool) -> float:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if is_busy else None
    worker.stdin.write(f"{seconds}\n")
    worker.stdin.flush()
    speed = float(worker.stdout.readline())
    if busy:
        busy.kill()
        busy.wait()
    return speed


def batches_of(task: str, data: str) -> list[dict]:
    if not task.startswith("toy"):
        return training_batches(data, vocab_size=MULTI30K[1], batch_tokens=2_048, count=BATCHES)
    with tempfile.TemporaryDirectory() as folder:
        config = get_config("toy", run_dir=folder)
        pairs = get_ds(config)[0]
        return [pairs[positions] for positions in islice(Batches(pairs, config, epoch=0), BATCHES)]


def main() -> None:
    parser = timing_parser(__doc__, rounds=5)
    parser.add_argument("--data", default="", help="prefix of two aligned files; empty: synthetic text")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="what to measure")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="what to compare")
    parser.add_argument("--seconds", type=float, default=5, help="seconds per measurement (default: %(default)s)")
    parser.add_argument("--work", nargs=3, help="used internally: run as the measured process")
    arguments = parser.parse_args()
    if arguments.work:
        work(*arguments.work)
        return
    print(describe_machine(CPU))
    for task in arguments.tasks:
        print(f"\n{task}\n")
        batches = batches_of(task, arguments.data)
        print(compare(task, arguments.settings, batches, arguments.rounds, arguments.seconds), flush=True)


if __name__ == "__main__":
    main()
