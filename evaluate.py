"""Scores of translations: BLEU, chrF, character and word error rates, exact matches.

python evaluate.py --split test
python evaluate.py --source test.en --reference test.it
"""

import json
import time
from pathlib import Path
from typing import Annotated, Literal

import sacrebleu
import tyro
from torchmetrics.functional.text import char_error_rate, word_error_rate

from config import InputError, parse, run_command
from corpora.sources import check_aligned, load_split, read_text_file
from translate import Translator, blank_long, check_search


def score(predicted: list[str], references: list[str], bleu_tokenizer: str = "13a") -> dict[str, float]:
    """BLEU and chrF (sacreBLEU), error rates and the share that is exactly right, all in percent."""
    return {
        # force: that text is tokenized is known where the tokenizer is "none"
        "bleu": sacrebleu.corpus_bleu(
            predicted, [references], tokenize=bleu_tokenizer, force=bleu_tokenizer == "none"
        ).score,
        "chrf": sacrebleu.corpus_chrf(predicted, [references]).score,
        "cer": 100 * char_error_rate(predicted, references).item(),
        "wer": 100 * word_error_rate(predicted, references).item(),
        "exact": 100 * sum(p == r for p, r in zip(predicted, references, strict=True)) / len(references),
    }


def signature(bleu_tokenizer: str = "13a", metric: Literal["bleu", "chrf"] = "bleu") -> str:
    """sacreBLEU's own description of how a score was computed, to be quoted beside it."""
    scorer = sacrebleu.BLEU(tokenize=bleu_tokenizer) if metric == "bleu" else sacrebleu.CHRF()
    scorer.corpus_score(["a"], [["a"]])
    return str(scorer.get_signature())


def format_scores(scores: dict[str, float]) -> str:
    names = {"bleu": "BLEU", "chrf": "chrF", "cer": "CER", "wer": "WER", "exact": "exactly right"}
    unit = {"cer": "%", "wer": "%", "exact": "%"}
    return "   ".join(f"{names[key]} {value:.1f}{unit.get(key, '')}" for key, value in scores.items())


def command(
    run_dir: str = "",
    split: Literal["validation", "test"] = "validation",
    source: str = "",
    reference: str = "",
    beam_size: int = 1,
    length_penalty: float = 0.6,
    weights: str = "best",
    average: int = 1,
    bleu_tokenizer: Literal["13a", "none", "intl", "char", "zh"] = "13a",
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Translates a split, or a file, with a trained run and scores it; sentences too long for the run count as blank.

    Args:
        run_dir: the run's folder; empty: the run trained last
        split: which part of the run's own corpus
        source: a text file to translate in place of a split
        reference: the file with its translations
        beam_size: hypotheses kept at every step; 1: greedy search
        length_penalty: 0 favours short translations, 1 and more long ones
        weights: best (on the validation set), latest, or an epoch's number
        average: average the weights of so many epochs, the best or the latest
        bleu_tokenizer: sacreBLEU's; none for text that is tokenized already
        device: auto, cuda, mps or cpu
        precision: of the products with weights: fp32, bf16, or auto, the faster one for device and model
        as_json: print one JSON object
    """
    if bool(source) != bool(reference):
        raise InputError("--source and --reference go together; give both, or neither for the run's own split")
    check_search(beam_size, length_penalty)
    translator = Translator.load(run_dir, device, weights, average, precision)
    if source:
        check_aligned([Path(source), Path(reference)])
        sources, references = list(read_text_file(source)), list(read_text_file(reference))
    else:
        pairs = load_split(translator.config, split)
        sources, references = list(pairs["src"]), list(pairs["tgt"])
    if not sources:
        raise InputError(f"{source or split} holds no sentence")
    begun = time.perf_counter()
    predicted = translator.translate(blank_long(translator, sources), beam_size, length_penalty, progress=True)
    seconds = time.perf_counter() - begun
    scores = score(predicted, references, bleu_tokenizer)
    about = {
        "run": str(translator.config.folder),
        "of": source or f"{split} split",
        "sentences": len(sources),
        "weights": translator.weights,
        "average": average,
        "beam_size": beam_size,
        "length_penalty": length_penalty,
        "precision": translator.precision,
        "seconds": round(seconds, 3),
    }
    bleu_signature, chrf_signature = signature(bleu_tokenizer), signature(metric="chrf")
    if as_json:
        print(json.dumps({**about, **scores, "signature": bleu_signature, "chrf_signature": chrf_signature}))
    else:
        line = "{run}, {weights}, {of}, {sentences:,} sentences, beam {beam_size}, {precision}, {seconds:.1f} s"
        print(line.format(**about))
        print(format_scores(scores))
        print(f"BLEU signature {bleu_signature}")
        print(f"chrF signature {chrf_signature}")


if __name__ == "__main__":
    run_command(lambda argv: parse(command, argv))
