"""The command line of build_it_yourself.py."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from config import InputError, run_command
from course.checks import STEPS, CheckFailed, own_functions, run_step
from course.lessons import LESSONS


def main(namespace: Mapping) -> None:
    """Runs the command with the functions of the script, its globals()."""
    run_command(lambda argv: run(parse_arguments(argv), namespace))


def run(arguments: argparse.Namespace, namespace: Mapping) -> None:
    try:
        if arguments.grade:
            grade(arguments.grade)
        elif arguments.hint:
            print(LESSONS[arguments.hint - 1].hint.strip())
        elif arguments.train:
            train(namespace)
        else:
            for step in STEPS:
                if arguments.step in (None, step.number):
                    run_step(step, namespace)
    except CheckFailed as error:
        print(error, file=sys.stderr)
        sys.exit(1)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Checks the twelve steps of the course in order, and stops at the first failure."
    )
    numbers = range(1, len(STEPS) + 1)
    parser.add_argument("--step", type=int, choices=numbers, metavar="N", help="check this step only, 1 to 12")
    parser.add_argument("--hint", type=int, choices=numbers, metavar="N", help="print the hint of a step")
    parser.add_argument("--train", action="store_true", help="train your model on the toy corpus and translate with it")
    parser.add_argument("--grade", type=Path, nargs="+", metavar="FILE", help="grade solution files, .py or .ipynb")
    return parser.parse_args(argv)


def grade(paths: list[Path]) -> None:
    from course.grade import table

    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"no file {missing[0]}; give solution files, .py or .ipynb")
    print(table(paths))


def train(namespace: Mapping) -> None:
    """Trains, prints BLEU and some translations, and draws the cross-attention of one as text."""
    functions = own_functions(namespace)
    for step in STEPS:
        run_step(step, namespace)
    from course import own_model  # takes some seconds
    from interpret.measures import mean_over_heads
    from interpret.text import heat_map_text

    corpus = own_model.load_corpus(100)
    model = own_model.train(functions, corpus)
    print(f"BLEU {own_model.bleu(functions, model, corpus):.1f} on {len(corpus.sources)} held-out sentences")
    examples = corpus.sources[:5]
    for source, translation in zip(examples, own_model.translate(functions, model, corpus, examples), strict=True):
        print(f"{source}  ->  {translation}")
    trace = mean_over_heads(own_model.trace(functions, model, corpus, "I can eat an apple."))
    print("\nthe mean over the heads:")
    for layer in range(corpus.config.decoder_layers):
        print(heat_map_text(trace, "cross", layer, 0))
