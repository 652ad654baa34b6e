"""Translation speed of this project and its peers, in turn, on the same sentences and sizes.

    python benchmarks/decoding.py --data FOLDER/train.lc.norm.tok --test FOLDER/test_2016_flickr.lc.norm.tok
    python benchmarks/decoding.py                                    # made-up ids

The weights are random and nobody may end a translation: each batch is as many tokens long as its longest
source, for everyone. The tutorial's way, a sentence at a time, is timed on a few sentences. Prints
a table for each size and beam: target tokens a second (median over the rounds) and how many times this
project's speed that is. A peer that is not installed is left out.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from training import installed
from ways import SIZES, CTranslate2, JoeyNMT, Marian, Ours, Tutorial
from workload import in_turn, machine, median, source_batches, table

TUTORIAL_SENTENCES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="prefix of two aligned files for the vocabulary; empty: made-up ids")
    parser.add_argument("--test", default="", help="prefix of the two whose source is translated")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["tiny", "base"])
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--vocabulary", type=int, default=10_000)
    parser.add_argument("--batch-tokens", type=int, default=4_096, help="source tokens a batch, over the beam size")
    parser.add_argument("--sentences", type=int, default=1_000)
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
    sources = source_batches(arguments.data, arguments.test, vocabulary, budget, arguments.sentences, device)
    peers = [way for way in (Tutorial, Marian, JoeyNMT) if installed(way) and not (way is Tutorial and beam > 1)]
    ways = {way.name: way(size, vocabulary, device) for way in [Ours, *peers]}
    with tempfile.TemporaryDirectory() as folder:
        for way in ways.values():
            way.prepare_to_write()
        ctranslate2 = CTranslate2(ways[Ours.name], Path(folder), torch.get_num_threads(), device)
        ways[ctranslate2.name] = ctranslate2
        given = {way: few(sources) if way == Tutorial.name else sources for way in ways}

        def work(way: str):
            return lambda: [ways[way].write(source, source.size(1), beam) for source in given[way]]

        seconds = in_turn({way: work(way) for way in ways}, arguments.rounds, device)
    speed = {way: sum(source.numel() for source in given[way]) / median(seconds[way]) for way in ways}
    rows = []
    for way, tokens in speed.items():
        precision = getattr(ways[way], "writes_in", "fp32")
        rows.append([way, precision, f"{tokens:,.0f}", f"{speed[Ours.name] / tokens:.2f}"])
    return table(rows, ["", "precision", "target tokens/s", "this project is × as fast"])


def few(sources: list[torch.Tensor]) -> list[torch.Tensor]:
    """Sentences from batches all over, one at a time."""
    return [sources[i][:1] for i in torch.linspace(0, len(sources) - 1, TUTORIAL_SENTENCES).long().tolist()]


if __name__ == "__main__":
    main()
