"""Training with two processes (gloo, on a CPU) gives the result of one."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import pytest
import torch
from conftest import ROOT, checkpoints, run_path
from test_train import final_state, flags_of, is_identical

from compute import distributed
from config import Config
from runs.checkpoint import load_checkpoint
from runs.folder import RunFolder
from train import train_model


def launch(config: Config, processes: int, seconds: int = 120, **environment: str) -> subprocess.CompletedProcess:
    """Runs the training of a config to its end, with torchrun if there are several processes."""
    worker = str(ROOT / "tests" / "torchrun_worker.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
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
def test_bad_input_is_reported_once_and_no_process_hangs(config):
    done = launch(replace(config, datasource="none.tsv"), 2)
    assert done.returncode != 0
    assert done.stderr.count("error: no file none.tsv") == 1
    assert not run_path(config).exists()


@pytest.mark.parametrize("count", [1, 2, 7, 8])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (2, 3), (3, 2)])
def test_each_batch_goes_to_one_process_and_all_make_equally_many_steps(monkeypatch, count, world, accumulation):
    batches, steps_by_rank = list(range(count)), []
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        own, counts = distributed.own_batches(batches, accumulation), list(distributed.own_counts(count, accumulation))
        taken = [list(islice(own, max(1, size))) for size in counts]
        assert list(own) == []
        steps_by_rank.append([step[:size] for step, size in zip(taken, counts, strict=True)])
    assert len({len(steps) for steps in steps_by_rank}) == 1
    assert sorted(batch for steps in steps_by_rank for step in steps for batch in step) == batches
    assert all(len(step) <= accumulation for steps in steps_by_rank for step in steps)


def test_a_single_process_never_calls_torch_distributed(tiny_config, monkeypatch):
    class Unused:
        def __getattr__(self, name):
            raise AssertionError(f"torch.distributed.{name} was called")

    monkeypatch.setattr(distributed, "dist", Unused())
    train_model(replace(tiny_config, save_every_steps=2, num_epochs=1))


def test_the_exchange_of_gradients_has_a_time_limit_and_leaves_out_the_positional_encodings(monkeypatch):
    order, module = [], torch.nn.Linear(2, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "broadcast", lambda value: order.append("all processes meet"))
    monkeypatch.setattr(distributed.dist, "new_group", lambda timeout: order.append(timeout.total_seconds()) or "group")
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda module, **options: options)
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    assert distributed.averaging_gradients(module, cpu) == {"broadcast_buffers": False}
    expected = {"broadcast_buffers": False, "device_ids": [1], "process_group": "group"}
    assert distributed.averaging_gradients(module, gpu) == expected
    assert order == ["all processes meet", 600]
