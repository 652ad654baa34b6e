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
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from tokenizers import decoders
from torch import Tensor

from config import InputError
from dataset import EOS, SOS, SPECIAL_TOKENS, padding_mask
from model import causal_mask
from translate import Translator

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

    def save(self, path: str | Path) -> None:
        """Writes one .npz file: one array of weights per kind, and everything else as JSON under `about`."""
        about = {name: value for name, value in vars(self).items() if name != "weights"}
        with Path(path).open("wb") as file:
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

    src_token, tgt_token = translator.tokenizer_src.id_to_token, translator.tokenizer_tgt.id_to_token
    src_tokens, tgt_tokens = [src_token(i) for i in src_ids], [tgt_token(i) for i in [SOS, *tgt_ids]]
    next_tokens = [tgt_token(i) for i in [*tgt_ids, last_id]]
    whole_words = translator.config.tokenizer == "word"
    return AttentionTrace(
        src_tokens=src_tokens,
        tgt_tokens=tgt_tokens,
        next_tokens=next_tokens,
        next_pieces=next_tokens,
        src_words=word_indices(src_tokens, whole_words),
        tgt_words=word_indices(tgt_tokens, whole_words),
        weights=weights,
        candidates=[
            [(tgt_token(i), log_p) for i, log_p in zip(ids, log_ps, strict=True)]
            for ids, log_ps in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ],
        run=str(translator.folder),
    )


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


def recorded_pass(
    translator: Translator, src_ids: list[int], decoder_ids: list[int]
) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Logits (T, V) of a teacher-forced pass, and the attention weights of each kind, (L, H, Q, K)."""
    model = translator.model
    source = torch.tensor([src_ids], device=translator.device)
    decoder_input = torch.tensor([decoder_ids], device=translator.device)
    with model.recording():
        logits = model(source, decoder_input, padding_mask(source), causal_mask(len(decoder_ids), source.device))
        weights = {
            kind: torch.stack([block.attention_scores[0].float() for block in blocks]).cpu().numpy()
            for kind, blocks in model.attention_blocks().items()
        }
    return logits[0].float(), weights


# ---------------------------------------------------------------------------- words


def merge_words(trace: AttentionTrace) -> AttentionTrace:
    """The trace with subwords merged into words: weights are summed over keys and averaged over queries.

    Rows still sum to 1. The candidates of a word are those of its last subword, which predicts the next word.
    """
    words = {"src": trace.src_words, "tgt": trace.tgt_words}
    total = {side: np.eye(index[-1] + 1, dtype=np.float32)[index] for side, index in words.items()}  # (K, words)
    mean = {side: (matrix / matrix.sum(0)).T for side, matrix in total.items()}  # (words, Q)
    weights = {
        kind: mean[rows] @ trace.weights[kind] @ total[columns]  # (L, H, Q, K) -> (L, H, words, words)
        for kind, (rows, columns) in SIDES.items()
    }
    src_tokens = join_subwords(trace.src_tokens, words["src"])
    tgt_tokens = join_subwords(trace.tgt_tokens, words["tgt"])
    first = [words["tgt"].index(word) for word in range(len(tgt_tokens))]
    last = [following - 1 for following in [*first[1:], len(trace.tgt_tokens)]]
    return replace(
        trace,
        src_tokens=src_tokens,
        tgt_tokens=tgt_tokens,
        next_tokens=[*tgt_tokens[1:], trace.next_tokens[-1]],
        next_pieces=[trace.next_pieces[i] for i in last],
        src_words=list(range(len(src_tokens))),
        tgt_words=list(range(len(tgt_tokens))),
        weights=weights,
        candidates=[trace.candidates[i] for i in last],
    )


def word_indices(tokens: list[str], whole_words: bool) -> list[int]:
    """The index of the word that each token belongs to.

    With `whole_words` every token is a word. Otherwise a word starts at a subword with the prefix ▁; special
    tokens and punctuation are separate words.
    """
    indices, after_standalone = [], True
    for token in tokens:
        standalone = token in SPECIAL_TOKENS or is_punctuation(token)
        starts_word = whole_words or standalone or after_standalone or token.startswith("▁")
        indices.append((indices[-1] + starts_word) if indices else 0)
        after_standalone = standalone
    return indices


def join_subwords(tokens: list[str], word_index: list[int]) -> list[str]:
    """The text of each word; tokens of the byte fallback are decoded."""
    words = [[] for _ in range(word_index[-1] + 1)]
    for token, index in zip(tokens, word_index, strict=True):
        words[index].append(token)
    return [decoders.ByteFallback().decode(subwords).replace("▁", "") or "▁" for subwords in words]


def is_punctuation(token: str) -> bool:
    """Whether a token consists of punctuation marks and symbols only."""
    text = token.strip("▁")
    return text != "" and token not in SPECIAL_TOKENS and all(unicodedata.category(c)[0] in "PS" for c in text)
