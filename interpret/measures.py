"""Tables and statistics of an AttentionTrace.

    L  layers    H  heads    Q  query positions (rows)    K  key positions (columns)

Tables are tidy: one row per observation, one column per variable. Layers, heads, rows and columns are counted from 0.
"""

from dataclasses import replace

import numpy as np
import pandas as pd

from config import InputError
from corpora.toy import Pair, tokens_of
from dataset import is_punctuation
from interpret.trace import KIND_NAMES, KINDS, AttentionTrace, merge_words, record_trace
from translate import Translator

# ---------------------------------------------------------------------------- tables


def attention_mask(kind: str, Q: int, K: int) -> np.ndarray:
    """(Q, K) boolean, True = may attend. Only decoder self-attention is causal."""
    mask = np.ones((Q, K), dtype=bool)
    return np.tril(mask) if kind == "decoder" else mask


def weights_table(
    trace: AttentionTrace, kind: str, layers: list[int] | None = None, heads: list[int] | None = None
) -> pd.DataFrame:
    """One row per weight: kind, layer, head, row, column, row_token, column_token, weight.

    All layers and heads unless given; masked cells are omitted. Raises InputError for a layer or head out of range.
    """
    weights = trace.weights[kind]
    L, H, Q, K = weights.shape
    check_heads(trace, kind, layers, heads)
    layers, heads = list(range(L)) if layers is None else layers, list(range(H)) if heads is None else heads
    rows, columns = trace.labels(kind)
    row, column = np.nonzero(attention_mask(kind, Q, K))
    return pd.concat(
        [
            pd.DataFrame({
                "kind": kind, "layer": layer, "head": head, "row": row, "column": column,
                "row_token": [rows[i] for i in row], "column_token": [columns[j] for j in column],
                "weight": weights[layer, head, row, column],
            })
            for layer in layers for head in heads
        ],
        ignore_index=True,
    )  # fmt: skip


def check_heads(trace: AttentionTrace, kind: str, layers: list[int] | None, heads: list[int] | None) -> None:
    """Raises InputError for a layer or head out of range."""
    L, H = trace.weights[kind].shape[:2]
    for name, wanted, count in (("layer", layers, L), ("head", heads, H)):
        if bad := [i for i in wanted or [] if not 0 <= i < count]:
            raise InputError(f"no {name} {bad[0]} in {KIND_NAMES[kind]}; it has {name}s 0 to {count - 1}")


def packed_table(
    trace: AttentionTrace, kind: str | None = None, layer: int | None = None, head: int | None = None
) -> pd.DataFrame:
    """One row per head: kind, layer, head, columns (K), `w` and `sums`.

    `w` holds the weights x 10,000 row by row, as in "0,123,9877", and `sums` the sum of each row. All heads, or those
    of the given kind, layer and head. Charts unpack it; in a page it is a thirtieth of the size of `weights_table`.
    """

    def joined(numbers: np.ndarray) -> str:
        return ",".join(f"{number:g}" for number in numbers.ravel())

    return pd.DataFrame([
        {"kind": name, "layer": i, "head": str(j), "columns": weights.shape[3],
         "w": joined(np.rint(10_000 * weights[i, j])), "sums": joined(weights[i, j].sum(-1).round(5))}
        for name, weights in trace.weights.items()
        for i, j in np.ndindex(weights.shape[:2])
        if kind in (None, name) and layer in (None, i) and head in (None, j)
    ])  # fmt: skip


def gallery_table(trace: AttentionTrace) -> pd.DataFrame:
    """The packed table of all heads, and of each layer's mean over heads and rollout as the heads "mean" and "rollout".

    `slot` is the head's column in the gallery.
    """
    combined = {"mean": mean_over_heads(trace), "rollout": rollout(trace)}
    tables = [packed_table(trace), *(packed_table(one).assign(head=name) for name, one in combined.items())]
    heads = pd.concat(tables, ignore_index=True)
    return heads.assign(slot=heads["head"].map(list(heads["head"].unique()).index))


def weights_of_query(trace: AttentionTrace, kind: str, row: int) -> pd.DataFrame:
    """The weights of one query in every head: layer, head, column, row_token, column_token, weight.

    Raises InputError for a row out of range.
    """
    table = weights_table(trace, kind)
    if row not in table["row"].to_numpy():
        raise InputError(f"no row {row} in {KIND_NAMES[kind]}; it has rows 0 to {table['row'].max()}")
    return table[table["row"] == row].drop(columns=["kind", "row"]).reset_index(drop=True)


