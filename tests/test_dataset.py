"""Tokenizers, encoded pairs, batches, loaders and BPE-dropout.

B  batch (sentences)    S  source length    T  target length
"""

import json
import random

import datasets
import numpy as np
import pytest
import torch

import dataset
from config import Config, InputError, get_config
from corpora.sources import load_pairs
from dataset import (
    EOS,
    PAD,
    SOS,
    SPECIAL_TOKENS,
    UNK,
    Batches,
    BilingualDataset,
    BPEDropout,
    build_bpe_tokenizer,
    build_word_tokenizer,
    get_ds,
    load_tokenizer,
    make_loader,
    sample,
)
from runs.folder import RunFolder


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_tokenizers_are_trained_on_the_training_pairs_only(tmp_path, kind, shared):
    """A word that occurs only in validation pairs is not a token."""
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


def test_bpe_is_lossless_and_has_no_unknown_tokens():
    tokenizer = build_bpe_tokenizer(["some words, to learn from", "some more words"], 400)
    for text in ["some words", "日本語 🙂", "مرحبا بالعالم", "a  b", "[SOS] <0x41>", "naïve\tétudes", "5"]:
        ids = tokenizer.encode(text).ids
        assert UNK not in ids
        assert SOS not in ids
        assert tokenizer.decode(ids) == text


def test_the_word_tokenizer_restores_spaces_around_punctuation_and_apostrophes():
    text = "L'uomo vede un'arancia."
    tokenizer = build_word_tokenizer([text, text], 100)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("[EOS]").ids == [UNK] * 3


@pytest.fixture
def small(pairs_file, tmp_path) -> tuple[Config, BilingualDataset]:
    """A config and its training set of 360 pairs."""
    config = get_config("toy", datasource=str(pairs_file), validation_source="", run_dir=str(tmp_path / "run"))
    return config, get_ds(config)[0]


def test_targets_are_shifted_and_padding_and_later_positions_are_masked(small):
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
    S, T = batch["encoder_input"].size(1), label.size(1)
    assert batch["encoder_mask"].shape == (5, 1, 1, S)
    assert batch["decoder_mask"].shape == (5, 1, T, T)
    assert batch["encoder_mask"].dtype == batch["decoder_mask"].dtype == torch.bool
    assert not batch["encoder_mask"].all()  # there is padding on both sides
    assert not batch["decoder_mask"][:, 0, -1].all()
    assert torch.equal(batch["encoder_mask"][:, 0, 0], batch["encoder_input"] != PAD)
    for query in range(T):
        assert not batch["decoder_mask"][:, 0, query, query + 1 :].any()
        expected = decoder_input[:, : query + 1] != PAD
        assert torch.equal(batch["decoder_mask"][:, 0, query, : query + 1], expected)


@pytest.mark.parametrize("batch_tokens", [0, 100, 333])
def test_every_pair_is_in_exactly_one_batch_within_the_token_limit(small, batch_tokens):
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
    """Small blocks and pools, as if the corpora of the tests were large."""
    monkeypatch.setattr(dataset, "BLOCK", 8)
    monkeypatch.setattr(dataset, "POOL", 64)


