"""From sentence pairs to batches: tokenizers, token ids in Arrow files, padded batches.

B  batch (sentences)    S  source length in tokens    T  target length in tokens
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import DataLoader

from compute import distributed
from config import Config, InputError
from corpora.cleaning import Removed, clean
from corpora.files import DATA_VERSION
from corpora.sources import load_split
from model import causal_mask
from runs.files import MAX_TEXT_BYTES, check_regular, write_atomically
from runs.folder import RunFolder

if TYPE_CHECKING:
    from datasets import Dataset

PAIRS_PER_PROCESS = 100_000  # encoding fewer pairs takes less time than starting a process
MAX_PROCESSES = 8  # for encoding; each needs a few hundred megabytes
GROWTH_SAMPLE = 500  # sentences of each language that are segmented before training to measure BPE-dropout
ESTIMATE_SAMPLE = 10_000  # pairs of a stream that are encoded before training
MAX_TOKENIZER_PAIRS = 1_000_000  # pairs that a tokenizer is trained on; more would only take longer

SPECIAL_TOKENS = ["[UNK]", "[PAD]", "[SOS]", "[EOS]"]
UNK, PAD, SOS, EOS = range(4)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # tokens of a BPE tokenizer for characters not seen in training

# ---------------------------------------------------------------------------- tokenizers


def get_or_build_tokenizer(config: Config, pairs: Dataset, lang: str) -> Tokenizer:
    """The run's tokenizer for a language: loaded from its folder, or trained on these pairs.

    `save_tokenizers` writes it there. In a folder without a checkpoint an existing tokenizer is ignored, because it may
    belong to another corpus. With `init_from`, it is that run's. Raises InputError if no word occurs twice.
    """
    folder = RunFolder.of(config)
    path = folder.tokenizer_file(lang)
    is_resuming = bool(folder.checkpoints()) and config.preload != "none"
    if path.is_file() and (is_resuming or not distributed.is_first()):
        return load_tokenizer(path)
    if config.init_from:
        return load_tokenizer(RunFolder.find(config.init_from).tokenizer_file(lang))
    return build_tokenizer(config, pairs, lang)


def save_tokenizers(config: Config, *tokenizers: Tokenizer) -> None:
    """Writes the source and the target tokenizer to the run's folder."""
    for lang, tokenizer in zip((config.lang_src, config.lang_tgt), tokenizers, strict=True):
        write_atomically(RunFolder.of(config).tokenizer_file(lang), tokenizer.to_str(pretty=True))


def build_tokenizer(config: Config, pairs: Dataset, lang: str) -> Tokenizer:
    """A tokenizer trained on one side of the pairs, or on both if the vocabulary is shared."""
    side = "src" if lang == config.lang_src else "tgt"
    sides = ["src", "tgt"] if config.shared_vocab else [side]
    limit = max_characters(config.seq_len)
    texts = (text for batch in sample(pairs) for s in sides for text in batch[s] if len(text) <= limit)
    build = build_word_tokenizer if config.tokenizer == "word" else build_bpe_tokenizer
    tokenizer = build(texts, config.vocab_size)
    if tokenizer.get_vocab_size() <= len(SPECIAL_TOKENS):
        raise InputError(f"no word occurs twice in {config.datasource}; give a larger corpus, or --tokenizer bpe")
    return tokenizer