def token_lookup(trace: AttentionTrace, kind: str, token: str, top_k: int = 3) -> pd.DataFrame:
    """The `top_k` keys with the largest weights in every head, for each row that is labeled with a token.

    Columns layer, head, row, column, row_token, column_token, weight, rank. Raises InputError if no row has the token.
    """
    rows = trace.labels(kind)[0]
    matches = [i for i, label in enumerate(rows) if label.strip("▁") == token.strip("▁")]
    if not matches:
        raise InputError(f"no token {token!r} among the rows of {KIND_NAMES[kind]}; they are {' '.join(rows)}")
    one_row = ["layer", "head", "row"]
    table = weights_table(trace, kind)
    best = table[table["row"].isin(matches)].sort_values("weight", ascending=False).groupby(one_row).head(top_k)
    best = best.assign(rank=best.groupby(one_row).cumcount() + 1)
    return best.sort_values([*one_row, "rank"]).drop(columns="kind").reset_index(drop=True)


def candidates_table(trace: AttentionTrace) -> pd.DataFrame:
    """The top-k next tokens of each decoding step, one per row.

    Columns step, read (the input token), written (the next token of the translation), rank, token, log_probability,
    probability, and chosen: whether the token is the one written.
    """
    return pd.DataFrame([
        {"step": step, "read": trace.tgt_tokens[step], "written": trace.next_tokens[step], "rank": rank, "token": token,
         "log_probability": log_p, "probability": float(np.exp(log_p)), "chosen": token == trace.next_pieces[step]}
        for step, candidates in enumerate(trace.candidates)
        for rank, (token, log_p) in enumerate(candidates, start=1)
    ])  # fmt: skip


# ---------------------------------------------------------------------------- heads and layers combined


def mean_over_heads(trace: AttentionTrace) -> AttentionTrace:
    """The trace with one head per layer: the mean over its heads."""
    return replace(trace, weights={kind: w.mean(1, keepdims=True) for kind, w in trace.weights.items()})


def rollout(trace: AttentionTrace) -> AttentionTrace:
    """Attention rollout (Abnar and Zuidema, 2020, section 3) from each layer down to the input, as one head per layer.

    For self-attention, the matrices 0.5 mean(heads) + 0.5 I are multiplied layer by layer; the identity matrix I
    represents the residual connection. For cross-attention, the decoder's rollout up to the layer, the mean of its
    cross-attention heads and the rollout of the whole encoder are multiplied.
    """

    def roll(weights: np.ndarray) -> np.ndarray:  # (L, H, Q, Q) -> (L, Q, Q)
        layers = 0.5 * weights.mean(1) + 0.5 * np.eye(weights.shape[2], dtype=weights.dtype)
        for i in range(1, len(layers)):
            layers[i] = layers[i] @ layers[i - 1]
        return layers

    encoder, decoder = roll(trace.weights["encoder"]), roll(trace.weights["decoder"])
    cross = decoder @ trace.weights["cross"].mean(1) @ encoder[-1]
    rolled = {"encoder": encoder, "decoder": decoder, "cross": cross}
    return replace(trace, weights={kind: rolled[kind][:, None] for kind in KINDS})


# ---------------------------------------------------------------------------- statistics


def check_row_sums(trace: AttentionTrace, tolerance: float = 1e-4) -> float:
    """The largest deviation of a row sum from 1. Raises ValueError above the tolerance."""
    worst = max(float(np.abs(w.sum(-1) - 1).max()) for w in trace.weights.values())
    if worst > tolerance:
        raise ValueError(f"a row of weights deviates from a sum of 1 by {worst:.2g}; the limit is {tolerance:.2g}")
    return worst


def head_statistics(trace: AttentionTrace) -> pd.DataFrame:
    """What each head attends to, as means over its rows; one row per head.

    Columns kind, layer, head; entropy in bits; max_weight; distance, the expected |query - key| in positions; then the
    fraction of the weight on the query's own position, on the previous position, on [SOS], on [EOS] and on punctuation.
    In cross-attention, these positions are those of two different sentences.
    """
    lines = []
    for kind, weights in trace.weights.items():
        keys = trace.labels(kind)[1]
        L, H, Q, K = weights.shape
        q, k = np.arange(Q)[:, None], np.arange(K)[None, :]
        targets = {  # (Q, K), or (K,) for the same keys in every row
            "own_position": q == k,
            "previous_position": q - 1 == k,
            "[SOS]": np.array(keys) == "[SOS]",
            "[EOS]": np.array(keys) == "[EOS]",
            "punctuation": np.array([is_punctuation(key) for key in keys]),
        }
        statistics = {
            "entropy": -(weights * np.log2(np.maximum(weights, 1e-12))).sum(3).mean(2),
            "max_weight": weights.max(3).mean(2),
            "distance": (weights * np.abs(q - k)).sum(3).mean(2),
            **{name: (weights * target).sum(3).mean(2) for name, target in targets.items()},
        }  # each (L, H)
        for layer, head in np.ndindex(L, H):
            values = {name: float(value[layer, head]) for name, value in statistics.items()}
            lines.append({"kind": kind, "layer": layer, "head": head, **values})
    return pd.DataFrame(lines)


