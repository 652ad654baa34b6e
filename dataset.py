"""Sentence pairs to batches: tokenizers, ids in Arrow files, padded batches.

B  sentences in the batch    S  source length in tokens    T  target length in tokens
"""

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import DataLoader

from compute import distributed
from config import Config, InputError, latest_weights_file_path, write_atomically
from corpora.sources import DATA_VERSION, load_split
from model import causal_mask

PAIRS_A_PROCESS = 100_000  # fewer are encoded sooner than another process has started
MOST_PROCESSES = 8  # that encode: each holds some hundred megabytes
TOKENIZER_PAIRS = 1_000_000  # that a tokenizer is trained on; more change little but the time

SPECIAL_TOKENS = ["[UNK]", "[PAD]", "[SOS]", "[EOS]"]
UNK, PAD, SOS, EOS = range(4)

# ---------------------------------------------------------------------------- tokenizers


def get_or_build_tokenizer(config: Config, pairs: datasets.Dataset, lang: str) -> Tokenizer:
    """The run's tokenizer of a language, from its folder; or one trained on these pairs, and saved there.

    A folder without a checkpoint is no run yet, so what lies in it is not trusted.
    """
    path = tokenizer_path(config, lang)
    if path.is_file() and (latest_weights_file_path(config) or not distributed.is_first()):
        return load_tokenizer(path)
    side = "src" if lang == config.lang_src else "tgt"
    sides = ["src", "tgt"] if config.shared_vocab else [side]
    texts = (text for batch in sample(pairs) for s in sides for text in batch[s])
    build = build_word_tokenizer if config.tokenizer == "word" else build_bpe_tokenizer
    tokenizer = build(texts, config.vocab_size)
    if tokenizer.get_vocab_size() <= len(SPECIAL_TOKENS):
        raise InputError(f"no words to learn from in {config.datasource}; give a larger corpus, or --tokenizer bpe")
    write_atomically(path, tokenizer.to_str(pretty=True))
    if config.shared_vocab:
        other = config.lang_tgt if side == "src" else config.lang_src
        write_atomically(tokenizer_path(config, other), tokenizer.to_str(pretty=True))
    return tokenizer


