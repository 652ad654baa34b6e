"""Two processes (gloo, on a CPU) against one."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import pytest
import torch
from conftest import ROOT, checkpoints, path_of
from test_train import final_state, flags, same

from compute import distributed
from config import Config
from runs.checkpoint import load_checkpoint
from runs.folder import RunFolder
from train import train_model


def run(config: Config, processes: int, **environment: str) -> subprocess.CompletedProcess:
    worker = str(ROOT / "tests" / "torchrun_worker.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), worker, *flags(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def config(tiny_config) -> Config:
    """Seven batches an epoch, so that two processes have one over at its end."""
    return replace(tiny_config, dropout=0.0, num_epochs=3, batch_tokens=560, lr_schedule="constant", save_every_steps=2)


def difference(a: Config, b: Config) -> float:
    weights = [load_checkpoint(checkpoints(config)[-1])["model"] for config in (a, b)]
    return max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])


def test_two_processes_make_the_steps_of_one(config, tmp_path):
    config = replace(config, num_epochs=13, save_every_steps=0)  # 52 steps
    one = replace(config, run_dir=str(tmp_path / "one"), accumulation_steps=2)
    two = replace(config, run_dir=str(tmp_path / "two"))
    mutant = replace(config, run_dir=str(tmp_path / "mutant"))
    for each, processes, environment in ((one, 1, {}), (two, 2, {}), (mutant, 2, {"MEAN_OF_EACH_PROCESS": "1"})):
        done = run(each, processes, DOUBLE="1", **environment)
        assert done.returncode == 0, done.stderr
    state = load_checkpoint(checkpoints(two)[-1])
    assert state["progress"]["step"] == 52
    assert state["progress"] == load_checkpoint(checkpoints(one)[-1])["progress"]
    assert state["model"]["encoder.norm.weight"].dtype == torch.float64
    assert difference(one, two) < 1e-9
    assert difference(one, mutant) > 1e-4
    losses = [[row["loss"] for row in RunFolder.of(each).read_scores()] for each in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)


def test_a_process_dies_all_stop_and_the_same_command_ends_in_the_same_state(config, tmp_path):
    config = replace(config, dropout=0.1)  # each process has a generator of its own to take up again
    whole = replace(config, run_dir=str(tmp_path / "whole"))
    done = run(whole, 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes") == done.stdout.count("trained in") == 1  # the first alone speaks
    broken = replace(config, run_dir=str(tmp_path / "broken"))
    assert run(broken, 2, DIE_AT_STEP="7").returncode != 0
    assert load_checkpoint(checkpoints(broken)[-1])["progress"]["step"] == 6
    again = run(broken, 2)
    assert again.returncode == 0, again.stderr
    assert "resuming     from" in again.stdout
    assert same(final_state(broken), final_state(whole))


def test_bad_input_is_said_once_and_nobody_hangs(config):
    done = run(replace(config, datasource="none.tsv"), 2)
    assert done.returncode != 0
    assert done.stderr.count("error: no file none.tsv") == 1
    assert not path_of(config).exists()


@pytest.mark.parametrize("count", [1, 2, 7, 8])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (2, 3), (3, 2)])
def test_every_batch_goes_to_one_process_in_equally_many_steps(monkeypatch, count, world, accumulation):
    batches, shares = list(range(count)), []
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        own, counts = distributed.own_batches(batches, accumulation), list(distributed.own_counts(count, accumulation))
        taken = [list(islice(own, max(1, size))) for size in counts]
        assert list(own) == []
        shares.append([step[:size] for step, size in zip(taken, counts, strict=True)])
    assert len({len(steps) for steps in shares}) == 1
    assert sorted(batch for steps in shares for step in steps for batch in step) == batches
    assert all(len(step) <= accumulation for steps in shares for step in steps)


def test_one_process_touches_nothing_distributed(tiny_config, monkeypatch):
    class Untouchable:
        def __getattr__(self, name):
            raise AssertionError(f"torch.distributed.{name} was used")

    monkeypatch.setattr(distributed, "dist", Untouchable())
    train_model(replace(tiny_config, save_every_steps=2, num_epochs=1))
