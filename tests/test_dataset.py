import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import dataset as d
from config import Config, InputError, get_config
from dataset import (
    EOS,
    PAD,
    SOS,
    SPECIAL_TOKENS,
    BilingualDataset,
    get_ds,
    load_pairs,
    load_split,
    make_batches,
    make_loader,
)

ROWS = [("One.", "Uno."), ("Two, too.", "Due."), ("Three!", "Tre!")]


def write(folder: Path, kind: str) -> str:
    """ROWS in one of the forms a corpus may have; returns the source's name."""
    translations = [{"en": en, "it": it} for en, it in ROWS]
    path = folder / f"corpus.{kind}"
    if kind == "tsv":
        path.write_text("".join(f"{en}\t{it}\n" for en, it in ROWS))
    elif kind == "csv":  # a header in the other order, and a comma in a quoted cell
        path.write_text("it,en\n" + "".join(f'{it},"{en}"\n' for en, it in ROWS))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"translation": row}) + "\n" for row in translations))
    elif kind == "parquet":
        pq.write_table(pa.table({"translation": translations}), path)
    elif kind == "aligned":
        for i, lang in enumerate(("en", "it")):
            (folder / f"corpus.{lang}").write_text("".join(row[i] + "\n" for row in ROWS))
        return str(folder / "corpus")
    elif kind in ("hub", "hub with subsets"):
        subset = folder / "hub" / ("en-it" if "subsets" in kind else ".")
        subset.mkdir(parents=True)
        pq.write_table(
            pa.table({"id": ["0", "1", "2"], "translation": translations}), subset / "train-00000-of-00001.parquet"
        )
        if "subsets" in kind:
            subset = "- config_name: {}\n  data_files:\n  - split: train\n    path: en-it/train-*\n"
            card = f"---\nconfigs:\n{subset.format('en-it')}{subset.format('en-xx')}---\n"
            (folder / "hub" / "README.md").write_text(card)
        return str(folder / "hub")
    elif kind == "hub of columns":
        (folder / "hub").mkdir()
        (folder / "hub" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in translations))
        return str(folder / "hub")
    return str(path)


