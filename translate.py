"""Translation: search over a step-by-step decoder, a trained run as `Translator`, the command line.

B  sentences in the batch    N  of them still unfinished    S  source length    V  target vocabulary

python translate.py "I can eat an apple."
python translate.py < sentences.en > sentences.it
"""

import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Protocol

import torch
import tyro
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from checkpoint import load_newest, load_weights
from config import Config, InputError, load_config, newest_run, parse, run_command
from corpus import read_lines
from dataset import EOS, PAD, SOS, UNK, load_tokenizer, padding_mask, tokenizer_path
from model import Transformer, build_transformer

DROP_EVERY = 4  # steps between looks at which sentences are finished; each look makes a GPU wait


class StepDecoder(Protocol):
    """What a search sees of a model: the next token's logits, and which sentences go on."""

    def step(self, ids: Tensor) -> Tensor:
        """The newest token of each sentence (N,): logits of the next one (N, V)."""

    def select(self, rows: Tensor) -> None:
        """Goes on with these rows (M,) of the N, in this order."""


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

    def select(self, rows: Tensor) -> None:
        self.src_mask, self.encoder_output = self.src_mask[rows], self.encoder_output[rows]
        for caches in self.caches:
            for cache in caches:
                cache.select(rows)


def greedy_decode(decoder: StepDecoder, max_lengths: Tensor) -> list[list[int]]:
    """The likeliest token at every step, until [EOS] or the sentence's limit (B,); ids without [SOS] and [EOS]."""
    device, longest = max_lengths.device, int(max_lengths.max())
    written = torch.full((len(max_lengths), longest), EOS, device=device)  # (B, longest)
    alive = torch.arange(len(max_lengths), device=device)  # (N,), rows of `written`
    ids = torch.full_like(alive, SOS)
    finished = torch.zeros_like(alive, dtype=torch.bool)
    for t in range(longest):
        ids = decoder.step(ids).argmax(dim=-1)
        written[alive, t] = ids
        finished |= (ids == EOS) | (max_lengths[alive] <= t + 1)
        if (t + 1) % DROP_EVERY == 0:
            going = (~finished).nonzero().squeeze(1)
            if len(going) == 0:
                break
            if len(going) < len(alive):
                alive, ids, finished = alive[going], ids[going], finished[going]
                decoder.select(going)
    rows = [row[:limit] for row, limit in zip(written.tolist(), max_lengths.tolist(), strict=True)]
    return [row[: row.index(EOS)] if EOS in row else row for row in rows]


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


class Translator:
    """A trained run, ready to translate: `Translator.load("weights/toy.en-it").translate(["I sleep."])`."""

    def __init__(self, model: Transformer, config: Config, tokenizer_src: Tokenizer, tokenizer_tgt: Tokenizer):
        self.model, self.config = model, config
        self.tokenizer_src, self.tokenizer_tgt = tokenizer_src, tokenizer_tgt

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @classmethod
    def load(cls, run_dir: str | Path = "", device: str = "auto") -> "Translator":
        """The newest checkpoint of a run; of the run trained last where none is named."""
        config = load_config(run_dir or newest_run())
        found = load_newest(config.folder)
        if found is None:
            raise InputError(
                f"the run {config.folder} has no checkpoint yet; "
                f"train it with python train.py --run-dir {config.folder}"
            )
        check_tokenizers(config, found[1], found[0])
        tokenizers = [load_tokenizer(tokenizer_path(config, lang)) for lang in (config.lang_src, config.lang_tgt)]
        model = get_model(config, *(t.get_vocab_size() for t in tokenizers))
        try:
            load_weights(model, found[1]["model"])
        except RuntimeError:
            raise InputError(
                f"{found[0]} does not fit the config.json and tokenizers beside it; copy the run's folder again"
            ) from None
        return cls(model.to(get_device(device)).eval(), config, *tokenizers)

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

    def translate(self, sentences: list[str], batch_tokens: int = 4_096, progress: bool = False) -> list[str]:
        """Translations in the order given. Blank sentences stay blank; like lengths share a batch."""
        translations = [""] * len(sentences)
        encoded = {i: self.encode(s) for i, s in enumerate(sentences) if s.strip()}
        order = sorted(encoded, key=lambda i: len(encoded[i]), reverse=True)
        bar = tqdm(total=len(order), unit="sentence", desc="Translating", disable=not progress, leave=False)
        while order:
            size = max(1, batch_tokens // len(encoded[order[0]]))
            batch, order = order[:size], order[size:]
            for i, ids in zip(batch, self.search([encoded[i] for i in batch]), strict=True):
                translations[i] = self.tokenizer_tgt.decode(ids)
            bar.update(len(batch))
        bar.close()
        return translations

    def padded(self, sources: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Source ids as one tensor (B, S), and how many tokens each translation may have (B,).

        That is twice its source and ten more.
        """
        width = max(map(len, sources))
        source = torch.tensor([ids + [PAD] * (width - len(ids)) for ids in sources], device=self.device)
        limits = [min(2 * len(ids) + 10, self.config.seq_len) for ids in sources]
        return source, torch.tensor(limits, device=self.device)

    @torch.inference_mode()
    def search(self, sources: list[list[int]]) -> list[list[int]]:
        """Target ids of a batch of source ids, by greedy search."""
        source, limits = self.padded(sources)
        return greedy_decode(CachedDecoder(self.model, source, int(limits.max())), limits)

    def unknown_words(self, sentence: str) -> list[str]:
        """The words of a sentence that the run's vocabulary does not have."""
        encoding = self.tokenizer_src.encode(sentence)
        return [sentence[a:b] for i, (a, b) in zip(encoding.ids, encoding.offsets, strict=True) if i == UNK]


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


def translate_lines(translator: Translator, lines: Iterable[str], at_once: int) -> Iterator[str]:
    """Lines in, lines out, in order. A line too long for the run comes out blank, with a warning."""
    lines, done = iter(lines), 0
    while chunk := list(islice(lines, at_once)):
        yield from translator.translate(blank_long(translator, chunk, done))
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


def command(
    sentence: Annotated[str | None, tyro.conf.Positional] = None,
    /,
    run_dir: str = "",
    device: str = "auto",
) -> None:
    """Translates a sentence, or the lines of standard input.

    Args:
        sentence: what to translate; without it, lines on stdin become lines on stdout
        run_dir: the run's folder; empty: the run trained last
        device: auto, cuda, mps or cpu
    """
    translator = Translator.load(run_dir, device)
    if sentence is not None:
        (translation,) = translator.translate([sentence])
        if unknown := translator.unknown_words(sentence):
            print(f"warning: this run has never seen {', '.join(unknown)}", file=sys.stderr)
        print(translation)
        return
    if sys.stdin.isatty():
        print("Type a sentence, then Enter; Ctrl-D ends.", file=sys.stderr)
    for line in translate_lines(translator, read_lines(sys.stdin.buffer, "stdin"), 1 if sys.stdin.isatty() else 512):
        print(line, flush=True)


if __name__ == "__main__":
    run_command(lambda argv: parse(command, argv))
