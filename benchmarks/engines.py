"""Compare a trained run in this project with its export to CTranslate2: identical translations, speed, BLEU.

    python benchmarks/engines.py --run-dir weights/multi30k.tok.1 --sentences 1000 --bleu-tokenizer none

Translates the run's test set with greedy search and with a beam of 5, in fp32, in bf16 (this project) and in int8
(CTranslate2). The length penalty is off, because the two programs define it differently, and all sentences have the
length limit of the longest one, because CTranslate2 has one limit for a call. Prints sentences per second, the number
of translations whose tokens are identical to those of this project in fp32, and BLEU. For each fp32 translation that
differs it prints both versions with their log-probabilities.
"""

import argparse
import functools
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import ctranslate2
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from workload import describe_machine, markdown_table, time_interleaved

from corpora.sources import load_split
from evaluate import score
from experiments import log_probability
from export import to_ctranslate2
from translate import Translator

CPU = torch.device("cpu")
ROUNDS = 3
# Source tokens per batch, times the beam size, in CTranslate2: 2,048 and 32,768 are not faster with the tiny model.
BATCH_TOKENS = 8_192


class Exported:
    """The run as a CTranslate2 model."""

    def __init__(self, translator: Translator, folder: Path, quantization: str, limit: int):
        to_ctranslate2(translator, folder, quantization)
        threads = torch.get_num_threads()
        self.engine = ctranslate2.Translator(
            str(folder), "cpu", inter_threads=1, intra_threads=threads, compute_type=quantization
        )
        self.tokenizer, self.limit = translator.tokenizer_src, limit

    def translate(self, sentences: list[str], beam_size: int) -> list[list[str]]:
        """Target tokens."""
        tokens = [self.tokenizer.encode(s).tokens for s in sentences]
        results = self.engine.translate_batch(
            tokens,
            beam_size=beam_size,
            length_penalty=0,
            max_batch_size=BATCH_TOKENS // beam_size,
            batch_type="tokens",
            min_decoding_length=0,  # as in this project; the default forbids empty translations
            max_decoding_length=self.limit,
        )
        return [result.hypotheses[0] for result in results]


def translate(translator: Translator, sentences: list[str], beam_size: int) -> list[list[str]]:
    """Target tokens, translated by this project."""
    translations: list[list[str]] = [[] for _ in sentences]
    for positions, sources in translator.batches(sentences, beam_size):
        for i, ids in zip(positions, translator.search(sources, beam_size, length_penalty=0.0), strict=True):
            translations[i] = [translator.tokenizer_tgt.id_to_token(token_id) for token_id in ids]
    return translations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", required=True, help="folder of the run")
    parser.add_argument("--sentences", type=int, default=1000, help="number of test sentences (default: %(default)s)")
    parser.add_argument("--bleu-tokenizer", default="13a", help="sacreBLEU tokenizer (default: %(default)s)")
    parser.add_argument("--weights", default="best", help="best, latest or an epoch number (default: %(default)s)")
    arguments = parser.parse_args()
    translator = Translator.load(arguments.run_dir, "cpu", arguments.weights)
    pairs = load_split(translator.config, "test").select(range(arguments.sentences))
    sentences, references = list(pairs["src"]), list(pairs["tgt"])
    limit = max(translator.length_limit(len(translator.encode(sentence))) for sentence in sentences)
    print(f"{describe_machine(CPU)}, CTranslate2 {ctranslate2.__version__}, {len(sentences)} sentences\n")
    with tempfile.TemporaryDirectory() as folder:
        exported = {name: Exported(translator, Path(folder) / name, name, limit) for name in ("float32", "int8")}
        in_bf16 = Translator.load(arguments.run_dir, "cpu", arguments.weights, precision="bf16")
        translator.length_limit = in_bf16.length_limit = lambda source_length: limit
        engines = {
            "this project, float32": functools.partial(translate, translator, sentences),
            "this project, bf16": functools.partial(translate, in_bf16, sentences),
        }
        for name, engine in exported.items():
            engines[f"CTranslate2, {name}"] = functools.partial(engine.translate, sentences)
        rows = []
        for beam_size in (1, 5):
            rows += compare(engines, beam_size, translator, sentences, references, arguments.bleu_tokenizer)
    print(markdown_table(rows, ["", "search", "sentences/s", "identical translations", "BLEU"]))


def compare(
    engines: dict[str, Callable[[int], list[list[str]]]],
    beam_size: int,
    translator: Translator,
    sentences: list[str],
    references: list[str],
    bleu_tokenizer: str,
) -> list[list[str]]:
    """One row per engine. Translations are compared with those of the first engine."""
    found: dict[str, list[list[str]]] = {}

    def run(name: str) -> None:
        found[name] = engines[name](beam_size)

    tasks = {name: functools.partial(run, name) for name in engines}
    seconds = time_interleaved(tasks, ROUNDS - 1, CPU, keep_warmup=True)
    search = "greedy" if beam_size == 1 else f"beam {beam_size}"
    expected, rows = next(iter(found.values())), []
    for name, translations in found.items():
        different = [i for i, (a, b) in enumerate(zip(expected, translations, strict=True)) if a != b]
        for i in different if "float32" in name else []:
            print(f"{search}, sentence {i}:")
            print_scored(translator, sentences[i], {"this project": expected[i], "CTranslate2": translations[i]})
        ids = (token_ids(translator, tokens) for tokens in translations)
        bleu = score([translator.tokenizer_tgt.decode(each) for each in ids], references, bleu_tokenizer)["bleu"]
        speed = len(sentences) / statistics.median(seconds[name])
        identical = f"{len(sentences) - len(different)} of {len(sentences)}"
        rows.append([name, search, f"{speed:.0f}", identical, f"{bleu:.2f}"])
    return rows


def print_scored(translator: Translator, sentence: str, translations: dict[str, list[str]]) -> None:
    """Prints translations with their log-probabilities in nats under this project's model in fp32."""
    for name, tokens in translations.items():
        log_p = log_probability(translator, sentence, token_ids(translator, tokens))
        print(f"    {name}, log-probability {log_p:.5f}: {' '.join(tokens)}")


def token_ids(translator: Translator, tokens: list[str]) -> list[int]:
    return [translator.tokenizer_tgt.token_to_id(token) for token in tokens]


if __name__ == "__main__":
    main()
