"""Cleaning of the training pairs: what is removed, counted and reported."""

import dataclasses

import datasets
import pytest

from config import InputError
from corpora.cleaning import PAIRS_AT_A_TIME, Removed, clean
from corpora.sources import load_split
from dataset import get_ds
from train import train_model


def dataset_of(*rows: tuple[str, str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"src": [src for src, _ in rows], "tgt": [tgt for _, tgt in rows]})


def rows_of(pairs: datasets.Dataset) -> list[tuple[str, str]]:
    return list(zip(pairs["src"], pairs["tgt"], strict=True))


def test_the_first_of_equal_pairs_remains_and_others_stay():
    rows = [("a", "1"), ("b", "2"), ("a", "1"), ("a", "2"), ("ab", "c"), ("a", "bc"), ("b", "2"), ("", "")]
    pairs, removed = clean(dataset_of(*rows), drop_duplicates=True)
    assert rows_of(pairs) == [row for i, row in enumerate(rows) if i not in (2, 6)]
    assert removed == Removed(duplicates=2)


def test_the_length_ratio_counts_characters_of_the_trimmed_sides():
    rows = [("aaaa", "bb"), ("bb", "aaaaa"), ("ää", "  ö  "), ("aaa", "ö"), ("", "long"), ("aaa", "ö")]
    pairs, removed = clean(dataset_of(*rows), max_length_ratio=2.0)
    assert rows_of(pairs) == [rows[0], rows[2], rows[4]]  # a blank side is left to BilingualDataset
    assert removed == Removed(length_ratio=3)
    pairs, removed = clean(dataset_of(*rows), max_length_ratio=2.0, drop_duplicates=True)
    assert removed == Removed(duplicates=1, length_ratio=2)


def test_without_cleaning_the_pairs_are_unchanged():
    pairs = dataset_of(("a", "1"), ("a", "1"), ("a", "1111111111"))
    assert clean(pairs) == (pairs, Removed())


def test_duplicates_are_found_across_batches_and_in_a_selection():
    rows = [(str(i % (PAIRS_AT_A_TIME + 5)), "x") for i in range(PAIRS_AT_A_TIME + 20)]
    pairs, removed = clean(dataset_of(("0", "y"), *rows).select(range(1, len(rows) + 1)), drop_duplicates=True)
    assert rows_of(pairs) == rows[: PAIRS_AT_A_TIME + 5]
    assert removed.duplicates == 15


@pytest.fixture
def config(tiny_config, tmp_path):
    """Of 80 training pairs, 40 are duplicates and 20 have a length ratio above 3."""
    pairs = "".join(f"I see {word}.\tVedo {word}.\n" for word in "abcdefghijklmnopqrst")
    long = "".join(f"I see {word}.\t{'Vedo ' * 9}{word}.\n" for word in "abcdefghijklmnopqrst")
    (tmp_path / "train.tsv").write_text(pairs * 3 + long)
    (tmp_path / "validation.tsv").write_text(pairs * 2 + long)
    sources = {"datasource": str(tmp_path / "train.tsv"), "validation_source": str(tmp_path / "validation.tsv")}
    return dataclasses.replace(tiny_config, **sources, max_length_ratio=3.0, drop_duplicates=True)


def test_only_training_pairs_are_cleaned_before_tokenizers_are_trained(config):
    train, validation, _, tokenizer_tgt = get_ds(config)
    assert (len(train), train.removed) == (20, Removed(40, 20))
    assert (len(validation), validation.removed) == (60, Removed())
    assert rows_of(load_split(config, "validation")) == rows_of(validation.encoded.with_format(None))
    assert tokenizer_tgt.token_to_id("Vedo") is not None
    assert tokenizer_tgt.token_to_id("a") is None  # it occurs once, and would occur four times


def test_the_numbers_are_reported_and_the_settings_cannot_change_on_resume(config, capsys):
    train_model(config)
    out = capsys.readouterr().out
    assert "20 training pairs, 60 validation pairs" in out
    assert "removed in training: 40 duplicates (--drop-duplicates), 20 pairs by --max-length-ratio" in out
    with pytest.raises(InputError, match=r"max_length_ratio 3\.0 there, 0\.0 now"):
        train_model(dataclasses.replace(config, max_length_ratio=0.0))
    with pytest.raises(InputError, match=r"drop_duplicates True there, False now"):
        train_model(dataclasses.replace(config, drop_duplicates=False))
    train_model(dataclasses.replace(config, num_epochs=3))
    assert "removed in training: 40 duplicates" in capsys.readouterr().out


@pytest.mark.parametrize("value", [0.5, -1.0, float("inf"), float("nan")])
def test_a_ratio_below_1_is_rejected(tiny_config, value):
    with pytest.raises(InputError, match=r"max_length_ratio is .*; give 1 or more, or 0"):
        dataclasses.replace(tiny_config, max_length_ratio=value)