def sample(pairs: datasets.Dataset, at_once: int = 1_000) -> Iterator[dict]:
    """Batches of pairs from all over the corpus, all of them up to TOKENIZER_PAIRS."""
    batches = -(-min(len(pairs), TOKENIZER_PAIRS) // at_once)
    for i in range(batches):
        start = max(i * at_once, i * len(pairs) // batches)
        yield pairs[start : start + at_once]


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


class BPEDropout:
    """Cuts words another way each time: any merge may be left out (Provilkov et al., 2020, algorithm 1)."""

    def __init__(self, tokenizer: Tokenizer, p: float):
        model = json.loads(tokenizer.to_str())["model"]
        self.rank = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
        self.vocab, self.tokenizer, self.p = model["vocab"], tokenizer, p

    def encode(self, text: str, rng: random.Random) -> list[int]:
        """Ids with [SOS] and [EOS]; with p = 0 those of the tokenizer."""
        words = self.tokenizer.pre_tokenizer.pre_tokenize_str(self.tokenizer.normalizer.normalize_str(text))
        pieces = [piece for word, _ in words for piece in self.cut(word, rng)]
        return [SOS, *(id_ for piece in pieces for id_ in self.ids(piece)), EOS]

    def cut(self, word: str, rng: random.Random) -> list[str]:
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
        return [self.vocab[f"<0x{byte:02X}>"] for byte in piece.encode()]  # a character never seen in training


# ---------------------------------------------------------------------------- ids and batches


class BilingualDataset(torch.utils.data.Dataset):
    """Encoded pairs, memory-mapped. A list of positions indexes a padded batch, a dict of

    encoder_input (B, S), decoder_input (B, T) and label (B, T), int64;
    encoder_mask (B, 1, 1, S) and decoder_mask (B, 1, T, T), boolean, True = may attend;
    src_text and tgt_text, lists of B strings.

    Pairs with a blank side or with more than `seq_len` tokens are left out and counted in
    `skipped_blank` and `skipped_long`. With `bpe_dropout` the words are cut anew in each epoch, by a
    generator of (seed, epoch, position), and the lengths, by which batches are made, are those without.
    """

    def __init__(
        self,
        pairs: datasets.Dataset,
        tokenizer_src: Tokenizer,
        tokenizer_tgt: Tokenizer,
        seq_len: int,
        bpe_dropout: float = 0.0,
        seed: int = 0,
    ):
        self.seq_len, self.seed, self.epoch = seq_len, seed, 0
        self.cutters = [BPEDropout(t, bpe_dropout) for t in (tokenizer_src, tokenizer_tgt)] if bpe_dropout else None
        self.skipped_blank = count_blank(pairs)
        processes = min(cores(), MOST_PROCESSES, len(pairs) // PAIRS_A_PROCESS)
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
            num_proc=processes if processes > 1 else None,
            desc="Encoding pairs",
        ).with_format("arrow")
        self.skipped_long = len(pairs) - len(self.encoded) - self.skipped_blank
        if len(self.encoded) == 0:
            raise InputError(
                f"no pair is left: {self.skipped_blank:,} are blank, {self.skipped_long:,} have over {seq_len} tokens; "
                "raise --seq-len or check the source"
            )

    def __len__(self) -> int:
        return len(self.encoded)

    def lengths(self, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Source and target tokens, [SOS] and [EOS] included, of the pairs from start to stop, each (stop - start,)."""
        stop = len(self) if stop is None else stop
        columns = (self.encoded.data.column(side).slice(start, stop - start) for side in ("src_ids", "tgt_ids"))
        return tuple(pc.list_value_length(column).to_numpy() for column in columns)

    @cached_property
    def fingerprint(self) -> str:
        """Of the lengths of all sentences: tells a corpus that has changed, or code that orders it otherwise."""
        digest = hashlib.sha256(b"%d" % ORDER_VERSION)
        for side in (0, 1):
            for start in range(0, len(self), POOL):
                digest.update(self.lengths(start, min(start + POOL, len(self)))[side].astype(np.int32).tobytes())
        return f"{len(self)} pairs {digest.hexdigest()[:16]}"

    def __getitem__(self, positions: list[int]) -> dict:
        rows = self.encoded[positions]  # an Arrow table
        src_ids, tgt_ids = self.cut_anew(positions, rows) if self.cutters else (rows["src_ids"], rows["tgt_ids"])
        texts = {"src_text": rows["src"].to_pylist(), "tgt_text": rows["tgt"].to_pylist()}
        return batch_of(pad(src_ids), pad(tgt_ids)) | texts

    def begin_epoch(self, epoch: int) -> None:
        """Before the epoch's loader is made, so that its workers know."""
        self.epoch = epoch

    def cut_anew(self, positions: list[int], rows: pa.Table) -> list[pa.Array]:
        """Ids of both sides under BPE-dropout; the ordinary ones where these would be too long."""
        sides = []
        for side, cutter, longest in zip(("src", "tgt"), self.cutters, (self.seq_len, self.seq_len + 1), strict=True):
            ids = []
            for position, row in zip(positions, rows.select([side, f"{side}_ids"]).to_pylist(), strict=True):
                anew = cutter.encode(row[side], random.Random(f"{self.seed} {self.epoch} {position} {side}"))
                ids.append(anew if len(anew) <= longest else row[f"{side}_ids"])
            sides.append(pa.array(ids, pa.list_(pa.int32())))
        return sides


def cores() -> int:
    """Processors that this process may use, which on a shared machine are not all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_pairs(batch: dict, tokenizer_src: Tokenizer, tokenizer_tgt: Tokenizer, seq_len: int, version: int) -> dict:
    """Texts to ids with [SOS] and [EOS]; blank and over-long pairs drop out."""
    for tokenizer in (tokenizer_src, tokenizer_tgt):
        plain_text(tokenizer)  # which it forgets on its way to another process
    src_ids = [[SOS, *e.ids, EOS] for e in tokenizer_src.encode_batch_fast(batch["src"])]
    tgt_ids = [[SOS, *e.ids, EOS] for e in tokenizer_tgt.encode_batch_fast(batch["tgt"])]
    columns = {"src": batch["src"], "tgt": batch["tgt"], "src_ids": src_ids, "tgt_ids": tgt_ids}
    # The decoder reads the target without its [EOS], so that side may hold one more.
    keep = [
        src.strip() != "" and tgt.strip() != "" and len(s) <= seq_len and len(t) - 1 <= seq_len
        for src, tgt, s, t in zip(*columns.values(), strict=True)
    ]
    return {name: [value for value, kept in zip(values, keep, strict=True) if kept] for name, values in columns.items()}


def count_blank(pairs: datasets.Dataset) -> int:
    total = 0
    for batch in pairs.with_format("arrow").iter(batch_size=10_000):
        blank = [pc.equal(pc.utf8_trim_whitespace(batch[side]), "") for side in ("src", "tgt")]
        total += pc.sum(pc.or_(*blank)).as_py() or 0
    return total


def pad(ids: pa.Array | pa.ChunkedArray) -> torch.Tensor:
    """Lists of ids to one (B, longest) tensor, filled up with [PAD] on the right."""
    lengths = pc.list_value_length(ids).to_numpy()
    padded = np.full((len(lengths), lengths.max()), PAD, dtype=np.int64)
    padded[np.arange(lengths.max()) < lengths[:, None]] = pc.list_flatten(ids).to_numpy()
    return torch.from_numpy(padded)


def padding_mask(ids: torch.Tensor) -> torch.Tensor:
    return (ids != PAD)[:, None, None, :]  # (B, S) -> (B, 1, 1, S)


def batch_of(encoder_input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a step takes of padded ids, [SOS] … [EOS] each: source (B, S) and target (B, T + 1)."""
    label = target[:, 1:]
    decoder_input = target[:, :-1].masked_fill(label == PAD, PAD)
    return {
        "encoder_input": encoder_input,
        "decoder_input": decoder_input,
        "encoder_mask": padding_mask(encoder_input),
        "decoder_mask": padding_mask(decoder_input) & causal_mask(decoder_input.size(1)),
        "label": label,
    }


ORDER_VERSION = 2  # raise it when Batches orders a corpus otherwise: runs cannot go on in mid-epoch then
POOL = 1 << 17  # pairs that are sorted by length together
OF_BLOCKS, OF_TIES, OF_BATCHES = 1, 2, 3  # what a generator is for, so that no two draw the same
BLOCK = 1 << 10  # neighbours in the corpus that share a pool, so that it is read in a few pieces


class Batches:
    """Positions in batches of like lengths, each pair in exactly one; a pure function of seed and epoch.

    A batch holds as many sentences as keep sentences x longest sentence within `batch_tokens` (at
    least one), or `batch_size` sentences where that is 0. With `epoch` None the order is fixed.

    However large the corpus, only one pool of it is at hand at a time: blocks of neighbours, in random order,
    fill pools, and each pool is cut into batches, which are shuffled. A corpus below POOL is one pool.
    """

    def __init__(self, dataset: "BilingualDataset", config: Config, epoch: int | None):
        self.dataset, self.config, self.epoch = dataset, config, epoch
        blocks = np.arange(-(-len(dataset) // BLOCK))
        if epoch is not None:
            self.rng(OF_BLOCKS).shuffle(blocks)
        self.pools = np.array_split(blocks, -(-len(blocks) * BLOCK // POOL))
        self.counts = [sum(1 for _ in self.cut(pool)) for pool in range(len(self.pools))]

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[list[int]]:
        return self.starting_at(0)

    def starting_at(self, first: int) -> Iterator[list[int]]:
        """The batches from the `first` on."""
        for pool, count in enumerate(self.counts):
            if first < count:
                batches = [order.tolist() for order in self.cut(pool)]
                if self.epoch is not None:
                    self.rng(OF_BATCHES, pool).shuffle(batches)
                yield from batches[first:]
            first = max(0, first - count)

    def rng(self, purpose: int, pool: int = 0) -> np.random.Generator:
        return np.random.default_rng((self.config.seed, self.epoch or 0, pool, purpose))

    def cut(self, pool: int) -> Iterator[np.ndarray]:
        """The pool's batches before they are shuffled."""
        starts = self.pools[pool] * BLOCK
        ranges = [(start, min(start + BLOCK, len(self.dataset))) for start in starts.tolist()]
        positions = np.concatenate([np.arange(*ends) for ends in ranges])
        ties = self.rng(OF_TIES, pool).permutation(len(positions))
        if self.config.batch_tokens == 0:
            order = positions if self.epoch is None else positions[ties]
            yield from (order[i : i + self.config.batch_size] for i in range(0, len(order), self.config.batch_size))
            return
        src_lengths, tgt_lengths = map(
            np.concatenate, zip(*(self.dataset.lengths(*ends) for ends in ranges), strict=True)
        )
        difference, lengths = src_lengths - tgt_lengths, np.maximum(src_lengths, tgt_lengths - 1)
        # By the longer side; within one length the other goes up and down in turn, so that neighbours are alike:
        # 3% of the positions are padding on Multi30k in batches of 4,096, against 7% sorted by target, then source.
        order = np.lexsort((ties, np.where(lengths % 2, difference, -difference), lengths))
        start, longest = 0, 0
        for i, length in enumerate(lengths[order].tolist()):
            longest = max(longest, length)
            if i > start and (i + 1 - start) * longest > self.config.batch_tokens:
                yield positions[order[start:i]]
                start, longest = i, length
        yield positions[order[start:]]


def make_loader(
    dataset: BilingualDataset, batches: Iterable[list[int]], num_workers: int = 0, pin_memory: bool = False
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
    both = tokenizer_src, tokenizer_tgt
    train = BilingualDataset(train_pairs, *both, config.seq_len, config.bpe_dropout, config.seed)
    return train, BilingualDataset(validation_pairs, *both, config.seq_len), *both
