"""One translation traced: what every head looked at, as plain arrays, tidy tables and measures.

    L  layers    H  heads    Q  query positions (rows)    K  key positions (columns)
    S  source tokens    T  decoder positions

Rows are queries, the positions that are being computed; columns are keys, what they look at. In
cross-attention rows are target positions and columns source tokens. A row is labelled with the token
that the decoder reads there; the token it writes there is the next row's label. Attention shows
where a head reads, not why the model decides: it is not an explanation, and only some heads align.
"""

import json
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from tokenizers import decoders

from config import InputError
from dataset import EOS, SOS, SPECIAL_TOKENS, padding_mask
from model import causal_mask
from translate import Translator

KINDS = ("encoder", "decoder", "cross")


@dataclass(frozen=True)
class AttentionTrace:
    """What one teacher-forced pass over a translation recorded.

    src_tokens  S labels, [SOS] … [EOS]
    tgt_tokens  T labels of what the decoder reads, [SOS] and then the translation
    next_tokens T labels of what it writes, the translation and then [EOS] (or what would come at the length limit)
    next_pieces the same as the tokenizer's own pieces, which `candidates` are compared with
    src_words, tgt_words  the number of the word that each token belongs to
    weights     kind -> (L, H, Q, K) float32, softmax scores; rows sum to 1
    candidates  for each of T steps the likeliest next tokens with their log-probabilities, best first
    """

    src_tokens: list[str]
    tgt_tokens: list[str]
    next_tokens: list[str]
    next_pieces: list[str]
    src_words: list[int]
    tgt_words: list[int]
    weights: dict[str, np.ndarray]
    candidates: list[list[tuple[str, float]]]
    run: str

    def labels(self, kind: str) -> tuple[list[str], list[str]]:
        """Row and column labels of a kind."""
        rows = self.src_tokens if kind == "encoder" else self.tgt_tokens
        return rows, self.tgt_tokens if kind == "decoder" else self.src_tokens

    def save(self, path: str | Path) -> None:
        """Writes one .npz file of plain arrays and JSON."""
        about = {name: value for name, value in vars(self).items() if name != "weights"}
        with Path(path).open("wb") as file:
            np.savez_compressed(file, about=np.array(json.dumps(about)), **self.weights)

    @classmethod
    def load(cls, path: str | Path) -> "AttentionTrace":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                about = json.loads(str(arrays["about"]))
                about["candidates"] = [[(token, p) for token, p in step] for step in about["candidates"]]
                return cls(weights={kind: arrays[kind] for kind in KINDS}, **about)
        except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile) as error:
            raise InputError(f"{path} is not a saved trace ({error}); write one with AttentionTrace.save") from None


@torch.inference_mode()
def trace(translator: Translator, sentence: str, target: str | list[int] | None = None, top: int = 5) -> AttentionTrace:
    """Translates the sentence, or takes `target` (text or ids) as its translation, and reads it back recording."""
    if not sentence.strip():
        raise InputError("the sentence is empty; give one with at least a word")
    src_ids = translator.encode(sentence)
    if target is None:
        tgt_ids = translator.search([src_ids])[0][: translator.config.seq_len - 1]
    else:
        tgt_ids = target if isinstance(target, list) else translator.tokenizer_tgt.encode(target).ids
    if len(tgt_ids) + 1 > translator.config.seq_len:
        limit = translator.config.seq_len
        raise InputError(f"a target of {len(tgt_ids) + 1} tokens is longer than the {limit} (seq_len) of this run")
    source = torch.tensor([src_ids], device=translator.device)
    decoder_input = torch.tensor([[SOS, *tgt_ids]], device=translator.device)
    model = translator.model
    with model.recording():
        logits = model(source, decoder_input, padding_mask(source), causal_mask(decoder_input.size(1), source.device))
        weights = {
            kind: torch.stack([block.attention_scores[0].float() for block in blocks]).cpu().numpy()
            for kind, blocks in model.attention_blocks().items()
        }
    best = logits[0].float().log_softmax(-1).topk(min(top, logits.size(-1)))  # (T, top)
    name_src, name_tgt = translator.tokenizer_src.id_to_token, translator.tokenizer_tgt.id_to_token
    src_tokens, tgt_tokens = [name_src(i) for i in src_ids], [name_tgt(i) for i in [SOS, *tgt_ids]]
    final = EOS if target is not None else int(best.indices[-1, 0])
    next_pieces = [name_tgt(i) for i in [*tgt_ids, final]]
    whole = translator.config.tokenizer == "word"
    return AttentionTrace(
        src_tokens=src_tokens,
        tgt_tokens=tgt_tokens,
        next_tokens=next_pieces,
        next_pieces=next_pieces,
        src_words=word_numbers(src_tokens, whole),
        tgt_words=word_numbers(tgt_tokens, whole),
        weights=weights,
        candidates=[
            [(name_tgt(i), p) for i, p in zip(ids, ps, strict=True)]
            for ids, ps in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ],
        run=str(translator.config.folder),
    )


