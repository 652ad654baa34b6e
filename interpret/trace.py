"""Records the attention of one translation, and merges subwords into words.

    L  layers    H  heads    Q  query positions (rows)    K  key positions (columns)
    S  source tokens    V  target vocabulary
    T  target tokens that the decoder reads: [SOS] and the translation

There are three kinds of attention: `encoder` and `decoder` are the self-attention of the two stacks, `cross` is the
decoder's attention over the encoder output. Rows are queries and columns are keys: in cross-attention, rows are target
positions and columns are source positions. A row is labeled with the token that the decoder reads there; the token
that it predicts there is the label of the next row.

Attention weights show where a head reads. They do not explain the output, and only some heads align words.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from tokenizers import Tokenizer, decoders

from config import InputError
from corpora.alignment import merge_weights
from dataset import EOS, SOS, UNK, word_indices
from runs.files import output_file
from translate import Translator, recorded_pass

KINDS = ("encoder", "decoder", "cross")
KIND_NAMES = {"encoder": "encoder self-attention", "decoder": "decoder self-attention", "cross": "cross-attention"}
SIDES = {"encoder": ("src", "src"), "decoder": ("tgt", "tgt"), "cross": ("tgt", "src")}  # of the rows, of the columns


@dataclass(frozen=True)
class AttentionTrace:
    """Attention weights and predictions of one teacher-forced pass over a translation."""

    src_tokens: list[str]  # S tokens, from [SOS] to [EOS]
    tgt_tokens: list[str]  # T tokens that the decoder reads: [SOS], then the translation
    next_tokens: list[str]  # T tokens that follow: the translation, then [EOS] (or another token at the length limit)
    next_pieces: list[str]  # the same as vocabulary entries, as in `candidates`; differs once words are merged
    src_words: list[int]  # S indices: the word that each source token belongs to
    tgt_words: list[int]  # T indices: the word that each target token belongs to
    weights: dict[str, np.ndarray]  # kind -> (L, H, Q, K) float32; softmax output, so each row sums to 1
    candidates: list[list[tuple[str, float]]]  # for each of T steps, the top-k (next token, log-probability)
    run: str  # folder of the run

    def labels(self, kind: str) -> tuple[list[str], list[str]]:
        """The tokens of the Q rows and of the K columns of a kind."""
        tokens = {"src": self.src_tokens, "tgt": self.tgt_tokens}
        rows, columns = SIDES[kind]
        return tokens[rows], tokens[columns]

    def row_labels(self, kind: str) -> list[str]:
        """A label of each row: the token, in the decoder with the token that it predicts, such as "una → mela"."""
        if kind == "encoder":
            return self.src_tokens
        return [f"{read} → {written}" for read, written in zip(self.tgt_tokens, self.next_tokens, strict=True)]

    @property
    def source(self) -> str:
        return plain_text(self.src_tokens[1:-1])

    @property
    def translation(self) -> str:
        return plain_text(self.tgt_tokens[1:])

    def save(self, path: str | Path) -> None:
        """Writes one .npz file: one array of weights per kind, and everything else as JSON under `about`."""
        about = {name: value for name, value in vars(self).items() if name != "weights"}
        with output_file(path) as target, target.open("wb") as file:
            np.savez_compressed(file, about=np.array(json.dumps(about)), **self.weights)

    @classmethod
    def load(cls, path: str | Path) -> "AttentionTrace":
        """Reads a file written by `save`. Raises InputError if it is missing, damaged or something else."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                about = json.loads(str(arrays["about"]))
                about["candidates"] = [[(token, log_p) for token, log_p in step] for step in about["candidates"]]
                return cls(weights={kind: arrays[kind] for kind in KINDS}, **about)
        except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile) as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else "damaged, or of another kind"
            raise InputError(f"{path} is not a saved trace ({reason}); write one with visualize.py --save") from None


# ---------------------------------------------------------------------------- recording


@torch.inference_mode()
def record_trace(
    translator: Translator, sentence: str, target: str | list[int] | None = None, top_k: int = 5
) -> AttentionTrace:
    """Translates the sentence (greedy search) and records one teacher-forced pass over the translation.

    `target`, as text or as ids without [SOS] and [EOS], replaces the model's own translation. The `top_k` most
    probable next tokens of each step are kept. Raises InputError for an empty sentence, and for a sentence or
    target longer than `seq_len`.
    """
    if not sentence.strip():
        raise InputError("the sentence is empty; give at least one word")
    src_ids = translator.encode(sentence)
    tgt_ids = target_ids(translator, src_ids, target)
    logits, weights = recorded_pass(translator, src_ids, [SOS, *tgt_ids])
    top = logits.log_softmax(-1).topk(min(top_k, logits.size(-1)))  # values and indices (T, top_k)
    last_id = int(top.indices[-1, 0]) if target is None else EOS

    tgt_token = translator.tokenizer_tgt.id_to_token
    source = tokens_of(translator.tokenizer_src, src_ids[1:-1], sentence)
    output = tokens_of(translator.tokenizer_tgt, tgt_ids, target if isinstance(target, str) else "")
    src_tokens, tgt_tokens = ["[SOS]", *source, "[EOS]"], ["[SOS]", *output]
    whole_words = translator.config.tokenizer == "word"
    return AttentionTrace(
        src_tokens=src_tokens,
        tgt_tokens=tgt_tokens,
        next_tokens=[*output, tgt_token(last_id)],
        next_pieces=[tgt_token(i) for i in [*tgt_ids, last_id]],
        src_words=word_indices(src_tokens, whole_words),
        tgt_words=word_indices(tgt_tokens, whole_words),
        weights=weights,
        candidates=[
            [(tgt_token(i), log_p) for i, log_p in zip(ids, log_ps, strict=True)]
            for ids, log_ps in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ],
        run=str(translator.folder),
    )


