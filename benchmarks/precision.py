"""Compare learning curves in bf16 and fp32, with the same seed and batches.

    python benchmarks/precision.py --data FOLDER --picture docs/precision.png -- --num-epochs 8

FOLDER is as for benchmarks/multi30k.py. Trains the multi30k preset in both precisions, prints the validation losses and
draws the curves. Completed runs are not trained again.
"""

import argparse
import sys
from pathlib import Path

import altair as alt
import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from multi30k import corpus_flags

from config import run_command
from train import parse_config, train_model

PRECISIONS = ("fp32", "bf16")


def learning_curves(run: Path, precision: str) -> pd.DataFrame:
    """The losses of a run, in nats per target token: precision, split, step, loss."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    rows = [
        (precision, split, event.step, event.value)
        for split in ("train", "validation")
        for event in events.Scalars(f"{split}/loss")
    ]
    return pd.DataFrame(rows, columns=["precision", "split", "step", "loss"])


def chart(curves: pd.DataFrame) -> alt.Chart:
    """Training loss, smoothed by a running mean over 20 values, as lines; validation loss as points."""
    curves = curves.copy()
    in_training = curves["split"] == "train"
    smooth = curves[in_training].groupby("precision")["loss"].transform(lambda losses: losses.rolling(20).mean())
    curves.loc[in_training, "loss"] = smooth
    curves = curves.dropna()
    base = alt.Chart(curves).encode(
        x=alt.X("step:Q", title="optimizer steps"),
        y=alt.Y("loss:Q", title="nats per target token", scale=alt.Scale(zero=False)),
        color=alt.Color(
            "precision:N",
            scale=alt.Scale(domain=PRECISIONS, range=["#f5b041", "#1b4f72"]),
            legend=alt.Legend(title=None, symbolType="square"),
        ),
    )
    # The curves nearly coincide: fp32 is drawn wide, bf16 thin on top of it.
    widths, sizes = alt.Scale(domain=PRECISIONS, range=[6, 1.2]), alt.Scale(domain=PRECISIONS, range=[160, 30])
    training = base.transform_filter(alt.datum.split == "train").mark_line()
    training = training.encode(strokeWidth=alt.StrokeWidth("precision:N", scale=widths, legend=None))
    validation = base.transform_filter(alt.datum.split == "validation").mark_point(filled=True)
    validation = validation.encode(size=alt.Size("precision:N", scale=sizes, legend=None))
    title = "Training loss (lines, with label smoothing) and validation loss (points, without)"
    layers = alt.layer(training, validation).resolve_scale(size="independent")
    return layers.properties(width=520, height=300, title=title)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the corpus")
    parser.add_argument("--runs", default="weights", help="folder for the runs (default: %(default)s)")
    parser.add_argument("--picture", default="", help="file for the chart, .png or .svg; empty: no chart")
    parser.add_argument("flags", nargs="*", help="flags for train.py, after --")
    arguments = parser.parse_args(argv)
    tables = []
    for precision in PRECISIONS:
        run = Path(arguments.runs) / f"precision.{precision}"
        corpus = corpus_flags(arguments.data, "tok")
        flags = ["--preset", "multi30k", *corpus, "--run-dir", str(run), "--precision", precision, *arguments.flags]
        train_model(parse_config(flags))
        tables.append(learning_curves(run, precision))
    curves = pd.concat(tables)
    validation = curves[curves["split"] == "validation"].pivot(index="step", columns="precision", values="loss")
    print(validation.round(4).to_string())
    if arguments.picture:
        chart(curves).save(arguments.picture, scale_factor=2)


if __name__ == "__main__":
    run_command(main)
