"""Text views of traces and experiments, for the terminal.

L  layers    H  heads    Q  query positions (rows)    K  key positions (columns)
"""

import numpy as np
import pandas as pd

from dataset import SPECIAL_TOKENS
from interpret.measures import candidates_table, check_heads, mean_over_heads, weights_of_query, weights_table
from interpret.trace import KIND_NAMES, AttentionTrace

SHADES = " ░▒▓█"

# ---------------------------------------------------------------------------- attention


def describe_weights(trace: AttentionTrace, kind: str) -> str:
    """Explains the weights of a kind: their shape, and the largest weight between two ordinary tokens."""
    weights, (rows, columns) = trace.weights[kind], trace.labels(kind)
    L, H, Q, K = weights.shape
    row_is_plain, column_is_plain = ([token not in SPECIAL_TOKENS for token in tokens] for tokens in (rows, columns))
    between_plain = np.outer(row_is_plain, column_is_plain)  # (Q, K)
    layer, head, row, column = np.unravel_index((weights * between_plain).argmax(), weights.shape)
    place, weight = f"{layer}, {head}, {row}", weights[layer, head, row, column]
    return (
        f"{KIND_NAMES[kind]}: shape {weights.shape} is {L} layers, {H} heads, {Q} queries (rows), {K} keys (columns).\n"
        f"weights[{place}, {column}] = {weight:.3f}: in layer {layer}, head {head}, the query at position {row} "
        f"({rows[row]!r}) gives this weight to the key at position {column} ({columns[column]!r}).\n"
        f"weights[{place}] is a probability distribution over the keys: it sums to "
        f"{weights[layer, head, row].sum():.6f}."
    )


