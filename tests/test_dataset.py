import json
import random

import datasets
import numpy as np
import pytest
import torch

import dataset as d
from config import Config, InputError, get_config
from corpora.sources import load_pairs
from dataset import EOS, PAD, SOS, SPECIAL_TOKENS, Batches, BilingualDataset, get_ds, make_loader
from runs.folder import RunFolder


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_tokenizers_see_the_training_part_alone(tmp_path, kind, shared):
    """A word that stands in validation only must not enter a vocabulary, whole."""
    source = {"run_dir": str(tmp_path / "run"), "datasource": str(tmp_path / "a.tsv"), "validation_source": ""}
    config = get_config("toy", **source, tokenizer=kind, shared_vocab=shared)
    lines = [f"the number w{i}x w{i}x\til numero v{i}y v{i}y\n" for i in range(50)]
    (tmp_path / "a.tsv").write_text("".join(lines))
    train, validation, src, tgt = get_ds(config)
    held_out = validation[list(range(len(validation)))]["src_text"][0].split()[-1]
    seen = train[[0]]["src_text"][0].split()[-1]
    pieces = {word: src.encode(word).tokens for word in (held_out, seen)}
    assert len(pieces[seen]) == 1
    assert pieces[held_out] == ["[UNK]"] if kind == "word" else len(pieces[held_out]) > 1
    for tokenizer in (src, tgt):
        assert [tokenizer.id_to_token(i) for i in range(4)] == SPECIAL_TOKENS
    assert (src.to_str() == tgt.to_str()) == shared


def test_bpe_gives_back_any_text_and_knows_everything():
    tokenizer = d.build_bpe_tokenizer(["some words, to learn from", "some more words"], 400)
    for text in ["some words", "日本語 🙂", "مرحبا بالعالم", "a  b", "[SOS] <0x41>", "naïve\tétudes", "5"]:
        ids = tokenizer.encode(text).ids
        assert d.UNK not in ids
        assert SOS not in ids
        assert tokenizer.decode(ids) == text


def test_word_tokenizer_joins_punctuation_and_apostrophes():
    text = "L'uomo vede un'arancia."
    tokenizer = d.build_word_tokenizer([text, text], 100)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("[EOS]").ids == [d.UNK] * 3


@pytest.fixture
def small(pairs_file, tmp_path) -> tuple[Config, BilingualDataset]:
    config = get_config("toy", datasource=str(pairs_file), validation_source="", run_dir=str(tmp_path / "run"))
    return config, get_ds(config)[0]


def test_a_batch_is_shifted_padded_and_masked(small):
    _, data = small
    batch = data[[0, 1, 2, 3, 4]]
    label, decoder_input = batch["label"], batch["decoder_input"]
    assert (decoder_input[:, 0] == SOS).all()
    for row in range(5):
        length = int((label[row] != PAD).sum())
        assert label[row, length - 1] == EOS
        assert torch.equal(decoder_input[row, 1:length], label[row, : length - 1])
        assert (decoder_input[row, length:] == PAD).all()
        assert batch["encoder_input"][row, 0] == SOS
    T = label.size(1)
    assert batch["decoder_mask"].shape == (5, 1, T, T)
    assert batch["encoder_mask"].shape == (5, 1, 1, batch["encoder_input"].size(1))
    assert batch["encoder_mask"].dtype == torch.bool
    assert not batch["decoder_mask"][:, 0].triu(1).any()
    assert torch.equal(batch["decoder_mask"][:, 0, -1], decoder_input != PAD)


