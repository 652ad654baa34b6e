"""Loads sentence pairs from any supported source, and splits them into training and validation.

`load_pairs` loads one source: a built-in corpus, local files (corpora/files.py), or a Hub dataset. `load_split`
chooses the source for training, validation or test, and splits it where needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from config import Config, InputError, split_source
from corpora.files import FORMATS, format_of, load_aligned, load_file, text_file, text_of
from corpora.patterns import SPLITS, pattern_pairs
from corpora.toy import LANGUAGES, SPLIT_SIZES, Pair, toy_pairs

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

HUB_TIMEOUT = 10  # seconds
MAX_VALIDATION_PAIRS = 10_000  # maximum number of pairs split off for validation
VALIDATION_BLOCKS = 100  # number of blocks of consecutive pairs in the validation set of a large corpus
COMPARED_PAIRS = 10_000  # training pairs compared with the validation set at a time


def load_pairs(source: str, config: Config) -> Dataset:
    """All sentence pairs of a source (see `Config`), unfiltered, as the memory-mapped columns `src` and `tgt`.

    Raises InputError if the source does not exist or cannot be read.
    """
    if format_of(source) in FORMATS:
        return load_file(Path(source), config)
    name, split = split_source(source)
    if not name:
        raise InputError(f"the source {source!r} has no name; give one such as wmt/wmt14:validation")
    if name == "toy":
        return load_toy(split or "train", config)
    if name == "patterns":
        return load_patterns(split or "train", config)
    languages = (config.lang_src, config.lang_tgt)
    if any(text_file(source, lang).exists() for lang in languages):
        return load_aligned(source, config)
    if Path(source).is_file():
        prefix, _, lang = source.removesuffix(".gz").rpartition(".")
        if lang in languages:
            raise InputError(f"{source} is one of two text files; give their common prefix, {prefix}")
        raise InputError(f"{source} has another format; give one of {', '.join(FORMATS)}, or two text files")
    is_path = source.startswith((".", "/", "~")) or (Path(name).parent.is_dir() and "/" in name)
    if is_path and not Path(name).is_dir():
        raise InputError(
            f"no {source}.{config.lang_src} and no folder {source}; give the path of a corpus, or --datasource toy"
        )
    return load_hub(name, split or "train", config)


# ---------------------------------------------------------------------------- built-in corpora


def load_toy(split: str, config: Config) -> Dataset:
    """A split of the toy corpus. Raises InputError for a language or split that it does not have."""
    for lang in (config.lang_src, config.lang_tgt):
        if lang not in LANGUAGES:
            raise InputError(f"the toy corpus has no language {lang!r}; it has {', '.join(LANGUAGES)}")
    if split not in SPLIT_SIZES:
        raise InputError(f"the toy corpus has no split {split!r}; it has {', '.join(SPLIT_SIZES)}")
    return dataset_of(toy_pairs(config.lang_src, config.lang_tgt, split))


def load_patterns(split: str, config: Config) -> Dataset:
    """A split of the corpus of three patterns. Raises InputError for a language or split that it does not have."""
    if (config.lang_src, config.lang_tgt) != ("en", "de"):
        raise InputError(f"the patterns corpus is en to de, not {config.lang_src} to {config.lang_tgt}")
    if split not in SPLITS:
        raise InputError(f"the patterns corpus has no split {split!r}; it has {', '.join(SPLITS)}")
    return dataset_of(pattern_pairs(split))


def gold_pairs(config: Config) -> list[Pair]:
    """Pairs with gold word alignments of a run's corpus, if it is built in, otherwise none.

    Test pairs of the toy corpus; all pairs of the patterns, those of test and validation first.
    """
    if config.datasource == "toy":
        return list(toy_pairs(config.lang_src, config.lang_tgt, "test"))
    if config.datasource == "patterns":
        return [pair for split in ("test", "validation", "train") for pair in pattern_pairs(split)]
    return []


def dataset_of(pairs: Iterable[Pair]) -> Dataset:
    from datasets import Dataset  # imported here because it takes a second

    return Dataset.from_dict({"src": [p.src_text for p in pairs], "tgt": [p.tgt_text for p in pairs]})


# ---------------------------------------------------------------------------- the Hugging Face Hub


def open_hub(name: str, split: str, config: Config, streaming: bool = False) -> tuple[Dataset | IterableDataset, str]:
    """A split of a Hub dataset, or of a local folder in the same layout, and its subset."""
    import datasets
    from huggingface_hub import constants

    is_local = Path(name).is_dir()
    if not is_local and not hub_has(name):
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True  # use only copies in the cache
    try:
        subset = hub_subset(name, config)
        return datasets.load_dataset(name, subset, split=split, streaming=streaming), subset
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, ValueError) and "split" in str(error):
            raise InputError(f"{name} has no split {split!r}: {error}") from None
        if is_local:
            raise InputError(
                f"the folder {name} cannot be read as a dataset ({error}); give Parquet files, or a .tsv file"
            ) from None
        raise InputError(
            f"the Hub dataset {name!r} cannot be reached (no network, or no such dataset), and there is no file "
            f"{name}.{config.lang_src}; give local files (see --help), or use --preset toy"
        ) from None


def load_hub(name: str, split: str, config: Config) -> Dataset:
    """A Hub dataset, or a local folder in the same layout, with a `translation` column or one column per language."""
    rows, subset = open_hub(name, split, config)
    languages = (config.lang_src, config.lang_tgt)
    if len(rows):
        for lang in languages:
            text_of(rows[0], lang, f"{name} ({subset})")

    def to_src_and_tgt(batch: dict) -> dict:
        if "translation" in batch:
            columns = [[(row or {}).get(lang) for row in batch["translation"]] for lang in languages]
        else:
            columns = [batch[lang] for lang in languages]
        return {side: [text or "" for text in column] for side, column in zip(("src", "tgt"), columns, strict=True)}

    return rows.map(to_src_and_tgt, batched=True, remove_columns=rows.column_names, desc=f"Reading {name}")


def hub_has(name: str) -> bool:
    """Whether the Hub can be reached and has this dataset. `load_dataset` itself would retry for half a minute."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT)
    except Exception:  # no network, no such dataset, no access: the error classes differ between versions
        return False
    return True