def heat_map_text(trace: AttentionTrace, kind: str, layer: int, head: int | str, width: int = 100) -> str:
    """One head, or the "mean" over heads, as a heat map: each cell is a shade and the weight in hundredths.

    Columns that do not fit into `width` characters follow below. Raises InputError for a layer or head out of range.
    """
    shown, index = (mean_over_heads(trace), 0) if head == "mean" else (trace, head)
    table = weights_table(shown, kind, [layer], [index])
    row_labels, column_labels = shortened(trace.row_labels(kind), 22), shortened(trace.labels(kind)[1], 10)
    weights = {(r, c): w for r, c, w in zip(table["row"], table["column"], table["weight"], strict=True)}
    margin = max(map(len, row_labels))
    per_part = max(1, (width - margin - 2) // 6)
    name = f"{KIND_NAMES[kind]}, layer {layer}, {head_name(head)}"
    lines = [f"{name} (rows: queries, columns: keys; ░23 means 0.23)"]
    for start in range(0, len(column_labels), per_part):
        part = range(start, min(start + per_part, len(column_labels)))
        lines.append(" " * (margin + 1) + "".join(f"{column_labels[c][:5].strip():>5} " for c in part).rstrip())
        for r, label in enumerate(row_labels):
            cells = "".join(f"{cell_text(weights[r, c]):>5} " if (r, c) in weights else "      " for c in part)
            lines.append(f"{label:>{margin}} {cells}".rstrip())
    return "\n".join(lines)


def cell_text(weight: float) -> str:
    """A weight as a shade and hundredths: 0.23 is "░23"; "·" below 0.005."""
    hundredths = round(100 * weight)
    return f"{SHADES[min(4, int(weight * 5))]}{hundredths:02d}" if hundredths else "·"


def row_bars_text(trace: AttentionTrace, kind: str, layer: int, head: int | str, row: int, width: int = 50) -> str:
    """One row of a head, or of the "mean" over heads: position, token, bar, weight and percentage of each key; the sum.

    A bar of `width` blocks is a weight of 1. Raises InputError for a layer, head or row out of range.
    """
    table = weights_of_query(mean_over_heads(trace) if head == "mean" else trace, kind, row)
    name, head = head_name(head), 0 if head == "mean" else head
    check_heads(trace, kind, [layer], [head])
    table = table[(table["layer"] == layer) & (table["head"] == head)]
    lines = [f"{KIND_NAMES[kind]}, layer {layer}, {name}, row {row}: {trace.row_labels(kind)[row]}"]
    for position, token, weight in zip(table["column"], table["column_token"], table["weight"], strict=True):
        bar = "█" * round(width * weight)
        lines.append(f"{position:>3} {shortened([token], 16)[0]:<16} {weight:.4f} {weight:7.2%} {bar}".rstrip())
    lines.append(f"{'sum':>20} {table['weight'].sum():.4f} {table['weight'].sum():7.2%}")
    return "\n".join(lines)


def top_keys_text(trace: AttentionTrace, kind: str, row: int, top_k: int = 3) -> str:
    """One line per head: the `top_k` keys with the largest weights of a row, with position, token and weight.

    Raises InputError for a row out of range.
    """
    table = weights_of_query(trace, kind, row)
    lines = [f"{KIND_NAMES[kind]}, all heads, row {row}: {trace.row_labels(kind)[row]}"]
    for (layer, head), weights in table.groupby(["layer", "head"]):
        best = weights.nlargest(top_k, "weight")
        keys = zip(best["column"], shortened(best["column_token"].tolist(), 14), best["weight"], strict=True)
        cells = (f"{column:>3} {token:<14} {weight:.4f}" for column, token, weight in keys)
        lines.append(f"layer {layer}, head {head:<2}  " + "   ".join(cells))
    return "\n".join(lines)


def head_name(head: int | str) -> str:
    return "mean over heads" if head == "mean" else f"head {head}"


def shortened(labels: list[str], width: int) -> list[str]:
    """Labels of at most `width` characters; longer ones are cut and end in an ellipsis."""
    return [label if len(label) <= width else label[: width - 1] + "…" for label in labels]


# ---------------------------------------------------------------------------- decoding and experiments


def candidates_text(trace: AttentionTrace) -> str:
    """One line per decoding step: the token read, the token written, and the top-k next tokens with probabilities."""
    lines = []
    for step, group in candidates_table(trace).groupby("step"):
        top = "  ".join(f"{token} {p:.0%}" for token, p in zip(group["token"], group["probability"], strict=True))
        lines.append(f"{step + 1:>3}) {group['read'].iloc[0]:>12} → {group['written'].iloc[0]:<12} {top}")
    return "\n".join(lines)


def step_table_text(table: pd.DataFrame, value: str = "logit") -> str:
    """The `step_table` of interpret/steps.py: one line per step, one column per word, the chosen word in brackets."""
    words = list(dict.fromkeys(table["word"]))
    width = max(9, *(len(word) + 1 for word in words))
    left = max(len(label) for label in table["label"])
    lines = [" " * left + "".join(f"{word:>{width}}" for word in words)]
    for _, group in table.groupby("step"):
        cells = [
            f"[{v:.2f}]" if chosen else f"{v:.2f} " for v, chosen in zip(group[value], group["chosen"], strict=True)
        ]
        lines.append(f"{group['label'].iloc[0]:<{left}}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def variants_text(table: pd.DataFrame, width: int = 44) -> str:
    """The table of `compare`, with the scores of `measure` if they have been merged in.

    Translations longer than `width` characters are shortened.
    """
    scores = [name for name in ("bleu", "exact") if name in table]
    lines = [f"{'variant':<42} {'change':>7} {''.join(f'{name:>7}' for name in scores)}  translation"]
    for row in table.to_dict("records"):
        translation = shortened([row["translation"]], width)[0]
        numbers = "".join(f"{row[name]:7.1f}" for name in scores)
        lines.append(f"{row['variant']:<42} {row['change']:+7.1f} {numbers}  {translation}")
    return "\n".join(lines)


def findings_text(table: pd.DataFrame) -> str:
    """The table of `measure_findings`: one finding with its figures per paragraph."""
    lines = ["findings of the logits study"]
    for row in table.to_dict("records"):
        lines.append(f"{row['finding']}\n    {'holds' if row['holds'] else 'does not hold'}: {row['figures']}")
    return "\n".join(lines)
