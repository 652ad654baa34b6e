"""Where each head looks while a sentence is translated: text for the terminal, pictures, one offline page.

    python attention.py "I can eat an apple." --html apple.html --png apple.png --text

The numbers come from tracing.py, the charts from charts.py.
"""

import shutil
from pathlib import Path
from typing import Annotated, Literal

import tyro

from charts import grid, save_page, save_png
from config import InputError, parse, run_command
from tracing import AttentionTrace, across_layers, merge_words, steps_table, trace, weights_table
from translate import Translator

# ---------------------------------------------------------------------------- text

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


# ---------------------------------------------------------------------------- command line


def command(
    sentence: Annotated[str | None, tyro.conf.Positional] = None,
    /,
    run_dir: str = "",
    target: str | None = None,
    html: str = "",
    png: str = "",
    text: bool = False,
    save: str = "",
    trace_file: str = "",
    kind: Literal["encoder", "decoder", "cross"] = "cross",
    layer: int = -1,
    head: int = 0,
    words: bool = False,
    device: str = "auto",
) -> None:
    """Shows where each attention head looks while a sentence is translated.

    Args:
        sentence: what to translate
        run_dir: the run's folder; empty: the run trained last
        target: a translation to look at in place of the run's own
        html: write one interactive page that needs no network
        png: write a picture of all heads of a kind
        text: print the heat map of one head, its bars and the decoding steps (done where nothing else is asked for)
        save: write the trace to a file, to be drawn again without the model
        trace_file: draw a saved trace in place of a sentence
        kind: encoder, decoder or cross attention, for --png and --text
        layer: the layer for --text; -1: the last
        head: the head for --text
        words: merge pieces of words
        device: auto, cuda, mps or cpu
    """
    for path in (html, png, save):
        if Path(path).is_dir() and path:
            raise InputError(f"{path} is a folder; give the name of a file")
        if path and not Path(path).parent.is_dir():
            raise InputError(f"no folder {Path(path).parent} to write {path} into; make it first")
    if bool(sentence) == bool(trace_file):
        raise InputError('give a sentence, as in python attention.py "I can eat an apple.", or --trace-file FILE')
    traced = (
        AttentionTrace.load(trace_file) if trace_file else trace(Translator.load(run_dir, device), sentence, target)
    )
    if words:
        traced = merge_words(traced)
    print(" ".join(traced.src_tokens[1:-1]), "→", " ".join(traced.tgt_tokens[1:]))
    if save:
        traced.save(save)
        said(save)
    if html:
        save_page(traced, html)
        said(html)
    if png:
        save_png(grid(traced, kind), png)
        said(png)
    if text or not (html or png or save):
        layer = len(traced.weights[kind]) - 1 if layer == -1 else layer
        print("\n" + text_heat_map(traced, kind, layer, head, shutil.get_terminal_size((100, 40)).columns))
        print("\n" + token_bars(traced, kind, layer, head, len(traced.labels(kind)[0]) - 1))
        print("\n" + steps_text(traced))


def said(path: str) -> None:
    print(f"wrote {path} ({Path(path).stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    run_command(lambda argv: parse(command, argv))
