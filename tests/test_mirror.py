import shutil

import pytest
from conftest import checkpoints

from config import InputError
from runs import mirror as m
from runs.checkpoint import DamagedCheckpoint, load_checkpoint, save_checkpoint
from runs.folder import RunFolder


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "tensorboard").mkdir(parents=True)
    (folder / "tensorboard" / "events").write_text("curve")
    (folder / "config.json").write_text("{}")
    (folder / ".lock").touch()
    (folder / ".tmodel_02.pt.1.tmp").touch()
    for epoch in range(2):
        save_checkpoint(folder / f"tmodel_{epoch:02d}.pt", {"epoch": epoch})
    return folder


def names(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_copy_is_whole_follows_the_run_and_brings_it_back(run, tmp_path):
    drive, elsewhere = tmp_path / "drive" / "run", tmp_path / "new" / "run"
    drive.parent.mkdir()
    m.update(RunFolder(drive), RunFolder(run))
    assert names(drive) == {"config.json", "tensorboard/events", "tmodel_00.pt", "tmodel_01.pt"}
    save_checkpoint(run / "tmodel_02.pt", {"epoch": 2})
    (run / "tmodel_00.pt").unlink()
    m.update(RunFolder(drive), RunFolder(run))
    assert [path.name for path in checkpoints(drive)] == ["tmodel_01.pt", "tmodel_02.pt"]
    assert m.restore(RunFolder(drive), RunFolder(elsewhere))
    assert names(elsewhere) == names(drive)
    assert load_checkpoint(elsewhere / "tmodel_02.pt")["epoch"] == 2
    assert not m.restore(RunFolder(drive), RunFolder(elsewhere))  # nothing newer there
    assert not m.restore(RunFolder(tmp_path / "empty"), RunFolder(elsewhere))


def test_what_is_here_and_newer_stays(run, tmp_path):
    drive = tmp_path / "drive"
    m.update(RunFolder(drive), RunFolder(run))
    save_checkpoint(run / "tmodel_02.pt", {"epoch": 2})
    assert not m.restore(RunFolder(drive), RunFolder(run))
    assert load_checkpoint(run / "tmodel_02.pt")["epoch"] == 2


@pytest.mark.parametrize(("older", "newer"), [("99", "100"), ("07_step_00000300", "07"), ("07", "08_step_00000320")])
def test_newer_is_by_epoch_and_step(tmp_path, older, newer):
    for folder, name in (("here", older), ("there", newer)):
        (tmp_path / folder).mkdir()
        save_checkpoint(tmp_path / folder / f"tmodel_{name}.pt", {})
    assert not m.restore(RunFolder(tmp_path / "here"), RunFolder(tmp_path / "there"))
    assert m.restore(RunFolder(tmp_path / "there"), RunFolder(tmp_path / "here"))


def test_only_what_changed_is_copied(run, tmp_path, monkeypatch):
    m.update(RunFolder(tmp_path / "drive"), RunFolder(run))
    copied, copy_file = [], m.copy_file
    monkeypatch.setattr(m, "copy_file", lambda a, b: copied.append(a.name) or copy_file(a, b))
    (run / "config.json").write_text('{"changed": 1}')
    m.update(RunFolder(tmp_path / "drive"), RunFolder(run))
    assert copied == ["config.json"]


def test_a_copy_that_arrives_damaged_never_takes_the_name(run, tmp_path, monkeypatch, capsys):
    drive, copy2 = tmp_path / "drive", shutil.copy2

    def lossy(source, target):
        copy2(source, target)
        if source.suffix == ".pt":
            target.write_bytes(target.read_bytes()[:-1])

    monkeypatch.setattr(shutil, "copy2", lossy)
    m.update(RunFolder(drive), RunFolder(run))
    assert "the newest state was not copied to" in capsys.readouterr().err
    assert not checkpoints(drive)
    assert not list(drive.rglob("*.tmp"))
    with pytest.raises(DamagedCheckpoint):
        m.copy_file(run / "tmodel_00.pt", drive / "tmodel_00.pt")


def test_a_checkpoint_damaged_on_the_drive_is_passed_over(run, tmp_path, capsys):
    drive, new = tmp_path / "drive", tmp_path / "new"
    m.update(RunFolder(drive), RunFolder(run))
    (drive / "tmodel_01.pt").write_bytes(b"damaged")
    assert m.restore(RunFolder(drive), RunFolder(new))
    assert [path.name for path in checkpoints(new)] == ["tmodel_00.pt"]
    assert "tmodel_01.pt is skipped" in capsys.readouterr().err


def test_a_drive_that_goes_away_is_told_and_one_that_is_not_there_refused(run, tmp_path, capsys):
    (tmp_path / "drive").write_text("no folder any more")
    m.update(RunFolder(tmp_path / "drive"), RunFolder(run))
    assert "it is in" in capsys.readouterr().err
    with pytest.raises(InputError, match="mount the Drive first"):
        m.check_mounted(RunFolder(tmp_path / "nowhere" / "run"))
    m.check_mounted(RunFolder(tmp_path / "new"))
