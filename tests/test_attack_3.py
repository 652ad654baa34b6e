"""The third attack: each test repeats a finding of benchmarks/faults.md that an earlier version had."""

import contextlib
import gzip
import json
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from test_attack import EXPORT, RESUME, folder, limit_time, one_error, run, trained  # noqa: F401
from test_bad_input import contents, file

from config import InputError, get_config
from convert import read_weights
from corpora.sources import load_pairs
from corpora.streams import open_stream
from course import grade
from runs.checkpoint import load_checkpoint
from runs.files import check_outputs
from runs.folder import RunFolder
from training.streaming import StreamedPairs
from translate import Translator, repeat_run_dir, word_attention

# ---------------------------------------------------------------------------- data loss

OVERWRITING = {
    "page over its sentences": ("visualize --run-dir run --file text --html text", "text is named twice"),
    "translations over the source": (
        "evaluate --run-dir run --source text --reference text2 --output text",
        "text is named twice",
    ),
    "translations over the reference, through a link": (
        "evaluate --run-dir run --source text --reference text2 --output link",
        "link is named twice",
    ),
    "translations over the config": ("evaluate --run-dir run --output run/config.json", "is a file of a run"),
    "page over a checkpoint": ("visualize --run-dir run 'I see.' --html run/tmodel_01.pt", "is a file of a run"),
    "trace over a tokenizer": ("visualize --run-dir run 'I see.' --save run/tokenizer_en.json", "is a file of a run"),
    "page and trace in one file": ("visualize --run-dir run 'I see.' --html new --save new", "new is named twice"),
    "report and table in one file": ("experiments --run-dir run 'I see.' --html new --csv ./new", "is named twice"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="links need permissions there")
@pytest.mark.parametrize("name", OVERWRITING)
def test_output_does_not_replace_inputs_or_files_of_a_run(folder, run, name):  # noqa: F811
    for text in ("text", "text2"):
        file(text, "I see.\n")(folder)
    (folder / "link").symlink_to("text2")
    before = contents(folder)
    command, message = OVERWRITING[name]
    assert message in one_error(*run(command))
    assert contents(folder) == before


def test_an_earlier_page_may_be_replaced_and_devices_may_be_written_twice(tmp_path):
    (tmp_path / "page.html").touch()
    check_outputs([str(tmp_path / "page.html"), "", ""], ["", str(tmp_path / "other")])


def test_a_copy_that_was_trained_in_another_way_does_not_share_a_mirror(folder, run):  # noqa: F811
    shutil.copytree("run", "other")
    assert run(RESUME)[0] == 0
    assert run("train --run-dir other --num-epochs 4 --lr 1e-4 --device cpu --mirror-dir mirror")[0] == 0
    before = contents(folder)
    assert "mirror holds a copy of another run" in one_error(*run(f"{RESUME} --mirror-dir mirror"))
    assert contents(folder) == before


def test_a_run_that_is_behind_its_mirror_continues_from_it(folder, run):  # noqa: F811
    shutil.copytree("run", "behind")
    assert run(f"{RESUME} --mirror-dir mirror")[0] == 0
    status, output = run("train --run-dir behind --num-epochs 3 --device cpu --mirror-dir mirror")
    assert status == 0
    assert "restored from mirror" in output


# ---------------------------------------------------------------------------- silently wrong results


@pytest.mark.parametrize("mixed", ["scores.jsonl", "tmodel_02.pt"])
def test_files_of_two_copies_of_a_run_are_not_mixed(folder, run, mixed):  # noqa: F811
    shutil.copytree("run", "other")
    assert run(RESUME)[0] == 0
    assert run("train --run-dir other --num-epochs 3 --lr 1e-4 --device cpu")[0] == 0
    assert run("translate --run-dir run --weights 2 --device cpu eat")[0] == 0
    shutil.copy(f"other/{mixed}", "run")
    before = contents(folder)
    for command in ("translate --run-dir run --weights 2 --device cpu eat", f"{RESUME} --preload 2"):
        assert "different copies of this run" in one_error(*run(command))
    assert contents(folder) == before


def workbook(path: Path, rows: list[list[str]], dimension: str) -> None:
    """Writes a workbook that declares this size."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path.with_suffix(".tmp"))
    with zipfile.ZipFile(path.with_suffix(".tmp")) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            text = old.read(name)
            if name.endswith("sheet1.xml"):
                text = re.sub(rb'<dimension ref="[^"]*"', f'<dimension ref="{dimension}"'.encode(), text)
            new.writestr(name, text)


@pytest.mark.parametrize("dimension", ["A1:B2", "A1:A5", "A1"])
def test_rows_beyond_the_declared_size_of_a_workbook_are_read(tmp_path, dimension):
    workbook(tmp_path / "a.xlsx", [["en", "it"]] + [["I see.", "Vedo."]] * 4, dimension)
    pairs = load_pairs(str(tmp_path / "a.xlsx"), get_config("toy"))
    assert (list(pairs["src"]), list(pairs["tgt"])) == (["I see."] * 4, ["Vedo."] * 4)


def test_a_cell_far_away_does_not_fill_memory(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["I see.", "Vedo."])
    book.active["XFD1"], book.active["A20000"], book.active["B20000"] = "far", "I see.", "Vedo."
    book.save(tmp_path / "a.xlsx")
    limit_time()
    assert len(load_pairs(str(tmp_path / "a.xlsx"), get_config("toy"))) == 20_000


TMX = '<?xml version="1.0"?>{}<tmx><body><tu>{}</tu></body></tmx>'
UNIT = '<tuv xml:lang="en"><seg>I {} see.</seg></tuv><tuv xml:lang="it"><seg>Vedo.</seg></tuv>'


def test_a_tmx_file_with_an_entity_that_is_declared_elsewhere_is_refused(tmp_path):
    path = tmp_path / "a.tmx"
    path.write_text(TMX.format('<!DOCTYPE tmx SYSTEM "tmx14.dtd">', UNIT.format("&not;")), encoding="utf8")
    with pytest.raises(InputError, match="uses the undefined XML entity &not; replace it by its text"):
        load_pairs(str(path), get_config("toy"))
    path.write_text(TMX.format('<!DOCTYPE tmx SYSTEM "tmx14.dtd">', UNIT.format("&amp;")), encoding="utf8")
    assert load_pairs(str(path), get_config("toy"))["src"][0] == "I & see."


def test_an_export_with_weights_that_are_not_finite_is_not_used(folder, run):  # noqa: F811
    assert run(EXPORT)[0] == 0
    (folder / "out" / "model.safetensors.sha256").unlink()
    weights = safetensors.torch.load_file("out/model.safetensors")
    safetensors.torch.save_file({name: w * float("nan") for name, w in weights.items()}, "out/model.safetensors")
    assert "is not finite; export the run again" in one_error(*run("translate --run-dir out 'I see.'"))


@pytest.mark.parametrize("text", ["", "0  other\n"])
def test_a_checksum_file_without_the_weights_is_refused(folder, run, text):  # noqa: F811
    assert run(EXPORT)[0] == 0
    file("out/model.safetensors.sha256", text)(folder)
    assert "has no checksum of model.safetensors" in one_error(*run("translate --run-dir out 'I see.'"))


@pytest.mark.parametrize("change", [lambda w: w * float("nan"), lambda w: w.long(), lambda w: "text"])
def test_weights_of_the_tutorial_are_checked(tmp_path, change):
    torch.save({"model_state_dict": {"a": change(torch.ones(2))}}, tmp_path / "t.pt")
    with pytest.raises(InputError, match=r"no checkpoint of the tutorial's train.py \("):
        read_weights(tmp_path / "t.pt")
    torch.save({"model_state_dict": {5: torch.ones(2)}}, tmp_path / "t.pt")
    with pytest.raises(InputError, match="entries other than weights"):
        read_weights(tmp_path / "t.pt")


def test_a_lost_identity_is_that_of_the_checkpoint(folder, run):  # noqa: F811
    identity = RunFolder("run").run_id
    for name in ("run_id", "scores.jsonl"):
        (folder / "run" / name).unlink()
    assert run(RESUME)[0] == 0
    assert RunFolder("run").run_id == identity
    assert {load_checkpoint(path)["run_id"] for path in RunFolder("run").checkpoints()} == {identity}


# ---------------------------------------------------------------------------- refused wrongly


def test_checkpoints_that_a_training_process_removes_meanwhile_are_replaced_by_newer_ones(folder, monkeypatch, capsys):  # noqa: F811
    listed, listings = RunFolder.candidates, []

    def outdated_at_first(*arguments):
        listings.append(listed(*arguments))
        return [folder / "run" / "tmodel_removed.pt", listings[0][0]] if len(listings) == 1 else listings[-1]

    monkeypatch.setattr(RunFolder, "candidates", outdated_at_first)
    path, _, state = RunFolder("run").load_weights("best", 2)
    assert (len(listings), path, state["name"]) == (2, listings[1][0], path.name)
    assert "skipped" not in capsys.readouterr().err


# ---------------------------------------------------------------------------- hanging


def test_a_tmx_file_with_an_endless_tag_is_refused_soon(tmp_path):
    path = tmp_path / "a.tmx.gz"
    path.write_bytes(gzip.compress(b'<tmx a="' + b"x" * 50_000_000))
    limit_time()
    with pytest.raises(InputError, match="has a tag of more than 1,048,576 bytes; export it again"):
        load_pairs(str(path), get_config("toy"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="special files of Unix")
def test_a_shard_that_is_no_regular_file_is_refused(tmp_path):
    config = get_config("toy", stream=True, datasource=f"{tmp_path}/*.jsonl", max_steps=1)
    os.mkfifo(tmp_path / "a.jsonl")
    limit_time()
    with pytest.raises(InputError, match=r"a\.jsonl is not a file; remove it"):
        open_stream(config)
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.jsonl").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"a\.jsonl is not a file; remove it"):
        open_stream(config)


# ---------------------------------------------------------------------------- unclear words


def test_scores_without_the_identity_of_the_run_name_the_missing_file(folder, run):  # noqa: F811
    identity = RunFolder("run").run_id
    (folder / "run" / "run_id").unlink()
    line = one_error(*run("translate --run-dir run 'I see.'"))
    assert f"run_id is missing; restore it: a text file with {identity}" in line
    file("run/run_id", identity + "\n")(folder)
    assert run("translate --run-dir run 'I see.'")[0] == 0


def test_an_exchanged_tokenizer_is_not_called_another_corpus(folder, run):  # noqa: F811
    path = folder / "run" / "tokenizer_en.json"
    tokenizer = json.loads(path.read_text(encoding="utf8"))
    vocabulary = tokenizer["model"]["vocab"]
    a, b, *_ = (word for word in vocabulary if not word.startswith("["))
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(tokenizer), encoding="utf8")
    assert "tokenizer_en.json is not the tokenizer that" in one_error(*run(RESUME))


def test_a_further_folder_without_a_run_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no_run").mkdir()
    assert repeat_run_dir(["--run-dir", "a", "no_run", "I see."]) == ["--run-dir", "a", "--run-dir", "no_run", "I see."]


# ---------------------------------------------------------------------------- tracebacks


def test_a_translation_as_long_as_the_model_allows_has_an_alignment(folder):  # noqa: F811
    translator = Translator.load("run", "cpu")
    ids = [5] * translator.config.seq_len
    _, target, weights = word_attention(translator, "I see.", ids)
    assert len(target) == weights.shape[-2] == translator.config.seq_len - 1


POSITIONS = [
    {"shards": [[99, 0]]}, {"shards": [[-1, 0]]}, {"shards": [["a", 0]]}, {"epoch": "x"}, {"processes": []},
    {"processes": [{"turn": 7, "cursors": [[0, 0, 0, [0, 0, 0, 0]]]}]},
    {"processes": [{"turn": 0, "cursors": [[9, 0, 0, [0, 0, 0, 0]]]}]},
    {"processes": [{"turn": 0, "cursors": [[0, -1, 0, [0, 0, 0, 0]]]}]},
    {"processes": [{"turn": 0, "cursors": [[0, 0, -1, [0, 0, 0, 0]]]}]},
]  # fmt: skip


@pytest.mark.parametrize("change", POSITIONS, ids=str)
def test_a_position_that_no_stream_has_is_refused(change):
    good = {"epoch": 0, "shards": [[0, 0]], "processes": [{"turn": 0, "cursors": [[0, 0, 1, [1, 0, 0, 0]]]}]}
    stream = StreamedPairs(get_config("toy"), SimpleNamespace(names=["a"]), 1, None)
    stream.load_state_dict(good)
    with pytest.raises(ValueError, match="position in the stream"):
        stream.load_state_dict(good | change)


# ---------------------------------------------------------------------------- grading


@pytest.mark.parametrize("statement", ["os._exit(0)", "sys.exit(0)", "os.write(1, b'no result'); os._exit(0)"])
def test_a_function_that_ends_the_process_does_not_stop_the_grading(tmp_path, monkeypatch, statement):
    path = tmp_path / "s.py"
    path.write_text(f"import os, sys\n\ndef embeddings(ids, weight):\n    {statement}\n", encoding="utf8")
    in_this_process(monkeypatch)
    assert "s.py   0 of 12" in grade.table([path])


def test_messages_of_a_class_hold_no_control_characters(tmp_path, monkeypatch):
    path = tmp_path / "s.py"
    code = "def embeddings(ids, weight):\n    raise ValueError(chr(27) + '[2J forged')\n"
    path.write_text(code, encoding="utf8")
    in_this_process(monkeypatch)
    table = grade.table([path])
    assert "forged" in table
    assert "\x1b" not in table


def in_this_process(monkeypatch) -> None:
    """Makes the grading start a fork of this process, which has imported PyTorch."""
    if not hasattr(os, "fork"):
        pytest.skip("forks of Unix")

    def run_forked(command, timeout, **_):
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            os.dup2(writer, 1)
            status = 1
            with contextlib.suppress(BaseException):
                os.write(1, json.dumps(grade.grade_file(Path(command[-1]))).encode())
                status = 0
            os._exit(status)
        os.close(writer)
        with open(reader, encoding="utf8") as file:
            output = file.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return SimpleNamespace(returncode=status, stdout=output, stderr="")

    monkeypatch.setattr(grade.subprocess, "run", run_forked)
