"""What the recording seam costs a training step while it is off.

    python benchmarks/recording.py

Times training steps of the toy model with the attention as it is, and with a version from which
recording and intervening are cut out, in turn in one process; prints medians and their ratio.
"""

import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import get_config
from dataset import Batches, make_loader
from model import MultiHeadAttentionBlock
from train import train_step
from training.state import start

ROUNDS, STEPS = 15, 10


def attend_without_seams(self, query, key, value, mask):
    p = self.dropout.p if self.training else 0.0
    return F.scaled_dot_product_attention(query, key, value, mask, dropout_p=p)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = start(get_config("toy", run_dir=folder))
        run.model.train()
        batches = list(make_loader(run.train, islice(Batches(run.train, run.config, 0), STEPS)))
        ways = {"with the seams": MultiHeadAttentionBlock.attend, "without": attend_without_seams}
        times = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, attend in ways.items():
                MultiHeadAttentionBlock.attend = attend
                begun = time.perf_counter()
                for batch in batches:
                    train_step(run, [batch])
                times[name].append((time.perf_counter() - begun) / STEPS)
        run.writer.close()
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    for name, median in medians.items():
        spread = statistics.quantiles(times[name][1:], n=4)
        print(f"{name:>15}  {1e3 * median:.1f} ms a step, quartiles {1e3 * spread[0]:.1f} to {1e3 * spread[2]:.1f}")
    print(f"{'ratio':>15}  {medians['with the seams'] / medians['without']:.3f}")


if __name__ == "__main__":
    main()