def tokens_of(tokenizer: Tokenizer, ids: list[int], text: str) -> list[str]:
    """The vocabulary entries of the ids; an unknown word of the text is kept, as in "zebra [UNK]"."""
    spans = tokenizer.encode(text).offsets if UNK in ids and text else []
    return [
        f"{text[slice(*spans[i])]} [UNK]" if id_ == UNK and spans else tokenizer.id_to_token(id_)
        for i, id_ in enumerate(ids)
    ]


def target_ids(translator: Translator, src_ids: list[int], target: str | list[int] | None) -> list[int]:
    """Ids, without [SOS] and [EOS], of the given target or of the model's own translation.

    Raises InputError for a target longer than `seq_len`.
    """
    limit = translator.config.seq_len
    if target is None:
        return translator.search([src_ids], use_cache=False)[0][: limit - 1]  # as a variant needs (interventions.py)
    ids = target if isinstance(target, list) else translator.tokenizer_tgt.encode(target).ids
    if len(ids) + 1 > limit:
        raise InputError(
            f"the target has {len(ids) + 1} tokens with [SOS]; this run takes at most {limit} (seq_len), so shorten it"
        )
    return ids


def first_steps(trace: AttentionTrace, count: int) -> AttentionTrace:
    """The trace without the steps after the first `count`."""
    weights = trace.weights | {
        "decoder": trace.weights["decoder"][:, :, :count, :count],
        "cross": trace.weights["cross"][:, :, :count],
    }
    steps = ("tgt_tokens", "next_tokens", "next_pieces", "tgt_words", "candidates")
    return replace(trace, weights=weights, **{name: getattr(trace, name)[:count] for name in steps})


# ---------------------------------------------------------------------------- words


def merge_words(trace: AttentionTrace) -> AttentionTrace:
    """The trace with subwords merged into words: weights are summed over keys and averaged over queries.

    Rows still sum to 1. The candidates of a word are those of its last subword, which predicts the next word.
    """
    return merge_tokens(trace, {"src": trace.src_words, "tgt": trace.tgt_words}, strip="▁")


def merge_bytes(trace: AttentionTrace) -> AttentionTrace:
    """The trace with the bytes of a character (tokens such as <0xF0>) merged into the character."""
    groups = {"src": character_indices(trace.src_tokens), "tgt": character_indices(trace.tgt_tokens)}
    return merge_tokens(trace, groups)


def merge_tokens(trace: AttentionTrace, groups: dict[str, list[int]], strip: str = "") -> AttentionTrace:
    """The trace with tokens merged; `groups` holds the index of the group of each source and each target token.

    The string `strip` is removed from the text of the groups.
    """
    weights = {
        kind: merge_weights(
            trace.weights[kind], groups[rows], groups[columns]
        )  # (L, H, Q, K) -> (L, H, groups, groups)
        for kind, (rows, columns) in SIDES.items()
    }
    src_tokens = join_tokens(trace.src_tokens, groups["src"], strip)
    tgt_tokens = join_tokens(trace.tgt_tokens, groups["tgt"], strip)
    src_first, first = ([index.index(group) for group in range(index[-1] + 1)] for index in groups.values())
    last = [following - 1 for following in [*first[1:], len(trace.tgt_tokens)]]
    return replace(
        trace,
        src_tokens=src_tokens,
        tgt_tokens=tgt_tokens,
        next_tokens=[*tgt_tokens[1:], trace.next_tokens[-1]],
        next_pieces=[trace.next_pieces[i] for i in last],
        src_words=[trace.src_words[i] for i in src_first],
        tgt_words=[trace.tgt_words[i] for i in first],
        weights=weights,
        candidates=[trace.candidates[i] for i in last],
    )


def character_indices(tokens: list[str]) -> list[int]:
    """The index of the token that each token belongs to once the bytes of a UTF-8 character are one token."""
    indices, after_byte = [], False
    for token in tokens:
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
        continues = after_byte and byte and 0x80 <= int(byte[1], 16) < 0xC0
        indices.append((indices[-1] + (not continues)) if indices else 0)
        after_byte = byte is not None
    return indices


def join_tokens(tokens: list[str], group_index: list[int], strip: str = "") -> list[str]:
    """The text of each group of tokens, without the string `strip`; tokens of the byte fallback are decoded."""
    groups = [[] for _ in range(group_index[-1] + 1)]
    for token, index in zip(tokens, group_index, strict=True):
        groups[index].append(token)
    texts = [decoders.ByteFallback().decode(group) for group in groups]
    return [text.replace(strip, "") or text for text in texts]


def plain_text(tokens: list[str]) -> str:
    """The tokens as one line: subwords are joined, and there is no space before punctuation."""
    if any(token.startswith("▁") for token in tokens):
        return "".join(tokens).replace("▁", " ").strip()
    return re.sub(r" ([.,;:!?]+)(?= |$)", r"\1", " ".join(tokens))
