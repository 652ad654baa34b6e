"""Check correctness on a GPU, and measure the speed of training (fp32, bf16, torch.compile) and decoding.

    python benchmarks/gpu.py                      # the base model of the paper
    python benchmarks/gpu.py --size tiny --vocabulary 1000 --batch-tokens 2000 --device cpu   # a quick trial

First compares a small model on the CPU and on the device: loss, gradients and translations. Then times training and
greedy decoding of the model given by --size. Needs no data and no other library: the text is synthetic. For a
comparison with other implementations see benchmarks/training_speed.py and benchmarks/decoding_speed.py.
"""

import argparse
import copy
import functools
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from decoding_speed import decode
from peers import SIZES, ModelSize, ThisProject, count_tokens, search_with_limits
from training_speed import peak_memory, train
from workload import (
    PRECISIONS,
    SyntheticPairs,
    decoding_batches,
    describe_machine,
    describe_peaks,
    markdown_table,
    matrix_peaks,
    time_interleaved,
    timing_parser,
    training_batches,
)

from compute.ops import use_low_precision_products
from model import Transformer
from training.losses import LossInputs

SMALL, SMALL_VOCABULARY = ModelSize(d_model=64, layers=2, heads=4, d_ff=128), 100
# Maximum relative difference of the loss, and of the vector of all gradients, that rounding can explain.
TOLERANCES = {"fp32": 1e-3, "bf16": 3e-2}
MIN_IDENTICAL = 0.95  # fraction of translations in fp32; rounding decides between nearly equal probabilities
# The weights are scaled up for comparing translations: 55 of 64 sentences then have distinct translations, not 10.
WEIGHT_SCALE = 3


class Compiled(ThisProject):
    """This project with torch.compile on encoder and decoder, for dynamic shapes."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        for part in (self.model.encoder, self.model.decoder):
            part.compile(dynamic=True)


TRAINING = [("fp32", ThisProject, "fp32"), ("bf16", ThisProject, "bf16"), ("bf16, compiled", Compiled, "bf16")]


# ---------------------------------------------------------------------------- correctness


def check(device: torch.device) -> str:
    """A table of differences between the device and the CPU in fp32.

    Raises AssertionError if rounding cannot explain them.
    """
    torch.manual_seed(0)
    reference = ThisProject(SMALL, SMALL_VOCABULARY, torch.device("cpu"), "fp32")
    reference.model.eval()  # no dropout
    batch = SyntheticPairs(64, SMALL_VOCABULARY, 12)[list(range(64))]
    expected = loss_and_gradients(reference, batch)
    rows = []
    for precision, tolerance in TOLERANCES.items():
        tested = ThisProject(SMALL, SMALL_VOCABULARY, device, precision)
        tested.model.load_state_dict(reference.model.state_dict())
        tested.model.eval()
        found = loss_and_gradients(tested, batch)
        differences = [((a - b).norm() / a.norm()).item() for a, b in zip(expected, found, strict=True)]
        assert max(differences) < tolerance, (precision, differences)
        identical = [share_identical(reference, tested, batch["encoder_input"], beam_size) for beam_size in (1, 5)]
        assert precision != "fp32" or min(identical) >= MIN_IDENTICAL, identical
        rows.append([precision, *(f"{d:.1e}" for d in differences), *(f"{share:.0%}" for share in identical)])
    return markdown_table(rows, ["", "loss", "gradients", "identical, greedy", "identical, beam 5"])


def loss_and_gradients(project: ThisProject, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    loss = project.loss_module(LossInputs.of(batch, project.state.device))
    loss.backward()
    gradients = torch.cat([p.grad.flatten().cpu() for p in project.model.parameters()])
    project.model.zero_grad()
    return loss.detach().cpu(), gradients


@torch.inference_mode()
def share_identical(reference: ThisProject, tested: ThisProject, source: torch.Tensor, beam_size: int) -> float:
    """The fraction of sentences with identical translations. Length limits differ, so that the batch shrinks."""
    limits, found = 3 + torch.arange(len(source)) % 18, []
    for project in (reference, tested):
        model, device = with_larger_weights(project.model), project.state.device
        if project.training_precision == "bf16":
            use_low_precision_products(model, torch.bfloat16)
        found.append(search_with_limits(model, source.to(device), limits.to(device), beam_size))
    return sum(a == b for a, b in zip(*found, strict=True)) / len(source)


def with_larger_weights(model: Transformer) -> Transformer:
    """A copy whose translations depend on the source, unlike those of an untrained model with ordinary weights."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter *= WEIGHT_SCALE
    return model


