"""Hostile, damaged and unusual files and values: each test repeats a finding of benchmarks/faults.md, by its number."""

import json
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import checkpoints
from test_bad_input import SCRIPTS, TRAIN_TINY, contents, edit_config, file, train_tiny_run

import translate
from config import InputError, run_command
from dataset import Batches, build_bpe_tokenizer, get_ds
from runs import checkpoint
from runs.checkpoint import DamagedCheckpoint, load_checkpoint, save_checkpoint
from runs.folder import RunFolder

RESUME = "train --run-dir run --num-epochs 3 --device cpu"
TRANSLATE = "translate --run-dir run 'I see.'"
EXPORT = "export --run-dir run --output-dir out --form safetensors"
NEW = TRAIN_TINY.replace("--run-dir run", "--run-dir new")
SECONDS = 30  # after which a command counts as one that hangs


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train_tiny_run(tmp_path_factory.mktemp("attack"))


@pytest.fixture
def folder(trained, tmp_path, monkeypatch) -> Path:
    """A copy of it, as the working folder."""
    copy = shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[[str], tuple[int, str]]:
    """A function that runs a command line in this process and returns its status and output."""

    def call(command: str) -> tuple[int, str]:
        script, *argv = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
        status = 0
        try:
            run_command(SCRIPTS[script])
        except SystemExit as stop:
            status = stop.code or 0
        out, err = capsys.readouterr()
        return status, out + err

    def too_late(*_):
        raise AssertionError(f"no end within {SECONDS} s")

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    if not hasattr(signal, "SIGALRM"):  # Windows
        yield call
        return
    previous = signal.signal(signal.SIGALRM, too_late)
    yield call
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def limit_time() -> None:
    """Makes the test fail if it has not ended after SECONDS."""
    if hasattr(signal, "SIGALRM"):
        signal.alarm(SECONDS)


def rewrite(path: Path, **changes) -> None:
    """Replaces parts of a checkpoint, and seals it again with a valid checksum. None removes a part."""
    state = torch.load(path, weights_only=True)
    state = {name: value for name, value in (state | changes).items() if name not in changes or value is not None}
    torch.save(state, path)
    checkpoint._seal(path)


def rewrite_all(folder: Path, **changes) -> None:
    for path in checkpoints(folder / "run"):
        rewrite(path, **changes)


def full_disk(*_):
    raise OSError(28, "No space left on device")


def one_error(status: int, output: str) -> str:
    """The line of an error, which must be the only one."""
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert status == 2
    return line


# ---------------------------------------------------------------------------- data loss


@pytest.mark.skipif(sys.platform == "win32", reason="locks of Unix")
def test_02_two_processes_cannot_write_one_mirror(folder, run):
    (folder / "copy").mkdir()
    with RunFolder("copy").locked():
        line = one_error(*run(f"{NEW} --mirror-dir copy"))
    assert "another process is training in copy; wait for it, or choose another --mirror-dir" in line


def test_03_a_loss_that_is_not_finite_is_the_worst(folder, run):
    rows = RunFolder("run").read_scores()
    RunFolder("run").write_scores([rows[0], rows[1] | {"loss": float("nan")}])
    assert RunFolder("run").best_first("loss")[0].name == "tmodel_00.pt"
    RunFolder("run").prune(1, "loss")
    assert [path.name for path in checkpoints(folder / "run")] == ["tmodel_00.pt", "tmodel_01.pt"]


def test_03_weights_that_are_not_finite_are_not_saved(tmp_path):
    state = {"model": {"w": torch.tensor([1.0, float("nan")])}}
    with pytest.raises(InputError, match=r"model\.w is not finite .* was not saved"):
        save_checkpoint(tmp_path / "tmodel_00.pt", state)
    assert not list(tmp_path.iterdir())


def test_03_weights_that_are_not_finite_are_not_loaded(folder, run):
    newest = checkpoints(folder / "run")[-1]
    weights = {name: weight * float("inf") for name, weight in load_checkpoint(newest)["model"].items()}
    rewrite(newest, model=weights)
    with pytest.raises(DamagedCheckpoint, match=r"model\..* is not finite"):
        load_checkpoint(newest)
    assert "tmodel_01.pt is skipped" in run(TRANSLATE)[1]


@pytest.mark.parametrize("more", ["--datasource blank.tsv", "--seq-len 3", "--validation-source blank.tsv"])
def test_04_a_refused_training_from_scratch_changes_nothing(folder, run, more):
    file("blank.tsv", " \t \n" * 20)(folder)
    before = contents(folder)
    one_error(*run(f"train --run-dir run --preload none --device cpu {more}"))
    assert contents(folder) == before