def sample(pairs: Dataset, chunk: int = 1_000) -> Iterator[dict]:
    """All pairs in chunks, or MAX_TOKENIZER_PAIRS of them in evenly spaced chunks."""
    chunks = -(-min(len(pairs), MAX_TOKENIZER_PAIRS) // chunk)
    for i in range(chunks):
        start = max(i * chunk, i * len(pairs) // chunks)
        yield pairs[start : start + chunk]


def max_characters(seq_len: int) -> int:
    """Characters of the longest text that is given to a tokenizer: 100 per token, more than any language has.

    A word of 100 MB takes a BPE tokenizer hours, and a line of as many words gigabytes, before tokens can be counted.
    """
    return 100 * seq_len


def load_tokenizer(path: Path) -> Tokenizer:
    """Raises InputError if the file is missing or is not a tokenizer."""
    if not os.path.lexists(path):
        raise InputError(f"no file {path}; the run's folder is incomplete, copy it again")
    check_regular(path, MAX_TEXT_BYTES)
    try:
        return plain_text(Tokenizer.from_file(str(path)))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise InputError(f"{path} is not a tokenizer ({error}); copy the run's folder again") from None


def plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """Makes the tokenizer treat "[SOS]" in a text as ordinary characters, not as the special token."""
    tokenizer.encode_special_tokens = True
    return tokenizer


def build_word_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A word-level tokenizer: words and punctuation marks that occur at least twice; everything else is [UNK]."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # Joins words with spaces, then removes the spaces before punctuation and around apostrophes.
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=True), decoders.Fuse(), decoders.Replace(" ' ", "'")]
    )
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, min_frequency=2, special_tokens=SPECIAL_TOKENS)
    tokenizer.train_from_iterator(texts, trainer)
    return plain_text(tokenizer)


def build_bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A BPE tokenizer (Sennrich et al., 2016). Unseen characters fall back to bytes, so nothing is [UNK]."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", byte_fallback=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS + BYTES)
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer accepts the bytes only as special tokens, which decoding would skip.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL_TOKENS]
    return plain_text(Tokenizer.from_str(json.dumps(state)))


class BPEDropout:
    """BPE segmentation in which each merge is skipped with probability p (Provilkov et al., 2020, algorithm 1)."""

    def __init__(self, tokenizer: Tokenizer, p: float):
        model = json.loads(tokenizer.to_str())["model"]
        self.rank = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
        self.vocab, self.tokenizer, self.p = model["vocab"], tokenizer, p

    def encode(self, text: str, rng: random.Random) -> list[int]:
        """Token ids with [SOS] and [EOS]; with p = 0 the same as those of the tokenizer."""
        words = self.tokenizer.pre_tokenizer.pre_tokenize_str(self.tokenizer.normalizer.normalize_str(text))
        pieces = [piece for word, _ in words for piece in self.segment(word, rng)]
        return [SOS, *(id_ for piece in pieces for id_ in self.ids(piece)), EOS]

    def segment(self, word: str, rng: random.Random) -> list[str]:
        """The subwords of a word."""
        pieces = list(word)
        while True:
            ranks = [self.rank.get(pair) for pair in pairwise(pieces)]
            merges = [(rank, i) for i, rank in enumerate(ranks) if rank is not None and rng.random() >= self.p]
            if not merges:
                return pieces
            _, i = min(merges)
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]

    def ids(self, piece: str) -> list[int]:
        if piece in self.vocab:
            return [self.vocab[piece]]
        return [self.vocab[BYTES[byte]] for byte in piece.encode()]  # an unseen character


def is_punctuation(token: str) -> bool:
    """Whether a token consists of punctuation marks and symbols only."""
    text = token.strip("▁")
    return text != "" and token not in SPECIAL_TOKENS and all(unicodedata.category(c)[0] in "PS" for c in text)


def word_indices(tokens: list[str], whole_words: bool) -> list[int]:
    """The index of the word that each token belongs to.

    With `whole_words` every token is a word. Otherwise a word starts at a subword with the prefix ▁; special
    tokens and punctuation are separate words. A lone ▁, the space before a quotation mark, belongs to what follows.
    """
    indices, after_standalone, after_space = [], True, False
    for token in tokens:
        standalone = token in SPECIAL_TOKENS or is_punctuation(token)
        continues_space = after_space and token not in SPECIAL_TOKENS
        starts_word = (standalone or after_standalone or token.startswith("▁")) and not continues_space
        indices.append((indices[-1] + (whole_words or starts_word)) if indices else 0)
        after_standalone, after_space = standalone, token == "▁"
    return indices


