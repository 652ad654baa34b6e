"""The toy runs in pretrained/ translate well, name no place of the machine that made them, and come after one's own."""

import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

import train
from config import InputError, get_config
from corpora.sources import load_split
from evaluate import score
from runs.folder import PRETRAINED, RunFolder
from translate import Translator

PRETRAINED_RUNS = [ROOT / path for path in PRETRAINED]


def name_of(path: Path) -> str:
    return path.name


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with the pretrained runs and no trained one, as after cloning."""
    shutil.copytree(ROOT / "pretrained", tmp_path / "pretrained")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("path", PRETRAINED_RUNS, ids=name_of)
def test_a_pretrained_run_has_a_bleu_of_99_or_more(path):
    translator = Translator.load(path, "cpu")
    pairs = load_split(translator.config, "test").select(range(200))
    assert score(translator.translate(list(pairs["src"])), list(pairs["tgt"]))["bleu"] >= 99


@pytest.mark.parametrize("path", PRETRAINED_RUNS, ids=name_of)
def test_a_pretrained_run_is_small_has_no_pickle_and_names_no_place(path):
    config = RunFolder(path).load_config()
    tokenizers = {f"tokenizer_{lang}.json" for lang in (config.lang_src, config.lang_tgt)}
    files = sorted(path.iterdir())
    weights = {"model.safetensors", "model.safetensors.sha256"}
    assert {file.name for file in files} == {"README.md", "config.json", *weights, *tokenizers}
    assert sum(file.stat().st_size for file in files) < 3.2e6
    for file in files:
        content = file.read_bytes()
        for place in (str(ROOT), str(Path.home()), "/tmp", "/home/", "weights/"):
            assert place.encode() not in content, (file, place)
    values = json.loads((path / "config.json").read_text(encoding="utf8"))
    assert not [value for value in values.values() if isinstance(value, str) and "/" in value]
    assert (config.datasource, config.preset) == ("toy", "toy")


def test_without_a_trained_run_the_first_pretrained_one_is_found_and_named(project, capsys):
    assert RunFolder.find().path == Path("pretrained/toy.en-it")
    assert capsys.readouterr().err.splitlines() == [
        f"no trained run in weights/; using {Path('pretrained/toy.en-it')}, which comes with the project"
    ]
    assert Translator.load(device="cpu").translate(["I can eat an apple."]) == ["Posso mangiare una mela."]


def test_a_trained_run_comes_before_the_pretrained_ones(project, capsys):
    own = RunFolder("weights/mine")
    own.create()
    own.save_config(get_config("toy"))
    own.checkpoint(1).touch()
    assert RunFolder.find().path == own.path
    assert capsys.readouterr().err == ""


def test_training_never_writes_into_a_pretrained_run(project):
    before = {path: path.stat().st_mtime_ns for path in project.rglob("*")}
    with pytest.raises(InputError, match="exported weights, which cannot be trained"):
        train.train_model(get_config("toy", run_dir="pretrained/toy.en-it"))
    assert {path: path.stat().st_mtime_ns for path in project.rglob("*")} == before


@pytest.mark.slow
def test_the_command_that_made_them_replaces_them(project, monkeypatch):
    """With training cut to three steps."""
    train_model = train.train_model
    short = {"max_steps": 3, "validation_sentences": 2, "device": "cpu"}
    monkeypatch.setattr(train, "train_model", lambda config: train_model(replace(config, **short)))
    weights = [project / path / "model.safetensors" for path in PRETRAINED]
    before = [path.read_bytes() for path in weights]
    runpy.run_path(str(project / "pretrained" / "make.py"), run_name="__main__")
    assert all(path.read_bytes() != old for path, old in zip(weights, before, strict=True))
    assert len(Translator.load(project / PRETRAINED[1], "cpu").translate(["She sleeps."])) == 1
    assert not (project / "weights").exists()
