"""Train on Multi30k, English to German, select on the validation set, and evaluate once on the test set.

With several seeds, the mean over the runs is reported, and the score of their ensemble.

    python benchmarks/multi30k.py --data FOLDER                            # one seed
    python benchmarks/multi30k.py --data FOLDER --seeds 1 2 3 --at-once 3  # three seeds at the same time on one GPU
    python benchmarks/multi30k.py --data FOLDER --form raw                 # cased text, sacreBLEU's 13a tokenizer
    python benchmarks/multi30k.py --data FOLDER -- --num-epochs 150        # flags after -- are passed to train.py
    python benchmarks/multi30k.py --data FOLDER --runs de-en -- --lang-src de --lang-tgt en

FOLDER holds train, val and test_2016_flickr, each as `.lc.norm.tok.en` and `.lc.norm.tok.de` (lowercased and tokenized
with Moses, as in the papers) or, for --form raw, as `.en` and `.de`. Existing runs are resumed.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from compute.device import get_device
from config import InputError, run_command
from corpora.sources import load_split
from evaluate import format_scores, score, signature
from runs.folder import RunFolder
from translate import Ensemble, Translator

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


class Weights(NamedTuple):
    which: str  # best or latest
    average: int  # number of epochs that are averaged


class Search(NamedTuple):
    beam_size: int
    length_penalty: float
    no_repeat_ngram: int = 0  # 0: repetitions are allowed


WEIGHTS = [Weights("best", 1), Weights("latest", 1), Weights("latest", 5), Weights("latest", 10)]
SEARCHES = [
    Search(1, 0.6),
    *(Search(5, length_penalty, n) for n in (0, 5) for length_penalty in (0.0, 0.6, 1.0, 1.4, 1.8, 2.4)),
]
DEFAULT_SEARCH = Search(5, 0.6)  # for comparing weights
# Searches within this validation BLEU of the best count as equal. The first one is selected, with the lowest length
# penalty: higher ones gain BLEU by longer translations, and a few sentences then run on up to the length limit.
TIE = 0.2


def corpus_flags(data: str, form: str) -> list[str]:
    """Flags of train.py for the training, validation and test set."""
    suffix = ".lc.norm.tok" if form == "tok" else ""
    parts = {"datasource": "train", "validation-source": "val", "test-source": "test_2016_flickr"}
    return [flag for name, part in parts.items() for flag in (f"--{name}", str(Path(data) / f"{part}{suffix}"))]


# ---------------------------------------------------------------------------- training


def train_all(arguments: argparse.Namespace) -> list[Path]:
    """Trains one run for each seed; returns their folders."""
    runs, waiting = [], list(arguments.seeds)
    with tqdm(total=len(waiting), desc="Training", unit="seed") as bar:
        while waiting:
            group, waiting = waiting[: arguments.at_once], waiting[arguments.at_once :]
            started = [start_training(arguments, seed) for seed in group]
            for run, process in started:
                if process.wait():
                    for _, other in started:
                        other.terminate()
                    raise InputError(f"training of {run} failed; see {log_file(run)}")
                runs.append(run)
                bar.update()
    return runs


def start_training(arguments: argparse.Namespace, seed: int) -> tuple[Path, subprocess.Popen]:
    run = Path(arguments.runs) / f"multi30k.{arguments.form}.{seed}"
    run.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(TRAIN), "--preset", "multi30k", *corpus_flags(arguments.data, arguments.form)]
    command += ["--run-dir", str(run), "--seed", str(seed), *arguments.flags]
    return run, subprocess.Popen(command, stdout=log_file(run).open("a", encoding="utf8"), stderr=subprocess.STDOUT)


def log_file(run: Path) -> Path:
    return run.with_name(f"{run.name}.log")


# ---------------------------------------------------------------------------- selection and evaluation


def translate_split(
    runs: list[Path], weights: Weights, search: Search, split: str
) -> tuple[list[str], list[str], float]:
    """Translations of a split by a run or an ensemble of runs, its references, and the time in seconds."""
    members = [Translator.load(run, weights=weights.which, average=weights.average) for run in runs]
    translator = members[0] if len(members) == 1 else Ensemble(members)
    pairs = load_split(translator.config, split)
    start = time.perf_counter()
    predicted = translator.translate(list(pairs["src"]), *search)
    return predicted, list(pairs["tgt"]), time.perf_counter() - start


def validation_bleu(runs: list[Path], tokenizer: str, weights: Weights, search: Search) -> float:
    """Validation BLEU, averaged over the runs; prints a row of the table."""
    bleus, seconds, sentences = [], 0.0, 0
    for run in runs:
        predicted, references, took = translate_split([run], weights, search, "validation")
        bleus.append(score(predicted, references, tokenizer)["bleu"])
        seconds, sentences = seconds + took, sentences + len(references)
    cells = (*weights, *search, f"{statistics.mean(bleus):.2f}", f"{sentences / seconds:.0f}")
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return statistics.mean(bleus)


def select(runs: list[Path], tokenizer: str) -> tuple[Weights, Search]:
    """The weights with the highest mean BLEU on the validation set, then the first search within TIE of the best one.

    Prints all candidates.
    """
    names = ["weights", "checkpoints averaged", "beam size", "length penalty", "no-repeat n-gram", "validation BLEU"]
    print("\n| " + " | ".join([*names, "sentences/s"]) + " |")
    print("|" + "---|" * 7)
    epochs = min(len(RunFolder(run).epoch_checkpoints()) for run in runs)
    averaged = [weights for weights in WEIGHTS if weights.average <= max(1, epochs)]  # short runs have few
    by_default = {candidate: validation_bleu(runs, tokenizer, candidate, DEFAULT_SEARCH) for candidate in averaged}
    weights = max(averaged, key=by_default.get)
    bleus = {
        search: by_default[weights] if search == DEFAULT_SEARCH else validation_bleu(runs, tokenizer, weights, search)
        for search in SEARCHES
    }
    return weights, next(search for search in SEARCHES if bleus[search] >= max(bleus.values()) - TIE)


def evaluate_test(runs: list[Path], weights: Weights, search: Search, tokenizer: str) -> float:
    """BLEU of a run or an ensemble of runs on the test set; prints all scores."""
    predicted, references, _ = translate_split(runs, weights, search, "test")
    scores = score(predicted, references, tokenizer)
    bleu = scores.pop("bleu")
    name = runs[0].name if len(runs) == 1 else f"ensemble of {len(runs)}"
    print(f"{name}, Test 2016: BLEU {bleu:.2f}   {format_scores(scores)}")
    return bleu


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the corpus")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds; one run is trained for each")
    parser.add_argument("--at-once", type=int, default=1, help="runs trained at the same time (default: %(default)s)")
    parser.add_argument("--form", choices=["tok", "raw"], default="tok", help="form of the text (default: %(default)s)")
    parser.add_argument("--runs", default="weights", help="folder for the runs (default: %(default)s)")
    parser.add_argument("flags", nargs="*", help="flags for train.py, after --")
    arguments = parser.parse_args(argv)
    tokenizer = "none" if arguments.form == "tok" else "13a"
    start = time.perf_counter()
    runs = train_all(arguments)
    print(f"trained {len(runs)} seeds in {(time.perf_counter() - start) / 60:.1f} minutes on {get_device().type}")
    weights, search = select(runs, tokenizer)
    print(
        f"\nselected: {weights.which} weights, checkpoints averaged {weights.average}, "
        f"beam size {search.beam_size}, length penalty {search.length_penalty}, "
        f"no-repeat n-gram {search.no_repeat_ngram}\n"
    )
    bleus = [evaluate_test([run], weights, search, tokenizer) for run in runs]
    if len(runs) > 1:
        evaluate_test(runs, weights, search, tokenizer)
    spread = f" ± {statistics.stdev(bleus):.2f}" if len(bleus) > 1 else ""
    print(f"BLEU {statistics.mean(bleus):.2f}{spread}   {signature(tokenizer)}")


if __name__ == "__main__":
    run_command(main)
