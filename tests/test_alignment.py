"""Word alignments: links from weights, their consistency, the choice of a head, and translate.py --alignments."""

import random
import sys

import numpy as np
import pytest
from conftest import ROOT

from config import InputError
from corpora.alignment import lexical_consistency, merge_weights, pharaoh, strongest_links
from corpora.toy import toy_pairs
from translate import Translator, alignment_lines, chosen_aligner, main


def test_words_are_linked_to_the_largest_weight_unless_it_is_at_sos_or_eos():
    weights = np.array([[0.1, 0.2, 0.7, 0.0], [0.0, 0.6, 0.3, 0.1], [0.9, 0.1, 0.0, 0.0], [0.0, 0.1, 0.1, 0.8]])
    links = strongest_links(weights)
    assert links == {(1, 0), (0, 1)}
    assert pharaoh(links) == "1-0 0-1"


def test_merged_weights_are_summed_over_keys_and_averaged_over_queries():
    weights = np.random.default_rng(0).dirichlet(np.ones(5), size=(2, 4))  # (2, Q, K)
    merged = merge_weights(weights, [0, 0, 1, 2], [0, 1, 1, 1, 2])
    assert merged.shape == (2, 3, 3)
    assert merged[1, 0, 1] == pytest.approx(weights[1, :2, 1:4].sum(1).mean())
    np.testing.assert_allclose(merged.sum(-1), 1)


def test_gold_links_are_more_consistent_than_shifted_constant_or_random_ones():
    pairs, rng = toy_pairs("en", "de", "validation")[:200], random.Random(0)

    def consistency(change) -> float:
        sentences = []
        for pair in pairs:
            source, target = pair.src_text.split(), pair.tgt_text.split()
            links = {(i, j) for i, j in pair.sure if i < len(source) and j < len(target)}
            sentences.append((source, target, {(change(i, len(source)), j) for i, j in links}))
        return lexical_consistency(sentences)

    gold = consistency(lambda i, n: i)
    assert gold > 0.6
    assert gold > consistency(lambda i, n: (i + 1) % n) + 0.1
    assert gold > consistency(lambda i, n: rng.randrange(n)) + 0.3
    assert consistency(lambda i, n: 0) < 0.4
    assert lexical_consistency([(["a", "."], ["b", "c"], {(1, 0), (1, 1)})] * 5) == 0  # all at one word
    assert lexical_consistency([([], [], set())]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("lang", ["it", "de"])
def test_alignments_of_test_sentences_are_close_to_gold(capsys, lang):
    """Alignment error rate (Och and Ney, 2003) of the words; the heads are chosen without gold alignments.

    Links to the word at the same position have 0.61 and 0.38.
    """
    translator = Translator.load(ROOT / "pretrained" / f"toy.en-{lang}", "cpu")
    pairs = toy_pairs("en", lang, "test")[:200]
    right = translator.translate([pair.src_text for pair in pairs])
    pairs = [pair for pair, text in zip(pairs, right, strict=True) if pair.tgt_text == text]
    assert len(pairs) > 50
    found = both = sure = 0
    for pair, line in zip(pairs, alignment_lines(translator, [pair.src_text for pair in pairs], 64), strict=True):
        links = {tuple(map(int, link.split("-"))) for link in line.split()}
        found, sure = found + len(links), sure + len(pair.sure)
        both += len(links & pair.sure) + len(links & pair.alignment)
    assert "alignments: cross-attention of the mean of heads" in capsys.readouterr().err
    with capsys.disabled():
        print(f"{lang}: {len(pairs)} sentences, alignment error rate {1 - both / (found + sure):.3f}")
    assert 1 - both / (found + sure) <= 0.03


@pytest.mark.slow
def test_the_command_prints_links_between_words_and_a_blank_line_for_a_blank_one(trained_run, capsys, monkeypatch):
    import io

    stdin = io.TextIOWrapper(io.BytesIO(b"I can eat an apple.\n\nShe sleeps.\n"))
    monkeypatch.setattr(sys, "stdin", stdin)
    main(run_dir=(str(trained_run),), alignments=True, device="cpu")
    first, blank, last = capsys.readouterr().out.splitlines()
    assert blank == ""
    for line, words in ((first, 6), (last, 3)):
        links = [tuple(map(int, link.split("-"))) for link in line.split()]
        assert all(0 <= i < words for i, _ in links)
        assert [j for _, j in links] == sorted({j for _, j in links})  # each target word once
    with pytest.raises(InputError, match="omit --n-best 2"):
        main("She sleeps.", run_dir=(str(trained_run),), alignments=True, n_best=2, beam_size=2)
    assert chosen_aligner(Translator.load(trained_run, "cpu"), 20).shift in (0, 1)


def test_heads_are_chosen_without_validation_sentences_that_are_too_long(run_with_odd_pairs, capsys):
    assert chosen_aligner(Translator.load(run_with_odd_pairs, "cpu")).heads
    assert "over 2 validation sentences" in capsys.readouterr().err
