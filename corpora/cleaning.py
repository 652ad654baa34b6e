"""Cleaning of the training pairs: exact duplicates, and pairs whose sides differ too much in length."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow.compute as pc

if TYPE_CHECKING:
    from datasets import Dataset

PAIRS_AT_A_TIME = 10_000


class Removed(NamedTuple):
    """The numbers of training pairs that cleaning has removed."""

    duplicates: int = 0
    length_ratio: int = 0


def clean(pairs: Dataset, max_length_ratio: float = 0.0, drop_duplicates: bool = False) -> tuple[Dataset, Removed]:
    """The pairs that remain, in the same order, and how many were removed.

    With `drop_duplicates`, the first of several equal pairs remains. With `max_length_ratio` above 0, the longer side
    of a pair has at most that many times as many characters as the shorter one. Pairs with a blank side remain, because
    encoding skips and counts them. Memory: 8 bytes per pair for each of the two.
    """
    keep = first_occurrences(pairs) if drop_duplicates else np.ones(len(pairs), dtype=bool)
    duplicates = len(pairs) - int(keep.sum())
    if max_length_ratio:
        keep &= length_ratios(pairs) <= max_length_ratio
    if keep.all():
        return pairs, Removed()
    return pairs.select(np.flatnonzero(keep)), Removed(duplicates, int((~keep).sum()) - duplicates)


def first_occurrences(pairs: Dataset) -> np.ndarray:
    """True for the pairs that equal no earlier one, by 64-bit hashes; (pairs,)."""
    hashes = np.empty(len(pairs), dtype=np.uint64)
    start = 0
    for batch in pairs.iter(PAIRS_AT_A_TIME):
        for src, tgt in zip(batch["src"], batch["tgt"], strict=True):
            text = f"{len(src)} {src}{tgt}"  # the length separates the sides
            hashes[start] = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
            start += 1
    _, first = np.unique(hashes, return_index=True)
    is_first = np.zeros(len(pairs), dtype=bool)
    is_first[first] = True
    return is_first


def length_ratios(pairs: Dataset) -> np.ndarray:
    """Characters of the longer side divided by those of the shorter one, 0 if a side is blank; (pairs,)."""
    ratios = [np.empty(0)]
    for batch in pairs.with_format("arrow").iter(PAIRS_AT_A_TIME):
        src, tgt = (pc.utf8_length(pc.utf8_trim_whitespace(batch[side])).to_numpy() for side in ("src", "tgt"))
        shorter, longer = np.minimum(src, tgt), np.maximum(src, tgt)
        ratios.append(np.where(shorter > 0, longer / np.maximum(shorter, 1), 0.0))
    return np.concatenate(ratios)
