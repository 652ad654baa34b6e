"""Measure training speed and memory of this project and its peers on the same batches and model sizes.

    python benchmarks/training_speed.py --data FOLDER/train.lc.norm.tok   # aligned text, .en and .de
    python benchmarks/training_speed.py                                   # synthetic text, lengths as in news
    python benchmarks/training_speed.py --sizes base --vocabulary 30000 --batch-tokens 25000   # on a GPU

Prints a table for each model size: target tokens per second (median over the rounds, padding not counted), the
speedup of this project, peak memory, and model FLOPs utilization (MFU): the FLOP/s of the matrix multiplications with
weights, as a fraction of the peak measured in the same run. Peers that are not installed are skipped.
"""

import multiprocessing
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers import (
    INPUTS,
    SIZES,
    TUTORIAL_BATCH,
    JoeyNMT,
    Marian,
    ModelSize,
    PyTorch,
    ThisProject,
    Tutorial,
    count_tokens,
)
from workload import (
    describe_machine,
    describe_peaks,
    markdown_table,
    matrix_peaks,
    synchronize,
    time_interleaved,
    timing_parser,
    training_batches,
)

PEERS = [Tutorial, PyTorch, Marian, JoeyNMT]


def main() -> None:
    parser = timing_parser(__doc__, rounds=5)
    parser.add_argument("--data", default="", help="prefix of two aligned files; empty: synthetic text")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["tiny", "base"], help="model sizes")
    parser.add_argument("--vocabulary", type=int, default=10_000, help="vocabulary size (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=4_096, help="tokens per batch (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=4, help="batches per round (default: %(default)s)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    batches = training_batches(arguments.data, arguments.vocabulary, arguments.batch_tokens, arguments.batches)
    peaks = matrix_peaks(device)
    print(f"{describe_machine(device)}; {describe_peaks(peaks)}")
    print(f"batches: {len(batches)} of up to {arguments.batch_tokens:,} tokens; vocabulary: {arguments.vocabulary:,}")
    for name in arguments.sizes:
        print(f"\n{name}: {SIZES[name]}\n")
        print(compare(SIZES[name], batches, arguments.vocabulary, arguments.rounds, device, peaks))


def compare(
    size: ModelSize, batches: list[dict], vocab_size: int, rounds: int, device: torch.device, peaks: dict[str, float]
) -> str:
    """The table of all installed implementations."""
    implementations = [peer(size, vocab_size, device) for peer in [ThisProject, *PEERS] if is_installed(peer)]
    inputs = {
        each.name: [tutorial_batch(batches[0])] if type(each) is Tutorial else batches for each in implementations
    }
    tasks = {each.name: lambda each=each: train(each, inputs[each.name]) for each in implementations}
    seconds = {name: statistics.median(values) for name, values in time_interleaved(tasks, rounds, device).items()}
    tokens = {name: count_tokens(given) for name, given in inputs.items()}
    speeds = {name: target / seconds[name] for name, (_, target) in tokens.items()}
    rows = []
    for each in implementations:
        name, precision = each.name, each.training_precision
        memory = peak_memory(type(each), size, vocab_size, inputs[name][:2], device)
        utilization = size.flops(*tokens[name], vocab_size) / seconds[name] / peaks[precision]
        speedup = speeds[ThisProject.name] / speeds[name]
        row = [name, precision, f"{speeds[name]:,.0f}", f"{speedup:.2f}", f"{memory / 1e9:.2f}", f"{utilization:.0%}"]
        rows.append(row)
    header = ["", "precision", "target tokens/s", "speedup of this project", "peak memory (GB)", "MFU"]
    return markdown_table(rows, header)


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
    implementation: type, size: ModelSize, vocab_size: int, batches: list[dict], device: torch.device
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


def resident_memory_growth(implementation: type, size: ModelSize, vocab_size: int, batches: list[dict]) -> int:
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
    return {name: c[:2].clamp(max=99) if name in INPUTS else c[:2] for name, c in batch.items()}


if __name__ == "__main__":
    main()