def test_04_training_from_scratch_sets_the_whole_run_aside(folder, run):
    before = contents(folder / "run")
    assert run("train --run-dir run --preload none --device cpu --vocab-size 40 --num-epochs 1")[0] == 0
    aside = contents(folder / "run" / "set_aside")
    kept = {name: before[name] for name in before if not name.startswith(("tensorboard", ".lock"))}
    assert aside == kept
    assert RunFolder("run").run_id != before["run_id"].decode().strip()


def test_06_an_empty_folder_of_the_user_is_kept_after_bad_input(folder, run):
    (folder / "mine").mkdir()
    one_error(*run(NEW.replace("--run-dir new", "--run-dir mine/new").replace("pairs.tsv", "none.tsv")))
    assert list((folder / "mine").iterdir()) == []


# ---------------------------------------------------------------------------- code execution, silently wrong results


MOMENTS = {
    "missing": lambda state: state.clear(),
    "one missing": lambda state: state.pop(0),
    "integers": lambda state: [m.update(exp_avg=m["exp_avg"].long()) for m in state.values()],
    "of another parameter": lambda state: state.update({99: state[0]}),
    "step of another shape": lambda state: [m.update(step=torch.zeros(0)) for m in state.values()],
    "sparse": lambda state: [m.update(exp_avg=m["exp_avg"].to_sparse()) for m in state.values()],
    "not finite": lambda state: [m["exp_avg"].fill_(float("nan")) for m in state.values()],
}


@pytest.mark.parametrize("name", MOMENTS)
def test_09_moments_that_do_not_fit_are_refused(folder, run, name):
    for path in checkpoints(folder / "run"):
        optimizer = load_checkpoint(path)["optimizer"]
        MOMENTS[name](optimizer["state"])
        rewrite(path, optimizer=optimizer)
    before = contents(folder)
    one_error(*run(RESUME))
    assert {k: v for k, v in contents(folder).items() if "events" not in k} == {
        k: v for k, v in before.items() if "events" not in k
    }


@pytest.mark.parametrize("change", [{"num_heads": 4}, {"norm": "post"}, {"seq_len": 40}])
def test_10_a_config_of_another_model_than_the_checkpoint_is_refused(folder, run, change):
    edit_config(**change)(folder)
    assert f"config.json does not belong to run/tmodel_01.pt: {next(iter(change))}" in one_error(*run(TRANSLATE))


def test_11_targets_of_equal_lengths_that_were_exchanged_are_another_corpus(tiny_config, tmp_path):
    path = tmp_path / "mixed.tsv"
    fingerprints, targets = [], ["Io vedo.", "Tu dormi."]
    for order in (targets, targets[::-1]):
        pairs = [("I see.", order[0]), ("You sleep.", order[1])] * 20
        path.write_text("".join(f"{src}\t{tgt}\n" for src, tgt in pairs), encoding="utf8")
        fingerprints.append(get_ds(replace(tiny_config, datasource=str(path)))[0].fingerprint)
    assert fingerprints[0] != fingerprints[1]


def test_11_a_run_does_not_resume_with_another_validation_set(folder, run):
    lines = (folder / "pairs.tsv").read_text(encoding="utf8").splitlines(keepends=True)
    file("other.tsv", "".join(lines[:30]))(folder)
    file("first.tsv", "".join(lines[40:60]))(folder)
    command = NEW.replace("--validation-source=", "--validation-source first.tsv")
    assert run(command)[0] == 0
    line = one_error(*run("train --run-dir new --num-epochs 3 --device cpu --validation-source other.tsv"))
    assert "the validation set has changed since new/tmodel_01.pt was saved (20 pairs then, 30 now); restore it" in line


def test_11_a_checkpoint_of_an_earlier_version_resumes(folder, run):
    for path in checkpoints(folder / "run"):
        count, pairs, lengths, *_ = load_checkpoint(path)["corpus"].split()
        rewrite(path, corpus=f"{count} {pairs} {lengths}", validation=None, run_id=None)
    assert run(RESUME)[0] == 0


def test_11_scores_of_another_run_are_refused(folder, run):
    row = '{"epoch": 1, "batch": 0, "step": 7, "loss": 1.0, "run_id": "another"}\n'
    file("run/scores.jsonl", row)(folder)
    for command in ("train --run-dir run --max-steps 99", "evaluate --run-dir run"):
        assert "scores.jsonl cannot be read (it belongs to another run" in one_error(*run(command))


