"""Checkpoint files: atomic, verified, loaded without running code; and the files of a run folder around them."""

import os
import random
import zipfile

import pytest
import torch
from torch import nn

from config import InputError
from runs import checkpoint
from runs.checkpoint import SCHEMA, DamagedCheckpoint, load_checkpoint, save_checkpoint, weights_for_inference
from runs.folder import RunFolder
from training.state import TrainingState
from translate import load_state_dict


def example_state() -> dict:
    torch.manual_seed(0)
    return {"model": {"w": torch.randn(40, 40)}, "progress": {"step": 7}, "text": "é"}


def test_a_saved_state_is_loaded_unchanged_also_by_plain_torch_load(tmp_path):
    path = tmp_path / "tmodel_00.pt"
    save_checkpoint(path, example_state())
    for loaded in (load_checkpoint(path), torch.load(path, weights_only=True)):
        assert torch.equal(loaded["model"]["w"], example_state()["model"]["w"])
        assert (loaded["progress"], loaded["text"], loaded["schema"]) == ({"step": 7}, "é", SCHEMA)
    assert zipfile.ZipFile(path).testzip() is None
    assert [p.name for p in tmp_path.iterdir()] == ["tmodel_00.pt"]


def test_every_truncation_and_bit_flip_is_detected(tmp_path):
    path, bad_path = tmp_path / "tmodel_00.pt", tmp_path / "tmodel_01.pt"
    save_checkpoint(path, example_state())
    content, rng = path.read_bytes(), random.Random(0)
    damaged = [content[: rng.randrange(len(content))] for _ in range(30)] + [b""]
    for _ in range(100):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    for damaged_content in damaged:
        bad_path.write_bytes(damaged_content)
        with pytest.raises(DamagedCheckpoint):
            load_checkpoint(bad_path)


def test_the_newest_undamaged_checkpoint_is_loaded_with_a_warning_for_damaged_ones(tmp_path, capsys):
    assert RunFolder(tmp_path).load_newest() is None
    for epoch in (9, 10):
        save_checkpoint(tmp_path / f"tmodel_{epoch:02d}.pt", {"epoch": epoch})
    assert RunFolder(tmp_path).load_newest()[1]["epoch"] == 10
    newest = tmp_path / "tmodel_10.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    path, found = RunFolder(tmp_path).load_newest()
    assert (path.name, found["epoch"]) == ("tmodel_09.pt", 9)
    assert "tmodel_10.pt is skipped" in capsys.readouterr().err
    assert newest.exists()
    (tmp_path / "tmodel_09.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"no checkpoint .* can be read"):
        RunFolder(tmp_path).load_newest()


def test_a_failed_save_leaves_the_previous_file_and_no_temporary_file(tmp_path, monkeypatch):
    path = tmp_path / "tmodel_00.pt"
    save_checkpoint(path, {"epoch": 0})

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, disk_full)
            with pytest.raises(InputError, match="No space left"):
                save_checkpoint(path, {"epoch": 1})
        assert load_checkpoint(path)["epoch"] == 0
        assert [p.name for p in tmp_path.iterdir()] == ["tmodel_00.pt"]


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("code_has_run",)


def test_loading_a_checkpoint_runs_no_code_from_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tmodel_00.pt"
    torch.save({"model": Malicious()}, path)
    checkpoint._seal(path)
    with pytest.raises(DamagedCheckpoint):
        load_checkpoint(path)
    assert not (tmp_path / "code_has_run").exists()


def test_a_checkpoint_of_a_newer_schema_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SCHEMA", 99)
    save_checkpoint(tmp_path / "tmodel_00.pt", {})
    monkeypatch.undo()
    with pytest.raises(InputError, match="newer version"):
        load_checkpoint(tmp_path / "tmodel_00.pt")


def test_checkpoints_of_schema_1_are_read_with_the_current_names(tmp_path, monkeypatch):
    """They held the trained weights of a run with an EMA in "learner", and the EMA in "model"."""
    trained, ema = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    monkeypatch.setattr(checkpoint, "SCHEMA", 1)
    save_checkpoint(tmp_path / "tmodel_00.pt", {"model": ema, "learner": trained})
    save_checkpoint(tmp_path / "tmodel_01.pt", {"model": trained, "learner": None})
    monkeypatch.undo()
    with_ema, without_ema = (load_checkpoint(tmp_path / f"tmodel_0{epoch}.pt") for epoch in (0, 1))
    assert torch.equal(with_ema["model"]["w"], trained["w"])
    assert torch.equal(with_ema["ema_model"]["w"], ema["w"])
    assert torch.equal(weights_for_inference(with_ema)["w"], ema["w"])
    assert torch.equal(without_ema["model"]["w"], trained["w"])
    assert without_ema["ema_model"] is None
    assert torch.equal(weights_for_inference(without_ema)["w"], trained["w"])
    assert "learner" not in with_ema
    assert "learner" not in without_ema


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "_orig_mod.module."])
def test_weights_load_with_the_prefixes_of_compiled_and_distributed_models(prefix):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    load_state_dict(target, {prefix + name: w for name, w in source.state_dict().items()})
    assert torch.equal(source.weight, target.weight)


def test_only_temporary_files_of_the_run_are_swept(tmp_path):
    for name in (".tmodel_03.pt.99.tmp", ".config.json.99.tmp", ".notes.tmp", "tmodel_03.pt"):
        (tmp_path / name).touch()
    RunFolder(tmp_path).sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".notes.tmp", "tmodel_03.pt"]


def test_files_set_aside_do_not_overwrite_earlier_ones(tmp_path):
    for content in (b"a", b"b"):
        file = tmp_path / "tmodel_00.pt"
        file.write_bytes(content)
        assert RunFolder(tmp_path).set_aside([file]) == tmp_path / "set_aside"
    assert sorted(p.read_bytes() for p in (tmp_path / "set_aside").iterdir()) == [b"a", b"b"]
    assert [p.name for p in tmp_path.iterdir()] == ["set_aside"]


def test_moments_of_other_shapes_than_the_weights_are_refused(tiny_config):
    """PyTorch does not compare them: the fused optimizer would read beyond the smaller tensor."""
    state = TrainingState.create(tiny_config, 20, 20, torch.device("cpu"))
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    saved = state.state_dict()
    state.load_state_dict(saved)
    saved["optimizer"]["state"][1]["exp_avg_sq"] = torch.zeros(2, 2)
    with pytest.raises(InputError, match=r"optimizer state of shape \(2, 2\)"):
        state.load_state_dict(saved)
