"""Sharing the cores: OpenMP threads stop spinning while other processes need the cores; results stay the same."""

import hashlib
import os
import subprocess
import sys
import threading
from itertools import accumulate, count

import pytest
from conftest import ROOT

import train
import translate
from compute import threads

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="libgomp's team sizes and /proc are specific to Linux"),
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores"),
]


SLEEPS = """
import resource, time, torch
from compute.threads import SpareTeams
x = torch.linspace(0, 1, 1 << 18)
def sleeps():
    "How often threads sleep in 50 parallel loops with pauses of 0.1 ms; and the result of a parallel sum."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    for _ in range(50):
        result = (x * x).sum().item()
        end = time.perf_counter() + 1e-4
        while time.perf_counter() < end: pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before, result, torch.get_num_threads()
sleeps()
print(*sleeps())
teams = SpareTeams()
time.sleep(1)  # until the teams exist
print(*sleeps())
teams.end()
print(*sleeps())
"""


def test_threads_sleep_instead_of_spinning_while_there_are_spare_teams():
    default = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", SLEEPS]
    for _ in range(5):
        output = subprocess.run(command, env=default, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        without, with_teams, after = (line.split() for line in output.splitlines())
        assert without[1:] == with_teams[1:] == after[1:]  # the same result with the same number of threads
        if max(int(without[0]), int(after[0])) < 40 < 50 < int(with_teams[0]):
            return
    pytest.skip(f"other processes disturb the count: {without[0]}, {with_teams[0]} and {after[0]} sleeps")


def test_spare_teams_follow_the_waiting_time(monkeypatch):
    # Seconds waited in each period of one second: busy in the 3rd, quiet for five periods up to the 14th.
    shares = [0.0, 0.2, 0.9, 0.6, 0.2, 0.0, 0.0, 0.0, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.2, 0.9]
    totals, stop, events = [0.0, *accumulate(shares)], threading.Event(), []
    measured = iter(totals)

    def waiting_time() -> float:
        events.append("measured")
        if events.count("measured") == len(totals):
            stop.set()
        return next(measured)

    class Teams:
        def __init__(self):
            events.append(f"started in period {events.count('measured') - 1}")

        def end(self):
            events.append(f"ended in period {events.count('measured') - 1}")

    monkeypatch.setattr(threads, "PERIOD", 0)
    monkeypatch.setattr(threads, "SpareTeams", Teams)
    monkeypatch.setattr(threads, "waiting_time", waiting_time)
    monkeypatch.setattr(threads.time, "perf_counter", map(float, count()).__next__)
    threads.adapt(stop)
    changes = [event for event in events if event != "measured"]
    starts_and_ends = ["started in period 3", "ended in period 14", "started in period 16", "ended in period 16"]
    assert changes == starts_and_ends


def test_waiting_time_counts_threads_that_share_a_core():
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # of this thread and those that it starts
    try:
        work = [threading.Thread(target=hashlib.pbkdf2_hmac, args=("sha256", b"", b"", 500_000)) for _ in range(2)]
        before = threads.waiting_time()
        for thread in work:
            thread.start()
        threading.Event().wait(0.1)
        assert threads.waiting_time() - before > 0.03
        for thread in work:
            thread.join()
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.parametrize(
    ("environment", "cpu_threads", "expected"),
    [({}, 2, 1), ({"GOMP_SPINCOUNT": "1000"}, 2, 0), ({"OMP_WAIT_POLICY": "active"}, 2, 0), ({}, 1, 0)],
)
def test_the_users_settings_are_respected(monkeypatch, environment, cpu_threads, expected):
    stop_functions = []
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: cpu_threads)
    monkeypatch.setattr(threads.atexit, "register", stop_functions.append)
    threads.share_cores.cache_clear()
    running = threading.active_count()
    threads.share_cores()
    threads.share_cores()  # a second call has no effect
    assert threading.active_count() - running == len(stop_functions) == expected
    for stop in stop_functions:
        stop()
    assert threading.active_count() == running


def test_training_and_translation_share_the_cores(monkeypatch, tiny_config):
    class CalledError(Exception):
        pass

    def called():
        raise CalledError

    for module in (train, translate):
        monkeypatch.setattr(module, "share_cores", called)
    with pytest.raises(CalledError):
        train.train_model(tiny_config)
    with pytest.raises(CalledError):
        translate.Translator.load(tiny_config.run_dir)
