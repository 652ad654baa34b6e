"""Word alignments from cross-attention.

    L  layers    H  heads    Q  query positions    K  key positions    S  source words    T  target words

A link (i, j) says that target word j translates source word i. Words are counted from 0; punctuation marks are words.
"""

from collections import Counter

import numpy as np

Links = set[tuple[int, int]]


def merge_weights(weights: np.ndarray, rows: list[int], columns: list[int]) -> np.ndarray:
    """Weights (…, Q, K) with tokens merged into groups: summed over keys, averaged over queries.

    `rows` and `columns` hold the index of the group of each query and key. Rows still sum to 1.
    """
    of_row, of_column = (np.eye(index[-1] + 1, dtype=np.float32)[index] for index in (rows, columns))
    return (of_row / of_row.sum(0)).T @ weights @ of_column


def strongest_links(weights: np.ndarray) -> Links:
    """Links each target word to the source word with the largest weight, for weights (T, S + 2).

    The first and the last column are [SOS] and [EOS]; a word with its largest weight there has no link.
    """
    T, K = weights.shape
    best = weights.argmax(1) - 1
    return {(int(best[j]), j) for j in range(T) if 0 <= best[j] < K - 2}


def lexical_consistency(sentences: list[tuple[list[str], list[str], Links]]) -> float:
    """How well a target word predicts the source word that it is linked to, from 0 to 1; needs no gold alignments.

    For sentences as (source words, target words, links). With n(s, t) links between the words s and t, n(s) links of
    s, n(t) occurrences of t and N target words, it is the sum of n(s, t)² / (n(t) N) minus the sum of (n(s) / N)²: the
    chance of guessing the linked word with t known, minus that without. This is the numerator of the tau of Goodman
    and Kruskal (1954, section 9). It is 0 if every word is linked to the same word or to none.
    """
    pairs = Counter((source[i], target[j]) for source, target, links in sentences for i, j in links)
    targets = Counter(word for _, target, _ in sentences for word in target)
    sources, N = Counter(), max(1, targets.total())
    for (s, _), n in pairs.items():
        sources[s] += n
    known = sum(n * n / targets[t] for (_, t), n in pairs.items()) / N
    return known - sum(n * n for n in sources.values()) / N**2


def pharaoh(links: Links) -> str:
    """The links in Pharaoh format: source-target, such as "0-0 1-0 2-1", ordered by target word."""
    return " ".join(f"{i}-{j}" for i, j in sorted(links, key=lambda link: (link[1], link[0])))
