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
import pandas as pd
import torch
from tokenizers import decoders

from config import InputError
from dataset import EOS, SOS, SPECIAL_TOKENS, padding_mask
from model import causal_mask
from toy_corpus import Pair, tokens_of
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


# ---------------------------------------------------------------------------- tables


def allowed(kind: str, rows: int, columns: int) -> np.ndarray:
    """(Q, K), True where a query may attend: in the decoder not to what comes after it."""
    mask = np.ones((rows, columns), dtype=bool)
    return np.tril(mask) if kind == "decoder" else mask


def weights_table(
    trace: AttentionTrace, kind: str, layers: list[int] | None = None, heads: list[int] | None = None
) -> pd.DataFrame:
    """One row a weight: kind, layer, head, row, column, row_token, column_token, weight. Masked cells are left out."""
    weights = trace.weights[kind]
    L, H, Q, K = weights.shape
    layers, heads = list(range(L)) if layers is None else layers, list(range(H)) if heads is None else heads
    for name, wanted, count in (("layer", layers, L), ("head", heads, H)):
        if bad := [i for i in wanted if not 0 <= i < count]:
            raise InputError(f"no {name} {bad[0]} in the {kind}; it has {name}s 0 to {count - 1}")
    rows, columns = trace.labels(kind)
    row, column = np.nonzero(allowed(kind, Q, K))
    cells = [
        pd.DataFrame({
            "kind": kind, "layer": layer, "head": head, "row": row, "column": column,
            "row_token": [rows[i] for i in row], "column_token": [columns[j] for j in column],
            "weight": weights[layer, head, row, column],
        })
        for layer in layers for head in heads
    ]  # fmt: skip
    return pd.concat(cells, ignore_index=True)


def packed_table(trace: AttentionTrace, *place: str | int) -> pd.DataFrame:
    """One row a head: kind, layer, head, columns (K) and `w`, its weights in thousandths, row after row, as "0,12,988".

    Of all heads, or with `place` of those of a kind, a layer, or the one head. A page of it is thirty
    times smaller than one of `weights_table`; the charts unpack it.
    """
    return pd.DataFrame([
        {"kind": kind, "layer": layer, "head": head, "columns": weights.shape[3],
         "w": ",".join(map(str, np.rint(1000 * weights[layer, head]).astype(int).ravel()))}
        for kind, weights in trace.weights.items()
        for layer, head in np.ndindex(weights.shape[:2])
        if (kind, layer, head)[: len(place)] == place
    ])  # fmt: skip


def mean_over_heads(trace: AttentionTrace) -> AttentionTrace:
    """The trace with one head a layer, the mean of all."""
    return replace(trace, weights={kind: w.mean(1, keepdims=True) for kind, w in trace.weights.items()})


def rollout(trace: AttentionTrace) -> AttentionTrace:
    """Attention followed down to the input (Abnar and Zuidema, 2020, section 3), layer by layer, as one head.

    Encoder and decoder: the product of half the mean over heads and half the identity, which stands
    for the residual path. Cross: the decoder's rollout below it, its own mean, the encoder's rollout.
    """

    def down(weights: np.ndarray) -> np.ndarray:  # (L, H, Q, Q) -> (L, Q, Q)
        steps = 0.5 * weights.mean(1) + 0.5 * np.eye(weights.shape[2], dtype=weights.dtype)
        for layer in range(1, len(steps)):
            steps[layer] = steps[layer] @ steps[layer - 1]
        return steps

    encoder, decoder = down(trace.weights["encoder"]), down(trace.weights["decoder"])
    cross = decoder @ trace.weights["cross"].mean(1) @ encoder[-1]
    flow = {"encoder": encoder, "decoder": decoder, "cross": cross}
    return replace(trace, weights={kind: flow[kind][:, None] for kind in KINDS})


def across_layers(trace: AttentionTrace, kind: str, row: int) -> pd.DataFrame:
    """One query through all the layers: layer, head, column, column_token, weight."""
    table = weights_table(trace, kind)
    if row not in table["row"].to_numpy():
        raise InputError(f"no row {row} in the {kind}; it has rows 0 to {table['row'].max()}")
    return table[table["row"] == row].drop(columns=["kind", "row"]).reset_index(drop=True)


def token_lookup(trace: AttentionTrace, kind: str, token: str, top: int = 3) -> pd.DataFrame:
    """The positions that each head attends to most from a token, at each place where it stands."""
    rows = trace.labels(kind)[0]
    places = [i for i, label in enumerate(rows) if label.strip("▁") == token.strip("▁")]
    if not places:
        raise InputError(f"no token {token!r} among the rows of the {kind}; there are {' '.join(rows)}")
    table = weights_table(trace, kind)
    best = (
        table[table["row"].isin(places)]
        .sort_values("weight", ascending=False)
        .groupby(["layer", "head", "row"])
        .head(top)
    )
    best = best.assign(rank=best.groupby(["layer", "head", "row"]).cumcount() + 1)
    return best.sort_values(["layer", "head", "row", "rank"]).drop(columns="kind").reset_index(drop=True)