KINDS = ["tsv", "csv", "jsonl", "parquet", "aligned", "hub", "hub with subsets", "hub of columns"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_every_form_of_corpus_gives_the_same_pairs(tmp_path, kind, reverse):
    if kind == "tsv" and reverse:
        pytest.skip("a file without a header has source and target in that order")
    source = write(tmp_path, kind)
    languages = {"lang_src": "it", "lang_tgt": "en"} if reverse else {}
    pairs = load_pairs(source, get_config("toy", **languages))
    sides = ("tgt", "src") if reverse else ("src", "tgt")
    assert list(zip(*(list(pairs[side]) for side in sides), strict=True)) == ROWS


def test_a_null_translation_is_a_blank_pair(tmp_path):
    rows = pa.table({"translation": [{"en": "One.", "it": "Uno."}, None, {"en": "Two.", "it": None}]})
    pq.write_table(rows, tmp_path / "train.parquet")
    pairs = load_pairs(str(tmp_path), get_config("toy"))
    assert list(pairs["src"]) == ["One.", "", "Two."]
    assert d.count_blank(pairs) == 2


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_missing_language_is_named_with_those_there(tmp_path, kind):
    source = write(tmp_path, kind)
    with pytest.raises(InputError) as error:
        load_pairs(source, get_config("toy", lang_tgt="fr"))
    assert "fr" in str(error.value)
    assert "it" in str(error.value) or kind == "aligned"


@pytest.mark.parametrize(
    ("files", "source", "words"),
    [
        ({}, "none.tsv", ["none.tsv"]),
        ({}, "./none", ["none.en"]),
        ({"a.en": "1\n2\n"}, "a", ["a.it"]),
        ({"a.en": "1\n2\n", "a.it": "1\n"}, "a", ["2 lines", "1;"]),
        ({"a.en": "1\n2\n", "a.it": b"1\n\xff\n"}, "a", ["a.it line 2", "UTF-8"]),
        ({"a.tsv": "one\n"}, "a.tsv", ["row 1", "tab"]),
        ({"a.jsonl": '{"en": "1", "it": "1"}\n{"en": \n'}, "a.jsonl", ["line 2", "JSON"]),
        ({"a.jsonl": '{"en": 1, "it": "1"}\n'}, "a.jsonl", ["row 1", "string"]),
        ({"a.jsonl": '[1]\n'}, "a.jsonl", ["row 1", "en"]),
        ({"a.parquet": "no"}, "a.parquet", ["Parquet"]),
        ({"a.tsv": ""}, "a.tsv", ["a.tsv holds no pair"]),
        ({"a.en": "", "a.it": ""}, "a", ["holds no pair"]),
        ({"a.jsonl": '{"translation": null}\n'}, "a.jsonl", ["row 1", "en"]),
        ({"a.jsonl": '{"translation": "en it"}\n'}, "a.jsonl", ["row 1", "en"]),
        ({}, ":train", ["no name"]),
    ],
)  # fmt: skip
def test_bad_corpora_are_named_in_one_line(tmp_path, monkeypatch, files, source, words):
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        load_pairs(source, get_config("toy"))
    for word in words:
        assert word in str(error.value)


def test_a_hub_that_does_not_answer_is_named_at_once(monkeypatch):
    # the tests' HF_ENDPOINT is a closed port
    with pytest.raises(InputError, match=r"Helsinki-NLP/opus_books.*--preset toy"):
        load_pairs("Helsinki-NLP/opus_books", get_config())


def test_only_newlines_end_lines_and_marks_and_returns_are_dropped(tmp_path):
    (tmp_path / "a.en").write_bytes("\ufeffone\u2028more\r\ntwo\r\n".encode())
    (tmp_path / "a.it").write_text("uno\ndue\n")
    pairs = load_pairs(str(tmp_path / "a"), get_config("toy"))
    assert list(pairs["src"]) == ["one\u2028more", "two"]


@pytest.mark.parametrize(("name", "text"), [("a.tsv", "one\tuno\n\n"), ("a.jsonl", '{"en": "one", "it": "uno"}\n\n')])
def test_blank_lines_are_blank_pairs(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    pairs = load_pairs(str(tmp_path / name), get_config("toy"))
    assert list(pairs["src"]) == ["one", ""]
    assert d.count_blank(pairs) == 1


def test_a_quoted_cell_keeps_its_newline(tmp_path):
    (tmp_path / "a.csv").write_text('"one\ntwo",uno\n')
    assert list(load_pairs(str(tmp_path / "a.csv"), get_config("toy"))["src"]) == ["one\ntwo"]


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("one\tuno\n")
    assert list(load_pairs(str(path), get_config("toy"))["src"]) == ["one"]
    path.write_text("three\ttre\n")
    assert list(load_pairs(str(path), get_config("toy"))["src"]) == ["three"]


def test_the_split_is_seeded_disjoint_and_whole(pairs_file):
    config = get_config("toy", datasource=str(pairs_file), validation_source="")
    train, validation = (list(load_split(config, split)["src"]) for split in ("train", "validation"))
    assert len(validation) == 40
    assert set(train) | set(validation) == set(load_pairs(str(pairs_file), config)["src"])
    assert not set(train) & set(validation)
    assert validation == list(load_split(config, "validation")["src"])
    other = get_config("toy", datasource=str(pairs_file), validation_source="", seed=7)
    assert validation != list(load_split(other, "validation")["src"])


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
        batches = make_batches(data, config, epoch)
        assert sorted(i for batch in batches for i in batch) == list(range(len(data)))
        for batch in make_loader(data, batches):
            B, S = batch["encoder_input"].shape
            T = batch["label"].size(1)
            assert B == 1 or B * max(S, T) <= batch_tokens or (batch_tokens == 0 and B <= 7)
    assert make_batches(data, config, 0) == make_batches(data, config, 0)
    assert make_batches(data, config, 0) != make_batches(data, config, 1)


def test_like_lengths_share_a_batch(small):
    _, data = small
    batches = make_batches(data, get_config("toy", batch_tokens=400), 0)
    padded = sum(len(b) * data.tgt_lengths[b].max() for b in batches)
    assert data.tgt_lengths.sum() / padded > 0.9


def test_workers_give_the_same_batches_and_leave_the_global_generator_alone(small):
    config, data = small
    batches = make_batches(data, config, 0)[:4]
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
    with pytest.raises(InputError, match="no pair is left: 3 are blank, 0 have over 3"):
        BilingualDataset(pairs.select(range(1, 4)), tokenizer, tokenizer, seq_len=3)


def test_lengths_are_those_of_the_ids(small):
    _, data = small
    batch = data[[5, 6]]
    assert np.array_equal((batch["encoder_input"] != PAD).sum(1), data.src_lengths[[5, 6]])
    assert np.array_equal((batch["label"] != PAD).sum(1) + 1, data.tgt_lengths[[5, 6]])


def test_too_few_pairs_to_split(tmp_path):
    (tmp_path / "a.tsv").write_text("one\tuno\n" * 5)
    with pytest.raises(InputError, match="5 pairs are too few"):
        load_split(get_config("toy", datasource=str(tmp_path / "a.tsv"), validation_source=""), "train")
