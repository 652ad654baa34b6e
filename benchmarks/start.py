"""Seconds until a command answers, beside the import of torch: medians of runs in turn.

python benchmarks/start.py --run-dir weights/toy.en-it
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from workload import describe_machine, markdown_table

ROOT = Path(__file__).resolve().parent.parent


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", required=True, help="a trained run")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    commands = {
        'python -c "import torch"': ["-c", "import torch"],
        "translate.py --help": ["translate.py", "--help"],
        'translate.py "I can eat an apple."': ["translate.py", "--run-dir", arguments.run_dir, "I can eat an apple."],
        "train.py --help": ["train.py", "--help"],
        "evaluate.py --help": ["evaluate.py", "--help"],
        "visualize.py --help": ["visualize.py", "--help"],
        "experiments.py --help": ["experiments.py", "--help"],
    }
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(arguments.rounds + 1):  # the first round fills the caches of the disk
        for name, command in commands.items():
            taken[name].append(seconds(command))
    medians = {name: statistics.median(values[1:]) for name, values in taken.items()}
    base = next(iter(medians.values()))
    print(describe_machine(torch.device("cpu")))
    rows = [[f"`{name}`", f"{median:.2f}", f"{median - base:+.2f}"] for name, median in medians.items()]
    print(markdown_table(rows, ["command", "seconds", "more than torch"]))


if __name__ == "__main__":
    main()
