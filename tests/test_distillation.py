"""Training on the translations of another run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from config import Config, InputError
from corpora.sources import load_split
from runs.checkpoint import weights_crc32
from runs.folder import RunFolder
from train import train_model
from training import distillation
from translate import Translator

PAIRS = 30


@pytest.fixture
def teacher(trained_run) -> str:
    return str(trained_run)


@pytest.fixture
def student(teacher, tmp_path, monkeypatch) -> Config:
    """The config of a student on a few pairs of the teacher's corpus."""
    monkeypatch.setattr(distillation, "PAIRS_AT_A_TIME", 8)
    config = RunFolder(teacher).load_config()
    pairs = load_split(config, "train").select(range(PAIRS))
    rows = ({config.lang_src: row["src"], config.lang_tgt: row["tgt"]} for row in pairs)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return replace(
        config,
        datasource=str(tmp_path / "pairs.jsonl"),
        run_dir=str(tmp_path / "student"),
        distill_from=teacher,
        num_epochs=1,
        mirror_dir="",
    )


def file_of(config: Config) -> Path:
    return RunFolder.of(config).distilled_file


def lines(config: Config) -> list[dict]:
    return [json.loads(line) for line in file_of(config).read_text(encoding="utf8").splitlines()]


def test_the_student_learns_the_translations_of_the_teacher(teacher, student):
    sources = load_split(student, "train")["src"]
    expected = Translator.load(teacher, "cpu").translate(list(sources), 5, 0.6)
    train_model(student)
    found = lines(student)
    assert [line["it"] for line in found] == expected
    assert [line["en"] for line in found] == list(sources)
    assert expected != list(load_split(student, "train")["tgt"])
    train_model(replace(student, num_epochs=2, distill_from=teacher))  # resumes with the same corpus


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat cat cat", True),
        ("he said & quot ; & quot", False),
        ("ein hut , & x & x & x", True),
        ("a b c a b c a b c", False),
        ("that that is is that that", False),
        ("cat cat", False),
        ("cat catcat cat", False),
        ("", False),
    ],
)
def test_repetitions_are_recognized(text, expected):
    assert distillation.is_repetitive(text) is expected


def test_repetitive_translations_are_skipped(student, monkeypatch, capsys):
    translate = Translator.translate

    def translate_with_loops(self, sentences, *arguments, **options):
        found = translate(self, sentences, *arguments, **options)
        return ["loop loop loop", *found[1:]] if arguments else found  # validation gives no search settings

    monkeypatch.setattr(Translator, "translate", translate_with_loops)
    train_model(student)
    chunks = -(-PAIRS // 8)
    assert [line["it"] for line in lines(student)].count("") == chunks
    printed = capsys.readouterr().out
    assert f"{chunks} repetitive translations: skipped" in printed
    assert f"skipped in training: {chunks} pairs with a blank side" in printed


def test_a_repetition_of_the_source_may_be_translated(student, monkeypatch):
    monkeypatch.setattr(Translator, "translate", lambda self, sentences, *_, **__: ["no no no"] * len(sentences))
    monkeypatch.setattr(distillation, "is_repetitive", lambda text: text == "no no no" or text.startswith("I "))
    monkeypatch.setattr("train.run_validation", lambda *_: {"loss": 1.0})
    train_model(student)
    assert any(line["it"] for line in lines(student))
    assert all((line["it"] == "no no no") == line["en"].startswith("I ") for line in lines(student))


def test_translating_resumes_after_a_kill(student, monkeypatch):
    train_model(student)
    whole = file_of(student).read_bytes()
    shutil.rmtree(student.run_dir)
    Path(student.run_dir).mkdir()
    file_of(student).write_bytes(whole[: whole.index(b"\n", 2_000) - 20])  # within a line
    translated = []
    translate = Translator.translate
    monkeypatch.setattr(
        Translator, "translate", lambda self, s, *a, **k: translated.extend(s) or translate(self, s, *a, **k)
    )
    monkeypatch.setattr("train.run_validation", lambda *_: {"loss": 1.0})
    train_model(student)
    assert file_of(student).read_bytes() == whole
    assert 0 < len(translated) < PAIRS


def test_translations_survive_an_error(student, monkeypatch):
    def full(*_):
        raise InputError("cannot write: no space left")

    append = distillation.append
    monkeypatch.setattr(distillation, "append", lambda path, text: full() if path.exists() else append(path, text))
    with pytest.raises(InputError, match="no space left"):
        train_model(student)
    assert len(lines(student)) == 8


def test_a_run_that_has_begun_needs_its_teacher_no_longer(student, teacher, tmp_path):
    gone = shutil.copytree(teacher, tmp_path / "gone")
    student = replace(student, distill_from=str(gone))
    train_model(student)
    shutil.rmtree(gone)
    assert train_model(replace(student, num_epochs=2)).progress.epoch == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lang_src": "it", "lang_tgt": "en"}, "translates en to it"),
        ({"distill_from": "nowhere"}, "nowhere"),
        ({"run_dir": None}, "is the run of the teacher"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(student, teacher, change, message):
    change = {name: teacher if value is None else value for name, value in change.items()}
    with pytest.raises(InputError, match=message):
        train_model(replace(student, preload="none" if "run_dir" in change else "latest", **change))
    assert not Path(student.run_dir).exists()


def test_the_same_teacher_is_recognized_in_any_precision(student):
    teacher, identity = distillation.load_teacher(student, RunFolder.of(student))
    teacher.use_precision("bf16")
    assert distillation.load_teacher(student, RunFolder.of(student))[1] == identity
    assert f"{weights_crc32(teacher.model.state_dict()):08x}" != identity


@pytest.mark.parametrize("lines", [10, PAIRS])
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"teacher": "', '"teacher": "0', "with weights other than the current best ones of"),
        ('"en": "', '"en": "Other ', "line 1 of .* is not pair 1 of"),
        ('"it": "', '"it": ["', "is damaged in line 1; remove it"),
        ('{"en": "', "[" * 100_000, "is damaged in line 1; remove it"),
    ],
)
def test_other_translations_are_refused_before_translating_and_stay(student, monkeypatch, lines, old, new, message):
    train_model(student)
    path = file_of(student)
    good = path.read_text(encoding="utf8")
    bad = "".join(good.replace(old, new, 1).splitlines(keepends=True)[:lines])
    shutil.rmtree(student.run_dir)
    path.parent.mkdir()
    path.write_text(bad, encoding="utf8")
    monkeypatch.setattr(distillation, "append", None)  # nothing may be written
    with pytest.raises(InputError, match=message) as error:
        train_model(student)
    assert "\n" not in str(error.value)
    assert path.read_text(encoding="utf8") == bad


def test_a_file_that_is_no_translation_is_not_overwritten(student):
    file_of(student).parent.mkdir()
    file_of(student).write_text("my notes", encoding="utf8")
    with pytest.raises(InputError, match="is damaged in line 1"):
        train_model(student)
    assert file_of(student).read_text(encoding="utf8") == "my notes"


def test_resuming_leaves_the_translations_untouched_and_names_missing_ones(student):
    train_model(student)
    path = file_of(student)
    before = path.stat().st_mtime_ns
    train_model(replace(student, num_epochs=2))
    assert path.stat().st_mtime_ns == before
    path.unlink()
    with pytest.raises(InputError, match=r"distilled\.jsonl .* is missing; restore it"):
        train_model(replace(student, num_epochs=3))
