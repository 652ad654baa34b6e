"""The mirror of a run on another disk: what is copied, restored, verified and skipped."""

import shutil

import pytest
from conftest import checkpoints

from config import InputError
from runs import mirror
from runs.checkpoint import DamagedCheckpoint, load_checkpoint, save_checkpoint
from runs.folder import RunFolder


@pytest.fixture
def run(tmp_path):
    """A run folder with two checkpoints, and files that are not copied."""
    folder = tmp_path / "run"
    (folder / "tensorboard").mkdir(parents=True)
    (folder / "tensorboard" / "events").write_text("curve")
    (folder / "config.json").write_text("{}")
    (folder / ".lock").touch()
    (folder / ".tmodel_02.pt.1.tmp").touch()
    for epoch in range(2):
        save_checkpoint(folder / f"tmodel_{epoch:02d}.pt", {"epoch": epoch})
    return folder


def file_names(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_mirror_is_complete_follows_the_run_and_restores_it(run, tmp_path):
    drive, new_machine = tmp_path / "drive" / "run", tmp_path / "new" / "run"
    drive.parent.mkdir()
    mirror.update(RunFolder(drive), RunFolder(run))
    assert file_names(drive) == {"config.json", "tensorboard/events", "tmodel_00.pt", "tmodel_01.pt"}
    save_checkpoint(run / "tmodel_02.pt", {"epoch": 2})
    (run / "tmodel_00.pt").unlink()
    mirror.update(RunFolder(drive), RunFolder(run))
    assert [path.name for path in checkpoints(drive)] == ["tmodel_01.pt", "tmodel_02.pt"]
    assert mirror.restore(RunFolder(drive), RunFolder(new_machine))
    assert file_names(new_machine) == file_names(drive)
    assert load_checkpoint(new_machine / "tmodel_02.pt")["epoch"] == 2
    assert not mirror.restore(RunFolder(drive), RunFolder(new_machine))  # it is not further ahead
    assert not mirror.restore(RunFolder(tmp_path / "empty"), RunFolder(new_machine))


def test_a_run_that_is_further_ahead_than_its_mirror_is_kept(run, tmp_path):
    drive = tmp_path / "drive"
    mirror.update(RunFolder(drive), RunFolder(run))
    save_checkpoint(run / "tmodel_02.pt", {"epoch": 2})
    assert not mirror.restore(RunFolder(drive), RunFolder(run))
    assert load_checkpoint(run / "tmodel_02.pt")["epoch"] == 2


@pytest.mark.parametrize(("older", "newer"), [("99", "100"), ("07_step_00000300", "07"), ("07", "08_step_00000320")])
def test_epoch_and_step_decide_which_side_is_further_ahead(tmp_path, older, newer):
    for folder, name in (("behind", older), ("ahead", newer)):
        (tmp_path / folder).mkdir()
        save_checkpoint(tmp_path / folder / f"tmodel_{name}.pt", {})
    assert not mirror.restore(RunFolder(tmp_path / "behind"), RunFolder(tmp_path / "ahead"))
    assert mirror.restore(RunFolder(tmp_path / "ahead"), RunFolder(tmp_path / "behind"))


def test_only_changed_files_are_copied(run, tmp_path, monkeypatch):
    mirror.update(RunFolder(tmp_path / "drive"), RunFolder(run))
    copied, copy_file = [], mirror.copy_file
    monkeypatch.setattr(mirror, "copy_file", lambda a, b: copied.append(a.name) or copy_file(a, b))
    (run / "config.json").write_text('{"changed": 1}')
    mirror.update(RunFolder(tmp_path / "drive"), RunFolder(run))
    assert copied == ["config.json"]


def test_a_copy_that_arrives_damaged_is_never_renamed_to_a_checkpoint(run, tmp_path, monkeypatch, capsys):
    drive, copy2 = tmp_path / "drive", shutil.copy2

    def truncating_copy(source, target):
        copy2(source, target)
        if source.suffix == ".pt":
            target.write_bytes(target.read_bytes()[:-1])

    monkeypatch.setattr(shutil, "copy2", truncating_copy)
    mirror.update(RunFolder(drive), RunFolder(run))
    assert "the newest state was not copied to" in capsys.readouterr().err
    assert not checkpoints(drive)
    assert not list(drive.rglob("*.tmp"))
    with pytest.raises(DamagedCheckpoint):
        mirror.copy_file(run / "tmodel_00.pt", drive / "tmodel_00.pt")


def test_a_checkpoint_that_is_damaged_in_the_mirror_is_skipped(run, tmp_path, capsys):
    drive, new_machine = tmp_path / "drive", tmp_path / "new"
    mirror.update(RunFolder(drive), RunFolder(run))
    (drive / "tmodel_01.pt").write_bytes(b"damaged")
    assert mirror.restore(RunFolder(drive), RunFolder(new_machine))
    assert [path.name for path in checkpoints(new_machine)] == ["tmodel_00.pt"]
    assert "tmodel_01.pt is skipped" in capsys.readouterr().err


def test_a_lost_drive_is_a_warning_and_an_unmounted_one_an_error(run, tmp_path, capsys):
    (tmp_path / "drive").write_text("not a folder")
    mirror.update(RunFolder(tmp_path / "drive"), RunFolder(run))
    assert "it is in" in capsys.readouterr().err
    with pytest.raises(InputError, match="mount the Drive first"):
        mirror.check_mounted(RunFolder(tmp_path / "nowhere" / "run"))
    mirror.check_mounted(RunFolder(tmp_path / "new"))
