"""Corpora to batches: source, pairs of sentences, split, tokenizers, ids in Arrow files, padded batches.

B  sentences in the batch    S  source length in tokens    T  target length in tokens
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from huggingface_hub import HfApi
from huggingface_hub import constants as hub_constants
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import DataLoader

from config import Config, InputError, latest_weights_file_path, write_atomically
from model import causal_mask
from toy_corpus import LANGUAGES, SPLIT_SIZES, toy_pairs

SPECIAL_TOKENS = ["[UNK]", "[PAD]", "[SOS]", "[EOS]"]
UNK, PAD, SOS, EOS = range(4)
DATA_VERSION = 1  # raise it when reading or encoding changes: the cache of `datasets` does not see our code
LOCAL_SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")

# ---------------------------------------------------------------------------- sources to pairs


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
    order = np.random.default_rng(config.seed).permutation(len(pairs))
    return pairs.select(np.sort(order[:count] if split == "validation" else order[count:]))


# ---------------------------------------------------------------------------- tokenizers


def get_or_build_tokenizer(config: Config, pairs: datasets.Dataset, lang: str) -> Tokenizer:
    """The run's tokenizer of a language, from its folder; or one trained on these pairs, and saved there.

    A folder without a checkpoint is no run yet, so what lies in it is not trusted.
    """
    path = tokenizer_path(config, lang)
    if path.is_file() and latest_weights_file_path(config):
        return load_tokenizer(path)
    side = "src" if lang == config.lang_src else "tgt"
    sides = ["src", "tgt"] if config.shared_vocab else [side]
    texts = (text for batch in pairs.iter(batch_size=1_000) for s in sides for text in batch[s])
    build = build_word_tokenizer if config.tokenizer == "word" else build_bpe_tokenizer
    tokenizer = build(texts, config.vocab_size)
    if tokenizer.get_vocab_size() <= len(SPECIAL_TOKENS):
        raise InputError(f"no words to learn from in {config.datasource}; give a larger corpus, or --tokenizer bpe")
    write_atomically(path, tokenizer.to_str(pretty=True))
    if config.shared_vocab:
        other = config.lang_tgt if side == "src" else config.lang_src
        write_atomically(tokenizer_path(config, other), tokenizer.to_str(pretty=True))
    return tokenizer


def tokenizer_path(config: Config, lang: str) -> Path:
    return config.folder / f"tokenizer_{lang}.json"


def load_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise InputError(f"no file {path}; the run's folder is not whole, copy it again")
    try:
        return plain_text(Tokenizer.from_file(str(path)))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise InputError(f"{path} is not a tokenizer ({error}); copy the run's folder again") from None


def plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """Makes "[SOS]" typed in a sentence four ordinary pieces, not the special token."""
    tokenizer.encode_special_tokens = True
    return tokenizer


def build_word_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Whole words and punctuation marks seen at least twice; the rest is [UNK]."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # Joined with spaces, which then go from before a full stop and around an apostrophe.
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=True), decoders.Fuse(), decoders.Replace(" ' ", "'")]
    )
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, min_frequency=2, special_tokens=SPECIAL_TOKENS)
    tokenizer.train_from_iterator(texts, trainer)
    return plain_text(tokenizer)


def build_bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Pieces of words (Sennrich et al., 2016); a character never seen falls back to its bytes, so nothing is [UNK]."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", byte_fallback=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS + bytes_)
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer takes the bytes only as special tokens, which decoding would leave out.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL_TOKENS]
    return plain_text(Tokenizer.from_str(json.dumps(state)))


# ---------------------------------------------------------------------------- ids and batches


class BilingualDataset(torch.utils.data.Dataset):
    """Encoded pairs, memory-mapped. A list of positions indexes a padded batch, a dict of

    encoder_input (B, S), decoder_input (B, T) and label (B, T), int64;
    encoder_mask (B, 1, 1, S) and decoder_mask (B, 1, T, T), boolean, True = may attend;
    src_text and tgt_text, lists of B strings.

    Pairs with a blank side or with more than `seq_len` tokens are left out and counted in
    `skipped_blank` and `skipped_long`.
    """

    def __init__(self, pairs: datasets.Dataset, tokenizer_src: Tokenizer, tokenizer_tgt: Tokenizer, seq_len: int):
        self.skipped_blank = count_blank(pairs)
        self.encoded = pairs.map(
            encode_pairs,
            batched=True,
            fn_kwargs={
                "tokenizer_src": tokenizer_src,
                "tokenizer_tgt": tokenizer_tgt,
                "seq_len": seq_len,
                "version": DATA_VERSION,
            },
            features=datasets.Features(
                pairs.features | {side: datasets.List(datasets.Value("int32")) for side in ("src_ids", "tgt_ids")}
            ),
            desc="Encoding pairs",
        ).with_format("arrow")
        self.skipped_long = len(pairs) - len(self.encoded) - self.skipped_blank
        if len(self.encoded) == 0:
            raise InputError(
                f"no pair is left: {self.skipped_blank:,} are blank, {self.skipped_long:,} have over {seq_len} tokens; "
                "raise --seq-len or check the source"
            )
        self.src_lengths, self.tgt_lengths = (
            pc.list_value_length(self.encoded.data.column(side)).to_numpy() for side in ("src_ids", "tgt_ids")
        )

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, positions: list[int]) -> dict:
        rows = self.encoded[positions]  # an Arrow table
        encoder_input = pad(rows["src_ids"])  # (B, S)
        target = pad(rows["tgt_ids"])  # (B, T + 1): [SOS] … [EOS]
        label = target[:, 1:]
        decoder_input = target[:, :-1].masked_fill(label == PAD, PAD)
        return {
            "encoder_input": encoder_input,
            "decoder_input": decoder_input,
            "encoder_mask": padding_mask(encoder_input),
            "decoder_mask": padding_mask(decoder_input) & causal_mask(decoder_input.size(1)),
            "label": label,
            "src_text": rows["src"].to_pylist(),
            "tgt_text": rows["tgt"].to_pylist(),
        }


def encode_pairs(batch: dict, tokenizer_src: Tokenizer, tokenizer_tgt: Tokenizer, seq_len: int, version: int) -> dict:
    """Texts to ids with [SOS] and [EOS]; blank and over-long pairs drop out."""
    src_ids = [[SOS, *e.ids, EOS] for e in tokenizer_src.encode_batch_fast(batch["src"])]
    tgt_ids = [[SOS, *e.ids, EOS] for e in tokenizer_tgt.encode_batch_fast(batch["tgt"])]
    columns = {"src": batch["src"], "tgt": batch["tgt"], "src_ids": src_ids, "tgt_ids": tgt_ids}
    # The decoder reads the target without its [EOS], so that side may hold one more.
    keep = [
        src.strip() != "" and tgt.strip() != "" and len(s) <= seq_len and len(t) - 1 <= seq_len
        for src, tgt, s, t in zip(*columns.values(), strict=True)
    ]
    return {name: [value for value, kept in zip(values, keep, strict=True) if kept] for name, values in columns.items()}


def count_shared(train: datasets.Dataset, validation: datasets.Dataset) -> int:
    """How many validation pairs also stand in the training set, where scores would flatter."""
    held = set(zip(validation["src"], validation["tgt"], strict=True))
    seen = set()
    for batch in train.iter(batch_size=10_000):
        seen |= held.intersection(zip(batch["src"], batch["tgt"], strict=True))
    return len(seen)


def count_blank(pairs: datasets.Dataset) -> int:
    total = 0
    for batch in pairs.with_format("arrow").iter(batch_size=10_000):
        blank = [pc.equal(pc.utf8_trim_whitespace(batch[side]), "") for side in ("src", "tgt")]
        total += pc.sum(pc.or_(*blank)).as_py() or 0
    return total


def pad(ids: pa.ChunkedArray) -> torch.Tensor:
    """Lists of ids to one (B, longest) tensor, filled up with [PAD] on the right."""
    lengths = pc.list_value_length(ids).to_numpy()
    padded = np.full((len(lengths), lengths.max()), PAD, dtype=np.int64)
    padded[np.arange(lengths.max()) < lengths[:, None]] = pc.list_flatten(ids).to_numpy()
    return torch.from_numpy(padded)


def padding_mask(ids: torch.Tensor) -> torch.Tensor:
    return (ids != PAD)[:, None, None, :]  # (B, S) -> (B, 1, 1, S)


def make_batches(dataset: BilingualDataset, config: Config, epoch: int | None) -> list[list[int]]:
    """Positions in batches of like lengths, each pair in exactly one; a pure function of seed and epoch.

    A batch holds as many sentences as keep sentences x longest sentence within `batch_tokens` (at
    least one), or `batch_size` sentences where that is 0. With `epoch` None the order is fixed.
    """
    lengths = np.maximum(dataset.src_lengths, dataset.tgt_lengths - 1)
    rng = np.random.default_rng((config.seed, epoch or 0))
    if config.batch_tokens == 0:
        order = rng.permutation(len(lengths)) if epoch is not None else np.arange(len(lengths))
        return [order[i : i + config.batch_size].tolist() for i in range(0, len(order), config.batch_size)]
    ties = rng.permutation(len(lengths))
    order = np.lexsort((ties, dataset.src_lengths, dataset.tgt_lengths))
    batches, start, longest = [], 0, 0
    for i, length in enumerate(lengths[order].tolist()):
        longest = max(longest, length)
        if i > start and (i + 1 - start) * longest > config.batch_tokens:
            batches.append(order[start:i].tolist())
            start, longest = i, length
    batches.append(order[start:].tolist())
    if epoch is not None:
        rng.shuffle(batches)
    return batches


def make_loader(
    dataset: BilingualDataset, batches: list[list[int]], num_workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """Yields the dataset's batch for each list of positions. Its own generator leaves the global RNG alone."""
    return DataLoader(
        dataset,
        sampler=batches,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )


def get_ds(config: Config) -> tuple[BilingualDataset, BilingualDataset, Tokenizer, Tokenizer]:
    """Training set, validation set and the two tokenizers, which have seen the training part alone."""
    train_pairs, validation_pairs = load_split(config, "train"), load_split(config, "validation")
    tokenizer_src = get_or_build_tokenizer(config, train_pairs, config.lang_src)
    if config.shared_vocab:
        tokenizer_tgt = load_tokenizer(tokenizer_path(config, config.lang_tgt))
    else:
        tokenizer_tgt = get_or_build_tokenizer(config, train_pairs, config.lang_tgt)
    train, validation = (
        BilingualDataset(pairs, tokenizer_src, tokenizer_tgt, config.seq_len)
        for pairs in (train_pairs, validation_pairs)
    )
    return train, validation, tokenizer_src, tokenizer_tgt
