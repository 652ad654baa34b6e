"""Corpora: a source of sentence pairs, of whatever kind, to its pairs, and these to a seeded split."""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import HfApi
from huggingface_hub import constants as hub_constants

from config import Config, InputError
from corpora.toy import LANGUAGES, SPLIT_SIZES, toy_pairs

DATA_VERSION = 1  # raise it when reading or encoding changes: the cache of `datasets` does not see our code
MOST_VALIDATION = 10_000  # pairs split off for validation
LOCAL_SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")


def load_pairs(source: str, config: Config) -> datasets.Dataset:
    """The sentence pairs of a source (see `Config`) as columns `src` and `tgt`, unfiltered, on disk."""
    name, _, split = source.partition(":")
    if not name:
        raise InputError(f"the source {source!r} has no name; give one such as wmt/wmt14:validation")
    if name == "toy":
        return load_toy(split or "train", config)
    if name.endswith(LOCAL_SUFFIXES):
        return load_file(Path(source), config)
    if any(Path(f"{source}.{lang}").exists() for lang in (config.lang_src, config.lang_tgt)):
        return load_aligned(source, config)
    is_path = source.startswith((".", "/", "~")) or (Path(name).parent.is_dir() and "/" in name)
    if is_path and not Path(name).is_dir():
        raise InputError(
            f"no {source}.{config.lang_src} and no folder {source}; give the path of a corpus, or --datasource toy"
        )
    return load_hub(name, split or "train", config)


def load_toy(split: str, config: Config) -> datasets.Dataset:
    for lang in (config.lang_src, config.lang_tgt):
        if lang not in LANGUAGES:
            raise InputError(f"the toy corpus has no language {lang!r}; it has {', '.join(LANGUAGES)}")
    if split not in SPLIT_SIZES:
        raise InputError(f"the toy corpus has no split {split!r}; it has {', '.join(SPLIT_SIZES)}")
    pairs = toy_pairs(config.lang_src, config.lang_tgt, split)
    return datasets.Dataset.from_dict({"src": [p.src_text for p in pairs], "tgt": [p.tgt_text for p in pairs]})


def load_file(path: Path, config: Config) -> datasets.Dataset:
    """A .tsv, .csv, .jsonl or .parquet file."""
    if not path.is_file():
        raise InputError(f"no file {path}; give the path of a corpus, or --datasource toy")
    return to_arrow(read_file, [path], config)


def load_aligned(prefix: str, config: Config) -> datasets.Dataset:
    """Two text files, a sentence a line: PREFIX.en and PREFIX.it."""
    paths = [Path(f"{prefix}.{lang}") for lang in (config.lang_src, config.lang_tgt)]
    check_aligned(paths)
    return to_arrow(read_aligned, paths, config)


def check_aligned(paths: list[Path]) -> None:
    """Two text files are there and have equally many lines."""
    for path in paths:
        if not path.is_file():
            raise InputError(
                f"no file {path}; line n of one of {' and '.join(map(str, paths))} must translate line n of the other"
            )
    counts = [sum(1 for _ in path.open("rb")) for path in paths]
    if counts[0] != counts[1]:
        raise InputError(
            f"{paths[0]} has {counts[0]:,} lines and {paths[1]} has {counts[1]:,}; "
            "line n of one must translate line n of the other"
        )


