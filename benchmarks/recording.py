"""Overhead of attention recording in training while it is off.

    python benchmarks/recording.py

Times training steps of the toy model with the attention of model.py and with a version without that code. Both
alternate in one process. Prints medians, quartiles and the ratio of the medians.
"""

import argparse
import functools
import statistics
import sys
import tempfile
from itertools import islice
from pathlib import Path

import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from workload import time_interleaved

from compute.device import get_device
from config import get_config
from dataset import Batches, get_ds, make_loader
from model import MultiHeadAttentionBlock
from train import train_step
from training.batches import StepBatches
from training.losses import TrainingLoss
from training.state import TrainingState

ROUNDS, STEPS = 14, 10


def attend_without_recording(self, query, key, value, mask):
    p = self.dropout.p if self.training else 0.0
    return F.scaled_dot_product_attention(query, key, value, mask, dropout_p=p)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = get_config("toy", run_dir=folder)
        train, _, *tokenizers = get_ds(config)
        vocab_sizes = [tokenizer.get_vocab_size() for tokenizer in tokenizers]
        state = TrainingState.create(config, *vocab_sizes, get_device(config.device))
        loss_module = TrainingLoss(state.model.train(), config.label_smoothing)
        batches = list(make_loader(train, islice(Batches(train, config, 0), STEPS)))

        def train_with(attend) -> None:
            MultiHeadAttentionBlock.attend = attend
            for batch in batches:
                train_step(state, loss_module, StepBatches([batch], 0, 1), config.lr, config)

        variants = {"with recording code": MultiHeadAttentionBlock.attend, "without": attend_without_recording}
        tasks = {name: functools.partial(train_with, attend) for name, attend in variants.items()}
        seconds = time_interleaved(tasks, ROUNDS, state.device)
    medians = {}
    for name, values in seconds.items():
        first, medians[name], third = (1e3 * value / STEPS for value in statistics.quantiles(values, n=4))
        print(f"{name:>19}  median {medians[name]:.1f} ms per step, quartiles {first:.1f} to {third:.1f}")
    print(f"{'ratio':>19}  {medians['with recording code'] / medians['without']:.3f}")


if __name__ == "__main__":
    main()
