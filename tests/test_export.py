"""Exported runs translate as the original does, in CTranslate2 and as safetensors."""

import hashlib
import os
from pathlib import Path

import ctranslate2
import pytest
import torch

from config import InputError, get_config
from corpora.sources import load_split
from dataset import build_word_tokenizer, load_tokenizer
from experiments import log_probability
from export import main, model_card, to_ctranslate2, to_safetensors, without_paths
from model import get_model
from runs.folder import RunFolder
from train import train_model
from translate import Translator

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def translator(trained_run) -> Translator:
    return Translator.load(trained_run, "cpu")


def translate_with_ctranslate2(folder, sentences: list[str], beam_size: int, **options) -> list[str]:
    """As docs/export.md shows, without a length penalty, whose formula differs in CTranslate2."""
    engine = ctranslate2.Translator(str(folder))
    source, target = (load_tokenizer(folder / f"tokenizer_{lang}.json") for lang in ("en", "it"))
    tokens = [source.encode(sentence).tokens for sentence in sentences]
    results = engine.translate_batch(tokens, beam_size=beam_size, length_penalty=0, **options)
    return [target.decode([target.token_to_id(token) for token in result.hypotheses[0]]) for result in results]


@pytest.mark.parametrize("beam_size", [1, 5])
def test_ctranslate2_gives_the_same_translations(trained_run, translator, tmp_path, beam_size):
    main(output_dir=str(tmp_path / "fast"), run_dir=str(trained_run))
    sentences = list(load_split(translator.config, "test")["src"])[:60]
    ours = translator.translate(sentences, beam_size, 0.0)
    assert translate_with_ctranslate2(tmp_path / "fast", sentences, beam_size) == ours


def test_ctranslate2_excludes_the_same_ngrams_in_greedy_search(trained_run, tmp_path):
    translator = Translator.load(trained_run, "cpu")
    to_ctranslate2(translator, tmp_path / "fast")
    sentences = ["A horse hears my white horse.", "Now your boy finds my famous boy."]
    repeated = translator.translate(sentences)
    ours = translator.translate(sentences, no_repeat_ngram=1)
    assert all(a != b for a, b in zip(ours, repeated, strict=True))
    assert translate_with_ctranslate2(tmp_path / "fast", sentences, 1, no_repeat_ngram_size=1) == ours


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_ctranslate2_gives_the_same_log_probabilities(tmp_path, norm):
    torch.manual_seed(0)
    config = get_config("toy", run_dir=str(tmp_path), norm=norm)
    pairs = load_split(config, "validation")
    tokenizers = [build_word_tokenizer(pairs[side], 1_000) for side in ("src", "tgt")]
    for lang, tokenizer in zip(("en", "it"), tokenizers, strict=True):
        RunFolder(tmp_path).tokenizer_file(lang).write_text(tokenizer.to_str(), encoding="utf8")
    model = get_model(config, *(tokenizer.get_vocab_size() for tokenizer in tokenizers)).eval()
    for name, parameter in model.named_parameters():
        if ".norm." in name:
            torch.nn.init.normal_(parameter, mean=1.0)
    translator = Translator(model, config, *tokenizers)
    to_ctranslate2(translator, tmp_path / "fast")
    source, target = (
        tokenizer.encode(pairs[side][0]) for tokenizer, side in zip(tokenizers, ("src", "tgt"), strict=True)
    )
    (scored,) = ctranslate2.Translator(str(tmp_path / "fast")).score_batch([source.tokens], [target.tokens])
    assert sum(scored.log_probs) == pytest.approx(log_probability(translator, pairs["src"][0], target.ids), abs=1e-3)


def test_int8_is_smaller_and_gives_nearly_the_same_translations(trained_run, translator, tmp_path):
    for name in ("float32", "int8"):
        main(output_dir=str(tmp_path / name), run_dir=str(trained_run), quantization=name)
    sizes = [(tmp_path / name / "model.bin").stat().st_size for name in ("float32", "int8")]
    assert sizes[1] < sizes[0] / 2
    sentences = list(load_split(translator.config, "test")["src"])[:60]
    pairs = zip(
        translate_with_ctranslate2(tmp_path / "int8", sentences, 1), translator.translate(sentences), strict=True
    )
    assert sum(a == b for a, b in pairs) > 50


