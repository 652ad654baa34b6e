"""Time and memory that it takes to prepare a corpus, by its size.

    python benchmarks/corpus_size.py --pairs 100000 1000000 10000000

For each size a .tsv of made-up sentences is written, and a process of its own reads it, splits it, trains a
tokenizer, encodes it with as many processes as there are cores, cuts it into batches and draws the first
one: what happens before the first step of `train.py`. Memory is the resident memory of all processes
together, at most: what is theirs alone (a machine must have that much), and with the pages of mapped
files (which it drops when it needs the room). Ten million pairs take 8 GB of disk in --folder.
"""

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from workload import machine, table

CLAUSES, WORDS = 100_000, 50_000


def write_corpus(path: Path, pairs: int) -> None:
    """Sentences of two clauses, each of 2 to 12 words that are frequent as in text (Zipf), with their translations."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(WORDS)]
    frequency = 1 / np.arange(10, WORDS + 10)
    lengths = rng.integers(2, 13, CLAUSES)
    drawn = iter(rng.choice(WORDS, lengths.sum(), p=frequency / frequency.sum()).tolist())
    clauses = [[words[next(drawn)] for _ in range(n)] for n in lengths]
    sides = [[" ".join(c) for c in clauses], [" ".join(word[::-1] for word in c) for c in clauses]]
    with path.open("w") as file:
        for start in range(0, pairs, 100_000):
            chosen = rng.integers(0, CLAUSES, (min(100_000, pairs - start), 2)).tolist()
            file.writelines(f"{sides[0][a]}, {sides[0][b]}.\t{sides[1][a]}, {sides[1][b]}.\n" for a, b in chosen)


def prepare(path: Path, times) -> None:
    from config import get_config
    from dataset import Batches, get_ds

    begun = time.perf_counter()
    config = get_config("opus_books", datasource=str(path), run_dir=str(path.parent / "run"))
    train, *_ = get_ds(config)
    times["corpus, tokenizer, ids"] = time.perf_counter() - begun
    begun = time.perf_counter()
    batches = Batches(train, config, epoch=0)
    train[next(iter(batches))]
    times["batches"] = time.perf_counter() - begun
    print(f"{len(train):,} pairs, {len(batches):,} batches", file=sys.stderr)


def resident(root: int) -> tuple[int, int]:
    """Bytes of a process and its descendants: their own, and with mapped files."""
    own = whole = 0
    family, waiting = [], [root]
    while waiting:
        family.append(waiting.pop())
        tasks = Path(f"/proc/{family[-1]}/task/{family[-1]}/children")
        waiting += [int(child) for child in tasks.read_text().split()] if tasks.exists() else []
    for process in family:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines[1:]}
        own, whole = own + sizes["Pss_Anon"], whole + sizes["Pss"]
    return own, whole


def measure(pairs: int, folder: Path) -> list[str]:
    folder = folder / str(pairs)
    folder.mkdir(parents=True)
    write_corpus(folder / "corpus.tsv", pairs)
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")  # for the process, which begins afresh
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        times = manager.dict()
        process = context.Process(target=prepare, args=(folder / "corpus.tsv", times))
        begun = time.perf_counter()
        process.start()
        own = whole = 0
        while process.is_alive():
            own, whole = map(max, (own, whole), resident(process.pid))
            time.sleep(0.2)
        total = time.perf_counter() - begun
        process.join()
        if process.exitcode:
            sys.exit("the preparation failed; its words are above")
        cells = [times["corpus, tokenizer, ids"], times["batches"], total]
    return [f"{pairs:,}", *(f"{seconds:,.0f}" for seconds in cells), f"{own / 1e9:.2f}", f"{whole / 1e9:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--folder", default="/tmp/corpus_size", help="where to write; new")
    arguments = parser.parse_args()
    rows = [measure(pairs, Path(arguments.folder)) for pairs in arguments.pairs]
    import torch

    print(machine(torch.device("cpu")))
    header = ["pairs", "corpus, tokenizer, ids (s)", "batches (s)", "in all (s)", "own GB", "with mapped files, GB"]
    print(table(rows, header))


if __name__ == "__main__":
    main()
