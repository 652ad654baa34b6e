"""Where each head looks while a sentence is translated: text for the terminal, pictures, one offline page.

    python visualize.py "I can eat an apple." --html apple.html --png apple.png --text

The numbers come from tracing.py, the charts from charts.py.
"""

import shutil
from pathlib import Path
from typing import Annotated, Literal

import tyro

from config import InputError, parse, run_command
from interpret.charts import grid, save_png
from interpret.page import save_page
from interpret.text import steps_text, text_heat_map, token_bars
from interpret.trace import AttentionTrace, merge_words, trace
from translate import Translator


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
        raise InputError('give a sentence, as in python visualize.py "I can eat an apple.", or --trace-file FILE')
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
