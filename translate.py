"""Translation: a trained run as `Translator`, and the command line.

B  sentences in the batch    N  of them still unfinished    S  source length    V  target vocabulary

python translate.py "I can eat an apple."
python translate.py < sentences.en > sentences.it
"""

import math
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import safetensors.torch
import torch
import tyro
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from compute.ops import keep_freed_memory, use_bf16_products
from config import WEIGHTS_FOLDER, Config, InputError, load_config, newest_run, parse, run_command
from corpora.sources import read_lines
from dataset import EOS, PAD, SOS, UNK, load_tokenizer, padding_mask, tokenizer_path
from model import Transformer, build_transformer
from runs.checkpoint import load_chosen, load_weights
from search import Hypothesis, beam_search, greedy_decode

WEIGHTS_FILE = "model.safetensors"  # what export.py writes for the Hub


# Parameters, on a CPU: training the base model (49 million) takes half the time in bf16, Multi30k's (2.6 million) 0.64
# times, the toy's (0.9 million) 0.75 times; but that one should be the same on every CPU (benchmarks/README.md).
BF16_FROM = 2_000_000


class CachedDecoder:
    """A Transformer as a StepDecoder: the encoder runs once, and each step computes one new position."""

    def __init__(self, model: Transformer, source: Tensor, max_length: int):
        self.model = model
        self.src_mask = padding_mask(source)  # (N, 1, 1, S)
        self.encoder_output = model.encode(source, self.src_mask)  # (N, S, D)
        self.caches = model.new_caches(max_length)

    def step(self, ids: Tensor) -> Tensor:
        x = self.model.decode(self.encoder_output, self.src_mask, ids.unsqueeze(1), None, self.caches)
        return self.model.project(x).squeeze(1)  # (N, 1, D) -> (N, V)

    def select(self, rows: Tensor, sentences: Tensor | None = None) -> None:
        for own, cross in self.caches:
            own.select(rows)
            if sentences is not None:
                cross.select(sentences)
        if sentences is not None:
            self.src_mask, self.encoder_output = self.src_mask[sentences], self.encoder_output[sentences]


def get_model(config: Config, vocab_src_len: int, vocab_tgt_len: int) -> Transformer:
    return build_transformer(vocab_src_len, vocab_tgt_len, **config.model_arguments())


