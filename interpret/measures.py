"""Tidy tables and measures of an AttentionTrace."""

from dataclasses import replace

import numpy as np
import pandas as pd

from config import InputError
from corpora.toy import Pair, tokens_of
from dataset import SPECIAL_TOKENS
from interpret.trace import KINDS, AttentionTrace, is_mark, merge_words, trace
from translate import Translator

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
