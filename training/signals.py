"""Handling of Ctrl-C, SIGTERM and a closed terminal during training."""

import contextlib
import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

from tqdm import tqdm

from compute import distributed


class StopSignal:
    """Context in which SIGINT, SIGTERM or SIGHUP asks the training loop to save and stop.

    A second SIGINT or SIGTERM ends the process at once. SIGHUP, which means that the terminal was closed, is often sent
    twice; it stays ignored under nohup.
    """

    def __init__(self):
        self.own = 0  # the signal that this process has received; 0: none
        self.number = 0  # the signal that any process has received; 0: none
        self.previous: dict = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # only this thread can set signal handlers
            self.process = os.getpid()
            names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
            numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
            handled = [number for number in numbers if not is_under_nohup(number)]
            self.previous = {number: signal.signal(number, self.handle) for number in handled}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame) -> None:
        if os.getpid() != self.process:  # data loader workers inherit this handler, but end with the main process
            return
        self.own, name = number, signal.Signals(number).name
        can_repeat = name != "SIGHUP"
        signal.signal(number, signal.SIG_DFL if can_repeat else signal.SIG_IGN)
        try:
            hint = "; repeat to stop at once" if can_repeat else ""
            tqdm.write(f"{name}: saving after this step{hint}", file=sys.stderr)
        except OSError:
            discard_output_to_terminal()

    def received(self) -> bool:
        """Whether any process has received a signal. All must call it, so that all stop after the same step."""
        self.number = distributed.max_over_processes(self.own)
        return self.number > 0


def is_under_nohup(number: int) -> bool:
    return signal.Signals(number).name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN


def discard_output_to_terminal() -> None:
    """Writing to a terminal that was closed raises an OSError, which would end the training before it is saved."""
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            os.dup2(null, descriptor)
    os.close(null)


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """Processes that start in this context never receive Ctrl-C, which would end them before the checkpoint is saved.

    On Windows, which cannot block signals, only `quiet_interrupts` protects them.
    """
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # Python's helper for spawned processes; when it starts, it unblocks SIGINT
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by new processes
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
