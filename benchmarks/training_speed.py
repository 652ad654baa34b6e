"""Training speed of this project and its peers, in turn, on the same batches and sizes.

    python benchmarks/training.py --data FOLDER/train.lc.norm.tok   # aligned text, .en and .de
    python benchmarks/training.py                                   # made-up ids, lengths like those of news
    python benchmarks/training.py --sizes base --vocabulary 30000 --batch-tokens 25000   # on a GPU

Prints a table for each size: target tokens a second (median over the rounds, padding not counted), how
many times this project's speed that is, peak memory, and the share of the matrix-product peak measured
in the same run that the weights' products take (MFU). A peer that is not installed is left out.
"""

import argparse
import multiprocessing
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers import SIZES, TUTORIAL_BATCH, JoeyNMT, Marian, Ours, PyTorch, Tutorial, tokens_of
from workload import in_turn, machine, matrix_peak, median, table, training_batches, wait

PEERS = [Tutorial, PyTorch, Marian, JoeyNMT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="prefix of two aligned files; empty: made-up ids")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["tiny", "base"])
    parser.add_argument("--vocabulary", type=int, default=10_000)
    parser.add_argument("--batch-tokens", type=int, default=4_096)
    parser.add_argument("--batches", type=int, default=4, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    batches = training_batches(arguments.data, arguments.vocabulary, arguments.batch_tokens, arguments.batches)
    peaks = {dtype: matrix_peak(device, getattr(torch, name)) for dtype, name in DTYPES.items()}
    print(f"{machine(device)}, PyTorch {torch.__version__}; matrix products", end=" ")
    print(", ".join(f"{peak / 1e12:.3g} TFLOP/s in {dtype}" for dtype, peak in peaks.items()))
    print(f"{len(batches)} batches of up to {arguments.batch_tokens:,} tokens, vocabulary of {arguments.vocabulary:,}")
    for name in arguments.sizes:
        print(f"\n{name}: {SIZES[name]}\n")
        print(measure(SIZES[name], batches, arguments.vocabulary, arguments.rounds, device, peaks))


DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def measure(size, batches: list[dict], vocabulary: int, rounds: int, device: torch.device, peaks: dict) -> str:
    ways = {way.name: way(size, vocabulary, device) for way in [Ours, *PEERS] if installed(way)}
    eights = first_eights(batches[0])
    given = {name: [eights] if name == Tutorial.name else batches for name in ways}

    def work(name: str):
        return lambda: [ways[name].step(batch) for batch in given[name]]

    seconds = in_turn({name: work(name) for name in ways}, rounds, device)
    speed = {}
    rows = []
    for name, way in ways.items():
        source, target = map(sum, zip(*map(tokens_of, given[name]), strict=True))
        took = median(seconds[name])
        speed[name] = target / took
        share = size.flops(source, target, vocabulary) / took / peaks[way.detail]
        memory = peak_memory(type(way), size, vocabulary, given[name][:2], device)
        ratio = speed[Ours.name] / speed[name]
        rows.append([name, way.detail, f"{speed[name]:,.0f}", f"{ratio:.2f}", f"{memory / 1e9:.2f}", f"{share:.0%}"])
    return table(rows, ["", "precision", "target tokens/s", "this project is × as fast", "peak GB", "MFU"])


def installed(way: type) -> bool:
    """Whether a small one can be made."""
    try:
        way(SIZES["tiny"], 100, torch.device("cpu"))
    except ImportError as error:
        print(f"{way.name} is left out: {error}", file=sys.stderr)
        return False
    return True


def first_eights(batch: dict) -> dict:
    """The first sentences of a batch, as many as the tutorial takes at once."""
    return {name: column[:TUTORIAL_BATCH] for name, column in batch.items()}


def peak_memory(way: type, size, vocabulary: int, batches: list[dict], device: torch.device) -> float:
    """Bytes at most, of model, optimizer and steps: as the GPU counts them, or in a process of its own."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        there = way(size, vocabulary, device)
        for batch in batches:
            there.step(batch)
        wait(device)
        return torch.cuda.max_memory_allocated() - before
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(resident_growth, (way, size, vocabulary, batches))


def resident_growth(way: type, size, vocabulary: int, batches: list[dict]) -> int:
    way(SIZES["tiny"], 100, torch.device("cpu")).step(tiny_batch(batches[0]))  # the libraries are loaded
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    before = high_water()
    there = way(size, vocabulary, torch.device("cpu"))
    for batch in batches:
        there.step(batch)
    return high_water() - before


def high_water() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def tiny_batch(batch: dict) -> dict:
    names = ("encoder_input", "decoder_input", "label")
    return {name: c[:2].clamp(max=99) if name in names else c[:2] for name, c in batch.items()}


if __name__ == "__main__":
    main()
