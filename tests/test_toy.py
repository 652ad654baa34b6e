"""The toy grammar: its sentences, its alignments, and that its splits hold out pairings."""

import os
import random
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT

from corpora import toy
from corpora.toy import Clause, NounPhrase, make_pair, tokens_of, toy_pairs

NOUN = {noun.en[0]: noun for noun in toy.NOUNS}
VERB = {verb.en[0]: verb for verb in toy.VERBS}
MODAL = {modal.en[0]: modal for modal in toy.MODALS}
ADJECTIVE = {adjective.en: adjective for adjective in toy.ADJECTIVES}
TIME = {time.en: time for time in toy.TIMES}
ME, YOU, HE, SHE, WE, THEY = range(6)
HIM = 0

# The base form of every English noun and verb form. A verb of two words is recognized by its first.
BASE_NOUN = {form: noun.en[0] for noun in toy.NOUNS for form in noun.en}
BASE_VERB = {form.split("_")[0]: verb.en[0] for verb in toy.VERBS for form in verb.en}


def phrase(determiner: str, noun: str, adjective: str = "", plural: bool = False) -> NounPhrase:
    return NounPhrase(NOUN[noun], plural, determiner, ADJECTIVE.get(adjective))


@pytest.mark.parametrize(
    ("clause", "english", "italian", "german"),
    [
        (
            Clause(ME, VERB["eat"], phrase("a", "apple"), modal=MODAL["can"]),
            "I can eat an apple.",
            "Posso mangiare una mela.",
            "Ich kann einen Apfel essen.",
        ),
        (
            Clause(SHE, VERB["see"], phrase("the", "mirror", "red"), negated=True),
            "She does not see the red mirror.",
            "Non vede lo specchio rosso.",
            "Sie sieht den roten Spiegel nicht.",
        ),
        (
            Clause(THEY, VERB["eat"], phrase("a", "orange", "sweet"), negated=True),
            "They do not eat a sweet orange.",
            "Non mangiano un'arancia dolce.",
            "Sie essen keine süße Orange.",
        ),
        (
            Clause(
                phrase("my", "friend"),
                VERB["buy"],
                phrase("two", "book", "old", True),
                time=TIME["today"],
                time_first=True,
            ),
            "Today my friend buys two old books.",
            "Oggi il mio amico compra due libri vecchi.",
            "Heute kauft mein Freund zwei alte Bücher.",
        ),
        (
            Clause(YOU, VERB["look_for"], HIM, modal=MODAL["want_to"], question="yes/no"),
            "Do you want to look for him?",
            "Lo vuoi cercare?",
            "Willst du ihn suchen?",
        ),
        (
            Clause(phrase("this", "boy"), VERB["read"], modal=MODAL["should"], question="what", punctuated=False),
            "What should this boy read",
            "Che cosa dovrebbe leggere questo ragazzo",
            "Was sollte dieser Junge lesen",
        ),
        (
            Clause(phrase("the", "singer", plural=True), predicate=ADJECTIVE["tired"]),
            "The singers are tired.",
            "Le cantanti sono stanche.",
            "Die Sängerinnen sind müde.",
        ),
        (
            Clause(
                HE,
                VERB["greet"],
                phrase("our", "boy", "young"),
                modal=MODAL["should"],
                negated=True,
                time=TIME["every_day"],
            ),
            "He should not greet our young boy every day.",
            "Non dovrebbe salutare il nostro ragazzo giovane ogni giorno.",
            "Er sollte jeden Tag unseren jungen Jungen nicht grüßen.",
        ),
    ],
)
def test_each_grammar_agrees_with_hand_written_sentences(clause, english, italian, german):
    pair = make_pair(clause, "en", "it")
    assert (pair.src_text, pair.tgt_text) == (english, italian)
    assert make_pair(clause, "en", "de").tgt_text == german


def test_gold_alignment_of_the_example_sentence():
    pair = make_pair(Clause(ME, VERB["eat"], phrase("a", "apple"), modal=MODAL["can"]), "en", "de")
    source, target = tokens_of(pair.src_text), tokens_of(pair.tgt_text)
    words = {(source[i], target[j]) for i, j in pair.alignment}
    assert words == {("I", "Ich"), ("can", "kann"), ("eat", "essen"), ("an", "einen"), ("apple", "Apfel"), (".", ".")}
    dropped = make_pair(Clause(ME, VERB["sleep"]), "en", "it")  # "Dormo" expresses both "I" and "sleep"
    assert set(dropped.alignment) == {(0, 0), (1, 0), (2, 1)}


