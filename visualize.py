"""Shows the attention of every head while a sentence is translated, and the architecture of a model.

python visualize.py "I can eat an apple." --html apple.html --png apple.png --text
python visualize.py --architecture model.svg
"""

# config comes first: it makes Ctrl-C quiet during the imports below
from config import InputError, parse, run_command

# isort: split
import shutil
from pathlib import Path
from typing import Annotated, Literal

import tyro

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
    architecture: str = "",
    preset: str = "",
    kind: Literal["encoder", "decoder", "cross"] = "cross",
    layer: int = -1,
    head: int = 0,
    words: bool = False,
    device: str = "auto",
) -> None:
    """Shows the attention of every head while a sentence is translated, and the architecture of a model.

    Args:
        sentence: the sentence to translate
        run_dir: folder of the run; empty: the most recently trained run
        target: a translation to use instead of the run's own
        html: write an interactive page that works offline
        png: write a picture of all heads of one kind of attention
        text: print one head as heat map, its last row as bars, and the decoding steps; implied if no file is written
        save: write the trace to a file, which --trace-file reads
        trace_file: show a saved trace instead of translating a sentence; needs no run
        architecture: write a picture (.svg or .png) of the run's model, its shapes and parameters; needs no sentence
        preset: the model of a preset, not trained, instead of a run; for --architecture
        kind: kind of attention for --png and --text: encoder (self-attention), decoder (self-attention) or cross
        layer: layer for --text, counted from 0; -1: the last one
        head: head for --text, counted from 0
        words: subwords merged into words
        device: auto, cuda, mps or cpu
    """
    for path in (html, png, save, architecture):
        if path and Path(path).is_dir():
            raise InputError(f"{path} is a folder; give the name of a file")
        if path and not Path(path).parent.is_dir():
            raise InputError(f"no folder {Path(path).parent} to write {path} to; create it first")
    if html or png or architecture or preset:  # these modules need the packages of requirements-charts.txt
        from interpret.architecture import preset_architecture, run_architecture, save_architecture
        from interpret.charts import grid, save_png
        from interpret.page import save_page
    if architecture or preset:
        check_architecture(architecture, preset, run_dir, sentence, trace_file)
    if architecture and not (sentence or html or png or save or text):
        save_architecture(preset_architecture(preset) if preset else run_architecture(run_dir), architecture)
        print_written(architecture)
        return
    if bool(sentence) == bool(trace_file):
        raise InputError('give a sentence, as in python visualize.py "I can eat an apple.", or --trace-file FILE')
    if trace_file:
        trace = AttentionTrace.load(trace_file)
    else:
        trace = record_trace(Translator.load(run_dir, device), sentence, target)
    if architecture:
        save_architecture(run_architecture(run_dir, (len(trace.src_tokens), len(trace.tgt_tokens))), architecture)
        print_written(architecture)
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
    if text or not (html or png or save or architecture):
        layer = len(trace.weights[kind]) - 1 if layer == -1 else layer
        last_row = len(trace.labels(kind)[0]) - 1
        print("\n" + heat_map_text(trace, kind, layer, head, shutil.get_terminal_size((100, 40)).columns))
        print("\n" + row_bars_text(trace, kind, layer, head, last_row))
        print("\n" + candidates_text(trace))


def check_architecture(path: str, preset: str, run_dir: str, sentence: str | None, trace_file: str) -> None:
    """Raises InputError for options that do not go with --architecture and --preset."""
    from interpret.architecture import SUFFIXES

    if not path:
        raise InputError(f"--preset {preset} is for --architecture only; add --architecture FILE.svg")
    if Path(path).suffix not in SUFFIXES:
        raise InputError(f"{path} does not end in {' or '.join(SUFFIXES)}; give --architecture such a name")
    if preset and run_dir:
        raise InputError(f"--preset {preset} and --run-dir {run_dir} name two models; give one of them")
    if preset and sentence:
        raise InputError(f"--preset {preset} is not trained and cannot translate; omit the sentence")
    if trace_file:
        raise InputError("--trace-file has no model for --architecture; give a run or a preset instead")


def print_written(path: str) -> None:
    print(f"wrote {path} ({Path(path).stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    run_command(lambda argv: parse(main, argv))