def test_13_an_export_holds_nothing_of_a_killed_one(folder, run):
    (folder / ".out.tmp").mkdir()
    (folder / ".out.tmp" / "left_over").touch()
    assert run(EXPORT)[0] == 0
    assert not (folder / "out" / "left_over").exists()


@pytest.mark.parametrize("weights", ["", "_", "-1"])
def test_15_only_numbers_select_an_epoch(folder, run, weights):
    assert f"no weights {weights!r} in run: give best, latest" in one_error(*run(f"{TRANSLATE} --weights={weights!r}"))


def test_17_an_export_holds_no_path(folder, run):
    edit_config(datasource=str(folder / "pairs.tsv"), validation_source=str(folder / "dev"))(folder)
    assert run(EXPORT)[0] == 0
    config = json.loads((folder / "out" / "config.json").read_text(encoding="utf8"))
    assert (config["datasource"], config["validation_source"]) == ("pairs.tsv", "dev")
    assert not any(str(folder).encode() in content for content in contents(folder / "out").values())


# ---------------------------------------------------------------------------- hanging, memory


def test_18_a_text_that_is_far_too_long_is_skipped_before_it_is_segmented(tmp_path, tiny_config):
    path = tmp_path / "long.tsv"
    path.write_text("I see.\tVedo.\n" * 40 + "ab" * 50_000 + "\tVedo.\n" * 3, encoding="utf8")
    lengths = []

    def watched(texts, vocab_size):
        texts = list(texts)
        lengths.append(max(map(len, texts)))
        return build_bpe_tokenizer(texts, vocab_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dataset.build_bpe_tokenizer", watched)
        config = replace(tiny_config, datasource=str(path), tokenizer="bpe", vocab_size=400, shared_vocab=True)
        train_set, validation, *_ = get_ds(config)
    assert max(lengths) < 1_000
    assert train_set.skipped_long + validation.skipped_long == 1


def test_18_a_sentence_that_is_far_too_long_is_refused_before_it_is_segmented(folder):
    translator = translate.Translator.load("run", "cpu")
    with pytest.raises(InputError, match="a sentence of 100,000 characters exceeds the limit of 6,400; split it"):
        translator.encode("a" * 100_000)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory of Linux")
def test_19_shared_memory_too_small_for_workers_is_refused(folder, run, monkeypatch):
    usage = shutil.disk_usage("/dev/shm")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 16))
    limit_time()
    assert "/dev/shm has 0.1 MB free, --num-workers 2 may need 0.4 MB; lower it" in one_error(
        *run(NEW + " --num-workers 2")
    )
    assert not (folder / "new").exists()


NAMES = ["config.json", "scores.jsonl", "run_id", "tokenizer_it.json", "tmodel_01.pt", ".lock"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="special files of Unix")
@pytest.mark.parametrize("kind", ["pipe", "endless", "folder"])
@pytest.mark.parametrize("name", NAMES)
def test_21_special_files_are_not_read(folder, run, name, kind):
    path = folder / "run" / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    limit_time()
    status, output = run(RESUME)
    if name == "tmodel_01.pt" and kind != "folder":  # the checkpoint before it is used, and this name written again
        assert (status, path.is_file()) == (0, True)
    else:
        assert name in one_error(status, output)


@pytest.mark.skipif(sys.platform == "win32", reason="links need permissions there")
def test_21_a_link_out_of_the_run_is_not_mirrored(folder, run):
    file("private", "mine")(folder)
    (folder / "run" / "notes").symlink_to(folder / "private")
    assert run(RESUME + " --mirror-dir copy")[0] == 0
    assert not (folder / "copy" / "notes").exists()


@pytest.mark.parametrize(
    "change", [{"encoder_layers": 100_000}, {"d_model": 1 << 40}, {"seq_len": 1 << 40}, {"vocab_size": 1 << 70}]
)
def test_22_sizes_of_a_model_are_limited(folder, run, change):
    (name,) = change
    edit_config(**change)(folder)
    assert f"{name} is {change[name]}; give at most" in one_error(*run(TRANSLATE))


def test_22_a_compressed_checkpoint_is_not_loaded(folder):
    import zipfile

    path, packed = checkpoints(folder / "run")[-1], folder / "packed"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    shutil.move(packed, path)
    checkpoint._seal(path)
    with pytest.raises(DamagedCheckpoint, match="it is compressed"):
        load_checkpoint(path)


