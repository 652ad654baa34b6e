"""Heartbeats of the processes of a distributed run: a process that hangs is noticed and named."""

import os
import socket
import sys
import threading
import time

import torch.distributed as dist


class Heartbeat:
    """A thread through which the processes tell each other that they are alive.

    If another process is silent for `seconds`, because it was stopped or its machine or network is down, this one names
    it and ends. It ends without cleaning up: its main thread waits for the other one and cannot be interrupted.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, seconds: float):
        self.store, self.seconds, self.ending = store, seconds, threading.Event()
        self.keys = [f"heartbeat/{other}" for other in range(world_size)]
        self.key, self.name = self.keys[rank], f"process {rank} ({socket.gethostname()}, process id {os.getpid()})"
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.beat(0)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self.ending.set()
        if self.thread.is_alive():
            self.thread.join()

    def beat(self, count: int) -> None:
        self.store.set(self.key, f"{count} {self.name}")

    def run(self) -> None:
        """Writes a heartbeat ten times in `seconds` and reads those of the others."""
        seen, count, last = {}, 0, time.monotonic()
        while not self.ending.wait(self.seconds / 10):
            try:
                self.beat(count := count + 1)
                beats = self.store.multi_get(self.keys)
            except RuntimeError:
                return self.end("the connection to the first machine is lost")
            now = time.monotonic()
            was_stopped = now - last > self.seconds / 2
            seen = {beat: now if was_stopped else seen.get(beat, now) for beat in beats}
            last = now
            if silent := [beat.decode().partition(" ")[2] for beat in beats if now - seen[beat] > self.seconds]:
                self.end(f"{', '.join(silent)} has not responded for {self.seconds:g} s (--ddp-timeout)")

    def end(self, reason: str) -> None:
        """Ends this process, unless it is leaving."""
        if not self.ending.is_set():
            print(f"error: {reason}; the same command resumes from the last checkpoint", file=sys.stderr, flush=True)
            os._exit(2)
