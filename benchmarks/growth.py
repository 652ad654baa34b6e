"""Measure the speed of training and greedy translation for different model sizes, sentence lengths and batch sizes.

    python benchmarks/growth.py --picture docs/growth.png

The text is synthetic. Each round runs every case once; medians over the rounds are reported.
"""

import functools
import statistics
import sys
from pathlib import Path

import altair as alt
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers import SIZES, ThisProject, count_tokens
from workload import SyntheticPairs, describe_machine, markdown_table, time_interleaved, timing_parser

VOCABULARY, BATCH_TOKENS, LENGTH, SIZE = 10_000, 4_096, 16, "tiny"
# For each varied quantity, its cases: (model size, sentence length, tokens in a batch).
CASES = {
    "parameters (million)": [(name, LENGTH, BATCH_TOKENS) for name in SIZES],
    "sentence length": [(SIZE, length, BATCH_TOKENS) for length in (8, 16, 32, 64, 128, 256)],
    "tokens in a batch": [(SIZE, LENGTH, tokens) for tokens in (256, 512, 1_024, 2_048, 4_096, 8_192, 16_384)],
}
TRAINING, TRANSLATION = "training", "greedy translation"


def make_batch(length: int, tokens: int) -> dict:
    """A batch of sentences that all have this length, including [SOS] and [EOS]."""
    pairs = SyntheticPairs(max(1, tokens // length), VOCABULARY, LENGTH)
    pairs.src_lengths[:], pairs.tgt_lengths[:] = length, length + 1
    return pairs[list(range(len(pairs)))]


def measure(device: torch.device, rounds: int) -> pd.DataFrame:
    """Speeds as a table with the columns quantity, value, task and tokens_per_second."""
    trained = {name: ThisProject(size, VOCABULARY, device) for name, size in SIZES.items()}
    decoded = {name: ThisProject(size, VOCABULARY, device) for name, size in SIZES.items()}
    for project in decoded.values():
        project.prepare_for_decoding()
    batches = {case: make_batch(*case[1:]) for cases in CASES.values() for case in cases}

    @torch.inference_mode()
    def translate(case: tuple) -> None:
        source = batches[case]["encoder_input"].to(device)
        decoded[case[0]].decode(source, torch.full((len(source),), source.size(1), device=device), beam_size=1)

    tasks = {(case, TRAINING): functools.partial(trained[case[0]].step, batch) for case, batch in batches.items()}
    tasks |= {(case, TRANSLATION): functools.partial(translate, case) for case in batches}
    seconds = time_interleaved(tasks, rounds, device)
    rows = []
    for quantity, cases in CASES.items():
        for case in cases:
            name, length, tokens = case
            parameters = sum(p.numel() for p in trained[name].model.parameters()) / 1e6
            values = {"parameters (million)": parameters, "sentence length": length, "tokens in a batch": tokens}
            _, target = count_tokens([batches[case]])
            for task in (TRAINING, TRANSLATION):
                rows.append((quantity, values[quantity], task, target / statistics.median(seconds[case, task])))
    return pd.DataFrame(rows, columns=["quantity", "value", "task", "tokens_per_second"])


def chart(measured: pd.DataFrame) -> alt.HConcatChart:
    charts = []
    for quantity in CASES:
        line = alt.Chart(measured[measured["quantity"] == quantity]).mark_line(point=True)
        x = alt.X("value:Q", title=quantity, scale=alt.Scale(type="log", nice=False))
        y = alt.Y("tokens_per_second:Q", title="target tokens per second", scale=alt.Scale(type="log"))
        charts.append(line.encode(x=x, y=y, color=alt.Color("task:N", title=None)).properties(width=240, height=220))
    return alt.hconcat(*charts).resolve_scale(y="shared")


def main() -> None:
    parser = timing_parser(__doc__)
    parser.add_argument("--picture", default="", help="file for the chart, .png or .svg; empty: no chart")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    measured = measure(device, arguments.rounds)
    print(f"{describe_machine(device)}\n")
    index = ["quantity", "value"]
    wide = measured.pivot_table(index=index, columns="task", values="tokens_per_second", sort=False)
    rows = [
        [quantity, f"{value:g}", *(f"{speed:,.0f}" for speed in speeds)]
        for (quantity, value), speeds in zip(wide.index, wide.values, strict=True)
    ]
    print(markdown_table(rows, ["varied quantity", "value", *(f"{task}, target tokens/s" for task in wide.columns)]))
    if arguments.picture:
        chart(measured).save(arguments.picture, scale_factor=2)


if __name__ == "__main__":
    main()
