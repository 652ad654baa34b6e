"""Shows the attention of every head while a sentence is translated, and the architecture of a model.

python visualize.py "I can eat an apple." --html apple.html --png apple.png --text
python visualize.py --file sentences.txt --html sentences.html
python visualize.py --architecture model.svg
"""

# config comes first: it makes Ctrl-C quiet during the imports below
from config import InputError, parse, run_command

# isort: split
import shutil
from pathlib import Path
from typing import Annotated, Literal

import tyro

from corpora.files import read_text_file
from interpret.measures import check_heads, weights_of_query
from interpret.text import candidates_text, heat_map_text, row_bars_text, top_keys_text
from interpret.trace import AttentionTrace, merge_bytes, merge_words, record_trace
from runs.files import check_outputs
from translate import Translator


def main(
    sentence: Annotated[str | None, tyro.conf.Positional] = None,
    /,
    file: str = "",
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
    layer: int | None = None,
    head: int | Literal["mean"] | None = None,
    row: int | None = None,
    words: bool = False,
    device: str = "auto",
) -> None:
    """Shows the attention of every head while a sentence is translated, and the architecture of a model.

    Args:
        sentence: the sentence to translate
        file: text file with several sentences, one per line, for --html and --text
        run_dir: folder of the run; empty: the most recently trained run
        target: a translation to use instead of the run's own
        html: write an interactive page that works offline
        png: write a picture (.png or .svg) of one kind of attention: all heads, or those of --layer and --head
        text: print one head as heat map, a row of it as bars, the top three keys of all heads in this row, and the
            decoding steps; implied if no file is written
        save: write the trace to a file, which --trace-file reads
        trace_file: show a saved trace instead of translating a sentence; needs no run
        architecture: write a picture (.svg or .png) of the run's model, its shapes and parameters; needs no sentence
        preset: the model of a preset, not trained, instead of a run; for --architecture
        kind: kind of attention for --png and --text: encoder (self-attention), decoder (self-attention) or cross
        layer: layer for --png and --text, counted from 0; by default all in --png, the last one in --text
        head: head for --png and --text, counted from 0, or mean; by default all in --png, 0 in --text
        row: row for --text, counted from 0, by default the last one; in --png, the top three keys of all heads in it
        words: subwords merged into words
        device: auto, cuda, mps or cpu
    """
    for path in (html, png, save, architecture):
        if path and Path(path).is_dir():
            raise InputError(f"{path} is a folder; give the name of a file")
        if path and not Path(path).parent.is_dir():
            raise InputError(f"no folder {Path(path).parent} to write {path} to; create it first")
    check_outputs([html, png, save, architecture], [file, trace_file])
    if html or png or architecture or preset:  # these modules need the packages of requirements-charts.txt
        from interpret.architecture import preset_architecture, run_architecture
        from interpret.charts import SUFFIXES, picture, save_picture
        from interpret.page import save_page
    if png and Path(png).suffix.lower() not in SUFFIXES:
        raise InputError(f"{png} does not end in {' or '.join(SUFFIXES)}; give --png such a name")
    if architecture or preset:
        check_architecture(architecture, preset, run_dir, sentence or file, trace_file)
    if architecture and not (sentence or file or html or png or save or text):
        save_picture(preset_architecture(preset) if preset else run_architecture(run_dir), architecture)
        print_written(architecture)
        return
    if [bool(sentence), bool(file), bool(trace_file)].count(True) != 1:
        raise InputError(
            'give a sentence, as in python visualize.py "I can eat an apple.", or --file FILE, or --trace-file FILE'
        )
    if file and (target or png or save):
        raise InputError("--file is for --html and --text; give one sentence for --target, --png and --save")
    traces = load_traces(sentence, file, trace_file, run_dir, target, device)
    lengths = len(traces[0].src_tokens), len(traces[0].tgt_tokens)  # as the model reads them, not merged
    if words:
        traces = [merge_words(trace) for trace in traces]
    shown = [merge_bytes(trace) for trace in traces]
    for trace in shown:
        check_heads(trace, kind, [layer or 0], [0 if head in (None, "mean") else head])
        weights_of_query(trace, kind, row or 0)
    trace = shown[0]
    if architecture:
        save_picture(run_architecture(run_dir, lengths), architecture)
        print_written(architecture)
    if save:
        traces[0].save(save)
        print_written(save)
    if html:
        save_page(shown, html)
        print_written(html)
    if png:
        save_picture(picture(trace, kind, layer, head, row), png)
        print_written(png)
    if text or not (html or png or save or architecture):
        for trace in shown:
            print_text(trace, kind, layer, head, row)


def load_traces(
    sentence: str | None, file: str, trace_file: str, run_dir: str, target: str | None, device: str
) -> list[AttentionTrace]:
    """The trace of the sentence, of each line of the file that is not blank, or the saved one."""
    if trace_file:
        return [AttentionTrace.load(trace_file)]
    sentences = [line for line in read_text_file(file) if line.strip()] if file else [sentence]
    if not sentences:
        raise InputError(f"{file} contains no sentences; give a file with at least one")
    translator = Translator.load(run_dir, device)
    return [record_trace(translator, one, target) for one in sentences]


def print_text(trace: AttentionTrace, kind: str, layer: int | None, head: int | str | None, row: int | None) -> None:
    layer = len(trace.weights[kind]) - 1 if layer is None else layer
    row = len(trace.labels(kind)[0]) - 1 if row is None else row
    head = 0 if head is None else head
    parts = [
        f"{trace.source} → {trace.translation}",
        heat_map_text(trace, kind, layer, head, shutil.get_terminal_size((100, 40)).columns),
        row_bars_text(trace, kind, layer, head, row),
        top_keys_text(trace, kind, row),
        candidates_text(trace),
    ]
    print("\n\n".join(parts))


def check_architecture(path: str, preset: str, run_dir: str, sentence: str | None, trace_file: str) -> None:
    """Raises InputError for options that do not go with --architecture and --preset."""
    from interpret.charts import SUFFIXES

    if not path:
        raise InputError(f"--preset {preset} is for --architecture only; add --architecture FILE.svg")
    if Path(path).suffix.lower() not in SUFFIXES:
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
