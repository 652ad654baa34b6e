"""Loss in bf16 and in fp32 after the same number of target tokens, same seed and batches.

    python benchmarks/precision.py --data FOLDER --picture docs/precision.png -- --num-epochs 8

FOLDER as for multi30k.py. Trains the multi30k preset twice, prints a table and draws the curves. Runs
that are there already are only read.
"""

import argparse
import sys
from pathlib import Path

import altair as alt
import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from multi30k import sources

from config import parse_config, run_command
from train import train_model

PRECISIONS = ("fp32", "bf16")


def curves(run: Path, precision: str) -> pd.DataFrame:
    """Columns precision, part, step and loss, in nats a target token."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    rows = [
        (precision, part, e.step, e.value) for part in ("train", "validation") for e in events.Scalars(f"{part}/loss")
    ]
    return pd.DataFrame(rows, columns=["precision", "part", "step", "loss"])


def picture(table: pd.DataFrame) -> alt.Chart:
    """Training loss as a running mean, so that the two can be told apart; validation loss as points."""
    table = table.copy()
    training = table["part"] == "train"
    smooth = table[training].groupby("precision")["loss"].transform(lambda losses: losses.rolling(20).mean())
    table.loc[training, "loss"] = smooth
    table = table.dropna()
    shared = alt.Chart(table).encode(
        x=alt.X("step:Q", title="optimizer steps"),
        y=alt.Y("loss:Q", title="nats a target token", scale=alt.Scale(zero=False)),
        color=alt.Color(
            "precision:N",
            scale=alt.Scale(domain=PRECISIONS, range=["#f5b041", "#1b4f72"]),
            legend=alt.Legend(title=None, symbolType="square"),
        ),
    )
    wide = alt.Scale(domain=PRECISIONS, range=[6, 1.2])  # one lies upon the other
    train = shared.transform_filter(alt.datum.part == "train").mark_line()
    train = train.encode(strokeWidth=alt.StrokeWidth("precision:N", scale=wide, legend=None))
    validation = shared.transform_filter(alt.datum.part == "validation").mark_point(filled=True)
    large = alt.Scale(domain=PRECISIONS, range=[160, 30])
    validation = validation.encode(size=alt.Size("precision:N", scale=large, legend=None))
    return (
        alt.layer(train, validation)
        .resolve_scale(size="independent")
        .properties(
            width=520,
            height=300,
            title="Training loss (lines, with label smoothing) and validation loss (points, without)",
        )
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", default="weights")
    parser.add_argument("--picture", default="")
    parser.add_argument("flags", nargs="*", help="more flags for train.py, after --")
    arguments = parser.parse_args(argv)
    tables = []
    for precision in PRECISIONS:
        run = Path(arguments.runs) / f"precision.{precision}"
        flags = [
            "--preset",
            "multi30k",
            *sources(arguments.data, "tok"),
            "--run-dir",
            str(run),
            "--precision",
            precision,
        ]
        train_model(parse_config([*flags, *arguments.flags]))
        tables.append(curves(run, precision))
    table = pd.concat(tables)
    validation = table[table["part"] == "validation"].pivot(index="step", columns="precision", values="loss")
    print(validation.round(4).to_string())
    if arguments.picture:
        picture(table).save(arguments.picture, scale_factor=2)


if __name__ == "__main__":
    run_command(main)
