"""The mirror of a run on another disk: what is copied, restored, verified, skipped, discarded and refused."""

import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import checkpoints, run_path
from simulated_drive import SimulatedDrive

from config import InputError, get_config
from runs import mirror
from runs.checkpoint import DamagedCheckpoint, load_checkpoint, save_checkpoint
from runs.folder import RunFolder
from train import train_model
from translate import Translator

MEGABYTE = 1_000_000


class Run(RunFolder):
    """A run whose checkpoints are 0.3 MB, a third of it weights. It is mirrored like one that trains."""

    def train_epoch(self, drive: RunFolder, loss: float) -> None:
        """Saves an epoch, validates it, and mirrors after both."""
        epoch = len(self.read_scores()) + 1
        self.save({**state(), "progress": {"epoch": epoch, "batch": 0, "step": epoch}})
        mirror.update(drive, self, "loss")
        self.write_scores([*self.read_scores(), {"epoch": epoch, "batch": 0, "step": epoch, "loss": loss}])
        mirror.update(drive, self, "loss")


def state() -> dict:
    weights = torch.rand(MEGABYTE // 40)
    return {"model": {"weights": weights}, "ema_model": None, "optimizer": {"m": torch.rand(2 * len(weights))}}


def file_names(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def names(folder: RunFolder) -> list[str]:
    return [path.name for path in folder.checkpoints()]


@pytest.fixture
def run(tmp_path) -> Run:
    """A run folder without checkpoints, and with files that are not copied."""
    folder = Run(tmp_path / "run")
    folder.tensorboard.mkdir(parents=True)
    (folder.tensorboard / "events").write_text("curve")
    folder.save_config(get_config("toy"))
    folder.save_run_id()
    (folder.path / ".lock").touch()
    (folder.path / ".tmodel_02.pt.1.tmp").touch()
    (folder.path / "set_aside").mkdir()
    (folder.path / "set_aside" / "tmodel_00.pt").touch()
    return folder


@pytest.fixture
def drive(tmp_path) -> RunFolder:
    """A mirror that this process writes."""
    folder = RunFolder(tmp_path / "drive" / "run")
    folder.path.parent.mkdir()
    mirror.begin(folder, 1000, has_ema=False)
    return folder


# ---------------------------------------------------------------------------- what is copied and restored


def test_a_mirror_holds_the_newest_checkpoint_and_the_best_weights_and_restores_them(run, drive, tmp_path):
    for loss in (3.0, 1.0, 2.0, 2.5):
        run.train_epoch(drive, loss)
    others = {"config.json", "run_id", "scores.jsonl", "tensorboard/events"}
    assert file_names(drive.path) == {".trainer", "tmodel_01_weights.pt", "tmodel_03.pt"} | others
    best, newest = drive.checkpoints()
    assert best.stat().st_size < 0.4 * newest.stat().st_size
    new_machine = RunFolder(tmp_path / "new" / "run")
    assert mirror.restore(drive, new_machine)
    assert file_names(new_machine.path) == {"tmodel_01_weights.pt", "tmodel_03.pt"} | others
    path, weights, _ = new_machine.load_weights("best")
    expected = load_checkpoint(run.path / "tmodel_01.pt")["model"]
    assert path.name == "tmodel_01_weights.pt"
    assert torch.equal(weights["weights"], expected["weights"])
    assert new_machine.load_weights("1")[0] == path
    assert new_machine.load_newest()[0].name == "tmodel_03.pt"
    assert not mirror.restore(drive, new_machine)  # it is not further ahead
    assert not mirror.restore(RunFolder(tmp_path / "empty"), new_machine)


def test_a_restored_run_is_mirrored_again_without_copying_its_weights_twice(run, drive, tmp_path, monkeypatch):
    for loss in (1.0, 2.0):
        run.train_epoch(drive, loss)
    new_machine = Run(tmp_path / "new" / "run")
    mirror.restore(drive, new_machine)
    watched = SimulatedDrive(drive.path).mount(monkeypatch.setattr)
    new_machine.train_epoch(drive, 3.0)
    assert [name for name, _ in watched.written if name.endswith(".pt")] == ["tmodel_02.pt"]
    assert names(drive) == ["tmodel_00_weights.pt", "tmodel_02.pt"]
    new_machine.train_epoch(drive, 0.5)
    assert names(drive) == ["tmodel_03.pt"]  # the newest is the best


def test_without_a_checkpoint_to_resume_from_a_run_is_not_restarted(run, drive, tmp_path):
    for loss in (1.0, 2.0):
        run.train_epoch(drive, loss)
    (drive.path / "tmodel_01.pt").unlink()
    mirror.restore(drive, RunFolder(tmp_path / "new"))
    with pytest.raises(InputError, match=r"no checkpoint in .* can be read"):
        RunFolder(tmp_path / "new").load_newest()


def test_within_an_epoch_the_newest_and_the_best_are_kept(run, drive):
    for loss in (1.0, 2.0):
        run.train_epoch(drive, loss)
    for step in (3, 4):
        run.save({**state(), "progress": {"epoch": 2, "batch": 1, "step": step}})
        mirror.update(drive, run, "loss")
    assert names(drive) == ["tmodel_00_weights.pt", "tmodel_02_step_00000004.pt"]


def test_the_best_checkpoint_is_kept_if_it_lies_within_an_epoch(run, drive):
    run.train_epoch(drive, 2.0)
    best = run.save({**state(), "progress": {"epoch": 1, "batch": 1, "step": 2}})
    run.write_scores([*run.read_scores(), {"epoch": 1, "batch": 1, "step": 2, "loss": 0.5}])
    for step in (3, 4):
        run.save({**state(), "progress": {"epoch": 1, "batch": step, "step": step}})
    assert names(run) == ["tmodel_00.pt", best.name, "tmodel_01_step_00000003.pt", "tmodel_01_step_00000004.pt"]
    run.train_epoch(drive, 1.0)
    assert names(run) == ["tmodel_00.pt", best.name, "tmodel_02.pt"]
    assert names(drive) == [f"{best.stem}_weights.pt", "tmodel_02.pt"]
    run.train_epoch(drive, 0.4)
    for step in (5, 6):
        run.save({**state(), "progress": {"epoch": 4, "batch": 1, "step": step}})
    assert best not in run.checkpoints()


def test_a_run_that_is_further_ahead_than_its_mirror_is_kept(run, drive):
    run.train_epoch(drive, 1.0)
    save_checkpoint(run.path / "tmodel_02.pt", {"epoch": 2})
    assert not mirror.restore(drive, run)
    assert load_checkpoint(run.path / "tmodel_02.pt")["epoch"] == 2


@pytest.mark.parametrize(("older", "newer"), [("99", "100"), ("07_step_00000300", "07"), ("07", "08_step_00000320")])
def test_epoch_and_step_decide_which_side_is_further_ahead(tmp_path, older, newer):
    for folder, name in (("behind", older), ("ahead", newer)):
        (tmp_path / folder).mkdir()
        save_checkpoint(tmp_path / folder / f"tmodel_{name}.pt", {})
    assert not mirror.restore(RunFolder(tmp_path / "behind"), RunFolder(tmp_path / "ahead"))
    assert mirror.restore(RunFolder(tmp_path / "ahead"), RunFolder(tmp_path / "behind"))


def test_only_changed_files_are_copied(run, drive, monkeypatch):
    run.train_epoch(drive, 1.0)
    watched = SimulatedDrive(drive.path).mount(monkeypatch.setattr)
    run.config_file.write_text('{"changed": 1}')
    mirror.update(drive, run, "loss")
    assert [name for name, _ in watched.written] == ["config.json"]


# ---------------------------------------------------------------------------- the space of a Drive


def test_nothing_stays_in_the_trash_and_each_epoch_is_copied_once(run, drive, monkeypatch):
    watched = SimulatedDrive(drive.path.parent, delay=0.001).mount(monkeypatch.setattr)
    for epoch in range(20):
        run.train_epoch(drive, loss=1 / (1 + epoch) if epoch % 4 < 2 else 2.0)
    whole = [name for name, size in watched.written if size > MEGABYTE / 5]
    weights = [name for name, size in watched.written if MEGABYTE / 20 < size < MEGABYTE / 5]
    assert whole == [f"tmodel_{epoch:02d}.pt" for epoch in range(20)]
    # The weights of an epoch are copied only if it was the best and the next one is worse.
    assert weights == [f"tmodel_{epoch:02d}_weights.pt" for epoch in range(1, 20, 4)]
    assert watched.trash == 0
    largest = max(path.stat().st_size for path in drive.checkpoints())
    assert sum(path.stat().st_size for path in drive.path.rglob("*") if path.is_file()) < 1.5 * largest


def test_a_plain_copy_fills_the_trash(tmp_path, monkeypatch):
    """The simulated Drive counts what is deleted or replaced."""
    watched = SimulatedDrive(tmp_path).mount(monkeypatch.setattr)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"12345")
    os.replace(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b").unlink()
    assert watched.trash == 10


def test_the_space_that_a_run_will_need_is_said_before_training(drive, monkeypatch, capsys):
    mirror.begin(drive, 50_000_000, has_ema=False)
    assert "up to 1,400 MB for checkpoints" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    mirror.begin(drive, 50_000_000, has_ema=False)
    assert "is too small" in capsys.readouterr().err


def test_orphan_temporary_files_are_swept(drive):
    (drive.path / ".tmodel_00.pt.123.tmp").write_text("half")
    (drive.path / "notes.tmp").touch()
    mirror.begin(drive, 1000, has_ema=False)
    assert file_names(drive.path) == {".trainer", "notes.tmp"}


# ---------------------------------------------------------------------------- damage and lost Drives


def test_a_copy_that_arrives_damaged_is_never_renamed_to_a_checkpoint(run, drive, monkeypatch, capsys):
    copy2 = shutil.copy2

    def truncating_copy(source, target):
        copy2(source, target)
        if source.suffix == ".pt":
            target.write_bytes(target.read_bytes()[:-1])

    monkeypatch.setattr(shutil, "copy2", truncating_copy)
    run.train_epoch(drive, 1.0)
    assert "the newest state was not copied to" in capsys.readouterr().err
    assert not checkpoints(drive.path)
    assert not list(drive.path.rglob("*.tmp"))
    with pytest.raises(DamagedCheckpoint):
        mirror.copy_file(run.path / "tmodel_00.pt", drive.path / "tmodel_00.pt")


@pytest.mark.parametrize("name", ["scores.jsonl", "config.json", "tensorboard/events"])
@pytest.mark.parametrize("is_killed", [False, True])
def test_a_file_whose_replacement_fails_stays_in_the_mirror(run, drive, monkeypatch, name, is_killed):
    run.train_epoch(drive, 1.0)
    before = (drive.path / name).read_text()
    rename = os.replace

    def fail(source, target):
        if target == drive.path / name and not str(source).endswith(mirror.OLD):
            raise OSError("the Drive is gone")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        for cleanup in ("put_back", "discard") if is_killed else ():
            patch.setattr(mirror, cleanup, lambda *_: None)
        with pytest.raises(OSError, match="gone"):
            mirror.copy_file(run.path / name, drive.path / name)
    assert (drive.path / name).exists() is not is_killed
    mirror.check(drive, run, get_config("toy"))
    assert (drive.path / name).read_text() == before
    assert not list(drive.path.rglob("*.old.tmp"))


@pytest.mark.parametrize("damaged", [["tmodel_01.pt"], ["tmodel_00.pt", "tmodel_01.pt"]])
def test_a_damaged_checkpoint_of_the_run_is_restored_from_the_mirror(run, drive, damaged):
    for loss in (2.0, 1.0):
        run.train_epoch(drive, loss)
    newest = run.path / "tmodel_01.pt"
    intact, times = newest.read_bytes(), (newest.stat().st_atime, newest.stat().st_mtime)
    for name in damaged:
        (run.path / name).write_bytes(intact[:-1] + b"?")
        os.utime(run.path / name, times)
    assert mirror.restore(drive, run)
    assert newest.read_bytes() == intact
    assert not mirror.restore(drive, run)


def test_damaged_checkpoints_of_the_run_are_named_and_the_others_copied(run, drive, capsys):
    for loss in (2.0, 1.0, 3.0):
        run.train_epoch(drive, loss)
    best = run.path / "tmodel_01.pt"
    best.write_bytes(b"damaged")
    os.utime(best, (1, 1))
    run.train_epoch(drive, 4.0)
    assert "tmodel_01.pt is skipped: its checksum does not match" in capsys.readouterr().err
    assert names(drive) == ["tmodel_00_weights.pt", "tmodel_03.pt"]
    run.save({**state(), "progress": {"epoch": 5, "batch": 1, "step": 5}})
    newest = run.checkpoints()[-1]
    newest.write_bytes(b"damaged")
    mirror.update(drive, run, "loss")
    assert f"{newest.name} is skipped" in capsys.readouterr().err
    assert names(drive) == ["tmodel_00_weights.pt", "tmodel_03.pt"]


def test_a_checkpoint_that_is_damaged_in_the_mirror_is_skipped(run, drive, tmp_path, capsys):
    for loss in (1.0, 2.0):
        run.train_epoch(drive, loss)
    (drive.path / "tmodel_01.pt").write_bytes(b"damaged")
    assert mirror.restore(drive, RunFolder(tmp_path / "new"))
    assert names(RunFolder(tmp_path / "new")) == ["tmodel_00_weights.pt"]
    assert "tmodel_01.pt is skipped" in capsys.readouterr().err


def test_a_lost_drive_is_a_warning_and_no_folder_is_created_in_its_place(run, drive, capsys):
    shutil.rmtree(drive.path.parent)
    run.train_epoch(drive, 1.0)
    assert "it is in" in capsys.readouterr().err
    assert not drive.path.parent.exists()


# ---------------------------------------------------------------------------- refused mirrors


def test_folders_that_cannot_be_a_mirror_are_refused(run, tmp_path):
    config = get_config("toy")
    (tmp_path / "file").write_text("mine")
    for name, message in {
        "nowhere/run": "mount the Drive first",
        "file": "is a file",
        "run/copy": "must not contain each other",
        "run": "must not contain each other",
        ".": "must not contain each other",
    }.items():
        with pytest.raises(InputError, match=message):
            mirror.check(RunFolder(tmp_path / name), run, config)
    mirror.check(RunFolder(tmp_path / "new"), run, config)


def test_a_mirror_of_another_run_is_refused_and_unchanged(run, drive, tmp_path):
    config = get_config("toy")
    run.train_epoch(drive, 1.0)
    mirror.check(drive, run, config)
    other = Run(tmp_path / "other")
    other.save_run_id()
    mirror.check(drive, other, config)  # it has no checkpoint yet: the run is restored
    save_checkpoint(other.path / "tmodel_00.pt", state())
    before = {path: path.read_bytes() for path in drive.path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="holds a copy of another run; give another folder"):
        mirror.check(drive, other, config)
    with pytest.raises(InputError, match="another run, trained with another lang_tgt"):
        mirror.check(drive, RunFolder(tmp_path / "new"), replace(config, lang_tgt="de"))
    with pytest.raises(InputError, match="--preload none would replace the copy"):
        mirror.check(drive, run, replace(config, preload="none"))
    assert before == {path: path.read_bytes() for path in drive.path.rglob("*") if path.is_file()}


def test_runs_and_mirrors_without_an_identity_are_compared_by_their_checkpoints(run, drive, tmp_path):
    """Those of earlier versions."""
    config = get_config("toy")
    run.train_epoch(drive, 1.0)
    for folder in (run, drive):
        (folder.path / "run_id").unlink()
    mirror.check(drive, run, config)
    save_checkpoint(run.path / "tmodel_00.pt", state())
    with pytest.raises(InputError, match="another run"):
        mirror.check(drive, run, config)


def test_a_mirror_of_an_earlier_version_is_restored(run, tmp_path):
    """It held all checkpoints of the run, with their optimizers, and no identity."""
    (run.path / "run_id").unlink()
    for epoch in range(3):
        save_checkpoint(run.checkpoint(epoch + 1), state())
    old = RunFolder(tmp_path / "old")
    shutil.copytree(run.path, old.path)
    mirror.check(old, RunFolder(tmp_path / "new"), get_config("toy"))
    assert mirror.restore(old, RunFolder(tmp_path / "new"))
    assert names(RunFolder(tmp_path / "new")) == names(run)


def test_of_two_processes_that_write_a_mirror_the_first_is_told(run, drive, monkeypatch, capsys):
    run.train_epoch(drive, 1.0)
    with monkeypatch.context() as other_process:
        other_process.setattr(mirror, "TRAINER", "another process")
        mirror.begin(drive, 1000, has_ema=False)
    capsys.readouterr()
    run.train_epoch(drive, 0.5)
    assert "another process writes this mirror now; stop one of the two" in capsys.readouterr().err
    assert names(drive) == ["tmodel_00.pt"]


# ---------------------------------------------------------------------------- with real training


def test_a_run_restored_from_its_mirror_translates_with_its_best_weights_and_resumes(tiny_config, tmp_path, capsys):
    drive = RunFolder(tmp_path / "drive" / "run")
    drive.path.parent.mkdir()
    config = replace(tiny_config, mirror_dir=str(drive), ema_decay=0.9, num_epochs=2, lr_schedule="constant")
    train_model(config)
    rows = drive.read_scores()
    rows[0]["loss"] = 0.0  # as if the first epoch were the best
    folder = RunFolder(run_path(config))
    folder.write_scores(rows)
    mirror.update(drive, folder, "loss")
    expected = Translator.load(folder.path, "cpu").model.state_dict()
    shutil.rmtree(folder.path)
    state = train_model(replace(config, num_epochs=3))
    assert "resuming     from tmodel_01.pt" in capsys.readouterr().out
    assert state.progress.epoch == 3
    assert names(drive) == ["tmodel_00_weights.pt", "tmodel_02.pt"]
    translator = Translator.load(drive.path, "cpu")
    assert translator.weights == "tmodel_00_weights.pt"
    assert all(torch.equal(value, expected[name]) for name, value in translator.model.state_dict().items())
    assert isinstance(translator.translate(["I sleep."])[0], str)
    assert json.loads(drive.config_file.read_text())["preset"] == "toy"


def test_a_second_run_does_not_overwrite_the_mirror_of_the_first(tiny_config, tmp_path):
    (tmp_path / "drive").mkdir()
    first = replace(tiny_config, mirror_dir=str(tmp_path / "drive" / "run"), num_epochs=1)
    train_model(first)
    second = replace(tiny_config, run_dir=str(tmp_path / "second"), num_epochs=1)
    train_model(second)
    before = {path: path.read_bytes() for path in (tmp_path / "drive").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="another run"):
        train_model(replace(second, mirror_dir=first.mirror_dir, num_epochs=2))
    assert before == {path: path.read_bytes() for path in (tmp_path / "drive").rglob("*") if path.is_file()}
