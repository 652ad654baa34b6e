"""Measure time and memory of corpus preparation for different numbers of pairs.

    python benchmarks/corpus_size.py --pairs 100000 1000000 10000000

For each size, writes a .tsv file of synthetic sentences. A new process then does what `train.py` does before its first
step: it reads and splits the corpus, trains a tokenizer, encodes the pairs in several processes, forms batches and
builds the first one. Memory is the peak over time of the sum over all processes, as private memory (required) and with
the pages of memory-mapped files (released when memory is short). Ten million pairs take 8 GB of disk in --folder.
"""

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from workload import describe_machine, markdown_table

CLAUSES, WORDS = 100_000, 50_000


def synthetic_clauses() -> tuple[list[str], list[str]]:
    """Source clauses of 2 to 12 words, drawn from a Zipf distribution; the target reverses each word."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(WORDS)]
    frequency = 1 / np.arange(10, WORDS + 10)
    lengths = rng.integers(2, 13, CLAUSES)
    sampled = iter(rng.choice(WORDS, lengths.sum(), p=frequency / frequency.sum()).tolist())
    clauses = [[words[next(sampled)] for _ in range(n)] for n in lengths]
    return [" ".join(clause) for clause in clauses], [" ".join(word[::-1] for word in clause) for clause in clauses]


def write_corpus(path: Path, pairs: int) -> None:
    """Sentences of two clauses."""
    rng = np.random.default_rng(1)
    sources, targets = synthetic_clauses()
    with path.open("w", encoding="utf8") as file:
        for start in range(0, pairs, 100_000):
            chosen = rng.integers(0, CLAUSES, (min(100_000, pairs - start), 2)).tolist()
            file.writelines(f"{sources[a]}, {sources[b]}.\t{targets[a]}, {targets[b]}.\n" for a, b in chosen)


def prepare(path: Path, seconds: dict[str, float]) -> None:
    """Runs in the new process: prepares the corpus and stores the times in `seconds`."""
    from config import get_config
    from dataset import Batches, get_ds

    start = time.perf_counter()
    config = get_config("opus_books", datasource=str(path), run_dir=str(path.parent / "run"))
    train, *_ = get_ds(config)
    seconds["encoding"] = time.perf_counter() - start
    start = time.perf_counter()
    batches = Batches(train, config, epoch=0)
    train[next(iter(batches))]
    seconds["batches"] = time.perf_counter() - start
    print(f"{len(train):,} pairs, {len(batches):,} batches", file=sys.stderr)


def resident_memory(root: int) -> tuple[int, int]:
    """Memory of a process and its descendants in bytes: private memory, and with memory-mapped files."""
    private = total = 0
    processes, waiting = [], [root]
    while waiting:
        processes.append(waiting.pop())
        children = Path(f"/proc/{processes[-1]}/task/{processes[-1]}/children")
        waiting += [int(child) for child in children.read_text(encoding="utf8").split()] if children.exists() else []
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf8").splitlines()
        except OSError:  # the process has ended
            continue
        sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines[1:]}
        private, total = private + sizes["Pss_Anon"], total + sizes["Pss"]
    return private, total


def measure(pairs: int, folder: Path) -> list[str]:
    """One row of the table."""
    folder = folder / str(pairs)
    folder.mkdir(parents=True)
    write_corpus(folder / "corpus.tsv", pairs)
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")  # inherited by the new process
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        seconds = manager.dict()
        process = context.Process(target=prepare, args=(folder / "corpus.tsv", seconds))
        start = time.perf_counter()
        process.start()
        private = total = 0
        while process.is_alive():
            private, total = map(max, (private, total), resident_memory(process.pid))
            time.sleep(0.2)
        elapsed = time.perf_counter() - start
        process.join()
        if process.exitcode:
            sys.exit(f"preparing {pairs:,} pairs failed with exit status {process.exitcode}; see the error above")
        cells = [seconds["encoding"], seconds["batches"], elapsed]
    return [f"{pairs:,}", *(f"{cell:,.0f}" for cell in cells), f"{private / 1e9:.2f}", f"{total / 1e9:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[100_000, 1_000_000], help="corpus sizes")
    parser.add_argument("--folder", default="/tmp/corpus_size", help="new folder for the files (default: %(default)s)")
    arguments = parser.parse_args()
    rows = [measure(pairs, Path(arguments.folder)) for pairs in arguments.pairs]
    import torch

    print(describe_machine(torch.device("cpu")))
    header = [
        "pairs",
        "corpus, tokenizer, ids (s)",
        "batches (s)",
        "total (s)",
        "private memory (GB)",
        "with mapped files (GB)",
    ]
    print(markdown_table(rows, header))


if __name__ == "__main__":
    main()