def test_22_a_tensor_that_is_larger_than_its_file_is_not_loaded(folder):
    path = checkpoints(folder / "run")[-1]
    rewrite(path, model={"w": torch.zeros(1).expand(10**12)})
    with pytest.raises(DamagedCheckpoint, match=r"model\.w is not a plain tensor"):
        load_checkpoint(path)


# ---------------------------------------------------------------------------- one line instead of a traceback


SCORES = [
    "[1]", "5", "null", "{}", '{"epoch": 1, "batch": 0, "step": 2, "loss": "x"}', "[" * 100_000,
    '{"epoch": "1", "batch": 0, "step": 2, "loss": 1}', '{"epoch": 1e400, "batch": 0, "step": 2, "loss": 1}',
]  # fmt: skip


@pytest.mark.parametrize("text", SCORES, ids=lambda text: text[:40])
def test_29_scores_of_another_shape_are_one_line(folder, run, text):
    file("run/scores.jsonl", text + "\n")(folder)
    for command in (RESUME, TRANSLATE):
        assert "scores.jsonl cannot be read" in one_error(*run(command))


@pytest.mark.parametrize("text", ["[]", "5", "null", '"a"', "[" * 100_000], ids=lambda text: text[:9])
def test_29_a_config_of_another_shape_is_one_line(folder, run, text):
    file("run/config.json", text)(folder)
    assert "config.json: it is " in one_error(*run(TRANSLATE))


MISTYPED = {
    "model": [None, 5, {}, {"a": 5}, {5: torch.zeros(1)}],
    "optimizer": [None, 5, {}],
    "progress": [None, {"epoch": "a", "batch": 0, "step": 0}, {"epoch": -5, "batch": 0, "step": 0},
                 {"epoch": 1, "batch": 10**9, "step": 4}],
    "rng": [None, 5, [5]],
    "config": [None, 5],
    "corpus": [None, 5, ""],
    "tokenizers": [None, 5, [], ["a", "b"]],
    "schema": ["2"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("part", "value"),
    [(part, value) for part in MISTYPED for value in MISTYPED[part]],
    ids=lambda value: str(value)[:30],
)
def test_30_a_checkpoint_with_missing_or_mistyped_parts_is_one_line(folder, run, part, value):
    rewrite_all(folder, **{part: value})
    limit_time()
    one_error(*run(RESUME))
    status, output = run(TRANSLATE)
    if status:  # a translation needs no state of the optimizer
        one_error(status, output)


def test_30_a_checkpoint_of_another_run_is_skipped(folder, run):
    if "run_id" in load_checkpoint(checkpoints(folder / "run")[-1]):
        rewrite(checkpoints(folder / "run")[-1], run_id="another")
    else:
        pytest.fail("checkpoints have no identity")
    assert "tmodel_01.pt is skipped: it belongs to another run" in run(TRANSLATE)[1]


def test_27_an_error_in_a_thread_is_one_line(capsys):
    def fail():
        raise FileNotFoundError(2, "No such file or directory", "run/tensorboard/events")

    def main(argv):
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", threading.excepthook)
        run_command(main)
    assert capsys.readouterr().err.startswith("warning: [Errno 2] No such file or directory: 'run/tensorboard/events'")


NUMBERS = [f"--seed {10**23}", f"--vocab-size {10**23}", f"--max-steps {10**23}", "--num-workers 100000"]


@pytest.mark.parametrize("flag", NUMBERS)
def test_32_numbers_beyond_64_bits_leave_no_run(folder, run, flag):
    limit_time()
    assert "give at most" in one_error(*run(f"{NEW} {flag}"))
    assert not (folder / "new").exists()


def test_32_a_length_penalty_that_overflows_is_refused(folder, run):
    line = one_error(*run(f"{TRANSLATE} --beam-size 5 --length-penalty 1e308"))
    assert "--length-penalty is 1e+308; give 0 to 10" in line


def test_33_a_failed_conversion_leaves_no_folder(tmp_path, monkeypatch):
    import convert

    folder = tmp_path / "converted"

    monkeypatch.setattr(convert, "check_new_folder", lambda _: None)
    monkeypatch.setattr(convert, "read_weights", lambda _: {})
    monkeypatch.setattr(convert, "architecture", lambda *_: {"d_model": 8, "seq_len": 9})
    monkeypatch.setattr(convert, "load_tokenizer", lambda _: type("T", (), {"get_vocab_size": lambda _: 9})())
    monkeypatch.setattr(convert, "get_model", lambda *_: type("M", (), {"load_state_dict": lambda *_: None})())
    monkeypatch.setattr(convert, "convert_weights", lambda _: {})
    monkeypatch.setattr(convert, "to_safetensors", full_disk)
    for name in ("en", "it"):
        (tmp_path / name).touch()
    with pytest.raises(OSError, match="No space left"):
        convert.main("w", str(tmp_path / "en"), str(tmp_path / "it"), "en", "it", str(folder))
    assert not folder.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="links need permissions there")
