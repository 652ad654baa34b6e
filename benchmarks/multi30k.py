"""Multi30k, English to German, from scratch: trains, chooses on validation, reads the test set once.

    python benchmarks/multi30k.py --data FOLDER                            # one seed after another
    python benchmarks/multi30k.py --data FOLDER --seeds 1 2 3 --at-once 3  # three on one GPU
    python benchmarks/multi30k.py --data FOLDER --form raw                 # cased text, sacreBLEU's 13a
    python benchmarks/multi30k.py --data FOLDER -- --num-epochs 150        # what follows goes to train.py

FOLDER holds train, val and test_2016_flickr, each with `.lc.norm.tok.en` and `.de` (lowercased and
tokenized by Moses, as the papers use it) or, raw, `.en` and `.de`. A run that is there already goes on.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import InputError, run_command
from corpora.sources import load_split
from evaluate import format_scores, score, signature
from translate import Translator, get_device

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
WEIGHTS = [("best", 1), ("latest", 1), ("latest", 5), ("latest", 10)]  # and over how many epochs they are averaged
SEARCHES = [(1, 0.6), (5, 0.0), (5, 0.6), (5, 1.0), (5, 1.4), (5, 1.8), (5, 2.4)]  # beam size, length penalty
USUAL = (5, 0.6)  # the search that weights are compared with


def sources(data: str, form: str) -> list[str]:
    """The flags that name a folder's training, validation and test set."""
    suffix = ".lc.norm.tok" if form == "tok" else ""
    parts = zip(("datasource", "validation-source", "test-source"), ("train", "val", "test_2016_flickr"), strict=True)
    return [word for name, part in parts for word in (f"--{name}", str(Path(data) / f"{part}{suffix}"))]


def train(arguments, seed: int) -> tuple[Path, subprocess.Popen]:
    run = Path(arguments.runs) / f"multi30k.{arguments.form}.{seed}"
    run.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(TRAIN), "--preset", "multi30k", *sources(arguments.data, arguments.form)]
    command += ["--run-dir", str(run), "--seed", str(seed), *arguments.flags]
    return run, subprocess.Popen(command, stdout=log_of(run).open("a"), stderr=subprocess.STDOUT)


def log_of(run: Path) -> Path:
    return run.with_name(f"{run.name}.log")


def translated(translator: Translator, split: str, beam: int, alpha: float) -> tuple[list[str], list[str], float]:
    pairs = load_split(translator.config, split)
    begun = time.perf_counter()
    predicted = translator.translate(list(pairs["src"]), beam, alpha)
    return predicted, list(pairs["tgt"]), time.perf_counter() - begun


def train_all(arguments) -> list[Path]:
    runs, waiting = [], list(arguments.seeds)
    with tqdm(total=len(waiting), desc="Training", unit="seed") as bar:
        while waiting:
            group, waiting = waiting[: arguments.at_once], waiting[arguments.at_once :]
            started = [train(arguments, seed) for seed in group]
            for run, process in started:
                if process.wait():
                    for _, other in started:
                        other.terminate()
                    raise InputError(f"training failed; its words are in {log_of(run)}")
                runs.append(run)
                bar.update()
    return runs


def choose(runs: list[Path], tokenizer: str) -> tuple[tuple[str, int], tuple[int, float]]:
    """The weights with the highest mean BLEU on the validation sets, then the search; prints all that were tried."""
    print(
        "\n| weights | average of | beam | length penalty | validation BLEU | sentences/s |\n|---|---|---|---|---|---|"
    )

    def tried(weights: tuple[str, int], search: tuple[int, float]) -> float:
        bleus, seconds, sentences = [], 0.0, 0
        for run in runs:
            translator = Translator.load(run, weights=weights[0], average=weights[1])
            predicted, references, took = translated(translator, "validation", *search)
            bleus.append(score(predicted, references, tokenizer)["bleu"])
            seconds, sentences = seconds + took, sentences + len(references)
        cells = (*weights, *search, f"{statistics.mean(bleus):.2f}", f"{sentences / seconds:.0f}")
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
        return statistics.mean(bleus)

    weights = max(WEIGHTS, key=lambda each: tried(each, USUAL))
    return weights, max(SEARCHES, key=lambda each: tried(weights, each))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--at-once", type=int, default=1, help="seeds trained at the same time")
    parser.add_argument("--form", choices=["tok", "raw"], default="tok")
    parser.add_argument("--runs", default="weights")
    parser.add_argument("flags", nargs="*", help="more flags for train.py, after --")
    arguments = parser.parse_args(argv)
    tokenizer = "none" if arguments.form == "tok" else "13a"
    begun = time.perf_counter()
    runs = train_all(arguments)
    print(f"{len(runs)} seeds trained in {(time.perf_counter() - begun) / 60:.1f} minutes on {get_device().type}")
    weights, search = choose(runs, tokenizer)
    print(f"\nchosen: {weights[0]} weights, average of {weights[1]}, beam {search[0]}, length penalty {search[1]}\n")
    bleus = []
    for run in runs:
        predicted, references, _ = translated(
            Translator.load(run, weights=weights[0], average=weights[1]), "test", *search
        )
        scores = score(predicted, references, tokenizer)
        bleus.append(scores["bleu"])
        print(f"{run.name}, Test 2016: {format_scores(scores)}")
    spread = f" ± {statistics.stdev(bleus):.2f}" if len(bleus) > 1 else ""
    print(f"BLEU {statistics.mean(bleus):.2f}{spread}   {signature(tokenizer)}")


if __name__ == "__main__":
    run_command(main)
