"""Scores of translations: BLEU, chrF, character and word error rates, exact matches.

python evaluate.py --split test
python evaluate.py --source test.en --reference test.it
"""

import json
from pathlib import Path
from typing import Annotated, Literal

import sacrebleu
import tyro
from torchmetrics.functional.text import char_error_rate, word_error_rate

from config import InputError, parse, run_command
from corpus import check_aligned, lines_of, load_split
from translate import Translator, blank_long


def score(predicted: list[str], references: list[str], bleu_tokenizer: str = "13a") -> dict[str, float]:
    """BLEU and chrF (sacreBLEU), error rates and the share that is exactly right, all in percent."""
    return {
        "bleu": sacrebleu.corpus_bleu(predicted, [references], tokenize=bleu_tokenizer).score,
        "chrf": sacrebleu.corpus_chrf(predicted, [references]).score,
        "cer": 100 * char_error_rate(predicted, references).item(),
        "wer": 100 * word_error_rate(predicted, references).item(),
        "exact": 100 * sum(p == r for p, r in zip(predicted, references, strict=True)) / len(references),
    }


def signature(bleu_tokenizer: str = "13a") -> str:
    """sacreBLEU's own description of how the BLEU was computed, to be quoted beside it."""
    metric = sacrebleu.BLEU(tokenize=bleu_tokenizer)
    metric.corpus_score(["a"], [["a"]])
    return str(metric.get_signature())


def format_scores(scores: dict[str, float]) -> str:
    names = {"bleu": "BLEU", "chrf": "chrF", "cer": "CER", "wer": "WER", "exact": "exactly right"}
    unit = {"cer": "%", "wer": "%", "exact": "%"}
    return "   ".join(f"{names[key]} {value:.1f}{unit.get(key, '')}" for key, value in scores.items())


def command(
    run_dir: str = "",
    split: Literal["validation", "test"] = "validation",
    source: str = "",
    reference: str = "",
    bleu_tokenizer: Literal["13a", "none", "intl", "char", "zh"] = "13a",
    device: str = "auto",
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Translates a split, or a file, with a trained run and scores it; sentences too long for the run count as blank.

    Args:
        run_dir: the run's folder; empty: the run trained last
        split: which part of the run's own corpus
        source: a text file to translate in place of a split
        reference: the file with its translations
        bleu_tokenizer: sacreBLEU's; none for text that is tokenized already
        device: auto, cuda, mps or cpu
        as_json: print one JSON object
    """
    if bool(source) != bool(reference):
        raise InputError("--source and --reference go together; give both, or neither for the run's own split")
    translator = Translator.load(run_dir, device)
    if source:
        check_aligned([Path(source), Path(reference)])
        sources, references = list(lines_of(source)), list(lines_of(reference))
    else:
        pairs = load_split(translator.config, split)
        sources, references = list(pairs["src"]), list(pairs["tgt"])
    if not sources:
        raise InputError(f"{source or split} holds no sentence")
    predicted = translator.translate(blank_long(translator, sources), progress=True)
    scores = score(predicted, references, bleu_tokenizer)
    what = source or f"{split} split"
    about = {"run": str(translator.config.folder), "of": what, "sentences": len(sources)}
    if as_json:
        print(json.dumps({**about, **scores, "signature": signature(bleu_tokenizer)}))
    else:
        print("{run}, {of}, {sentences:,} sentences".format(**about))
        print(format_scores(scores))
        print(f"BLEU signature {signature(bleu_tokenizer)}")


if __name__ == "__main__":
    run_command(lambda argv: parse(command, argv))