def test_34_a_link_to_itself_is_no_folder_for_an_export(folder, run):
    (folder / "out").symlink_to(folder / "out")
    assert "out already exists; give a new or an empty folder" in one_error(
        *run("export --run-dir run --output-dir out")
    )


def test_36_colons_and_upper_case_in_the_name_of_a_file(folder, run):
    name = "a.TSV" if sys.platform == "win32" else "a:b.TSV"
    shutil.copy(folder / "pairs.tsv", folder / name)
    assert run(NEW.replace("pairs.tsv", name))[0] == 0


def test_37_a_read_only_file_system_is_not_called_full(tmp_path, monkeypatch):
    def read_only(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", read_only)
    for save in (lambda: save_checkpoint(tmp_path / "tmodel_00.pt", {}), lambda: RunFolder(tmp_path).write_scores([])):
        with pytest.raises(InputError, match="choose a folder that can be written to") as error:
            save()
        assert "free some space" not in str(error.value)


def test_38_a_full_cache_is_named(monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", "/data/cache")

    def main(argv):
        raise OSError(28, "No space left on device")

    with pytest.raises(SystemExit):
        run_command(main)
    assert "/data/cache (HF_HOME)" in capsys.readouterr().err


def test_40_an_open_quote_is_named(folder, run):
    file("open.csv", 'en,it\n"I see,Vedo\n' + "I see,Vedo\n" * 30)(folder)
    assert "a quote that opens a cell must be closed" in one_error(*run(NEW.replace("pairs.tsv", "open.csv")))


def test_41_pages_and_tables_are_written_beside_and_renamed(tmp_path, monkeypatch):
    pd = pytest.importorskip("pandas")
    pytest.importorskip("altair")
    import altair as alt

    from experiments import write_csv
    from interpret.charts import save_picture
    from interpret.page import write_page

    chart = alt.Chart(pd.DataFrame({"x": [1]})).mark_point().encode(x="x:Q")
    path = tmp_path / "old"
    writers = {
        "page": lambda: write_page(path, "title", "run", [], {}),
        "svg": lambda: save_picture(chart, path.with_suffix(".svg")),
        "png": lambda: save_picture(chart, path.with_suffix(".png")),
        "table": lambda: write_csv(pd.DataFrame({"a": [1]}), path),
    }
    for name, write in writers.items():
        for suffix in ("", ".svg", ".png"):
            path.with_suffix(suffix).write_text("old", encoding="utf8")
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full_disk)
            with pytest.raises(OSError, match="No space left"):
                write()
        assert {p.read_text(encoding="utf8") for p in tmp_path.iterdir()} == {"old"}, name
        assert len(list(tmp_path.iterdir())) == 3, name


@pytest.mark.skipif(sys.platform == "win32", reason="devices of Unix")
def test_41_output_to_a_device_goes_to_the_device(tmp_path, monkeypatch):
    from runs.files import output_file

    with output_file("/dev/null") as target:
        assert target == Path("/dev/null")
    (tmp_path / "real").write_text("old", encoding="utf8")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with output_file(tmp_path / "link") as target:
        target.write_text("new", encoding="utf8")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text(encoding="utf8") == "new"


# ---------------------------------------------------------------------------- the audit


def test_audit_1_batches_keep_their_limit_with_bpe_dropout(tiny_config):
    config = replace(tiny_config, tokenizer="bpe", vocab_size=500, shared_vocab=True, bpe_dropout=0.2, batch_tokens=256)
    data = get_ds(config)[0]
    fallen_back = total = 0
    for positions in Batches(data, config, epoch=0):
        batch = data[positions]
        for name in ("encoder_input", "decoder_input"):
            assert batch[name].numel() <= 256 or len(positions) == 1
        plain = data.encoded[positions]["src_ids"].to_pylist()
        ids = [[i for i in row if i != 1] for row in batch["encoder_input"].tolist()]
        fallen_back += sum(a == b for a, b in zip(ids, plain, strict=True))
        total += len(plain)
    assert fallen_back < 0.25 * total  # most sentences are re-segmented; short ones may stay as they are by chance
