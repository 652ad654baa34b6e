"""Sharing the cores with other processes, without a change of the number of threads."""

import atexit
import contextlib
import functools
import math
import os
import sys
import threading
import time
from pathlib import Path

import torch

PERIOD = 1.0  # seconds between two measurements of `waiting_time`
# Seconds per second that the threads wait for a core, from which the machine counts as busy or as quiet again. Measured
# on two cores: 0.9 to 1.0 beside one busy process, 0.2 to 0.6 with spare teams, less than 0.1 alone.
BUSY, QUIET = 0.3, 0.1
QUIET_PERIODS = 5  # consecutive quiet periods after which the spare teams end


@functools.cache  # once per process
def share_cores() -> None:
    """Starts a background thread that stops OpenMP's threads from spinning while other processes need the cores.

    A thread that waits for the other threads of a parallel loop first spins, 300,000 times by default. Alone this is
    fastest: a training step has over a thousand parallel loops, and threads that sleep have to be woken. Beside another
    busy process, two of the threads may share a core. Each then spins until the scheduler interrupts it, while the one
    that it waits for cannot run: with two cores, training fell to 0.25 of its speed, and with spare teams to 0.58
    (benchmarks/README.md).

    GOMP_SPINCOUNT is read only when PyTorch is loaded. But while there are more OpenMP threads than cores, libgomp
    spins only 100 times (manual of GNU libgomp, GOMP_SPINCOUNT). While the machine is busy, this function therefore
    keeps spare teams of sleeping threads. Computations use as many threads as before, and results stay bit-identical.

    No effect except on Linux, with one thread, or if GOMP_SPINCOUNT or OMP_WAIT_POLICY is set in the environment.
    """
    is_set = "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ
    if sys.platform != "linux" or torch.get_num_threads() == 1 or is_set:
        return
    stop = threading.Event()
    thread = threading.Thread(target=adapt, args=(stop,), daemon=True)
    thread.start()
    atexit.register(lambda: (stop.set(), thread.join()))  # no thread may be inside PyTorch when the interpreter ends


def adapt(stop: threading.Event) -> None:
    """Until `stop` is set: starts spare teams when the machine is busy, and ends them when it is quiet again."""
    teams: SpareTeams | None = None
    before, start, quiet = waiting_time(), time.perf_counter(), 0
    while not stop.wait(PERIOD):
        after, end = waiting_time(), time.perf_counter()
        share = (after - before) / (end - start)
        before, start = after, end
        quiet = quiet + 1 if share < QUIET else 0
        if teams is None and share > BUSY:
            teams = SpareTeams()
        elif teams and quiet >= QUIET_PERIODS:
            teams.end()
            teams = None
    if teams:
        teams.end()


def waiting_time() -> float:
    """Seconds that the threads of this process have been ready to run but waited for a core."""
    nanoseconds = 0
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # the thread has ended, or the kernel does not count
            nanoseconds += int(Path(f"/proc/self/task/{thread}/schedstat").read_text(encoding="utf8").split()[1])
    return nanoseconds / 1e9


class SpareTeams:
    """As many teams of sleeping OpenMP threads as it takes to have more threads than cores.

    libgomp keeps one team for each Python thread that has run a parallel loop, until that thread ends.
    """

    def __init__(self):
        self.ending = threading.Event()
        threads = torch.get_num_threads()
        missing = len(os.sched_getaffinity(0)) + 1 - threads
        count = math.ceil(missing / max(1, threads - 1))  # libgomp does not count the first thread of another team
        self.holders = [threading.Thread(target=self.hold_team, args=(threads,), daemon=True) for _ in range(count)]
        for holder in self.holders:
            holder.start()

    def hold_team(self, threads: int) -> None:
        torch.ones(threads << 16, device="cpu")  # a parallel loop, large enough for all threads
        self.ending.wait()

    def end(self) -> None:
        self.ending.set()
        for holder in self.holders:
            holder.join()
