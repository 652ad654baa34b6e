"""corpora/patterns.py."""

import pytest

from config import InputError, get_config
from corpora.patterns import SPLITS, all_pairs, pattern_pairs
from corpora.sources import load_pairs
from corpora.toy import tokens_of


def test_splits_are_disjoint_and_together_hold_every_sentence():
    splits = [{pair.src_text for pair in pattern_pairs(split)} for split in SPLITS]
    assert sum(map(len, splits)) == len(set.union(*splits)) == len(all_pairs()) == 8 * 27 * 3


def test_every_word_occurs_in_training():
    training = {word for pair in pattern_pairs("train") for word in f"{pair.src_text} {pair.tgt_text}".split()}
    assert {word for pair in all_pairs() for word in f"{pair.src_text} {pair.tgt_text}".split()} == training


def test_aligned_words_translate_each_other():
    words = {"I": "ich", "can": "können", "want": "möchten", "eat": "essen", "drink": "trinken", "read": "lesen"}
    for pair in all_pairs():
        source, target = tokens_of(pair.src_text), tokens_of(pair.tgt_text)
        links = {(source[i], target[j]) for i, j in pair.alignment}
        assert all((word, words[word]) in links for word in words.keys() & set(source))
        assert {j for _, j in pair.alignment} == set(range(len(target)))


def test_unknown_splits_and_languages_are_rejected():
    config = get_config("toy", lang_tgt="de")
    assert len(load_pairs("patterns:test", config)) == 40
    with pytest.raises(InputError, match="no split 'tests'"):
        load_pairs("patterns:tests", config)
    with pytest.raises(InputError, match="en to de"):
        load_pairs("patterns", get_config("toy", lang_tgt="it"))