def to_arrow(read, paths: list[Path], config: Config) -> datasets.Dataset:
    """Streams what `read` yields into an Arrow file of the datasets cache; done once for each state of the files."""
    # A tuple: a list would mean shards.
    stamps = tuple((os.path.abspath(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    arguments = {"stamps": stamps, "languages": (config.lang_src, config.lang_tgt), "version": DATA_VERSION}
    features = datasets.Features({"src": datasets.Value("string"), "tgt": datasets.Value("string")})
    try:
        return datasets.Dataset.from_generator(read, features=features, gen_kwargs=arguments)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise InputError(f"{paths[0]} cannot be read ({error.__cause__}); mend or convert it") from None
    except ValueError as error:
        if "no data" in str(error):  # what the library says of a generator that yields nothing
            raise InputError(f"{paths[0]} holds no pair; give a file with sentences") from None
        raise


def read_lines(file: Iterable[bytes], name: str) -> Iterator[str]:
    """The lines of a binary file without their end. Only a newline ends a line; a byte-order mark is dropped."""
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode("utf8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise InputError(f"{name} line {number} is not UTF-8; convert it, say with iconv -t utf8") from None
        yield text.removeprefix("\ufeff") if number == 1 else text


def lines_of(path: str) -> Iterator[str]:
    with open(path, "rb") as file:
        yield from read_lines(file, path)


def read_aligned(stamps: tuple[tuple, ...], languages: tuple[str, str], version: int) -> Iterator[dict]:
    for src, tgt in zip(*(lines_of(path) for path, *_ in stamps), strict=True):
        yield {"src": src, "tgt": tgt}


def read_file(stamps: tuple[tuple, ...], languages: tuple[str, str], version: int) -> Iterator[dict]:
    path = stamps[0][0]
    rows = {".tsv": read_table, ".csv": read_table, ".jsonl": read_jsonl, ".parquet": read_parquet}[Path(path).suffix]
    for number, row in enumerate(rows(path, languages), start=1):
        src, tgt = (pick(row, lang, f"{path} row {number}") for lang in languages)
        yield {"src": src, "tgt": tgt}


def read_table(path: str, languages: tuple[str, str]) -> Iterator[dict]:
    """Rows of a .tsv (no quoting) or .csv. A first row that names a language is a header; else source comes first."""
    lines = lines_of(path)
    quoted = csv.reader(f"{line}\n" for line in lines)
    rows = quoted if path.endswith(".csv") else (line.split("\t") for line in lines)
    header = list(languages)
    for number, cells in enumerate(rows, start=1):
        if number == 1 and set(cells) & set(languages):
            header = cells
        elif cells in ([], [""]):  # a blank line is a blank pair
            yield dict.fromkeys(languages, "")
        elif len(cells) < 2:
            separator = "comma" if path.endswith(".csv") else "tab"
            raise InputError(f"{path} row {number} has one column; give source {separator} target")
        else:
            yield dict(zip(header, cells, strict=False))


def read_jsonl(path: str, languages: tuple[str, str]) -> Iterator[dict]:
    for number, line in enumerate(lines_of(path), start=1):
        try:
            yield json.loads(line) if line.strip() else dict.fromkeys(languages, "")
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} line {number} is not JSON ({error}); give one object a line") from None


def read_parquet(path: str, languages: tuple[str, str]) -> Iterator[dict]:
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1_000):
            yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a Parquet file ({error}); write it again") from None


def pick(row: dict, lang: str, where: str) -> str:
    """One language of a row, which holds {"en": …} or {"translation": {"en": …}}; a missing text counts as blank."""
    texts = row.get("translation", row) if isinstance(row, dict) else {}
    texts = texts if isinstance(texts, dict) else {}
    if lang not in texts:
        have = ", ".join(map(str, texts)) or "none"
        raise InputError(f"{where} has no language {lang!r}; it has {have}: change --lang-src or --lang-tgt")
    text = texts[lang]
    if not isinstance(text, str | None):
        raise InputError(f"{where}: {lang} is {text!r}; give a string")
    return text or ""


def load_hub(name: str, split: str, config: Config) -> datasets.Dataset:
    """A dataset of the Hub, or a local folder in its layout, with a `translation` column or one column a language."""
    local = Path(name).is_dir()
    if not local and not hub_answers(name):
        hub_constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True  # a copy in the cache will do
    try:
        subset = hub_subset(name, config)
        hub = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, ValueError) and "split" in str(error):
            raise InputError(f"{name} has no split {split!r}: {error}") from None
        if local:
            raise InputError(
                f"the folder {name} cannot be read as a dataset ({error}); give Parquet files, or a .tsv file"
            ) from None
        raise InputError(
            f"the Hub dataset {name!r} is out of reach (no network, or no such dataset); "
            "use local files, --datasource data/train for data/train.en and data/train.it, or --preset toy"
        ) from None
    languages = (config.lang_src, config.lang_tgt)
    for lang in languages if len(hub) else ():
        pick(hub[0], lang, f"{name} ({subset})")

    def columns(batch: dict) -> dict:
        rows = batch.get("translation") or [
            dict(zip(languages, texts, strict=True)) for texts in zip(*(batch[lang] for lang in languages), strict=True)
        ]
        return {
            side: [(row or {}).get(lang) or "" for row in rows]
            for side, lang in zip(("src", "tgt"), languages, strict=True)
        }

    return hub.map(columns, batched=True, remove_columns=hub.column_names, desc=f"Reading {name}")


def hub_answers(name: str) -> bool:
    """One quick question, where the loader would try again and again for half a minute."""
    try:
        HfApi().dataset_info(name, timeout=10)
    except Exception:  # no network, no such dataset, not for us: the HTTP library's own error classes come and go
        return False
    return True


def hub_subset(name: str, config: Config) -> str:
    """The subset for the language pair, in either order, as in opus_books' en-it; or the only one there is."""
    names = datasets.get_dataset_config_names(name)
    pairs = [f"{config.lang_src}-{config.lang_tgt}", f"{config.lang_tgt}-{config.lang_src}"]
    for pair in pairs:
        if pair in names:
            return pair
    if len(names) == 1:
        return names[0]
    raise InputError(f"{name} has no {pairs[0]} or {pairs[1]}; it has {', '.join(sorted(names))}")


def load_split(config: Config, split: str) -> datasets.Dataset:
    """The pairs of `train`, `validation` or `test`. The seeded split comes before anything looks at the text."""
    if split == "test":
        if not config.test_source:
            raise InputError("this run has no test_source; name one with --test-source, or use --split validation")
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
    if count > MOST_VALIDATION:
        return split_in_runs(pairs, rng, split)
    order = rng.permutation(len(pairs))
    return pairs.select(np.sort(order[:count] if split == "validation" else order[count:]))


def split_in_runs(pairs: datasets.Dataset, rng: np.random.Generator, split: str) -> datasets.Dataset:
    """Of a large corpus, MOST_VALIDATION pairs in a hundred runs of neighbours from all over it, or the rest.

    So neither part needs a list of its rows.
    """
    length = MOST_VALIDATION // 100
    starts = np.sort(rng.choice(len(pairs) // length, 100, replace=False)) * length
    ends = [0, *(end for start in starts.tolist() for end in (start, start + length)), len(pairs)]
    parts = list(pairwise(ends))[1::2] if split == "validation" else list(pairwise(ends))[::2]
    return datasets.concatenate_datasets([pairs.select(range(*part)) for part in parts if part[0] < part[1]])


def count_shared(train: datasets.Dataset, validation: datasets.Dataset) -> int:
    """How many validation pairs also stand in the training set, where scores would flatter."""
    held = set(zip(validation["src"], validation["tgt"], strict=True))
    sources = pa.array({src for src, _ in held})
    seen = set()
    for batch in train.with_format("arrow").iter(batch_size=10_000):
        like = batch.filter(pc.is_in(batch["src"], sources))  # a few, so that only they become Python strings
        seen |= held.intersection(zip(like["src"].to_pylist(), like["tgt"].to_pylist(), strict=True))
    return len(seen)
