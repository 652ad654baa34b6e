"""A part of the fault injection plan; benchmarks/faults.py runs all of it."""

import errno
import functools
import os
import random
import signal
import sys
import time

import pytest
from conftest import ROOT

pytest.importorskip("resource", reason="limits of Unix")

sys.path.insert(0, str(ROOT / "benchmarks"))
import faults

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> faults.Bench:
    return faults.Bench.prepare(tmp_path_factory.mktemp("faults"))


def test_the_final_state_is_reproducible_and_depends_on_the_seed(bench):
    assert bench.train("again") == 0
    assert faults.final_state(bench.folder / "again") == bench.expected
    assert bench.train("other", "--seed", "43") == 0
    assert faults.final_state(bench.folder / "other") != bench.expected


@pytest.mark.parametrize("point", faults.POINTS)
def test_a_kill_around_a_save(bench, point):
    assert faults.kill_at_point(bench, point, nth=2)


@pytest.mark.parametrize("seed", range(4))
def test_a_kill_at_a_random_moment(bench, seed):
    assert faults.kill_at_random(bench, random.Random(seed), seconds=1.5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_stops(bench, number):
    assert faults.stopped_by_signal(bench, number, random.Random(0), seconds=0.5)


def sleep_in_every_step() -> None:
    faults.train.train_step = lambda *_, **__: time.sleep(60)


def test_a_second_signal_exits_at_once(bench):
    started = faults.SPAWN.Event()
    process = bench.start("stopped twice", disturb=sleep_in_every_step, started=started)
    assert started.wait(60)
    for _ in range(2):
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == -signal.SIGINT


def test_damaged_files(bench):
    rng = random.Random(0)
    assert faults.damage_newest(bench, lambda content: content[: len(content) // 2])
    assert faults.damage_newest(bench, lambda content: b"")
    assert all(faults.damage_newest(bench, functools.partial(faults.flip, rng)) for _ in range(10))
    assert faults.replace_newest(bench)


def test_a_full_disk(bench, monkeypatch):
    monkeypatch.setattr(faults, "mount", lambda *_: False)  # mounts are left to the full plan
    assert faults.disk_full(bench, 0.6)


@pytest.mark.parametrize("point", faults.MIRROR_POINTS)
@pytest.mark.parametrize("is_lost", [False, True])
def test_a_kill_while_the_run_is_mirrored(bench, point, is_lost):
    assert faults.kill_while_mirroring(bench, point, 3, is_lost)


def test_a_clock_that_is_set_back(bench):
    assert faults.clock_set_back(bench, random.Random(0), seconds=1.5)


@pytest.mark.parametrize("has_mirror", [False, True])
def test_a_folder_that_is_removed_while_its_run_trains(bench, has_mirror):
    assert faults.folder_removed(bench, has_mirror)


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities of Linux")
@pytest.mark.parametrize(("what", "mode"), [("checkpoint", 0), ("", 0o500)])
def test_missing_permissions(bench, what, mode):
    assert faults.without_permission(bench, what, mode)


@pytest.mark.parametrize("writer", faults.WRITERS)
def test_an_io_error_while_writing(bench, writer):
    assert faults.io_error(bench, writer, errno.EIO)