@pytest.mark.parametrize("batch_tokens", [0, 100, 333])
def test_every_pair_is_in_exactly_one_batch_within_the_budget(small, batch_tokens):
    _, data = small
    config = get_config("toy", batch_tokens=batch_tokens, batch_size=7)
    for epoch in (None, 0, 1):
        batches = Batches(data, config, epoch)
        assert sorted(i for batch in batches for i in batch) == list(range(len(data)))
        for batch in make_loader(data, batches):
            B, S = batch["encoder_input"].shape
            T = batch["label"].size(1)
            assert B == 1 or B * max(S, T) <= batch_tokens or (batch_tokens == 0 and B <= 7)
    assert list(Batches(data, config, 0)) == list(Batches(data, config, 0))
    assert list(Batches(data, config, 0)) != list(Batches(data, config, 1))


@pytest.fixture
def many_pools(monkeypatch):
    """The corpora of the tests then count as large ones."""
    monkeypatch.setattr(d, "BLOCK", 8)
    monkeypatch.setattr(d, "POOL", 64)


@pytest.mark.parametrize("batch_tokens", [0, 200])
def test_a_large_corpus_is_shuffled_a_pool_at_a_time(small, many_pools, batch_tokens):
    _, data = small
    config = get_config("toy", batch_tokens=batch_tokens, batch_size=7)
    batches = Batches(data, config, 0)
    whole = list(batches)
    assert len(batches.counts) == -(-len(data) // 64)
    assert len(whole) == len(batches)
    assert sorted(i for batch in whole for i in batch) == list(range(len(data)))
    assert list(Batches(data, config, 0)) == whole != list(Batches(data, config, 1))
    for first in (0, 1, batches.counts[0] - 1, batches.counts[0], len(whole) - 1, len(whole)):
        assert list(batches.starting_at(first)) == whole[first:]
    in_first_pool = {i // 8 for batch in whole[: batches.counts[0]] for i in batch}
    assert 7 <= len(in_first_pool) <= 8  # whole blocks, in pools of like size
    assert max(in_first_pool) - min(in_first_pool) > 8  # from all over


def test_a_tokenizer_sees_pairs_from_all_over_a_large_corpus(monkeypatch):
    pairs = datasets.Dataset.from_dict({"src": [str(i) for i in range(100)], "tgt": [""] * 100})
    assert [text for batch in d.sample(pairs, chunk=5) for text in batch["src"]] == [str(i) for i in range(100)]
    monkeypatch.setattr(d, "MAX_TOKENIZER_PAIRS", 40)
    seen = [int(text) for batch in d.sample(pairs, chunk=5) for text in batch["src"]]
    assert seen == [first + i for first in (0, 12, 25, 37, 50, 62, 75, 87) for i in range(5)]


def test_several_processes_encode_the_same(small, monkeypatch):
    config, _ = small
    tokenizers = [d.load_tokenizer(RunFolder.of(config).tokenizer_file(lang)) for lang in ("en", "it")]
    pairs = load_pairs(config.datasource, config)
    pairs = datasets.concatenate_datasets([pairs, datasets.Dataset.from_dict({"src": ["[PAD]"], "tgt": ["[EOS]"]})])
    datasets.disable_caching()
    alone = BilingualDataset(pairs, *tokenizers, 11)
    monkeypatch.setattr(d, "PAIRS_PER_PROCESS", 100)
    monkeypatch.setattr(d, "available_cores", lambda: 2)
    together = BilingualDataset(pairs, *tokenizers, 11)
    datasets.enable_caching()
    assert len(together.encoded.cache_files) == 2
    assert together.encoded.data.column("src_ids").to_pylist() == alone.encoded.data.column("src_ids").to_pylist()
    assert (together.skipped_long, together.fingerprint) == (alone.skipped_long, alone.fingerprint)
    assert alone.skipped_long > 0


def test_like_lengths_share_a_batch(small):
    _, data = small
    batches = Batches(data, get_config("toy", batch_tokens=400), 0)
    source, target = data.lengths()
    padded = sum(len(b) * (source[b].max() + target[b].max()) for b in batches)
    assert (source + target).sum() / padded > 0.9


def test_workers_give_the_same_batches_and_leave_the_global_generator_alone(small):
    config, data = small
    batches = list(Batches(data, config, 0))[:4]
    state = torch.get_rng_state()
    for a, b in zip(make_loader(data, batches), make_loader(data, batches, num_workers=2), strict=True):
        assert torch.equal(a["label"], b["label"])
        assert a["src_text"] == b["src_text"]
    assert torch.equal(state, torch.get_rng_state())


def test_blank_and_overlong_pairs_are_counted_never_cut(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = [
        ("one", "uno"),
        ("", "due"),
        ("  ", "x"),
        (None, "y"),
        ("a b c d", "z"),
        ("z", "a b c d"),
        ("a b c", "a b c"),
    ]
    path.write_text("".join(json.dumps({"en": en, "it": it}) + "\n" for en, it in texts))
    pairs = load_pairs(str(path), get_config("toy"))
    tokenizer = d.build_word_tokenizer(["a b c d", "a b c d"], 100)
    data = BilingualDataset(pairs, tokenizer, tokenizer, seq_len=5)
    # "a b c d" is 6 ids as a source; as a target the decoder reads 5 of them, which fit
    assert [data[[i]]["src_text"][0] for i in range(len(data))] == ["one", "z", "a b c"]
    assert (data.skipped_blank, data.skipped_long) == (3, 1)
    with pytest.raises(InputError, match="no pairs remain: 3 are blank, 0 exceed 3"):
        BilingualDataset(pairs.select(range(1, 4)), tokenizer, tokenizer, seq_len=3)


def test_lengths_are_those_of_the_ids(small):
    _, data = small
    batch = data[[5, 6]]
    source, target = data.lengths(5, 7)
    assert np.array_equal((batch["encoder_input"] != PAD).sum(1), source)
    assert np.array_equal((batch["label"] != PAD).sum(1) + 1, target)
    assert np.array_equal(data.lengths()[1][5:7], target)


def test_bpe_dropout_cuts_words_another_way_and_loses_nothing():
    texts = ["some words, to learn from", "some more words to learn"]
    tokenizer = d.build_bpe_tokenizer(texts * 3, 330)
    text = "some words, learnt from ñ and 😀"
    whole = [SOS, *tokenizer.encode(text).ids, EOS]
    assert d.BPEDropout(tokenizer, 0.0).encode(text, random.Random(0)) == whole
    cutter, rng = d.BPEDropout(tokenizer, 0.3), random.Random(0)
    cuts = [cutter.encode(text, rng) for _ in range(20)]
    assert len({tuple(ids) for ids in cuts}) > 10
    assert all(tokenizer.decode(ids) == text and len(ids) >= len(whole) for ids in cuts)
    assert len(d.BPEDropout(tokenizer, 0.999).encode("some", rng)) == 2 + len("▁some")


def test_bpe_dropout_is_a_function_of_seed_epoch_and_position(pairs_file, tmp_path):
    bpe = {"tokenizer": "bpe", "vocab_size": 500, "bpe_dropout": 0.3}
    config = get_config("toy", datasource=str(pairs_file), validation_source="", run_dir=str(tmp_path / "run"), **bpe)
    train, validation, *_ = get_ds(config)
    first = train[[3, 1, 2]]["encoder_input"]
    assert torch.equal(first, train[[3, 1, 2]]["encoder_input"])
    for alone, position in enumerate([3, 1, 2]):
        ids = train[[position]]["encoder_input"][0]
        assert torch.equal(first[alone, : len(ids)], ids)
    batches = list(Batches(train, config, 0))[:4]
    for a, b in zip(make_loader(train, batches), make_loader(train, batches, num_workers=2), strict=True):
        assert torch.equal(a["label"], b["label"])
    train.begin_epoch(1)
    assert not torch.equal(first, train[[3, 1, 2]]["encoder_input"])
    assert torch.equal(validation[[0]]["encoder_input"], validation[[0]]["encoder_input"])
    assert validation[[0]]["encoder_input"].size(1) == validation.lengths(0, 1)[0][0]