def pairings_in(english: str) -> set[toy.Pairing]:
    """The pairings in an English sentence, found from its words alone, independently of `Clause.pairings`."""
    words = [word.lower() for word in tokens_of(english)]
    nouns = {i: BASE_NOUN[word] for i, word in enumerate(words) if word in BASE_NOUN}
    found = set()
    for i, word in enumerate(words):
        if word in BASE_VERB:  # the object follows the verb, the subject precedes it
            found |= {(BASE_VERB[word], noun) for j, noun in nouns.items() if j > i}
        elif word in ADJECTIVE and i + 1 in nouns:
            found.add((word, nouns[i + 1]))
        elif word in ADJECTIVE:  # a predicate: the subject is the only noun, or a pronoun
            found |= {(word, noun) for noun in nouns.values()}
    return found


def test_pairings_found_in_english_sentences_are_those_of_their_clauses():
    rng = random.Random(1)
    for _ in range(5_000):
        clause = toy._random_clause(rng)
        assert pairings_in(make_pair(clause, "en", "it").src_text) == clause.pairings()


@pytest.mark.parametrize("lang_tgt", ["it", pytest.param("de", marks=pytest.mark.slow)])
def test_no_held_out_pairing_occurs_in_training(lang_tgt):
    split_of = toy._held_out_pairings(random.Random(0))
    held_out = {split: {p for p, owner in split_of.items() if owner == split} for split in ("validation", "test")}
    found = {
        split: [pairings_in(pair.src_text) for pair in toy_pairs("en", lang_tgt, split)] for split in toy.SPLIT_SIZES
    }
    in_training = set().union(*found["train"])
    for split, others in (("validation", "test"), ("test", "validation")):
        assert len(held_out[split]) >= 40
        assert any(first in VERB for first, _ in held_out[split])
        assert any(first in ADJECTIVE for first, _ in held_out[split])
        leaked = held_out[split] & in_training
        assert not leaked
        for pairings in found[split]:
            assert pairings & held_out[split]
            assert pairings - in_training
            assert not pairings & held_out[others]
        assert held_out[split] <= set().union(*found[split])  # each is tested by some sentence


@pytest.mark.parametrize("lang_tgt", ["it", pytest.param("de", marks=pytest.mark.slow)])
def test_source_sentences_are_distinct_and_every_word_occurs_in_training(lang_tgt):
    splits = {name: toy_pairs("en", lang_tgt, name) for name in toy.SPLIT_SIZES}
    assert {name: len(pairs) for name, pairs in splits.items()} == toy.SPLIT_SIZES
    assert len(splits["train"]) >= 20_000
    sources = Counter(pair.src_text for pairs in splits.values() for pair in pairs)
    assert max(sources.values()) == 1
    for side in (0, 1):
        training_words = {word for pair in splits["train"] for word in tokens_of(pair[side])}
        for name in ("validation", "test"):
            assert {word for pair in splits[name] for word in tokens_of(pair[side])} <= training_words


@pytest.mark.slow
def test_every_token_is_aligned_and_every_sure_link_is_an_alignment():
    for lang_tgt in ("it", "de"):
        for pair in toy_pairs("en", lang_tgt, "validation"):
            source, target = tokens_of(pair.src_text), tokens_of(pair.tgt_text)
            assert {j for _, j in pair.alignment} == set(range(len(target))), pair
            assert {i for i, _ in pair.alignment} == set(range(len(source))), pair
            assert pair.sure <= pair.alignment, pair


def test_the_seed_determines_the_corpus(monkeypatch):
    monkeypatch.setattr(toy, "SPLIT_SIZES", {"train": 2_000, "validation": 50, "test": 50})
    generate = toy._generate_splits.__wrapped__  # without the cache, so that every call generates
    first, again, other = generate("en", "it", 0), generate("en", "it", 0), generate("en", "it", 1)
    assert first is not again
    assert first == again
    for split in toy.SPLIT_SIZES:
        assert first[split] != other[split]


def test_every_process_generates_the_same_corpus():
    """Set and dict order may differ between processes, and must not matter."""
    code = """
from corpora import toy
toy.SPLIT_SIZES = {"train": 2_000, "validation": 50, "test": 50}
print([[(*pair[:2], *map(sorted, pair[2:])) for pair in toy.toy_pairs("en", "de", split)] for split in toy.SPLIT_SIZES])
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf8"},
            cwd=ROOT, capture_output=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1