def get_device(name: str = "auto") -> torch.device:
    """The device asked for; or CUDA, then Apple's MPS, then the CPU."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(candidate for candidate, is_there in there.items() if is_there)
    if name not in there:
        raise InputError(f"no device {name!r}; choose one of auto, {', '.join(there)}")
    if not there[name]:
        raise InputError(f"no {name} device on this machine; use --device auto")
    return torch.device(name)


def choose_precision(wanted: str, device: torch.device, model: Transformer) -> str:
    """What is wanted; for auto, bf16 where the device has units for it: on a CPU from a size on where it pays."""
    if wanted not in ("auto", "fp32", "bf16"):
        raise InputError(f"no precision {wanted!r}; choose one of auto, fp32, bf16")
    if wanted != "auto":
        return wanted
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    elif device.type == "cpu" and sum(p.numel() for p in model.parameters()) >= BF16_FROM:
        units = getattr(torch.cpu, "get_capabilities", dict)()  # not in every version of the range
        fast = any(units.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return "bf16" if fast else "fp32"


class Translator:
    """A trained run, ready to translate: `Translator.load("weights/toy.en-it").translate(["I sleep."])`."""

    def __init__(
        self, model: Transformer, config: Config, tokenizer_src: Tokenizer, tokenizer_tgt: Tokenizer, weights: str = ""
    ):
        self.model, self.config, self.weights = model, config, weights  # weights: the name of their file
        self.tokenizer_src, self.tokenizer_tgt = tokenizer_src, tokenizer_tgt
        self.precision = "fp32"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @classmethod
    def load(
        cls,
        run_dir: str | Path = "",
        device: str = "auto",
        weights: str = "best",
        average: int = 1,
        precision: str = "fp32",
    ) -> "Translator":
        """A run, or what export.py made of one; of the Hugging Face Hub, where no folder has that name.

        Without a name it is the run trained last.
        `weights` is best (on the validation set, as `best_by` says), latest, or an epoch's number;
        with `average` those of that many epochs are averaged, the best or the latest ones.
        `precision` is fp32; bf16, whose products with weights are faster where the device has units for it
        and whose log-probabilities are off by some thousandths a token; or auto, the faster one.
        """
        keep_freed_memory()
        config = load_config(local_folder(run_dir) if run_dir else newest_run())
        path = config.folder / WEIGHTS_FILE
        exported = path.is_file()
        if exported and (weights, average) != ("best", 1):
            raise InputError(f"{config.folder} holds the weights of one export; leave --weights and --average out")
        if not exported:
            path, state = load_chosen(config, weights, average)
            check_tokenizers(config, state, path)
        tokenizers = [load_tokenizer(tokenizer_path(config, lang)) for lang in (config.lang_src, config.lang_tgt)]
        model = get_model(config, *(t.get_vocab_size() for t in tokenizers))
        try:
            safetensors.torch.load_model(model, path) if exported else load_weights(model, state["model"])
        except (RuntimeError, safetensors.SafetensorError):
            raise InputError(
                f"{path} is damaged or does not fit the config.json and tokenizers beside it; copy the folder again"
            ) from None
        model = model.to(get_device(device)).eval()
        translator = cls(model, config, *tokenizers, path.name)
        translator.precision = choose_precision(precision, translator.device, model)
        if translator.precision == "bf16":
            use_bf16_products(model)
        return translator

    def encode(self, sentence: str) -> list[int]:
        """Ids with [SOS] and [EOS]. Raises InputError past the model's seq_len."""
        try:
            ids = [SOS, *self.tokenizer_src.encode(sentence).ids, EOS]
        except TypeError:  # bytes of the command line that were no text
            raise InputError(f"{sentence!r} is not UTF-8; give text in that encoding") from None
        if len(ids) > self.config.seq_len:
            raise InputError(
                f"a sentence of {len(ids)} tokens is longer than the {self.config.seq_len} (seq_len) "
                f"this run can read; split it: {sentence[:40]!r}…"
            )
        return ids

    def translate(
        self,
        sentences: list[str],
        beam_size: int = 1,
        alpha: float = 0.6,
        batch_tokens: int = 8_192,
        progress: bool = False,
    ) -> list[str]:
        """Translations in the order given; blank sentences stay blank. A beam of 1 is greedy search."""
        translations = [""] * len(sentences)
        for batch, sources in self.batches(sentences, batch_tokens // beam_size, progress):
            for i, ids in zip(batch, self.search(sources, beam_size, alpha), strict=True):
                translations[i] = self.tokenizer_tgt.decode(ids)
        return translations

    def hypotheses(
        self, sentences: list[str], beam_size: int, alpha: float = 0.6, n_best: int = 1, batch_tokens: int = 8_192
    ) -> list[list[Hypothesis]]:
        """The n best translations of each sentence, as ids with their log-probabilities; none of a blank one."""
        found: list[list[Hypothesis]] = [[] for _ in sentences]
        for batch, sources in self.batches(sentences, batch_tokens // beam_size):
            for i, hypotheses in zip(batch, self.beam(sources, beam_size, alpha, n_best), strict=True):
                found[i] = hypotheses
        return found

    def batches(
        self, sentences: list[str], batch_tokens: int, progress: bool = False
    ) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Positions and source ids of the sentences that are not blank; like lengths share a batch."""
        encoded = {i: self.encode(s) for i, s in enumerate(sentences) if s.strip()}
        order = sorted(encoded, key=lambda i: len(encoded[i]), reverse=True)
        bar = tqdm(total=len(order), unit="sentence", desc="Translating", disable=not progress, leave=False)
        while order:
            size = max(1, batch_tokens // len(encoded[order[0]]))
            batch, order = order[:size], order[size:]
            yield batch, [encoded[i] for i in batch]
            bar.update(len(batch))
        bar.close()

    def padded(self, sources: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Source ids as one tensor (B, S), and how many tokens each translation may have (B,).

        That is twice its source and ten more.
        """
        width = max(map(len, sources))
        source = torch.tensor([ids + [PAD] * (width - len(ids)) for ids in sources], device=self.device)
        limits = [min(2 * len(ids) + 10, self.config.seq_len) for ids in sources]
        return source, torch.tensor(limits, device=self.device)

    @torch.inference_mode()
    def search(self, sources: list[list[int]], beam_size: int = 1, alpha: float = 0.6) -> list[list[int]]:
        """Target ids of a batch of source ids, by greedy search or by that of a beam."""
        if beam_size > 1:
            return [hypotheses[0].ids for hypotheses in self.beam(sources, beam_size, alpha)]
        source, limits = self.padded(sources)
        return greedy_decode(CachedDecoder(self.model, source, int(limits.max())), limits)

    @torch.inference_mode()
    def beam(
        self, sources: list[list[int]], beam_size: int, alpha: float = 0.6, n_best: int = 1
    ) -> list[list[Hypothesis]]:
        """The n best hypotheses of a batch of source ids."""
        source, limits = self.padded(sources)
        return beam_search(CachedDecoder(self.model, source, int(limits.max())), limits, beam_size, alpha, n_best)

    def unknown_words(self, sentence: str) -> list[str]:
        """The words of a sentence that the run's vocabulary does not have."""
        encoding = self.tokenizer_src.encode(sentence)
        return [sentence[a:b] for i, (a, b) in zip(encoding.ids, encoding.offsets, strict=True) if i == UNK]


def local_folder(name: str | Path) -> Path:
    """The folder of that name; or of the Hub's repository NAME/NAME, downloaded once."""
    is_path = Path(name).parent.is_dir() or Path(name).parent == WEIGHTS_FOLDER
    if is_path or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return Path(name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=[WEIGHTS_FILE, "*.json"]))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"no folder {name}, and nothing of that name on the Hugging Face Hub ({reason})") from None


