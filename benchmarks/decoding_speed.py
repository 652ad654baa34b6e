"""Measure the decoding speed of this project and its peers on the same sentences and model sizes.

    python benchmarks/decoding_speed.py --data FOLDER/train.lc.norm.tok --test FOLDER/test_2016_flickr.lc.norm.tok
    python benchmarks/decoding_speed.py                              # synthetic text

The weights are random; each translation is as long as its reference. Marian and JoeyNMT process a batch until its
last translation ends, as they do with trained weights. The tutorial's implementation, which decodes one sentence at
a time, is timed on a few sentences.

Prints a table for each model size and beam size: target tokens per second (median over the rounds), the speedup of
this project, and the speed in the warm-up round, in which a CPU sets up bf16 kernels for each new shape. Peers that
are not installed are skipped. For CTranslate2, whose output length cannot be set, see benchmarks/engines.py.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers import SIZES, JoeyNMT, Marian, MarianInBF16, ThisProject, Tutorial
from training_speed import is_installed
from workload import decoding_batches, describe_machine, markdown_table, time_interleaved, timing_parser

TUTORIAL_SENTENCES = 4
PEERS = [Tutorial, Marian, MarianInBF16, JoeyNMT]


def main() -> None:
    parser = timing_parser(__doc__)
    parser.add_argument("--data", default="", help="prefix of two aligned files for the vocabulary; empty: synthetic")
    parser.add_argument("--test", default="", help="prefix of two aligned files: sentences and references")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["tiny", "base"], help="model sizes")
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 5], help="beam sizes; 1: greedy search")
    parser.add_argument("--vocabulary", type=int, default=10_000, help="vocabulary size (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=8_192, help="source tokens per batch, times the beam size")
    parser.add_argument("--sentences", type=int, default=1_000, help="number of sentences; the longest are used")
    parser.add_argument(
        "--precision", choices=["auto", "fp32", "bf16"], default="auto", help="this project's precision"
    )
    names = [peer.name for peer in PEERS]
    skip_help = f"peers to skip: any of {', '.join(names)}"
    parser.add_argument("--without", nargs="*", default=[], choices=names, metavar="PEER", help=skip_help)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(f"{describe_machine(device)}; {arguments.sentences} sentences")
    for name in arguments.sizes:
        for beam_size in arguments.beams:
            print(f"\n{name}, {'greedy' if beam_size == 1 else f'beam {beam_size}'}\n", flush=True)
            print(compare(name, beam_size, arguments, device), flush=True)


@torch.inference_mode()
def compare(size_name: str, beam_size: int, arguments: argparse.Namespace, device: torch.device) -> str:
    """The table of all installed implementations."""
    size, vocab_size = SIZES[size_name], arguments.vocabulary
    budget = arguments.batch_tokens // beam_size
    batches = decoding_batches(arguments.data, arguments.test, vocab_size, budget, arguments.sentences, device)
    implementations = {ThisProject.name: ThisProject(size, vocab_size, device, arguments.precision)}
    for peer in PEERS:
        if peer.name not in arguments.without and not (peer is Tutorial and beam_size > 1) and is_installed(peer):
            implementations[peer.name] = peer(size, vocab_size, device)
    precisions = {name: each.prepare_for_decoding() for name, each in implementations.items()}
    inputs = {name: sample_sentences(batches) if name == Tutorial.name else batches for name in implementations}
    tasks = {name: lambda name=name: decode(implementations[name], inputs[name], beam_size) for name in implementations}
    rows, speed_here = [], None
    for name, (warmup, *seconds) in time_interleaved(tasks, arguments.rounds, device, keep_warmup=True).items():
        tokens = sum(int(lengths.sum()) for _, lengths in inputs[name])
        speed = tokens / statistics.median(seconds)
        speed_here = speed_here or speed
        rows.append([name, precisions[name], f"{speed:,.0f}", f"{speed_here / speed:.2f}", f"{tokens / warmup:,.0f}"])
    header = ["", "precision", "target tokens/s", "speedup of this project", "target tokens/s in warm-up"]
    return markdown_table(rows, header)


def decode(implementation, batches: list[tuple], beam_size: int) -> None:
    for source, lengths in batches:
        implementation.decode(source, lengths, beam_size)


def sample_sentences(batches: list[tuple]) -> list[tuple]:
    """Batches of one sentence each, taken from batches evenly spaced over the list."""
    chosen = torch.linspace(0, len(batches) - 1, TUTORIAL_SENTENCES).long().tolist()
    return [(batches[i][0][:1], batches[i][1][:1]) for i in chosen]


if __name__ == "__main__":
    main()