def alignment_errors(translator: Translator, pairs: list[Pair]) -> pd.DataFrame:
    """Alignment error rate (Och and Ney, 2003, section 5.1) of each cross-attention head; 0 is perfect.

    Each target word is linked to the source word with the largest weight in one row: with `shift` 0 in the row that
    reads the target word, with 1 in the row before, which predicts it, with -1 in the row after. Pairs whose words the
    tokenizer splits differently are skipped. Columns layer, head (or "mean", over the layer's heads), shift and error,
    sorted by error.
    """
    counts: dict[tuple, np.ndarray] = {}  # links that are sure, possible, proposed; and sure links of the pair
    for pair in pairs:
        words = merge_words(record_trace(translator, pair.src_text, pair.tgt_text))
        src_length, tgt_length = len(words.src_tokens) - 2, len(words.tgt_tokens) - 1  # without [SOS] and [EOS]
        if (src_length, tgt_length) != (len(tokens_of(pair.src_text)), len(tokens_of(pair.tgt_text))):
            continue
        cross = words.weights["cross"]
        heads = {(layer, head): cross[layer, head] for layer, head in np.ndindex(cross.shape[:2])}
        heads |= {(layer, "mean"): cross[layer].mean(0) for layer in range(len(cross))}
        for (layer, head), weights in heads.items():
            best = weights.argmax(1) - 1  # (Q,), indices of source words; -1 is [SOS], src_length is [EOS]
            for shift in (-1, 0, 1):
                rows = ((word, word + 1 - shift) for word in range(tgt_length))
                links = {(int(best[row]), word) for word, row in rows if row <= tgt_length}
                links = {(i, j) for i, j in links if 0 <= i < src_length}
                found = np.array([len(links & pair.sure), len(links & pair.alignment), len(links), len(pair.sure)])
                counts[layer, head, shift] = counts.get((layer, head, shift), 0) + found
    errors = [
        {"layer": layer, "head": head, "shift": shift, "error": 1 - (sure + possible) / (proposed + all_sure)}
        for (layer, head, shift), (sure, possible, proposed, all_sure) in counts.items()
    ]
    return pd.DataFrame(errors).sort_values("error").reset_index(drop=True)


# ---------------------------------------------------------------------------- what each head does


def scorecard(translator: Translator, pairs: list[tuple[str, str]], gold: list[Pair] | None = None) -> pd.DataFrame:
    """What each head does, over sentence pairs: the columns of `head_statistics` as means, error, shift and role.

    `error` is the alignment error rate of a cross-attention head with its best `shift` (see `alignment_errors`), where
    there are gold alignments. For the roles see `role_of`. Raises InputError for a pair longer than `seq_len`.
    """
    tables = [head_statistics(record_trace(translator, source, target)) for source, target in pairs]
    place = ["kind", "layer", "head"]
    table = pd.concat(tables).groupby(place, sort=False).mean().reset_index()
    if gold:
        errors = alignment_errors(translator, gold).assign(kind="cross").drop_duplicates(place)  # sorted by error
        table = table.merge(errors[errors["head"] != "mean"].astype({"head": int}), on=place, how="left")
    else:
        table = table.assign(shift=np.nan, error=np.nan)
    return table.assign(role=[role_of(row) for row in table.to_dict("records")])


def role_of(head: dict) -> str:
    """The role of a head with these statistics: what it spends at least half of its weight on.

    aligner: an alignment error rate of at most 0.25. Otherwise previous (position), itself (its own position),
    [SOS], [EOS] or punctuation; spread if even its largest weights are below 0.5; near if its keys are at most 1.5
    positions away; or mixed. Positions count in self-attention only.
    """
    if head["kind"] == "cross" and head["error"] <= 0.25:  # False for NaN
        return "aligner"
    is_self = head["kind"] != "cross"
    positions = {"previous_position": "previous", "own_position": "itself"} if is_self else {}
    for name, role in {**positions, "[SOS]": "[SOS]", "[EOS]": "[EOS]", "punctuation": "punctuation"}.items():
        if head[name] >= 0.5:
            return role
    if head["max_weight"] < 0.5:
        return "spread"
    return "near" if is_self and head["distance"] <= 1.5 else "mixed"
