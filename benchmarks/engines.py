"""A trained run in this project and, exported, in CTranslate2: the same words? how fast? what does int8 cost?

    python benchmarks/engines.py --run-dir weights/multi30k.tok.1 --sentences 1000 --bleu-tokenizer none

Translates the run's test set greedily and with a beam of 5, without length penalty (the two programs define it
differently). Prints how many translations are the same token by token, how far apart the log-probabilities
of the others are, sentences a second, and BLEU; for this project also in bf16, for CTranslate2 in int8.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import ctranslate2
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from workload import machine, table

from corpora.sources import load_split
from dataset import EOS
from evaluate import score
from experiments import step_logits
from export import to_ctranslate2
from translate import Translator

ROUNDS = 3
BATCH_TOKENS = 8_192  # over the beam size


class Exported:
    """The run as a CTranslate2 model."""

    def __init__(self, translator: Translator, folder: Path, quantization: str):
        to_ctranslate2(translator, folder, quantization)
        threads = torch.get_num_threads()
        self.engine = ctranslate2.Translator(
            str(folder), "cpu", inter_threads=1, intra_threads=threads, compute_type=quantization
        )
        self.translator = translator

    def translate(self, sentences: list[str], beam: int) -> list[list[str]]:
        """Tokens, each translation at most as long as this project would make it."""
        tokens = [self.translator.tokenizer_src.encode(s).tokens for s in sentences]
        longest = max(len(t) for t in tokens)
        results = self.engine.translate_batch(
            tokens,
            beam_size=beam,
            length_penalty=0,
            max_batch_size=BATCH_TOKENS // beam,
            batch_type="tokens",
            max_decoding_length=min(2 * (longest + 2) + 10, self.translator.config.seq_len),
        )
        return [result.hypotheses[0] for result in results]


def ours(translator: Translator, sentences: list[str], beam: int) -> list[list[str]]:
    if beam == 1:
        found: list[list[int]] = [[] for _ in sentences]
        for batch, sources in translator.batches(sentences, BATCH_TOKENS):
            for i, ids in zip(batch, translator.search(sources), strict=True):
                found[i] = ids
    else:
        hypotheses = translator.hypotheses(sentences, beam, alpha=0.0, batch_tokens=BATCH_TOKENS)
        found = [best[0].ids for best in hypotheses]
    return [[translator.tokenizer_tgt.id_to_token(i) for i in ids] for ids in found]


def log_probability(translator: Translator, sentence: str, tokens: list[str]) -> float:
    """Of a translation, by this project's model, in nats."""
    ids = [translator.tokenizer_tgt.token_to_id(token) for token in tokens]
    log_p = step_logits(translator, sentence, ids).log_softmax(-1)
    return log_p[torch.arange(len(ids) + 1), torch.tensor([*ids, EOS])].sum().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--bleu-tokenizer", default="13a")
    parser.add_argument("--weights", default="best")
    arguments = parser.parse_args()
    translator = Translator.load(arguments.run_dir, "cpu", arguments.weights)
    pairs = load_split(translator.config, "test").select(range(arguments.sentences))
    sentences, references = list(pairs["src"]), list(pairs["tgt"])
    print(f"{machine(torch.device('cpu'))}, CTranslate2 {ctranslate2.__version__}, {len(sentences)} sentences\n")
    with tempfile.TemporaryDirectory() as folder:
        engines = {name: Exported(translator, Path(folder) / name, name) for name in ("float32", "int8")}
        quick = Translator.load(arguments.run_dir, "cpu", arguments.weights, precision="bf16")
        ways = {
            "this project, float32": lambda beam: ours(translator, sentences, beam),
            "this project, bf16": lambda beam: ours(quick, sentences, beam),
        }
        for name, engine in engines.items():
            ways[f"CTranslate2, {name}"] = lambda beam, engine=engine: engine.translate(sentences, beam)
        rows = [row for beam in (1, 5) for row in compare(ways, beam, translator, sentences, references, arguments)]
    print(table(rows, ["", "search", "sentences/s", "the same tokens", "BLEU"]))


def compare(ways: dict, beam: int, translator: Translator, sentences: list, references: list, arguments) -> list[list]:
    seconds, found = {name: [] for name in ways}, {}
    for _ in range(ROUNDS):
        for name, translate in ways.items():
            begun = time.perf_counter()
            found[name] = translate(beam)
            seconds[name].append(time.perf_counter() - begun)
    base, rows = next(iter(found.values())), []
    for name, tokens in found.items():
        differ = [i for i, (a, b) in enumerate(zip(base, tokens, strict=True)) if a != b]
        for i in differ if "float32" in name else []:
            pair = (log_probability(translator, sentences[i], each[i]) for each in (base, tokens))
            print(f"beam {beam}, sentence {i}: log-probability {next(pair):.5f} here, {next(pair):.5f} there")
            print("   ", " ".join(base[i]), "\n   ", " ".join(tokens[i]))
        ids = [[translator.tokenizer_tgt.token_to_id(token) for token in each] for each in tokens]
        bleu = score([translator.tokenizer_tgt.decode(i) for i in ids], references, arguments.bleu_tokenizer)["bleu"]
        speed = len(sentences) / statistics.median(seconds[name])
        same = f"{len(sentences) - len(differ)} of {len(sentences)}"
        rows.append([name, "greedy" if beam == 1 else f"beam {beam}", f"{speed:.0f}", same, f"{bleu:.2f}"])
    return rows


if __name__ == "__main__":
    main()
