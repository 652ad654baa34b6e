"""Training with two processes (gloo, on a CPU) gives the result of one."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from math import ceil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, checkpoints, run_path
from test_train import final_state, flags_of, is_identical

from compute import distributed
from compute.heartbeat import Heartbeat
from config import Config, InputError
from runs import folder as run_folder
from runs.checkpoint import load_checkpoint
from runs.folder import RunFolder
from train import train_model
from training.resume import ResumePoint, batches_per_step


def launch(
    config: Config, processes: int, seconds: int = 300, restarts: int = 0, **environment: str
) -> subprocess.CompletedProcess:
    """Runs the training of a config to its end, with torchrun if there are several processes."""
    worker = str(ROOT / "tests" / "torchrun_worker.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    torchrun += ["--max-restarts", str(restarts)]
    return subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), worker, *flags_of(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


@pytest.fixture
def config(tiny_config) -> Config:
    """Seven batches per epoch, so that in its last step one of two processes has no batch."""
    return replace(tiny_config, dropout=0.0, num_epochs=3, batch_tokens=560, lr_schedule="constant", save_every_steps=2)


def max_difference(a: Config, b: Config) -> float:
    """The largest absolute difference between the weights of two runs."""
    weights = [load_checkpoint(checkpoints(config)[-1])["model"] for config in (a, b)]
    return max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])


@pytest.mark.slow
def test_two_processes_make_the_same_steps_as_one(config, tmp_path):
    config = replace(config, num_epochs=13, save_every_steps=0)  # 52 steps
    one = replace(config, run_dir=str(tmp_path / "one"), accumulation_steps=2)
    two = replace(config, run_dir=str(tmp_path / "two"))
    wrong = replace(config, run_dir=str(tmp_path / "wrong"))
    for each, processes, environment in ((one, 1, {}), (two, 2, {}), (wrong, 2, {"AVERAGE_PER_PROCESS": "1"})):
        done = launch(each, processes, USE_FLOAT64="1", **environment)
        assert done.returncode == 0, done.stderr
    state = load_checkpoint(checkpoints(two)[-1])
    assert state["progress"]["step"] == 52
    assert state["progress"] == load_checkpoint(checkpoints(one)[-1])["progress"]
    assert state["model"]["encoder.norm.weight"].dtype == torch.float64
    assert max_difference(one, two) < 1e-9
    assert max_difference(one, wrong) > 1e-4
    losses = [[row["loss"] for row in RunFolder.of(each).read_scores()] for each in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)


@pytest.mark.slow
def test_if_a_process_dies_all_stop_and_the_same_command_resumes_bit_identically(config, tmp_path):
    config = replace(config, dropout=0.1)  # each process has its own generator, which must be restored
    uninterrupted = replace(config, run_dir=str(tmp_path / "uninterrupted"))
    done = launch(uninterrupted, 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes") == done.stdout.count("trained in") == 1  # only the first process prints
    interrupted = replace(config, run_dir=str(tmp_path / "interrupted"))
    assert launch(interrupted, 2, DIE_AT_STEP="7").returncode != 0
    assert load_checkpoint(checkpoints(interrupted)[-1])["progress"]["step"] == 6
    resumed = launch(interrupted, 2)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming     from" in resumed.stdout
    assert is_identical(final_state(interrupted), final_state(uninterrupted))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["DIE_AT_STEP", "STOP_AT_STEP"])
def test_torchrun_restarts_the_processes_after_one_dies_or_hangs(config, tmp_path, fault):
    config = replace(config, dropout=0.1)
    uninterrupted = replace(config, run_dir=str(tmp_path / "uninterrupted"))
    assert launch(uninterrupted, 2).returncode == 0
    restarted = replace(config, run_dir=str(tmp_path / "restarted"), ddp_timeout=10.0)
    done = launch(restarted, 2, restarts=1, **{fault: "7"})
    assert done.returncode == 0, done.stderr
    assert "resuming     from" in done.stdout
    named = "has not responded for 10 s (--ddp-timeout); the same command resumes from the last checkpoint"
    assert (named in done.stderr) == (fault == "STOP_AT_STEP")
    assert is_identical(final_state(restarted), final_state(uninterrupted))


@pytest.mark.slow
def test_a_run_continues_with_another_number_of_processes_and_the_same_batches_per_step(config, tmp_path):
    two = replace(config, run_dir=str(tmp_path / "two"))
    assert launch(two, 2, USE_FLOAT64="1").returncode == 0
    changed = replace(config, run_dir=str(tmp_path / "changed"))
    lines = {2: "", 1: "2 before, 1 now; still 2 batches per step, up to 2 per process", 3: "1 before, 3 now; still 2"}
    for processes, max_steps in ((2, 3), (1, 6), (3, 0)):
        done = launch(replace(changed, max_steps=max_steps), processes, USE_FLOAT64="1")
        assert done.returncode == 0, done.stderr
        assert lines[processes] in done.stdout
    assert "warning: 1 of 3 processes are idle" in done.stderr
    assert load_checkpoint(checkpoints(changed)[-1])["progress"] == load_checkpoint(checkpoints(two)[-1])["progress"]
    assert max_difference(two, changed) < 1e-9


@pytest.mark.slow
def test_bad_input_is_reported_once_and_no_process_hangs(config):
    done = launch(replace(config, datasource="none.tsv"), 2)
    assert done.returncode != 0
    assert done.stderr.count("error: no file none.tsv") == 1
    assert not run_path(config).exists()


@pytest.mark.parametrize("count", [1, 2, 7, 8])
@pytest.mark.parametrize(("world", "size"), [(1, 1), (2, 2), (2, 6), (3, 6), (2, 3), (3, 2), (3, 1)])
def test_each_batch_goes_to_one_process_and_all_make_equally_many_steps(monkeypatch, count, world, size):
    batches, steps_by_rank = list(range(count)), []
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        own, counts = distributed.own_batches(batches, size), list(distributed.own_counts(count, size))
        taken = [list(islice(own, max(1, number))) for number in counts]
        assert list(own) == []
        steps_by_rank.append([step[:number] for step, number in zip(taken, counts, strict=True)])
    assert {len(steps) for steps in steps_by_rank} == {ceil(count / size)}
    for i in range(ceil(count / size)):
        assert sorted(batch for steps in steps_by_rank for batch in steps[i]) == batches[i * size : (i + 1) * size]
    assert all(len(step) <= ceil(size / world) for steps in steps_by_rank for step in steps)


def test_a_single_process_never_calls_torch_distributed(tiny_config, monkeypatch):
    class Unused:
        def __getattr__(self, name):
            raise AssertionError(f"torch.distributed.{name} was called")

    monkeypatch.setattr(distributed, "dist", Unused())
    train_model(replace(tiny_config, save_every_steps=2, num_epochs=1))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x"),
        ({"WORLD_SIZE": "2"}, "no RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "one"}, "no MASTER_ADDR"),
        ({"WORLD_SIZE": "0", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}, "RANK=2"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "http"}, "MASTER_PORT=http"),
    ],
)
def test_an_impossible_environment_is_refused(monkeypatch, given, named):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=named), distributed.process_group(10):
        pass


@pytest.mark.parametrize("host", ["nowhere.invalid", 100 * "a"])  # the second is too long for a name
def test_an_unknown_machine_is_an_error(monkeypatch, host):
    monkeypatch.setattr(distributed, "JOIN_TIMEOUT", timedelta(0))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(InputError, match=rf"the name {host} \(MASTER_ADDR"):
        distributed.require_address(host)


def test_a_machine_may_be_known_later(monkeypatch):
    answers = iter([OSError("not known yet"), []])

    def resolve(host, port):
        if isinstance(answer := next(answers), OSError):
            raise answer
        return answer

    monkeypatch.setattr(distributed.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    distributed.require_address("node-0")
    assert not list(answers)


def test_gradients_are_averaged_on_the_own_gpu_and_without_the_positional_encodings(monkeypatch):
    order, module = [], torch.nn.Linear(2, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "broadcast", lambda value: order.append("all processes meet"))
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda module, **options: options)
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    assert distributed.averaging_gradients(module, cpu) == {"broadcast_buffers": False}
    assert distributed.averaging_gradients(module, gpu) == {"broadcast_buffers": False, "device_ids": [1]}
    assert order == ["all processes meet"] * 2


@pytest.fixture
def ranks(monkeypatch):
    """A function that calls another one in two threads, as two processes; returns their results."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "rank", lambda: int(threading.current_thread().name))

    def run(work, ranks=(0, 1)) -> list:
        results = {}

        def call() -> None:
            try:
                results[distributed.rank()] = work()
            except Exception as error:
                results[distributed.rank()] = error

        threads = [threading.Thread(target=call, name=str(rank)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[rank] for rank in ranks]

    return run


def test_processes_agree_on_an_attempt_although_the_store_has_entries_of_earlier_ones(ranks):
    store, found = dist.HashStore(), set()
    for _ in range(3):
        first, second = ranks(lambda: distributed.agree_on_attempt(store, timedelta(seconds=20)))
        assert first == second
        found.add(first)
    assert len(found) == 3


def test_a_process_that_does_not_join_is_named(ranks):
    store = dist.HashStore()
    store.set("asks/1", "a process that has ended")
    (error,) = ranks(lambda: distributed.agree_on_attempt(store, timedelta(seconds=1)), [0])
    assert isinstance(error, InputError)
    assert str(error) == "process 1 of 2 has not joined within 1 s"


@pytest.mark.parametrize("seconds_alive", [0.0, 2.0])
def test_a_silent_process_is_named_within_the_limit(monkeypatch, ranks, seconds_alive):
    ended, store, reasons = threading.Event(), dist.HashStore(), []
    monkeypatch.setattr(Heartbeat, "end", lambda self, reason: (reasons.append(reason), ended.set()))

    def live() -> None:
        heartbeat = Heartbeat(store, distributed.rank(), 2, 1.0)
        if distributed.rank() == 1:
            for count in range(int(seconds_alive * 10)):
                heartbeat.beat(count)
                ended.wait(0.1)
        else:
            store.wait(["heartbeat/1"])
            heartbeat.start()
            assert not ended.wait(seconds_alive)
            assert ended.wait(20)
            heartbeat.stop()

    assert ranks(live) == [None, None]
    assert reasons[0].startswith("process 1 (")
    assert reasons[0].endswith("has not responded for 1 s (--ddp-timeout)")


def test_a_run_keeps_its_number_of_batches_per_step(config, monkeypatch):
    config = replace(config, accumulation_steps=3)

    def found(state: dict | None) -> int:
        return batches_per_step(config, ResumePoint(Path("tmodel_00.pt"), state, []))

    monkeypatch.setenv("WORLD_SIZE", "4")
    assert found(None) == 12
    assert found({"rng": [{}, {}]}) == 6  # saved by an earlier version with two processes
    assert found({"rng": [{}], "batches_per_step": 8}) == 8
    for wrong in (0, -1, 1.5, "2", None, True):
        with pytest.raises(InputError, match=r"tmodel_00.pt has .* batches per step"):
            found({"rng": [{}], "batches_per_step": wrong})


def test_a_run_folder_may_appear_late_on_another_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "MAX_DELAY", 0.5)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(InputError, match=f"process 3 on .* does not see in {folder} what the first process"):
        folder.wait_for_mark("new", 3)
    assert not folder.path.exists()
    folder.mark("old")
    with pytest.raises(InputError, match="give a --run-dir on a disk that all machines share"):
        folder.wait_for_mark("new", 3)
    monkeypatch.setattr(run_folder, "MAX_DELAY", 20)
    timer = threading.Timer(0.5, lambda: folder.mark("new"))
    timer.start()
    folder.wait_for_mark("new", 3)
    timer.join()


@pytest.mark.parametrize("seconds", [0.0, 4.9, 43_201.0, float("nan")])
def test_the_limit_for_hung_processes_must_be_sensible(config, seconds):
    with pytest.raises(InputError, match="give 5 to 43,200 seconds"):
        replace(config, ddp_timeout=seconds)
