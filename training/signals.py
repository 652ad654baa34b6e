"""Handling of Ctrl-C and SIGTERM during training."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

from tqdm import tqdm

from compute import distributed


class StopSignal:
    """Context in which SIGINT or SIGTERM asks the training loop to save and stop; a second one ends the process."""

    def __init__(self):
        self.own = 0  # the signal that this process has received; 0: none
        self.number = 0  # the signal that any process has received; 0: none
        self.previous: dict = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # only this thread can set signal handlers
            self.process = os.getpid()
            self.previous = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame) -> None:
        if os.getpid() != self.process:  # data loader workers inherit this handler, but end with the main process
            return
        self.own = number
        signal.signal(number, signal.SIG_DFL)
        tqdm.write(f"{signal.Signals(number).name}: saving after this step; repeat to stop at once", file=sys.stderr)

    def received(self) -> bool:
        """Whether any process has received a signal. All must call it, so that all stop after the same step."""
        self.number = distributed.max_over_processes(self.own)
        return self.number > 0


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
