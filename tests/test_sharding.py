"""Sharded training (--shard) gives the result of unsharded training, and writes the same checkpoints."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import checkpoints
from test_distributed import launch, max_difference
from test_train import is_identical

from compute import distributed, sharding
from config import Config
from runs.checkpoint import load_checkpoint
from runs.folder import RunFolder
from train import train_model, train_step
from training import resume
from training.batches import StepBatches
from training.losses import TrainingLoss
from training.state import TrainingState
from translate import Translator


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def losses(config: Config) -> list[float]:
    return [row["loss"] for row in RunFolder.of(config).read_scores()]


@pytest.mark.slow
def test_sharded_runs_on_two_one_and_three_processes_make_the_steps_of_an_unsharded_run(
    tiny_config, tmp_path, float64, monkeypatch
):
    """An epoch on 2 processes, one on 1, one on 3 with R-Drop, each resumed from the checkpoint of the one before."""
    # Eleven batches per epoch: in its last step, one of the processes has one batch less than the others.
    config = replace(tiny_config, dropout=0.0, batch_tokens=320, lr_schedule="constant", ema_decay=0.9)
    config = replace(config, accumulation_steps=2, warmup_steps=2, encoder_layers=2)
    reference = replace(config, run_dir=str(tmp_path / "reference"))
    fixed = [name for name in resume.FIXED_FIELDS if name != "accumulation_steps"]
    monkeypatch.setattr(resume, "FIXED_FIELDS", fixed)  # one process accumulates as many batches as several have
    for epoch, processes in enumerate((2, 1, 3)):
        options = {"num_epochs": epoch + 1, "clip_norm": 0.5 if processes == 2 else 0.0}
        options["rdrop_alpha"] = 1.0 if processes == 3 else 0.0
        train_model(replace(reference, **options, accumulation_steps=2 * processes))
        if processes == 1:
            train_model(replace(config, **options))
        else:
            done = launch(replace(config, **options, shard=True), processes, 600, USE_FLOAT64="1")
            assert done.returncode == 0, done.stderr
            assert f"{processes} processes, sharded" in done.stdout
        assert losses(config) == pytest.approx(losses(reference), abs=1e-6)
        assert max_difference(config, reference) < 1e-6
    states = [load_checkpoint(checkpoints(each)[-1]) for each in (config, reference)]
    assert states[0]["progress"] == states[1]["progress"]
    for part in ("model", "ema_model", "optimizer"):
        assert list(states[0][part]) == list(states[1][part])
    for moments, expected in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert all((moments[name] - expected[name]).abs().max() < 1e-6 for name in expected)
    assert Translator.load(config.run_dir, "cpu").translate(["I sleep."])


@pytest.fixture
def group(monkeypatch) -> Iterator[None]:
    """A process group of this process alone, in which training is sharded as with several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(sharding, "is_wanted", lambda config: config.shard)
    yield
    dist.destroy_process_group()


@pytest.fixture
def config(tiny_config) -> Config:
    return replace(tiny_config, shard=True, ema_decay=0.9, share_embeddings="all", shared_vocab=True)


def trained_state(config: Config, batch: dict, steps: int) -> TrainingState:
    state = TrainingState.create(config, 50, 50, torch.device("cpu"))
    loss_module = TrainingLoss(state.model.train(), 0.1)
    for _ in range(steps):
        train_step(state, loss_module, StepBatches([batch], 0, 1), 1e-3, config)
    return state


@pytest.fixture
def batch() -> dict:
    ids = torch.arange(4, 28).view(4, 6)
    return {
        "encoder_input": ids, "decoder_input": ids, "encoder_mask": torch.ones(4, 1, 1, 6, dtype=torch.bool),
        "target_positions": torch.arange(24), "target_tokens": ids.flatten(), "src_text": ["text"],
    }  # fmt: skip


def test_a_sharded_state_is_saved_and_restored_as_an_unsharded_one(config, group, batch):
    sharded = trained_state(config, batch, 3)
    saved = sharded.state_dict()
    assert sharded.is_sharded
    assert list(saved["model"]) == list(sharded.model.state_dict())
    tied = saved["model"]["projection_layer.proj.weight"], saved["model"]["src_embed.embedding.weight"]
    assert tied[0].untyped_storage().data_ptr() == tied[1].untyped_storage().data_ptr()
    unsharded = TrainingState.create(replace(config, shard=False), 50, 50, torch.device("cpu"))
    unsharded.load_state_dict(saved)
    assert is_identical(unsharded.state_dict(), saved)
    restored = TrainingState.create(replace(config, seed=1), 50, 50, torch.device("cpu"))
    restored.load_state_dict(saved)
    assert restored.is_sharded
    assert is_identical(restored.state_dict(), saved)


def test_a_step_that_is_not_finite_changes_nothing_that_is_sharded(config, group, batch):
    state = trained_state(config, batch, 1)
    before = state.state_dict()
    loss_module = TrainingLoss(state.model, torch.inf)
    report = train_step(state, loss_module, StepBatches([batch], 0, 1), 1e-3, replace(config, ema_decay=0.0))
    assert not torch.isfinite(report.gradient_norm)
    after = state.state_dict()
    assert is_identical(before["model"], after["model"])
    assert is_identical(before["optimizer"]["state"], after["optimizer"]["state"])


def test_validation_uses_the_present_weights_of_the_ema(config, group, batch):
    state = trained_state(config, batch, 2)
    weights = state.state_dict()["ema_model"]
    assert not is_identical(dict(state.evaluated_model.state_dict()), weights)
    with state.gathering():
        assert is_identical(dict(state.evaluated_model.state_dict()), weights)


def test_with_one_process_nothing_is_sharded(config):
    assert distributed.world_size() == 1
    assert not TrainingState.create(config, 50, 50, torch.device("cpu")).is_sharded
