"""Steps, peak of the learning rate, and estimates of memory and time for each preset.

    python benchmarks/presets.py

Prints the table of docs/training.md.
"""

from typing import NamedTuple

import torch
from workload import markdown_table

from config import PRESETS, Config, get_config
from model import Transformer, get_model
from train import peak_learning_rate, planned_steps
from training.estimate import estimated_memory, estimated_seconds
from training.log import duration

GPUS = {"T4": "fp16", "A100": "bf16"}  # the precision that each trains in


class Corpus(NamedTuple):
    pairs: int  # training pairs, after the split
    batches: int  # batches per epoch
    mean_length: float  # tokens per sentence, with [SOS] and [EOS]
    vocabulary: tuple[int, int]  # source and target tokens


# toy and multi30k (lowercased and tokenized text) were counted. The lengths of the others are estimates.
CORPORA = {
    "opus_books": Corpus(29_099, 120, 33, (16_000, 16_000)),
    "tutorial": Corpus(29_099, 3_638, 28, (30_000, 30_000)),
    "toy": Corpus(24_000, 215, 9, (254, 593)),
    "multi30k": Corpus(29_000, 255, 17, (10_000, 10_000)),
    "wmt14": Corpus(4_500_000, 5_400, 30, (32_000, 32_000)),
}


def meta_model(config: Config, vocabulary: tuple[int, int]) -> Transformer:
    """The model of a config without memory for its weights."""
    with torch.device("meta"):
        return get_model(config, *vocabulary)


def row(preset: str) -> list[str]:
    config, corpus = get_config(preset), CORPORA[preset]
    steps, model = planned_steps(config, corpus.batches), meta_model(config, corpus.vocabulary)
    step, peak = peak_learning_rate(config, steps)
    memory = estimated_memory(config, model, "cuda", "bf16")
    seconds = [estimated_seconds(config, model, steps, corpus.mean_length, *gpu) for gpu in GPUS.items()]
    cells = f"{steps:,}", f"{peak:.1e}", f"{step:,}", f"{memory / 1e9:.2g} GB", *map(duration, seconds)
    return [f"`{preset}`", f"{corpus.pairs:,}", *cells]


def table() -> str:
    header = ["preset", "training pairs", "steps", "peak rate", "in step", "GPU memory", *GPUS]
    return markdown_table([row(preset) for preset in PRESETS], header)


if __name__ == "__main__":
    print(table())
