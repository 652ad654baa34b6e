"""Train on a corpus that is streamed from shards (--stream): memory, time to the first batch, exactness of resuming.

    python benchmarks/streaming.py --pairs 10000000 --shards 100

Writes synthetic pairs to .jsonl.gz shards in --folder, which are deleted at the end, and trains a small model on them
twice. The first run is not disturbed. The second one is killed with SIGKILL between two checkpoints within the epoch
and started again. Its batches and its weights must be those of the first run.
"""

import argparse
import gzip
import hashlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from corpus_size import synthetic_clauses
from workload import describe_machine, markdown_table

STEPS, SAVE_EVERY, KILL_AT = 260, 50, 240  # the second buffer of 50,000 pairs begins in about step 190
SETTINGS = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_heads": 2,
    "d_ff": 32,
    "vocab_size": 4_000,
    "seq_len": 100,
    "validation_sentences": 0,
    "device": "cpu",
}


HEADER = ["pairs", "shards", "workers", "run", "first batch (s)", "its processor time (s)", "peak memory (GB)"]


def write_shards(folder: Path, pairs: int, shards: int) -> None:
    """Pairs of two clauses each, as JSON lines."""
    sources, targets = ([clause.encode() for clause in side] for side in synthetic_clauses())
    rng, size = np.random.default_rng(1), pairs // shards
    for shard in [*range(shards), "validation"]:
        lines = (
            b'{"en": "%b, %b.", "it": "%b, %b."}\n' % (sources[a], sources[b], targets[a], targets[b])
            for a, b in rng.integers(0, len(sources), (1_000 if shard == "validation" else size, 2)).tolist()
        )
        name = "validation" if shard == "validation" else f"part-{shard:05}"
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(b"".join(lines), compresslevel=1))


def train_recorded(folder: Path, run: str, workers: int, kill_at: int, figures: dict) -> None:
    """Trains in a new process. Records a hash of the batches of each step in a file; dies after step `kill_at`."""
    start = time.perf_counter()
    import train
    from config import get_config

    train_step = train.train_step

    def recorded_step(state, loss_module, step, *others):
        if "first batch" not in figures:
            figures.update({"first batch": time.perf_counter() - start, "processor": time.process_time()})
            print(f"first batch after {figures['first batch']:.0f} s, processor time {figures['processor']:.0f} s")
        texts = repr([(batch["src_text"], batch["label"].tolist()) for batch in step.batches])
        with open(folder / f"{run}.txt", "a", encoding="utf8") as file:
            file.write(f"{state.progress.step} {hashlib.sha256(texts.encode()).hexdigest()}\n")
        if state.progress.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(state, loss_module, step, *others)

    train.train_step = recorded_step
    sources = {"datasource": f"{folder}/part-*", "validation_source": f"{folder}/validation.jsonl.gz"}
    options = {"max_steps": STEPS, "save_every_steps": SAVE_EVERY, "num_workers": workers, **SETTINGS}
    train.train_model(get_config(stream=True, run_dir=str(folder / run), **sources, **options))
    figures["peak memory"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def launch(folder: Path, run: str, workers: int, kill_at: int = -1) -> dict:
    """Trains a run in a new process, and returns its figures. Exits if it fails, unless it was to be killed."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        figures = manager.dict()
        process = context.Process(target=train_recorded, args=(folder, run, workers, kill_at, figures))
        process.start()
        process.join()
        if process.exitcode != (0 if kill_at < 0 else -signal.SIGKILL):
            sys.exit(f"training ended with exit status {process.exitcode}; see the error above")
        return dict(figures)


def batches_of(folder: Path, run: str) -> dict[int, str]:
    """The hash of the batches of each step; of a step that was repeated, the last one."""
    lines = (folder / f"{run}.txt").read_text(encoding="utf8").splitlines()
    return {int(step): digest for step, digest in map(str.split, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000, help="size of the corpus (default: %(default)s)")
    parser.add_argument("--shards", type=int, default=100, help="number of shards (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="data loader workers (default: %(default)s)")
    parser.add_argument("--folder", default="/tmp/streaming", help="new folder for the files (default: %(default)s)")
    arguments = parser.parse_args()
    folder = Path(arguments.folder)
    folder.mkdir(parents=True)
    try:
        start = time.perf_counter()
        write_shards(folder, arguments.pairs, arguments.shards)
        size = sum(path.stat().st_size for path in folder.glob("part-*"))
        print(f"wrote {size / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s")
        undisturbed = launch(folder, "undisturbed", arguments.workers)
        killed = launch(folder, "killed", arguments.workers, KILL_AT)
        resumed = launch(folder, "killed", arguments.workers)
        import torch

        from runs.checkpoint import load_checkpoint
        from runs.folder import RunFolder

        weights = [
            load_checkpoint(RunFolder(folder / run).checkpoints()[-1])["model"] for run in ("undisturbed", "killed")
        ]
        same_weights = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        same_batches = batches_of(folder, "undisturbed") == batches_of(folder, "killed")
        print(describe_machine(torch.device("cpu")))
        rows = []
        for name, figures in (("undisturbed", undisturbed), ("killed", killed), ("resumed", resumed)):
            memory = f"{figures['peak memory'] / 1e9:.2f}" if "peak memory" in figures else ""
            cells = arguments.pairs, arguments.shards, arguments.workers
            rows.append([*(f"{cell:,}" for cell in cells), name, f"{figures['first batch']:.0f}"])
            rows[-1] += [f"{figures['processor']:.0f}", memory]
        print(markdown_table(rows, HEADER))
        last_save = KILL_AT // SAVE_EVERY * SAVE_EVERY
        print(f"killed in step {KILL_AT}, resumed from step {last_save}, {STEPS} steps:")
        print(f"batches equal: {same_batches}, weights bit-identical: {same_weights}")
        sys.exit(not (same_batches and same_weights))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
