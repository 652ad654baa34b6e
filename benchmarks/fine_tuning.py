"""Compare fine-tuning (--init-from) with training from scratch at equal steps, on sentences with other words.

    python benchmarks/fine_tuning.py --folder /tmp/fine_tuning

The base run is trained on the toy corpus without sentences about animals, with a BPE tokenizer, which segments unknown
words. The other two are trained on 1,000 sentences about animals, and scored on test sentences about them. The run from
scratch has tokenizers of its own, so that losses per token cannot be compared.
"""

import argparse
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from workload import describe_machine, markdown_table

from config import get_config
from corpora.toy import toy_pairs
from runs.folder import RunFolder
from train import train_model

ANIMALS = re.compile(r"\b(cat|dog|horse|bird)s?\b", re.IGNORECASE)
TRAINING_PAIRS = 1_000


def write_pairs(path: Path, split: str, about_animals: bool, limit: int | None = None) -> str:
    """Writes the pairs of a split of the toy corpus with or without animals; returns the path."""
    pairs = [p for p in toy_pairs("en", "it", split) if bool(ANIMALS.search(p.src_text)) == about_animals]
    path.write_text("".join(f"{p.src_text}\t{p.tgt_text}\n" for p in pairs[:limit]), encoding="utf8")
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="folder for corpora and runs; runs there are resumed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="a pair of runs is trained for each")
    arguments = parser.parse_args()
    folder = Path(arguments.folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"tokenizer": "bpe", "vocab_size": 1_000, "validation_sentences": 1_000, "validation_examples": 0}
    base = get_config(
        "toy",
        run_dir=str(folder / "base"),
        datasource=write_pairs(folder / "base.tsv", "train", False),
        validation_source=write_pairs(folder / "base_validation.tsv", "validation", False),
        num_epochs=2,
        device="cpu",
        **settings,
    )
    train_model(base)
    animals = {
        "datasource": write_pairs(folder / "animals.tsv", "train", True, TRAINING_PAIRS),
        "validation_source": write_pairs(folder / "animals_test.tsv", "test", True),
        "num_epochs": 10,
        "warmup_steps": 20,
        **settings,
    }
    rows = []
    for seed in arguments.seeds:
        for name, init_from in (("from scratch", ""), ("fine-tuned", base.run_dir)):
            run_dir = str(folder / f"{name.replace(' ', '_')}_{seed}")
            config = get_config("toy", run_dir=run_dir, init_from=init_from, seed=seed, device="cpu", **animals)
            train_model(config)
            scores = RunFolder(run_dir).read_scores()[-1]
            values = [f"{scores[metric]:.1f}" for metric in ("bleu", "chrf", "exact")]
            rows.append([name, seed, scores["step"], *values])
    print(describe_machine(torch.device("cpu")))
    print(markdown_table(rows, ["run", "seed", "steps", "BLEU", "chrF", "exact match (%)"]))


if __name__ == "__main__":
    main()
