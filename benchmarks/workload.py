"""Shared code of the benchmarks: batches of real or synthetic text, timing, command lines, tables.

B  batch    S  source length
"""

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import Config, get_config
from dataset import EOS, PAD, SOS, SPECIAL_TOKENS, Batches, BilingualDataset, batch_of, get_ds

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
MEAN_LENGTH = 27  # mean number of tokens in a synthetic sentence


# ---------------------------------------------------------------------------- batches


class SyntheticPairs:
    """Pairs of random token ids, with lengths distributed as in real text. `Batches` accepts it as a dataset."""

    growth = 1.0  # without BPE-dropout

    def __init__(self, count: int, vocab_size: int, mean_length: float = MEAN_LENGTH, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.src_lengths = np.clip(rng.lognormal(np.log(mean_length) - 0.125, 0.5, count), 3, 200).astype(np.int32)
        ratio = rng.normal(1, 0.1, count)
        self.tgt_lengths = np.clip(self.src_lengths * ratio, 3, 200).astype(np.int32) + 1
        self.vocab_size, self.rng = vocab_size, rng

    def __len__(self) -> int:
        return len(self.src_lengths)

    def lengths(self, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        return self.src_lengths[start:stop], self.tgt_lengths[start:stop]

    def __getitem__(self, positions: list[int]) -> dict:
        encoder_input, target = (self.ids(lengths[positions]) for lengths in (self.src_lengths, self.tgt_lengths))
        return batch_of(encoder_input, target) | {"src_text": ["synthetic"] * len(positions)}

    def ids(self, lengths: np.ndarray) -> Tensor:
        """Random sentences of these lengths, (B, longest): [SOS], random tokens, [EOS], padding."""
        ids = self.rng.integers(len(SPECIAL_TOKENS), self.vocab_size, (len(lengths), lengths.max()))
        positions = np.arange(lengths.max())
        ids[:, 0] = SOS
        ids[positions == lengths[:, None] - 1] = EOS
        ids[positions >= lengths[:, None]] = PAD
        return torch.from_numpy(ids)


def load_datasets(**settings) -> tuple[Config, BilingualDataset, BilingualDataset]:
    """Config, training set and validation set for English-German text files."""
    with tempfile.TemporaryDirectory() as folder:
        config = get_config("opus_books", **settings, lang_src="en", lang_tgt="de", run_dir=folder)
        train, validation, *_ = get_ds(config)
    return config, train, validation


def training_batches(data: str, vocab_size: int, batch_tokens: int, count: int) -> list[dict]:
    """`count` shuffled batches of up to `batch_tokens` tokens.

    `data` is the prefix of two aligned files, .en and .de; if it is empty, the sentences are synthetic.
    """
    settings = {"vocab_size": vocab_size, "batch_tokens": batch_tokens}
    if data:
        config, pairs, _ = load_datasets(**settings, datasource=data)
    else:
        config, pairs = get_config("opus_books", **settings), SyntheticPairs(100_000, vocab_size)
    return [pairs[positions] for positions in islice(Batches(pairs, config, epoch=0), count)]


def decoding_batches(
    data: str, test: str, vocab_size: int, batch_tokens: int, count: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """The `count` longest sentences in batches: source ids (B, S) and the length of each reference (B,), without [EOS].

    `test` holds the sentences and references, `data` the text from which the vocabulary is built. Both are prefixes
    of two aligned files, .en and .de; if `data` is empty, the sentences are synthetic.
    """
    if data:
        _, _, pairs = load_datasets(vocab_size=vocab_size, datasource=data, validation_source=test)
    else:
        pairs = SyntheticPairs(count, vocab_size)
    lengths, tgt_lengths = pairs.lengths()
    order = np.argsort(-lengths, kind="stable")[:count].tolist()
    batches = []
    while order:
        size = max(1, batch_tokens // int(lengths[order[0]]))
        positions, order = order[:size], order[size:]
        references = torch.from_numpy(tgt_lengths[positions] - 1).long()
        batches.append((pairs[positions]["encoder_input"].to(device), references.to(device)))
    return batches


# ---------------------------------------------------------------------------- timing


def time_interleaved(
    tasks: dict[str, Callable[[], object]], rounds: int, device: torch.device, keep_warmup: bool = False
) -> dict[str, list[float]]:
    """The time in seconds of each task in each round, after one warm-up round.

    Each round runs every task once, so that changes in the speed of a shared machine affect all tasks alike. With
    `keep_warmup` the first value is that of the warm-up round.
    """
    seconds = {name: [] for name in tasks}
    for _ in range(rounds + 1):
        for name, task in tasks.items():
            synchronize(device)
            start = time.perf_counter()
            task()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds if keep_warmup else {name: values[1:] for name, values in seconds.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_peaks(device: torch.device) -> dict[str, float]:
    """Measured peak FLOP/s of the multiplication of two square matrices, for each precision."""
    return {name: matrix_peak(device, dtype) for name, dtype in PRECISIONS.items()}


def matrix_peak(device: torch.device, dtype: torch.dtype, rounds: int = 7) -> float:
    """The highest FLOP/s over a range of sizes, which ends early where products are slow (bf16 on older processors)."""
    peak = 0.0
    for size in (512, 2048, 8192) if device.type == "cuda" else (512, 1024, 2048):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = min(time_interleaved({"product": functools.partial(torch.mm, a, b)}, rounds, device)["product"])
        peak = max(peak, 2 * size**3 / seconds)
        if seconds > 0.25:
            break
    return peak


# ---------------------------------------------------------------------------- command lines and output


def timing_parser(description: str, rounds: int = 3) -> argparse.ArgumentParser:
    """A parser with --rounds and --device."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="rounds after the warm-up round (default: %(default)s)"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cuda or cpu (default: CUDA if available)")
    return parser


def describe_machine(device: torch.device) -> str:
    """The GPU, or the processor with its number of threads and instruction set, and the version of PyTorch."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if "model name" in line)
        name = f"{processor}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return f"{name}, PyTorch {torch.__version__}"


def describe_peaks(peaks: dict[str, float]) -> str:
    values = ", ".join(f"{peak / 1e12:.3g} TFLOP/s in {precision}" for precision, peak in peaks.items())
    return f"peak of matrix multiplications: {values}"


def markdown_table(rows: list[list], header: list[str]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)
