"""Bad and unusual input: the exit status, a one-line error with the remedy, and no change on disk.

Each case prepares a folder and gives a command line, which is run in this process as the script would run it.
"""

import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import checkpoints

import evaluate
import experiments
import export
import train
import translate
import visualize
from config import parse, run_command
from corpora.toy import toy_pairs
from runs import checkpoint
from training import batches, losses
from training.log import TrainingLog

SCRIPTS = {
    "train": train.main,
    "translate": lambda argv: parse(translate.main, argv),
    "evaluate": lambda argv: parse(evaluate.main, argv),
    "visualize": lambda argv: parse(visualize.main, argv),
    "experiments": lambda argv: parse(experiments.main, argv),
    "export": lambda argv: parse(export.main, argv),
}

TRAIN_TINY = (
    "train --preset toy --datasource pairs.tsv --validation-source= --test-source= --run-dir run --d-model 32 "
    "--d-ff 64 --num-heads 2 --encoder-layers 1 --decoder-layers 1 --num-epochs 2 --validation-sentences 2 "
    "--validation-examples 0 --device cpu"
)


@dataclass
class Case:
    """An input: a name, the command line, the expected output and exit status, and how the folder is prepared."""

    name: str
    command: str
    output: str  # regular expression, searched for in the error line if the status is 2, otherwise in all output
    prepare: Callable[[Path], object] = lambda folder: None
    status: int = 2
    stdin: bytes = b""