@pytest.mark.parametrize("quantization", ["float32", "int8"])
def test_exporting_does_not_change_the_model(translator, tmp_path, quantization):
    before = {name: w.clone() for name, w in translator.model.state_dict().items()}
    to_ctranslate2(translator, tmp_path / quantization, quantization)
    assert all(torch.equal(w, before[name]) for name, w in translator.model.state_dict().items())


def test_safetensors_load_from_a_folder_or_from_the_hub(trained_run, translator, tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    main(output_dir=str(folder), run_dir=str(trained_run), form="safetensors")
    names = {path.name for path in folder.iterdir()}
    weights = {"model.safetensors", "model.safetensors.sha256"}
    assert names == weights | {"README.md", "config.json", "tokenizer_en.json", "tokenizer_it.json"}
    sentences = ["I can eat an apple.", "She sleeps."]
    assert Translator.load(folder, "cpu").translate(sentences) == translator.translate(sentences)
    weights = Translator.load(folder, "cpu").model.state_dict()
    assert all(torch.equal(w, weights[name]) for name, w in translator.model.state_dict().items())
    requested = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: requested.append(name) or str(folder))
    monkeypatch.chdir(tmp_path)
    assert Translator.load("somebody/something", "cpu").translate(sentences) == translator.translate(sentences)
    assert requested == ["somebody/something"]
    with pytest.raises(InputError, match="exported weights, which cannot be trained"):
        train_model(get_config("toy", run_dir=str(folder)))
    with pytest.raises(InputError, match="omit --weights and --average"):
        Translator.load(folder, "cpu", "latest")
    with pytest.raises(InputError, match="no run in 'weights/nothing'"):
        Translator.load("weights/nothing")  # weights/ is never a Hub user
    (folder / "model.safetensors").write_bytes(b"no")
    (folder / "model.safetensors.sha256").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        Translator.load(folder, "cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_it.json"])
def test_exports_with_a_changed_file_are_refused(translator, tmp_path, name):
    to_safetensors(translator, tmp_path)
    lines = [line.split() for line in (tmp_path / "model.safetensors.sha256").read_text().splitlines()]
    assert [hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() for _, file in lines] == [d for d, _ in lines]
    changed = bytearray((tmp_path / name).read_bytes())
    if name == "model.safetensors":
        changed[-1000] ^= 1
    else:
        changed += b"\n"
    (tmp_path / name).write_bytes(changed)
    with pytest.raises(InputError, match=f"{name} does not match"):
        Translator.load(tmp_path)
    (tmp_path / "model.safetensors.sha256").unlink()  # as in exports of earlier versions
    Translator.load(tmp_path)


def test_a_folder_that_is_not_empty_is_not_written_to(trained_run, tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(InputError, match="already exists"):
        main(output_dir=str(tmp_path), run_dir=str(trained_run))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_written_to_where_folders_cannot_be_replaced(trained_run, tmp_path, monkeypatch):
    """As on Windows. An empty folder may be given as a symbolic link."""
    replace = os.replace

    def replace_as_windows(source, target):
        if Path(target).is_dir():
            raise PermissionError(f"{target} exists")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_as_windows)
    monkeypatch.setattr(os, "rename", replace_as_windows)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / ".empty.tmp").mkdir()
    (tmp_path / ".empty.tmp" / "of a killed export").touch()
    main(output_dir=str(tmp_path / "link"), run_dir=str(trained_run), form="safetensors")
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link"]
    assert not (tmp_path / "empty" / "of a killed export").exists()


def test_the_model_card_says_where_the_module_is(translator):
    assert "in the folder of the project" in model_card(translator)
    assert "not the package of that name on PyPI" in " ".join(model_card(translator).split())


def test_a_safetensors_export_can_be_exported_to_its_own_folder(translator, tmp_path):
    to_safetensors(translator, tmp_path / "one")
    again = Translator.load(tmp_path / "one", "cpu")
    to_safetensors(again, tmp_path / "one")
    assert Translator.load(tmp_path / "one", "cpu").translate(["She sleeps."]) == translator.translate(["She sleeps."])


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("Helsinki-NLP/opus_books", "Helsinki-NLP/opus_books"),
        ("wmt/wmt14:validation", "wmt/wmt14:validation"),
        ("toy:test", "toy:test"),
        (os.path.abspath("secret/train"), "train"),
        ("../secret/a.jsonl,../secret/b.jsonl", "a.jsonl,b.jsonl"),
        ("secret/project/train", "train"),
    ],
)
def test_paths_are_not_published(source, name):
    assert without_paths(get_config("toy", datasource=source)).datasource == name
