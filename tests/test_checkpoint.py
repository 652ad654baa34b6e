import os
import random
import zipfile

import pytest
import torch
from torch import nn

from config import InputError
from runs import checkpoint as c
from runs.folder import RunFolder
from translate import load_state_dict


def state() -> dict:
    torch.manual_seed(0)
    return {"model": {"w": torch.randn(40, 40)}, "progress": {"step": 7}, "text": "é"}


def test_what_is_saved_is_loaded_and_an_ordinary_reader_can_load_it_too(tmp_path):
    path = tmp_path / "tmodel_00.pt"
    c.save_checkpoint(path, state())
    for loaded in (c.load_checkpoint(path), torch.load(path, weights_only=True)):
        assert torch.equal(loaded["model"]["w"], state()["model"]["w"])
        assert (loaded["progress"], loaded["text"], loaded["schema"]) == ({"step": 7}, "é", c.SCHEMA)
    assert zipfile.ZipFile(path).testzip() is None
    assert [p.name for p in tmp_path.iterdir()] == ["tmodel_00.pt"]


def test_every_truncation_and_bit_flip_is_noticed(tmp_path):
    path, bad = tmp_path / "tmodel_00.pt", tmp_path / "tmodel_01.pt"
    c.save_checkpoint(path, state())
    whole, rng = path.read_bytes(), random.Random(0)
    damaged = [whole[: rng.randrange(len(whole))] for _ in range(30)] + [b""]
    for _ in range(100):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    for content in damaged:
        bad.write_bytes(content)
        with pytest.raises(c.DamagedCheckpoint):
            c.load_checkpoint(bad)


def test_the_newest_whole_checkpoint_is_used_and_the_damaged_one_named(tmp_path, capsys):
    assert RunFolder(tmp_path).load_newest() is None
    for epoch in (9, 10):
        c.save_checkpoint(tmp_path / f"tmodel_{epoch:02d}.pt", {"epoch": epoch})
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


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "tmodel_00.pt"
    c.save_checkpoint(path, {"epoch": 0})

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full_disk)
            with pytest.raises(InputError, match="No space left"):
                c.save_checkpoint(path, {"epoch": 1})
        assert c.load_checkpoint(path)["epoch"] == 0
        assert [p.name for p in tmp_path.iterdir()] == ["tmodel_00.pt"]


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("trace",)


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tmodel_00.pt"
    torch.save({"model": Malicious()}, path)
    c._seal(path)
    with pytest.raises(c.DamagedCheckpoint):
        c.load_checkpoint(path)
    assert not (tmp_path / "trace").exists()


def test_a_newer_schema_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(c, "SCHEMA", 99)
    c.save_checkpoint(tmp_path / "tmodel_00.pt", {})
    monkeypatch.undo()
    with pytest.raises(InputError, match="newer version"):
        c.load_checkpoint(tmp_path / "tmodel_00.pt")


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "_orig_mod.module."])
def test_compiled_and_distributed_prefixes_load(prefix):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    load_state_dict(target, {prefix + name: w for name, w in source.state_dict().items()})
    assert torch.equal(source.weight, target.weight)


def test_orphans_are_swept_and_set_aside_never_overwrites(tmp_path):
    (tmp_path / ".tmodel_03.pt.99.tmp").touch()
    (tmp_path / ".mine.tmp").mkdir()
    RunFolder(tmp_path).sweep()
    (tmp_path / ".mine.tmp").rmdir()  # what is not ours stays
    for content in (b"a", b"b"):
        file = tmp_path / "tmodel_00.pt"
        file.write_bytes(content)
        assert RunFolder(tmp_path).set_aside([file]) == tmp_path / "set_aside"
    assert sorted(p.read_bytes() for p in (tmp_path / "set_aside").iterdir()) == [b"a", b"b"]
    assert [p.name for p in tmp_path.iterdir()] == ["set_aside"]