# ---------------------------------------------------------------------------- speed


def training(arguments: argparse.Namespace, device: torch.device) -> str:
    size, vocab_size = SIZES[arguments.size], arguments.vocabulary
    batches = training_batches("", vocab_size, arguments.batch_tokens, arguments.batches)
    tokens = count_tokens(batches)
    peaks = matrix_peaks(device)
    print(describe_peaks(peaks), flush=True)
    rows, fp32_seconds = [], None
    for name, implementation, precision in TRAINING:
        project = implementation(size, vocab_size, device, precision)
        tasks = {name: functools.partial(train, project, batches)}
        warmup, *seconds = time_interleaved(tasks, arguments.rounds, device, keep_warmup=True)[name]
        median = statistics.median(seconds)
        fp32_seconds = fp32_seconds or median
        utilization = size.flops(*tokens, vocab_size) / median / peaks["bf16"]
        speedup = fp32_seconds / median
        row = [name, f"{tokens[1] / median:,.0f}", f"{speedup:.2f}", f"{utilization:.0%}", f"{warmup - median:.0f}"]
        if device.type == "cuda":
            rebuild = functools.partial(implementation, precision=precision)
            row.append(f"{peak_memory(rebuild, size, vocab_size, batches[:2], device) / 1e9:.1f}")
        rows.append(row)
        print("  ", *row, flush=True)  # immediately, in case the script is interrupted
        del project, tasks
    header = [
        "training",
        "target tokens/s",
        "speedup over fp32",
        "MFU (of the bf16 peak)",
        "extra time of warm-up (s)",
        "peak memory (GB)",
    ]
    return markdown_table(rows, header[: len(rows[0])])


@torch.inference_mode()
def decoding(arguments: argparse.Namespace, device: torch.device) -> str:
    size, vocab_size, rows = SIZES[arguments.size], arguments.vocabulary, []
    projects = {precision: ThisProject(size, vocab_size, device, precision) for precision in PRECISIONS}
    for project in projects.values():
        project.prepare_for_decoding()
    for budget in (8_192, 65_536):
        batches = decoding_batches("", "", vocab_size, budget, arguments.sentences, device)
        tokens = sum(int(lengths.sum()) for _, lengths in batches)
        tasks = {
            precision: functools.partial(decode, project, batches, beam_size=1)
            for precision, project in projects.items()
        }
        for precision, seconds in time_interleaved(tasks, arguments.rounds, device).items():
            rows.append([precision, f"{budget:,}", f"{tokens / statistics.median(seconds):,.0f}"])
    return markdown_table(rows, ["greedy decoding", "source tokens per batch", "target tokens/s"])


def main() -> None:
    parser = timing_parser(__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="base", help="model size (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=30_000, help="vocabulary size (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=25_000, help="tokens per batch (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=10, help="batches per round (default: %(default)s)")
    parser.add_argument("--sentences", type=int, default=2_000, help="sentences to decode (default: %(default)s)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(f"{describe_machine(device)}\n")
    print(check(device), "\n", flush=True)
    print(training(arguments, device), "\n", flush=True)
    print(decoding(arguments, device), "\n", flush=True)


if __name__ == "__main__":
    main()