def hub_subset(name: str, config: Config) -> str:
    """The subset for the language pair in either order, such as en-it of opus_books; otherwise the only subset.

    Raises InputError if there are several subsets and none is for the pair.
    """
    from datasets import get_dataset_config_names

    subsets = get_dataset_config_names(name)
    wanted = [f"{config.lang_src}-{config.lang_tgt}", f"{config.lang_tgt}-{config.lang_src}"]
    for subset in wanted:
        if subset in subsets:
            return subset
    if len(subsets) == 1:
        return subsets[0]
    raise InputError(f"{name} has no {wanted[0]} or {wanted[1]}; it has {', '.join(sorted(subsets))}")


# ---------------------------------------------------------------------------- training, validation and test


def load_split(config: Config, split: str) -> Dataset:
    """The pairs of the split `train`, `validation` or `test`.

    Without a validation source, a random part of the training source is split off. It depends only on the seed, the
    fraction and the number of pairs. Raises InputError if there is no such split, or too few pairs to split.
    """
    if split == "test":
        if not config.test_source:
            raise InputError(
                "this run has no test_source; name one with --test-source when training, or use --split validation"
            )
        return load_pairs(config.test_source, config)
    if split == "validation" and config.validation_source:
        return load_pairs(config.validation_source, config)
    pairs = load_pairs(config.datasource, config)
    if config.validation_source:
        return pairs
    count = int(len(pairs) * config.validation_fraction)
    if count == 0:
        raise InputError(
            f"{len(pairs)} pairs are too few to split off {config.validation_fraction:.0%} for validation; "
            "give a --validation-source"
        )
    rng = np.random.default_rng(config.seed)
    if count > MAX_VALIDATION_PAIRS:
        return split_in_blocks(pairs, rng, split)
    order = rng.permutation(len(pairs))
    return pairs.select(np.sort(order[:count] if split == "validation" else order[count:]))


def split_in_blocks(pairs: Dataset, rng: np.random.Generator, split: str) -> Dataset:
    """Splits a large corpus: VALIDATION_BLOCKS random blocks of consecutive pairs are for validation.

    Both parts are then slices of the corpus, and neither needs a list of all its rows.
    """
    from datasets import concatenate_datasets

    block = MAX_VALIDATION_PAIRS // VALIDATION_BLOCKS  # pairs per block
    starts = np.sort(rng.choice(len(pairs) // block, VALIDATION_BLOCKS, replace=False)) * block
    ends = [0, *(end for start in starts.tolist() for end in (start, start + block)), len(pairs)]
    slices = list(pairwise(ends))[1::2] if split == "validation" else list(pairwise(ends))[::2]
    return concatenate_datasets([pairs.select(range(*part)) for part in slices if part[0] < part[1]])


def count_shared(train: Dataset, validation: Dataset) -> int:
    """The number of distinct validation pairs that also occur in the training set and inflate validation scores."""
    validation_pairs = set(zip(validation["src"], validation["tgt"], strict=True))
    sources = pa.array({src for src, _ in validation_pairs})
    shared = set()
    for batch in train.with_format("arrow").iter(batch_size=COMPARED_PAIRS):
        candidates = batch.filter(pc.is_in(batch["src"], sources))  # only these become Python strings
        texts = zip(candidates["src"].to_pylist(), candidates["tgt"].to_pylist(), strict=True)
        shared |= validation_pairs.intersection(texts)
    return len(shared)
