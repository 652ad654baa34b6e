"""Translation speed of this project and its peers, in turn, on the same sentences and sizes.

    python benchmarks/decoding.py --data FOLDER/train.lc.norm.tok --test FOLDER/test_2016_flickr.lc.norm.tok
    python benchmarks/decoding.py                                    # made-up ids

The weights are random; each translation ends when it is as long as its reference. JoeyNMT and Marian go on
with a batch until its last sentence has ended, as they do with trained weights. The tutorial's way, a
sentence at a time, is timed on a few sentences. Prints a table for each size and beam: target tokens a
second (median over the rounds), how many times as fast this project is, and the speed of the round before
them: bf16 products on a CPU are prepared anew for every shape that has not been there. A peer that is not
installed is left out. Against CTranslate2, which cannot be told where to end: benchmarks/engines.py.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers import SIZES, JoeyNMT, Marian, MarianInBF16, Ours, Tutorial
from training_speed import installed
from workload import in_turn, machine, median, sentences_to_write, table

TUTORIAL_SENTENCES = 4
PEERS = [Tutorial, Marian, MarianInBF16, JoeyNMT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="prefix of two aligned files for the vocabulary; empty: made-up ids")
    parser.add_argument("--test", default="", help="prefix of the two whose source is translated")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["tiny", "base"])
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--vocabulary", type=int, default=10_000)
    parser.add_argument("--batch-tokens", type=int, default=8_192, help="source tokens a batch, over the beam size")
    parser.add_argument("--sentences", type=int, default=1_000)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of this project")
    parser.add_argument("--without", nargs="*", default=[], choices=[way.name for way in PEERS], help="peers left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(f"{machine(device)}, PyTorch {torch.__version__}; {arguments.sentences} sentences")
    for name in arguments.sizes:
        for beam in arguments.beams:
            print(f"\n{name}, {'greedy' if beam == 1 else f'beam {beam}'}\n", flush=True)
            print(measure(name, beam, arguments, device), flush=True)


@torch.inference_mode()
def measure(name: str, beam: int, arguments, device: torch.device) -> str:
    size, vocabulary = SIZES[name], arguments.vocabulary
    budget = arguments.batch_tokens // beam
    batches = sentences_to_write(arguments.data, arguments.test, vocabulary, budget, arguments.sentences, device)
    ways = {Ours.name: Ours(size, vocabulary, device, arguments.precision)}
    for way in PEERS:
        if installed(way) and way.name not in arguments.without and not (way is Tutorial and beam > 1):
            ways[way.name] = way(size, vocabulary, device)
    precisions = {name: way.prepare_to_write() for name, way in ways.items()}
    given = {name: few(batches) if name == Tutorial.name else batches for name in ways}

    def work(name: str):
        return lambda: [ways[name].write(source, steps, beam) for source, steps in given[name]]

    seconds = in_turn({name: work(name) for name in ways}, arguments.rounds, device, keep_first=True)
    rows, ours = [], None
    for name, (first, *others) in seconds.items():
        tokens = sum(int(steps.sum()) for _, steps in given[name])
        speed, at_first = tokens / median(others), tokens / first
        ours = ours or speed
        rows.append([name, precisions[name], f"{speed:,.0f}", f"{ours / speed:.2f}", f"{at_first:,.0f}"])
    return table(rows, ["", "precision", "target tokens/s", "this project is × as fast", "the first time"])


def few(batches: list[tuple]) -> list[tuple]:
    """Sentences from batches all over, one at a time."""
    chosen = torch.linspace(0, len(batches) - 1, TUTORIAL_SENTENCES).long().tolist()
    return [(batches[i][0][:1], batches[i][1][:1]) for i in chosen]


if __name__ == "__main__":
    main()
