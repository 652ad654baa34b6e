"""Evaluation: translates a split or a file with a trained run and scores the translations.

python evaluate.py --split test
python evaluate.py --source test.en --reference test.it
"""

# config comes first: it makes Ctrl-C quiet during the imports below
from config import InputError, counted, parse, run_command

# isort: split
import json
import time
from pathlib import Path
from typing import Annotated, Literal

import sacrebleu
import tyro

from corpora.files import check_aligned, read_text_file
from corpora.sources import load_split
from runs.files import check_outputs, output_file
from translate import Runs, Weights, blank_long, check_search, load_translators, one_line, repeat_run_dir


def score(
    predicted: list[str], references: list[str], bleu_tokenizer: str = "13a", warn_tokenized: bool = False
) -> dict[str, float]:
    """Corpus-level scores from 0 to 100, except the error rates, which have no upper limit.

    bleu and chrf are sacreBLEU's; cer and wer are the character and word error rates in percent; exact is the
    percentage of translations that are identical to their reference. With `warn_tokenized`, sacreBLEU warns about text
    that looks tokenized, which its own tokenizers do not expect.
    """
    from torchmetrics.functional.text import char_error_rate, word_error_rate  # imported here because it takes a second

    return {
        "bleu": sacrebleu.corpus_bleu(predicted, [references], tokenize=bleu_tokenizer, force=not warn_tokenized).score,
        "chrf": sacrebleu.corpus_chrf(predicted, [references]).score,
        "cer": 100 * char_error_rate(predicted, references).item(),
        "wer": 100 * word_error_rate(predicted, references).item(),
        "exact": 100 * sum(p == r for p, r in zip(predicted, references, strict=True)) / len(references),
    }


def signature(bleu_tokenizer: str = "13a", metric: Literal["bleu", "chrf"] = "bleu") -> str:
    """sacreBLEU's signature of a score: how it was computed, to be reported with it."""
    scorer = sacrebleu.BLEU(tokenize=bleu_tokenizer) if metric == "bleu" else sacrebleu.CHRF()
    scorer.corpus_score(["a"], [["a"]])
    return str(scorer.get_signature())


def format_scores(scores: dict[str, float]) -> str:
    names = {"bleu": "BLEU", "chrf": "chrF", "cer": "CER", "wer": "WER", "exact": "exact match"}
    units = {"cer": "%", "wer": "%", "exact": "%"}
    return "   ".join(f"{names[key]} {value:.1f}{units.get(key, '')}" for key, value in scores.items())


def main(
    run_dir: Runs = (),
    split: Literal["validation", "test"] = "validation",
    source: str = "",
    reference: str = "",
    output: str = "",
    beam_size: int = 1,
    length_penalty: float = 0.6,
    no_repeat_ngram: int = 0,
    weights: Weights = (),
    average: int = 1,
    bleu_tokenizer: Literal["13a", "none", "intl", "char", "zh"] = "13a",
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Translate a split or a file with a trained run, and score the translations.

    Sentences longer than the run's seq_len are scored as blank translations.

    Args:
        run_dir: folder of the run, by default the most recently trained one; several (--run-dir A B C) are an ensemble,
            which averages their probabilities
        split: split of the run's corpus to translate
        source: text file to translate instead of a split, one sentence per line
        reference: text file with the reference translations
        output: text file for the translations, one per line
        beam_size: hypotheses kept at each step; 1: greedy search
        length_penalty: exponent of the length normalization; 0 favors short translations, higher values longer ones
        no_repeat_ngram: no sequence of this many tokens occurs twice in a translation; 0: repetitions are allowed
        weights: best (on the validation set, the default), latest, or an epoch number; repeated: an ensemble of epochs
        average: number of checkpoints whose weights are averaged, the best or the latest ones
        bleu_tokenizer: tokenizer of sacreBLEU; none for text that is already tokenized
        device: auto, cuda, mps or cpu
        precision: fp32, bf16 or fp16 (linear layers), or auto: as in training (see docs/training.md)
        as_json: output as one JSON object
    """
    if bool(source) != bool(reference):
        raise InputError("--source and --reference go together; give both, or neither to score the run's own split")
    check_search(beam_size, length_penalty, no_repeat_ngram)
    if output and (Path(output).is_dir() or not Path(output).parent.is_dir()):
        raise InputError(f"cannot write {output}; give the name of a file in an existing folder")
    check_outputs([output], [source, reference])
    translator = load_translators(run_dir, device, weights, average, precision)
    if source:
        check_aligned([Path(source), Path(reference)])
        sources, references = list(read_text_file(source)), list(read_text_file(reference))
    else:
        pairs = load_split(translator.config, split)
        sources, references = list(pairs["src"]), list(pairs["tgt"])
    name = source or f"{split} split"
    if not sources:
        raise InputError(f"{name} contains no sentences; give a file or split with at least one")
    if not any(map(str.strip, references)):
        raise InputError(f"all references of {reference or name} are blank; give a file or split with translations")
    start = time.perf_counter()
    readable = blank_long(translator, sources)
    predicted = translator.translate(readable, beam_size, length_penalty, no_repeat_ngram, show_progress=True)
    seconds = time.perf_counter() - start
    if output:
        with output_file(output) as file:
            file.write_text("".join(f"{one_line(text)}\n" for text in predicted), encoding="utf8")
    scores = score(predicted, references, bleu_tokenizer, warn_tokenized=bleu_tokenizer != "none")
    details = {
        "run": str(translator.folder),
        "of": name,
        "sentences": len(sources),
        "weights": translator.weights,
        "average": average,
        "beam_size": beam_size,
        "length_penalty": length_penalty,
        "no_repeat_ngram": no_repeat_ngram,
        "precision": translator.precision,
        "seconds": round(seconds, 3),
    }
    bleu_signature, chrf_signature = signature(bleu_tokenizer), signature(metric="chrf")
    if as_json:
        print(json.dumps({**details, **scores, "signature": bleu_signature, "chrf_signature": chrf_signature}))
    else:
        search = f"beam {beam_size}"
        search += f", length penalty {length_penalty}" if beam_size > 1 else ""
        search += f", no-repeat n-gram {no_repeat_ngram}" if no_repeat_ngram else ""
        translated = f"{translator.folder}, {translator.weights}, {name}, {counted(len(sources), 'sentence')}"
        print(f"{translated}, {search}, {translator.precision}, {seconds:.1f} s")
        print(format_scores(scores))
        print(f"BLEU signature {bleu_signature}")
        print(f"chrF signature {chrf_signature}")


if __name__ == "__main__":
    run_command(lambda argv: parse(main, repeat_run_dir(argv)))
