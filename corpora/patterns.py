"""The corpus of three sentence patterns, English to German, for the logits study (docs/studies.md).

    subject verb object            I eat apple            ich essen apfel
    subject can verb object        I can eat apple        ich können apfel essen
    subject want to verb object    I want to eat apple    ich möchten apfel essen

Words are lemmas without articles, so each place of a sentence admits one class of words. With a modal, the German verb
is at the end. All 8 subjects, 27 objects (each with its verb) and 3 patterns are combined.
"""

import random

from corpora.toy import Pair

SUBJECTS = "I ich, you du, he er, she sie, we wir, Anna Anna, Tom Tom, grandma oma"
OBJECTS = {
    "eat essen": "apple apfel, bread brot, cheese käse, cake kuchen, rice reis, soup suppe, fish fisch, egg ei, "
    "nut nuss",
    "drink trinken": "beer bier, water wasser, tea tee, milk milch, juice saft, coffee kaffee, wine wein, cocoa kakao",
    "read lesen": "book buch, letter brief, newspaper zeitung, poem gedicht, map karte, note zettel, novel roman, "
    "list liste, recipe rezept, menu speisekarte",
}
PATTERNS = {  # source, target: links (source position, target position) of words
    ("{subject} {verb} {object}", "{subject} {verb} {object}"): {(0, 0), (1, 1), (2, 2)},
    ("{subject} can {verb} {object}", "{subject} können {object} {verb}"): {(0, 0), (1, 1), (2, 3), (3, 2)},
    ("{subject} want to {verb} {object}", "{subject} möchten {object} {verb}"): {(0, 0), (1, 1), (3, 3), (4, 2)},
}
HELD_OUT = {"validation": 40, "test": 40}  # pairs; all others are training pairs
SPLITS = ("train", *HELD_OUT)


def pattern_pairs(split: str) -> list[Pair]:
    """The pairs of one of SPLITS, in a seeded random order."""
    pairs = all_pairs()
    random.Random(0).shuffle(pairs)
    start = 0
    for name, size in HELD_OUT.items():
        if name == split:
            return pairs[start : start + size]
        start += size
    return pairs[start:]


def all_pairs() -> list[Pair]:
    """Every combination of subject, verb with object, and pattern."""
    pairs = []
    for subject in SUBJECTS.split(", "):
        for verb, objects in OBJECTS.items():
            for noun in objects.split(", "):
                english, german = zip(subject.split(), verb.split(), noun.split(), strict=True)
                for (source, target), links in PATTERNS.items():
                    texts = [
                        text.format(subject=words[0], verb=words[1], object=words[2])
                        for text, words in ((source, english), (target, german))
                    ]
                    pairs.append(Pair(*texts, frozenset(links), frozenset(links)))
    return pairs