def file(name: str, content: str | bytes) -> Callable[[Path], object]:
    """Writes a file. Like the functions below, it returns what a case calls with its folder."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def files(**contents: str | bytes) -> Callable[[Path], object]:
    """Writes several files; the keyword a_en stands for a.en."""
    return lambda folder: [file(name.replace("_", "."), content)(folder) for name, content in contents.items()]


def edit_config(**values) -> Callable[[Path], object]:
    """Changes values in the run's config.json."""

    def change(folder: Path) -> None:
        path = folder / "run" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def damage_newest(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Changes the bytes of the newest checkpoint."""

    def damage(folder: Path) -> None:
        path = checkpoints(folder / "run")[-1]
        path.write_bytes(change(path.read_bytes()))

    return damage


def overwrite_checkpoints(content: bytes) -> Callable[[Path], object]:
    """Writes the same content into every checkpoint."""
    return lambda folder: [path.write_bytes(content) for path in checkpoints(folder / "run")]


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("code_has_run"),)


def make_malicious(folder: Path) -> None:
    """Replaces every checkpoint by one that would create a file if its pickle were executed."""
    for path in checkpoints(folder / "run"):
        torch.save({"model": Malicious()}, path)
        checkpoint._seal(path)


def make_newer(folder: Path) -> None:
    """Raises the schema version of the newest checkpoint."""
    path = checkpoints(folder / "run")[-1]
    torch.save({**torch.load(path, weights_only=True), "schema": 99}, path)
    checkpoint._seal(path)


def replace_newest_by_other_run(folder: Path) -> None:
    """Replaces the newest checkpoint by one of a run with another seed, under the same name."""
    path = checkpoints(folder / "run")[-1]
    state = torch.load(path, weights_only=True)
    torch.save({**state, "config": {**state["config"], "seed": 7}}, path)
    checkpoint._seal(path)


def shorten_corpus(folder: Path) -> None:
    path = folder / "pairs.tsv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-9]))


def train_new(source: str, *more: str) -> str:
    """The command that trains a new run on this source."""
    return " ".join([TRAIN_TINY.replace("pairs.tsv", source).replace("--run-dir run", "--run-dir new"), *more])


NEW = train_new("pairs.tsv")
RESUME = "train --run-dir run --num-epochs 3 --device cpu"
TRANSLATE = "translate --run-dir run"

CASES = [
    # data
    Case("missing file", train_new("none.tsv"), r"no file none\.tsv; give the path"),
    Case("missing pair of text files", train_new("./none"), r"no \./none\.en and no folder"),
    Case("missing text file of one language", train_new("a"), r"no file a\.it; line n of", files(a_en="1\n")),
    Case("missing validation file", train_new("pairs.tsv", "--validation-source none.tsv"), r"no file none\.tsv"),
    Case(
        "text file instead of the prefix", train_new("./a.en"), r"common prefix, \./a$", files(a_en="1\n", a_it="1\n")
    ),
    Case("source without a name", train_new(":train"), "has no name; give one"),
    Case("empty file", train_new("a.tsv"), r"a\.tsv contains no pairs; give", file("a.tsv", "")),
    Case(
        "empty validation file",
        train_new("pairs.tsv", "--validation-source a.tsv"),
        "contains no pairs",
        file("a.tsv", ""),
    ),
    Case("empty folder", train_new("./empty"), "folder ./empty cannot be read", lambda f: (f / "empty").mkdir()),
    Case("unequal counts", train_new("a"), r"2 lines and a\.it has 1; line n", files(a_en="1\n2\n", a_it="1\n")),
    Case("not UTF-8", train_new("a"), r"a\.it line 2 is not UTF-8; convert", files(a_en="1\n2\n", a_it=b"1\n\xff\n")),
    Case("one column", train_new("a.tsv"), r"a\.tsv row 1 has one column; give", file("a.tsv", "one\n")),
    Case("not JSON", train_new("a.jsonl"), "line 1 is not JSON .*; give one object", file("a.jsonl", "{\n")),
    Case(
        "number instead of a text",
        train_new("a.jsonl"),
        "en is 1; give a string",
        file("a.jsonl", '{"en": 1, "it": "1"}\n'),
    ),
    Case(
        "null translation",
        train_new("a.jsonl"),
        "row 1 has no language 'en'",
        file("a.jsonl", '{"translation": null}\n'),
    ),
    Case(
        "missing language", train_new("a.csv"), "no language 'it'; it has en, fr: change", file("a.csv", "en,fr\n1,2\n")
    ),
    Case("not Parquet", train_new("a.parquet"), "is not a Parquet file .*; write it again", file("a.parquet", "no")),
    Case("not gzip", train_new("a.tsv.gz"), "a.tsv.gz is damaged or not compressed", file("a.tsv.gz", "1\t2\n")),
    Case("not TMX", train_new("a.tmx"), "a.tmx is not a TMX file .*; export it again", file("a.tmx", "<tmx>")),
    Case("unsupported format", train_new("a.txt"), r"a\.txt has another format; give one of", file("a.txt", "1\n")),
    Case("all pairs too long", NEW + " --seq-len 3", "no pairs remain: .* exceed 3 tokens; raise --seq-len"),
    Case(
        "all pairs blank",
        train_new("a.tsv"),
        "no word occurs twice|no pairs remain: 20 are blank",
        file("a.tsv", " \t \n" * 20),
    ),
    Case(
        "too few pairs to split", train_new("a.tsv"), "pairs are too few to split off 10%", file("a.tsv", "1\t2\n" * 5)
    ),
    Case(
        "source and target language are the same",
        NEW + " --lang-tgt en",
        "lang_tgt is 'en'; give two different languages",
    ),
    Case("unknown toy language", "train --preset toy --lang-tgt fr", "no language 'fr'; it has en, it, de"),
    Case("unknown toy split", "train --datasource toy:tset --run-dir new", "no split 'tset'; it has train"),
    Case("Hub unreachable", "train --run-dir new", "opus_books' cannot be reached .*; give local files"),
    Case("corpus changed", RESUME, "the corpus has changed since .* restore it", shorten_corpus),
    Case(
        "byte-order mark, carriage returns, line separators",
        train_new("a"),
        "18 training pairs",
        files(a_en="\ufeffI see\u2028 it.\r\n" * 20, a_it="Vedo.\r\n" * 20),
        0,
    ),
    Case(
        "blank sides",
        train_new("a.tsv"),
        "skipped in training: .* pairs with a blank side",
        file("a.tsv", "I see.\tVedo.\n" * 30 + "\tVedo.\n" * 30),
        0,
    ),
    Case("some pairs too long", NEW + " --seq-len 9", r"[1-9]\d* with more than 9 tokens \(--seq-len\)", status=0),
    Case(
        "pairs in both training and validation set",
        train_new("pairs.tsv", "--validation-source pairs.tsv"),
        "validation pairs that are also in the training set",
        status=0,
    ),
    Case("fewer pairs than a batch", train_new("a.tsv"), "trained in", file("a.tsv", "I see.\tVedo.\n" * 12), 0),
    # config
    Case("unknown setting", NEW + " --d-modle 8", "unknown flag --d-modle .did you mean --d-model"),
    Case("word instead of a number", NEW + " --d-model eight", "d-model.*eight"),
    Case("num_heads does not divide d_model", NEW + " --num-heads 5", "d_model is 32; give a multiple of num_heads .5"),
    Case("negative batch", NEW + " --batch-tokens -1", "batch_tokens is -1; give 0 or more"),
    Case("zero epochs", NEW + " --num-epochs 0", "num_epochs is 0; give a number above 0"),
    Case("zero learning rate", NEW + " --lr 0", r"lr is 0\.0; give a number above 0"),
    Case("lr is not a number", NEW + " --lr nan", "lr is nan"),
    Case("dropout of 1", NEW + " --dropout 1", r"dropout is 1\.0; give a number from 0"),
    Case("seq_len too small for a word", NEW + " --seq-len 2", "seq_len is 2; give 3 or more"),
    Case("language name that is a path", NEW + " --lang-tgt ../x", "lang_tgt is '../x'; give letters"),
    Case("unknown preset", "train --preset tutorail", "no preset 'tutorail' .did you mean tutorial"),
    Case("tied embeddings without a shared vocabulary", NEW + " --share-embeddings all", "needs --shared-vocab"),
    Case(
        "BPE-dropout with a word tokenizer",
        NEW + " --bpe-dropout 0.1",
        "bpe_dropout is 0.1; a word tokenizer has no merges",
    ),
    Case("invalid preload", NEW + " --preload newest", "preload is 'newest'; give latest"),
    Case(
        "unknown setting in config.json",
        TRANSLATE + " hi",
        "unknown setting 'd_modell' .did you mean d_model",
        edit_config(d_modell=8),
    ),
    Case(
        "text instead of a number in config.json",
        TRANSLATE + " hi",
        "d_model is '8', of type str; give a int",
        edit_config(d_model="8"),
    ),
    Case(
        "language name in config.json that is a path",
        TRANSLATE + " hi",
        "lang_tgt is '../x'",
        edit_config(lang_tgt="../x"),
    ),
    Case("config.json is not JSON", TRANSLATE + " hi", r"config\.json: .*restore", file("run/config.json", "{")),
    Case(
        "different architecture than the checkpoint", RESUME + " --d-ff 96", "d_ff 64 there, 96 now; give the same ones"
    ),
    Case("all epochs already trained", "train --run-dir run", "nothing left to train: 2 epochs", status=0),
    # command lines
    Case("unknown flag", TRANSLATE + " --beam_sice 3 hi", "unknown flag --beam_sice .did you mean --beam-size"),
    Case("two sentences", TRANSLATE + " hi there", "unknown extra argument there"),
    Case("beam size of 0", TRANSLATE + " --beam-size 0 hi", "--beam-size is 0; give 1"),
    Case(
        "n-best larger than the beam",
        TRANSLATE + " --beam-size 2 --n-best 3 hi",
        "--n-best is 3; give 1 to --beam-size .2",
    ),
    Case(
        "unknown epoch", TRANSLATE + " --weights 7 hi", r"no weights '7' .* give best, latest or one of tmodel_00\.pt"
    ),
    Case(
        "more checkpoints to average than there are",
        TRANSLATE + " --average 7 hi",
        "2 of the checkpoints .* --average needs 7; lower --average",
    ),
    Case("source without reference", "evaluate --run-dir run --source pairs.tsv", "go together; give both"),
    Case("missing text", "evaluate --run-dir run --source a.en --reference a.it", r"no file a\.en"),
    Case("no sentences", "experiments --run-dir run --sentences 0 hi", "--sentences is 0; give 1 or more"),
    Case("damaged trace", "visualize --trace-file pairs.tsv", "not a saved trace .damaged, or of another kind"),
    Case(
        "folder that cannot be created", train_new("pairs.tsv").replace("new", "/proc/x"), "cannot (create|write into)"
    ),
    Case("no test split", "evaluate --run-dir run --split test", "no test_source; name one"),
    Case("output is a folder", "visualize --run-dir run --html run hi", "run is a folder; give the name of a file"),
    Case("output in a missing folder", "visualize --run-dir run --png no/a.png hi", "no folder no to write"),
    Case(
        "run folder is a file",
        train_new("pairs.tsv").replace("new", "pairs.tsv"),
        "pairs.tsv is a file; choose another",
    ),
    Case("folder without a run", "translate --run-dir nowhere hi", "no run in 'nowhere'"),
    Case("no trained run in weights/", "translate hi", "no trained run in weights/; train one first"),
    # checkpoints
    Case(
        "no checkpoint yet",
        TRANSLATE + " hi",
        "has no checkpoint yet; train it",
        lambda f: [path.unlink() for path in checkpoints(f / "run")],
    ),
    Case("newest checkpoint truncated", RESUME, r"tmodel_01\.pt is skipped", damage_newest(lambda b: b[:-50]), 0),
    Case(
        "newest checkpoint with a changed byte",
        RESUME,
        r"tmodel_01\.pt is skipped",
        damage_newest(lambda b: b[:99] + b"?" + b[100:]),
        0,
    ),
    Case("all checkpoints empty", RESUME, "no checkpoint in run can be read; restore one", overwrite_checkpoints(b"")),
    Case(
        "all checkpoints empty, translating",
        TRANSLATE + " hi",
        "no checkpoint in run can be read",
        overwrite_checkpoints(b""),
    ),
    Case("malicious checkpoints", RESUME, "no checkpoint in run can be read", make_malicious),
    Case(
        "malicious checkpoints, translating",
        TRANSLATE + " hi",
        "no checkpoint in run can be read",
        make_malicious,
    ),
    Case(
        "checkpoint of a newer version",
        RESUME,
        "was written by a newer version of this project; update the project",
        make_newer,
    ),
    Case(
        "checkpoint of another run",
        RESUME,
        "was trained with other settings: seed 7 there, 42 now",
        replace_newest_by_other_run,
    ),
    Case("unknown epoch to resume from", RESUME + " --preload 7", r"no checkpoint .*tmodel_07\.pt; available"),
    Case(
        "tokenizer of another run",
        TRANSLATE + " hi",
        "is not the tokenizer that",
        lambda f: shutil.copy(f / "run/tokenizer_en.json", f / "run/tokenizer_it.json"),
    ),
    Case(
        "tokenizer missing",
        TRANSLATE + " hi",
        "no file .*tokenizer_it.json; the run's folder is incomplete",
        lambda f: (f / "run/tokenizer_it.json").unlink(),
    ),
    Case(
        "tokenizer corrupt",
        TRANSLATE + " hi",
        "is not a tokenizer .*copy the run's folder again",
        file("run/tokenizer_it.json", "{}"),
    ),
    Case("scores corrupt", RESUME, r"scores\.jsonl cannot be read", file("run/scores.jsonl", '{"epoch": 1')),
    Case("temporary file of a killed process", RESUME, "trained in", file("run/.tmodel_01.pt.99.tmp", "part"), 0),
    # sentences
    Case("nothing to translate", TRANSLATE + " ''", r"\A\n\Z", status=0),
    Case("sentence too long", TRANSLATE + f" '{'I ' * 99}'", "101 tokens exceeds the limit of 64 .* split it"),
    Case(
        "one line too long",
        TRANSLATE,
        "warning: line 2 is left blank",
        status=0,
        stdin=b"I see.\n" + b"I " * 99 + b"\n",
    ),
    Case("unknown words", TRANSLATE + " 'Quasars 5'", "not in the vocabulary of this run: Quasars, 5", status=0),
    Case(
        "emoji, right to left, control characters",
        TRANSLATE,
        r"\A[^\n]*\n\Z",
        status=0,
        stdin="😀 \u202eשלום\u202c \x07\x1b[31m\n".encode(),
    ),
    Case("stdin is not UTF-8", TRANSLATE, "stdin line 2 is not UTF-8", stdin=b"I see.\n\xff\n"),
    # environment
    Case("unknown device", TRANSLATE + " --device tpu hi", "no device 'tpu'; choose one of auto"),
    Case("data loader worker killed", NEW, "a data loader worker was killed.* lower --num-workers"),
    Case("out of memory", NEW, r"out of memory in a batch of \d+ sentences of \d+ tokens; lower --batch-tokens"),
    Case("disk full", NEW, "No space left on device; free some space"),
    Case("loss not finite", NEW, "loss nan .* in the batch that begins with .* the step was skipped"),
]
if not torch.cuda.is_available():
    CASES.append(Case("no CUDA device", NEW + " --device cuda", "no cuda device on this machine; use --device auto"))


def raising(error: Exception) -> Callable:
    def fail(*_, **__):
        raise error

    return fail


# Failures of the environment, by name of the case: object, attribute, replacement.
ENVIRONMENT = {
    "data loader worker killed": (
        batches,
        "islice",
        raising(RuntimeError("DataLoader worker (pid 7) is killed by signal")),
    ),
    "out of memory": (train, "train_step", raising(torch.OutOfMemoryError())),
    "disk full": (TrainingLog, "write", raising(OSError(28, "No space left on device"))),
    "loss not finite": (losses, "cross_entropy", lambda model, *_, **__: next(model.parameters()).sum() * float("nan")),
}


def train_tiny_run(folder: Path) -> Path:
    """Writes a corpus into a folder and trains a run of two epochs on it; returns the folder."""
    pairs = toy_pairs("en", "it", "train")[:100]
    (folder / "pairs.tsv").write_text("".join(f"{p.src_text}\t{p.tgt_text}\n" for p in pairs), encoding="utf8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(shlex.split(TRAIN_TINY)[1:])
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return train_tiny_run(tmp_path_factory.mktemp("bad"))


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_status_and_output_are_as_expected_and_errors_change_nothing(case, folder, tmp_path, monkeypatch, capsys):
    working_folder = tmp_path / "work"
    shutil.copytree(folder, working_folder)
    monkeypatch.chdir(working_folder)
    case.prepare(working_folder)
    if case.name in ENVIRONMENT:
        monkeypatch.setattr(*ENVIRONMENT[case.name])
    script, *argv = shlex.split(case.command)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(case.stdin)))
    before = contents(working_folder)
    status = 0
    try:
        run_command(SCRIPTS[script])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == case.status, err
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    if case.status == 0:
        assert not errors
        assert re.search(case.output, out if case.output.startswith(r"\A") else out + err, re.DOTALL), out + err
        assert not list(working_folder.rglob(".*.tmp"))
        return
    assert len(errors) == 1, err
    assert re.search(case.output, errors[0]), errors[0]
    if case.name not in ENVIRONMENT:
        assert contents(working_folder) == before
