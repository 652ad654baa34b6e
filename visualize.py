"""Attention of every head while a sentence is translated: as text, image and offline page.

python visualize.py "I can eat an apple." --html apple.html --png apple.png --text
"""

import shutil
from pathlib import Path
from typing import Annotated, Literal

import tyro

from config import InputError, parse, run_command
from interpret.charts import grid, save_png
from interpret.page import save_page
from interpret.text import candidates_text, heat_map_text, row_bars_text
from interpret.trace import AttentionTrace, merge_words, record_trace
from translate import Translator


def main(
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
    """Show the attention of every head while a sentence is translated.

    Args:
        sentence: sentence to translate
        run_dir: folder of the run; empty: the most recently trained run
        target: translation to use instead of the run's own
        html: HTML file for an interactive page that works offline
        png: PNG file for the heat maps of all heads of one kind of attention
        text: text output: one head as heat map, its last row as bars, the decoding steps; implied if no file is written
        save: file for the trace, which --trace-file reads
        trace_file: saved trace to show instead of translating a sentence; needs no run
        kind: kind of attention for --png and --text: encoder (self-attention), decoder (self-attention) or cross
        layer: layer for --text, counted from 0; -1: the last one
        head: head for --text, counted from 0
        words: subwords merged into words
        device: auto, cuda, mps or cpu
    """
    for path in (html, png, save):
        if path and Path(path).is_dir():
            raise InputError(f"{path} is a folder; give the name of a file")
        if path and not Path(path).parent.is_dir():
            raise InputError(f"no folder {Path(path).parent} to write {path} to; create it first")
    if bool(sentence) == bool(trace_file):
        raise InputError('give a sentence, as in python visualize.py "I can eat an apple.", or --trace-file FILE')
    if trace_file:
        trace = AttentionTrace.load(trace_file)
    else:
        trace = record_trace(Translator.load(run_dir, device), sentence, target)
    if words:
        trace = merge_words(trace)
    print(" ".join(trace.src_tokens[1:-1]), "→", " ".join(trace.tgt_tokens[1:]))
    if save:
        trace.save(save)
        print_written(save)
    if html:
        save_page(trace, html)
        print_written(html)
    if png:
        save_png(grid(trace, kind), png)
        print_written(png)
    if text or not (html or png or save):
        layer = len(trace.weights[kind]) - 1 if layer == -1 else layer
        last_row = len(trace.labels(kind)[0]) - 1
        print("\n" + heat_map_text(trace, kind, layer, head, shutil.get_terminal_size((100, 40)).columns))
        print("\n" + row_bars_text(trace, kind, layer, head, last_row))
        print("\n" + candidates_text(trace))


def print_written(path: str) -> None:
    print(f"wrote {path} ({Path(path).stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    run_command(lambda argv: parse(main, argv))
