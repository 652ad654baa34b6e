"""Measure training speed and memory of this project and its peers on the same batches and model sizes.

    python benchmarks/training_speed.py --data FOLDER/train.lc.norm.tok   # aligned text, .en and .de
    python benchmarks/training_speed.py                                   # synthetic text, lengths as in news
    python benchmarks/training_speed.py --sizes base --vocabulary 30000 --batch-tokens 25000   # on a GPU
    python benchmarks/training_speed.py --tutorial CHECKOUT               # with the tutorial's own repository

Prints a table for each model size and precision: target tokens per second (median over the rounds, padding not
counted), the speedup of this project, peak memory, and model FLOPs utilization (MFU): the FLOP/s of the matrix
multiplications with weights, as a fraction of the peak measured in the same run. In bf16 the libraries run under
autocast; the tutorial knows fp32 only. Peers that are not installed are skipped.
"""

import argparse
import functools
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers import (
    SIZES,
    TUTORIAL_BATCH,
    JoeyNMT,
    Marian,
    ModelSize,
    PyTorch,
    ThisProject,
    Tutorial,
    TutorialRepository,
    count_tokens,
)
from workload import (
    PRECISIONS,
    describe_machine,
    describe_peaks,
    markdown_table,
    matrix_peaks,
    synchronize,
    time_interleaved,
    timing_parser,
    training_batches,
)

from config import run_command
from dataset import batch_of

LIBRARIES = [PyTorch, Marian, JoeyNMT]
Factory = Callable[[ModelSize, int, torch.device], object]


def main(argv: list[str]) -> None:
    parser = timing_parser(__doc__, rounds=5)
    parser.add_argument("--data", default="", help="prefix of two aligned files; empty: synthetic text")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["tiny", "base"], help="model sizes")
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--vocabulary", type=int, default=10_000, help="vocabulary size (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=4_096, help="tokens per batch (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=4, help="batches per round (default: %(default)s)")
    parser.add_argument("--tutorial", default="", help="folder with a checkout of the tutorial's repository")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    batches = training_batches(arguments.data, arguments.vocabulary, arguments.batch_tokens, arguments.batches)
    peaks = matrix_peaks(device)
    print(f"{describe_machine(device)}; {describe_peaks(peaks)}")
    print(f"batches: {len(batches)} of up to {arguments.batch_tokens:,} tokens; vocabulary: {arguments.vocabulary:,}")
    for size in arguments.sizes:
        for precision in arguments.precisions:
            print(f"\n{size}, {precision}: {SIZES[size]}\n")
            factories = implementations(precision, arguments.tutorial)
            print(compare(factories, SIZES[size], batches, arguments, device, peaks[precision]), flush=True)


def implementations(precision: str, tutorial: str) -> dict[str, Factory]:
    """All installed implementations that train in this precision, by name, this project first."""
    found = {ThisProject.name: functools.partial(ThisProject, precision=precision)}
    if precision == "fp32":
        found[Tutorial.name] = Tutorial
        if tutorial:
            found[TutorialRepository.name] = functools.partial(TutorialRepository, path=tutorial)
    found |= {peer.name: functools.partial(peer, precision=precision) for peer in LIBRARIES if is_installed(peer)}
    return found


def compare(
    factories: dict[str, Factory],
    size: ModelSize,
    batches: list[dict],
    arguments: argparse.Namespace,
    device: torch.device,
    peak: float,
) -> str:
    """The table of these implementations."""
    vocab_size = arguments.vocabulary
    models = {name: make(size, vocab_size, device) for name, make in factories.items()}
    inputs = {
        name: [tutorial_batch(batches[0])] if isinstance(model, Tutorial) else batches for name, model in models.items()
    }
    tasks = {name: functools.partial(train, model, inputs[name]) for name, model in models.items()}
    timed = time_interleaved(tasks, arguments.rounds, device)
    seconds = {name: statistics.median(values) for name, values in timed.items()}
    tokens = {name: count_tokens(given) for name, given in inputs.items()}
    speeds = {name: target / seconds[name] for name, (_, target) in tokens.items()}
    rows = []
    for name, make in factories.items():
        memory = peak_memory(make, size, vocab_size, inputs[name][:2], device)
        utilization = size.flops(*tokens[name], vocab_size) / seconds[name] / peak
        speedup = speeds[ThisProject.name] / speeds[name]
        rows.append([name, f"{speeds[name]:,.0f}", f"{speedup:.2f}", f"{memory / 1e9:.2f}", f"{utilization:.0%}"])
    return markdown_table(rows, ["", "target tokens/s", "speedup of this project", "peak memory (GB)", "MFU"])


def train(implementation, batches: list[dict]) -> None:
    for batch in batches:
        implementation.step(batch)


def is_installed(peer: type) -> bool:
    """Whether a small model of this peer can be built; if not, prints the reason."""
    try:
        peer(SIZES["tiny"], 100, torch.device("cpu"))
    except ImportError as error:
        print(f"{peer.name} is skipped: {error}", file=sys.stderr)
        return False
    return True


def tutorial_batch(batch: dict) -> dict:
    """The first sentences of a batch, as many as the tutorial trains on at a time."""
    return {name: column[:TUTORIAL_BATCH] for name, column in batch.items()}


# ---------------------------------------------------------------------------- peak memory


def peak_memory(
    implementation: Factory, size: ModelSize, vocab_size: int, batches: list[dict], device: torch.device
) -> float:
    """Peak memory of model, optimizer and training steps in bytes: allocated on a GPU, or resident in a new process."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train(implementation(size, vocab_size, device), batches)
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(resident_memory_growth, (implementation, size, vocab_size, batches))


def resident_memory_growth(implementation: Factory, size: ModelSize, vocab_size: int, batches: list[dict]) -> int:
    cpu = torch.device("cpu")
    train(implementation(SIZES["tiny"], 100, cpu), [tiny_batch(batches[0])])  # loads the libraries
    Path("/proc/self/clear_refs").write_text("5", encoding="utf8")  # resets the peak
    before = peak_resident_memory()
    train(implementation(size, vocab_size, cpu), batches)
    return peak_resident_memory() - before


def peak_resident_memory() -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text(encoding="utf8").splitlines() if line.startswith("VmHWM")
    )
    return 1024 * int(line.split()[1])


def tiny_batch(batch: dict) -> dict:
    """Two sentences with ids below 100."""
    source, sos, label = (batch["encoder_input"][:2], batch["decoder_input"][:2, :1], batch["label"][:2])
    small = batch_of(source.clamp(max=99), torch.cat([sos, label.clamp(max=99)], 1))
    return small | {"src_text": batch["src_text"][:2]}


if __name__ == "__main__":
    run_command(main)
