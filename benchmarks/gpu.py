"""What to run first on a GPU: is it right there, what does each step towards speed bring, what does translation cost?

    python benchmarks/gpu.py                      # the base model of the paper, made-up ids
    python benchmarks/gpu.py --size tiny --vocabulary 1000 --batch-tokens 2000 --device cpu   # to try the script

First the same small model on the CPU and on the device: loss, gradients, translations. Then training of the
large one in several ways, one after the other, and greedy translation. Stands alone: no data and no peers;
those are in training.py and decoding.py.
"""

import argparse
import copy
import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers import SIZES, Ours, Size, tokens_of
from training_speed import DTYPES, peak_memory
from workload import MadeUp, in_turn, machine, matrix_peak, median, sentences_to_write, table, training_batches

from compute.ops import use_bf16_products
from model import Transformer
from search import beam_search, greedy_decode
from training.losses import Learner
from translate import CachedDecoder

SMALL, SMALL_VOCABULARY = Size(d_model=64, layers=2, heads=4, d_ff=128), 100
# Largest relative difference that rounding explains, of the loss and of all gradients together.
TOLERANCES = {"fp32": 1e-3, "bf16": 3e-2}
SAME = 0.95  # of the translations in fp32; now and then two tokens are equally likely, but for rounding
WILDNESS = 3  # by which weights are multiplied: 55 of 64 sentences then get translations of their own, not 10


class Compiled(Ours):
    """With torch.compile over encoder and decoder, for shapes that vary."""

    def __init__(self, *arguments, **others):
        super().__init__(*arguments, **others)
        for part in (self.run.model.encoder, self.run.model.decoder):
            part.compile(dynamic=True)


TRAINING = [("fp32", Ours, "fp32"), ("bf16", Ours, "bf16"), ("bf16, compiled", Compiled, "bf16")]


def check(device: torch.device) -> str:
    """Differences between the CPU in fp32 and the device; AssertionError where rounding does not explain them."""
    torch.manual_seed(0)
    reference = Ours(SMALL, SMALL_VOCABULARY, torch.device("cpu"), "fp32")
    reference.run.model.eval()  # no dropout
    batch = MadeUp(64, SMALL_VOCABULARY, 12)[list(range(64))]
    expected = loss_and_gradients(reference, batch)
    rows = []
    for precision, tolerance in TOLERANCES.items():
        here = Ours(SMALL, SMALL_VOCABULARY, device, precision)
        here.run.model.load_state_dict(reference.run.model.state_dict())
        here.run.model.eval()
        found = loss_and_gradients(here, batch)
        differences = [((a - b).norm() / a.norm()).item() for a, b in zip(expected, found, strict=True)]
        assert max(differences) < tolerance, (precision, differences)
        same = [same_translations(reference, here, batch["encoder_input"], beam) for beam in (1, 5)]
        assert precision != "fp32" or min(same) >= SAME, same
        rows.append([precision, *(f"{d:.1e}" for d in differences), *(f"{share:.0%}" for share in same)])
    return table(rows, ["", "loss", "gradients", "the same, greedy", "the same, beam 5"])


def loss_and_gradients(way: Ours, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    learner = Learner(way.run.model, 0.1)
    with way.run.autocast():
        loss = learner(*way.run.inputs(batch))
    loss.backward()
    gradients = torch.cat([p.grad.flatten().cpu() for p in way.run.model.parameters()])
    way.run.model.zero_grad()
    return loss.detach().cpu(), gradients


@torch.inference_mode()
def same_translations(reference: Ours, here: Ours, source: torch.Tensor, beam: int) -> float:
    """The share of sentences for which both write the same ids, some of them longer than others."""
    limits, found = 3 + torch.arange(len(source)) % 18, []
    for way in (reference, here):
        model = wild(way.run.model)
        if way.run.precision == "bf16":
            use_bf16_products(model)
        decoder, there = CachedDecoder(model, source.to(way.run.device), 20), limits.to(way.run.device)
        if beam == 1:
            found.append(greedy_decode(decoder, there))
        else:
            found.append([hypotheses[0].ids for hypotheses in beam_search(decoder, there, beam)])
    return sum(a == b for a, b in zip(*found, strict=True)) / len(source)


def wild(model: Transformer) -> Transformer:
    """A copy with larger weights: what it writes depends on the source, as an untrained model's hardly does."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter *= WILDNESS
    return model


def training(arguments, device: torch.device) -> str:
    size = SIZES[arguments.size]
    batches = training_batches("", arguments.vocabulary, arguments.batch_tokens, arguments.batches)
    source, target = map(sum, zip(*map(tokens_of, batches), strict=True))
    peaks = {dtype: matrix_peak(device, getattr(torch, name)) for dtype, name in DTYPES.items()}
    print(", ".join(f"{peak / 1e12:.3g} TFLOP/s in {dtype}" for dtype, peak in peaks.items()), flush=True)
    rows, of_fp32 = [], None
    for name, way, precision in TRAINING:
        here = way(size, arguments.vocabulary, device, precision)
        work = {name: lambda here=here: [here.step(batch) for batch in batches]}
        first, *others = in_turn(work, arguments.rounds, device, keep_first=True)[name]
        took = median(others)
        of_fp32 = of_fp32 or took
        share = size.flops(source, target, arguments.vocabulary) / took / peaks["bf16"]
        row = [name, f"{target / took:,.0f}", f"{of_fp32 / took:.2f}", f"{share:.0%}", f"{first - took:.0f}"]
        if device.type == "cuda":
            again = functools.partial(way, precision=precision)
            row.append(f"{peak_memory(again, size, arguments.vocabulary, batches[:2], device) / 1e9:.1f}")
        rows.append(row)
        print("  ", *row, flush=True)  # in case that time runs out
        del here, work
    header = [
        "training",
        "target tokens/s",
        "× as fast as fp32",
        "share of the bf16 peak",
        "seconds to begin",
        "peak GB",
    ]
    return table(rows, header[: len(rows[0])])


@torch.inference_mode()
def translation(arguments, device: torch.device) -> str:
    size, rows = SIZES[arguments.size], []
    ways = {precision: Ours(size, arguments.vocabulary, device, precision) for precision in DTYPES}
    for way in ways.values():
        way.prepare_to_write()
    for budget in (8_192, 65_536):
        batches = sentences_to_write("", "", arguments.vocabulary, budget, arguments.sentences, device)
        tokens = sum(int(steps.sum()) for _, steps in batches)
        work = {
            precision: lambda way=way, batches=batches: [way.write(source, steps, 1) for source, steps in batches]
            for precision, way in ways.items()
        }
        seconds = in_turn(work, arguments.rounds, device)
        rows += [[name, f"{budget:,}", f"{tokens / median(took):,.0f}"] for name, took in seconds.items()]
    return table(rows, ["greedy translation", "source tokens a batch", "target tokens/s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="base")
    parser.add_argument("--vocabulary", type=int, default=30_000)
    parser.add_argument("--batch-tokens", type=int, default=25_000)
    parser.add_argument("--batches", type=int, default=10, help="in a round")
    parser.add_argument("--sentences", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(f"{machine(device)}, PyTorch {torch.__version__}\n")
    for part in (lambda: check(device), lambda: training(arguments, device), lambda: translation(arguments, device)):
        print(part(), "\n", flush=True)


if __name__ == "__main__":
    main()