# ---------------------------------------------------------------------------- words


def word_numbers(tokens: list[str], whole: bool) -> list[int]:
    """Which word each token belongs to: with `whole`, its own; else a piece that opens with ▁ starts a word.

    Special tokens and punctuation marks are words of their own.
    """
    numbers, alone = [], True
    for token in tokens:
        mark = token in SPECIAL_TOKENS or is_mark(token)
        starts = whole or alone or mark or token.startswith("▁")
        numbers.append((numbers[-1] + starts) if numbers else 0)
        alone = mark
    return numbers


def merge_words(trace: AttentionTrace) -> AttentionTrace:
    """The same trace with pieces merged into words: summed over keys, averaged over queries, so rows still sum to 1."""
    words = {"src": trace.src_words, "tgt": trace.tgt_words}
    total = {side: np.eye(numbers[-1] + 1, dtype=np.float32)[numbers] for side, numbers in words.items()}  # (K, words)
    mean = {side: (matrix / matrix.sum(0)).T for side, matrix in total.items()}  # (words, Q)
    weights = {}
    for kind, w in trace.weights.items():
        rows, columns = "src" if kind == "encoder" else "tgt", "tgt" if kind == "decoder" else "src"
        weights[kind] = mean[rows] @ w @ total[columns]
    src_tokens, tgt_tokens = (
        join_pieces(t, n) for t, n in ((trace.src_tokens, words["src"]), (trace.tgt_tokens, words["tgt"]))
    )
    first = [words["tgt"].index(n) for n in range(len(tgt_tokens))]
    last = [end - 1 for end in [*first[1:], len(trace.tgt_tokens)]]  # where the next word's first piece is chosen
    return replace(
        trace,
        src_tokens=src_tokens,
        tgt_tokens=tgt_tokens,
        next_tokens=[*tgt_tokens[1:], trace.next_tokens[-1]],
        src_words=list(range(len(src_tokens))),
        tgt_words=list(range(len(tgt_tokens))),
        weights=weights,
        candidates=[trace.candidates[i] for i in last],
        next_pieces=[trace.next_pieces[i] for i in last],
    )


def join_pieces(tokens: list[str], numbers: list[int]) -> list[str]:
    """The words as text, also those spelt in bytes."""
    words = [[] for _ in range(numbers[-1] + 1)]
    for token, number in zip(tokens, numbers, strict=True):
        words[number].append(token)
    return [decoders.ByteFallback().decode(pieces).replace("▁", "") or "▁" for pieces in words]


def is_mark(token: str) -> bool:
    """Whether a token is punctuation or symbols only."""
    text = token.strip("▁")
    return text != "" and token not in SPECIAL_TOKENS and all(unicodedata.category(c)[0] in "PS" for c in text)
