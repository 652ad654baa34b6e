"""How cost grows: tokens a second against model size, sentence length and batch size.

    python benchmarks/growth.py --picture docs/growth.png

Trains and translates made-up ids. Within a round every case takes its turn; medians are drawn.
"""

import argparse
import sys
from pathlib import Path

import altair as alt
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers import SIZES, Ours, tokens_of
from workload import MadeUp, in_turn, machine, median, table

VOCABULARY, BATCH_TOKENS, LENGTH, SIZE = 10_000, 4_096, 16, "tiny"
CASES = {
    "parameters (million)": [(name, LENGTH, BATCH_TOKENS) for name in SIZES],
    "sentence length": [(SIZE, length, BATCH_TOKENS) for length in (8, 16, 32, 64, 128, 256)],
    "tokens in a batch": [(SIZE, LENGTH, tokens) for tokens in (256, 512, 1_024, 2_048, 4_096, 8_192, 16_384)],
}


def batch_of(length: int, tokens: int) -> dict:
    """Sentences of one length, [SOS] and [EOS] included."""
    pairs = MadeUp(max(1, tokens // length), VOCABULARY, LENGTH)
    pairs.src_lengths[:], pairs.tgt_lengths[:] = length, length + 1
    return pairs[list(range(len(pairs)))]


def speeds(device: torch.device, rounds: int) -> pd.DataFrame:
    """Columns axis, value, work and tokens_per_second."""
    learners = {name: Ours(size, VOCABULARY, device) for name, size in SIZES.items()}
    writers = {name: Ours(size, VOCABULARY, device) for name, size in SIZES.items()}
    for writer in writers.values():
        writer.prepare_to_write()
    batches = {case: batch_of(*case[1:]) for cases in CASES.values() for case in cases}

    def write(case: tuple) -> None:
        source = batches[case]["encoder_input"].to(device)
        with torch.inference_mode():
            writers[case[0]].write(source, torch.full((len(source),), source.size(1), device=device), beam=1)

    work = {(case, "training"): lambda case=case: learners[case[0]].step(batches[case]) for case in batches}
    work |= {(case, "greedy translation"): lambda case=case: write(case) for case in batches}
    seconds = in_turn(work, rounds, device)
    rows = []
    for axis, cases in CASES.items():
        for case in cases:
            parameters = sum(p.numel() for p in learners[case[0]].run.model.parameters()) / 1e6
            value = {"parameters (million)": parameters, "sentence length": case[1], "tokens in a batch": case[2]}[axis]
            _, target = tokens_of(batches[case])
            for name in ("training", "greedy translation"):
                rows.append((axis, value, name, target / median(seconds[case, name])))
    return pd.DataFrame(rows, columns=["axis", "value", "work", "tokens_per_second"])


def picture(found: pd.DataFrame) -> alt.HConcatChart:
    charts = []
    for axis in CASES:
        line = alt.Chart(found[found["axis"] == axis]).mark_line(point=True)
        x = alt.X("value:Q", title=axis, scale=alt.Scale(type="log", nice=False))
        y = alt.Y("tokens_per_second:Q", title="target tokens a second", scale=alt.Scale(type="log"))
        charts.append(line.encode(x=x, y=y, color=alt.Color("work:N", title=None)).properties(width=240, height=220))
    return alt.hconcat(*charts).resolve_scale(y="shared")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--picture", default="")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    found = speeds(device, arguments.rounds)
    print(f"{machine(device)}, PyTorch {torch.__version__}\n")
    wide = found.pivot_table(index=["axis", "value"], columns="work", values="tokens_per_second", sort=False)
    rows = [
        [axis, f"{value:g}", *(f"{v:,.0f}" for v in row)]
        for (axis, value), row in zip(wide.index, wide.values, strict=False)
    ]
    print(table(rows, ["against", "", *wide.columns]))
    if arguments.picture:
        picture(found).save(arguments.picture, scale_factor=2)


if __name__ == "__main__":
    main()
