import random
from collections import Counter

import pytest

from corpora import toy
from corpora.toy import Clause, NounPhrase, make_pair, tokens_of, toy_pairs

NOUN = {noun.en[0]: noun for noun in toy.ALL_NOUNS}
VERB = {verb.en[0]: verb for verb in toy.ALL_VERBS}
MODAL = {modal.en[0]: modal for modal in toy.ALL_MODALS}
ADJECTIVE = {adjective.en: adjective for adjective in toy.ALL_ADJECTIVES}
TIME = {time[0]: time for time in toy.ALL_TIMES}
ME, YOU, HE, SHE, WE, THEY = range(6)


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
            Clause(YOU, VERB["look_for"], HE - 2, modal=MODAL["want_to"], question="yes/no"),
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
def test_the_grammar_of_each_language(clause, english, italian, german):
    pair = make_pair(clause, "en", "it")
    assert (pair.src_text, pair.tgt_text) == (english, italian)
    assert make_pair(clause, "en", "de").tgt_text == german


def test_gold_alignment_of_the_example_sentence():
    pair = make_pair(Clause(ME, VERB["eat"], phrase("a", "apple"), modal=MODAL["can"]), "en", "de")
    source, target = tokens_of(pair.src_text), tokens_of(pair.tgt_text)
    words = {(source[i], target[j]) for i, j in pair.alignment}
    assert words == {("I", "Ich"), ("can", "kann"), ("eat", "essen"), ("an", "einen"), ("apple", "Apfel"), (".", ".")}
    dropped = make_pair(Clause(ME, VERB["sleep"]), "en", "it")  # Dormo. says both I and sleep
    assert set(dropped.alignment) == {(0, 0), (1, 0), (2, 1)}


@pytest.mark.parametrize("lang_tgt", ["it", "de"])
def test_splits_hold_out_pairings_while_every_word_is_seen(lang_tgt):
    splits = {name: toy_pairs("en", lang_tgt, name) for name in toy.SPLIT_SIZES}
    assert len(splits["train"]) >= 20_000
    sources = Counter(pair.src_text for pairs in splits.values() for pair in pairs)
    assert max(sources.values()) == 1  # all different, also across the splits
    seen = {side: {w for p in splits["train"] for w in tokens_of(p[side])} for side in (0, 1)}
    for name in ("validation", "test"):
        for side in (0, 1):
            assert {w for p in splits[name] for w in tokens_of(p[side])} <= seen[side]
    # The words of a held-out pairing never meet in a training sentence as verb and object.
    owner = toy._held_out(random.Random(0))
    for (first, noun), split in list(owner.items())[:20]:
        assert split in ("validation", "test")
        clauses = [Clause(ME, VERB[first], phrase("the", noun))] if first in VERB else []
        for clause in clauses:
            assert make_pair(clause, "en", lang_tgt).src_text not in {p.src_text for p in splits["train"]}


def test_every_target_token_is_aligned_and_every_position_exists():
    for lang_tgt in ("it", "de"):
        for pair in toy_pairs("en", lang_tgt, "validation"):
            source, target = tokens_of(pair.src_text), tokens_of(pair.tgt_text)
            assert {j for _, j in pair.alignment} == set(range(len(target))), pair
            assert {i for i, _ in pair.alignment} == set(range(len(source))), pair


def test_the_seed_decides():
    assert toy_pairs("en", "it", "test")[:5] == toy_pairs("en", "it", "test", seed=0)[:5]
    assert toy_pairs("en", "it", "test")[:5] != toy_pairs("en", "it", "test", seed=1)[:5]
