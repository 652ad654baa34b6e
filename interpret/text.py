"""Attention as text for the terminal."""

from interpret.measures import across_layers, steps_table, weights_table
from interpret.trace import AttentionTrace

BLOCKS = " ░▒▓█"


def text_heat_map(trace: AttentionTrace, kind: str, layer: int, head: int, width: int = 100) -> str:
    """A head for the terminal: a block for the eye, hundredths to read; wide ones in parts of `width` columns."""
    table = weights_table(trace, kind, [layer], [head])
    row_labels, column_labels = (fit(labels, 10) for labels in trace.labels(kind))
    cells = {(r, c): w for r, c, w in zip(table["row"], table["column"], table["weight"], strict=True)}
    per_part = max(1, (width - 12) // 6)
    lines = [f"{kind} attention, layer {layer}, head {head}: rows look at columns; █23 is 0.23"]
    for start in range(0, len(column_labels), per_part):
        part = range(start, min(start + per_part, len(column_labels)))
        lines.append(" " * 11 + "".join(f"{column_labels[c][:5].strip():>5} " for c in part).rstrip())
        for r, label in enumerate(row_labels):
            shown = "".join(f"{text_cell(cells[r, c]):>5} " if (r, c) in cells else "      " for c in part)
            lines.append(f"{label:>10} {shown}".rstrip())
    return "\n".join(lines)


def text_cell(weight: float) -> str:
    hundredths = round(100 * weight)
    return f"{BLOCKS[min(4, int(weight * 5))]}{hundredths:02d}" if hundredths else "·"


def fit(labels: list[str], width: int) -> list[str]:
    return [label if len(label) <= width else label[: width - 1] + "…" for label in labels]


def token_bars(trace: AttentionTrace, kind: str, layer: int, head: int, row: int, width: int = 40) -> str:
    """One row of a head as bars with percentages, the largest first."""
    table = across_layers(trace, kind, row)
    table = table[(table["layer"] == layer) & (table["head"] == head)].sort_values("weight", ascending=False)
    lines = [f"{trace.labels(kind)[0][row]} (row {row}) of {kind} attention, layer {layer}, head {head}"]
    for token, weight in zip(table["column_token"], table["weight"], strict=True):
        lines.append(f"{fit([token], 12)[0]:>12} {'█' * round(width * weight):<{width}} {weight:4.0%}")
    return "\n".join(lines)


def steps_text(trace: AttentionTrace) -> str:
    """The decoding steps with their likeliest next tokens."""
    lines = []
    for step, group in steps_table(trace).groupby("step"):
        shown = "  ".join(f"{token} {p:.0%}" for token, p in zip(group["token"], group["probability"], strict=True))
        lines.append(f"{step + 1:>3}) {group['read'].iloc[0]:>12} → {group['written'].iloc[0]:<12} {shown}")
    return "\n".join(lines)
