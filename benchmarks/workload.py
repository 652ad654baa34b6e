"""What the benchmarks share: batches of real or made-up text, the machine in words, timing in turn."""

import statistics
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
from config import get_config
from dataset import EOS, PAD, SOS, SPECIAL_TOKENS, Batches, batch_of, get_ds


class MadeUp:
    """Pairs of random ids with lengths like those of text, which `Batches` takes for a dataset."""

    def __init__(self, pairs: int, vocabulary: int, mean_length: float, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.src_lengths = np.clip(rng.lognormal(np.log(mean_length) - 0.125, 0.5, pairs), 3, 200).astype(np.int32)
        ratio = rng.normal(1, 0.1, pairs)
        self.tgt_lengths = np.clip(self.src_lengths * ratio, 3, 200).astype(np.int32) + 1
        self.vocabulary, self.rng = vocabulary, rng

    def __len__(self) -> int:
        return len(self.src_lengths)

    def lengths(self, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        return self.src_lengths[start:stop], self.tgt_lengths[start:stop]

    def __getitem__(self, positions: list[int]) -> dict:
        encoder_input, target = (self.ids(lengths[positions]) for lengths in (self.src_lengths, self.tgt_lengths))
        return batch_of(encoder_input, target) | {"src_text": ["made up"] * len(positions)}

    def ids(self, lengths: np.ndarray) -> Tensor:
        """(B, longest), [SOS] words [EOS] and padding."""
        ids = self.rng.integers(len(SPECIAL_TOKENS), self.vocabulary, (len(lengths), lengths.max()))
        places = np.arange(lengths.max())
        ids[:, 0] = SOS
        ids[places == lengths[:, None] - 1] = EOS
        ids[places >= lengths[:, None]] = PAD
        return torch.from_numpy(ids)


def training_batches(data: str, vocabulary: int, batch_tokens: int, count: int, mean_length: float = 27) -> list[dict]:
    """`count` shuffled batches of up to batch_tokens tokens; `data` is a prefix of aligned .en and .de, or empty."""
    config = {"vocab_size": vocabulary, "batch_tokens": batch_tokens, "lang_src": "en", "lang_tgt": "de"}
    if not data:
        config = get_config("opus_books", **config)
        pairs = MadeUp(100_000, vocabulary, mean_length)
        return [pairs[positions] for positions in islice(Batches(pairs, config, epoch=0), count)]
    with tempfile.TemporaryDirectory() as folder:
        config = get_config("opus_books", **config, datasource=data, run_dir=folder)
        train, *_ = get_ds(config)
        return [train[positions] for positions in islice(Batches(train, config, epoch=0), count)]


def sentences_to_write(
    data: str, test: str, vocabulary: int, batch_tokens: int, count: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """`count` sentences, longest first, in batches: source ids (B, S) and tokens that the translation shall have (B,).

    These are the sources and the lengths of the references of `test`; `data` is what the vocabulary is
    learnt from. Both are prefixes of aligned .en and .de, or empty, and then all is made up.
    """
    if data:
        config = {"vocab_size": vocabulary, "lang_src": "en", "lang_tgt": "de"}
        with tempfile.TemporaryDirectory() as folder:
            config = get_config("opus_books", **config, datasource=data, validation_source=test, run_dir=folder)
            _, pairs, *_ = get_ds(config)
    else:
        pairs = MadeUp(count, vocabulary, 27)
    lengths, tgt_lengths = pairs.lengths()
    order = np.argsort(-lengths, kind="stable")[:count].tolist()
    batches = []
    while order:
        size = max(1, batch_tokens // int(lengths[order[0]]))
        chosen, order = order[:size], order[size:]
        steps = torch.from_numpy(tgt_lengths[chosen] - 1).long()
        batches.append((pairs[chosen]["encoder_input"].to(device), steps.to(device)))
    return batches


def in_turn(
    ways: dict[str, Callable[[], None]], rounds: int, device: torch.device, keep_first: bool = False
) -> dict[str, list[float]]:
    """Seconds that each way took in each round, one after the other within a round; one more goes before them."""
    seconds = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, work in ways.items():
            wait(device)
            begun = time.perf_counter()
            work()
            wait(device)
            seconds[name].append(time.perf_counter() - begun)
    return seconds if keep_first else {name: found[1:] for name, found in seconds.items()}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_peak(device: torch.device, dtype: torch.dtype, size: int = 0, rounds: int = 7) -> float:
    """FLOP a second of the product of two large matrices: the best that this machine does now."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = in_turn({"": lambda: a @ b}, rounds, device)[""]
    return 2 * size**3 / min(seconds)


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0]}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def median(values: list[float]) -> float:
    return statistics.median(values)


def table(rows: list[list], header: list[str]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)
