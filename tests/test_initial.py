"""Fine-tuning: runs that start from the weights and tokenizers of another run (--init-from)."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from conftest import checkpoints, run_path
from test_train import final_state, is_identical

import train
from config import Config, InputError
from corpora.toy import toy_pairs
from dataset import BilingualDataset, build_bpe_tokenizer, get_ds
from export import to_safetensors
from runs.checkpoint import load_checkpoint
from runs.folder import RunFolder
from train import parse_config, train_model
from training import initial
from training.initial import load_initial_run, unknown_shares
from translate import Translator

NEW_WORDS = {"I": "Quasars", "apple": "pulsar"}  # not in the vocabulary of the base run


class Killed(BaseException):
    pass


def write_pairs(path: Path, pairs, new_words: dict[str, str] | None = None) -> str:
    lines = "".join(f"{pair.src_text}\t{pair.tgt_text}\n" for pair in pairs)
    for old, new in (new_words or {}).items():
        lines = lines.replace(old, new)
    path.write_text(lines, encoding="utf8")
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Config:
    """A run of two epochs on 360 pairs, with EMA; the fixtures of conftest.py are per test."""
    folder = tmp_path_factory.mktemp("base")
    source = write_pairs(folder / "pairs.tsv", toy_pairs("en", "it", "train")[:400])
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_heads": 2, "d_ff": 64, "batch_tokens": 512}
    quick = {"num_epochs": 2, "warmup_steps": 5, "validation_sentences": 8, "validation_examples": 0, "device": "cpu"}
    paths = {"run_dir": str(folder / "run"), "datasource": source, "validation_source": ""}
    config = train.get_config("toy", **paths, **sizes, **quick, ema_decay=0.9, dropout=0.1)
    train_model(config)
    return config


@pytest.fixture
def tuned(base, tmp_path) -> Config:
    """A run on other pairs that starts from the base run, not yet trained."""
    source = write_pairs(tmp_path / "other.tsv", toy_pairs("en", "it", "train")[400:600])
    paths = {"run_dir": str(tmp_path / "tuned"), "datasource": source, "init_from": base.run_dir}
    return replace(base, **paths, lr=1e-3, ema_decay=0.0, num_epochs=2)


def test_a_new_run_starts_from_the_ema_of_the_best_checkpoint_and_its_tokenizers(base, tuned, capsys, monkeypatch):
    starts, train_step = [], train.train_step

    def observed(state, *others):
        models = filter(None, (state.model, state.ema_model))
        starts.append([{name: w.clone() for name, w in model.state_dict().items()} for model in models])
        return train_step(state, *others)

    monkeypatch.setattr(train, "train_step", observed)
    expected = Translator.load(base.run_dir, "cpu")
    for config in (tuned, replace(tuned, run_dir=f"{tuned.run_dir}_ema", ema_decay=0.99)):
        starts.clear()
        train_model(config)
        assert len(starts[0]) == (2 if config.ema_decay else 1)
        assert all(is_identical(weights, dict(expected.model.state_dict())) for weights in starts[0])
        for lang in ("en", "it"):
            tokenizers = [RunFolder.of(c).tokenizer_file(lang).read_text("utf8") for c in (base, config)]
            assert tokenizers[0] == tokenizers[1]
    assert (
        f"starting     from {base.run_dir}, {expected.weights}; unknown to its tokenizers: " in capsys.readouterr().out
    )


def test_weights_are_chosen_as_in_translate_py(base, tuned):
    for weights, name in (("latest", "tmodel_01.pt"), ("0", "tmodel_00.pt")):
        start = load_initial_run(replace(tuned, init_weights=weights))
        state = load_checkpoint(run_path(base) / name)
        assert is_identical(dict(start.model.state_dict()), state["ema_model"])
    with pytest.raises(InputError, match="no weights '7' in"):
        train_model(replace(tuned, init_weights="7"))
    assert not run_path(tuned).exists()


def test_an_exported_run_can_be_the_start(base, tuned, tmp_path):
    expected = Translator.load(base.run_dir, "cpu")
    to_safetensors(expected, tmp_path / "export")
    start = load_initial_run(replace(tuned, init_from=str(tmp_path / "export")))
    assert is_identical(dict(start.model.state_dict()), dict(expected.model.state_dict()))


@pytest.mark.parametrize("killed_at", [2, 5])  # before and after the first checkpoint
def test_a_killed_run_resumes_with_the_same_command_bit_identically(tuned, monkeypatch, tmp_path, killed_at):
    config = replace(tuned, save_every_steps=2, ema_decay=0.9)
    uninterrupted = replace(config, run_dir=str(tmp_path / "uninterrupted"))
    train_model(uninterrupted)
    train_step, steps = train.train_step, []

    def killing(*arguments):
        steps.append(arguments)
        if len(steps) == killed_at:
            raise Killed
        return train_step(*arguments)

    monkeypatch.setattr(train, "train_step", killing)
    with pytest.raises(Killed):
        train_model(config)
    assert bool(checkpoints(config)) == (killed_at > 2)
    monkeypatch.setattr(train, "train_step", train_step)
    train_model(config)
    assert is_identical(final_state(config), final_state(uninterrupted))
    train_model(replace(uninterrupted, run_dir=str(tmp_path / "scratch"), init_from=""))
    scratch = final_state(replace(config, run_dir=str(tmp_path / "scratch")))
    assert not is_identical(final_state(config)["model"], scratch["model"])  # the comparison can fail


def test_a_run_with_a_checkpoint_no_longer_needs_the_other_run(base, tuned, tmp_path):
    moved = Path(base.run_dir).with_name("moved")
    train_model(replace(tuned, max_steps=3))
    recorded = json.loads(RunFolder.of(tuned).config_file.read_text(encoding="utf8"))
    assert (recorded["init_from"], recorded["init_weights"]) == (base.run_dir, "best")
    Path(base.run_dir).rename(moved)
    try:
        command = ["--preset", "toy", "--init-from", base.run_dir, "--run-dir", tuned.run_dir]
        assert parse_config(command).d_model == 32
        assert parse_config(["--run-dir", tuned.run_dir]).init_from == base.run_dir
        train_model(tuned)
    finally:
        moved.rename(base.run_dir)
    with pytest.raises(InputError, match=r"init_from .* there, '' now"):
        train_model(replace(tuned, init_from="", num_epochs=3))


def test_the_command_line_takes_the_architecture_from_the_other_run(base, tmp_path):
    config = parse_config(["--preset", "toy", "--init-from", base.run_dir, "--lr=1e-4", f"--run-dir={tmp_path}"])
    assert (config.d_model, config.num_heads, config.encoder_layers, config.d_ff) == (32, 2, 1, 64)
    assert (config.lr, config.num_epochs, config.batch_tokens) == (1e-4, 4, 1_024)  # the flag's and the preset's
    config = parse_config(["--init-from", base.run_dir])  # another preset by default
    assert (config.tokenizer, config.shared_vocab, config.share_embeddings) == ("word", False, "target")
    assert str(RunFolder.of(config)) == str(Path("weights") / "opus_books.en-it")


def test_contradictions_are_one_clear_error_and_change_nothing(base, tuned):
    with pytest.raises(InputError, match=r"do not fit: d_ff 64 there, 96 here; norm 'pre' there, 'post' here; omit"):
        train_model(replace(tuned, d_ff=96, norm="post"))
    with pytest.raises(InputError, match="do not fit: lang_tgt 'it' there, 'de' here"):
        train_model(replace(tuned, lang_tgt="de"))
    with pytest.raises(InputError, match="no run in 'nowhere'"):
        train_model(replace(tuned, init_from="nowhere"))
    assert not run_path(tuned).exists()
    files = {path: path.read_bytes() for path in run_path(base).rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="the run to start from; give another --run-dir"):
        train_model(replace(tuned, run_dir=base.run_dir, preload="none"))
    with pytest.raises(InputError, match="init_from '' there"):
        train_model(replace(tuned, run_dir=base.run_dir, ema_decay=base.ema_decay))
    assert files == {path: path.read_bytes() for path in run_path(base).rglob("*") if path.is_file()}


def test_with_a_shared_vocabulary_the_other_run_may_have_the_opposite_direction(base, tuned, tmp_path):
    opposite = {"lang_src": "it", "lang_tgt": "en"}
    separate = replace(tuned, **opposite)
    with pytest.raises(InputError, match="do not fit: lang_src 'en' there, 'it' here; lang_tgt 'it' there, 'en' here"):
        train_model(separate)
    shared = replace(base, run_dir=str(tmp_path / "shared"), shared_vocab=True, share_embeddings="all", max_steps=2)
    train_model(shared)
    both = replace(tuned, **opposite, shared_vocab=True, share_embeddings="all", init_from=shared.run_dir, max_steps=2)
    start = load_initial_run(both)
    assert is_identical(dict(start.model.state_dict()), dict(Translator.load(shared.run_dir, "cpu").model.state_dict()))
    train_model(both)
    tokenizers = {
        RunFolder.of(c).tokenizer_file(lang).read_text("utf8") for c in (shared, both) for lang in ("en", "it")
    }
    assert len(tokenizers) == 1
    assert Translator.load(both.run_dir, "cpu").config.lang_src == "it"


def test_unknown_words_are_reported_and_many_give_a_warning(tuned, tmp_path, capsys, monkeypatch):
    source = write_pairs(tmp_path / "new.tsv", toy_pairs("en", "it", "train")[400:600], NEW_WORDS)
    other = replace(tuned, datasource=source, max_steps=1)
    train_model(other)
    out, err = capsys.readouterr()
    data, _, *tokenizers = get_ds(other)
    words = [token for text in data.encoded[:]["src"].to_pylist() for token in tokenizers[0].encode(text).tokens]
    share = unknown_shares(data, tokenizers)[0]
    assert share == words.count("[UNK]") / len(words) > 0.05
    assert f"unknown to its tokenizers: {share:.1%} of the source tokens and " in out
    assert "are unknown and become [UNK]; start from a run on similar text" in err
    monkeypatch.setattr(initial, "MANY_UNKNOWN", 1.0)
    train_model(replace(other, preload="none"))
    assert "are unknown" not in capsys.readouterr().err


def test_bytes_of_unknown_characters_count_as_unknown():
    tokenizers = [build_bpe_tokenizer(["see it", "see the sea"], 300)] * 2
    pairs = datasets.Dataset.from_dict({"src": ["see é"], "tgt": ["see"]})
    tokens = tokenizers[0].encode("see é").tokens
    assert tokens[-2:] == ["<0xC3>", "<0xA9>"]
    assert unknown_shares(BilingualDataset(pairs, *tokenizers, 64), tokenizers) == [2 / len(tokens), 0]


@pytest.mark.slow
def test_fine_tuning_beats_training_from_scratch_at_equal_steps(trained_run, tmp_path):
    """On word pairings that the base run has never seen."""
    pairs = toy_pairs("en", "it", "validation")
    sources = {
        "datasource": write_pairs(tmp_path / "train.tsv", pairs[:500]),
        "validation_source": write_pairs(tmp_path / "validation.tsv", pairs[500:]),
    }
    config = replace(RunFolder(trained_run).load_config(), **sources, num_epochs=2, warmup_steps=5, device="cpu")
    bleu = {}
    for name, init_from in (("scratch", ""), ("tuned", str(trained_run))):
        train_model(replace(config, run_dir=str(tmp_path / name), init_from=init_from))
        bleu[name] = RunFolder(tmp_path / name).read_scores()[-1]["bleu"]
    assert bleu["tuned"] > bleu["scratch"] + 30