# ---------------------------------------------------------------------------- token ids and batches


class BilingualDataset(torch.utils.data.Dataset):
    """Encoded pairs, memory-mapped. Indexing with a list of positions gives a padded batch, a dict of

    encoder_input (B, S), decoder_input (B, T) and label (B, T), int64;
    encoder_mask (B, 1, 1, S) and decoder_mask (B, 1, T, T), boolean, True = may attend;
    target_tokens (N,), the N labels that are not padding, and target_positions (N,), their indices in label.flatten();
    src_text and tgt_text, lists of B strings.

    Pairs with a blank side or more than `seq_len` tokens are skipped and counted in `skipped_blank` and
    `skipped_long`. With `bpe_dropout`, words are re-segmented every epoch, with random numbers that depend on seed,
    epoch and position; batches of `batch_tokens` leave room for that (`growth`). Raises InputError if no pairs remain.
    `removed` counts the pairs that cleaning has removed before.
    """

    removed = Removed()

    def __init__(
        self,
        pairs: Dataset,
        tokenizer_src: Tokenizer,
        tokenizer_tgt: Tokenizer,
        seq_len: int,
        bpe_dropout: float = 0.0,
        seed: int = 0,
        batch_tokens: int = 0,
    ):
        from datasets import Features, List, Value

        self.prepare(tokenizer_src, tokenizer_tgt, seq_len, bpe_dropout, seed, batch_tokens)
        self.skipped_blank = count_blank(pairs)
        processes = min(available_cores(), MAX_PROCESSES, len(pairs) // PAIRS_PER_PROCESS)
        self.encoded = pairs.map(
            encode_pairs,
            batched=True,
            fn_kwargs={
                "tokenizer_src": tokenizer_src,
                "tokenizer_tgt": tokenizer_tgt,
                "seq_len": seq_len,
                "version": DATA_VERSION,
            },
            features=Features(pairs.features | {side: List(Value("int32")) for side in ("src_ids", "tgt_ids")}),
            num_proc=processes if processes > 1 else None,
            desc="Encoding pairs",
        ).with_format("arrow")
        self.skipped_long = len(pairs) - len(self.encoded) - self.skipped_blank
        if len(self.encoded) == 0:
            raise InputError(
                f"no pairs remain: {self.skipped_blank:,} are blank, {self.skipped_long:,} exceed {seq_len} tokens; "
                "raise --seq-len or check the source"
            )

    def prepare(
        self,
        tokenizer_src: Tokenizer,
        tokenizer_tgt: Tokenizer,
        seq_len: int,
        bpe_dropout: float,
        seed: int,
        batch_tokens: int,
    ) -> None:
        self.seq_len, self.seed, self.batch_tokens, self.epoch = seq_len, seed, batch_tokens, 0
        self.segmenters = [BPEDropout(t, bpe_dropout) for t in (tokenizer_src, tokenizer_tgt)] if bpe_dropout else None

    def __len__(self) -> int:
        return len(self.encoded)

    def lengths(self, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Source and target lengths, with [SOS] and [EOS], of the pairs from start to stop; each (stop - start,)."""
        stop = len(self) if stop is None else stop
        columns = (self.encoded.data.column(side).slice(start, stop - start) for side in ("src_ids", "tgt_ids"))
        return tuple(pc.list_value_length(column).to_numpy() for column in columns)

    @cached_property
    def fingerprint(self) -> str:
        """Hashes of ORDER_VERSION and all sentence lengths, and of all token ids.

        They change with the corpus and with the batch order. Earlier versions had the first one only.
        """
        lengths, ids = hashlib.sha256(b"%d" % ORDER_VERSION), hashlib.sha256()
        for i, side in enumerate(("src_ids", "tgt_ids")):
            for start in range(0, len(self), POOL):
                stop = min(start + POOL, len(self))
                lengths.update(self.lengths(start, stop)[i].astype(np.int32).tobytes())
                column = self.encoded.data.column(side).slice(start, stop - start)
                ids.update(pc.list_flatten(column).to_numpy().tobytes())
        return f"{len(self)} pairs {lengths.hexdigest()[:16]} {ids.hexdigest()[:16]}"

    def __getitem__(self, positions: list[int]) -> dict:
        rows = self.encoded[positions]  # an Arrow table
        src_ids, tgt_ids = self.resegment(positions, rows) if self.segmenters else (rows["src_ids"], rows["tgt_ids"])
        texts = {"src_text": rows["src"].to_pylist(), "tgt_text": rows["tgt"].to_pylist()}
        return batch_of(pad(src_ids), pad(tgt_ids)) | texts

    def begin_epoch(self, epoch: int) -> None:
        """Sets the epoch for BPE-dropout. Call it before creating the data loader, whose workers copy the dataset."""
        self.epoch = epoch

    def resegment(self, positions: list[int], rows: pa.Table) -> list[pa.Array]:
        """Source and target ids with BPE-dropout.

        Sentences that would exceed `seq_len`, or their share of `batch_tokens`, keep their ids without it.
        """
        longest = min(self.seq_len, self.batch_tokens // len(positions) or self.seq_len)
        sides = []
        for side, limit in (("src", longest), ("tgt", longest + 1)):  # the decoder reads the target without its [EOS]
            ids = zip(self.segmented(side, positions, rows, self.epoch), rows[f"{side}_ids"].to_pylist(), strict=True)
            kept = [new if len(new) <= limit else plain for new, plain in ids]
            sides.append(pa.array(kept, pa.list_(pa.int32())))
        return sides

    def segmented(self, side: str, positions: list[int], rows: pa.Table, epoch: int) -> list[list[int]]:
        """The ids of the sentences on one side, with BPE-dropout."""
        segmenter = self.segmenters[side == "tgt"]
        rngs = (random.Random(f"{self.seed} {epoch} {position} {side}") for position in positions)
        return [segmenter.encode(text, rng) for text, rng in zip(rows[side].to_pylist(), rngs, strict=True)]

    @cached_property
    def growth(self) -> float:
        """How much longer BPE-dropout makes sentences: the factor that 95% of a sample stay below; 1 without it."""
        if not self.segmenters:
            return 1.0
        positions = np.linspace(0, len(self) - 1, min(GROWTH_SAMPLE, len(self))).astype(int).tolist()
        rows, factors = self.encoded[positions], []
        for side in ("src", "tgt"):
            ids = zip(self.segmented(side, positions, rows, 0), rows[f"{side}_ids"].to_pylist(), strict=True)
            factors += [len(new) / len(plain) for new, plain in ids]
        return float(np.quantile(factors, 0.95))


def available_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_pairs(batch: dict, tokenizer_src: Tokenizer, tokenizer_tgt: Tokenizer, seq_len: int, version: int) -> dict:
    """Token ids with [SOS] and [EOS]; blank and overlong pairs are dropped. `version` is part of the cache key."""
    for tokenizer in (tokenizer_src, tokenizer_tgt):
        plain_text(tokenizer)  # this setting is lost when a tokenizer is pickled for another process
    limit = max_characters(seq_len)
    # Texts that are far too long become blank, and their pairs are dropped below.
    texts = {side: [text if len(text) <= limit else "" for text in batch[side]] for side in ("src", "tgt")}
    src_ids = [[SOS, *e.ids, EOS] for e in tokenizer_src.encode_batch_fast(texts["src"])]
    tgt_ids = [[SOS, *e.ids, EOS] for e in tokenizer_tgt.encode_batch_fast(texts["tgt"])]
    columns = texts | {"src_ids": src_ids, "tgt_ids": tgt_ids}
    # The decoder reads the target without its [EOS], so the target may have one more token.
    keep = [
        src.strip() != "" and tgt.strip() != "" and len(s) <= seq_len and len(t) - 1 <= seq_len
        for src, tgt, s, t in zip(*columns.values(), strict=True)
    ]
    return {name: [value for value, kept in zip(values, keep, strict=True) if kept] for name, values in columns.items()}


def count_blank(pairs: Dataset) -> int:
    """The number of pairs with a blank side."""
    total = 0
    for batch in pairs.with_format("arrow").iter(batch_size=10_000):
        blank = [pc.equal(pc.utf8_trim_whitespace(batch[side]), "") for side in ("src", "tgt")]
        total += pc.sum(pc.or_(*blank)).as_py() or 0
    return total


def pad(ids: pa.Array | pa.ChunkedArray) -> torch.Tensor:
    """B lists of ids as one tensor (B, longest), padded with [PAD] on the right."""
    lengths = pc.list_value_length(ids).to_numpy()
    padded = np.full((len(lengths), lengths.max()), PAD, dtype=np.int64)
    padded[np.arange(lengths.max()) < lengths[:, None]] = pc.list_flatten(ids).to_numpy()
    return torch.from_numpy(padded)


def padding_mask(ids: torch.Tensor) -> torch.Tensor:
    """True where a token is not padding: (B, S) -> (B, 1, 1, S)."""
    return (ids != PAD)[:, None, None, :]


def batch_of(encoder_input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch from padded ids, each row [SOS] … [EOS] and padding: encoder_input (B, S) and target (B, T + 1)."""
    label = target[:, 1:]
    target_positions = (label.flatten() != PAD).nonzero().squeeze(1)  # here because a GPU's host would wait for it
    decoder_input = target[:, :-1].masked_fill(label == PAD, PAD)
    return {
        "encoder_input": encoder_input,
        "decoder_input": decoder_input,
        "encoder_mask": padding_mask(encoder_input),
        "decoder_mask": padding_mask(decoder_input) & causal_mask(decoder_input.size(1)),
        "label": label,
        "target_positions": target_positions,
        "target_tokens": label.flatten()[target_positions],
    }


ORDER_VERSION = 2  # increment when Batches changes its order: older runs can then no longer be resumed
POOL = 1 << 17  # pairs per pool; a pool is sorted by length as a whole
BLOCK = 1 << 10  # consecutive pairs that stay in one pool, so that the corpus is read in large pieces
BLOCK_ORDER, TIE_ORDER, BATCH_ORDER = 1, 2, 3  # each shuffle has a random generator of its own


class Batches:
    """Positions of pairs in batches of similar lengths, each pair in exactly one; a pure function of seed and epoch.

    A batch holds as many sentences as fit into `batch_tokens` (sentences x longest sentence), but at least one; or
    `batch_size` sentences if `batch_tokens` is 0. With `epoch` None the order is fixed.

    Memory does not grow with the corpus: blocks of consecutive pairs are shuffled and grouped into pools of up to POOL
    pairs; one pool at a time is sorted by length and divided into batches, which are then shuffled.
    """

    def __init__(self, dataset: BilingualDataset, config: Config, epoch: int | None):
        self.dataset, self.config, self.epoch = dataset, config, epoch
        blocks = np.arange(-(-len(dataset) // BLOCK))
        if epoch is not None:
            self.rng(BLOCK_ORDER).shuffle(blocks)
        self.pools = np.array_split(blocks, -(-len(blocks) * BLOCK // POOL))
        self.counts = [sum(1 for _ in self.divide(pool)) for pool in range(len(self.pools))]

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[list[int]]:
        return self.starting_at(0)

    def starting_at(self, first: int) -> Iterator[list[int]]:
        """The batches from index `first` on."""
        for pool, count in enumerate(self.counts):
            if first < count:
                batches = [order.tolist() for order in self.divide(pool)]
                if self.epoch is not None:
                    self.rng(BATCH_ORDER, pool).shuffle(batches)
                yield from batches[first:]
            first = max(0, first - count)

    def rng(self, purpose: int, pool: int = 0) -> np.random.Generator:
        return np.random.default_rng((self.config.seed, self.epoch or 0, pool, purpose))

    def divide(self, pool: int) -> Iterator[np.ndarray]:
        """The batches of a pool, sorted by length."""
        starts = self.pools[pool] * BLOCK
        ranges = [(start, min(start + BLOCK, len(self.dataset))) for start in starts.tolist()]
        positions = np.concatenate([np.arange(*ends) for ends in ranges])
        ties = self.rng(TIE_ORDER, pool).permutation(len(positions))
        if self.config.batch_tokens == 0:
            order = positions if self.epoch is None else positions[ties]
            yield from (order[i : i + self.config.batch_size] for i in range(0, len(order), self.config.batch_size))
            return
        src_lengths, tgt_lengths = map(
            np.concatenate, zip(*(self.dataset.lengths(*ends) for ends in ranges), strict=True)
        )
        difference, lengths = src_lengths - tgt_lengths, np.maximum(src_lengths, tgt_lengths - 1)
        # Sort by the longer side. Among equal lengths, the other side is ascending and descending in turn, so that
        # neighbors are similar. On Multi30k, with batches of 4,096 tokens, 3% of the positions are padding, instead of
        # 7% when sorted by target, then source length.
        order = np.lexsort((ties, np.where(lengths % 2, difference, -difference), lengths))
        start, longest = 0, 0
        for i, length in enumerate((self.dataset.growth * lengths[order]).tolist()):
            longest = max(longest, length)
            if i > start and (i + 1 - start) * longest > self.config.batch_tokens:
                yield positions[order[start:i]]
                start, longest = i, length
        yield positions[order[start:]]


# How workers are started. Forked ones share the memory of the training process and leave signals to it, but Python does
# not fork by default on macOS, nor on Linux from version 3.14 on, and cannot on Windows.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"


def make_loader(
    dataset: BilingualDataset, batches: Iterable[list[int]], num_workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """Loads the batch for each list of positions. A separate generator leaves the global RNG unchanged."""
    return DataLoader(
        dataset,
        sampler=batches,
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context=START_METHOD if num_workers else None,
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )


def get_ds(config: Config) -> tuple[BilingualDataset, BilingualDataset, Tokenizer, Tokenizer]:
    """Training set, validation set, source tokenizer and target tokenizer of a config."""
    data = encode_splits(config, load_split(config, "train"), load_split(config, "validation"))
    save_tokenizers(config, *data[2:])
    return data


def encode_splits(
    config: Config, train_pairs: Dataset, validation_pairs: Dataset
) -> tuple[BilingualDataset, BilingualDataset, Tokenizer, Tokenizer]:
    """`get_ds` for pairs that are already loaded, but writes nothing to the run's folder.

    Tokenizers are trained on the training pairs only, after cleaning.
    """
    train_pairs, removed = clean(train_pairs, config.max_length_ratio, config.drop_duplicates)
    tokenizer_src = get_or_build_tokenizer(config, train_pairs, config.lang_src)
    if config.shared_vocab:
        tokenizer_tgt = tokenizer_src
    else:
        tokenizer_tgt = get_or_build_tokenizer(config, train_pairs, config.lang_tgt)
    tokenizers = tokenizer_src, tokenizer_tgt
    if config.stream:  # these pairs are a sample, and are encoded for estimates only
        count = min(len(train_pairs), ESTIMATE_SAMPLE)
        train_pairs = train_pairs.select(np.linspace(0, len(train_pairs) - 1, count).astype(int))
    train = BilingualDataset(
        train_pairs, *tokenizers, config.seq_len, config.bpe_dropout, config.seed, config.batch_tokens
    )
    train.removed = removed
    return train, BilingualDataset(validation_pairs, *tokenizers, config.seq_len), *tokenizers