def steps_table(trace: AttentionTrace) -> pd.DataFrame:
    """The candidates of each decoding step: step, read, written, rank, token, log_probability, probability, chosen."""
    return pd.DataFrame([
        {"step": step, "read": trace.tgt_tokens[step], "written": trace.next_tokens[step], "rank": rank, "token": token,
         "log_probability": p, "probability": float(np.exp(p)), "chosen": token == trace.next_pieces[step]}
        for step, candidates in enumerate(trace.candidates)
        for rank, (token, p) in enumerate(candidates, start=1)
    ])  # fmt: skip


# ---------------------------------------------------------------------------- measures


def scorecard(trace: AttentionTrace) -> pd.DataFrame:
    """What each head does, averaged over its rows: one line a kind, layer and head.

    entropy in bits; largest, the largest weight of a row; distance in positions between query and
    key; then the share of weight on the query's own position, the one before, [SOS], [EOS] and
    punctuation. In cross-attention own and previous compare positions in two sentences.
    """
    lines = []
    for kind, weights in trace.weights.items():
        columns = trace.labels(kind)[1]
        L, H, Q, K = weights.shape
        q, k = np.arange(Q)[:, None], np.arange(K)[None, :]
        keys = np.array(columns)
        shares = {
            "itself": q == k,
            "previous": q - 1 == k,
            "[SOS]": (keys == "[SOS]")[None, :],
            "[EOS]": (keys == "[EOS]")[None, :],
            "punctuation": np.array([is_mark(key) for key in columns])[None, :],
        }
        measures = {
            "entropy": -(weights * np.log2(np.maximum(weights, 1e-12))).sum(3).mean(2),
            "largest": weights.max(3).mean(2),
            "distance": (weights * np.abs(q - k)).sum(3).mean(2),
            **{name: (weights * where).sum(3).mean(2) for name, where in shares.items()},
        }  # each (L, H)
        for layer in range(L):
            for head in range(H):
                values = {name: float(value[layer, head]) for name, value in measures.items()}
                lines.append({"kind": kind, "layer": layer, "head": head, **values})
    return pd.DataFrame(lines)


def alignment_errors(translator: Translator, pairs: list[Pair]) -> pd.DataFrame:
    """Alignment error rate (Och and Ney, 2003, section 5.1) of every cross-attention head against gold alignments.

    Each target word is linked to the source word that its row attends to most. `shift` says which
    row that is: 0 the one that reads the word, 1 the one that writes it, a step earlier, -1 the one
    after. Columns layer, head (or "mean", over the heads of the layer), shift, error; best first.
    """
    counts: dict[tuple, np.ndarray] = {}
    for pair in pairs:
        words = merge_words(trace(translator, pair.src_text, pair.tgt_text))
        if (
            len(words.src_tokens) != len(tokens_of(pair.src_text)) + 2
            or len(words.tgt_tokens) != len(tokens_of(pair.tgt_text)) + 1
        ):
            continue  # a word of the sentence is not a word of the tokenizer
        cross = words.weights["cross"]
        heads = {(layer, head): cross[layer, head] for layer, head in np.ndindex(cross.shape[:2])}
        heads |= {(layer, "mean"): cross[layer].mean(0) for layer in range(len(cross))}
        for (layer, head), weights in heads.items():
            best = weights.argmax(1) - 1  # source word of each row; [SOS] and [EOS] fall outside
            for shift in (-1, 0, 1):
                rows = ((j, j + 1 - shift) for j in range(len(words.tgt_tokens) - 1))
                links = {(int(best[row]), j) for j, row in rows if row < len(best)}
                links = {(i, j) for i, j in links if 0 <= i < len(words.src_tokens) - 2}
                found = np.array([len(links & pair.sure), len(links & pair.alignment), len(links), len(pair.sure)])
                counts[layer, head, shift] = counts.get((layer, head, shift), 0) + found
    lines = [
        {"layer": layer, "head": head, "shift": shift, "error": 1 - (n[0] + n[1]) / (n[2] + n[3])}
        for (layer, head, shift), n in counts.items()
    ]
    return pd.DataFrame(lines).sort_values("error").reset_index(drop=True)


def describe(trace: AttentionTrace, kind: str) -> str:
    """What the recorded tensor of a kind means, said with its own largest weight off the special tokens."""
    weights, (rows, columns) = trace.weights[kind], trace.labels(kind)
    plain = np.outer(
        [token not in SPECIAL_TOKENS for token in rows], [token not in SPECIAL_TOKENS for token in columns]
    )
    layer, head, row, column = np.unravel_index((weights * plain).argmax(), weights.shape)
    L, H, Q, K = weights.shape
    place, weight = f"{layer}, {head}, {row}", weights[layer, head, row, column]
    return (
        f"{kind}: {weights.shape} is {L} layers, {H} heads, {Q} rows that look, {K} columns looked at.\n"
        f"weights[{place}, {column}] = {weight:.3f}: in layer {layer}, head {head}, position {row} ({rows[row]!r}) "
        f"takes that share of what it gathers from position {column} ({columns[column]!r}).\n"
        f"weights[{place}] is one distribution: it sums to {weights[layer, head, row].sum():.6f}."
    )


def check_rows(trace: AttentionTrace, tolerance: float = 1e-4) -> float:
    """How far any row's sum is from 1 at most; raises ValueError past the tolerance."""
    worst = max(float(np.abs(w.sum(-1) - 1).max()) for w in trace.weights.values())
    if worst > tolerance:
        raise ValueError(f"a row of attention weights sums to 1 only within {worst:.2g}, not {tolerance:.2g}")
    return worst