@pytest.mark.parametrize("batch_tokens", [0, 200])
def test_a_large_corpus_is_shuffled_one_pool_at_a_time(small, many_pools, batch_tokens):
    _, data = small
    config = get_config("toy", batch_tokens=batch_tokens, batch_size=7)
    batches = Batches(data, config, 0)
    complete = list(batches)
    assert len(batches.counts) == -(-len(data) // 64)
    assert len(complete) == len(batches)
    assert sorted(i for batch in complete for i in batch) == list(range(len(data)))
    assert list(Batches(data, config, 0)) == complete != list(Batches(data, config, 1))
    for first in (0, 1, batches.counts[0] - 1, batches.counts[0], len(complete) - 1, len(complete)):
        assert list(batches.starting_at(first)) == complete[first:]
    in_first_pool = {i // 8 for batch in complete[: batches.counts[0]] for i in batch}
    assert 7 <= len(in_first_pool) <= 8  # complete blocks, in pools of similar size
    assert max(in_first_pool) - min(in_first_pool) > 8  # not consecutive blocks


def test_tokenizers_of_a_large_corpus_are_trained_on_evenly_spaced_pairs(monkeypatch):
    pairs = datasets.Dataset.from_dict({"src": [str(i) for i in range(100)], "tgt": [""] * 100})
    assert [text for batch in sample(pairs, chunk=5) for text in batch["src"]] == [str(i) for i in range(100)]
    monkeypatch.setattr(dataset, "MAX_TOKENIZER_PAIRS", 40)
    sampled = [int(text) for batch in sample(pairs, chunk=5) for text in batch["src"]]
    assert sampled == [first + i for first in (0, 12, 25, 37, 50, 62, 75, 87) for i in range(5)]


def test_encoding_with_several_processes_gives_the_same_dataset(small, monkeypatch):
    config, _ = small
    tokenizers = [load_tokenizer(RunFolder.of(config).tokenizer_file(lang)) for lang in ("en", "it")]
    pairs = load_pairs(config.datasource, config)
    pairs = datasets.concatenate_datasets([pairs, datasets.Dataset.from_dict({"src": ["[PAD]"], "tgt": ["[EOS]"]})])
    datasets.disable_caching()
    single = BilingualDataset(pairs, *tokenizers, 11)
    monkeypatch.setattr(dataset, "PAIRS_PER_PROCESS", 100)
    monkeypatch.setattr(dataset, "available_cores", lambda: 2)
    parallel = BilingualDataset(pairs, *tokenizers, 11)
    datasets.enable_caching()
    assert len(parallel.encoded.cache_files) == 2
    assert parallel.encoded.data.column("src_ids").to_pylist() == single.encoded.data.column("src_ids").to_pylist()
    assert (parallel.skipped_long, parallel.fingerprint) == (
        single.skipped_long,
        single.fingerprint,
    )
    assert single.skipped_long > 0


def test_batches_hold_pairs_of_similar_length_and_are_nearly_full(small):
    _, data = small
    batches = Batches(data, get_config("toy", batch_tokens=400), 0)
    source, target = data.lengths()
    padded = sum(len(b) * (source[b].max() + target[b].max()) for b in batches)
    assert (source + target).sum() / padded > 0.9
    assert np.maximum(source, target - 1).sum() / (400 * len(batches)) > 0.8


def test_loader_workers_give_the_same_batches_and_keep_the_global_generator(small):
    config, data = small
    batches = list(Batches(data, config, 0))[:4]
    state = torch.get_rng_state()
    for a, b in zip(make_loader(data, batches), make_loader(data, batches, num_workers=2), strict=True):
        assert torch.equal(a["label"], b["label"])
        assert a["src_text"] == b["src_text"]
    assert torch.equal(state, torch.get_rng_state())


def test_blank_and_too_long_pairs_are_skipped_and_counted_not_truncated(tmp_path):
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
    tokenizer = build_word_tokenizer(["a b c d", "a b c d"], 100)
    data = BilingualDataset(pairs, tokenizer, tokenizer, seq_len=5)
    # "a b c d" has 6 ids, too many for a source; of a target the decoder reads only the first 5
    assert [data[[i]]["src_text"][0] for i in range(len(data))] == ["one", "z", "a b c"]
    assert (data.skipped_blank, data.skipped_long) == (3, 1)
    with pytest.raises(InputError, match="no pairs remain: 3 are blank, 0 exceed 3"):
        BilingualDataset(pairs.select(range(1, 4)), tokenizer, tokenizer, seq_len=3)


def test_lengths_equal_the_numbers_of_ids(small):
    _, data = small
    batch = data[[5, 6]]
    source, target = data.lengths(5, 7)
    assert np.array_equal((batch["encoder_input"] != PAD).sum(1), source)
    assert np.array_equal((batch["label"] != PAD).sum(1) + 1, target)
    assert np.array_equal(data.lengths()[1][5:7], target)


def test_bpe_dropout_varies_the_segmentation_and_keeps_the_text():
    texts = ["some words, to learn from", "some more words to learn"]
    tokenizer = build_bpe_tokenizer(texts * 3, 330)
    text = "some words, learned from ñ and 😀"
    usual = [SOS, *tokenizer.encode(text).ids, EOS]
    assert BPEDropout(tokenizer, 0.0).encode(text, random.Random(0)) == usual
    dropout, rng = BPEDropout(tokenizer, 0.3), random.Random(0)
    segmentations = [dropout.encode(text, rng) for _ in range(20)]
    assert len({tuple(ids) for ids in segmentations}) > 10
    assert all(tokenizer.decode(ids) == text and len(ids) >= len(usual) for ids in segmentations)
    assert len(BPEDropout(tokenizer, 0.999).encode("some", rng)) == 2 + len("▁some")


def test_bpe_dropout_is_a_function_of_seed_epoch_and_position(pairs_file, tmp_path):
    bpe = {"tokenizer": "bpe", "vocab_size": 500, "bpe_dropout": 0.3}
    config = get_config("toy", datasource=str(pairs_file), validation_source="", run_dir=str(tmp_path / "run"), **bpe)
    train, validation, tokenizer, _ = get_ds(config)
    first = train[[3, 1, 2]]["encoder_input"]
    assert torch.equal(first, train[[3, 1, 2]]["encoder_input"])
    for row, position in enumerate([3, 1, 2]):
        ids = train[[position]]["encoder_input"][0]
        assert torch.equal(first[row, : len(ids)], ids)
    batches = list(Batches(train, config, 0))[:4]
    for a, b in zip(make_loader(train, batches), make_loader(train, batches, num_workers=2), strict=True):
        assert torch.equal(a["label"], b["label"])
    train.begin_epoch(1)
    assert not torch.equal(first, train[[3, 1, 2]]["encoder_input"])
    for position in range(10):  # validation pairs are segmented without dropout
        batch = validation[[position]]
        assert batch["encoder_input"][0].tolist() == [SOS, *tokenizer.encode(batch["src_text"][0]).ids, EOS]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_load_the_same_batches(method, pairs_file, tmp_path, monkeypatch):
    """As on macOS and Windows: the dataset, its tokenizers and its memory-mapped files are pickled for the workers."""
    bpe = {"tokenizer": "bpe", "vocab_size": 500, "bpe_dropout": 0.3}
    config = get_config("toy", datasource=str(pairs_file), validation_source="", run_dir=str(tmp_path / "run"), **bpe)
    train = get_ds(config)[0]
    monkeypatch.setattr(dataset, "START_METHOD", method)
    batches = list(Batches(train, config, 0))[:3]
    for a, b in zip(make_loader(train, batches), make_loader(train, batches, num_workers=1), strict=True):
        assert a["src_text"] == b["src_text"]
        assert all(torch.equal(a[name], b[name]) for name in a if isinstance(a[name], torch.Tensor))