def check_tokenizers(config: Config, state: dict, path: Path) -> None:
    """The tokenizers in the run's folder are those that the checkpoint was trained with."""
    for lang, text in zip((config.lang_src, config.lang_tgt), state["tokenizers"], strict=True):
        file = tokenizer_path(config, lang)
        if load_tokenizer(file).to_str() != Tokenizer.from_str(text).to_str():
            raise InputError(
                f"{file} is not the tokenizer that {path.name} was trained with; copy the run's folder again"
            )


def translate(sentence: str, run_dir: str = "") -> str:
    """One sentence through a trained run."""
    return Translator.load(run_dir).translate([sentence])[0]


def translate_lines(
    translator: Translator, lines: Iterable[str], at_once: int, beam_size: int = 1, alpha: float = 0.6
) -> Iterator[str]:
    """Lines in, lines out, in order. A line too long for the run comes out blank, with a warning."""
    for _, chunk in readable_chunks(translator, lines, at_once):
        yield from translator.translate(chunk, beam_size, alpha)


def n_best_lines(
    translator: Translator, lines: Iterable[str], at_once: int, beam_size: int, alpha: float, n_best: int
) -> Iterator[str]:
    """For each line its hypotheses: number of the line, score, log-probability and text, between tabs."""
    for done, chunk in readable_chunks(translator, lines, at_once):
        found = translator.hypotheses(chunk, beam_size, alpha, n_best)
        for number, hypotheses in enumerate(found, start=done + 1):
            for h in hypotheses:
                text = translator.tokenizer_tgt.decode(h.ids)
                yield f"{number}\t{h.score:.4f}\t{h.log_probability:.4f}\t{text}"


def readable_chunks(translator: Translator, lines: Iterable[str], at_once: int) -> Iterator[tuple[int, list[str]]]:
    """Some lines at a time, those too long made blank, each with the number of lines that came before."""
    lines, done = iter(lines), 0
    while chunk := list(islice(lines, at_once)):
        yield done, blank_long(translator, chunk, done)
        done += len(chunk)


def blank_long(translator: Translator, lines: list[str], done: int = 0) -> list[str]:
    """The lines with those too long for the run made blank, each with a warning; `done` lines came before."""
    readable = list(lines)
    for i, line in enumerate(lines):
        try:
            translator.encode(line)
        except InputError as error:
            print(f"warning: line {done + i + 1} is left blank: {error}", file=sys.stderr)
            readable[i] = ""
    return readable


def check_search(beam_size: int, length_penalty: float, n_best: int = 1) -> None:
    if beam_size < 1:
        raise InputError(f"--beam-size is {beam_size}; give 1 for greedy search, or more")
    if not 0 <= length_penalty < math.inf:
        raise InputError(f"--length-penalty is {length_penalty}; give 0 or more")
    if not 1 <= n_best <= beam_size:
        raise InputError(f"--n-best is {n_best}; give 1 to {beam_size}, which is --beam-size")


def command(
    sentence: Annotated[str | None, tyro.conf.Positional] = None,
    /,
    run_dir: str = "",
    beam_size: int = 1,
    length_penalty: float = 0.6,
    n_best: int = 0,
    weights: str = "best",
    average: int = 1,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> None:
    """Translates a sentence, or the lines of standard input.

    Args:
        sentence: what to translate; without it, lines on stdin become lines on stdout
        run_dir: the run's folder; empty: the run trained last
        beam_size: hypotheses kept at every step; 1: greedy search
        length_penalty: 0 favours short translations, 1 and more long ones
        n_best: print so many hypotheses a line, with score and log-probability
        weights: best (on the validation set), latest, or an epoch's number
        average: average the weights of so many epochs, the best or the latest
        device: auto, cuda, mps or cpu
        precision: of the products with weights: fp32, bf16, or auto, the faster one for device and model
    """
    check_search(beam_size, length_penalty, n_best or 1)
    translator = Translator.load(run_dir, device, weights, average, precision)
    if sentence is not None:
        translator.encode(sentence)  # one too long is an error here, not a blank line
        if unknown := translator.unknown_words(sentence):
            print(f"warning: this run has never seen {', '.join(unknown)}", file=sys.stderr)
        lines, at_once = [sentence], 1
    else:
        if sys.stdin.isatty():
            print("Type a sentence, then Enter; Ctrl-D ends.", file=sys.stderr)
        lines, at_once = read_lines(sys.stdin.buffer, "stdin"), 1 if sys.stdin.isatty() else 512
    if n_best:
        for line in n_best_lines(translator, lines, at_once, beam_size, length_penalty, n_best):
            print(line, flush=True)
    else:
        for line in translate_lines(translator, lines, at_once, beam_size, length_penalty):
            print(line, flush=True)


if __name__ == "__main__":
    run_command(lambda argv: parse(command, argv))
