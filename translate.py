"""Translation with a trained run: `Translator`, and the command line.

B  sentences still being translated    S  source length          D  d_model
W  beam size                           T  target length so far   V  target vocabulary

python translate.py "I can eat an apple."
python translate.py < sentences.en > sentences.it
"""

# config comes first: it makes Ctrl-C quiet during the imports below
from config import INHERITED_FIELDS, Config, InputError, changed_settings, counted, parse, run_command

# isort: split
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import safetensors.torch
import torch
import tyro
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from compute.device import DTYPES, choose_precision, explained_out_of_memory, get_device, keep_freed_memory
from compute.ops import use_low_precision_products
from compute.threads import share_cores
from corpora.alignment import lexical_consistency, merge_weights, pharaoh, strongest_links
from corpora.files import read_lines
from corpora.sources import load_split
from dataset import EOS, PAD, SOS, UNK, load_tokenizer, max_characters, padding_mask, word_indices
from model import LayerCache, Transformer, causal_mask, get_model
from runs.checkpoint import not_finite, require_parts
from runs.folder import RunFolder
from search import EnsembleDecoder, Hypothesis, StepDecoder, beam_search, greedy_decode

MAX_LENGTH_PENALTY = 10  # higher powers of the length overflow in fp32
# Source tokens per batch, times the beam size. With twice as many, a CPU translates 10% to 20% faster with a beam of 5
# and a d_model of 128, and 20% slower with a d_model of 512 (benchmarks/README.md).
BATCH_TOKENS, SMALL_MODEL_BATCH_TOKENS = 8_192, 16_384
SMALL_D_MODEL = 128

# ---------------------------------------------------------------------------- the model, one step at a time


class CachedDecoder:
    """A StepDecoder with caches. The encoder runs once; each step computes one target position.

    The W hypotheses of a sentence share its cached keys and values, which are never reordered: a mask says which of the
    K = W x position entries are the tokens of each hypothesis.
    """

    def __init__(self, model: Transformer, source: Tensor, max_length: int):
        self.model, self.max_length, self.position = model, max_length, 0
        self.src_mask = padding_mask(source)  # (B, 1, 1, S)
        self.encoder_output = model.encode(source, self.src_mask)  # (B, S, D)
        self.caches: list[LayerCache] = []  # created in the first step, when W is known
        self.mask: Tensor | None = None  # (B, W, K); None if W is 1

    def step(self, ids: Tensor) -> Tensor:
        ids = ids.view(len(self.src_mask), -1)  # (B W,) -> (B, W)
        B, W = ids.shape
        if not self.caches:
            self.caches = self.model.new_caches(self.max_length * W)
        if W > 1:
            own = torch.eye(W, dtype=torch.bool, device=ids.device).expand(B, W, W)
            self.mask = own if self.mask is None else torch.cat([self.mask, own], 2)
        mask = None if self.mask is None else self.mask.unsqueeze(1)  # (B, W, K) -> (B, 1, W, K)
        x = self.model.decode(self.encoder_output, self.src_mask, ids, mask, self.caches, self.position)
        self.position += 1
        return self.model.project(x).flatten(0, 1)  # (B, W, D) -> (B W, V)

    def select(self, rows: Tensor, sentences: Tensor | None = None) -> None:
        if self.mask is not None:
            self.mask = self.mask.flatten(0, 1)[rows].unflatten(0, (-1, self.mask.size(1)))
        if sentences is not None:
            for cache in self.caches:
                cache.self_attention.select(sentences)
                cache.cross_attention.select(sentences)
            self.src_mask, self.encoder_output = self.src_mask[sentences], self.encoder_output[sentences]


class UncachedDecoder:
    """A StepDecoder without caches: each step computes all target positions again.

    Slower, but interventions that depend on all positions, or that change between steps, take full effect.
    """

    def __init__(self, model: Transformer, source: Tensor):
        self.model = model
        self.src_mask = padding_mask(source)
        self.encoder_output = model.encode(source, self.src_mask)
        self.target: Tensor | None = None  # (B W, T)

    def step(self, ids: Tensor) -> Tensor:
        ids = ids.unsqueeze(1)
        self.target = ids if self.target is None else torch.cat([self.target, ids], 1)
        mask = causal_mask(self.target.size(1), ids.device)
        x = self.model.decode(self.encoder_output, self.src_mask, self.target, mask)
        return self.model.project(x[:, -1])  # (B W, D) -> (B W, V)

    def select(self, rows: Tensor, sentences: Tensor | None = None) -> None:
        self.target = self.target[rows]
        if sentences is not None:
            self.src_mask, self.encoder_output = self.src_mask[sentences], self.encoder_output[sentences]


# ---------------------------------------------------------------------------- a trained run


class Translator:
    """A trained run, ready to translate: `Translator.load("weights/toy.en-it").translate(["I sleep."])`."""

    def __init__(
        self, model: Transformer, config: Config, tokenizer_src: Tokenizer, tokenizer_tgt: Tokenizer, weights: str = ""
    ):
        self.model, self.config, self.weights = model, config, weights  # weights: name of their file
        self.folder = RunFolder.of(config)
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
        """Loads a run, or an export of one, from its folder or from a Hugging Face Hub repository NAME/NAME.

        Without `run_dir`, the most recently trained run. `weights` is best (by the validation score `best_by`), latest
        or an epoch number. With `average` above 1, the weights of that many epochs, the best or the latest, are
        averaged. `precision` is fp32, bf16, fp16 or auto (see `choose_precision`); linear layers in bf16 change
        log-probabilities by a few thousandths per token. Raises InputError for a missing, damaged or inconsistent run.
        """
        keep_freed_memory()
        share_cores()
        folder = RunFolder.find(run_dir)
        config = folder.load_config()
        path, is_export = folder.exported_weights, folder.exported_weights.is_file()
        if is_export and (weights, average) != ("best", 1):
            raise InputError(f"{folder} holds one set of exported weights; omit --weights and --average")
        if is_export:
            folder.verify_export()
        if not is_export:
            path, loaded, state = folder.load_weights(weights, average, config.best_by)
            check_same_model(config, state, path)
            check_tokenizers(folder, config, state, path)
        tokenizers = [load_tokenizer(folder.tokenizer_file(lang)) for lang in (config.lang_src, config.lang_tgt)]
        model = get_model(config, *(tokenizer.get_vocab_size() for tokenizer in tokenizers))
        try:
            safetensors.torch.load_model(model, path) if is_export else load_state_dict(model, loaded)
        except (RuntimeError, safetensors.SafetensorError):
            raise InputError(
                f"{path} is damaged or does not match config.json and the tokenizers beside it; copy the folder again"
            ) from None
        if name := not_finite({"model": model.state_dict()}):
            raise InputError(f"{path} is damaged: {name} is not finite; export the run again")
        model = model.to(get_device(device)).eval()
        translator = cls(model, config, *tokenizers, path.name)
        translator.use_precision(precision)
        return translator

    def use_precision(self, precision: str) -> None:
        """Casts the weights of linear layers to fp32, bf16, fp16 or auto; it cannot be undone."""
        self.precision = choose_precision(precision, self.device, self.model)
        if self.precision != "fp32":
            use_low_precision_products(self.model, DTYPES[self.precision])

    def encode(self, sentence: str) -> list[int]:
        """Token ids with [SOS] and [EOS]. Raises InputError for more than `seq_len` tokens or undecodable text."""
        if len(sentence) > (limit := max_characters(self.config.seq_len)):
            raise InputError(f"a sentence of {len(sentence):,} characters exceeds the limit of {limit:,}; split it")
        try:
            ids = [SOS, *self.tokenizer_src.encode(sentence).ids, EOS]
        except TypeError:  # undecodable bytes on the command line
            raise InputError(f"{sentence!r} is not UTF-8; give text in that encoding") from None
        if len(ids) > self.config.seq_len:
            raise InputError(
                f"a sentence of {len(ids)} tokens exceeds the limit of {self.config.seq_len} (seq_len); "
                f"split it: {sentence[:40]!r}…"
            )
        return ids

    def fits(self, sentence: str, target: str = "") -> bool:
        """Whether the model can read a sentence and a target: they have no more than `seq_len` tokens."""
        try:
            self.encode(sentence)
        except InputError:
            return False
        return len(self.tokenizer_tgt.encode(target)) < self.config.seq_len

    def unknown_words(self, sentence: str) -> list[str]:
        """The words of a sentence that are not in the source vocabulary; with a BPE tokenizer none."""
        encoding = self.tokenizer_src.encode(sentence)
        return [sentence[a:b] for i, (a, b) in zip(encoding.ids, encoding.offsets, strict=True) if i == UNK]

    def translate(
        self,
        sentences: list[str],
        beam_size: int = 1,
        length_penalty: float = 0.6,
        no_repeat_ngram: int = 0,
        batch_tokens: int = 0,
        show_progress: bool = False,
        use_cache: bool = True,
    ) -> list[str]:
        """Translations in the order of the sentences; blank sentences stay blank. A beam size of 1 is greedy search.

        With `no_repeat_ngram` above 0, no sequence of that many tokens occurs twice in a translation. A batch holds up
        to batch_tokens / beam_size source tokens; 0 chooses a size that suits the model.

        Raises InputError for sentences beyond `seq_len`.
        """
        search = (beam_size, length_penalty, no_repeat_ngram)
        found = self.translate_ids(sentences, *search, batch_tokens, show_progress, use_cache)
        return [self.tokenizer_tgt.decode(ids) for ids in found]

    def translate_ids(
        self,
        sentences: list[str],
        beam_size: int = 1,
        length_penalty: float = 0.6,
        no_repeat_ngram: int = 0,
        batch_tokens: int = 0,
        show_progress: bool = False,
        use_cache: bool = True,
    ) -> list[list[int]]:
        """The same as target ids, without [SOS] and [EOS]; none for a blank sentence."""
        translations: list[list[int]] = [[] for _ in sentences]
        for positions, sources in self.batches(sentences, beam_size, batch_tokens, show_progress):
            with within_memory(sources):
                targets = self.search(sources, beam_size, length_penalty, no_repeat_ngram, use_cache)
            for i, ids in zip(positions, targets, strict=True):
                translations[i] = ids
        return translations

    def hypotheses(
        self,
        sentences: list[str],
        beam_size: int,
        length_penalty: float = 0.6,
        no_repeat_ngram: int = 0,
        n_best: int = 1,
        batch_tokens: int = 0,
    ) -> list[list[Hypothesis]]:
        """The `n_best` translations of each sentence, best first; none for a blank sentence."""
        results: list[list[Hypothesis]] = [[] for _ in sentences]
        for positions, sources in self.batches(sentences, beam_size, batch_tokens):
            with within_memory(sources):
                found = self.beam_search(sources, beam_size, length_penalty, no_repeat_ngram, n_best)
            for i, hypotheses in zip(positions, found, strict=True):
                results[i] = hypotheses
        return results

    def batches(
        self, sentences: list[str], beam_size: int, batch_tokens: int = 0, show_progress: bool = False
    ) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Batches of the sentences that are not blank, longest first: their positions and their source ids."""
        is_small = self.config.d_model <= SMALL_D_MODEL
        batch_tokens = (batch_tokens or (SMALL_MODEL_BATCH_TOKENS if is_small else BATCH_TOKENS)) // beam_size
        encoded = {i: self.encode(s) for i, s in enumerate(sentences) if s.strip()}
        order = sorted(encoded, key=lambda i: len(encoded[i]), reverse=True)
        bar = tqdm(total=len(order), unit="sentence", desc="Translating", disable=not show_progress, leave=False)
        while order:
            size = max(1, batch_tokens // len(encoded[order[0]]))
            batch, order = order[:size], order[size:]
            yield batch, [encoded[i] for i in batch]
            bar.update(len(batch))
        bar.close()

    @torch.inference_mode()
    def search(
        self,
        sources: list[list[int]],
        beam_size: int = 1,
        length_penalty: float = 0.6,
        no_repeat_ngram: int = 0,
        use_cache: bool = True,
    ) -> list[list[int]]:
        """Target ids for a batch of source ids, by greedy (beam size 1) or beam search; without [SOS] and [EOS]."""
        if beam_size > 1:
            found = self.beam_search(sources, beam_size, length_penalty, no_repeat_ngram, use_cache=use_cache)
            return [hypotheses[0].ids for hypotheses in found]
        return greedy_decode(*self.decoder_and_limits(sources, use_cache), no_repeat_ngram)

    @torch.inference_mode()
    def beam_search(
        self,
        sources: list[list[int]],
        beam_size: int,
        length_penalty: float = 0.6,
        no_repeat_ngram: int = 0,
        n_best: int = 1,
        use_cache: bool = True,
    ) -> list[list[Hypothesis]]:
        """The `n_best` hypotheses of each sentence of a batch of source ids, best first."""
        decoder, limits = self.decoder_and_limits(sources, use_cache)
        return beam_search(decoder, limits, beam_size, length_penalty, no_repeat_ngram, n_best)

    def decoder_and_limits(self, sources: list[list[int]], use_cache: bool) -> tuple[StepDecoder, Tensor]:
        """A decoder for a batch of source ids, and the maximum length of each translation (B,)."""
        longest = max(map(len, sources))
        source = torch.tensor([ids + [PAD] * (longest - len(ids)) for ids in sources], device=self.device)  # (B, S)
        limits = [self.length_limit(len(ids)) for ids in sources]
        decoder = CachedDecoder(self.model, source, max(limits)) if use_cache else UncachedDecoder(self.model, source)
        return decoder, torch.tensor(limits, device=self.device)

    def length_limit(self, source_length: int) -> int:
        """Maximum length of a translation: twice the source length plus ten tokens, but at most `seq_len`."""
        return min(2 * source_length + 10, self.config.seq_len)


class Ensemble(Translator):
    """Several runs, or epochs of one, that translate together: each token's probability is the mean of theirs.

    They must have the same languages and tokenizers; their architectures may differ.
    """

    def __init__(self, members: list[Translator]):
        """Raises InputError for members with other tokenizers than the first."""
        first = members[0]
        for member in members[1:]:
            if vocabularies(member) != vocabularies(first):
                raise InputError(
                    f"{member.folder} and {first.folder} have different languages or tokenizers; an ensemble needs "
                    "runs trained on the same pairs (the same --datasource and --validation-source)"
                )
        config = replace(first.config, seq_len=min(member.config.seq_len for member in members))
        weights = " + ".join(f"{member.folder.path.name}/{member.weights}" for member in members)
        super().__init__(first.model, config, first.tokenizer_src, first.tokenizer_tgt, weights)
        self.members, self.precision = members, first.precision

    def decoder_and_limits(self, sources: list[list[int]], use_cache: bool) -> tuple[StepDecoder, Tensor]:
        decoders, limits = zip(*(member.decoder_and_limits(sources, use_cache) for member in self.members), strict=True)
        return EnsembleDecoder(decoders), torch.stack(limits).amin(0)


def vocabularies(translator: Translator) -> tuple[str, ...]:
    """What the members of an ensemble have in common: languages and tokenizers."""
    config, tokenizers = translator.config, (translator.tokenizer_src, translator.tokenizer_tgt)
    return config.lang_src, config.lang_tgt, *(tokenizer.to_str() for tokenizer in tokenizers)


Runs = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
Weights = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


def load_translators(
    run_dirs: tuple[str, ...],
    device: str = "auto",
    weights: tuple[str, ...] = (),
    average: int = 1,
    precision: str = "fp32",
) -> Translator:
    """One run, or an ensemble of several runs, or of several epochs of one run (`weights`).

    Raises InputError for runs that cannot be loaded, or that do not fit together.
    """
    run_dirs, weights = run_dirs or ("",), weights or ("best",)
    if len(run_dirs) == 1:
        run_dirs = run_dirs * len(weights)
    elif len(weights) == 1:
        weights = weights * len(run_dirs)
    elif len(run_dirs) != len(weights):
        raise InputError(f"{len(run_dirs)} runs and {len(weights)} --weights; give as many of each, or one of either")
    members = [
        Translator.load(run_dir, device, epoch, average, precision)
        for run_dir, epoch in zip(run_dirs, weights, strict=True)
    ]
    return members[0] if len(members) == 1 else Ensemble(members)


def repeat_run_dir(argv: list[str]) -> list[str]:
    """`--run-dir A B` as `--run-dir A --run-dir B`: a further argument is a run if there is such a folder."""
    expanded, before = [], ""  # before: what the previous argument was
    for argument in argv:
        if before == "flag":
            before = "run"
        elif before == "run" and os.path.isdir(argument):
            expanded.append("--run-dir")
        else:
            before = "flag" if argument == "--run-dir" else ""
        expanded.append(argument)
    return expanded


def within_memory(sources: list[list[int]]) -> AbstractContextManager:
    """Context in which a GPU's out-of-memory error becomes an InputError with the size of this batch."""
    batch = f"{counted(len(sources), 'sentence')} of up to {max(map(len, sources))} tokens"
    return explained_out_of_memory(batch, "lower --beam-size, or --validation-sentences in training, or use the CPU")


def load_state_dict(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Loads weights; prefixes of torch.compile and DistributedDataParallel in their names are removed."""
    model.load_state_dict({name.removeprefix("_orig_mod.").removeprefix("module."): w for name, w in weights.items()})


def check_same_model(config: Config, state: dict, path: Path) -> None:
    """Raises InputError if config.json describes another model than that of the checkpoint at `path`."""
    require_parts(state, path, "config", "tokenizers")
    if changed := changed_settings(state["config"], config, (*INHERITED_FIELDS, "seq_len")):
        raise InputError(f"config.json does not belong to {path}: {changed}; copy the folder again")


def check_tokenizers(folder: RunFolder, config: Config, state: dict, path: Path) -> None:
    """Raises InputError unless the tokenizers in the folder are those of the checkpoint at `path`."""
    for i, lang in enumerate((config.lang_src, config.lang_tgt)):
        file, saved = folder.tokenizer_file(lang), ""
        with suppress(Exception):  # too few of them, or no tokenizer: tokenizers raises bare Exceptions
            saved = Tokenizer.from_str(state["tokenizers"][i]).to_str()
        if load_tokenizer(file).to_str() != saved:
            raise InputError(f"{file} is not the tokenizer that {path.name} was trained with; copy the folder again")


# ---------------------------------------------------------------------------- word alignments


@torch.inference_mode()
def recorded_pass(
    translator: Translator, src_ids: list[int], decoder_ids: list[int]
) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Logits (T, V) of a teacher-forced pass, and the attention weights of each kind, (L, H, Q, K)."""
    model = translator.model
    source = torch.tensor([src_ids], device=translator.device)
    decoder_input = torch.tensor([decoder_ids], device=translator.device)
    with model.recording():
        logits = model(source, decoder_input, padding_mask(source), causal_mask(len(decoder_ids), source.device))
        weights = {
            kind: torch.stack([block.attention_scores[0].float() for block in blocks]).cpu().numpy()
            for kind, blocks in model.attention_blocks().items()
        }
    return logits[0].float(), weights


class Aligner(NamedTuple):
    """The heads whose mean cross-attention gives the alignments."""

    shift: int  # 1: the row that predicts a target word; 0: the row that reads it
    heads: tuple[tuple[int, int], ...]  # layer and head of each

    def links(self, weights: np.ndarray) -> set[tuple[int, int]]:
        """The links (source word, target word) of a sentence, from its `word_attention`."""
        return strongest_links(np.mean([weights[self.shift, layer, head] for layer, head in self.heads], axis=0))


def word_attention(translator: Translator, sentence: str, ids: list[int]) -> tuple[list[str], list[str], np.ndarray]:
    """The source words, the target words, and the cross-attention between them: (2, L, H, T, S + 2).

    Index 0 of the weights is the shift of `Aligner`; the columns include [SOS] and [EOS].
    """
    src_ids, config = translator.encode(sentence), translator.config
    ids = ids[: config.seq_len - 1]  # [SOS] comes before them, and the decoder reads seq_len positions at most
    whole_words = config.tokenizer == "word"
    source = [translator.tokenizer_src.id_to_token(i) for i in src_ids]
    target = [translator.tokenizer_tgt.id_to_token(i) for i in ids]
    rows, columns = word_indices(target, whole_words), word_indices(source, whole_words)
    weights = recorded_pass(translator, src_ids, [SOS, *ids])[1]["cross"]  # (L, H, 1 + target tokens, source tokens)
    shifted = [merge_weights(part, rows, columns) for part in (weights[:, :, 1:], weights[:, :, :-1])]
    return grouped(source, columns)[1:-1], grouped(target, rows), np.stack(shifted)


def grouped(tokens: list[str], word_index: list[int]) -> list[str]:
    """The tokens of each word as one string."""
    return [
        "".join(token for token, _ in word) for _, word in groupby(zip(tokens, word_index, strict=True), itemgetter(1))
    ]


def find_aligner(translator: Translator, sentences: list[str]) -> tuple[Aligner, float]:
    """The heads with the most consistent links on these sentences and their translations, and their consistency.

    The first is the best of all heads, in the row that predicts a word or the row that reads it. Then heads are added
    one at a time, always the best one, as long as the mean becomes more consistent (see `lexical_consistency`).
    """
    targets = translator.translate_ids(sentences)
    attended = [word_attention(translator, s, ids) for s, ids in zip(sentences, targets, strict=True) if ids]
    if not attended:
        raise InputError("the run translates no validation sentence, so no head can be chosen; train it longer")

    def consistency(aligner: Aligner) -> float:
        return lexical_consistency([(src, tgt, aligner.links(weights)) for src, tgt, weights in attended])

    _, L, H = attended[0][2].shape[:3]
    heads = [(layer, head) for layer in range(L) for head in range(H)]
    candidates, best, score = [Aligner(shift, (head,)) for shift in (0, 1) for head in heads], None, -1.0
    while candidates:
        consistent, aligner = max((consistency(aligner), aligner) for aligner in candidates)
        if consistent <= score:
            break
        best, score = aligner, consistent
        candidates = [Aligner(best.shift, (*best.heads, head)) for head in heads if head not in best.heads]
    return best, score


def chosen_aligner(translator: Translator, sentences: int = 200) -> Aligner:
    """The aligner of a run, chosen on the first validation sentences; the choice is printed to stderr."""
    texts = list(filter(translator.fits, load_split(translator.config, "validation")["src"][:sentences]))
    aligner, consistency = find_aligner(translator, texts)
    heads = "head" if len(aligner.heads) == 1 else "the mean of heads"
    names = ", ".join(f"{layer}.{head}" for layer, head in aligner.heads)
    row = "predicts" if aligner.shift else "reads"
    print(
        f"alignments: cross-attention of {heads} {names} (layer.head), in the row that {row} the word "
        f"(lexical consistency {consistency:.3f} over {len(texts)} validation sentences)",
        file=sys.stderr,
    )
    return aligner


def alignment_lines(translator: Translator, lines: Iterable[str], chunk: int, **search: float) -> Iterator[str]:
    """The word alignment of each line with its translation, in Pharaoh format; blank for a blank line.

    `search` are arguments of `Translator.translate_ids`.
    """
    aligner = chosen_aligner(translator)
    for _, readable in readable_chunks(translator, lines, chunk):
        for sentence, ids in zip(readable, translator.translate_ids(readable, **search), strict=True):
            yield pharaoh(aligner.links(word_attention(translator, sentence, ids)[2])) if ids else ""


# ---------------------------------------------------------------------------- command line


def translate(sentence: str, run_dir: str = "") -> str:
    """Translates one sentence with a trained run, by default the most recently trained one."""
    return Translator.load(run_dir).translate([sentence])[0]


def translate_lines(translator: Translator, lines: Iterable[str], chunk: int, **search: float) -> Iterator[str]:
    """Translations of the lines, in order, `chunk` lines at a time; lines that exceed `seq_len` become blank.

    `search` are arguments of `Translator.translate`.
    """
    for _, readable in readable_chunks(translator, lines, chunk):
        yield from map(one_line, translator.translate(readable, **search))


def n_best_lines(translator: Translator, lines: Iterable[str], chunk: int, **search: float) -> Iterator[str]:
    """The best translations of each line: line number, score, log-probability and text, separated by tabs.

    `search` are arguments of `Translator.hypotheses`.
    """
    for start, readable in readable_chunks(translator, lines, chunk):
        found = translator.hypotheses(readable, **search)
        for number, hypotheses in enumerate(found, start=start + 1):
            for h in hypotheses:
                text = one_line(translator.tokenizer_tgt.decode(h.ids))
                yield f"{number}\t{h.score:.4f}\t{h.log_probability:.4f}\t{text}"


def one_line(text: str) -> str:
    """The text with spaces for line breaks and tabs, which a model may have learned from its corpus."""
    return text.translate(str.maketrans("\n\r\t", "   "))


def readable_chunks(translator: Translator, lines: Iterable[str], chunk: int) -> Iterator[tuple[int, list[str]]]:
    """The lines in chunks, each with the number of lines before it; lines that exceed `seq_len` become blank."""
    lines, start = iter(lines), 0
    while block := list(islice(lines, chunk)):
        yield start, blank_long(translator, block, start)
        start += len(block)


def blank_long(translator: Translator, lines: list[str], start: int = 0) -> list[str]:
    """Replaces lines that exceed `seq_len` by blank ones, with a warning that counts lines from `start` + 1."""
    readable = list(lines)
    for i, line in enumerate(lines):
        try:
            translator.encode(line)
        except InputError as error:
            print(f"warning: line {start + i + 1} is left blank: {error}", file=sys.stderr)
            readable[i] = ""
    return readable


def check_search(beam_size: int, length_penalty: float, no_repeat_ngram: int = 0, n_best: int = 1) -> None:
    """Raises InputError for invalid search settings."""
    if beam_size < 1:
        raise InputError(f"--beam-size is {beam_size}; give 1 for greedy search, or more")
    if not 0 <= length_penalty <= MAX_LENGTH_PENALTY:
        raise InputError(f"--length-penalty is {length_penalty}; give 0 to {MAX_LENGTH_PENALTY}")
    if not 1 <= n_best <= beam_size:
        raise InputError(f"--n-best is {n_best}; give 1 to --beam-size ({beam_size})")
    if no_repeat_ngram < 0:
        raise InputError(f"--no-repeat-ngram is {no_repeat_ngram}; give 0 to allow repetitions, or a length in tokens")


def main(
    sentence: Annotated[str | None, tyro.conf.Positional] = None,
    /,
    run_dir: Runs = (),
    beam_size: int = 1,
    length_penalty: float = 0.6,
    no_repeat_ngram: int = 0,
    n_best: int = 0,
    alignments: bool = False,
    weights: Weights = (),
    average: int = 1,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
) -> None:
    """Translate a sentence, or the lines of standard input.

    Args:
        sentence: sentence to translate; if omitted, the lines of stdin are translated to stdout
        run_dir: folder of the run, by default the most recently trained one; several (--run-dir A B C) are an ensemble,
            which averages their probabilities
        beam_size: hypotheses kept at each step; 1: greedy search
        length_penalty: exponent of the length normalization; 0 favors short translations, higher values longer ones
        no_repeat_ngram: no sequence of this many tokens occurs twice in a translation; 0: repetitions are allowed
        n_best: number of hypotheses printed per sentence, with score and log-probability; 0: the translation only
        alignments: print word alignments instead of translations, in Pharaoh format: 0-1 means that the first source
            word is translated by the second target word; punctuation marks are words
        weights: best (on the validation set, the default), latest, or an epoch number; repeated: an ensemble of epochs
        average: number of checkpoints whose weights are averaged, the best or the latest ones
        device: auto, cuda, mps or cpu
        precision: fp32, bf16 or fp16 (linear layers), or auto: as in training (see docs/training.md)
    """
    check_search(beam_size, length_penalty, no_repeat_ngram, n_best or 1)
    if alignments and n_best:
        raise InputError(f"--alignments is for the best translation only; omit --n-best {n_best}")
    translator = load_translators(run_dir, device, weights, average, precision)
    if alignments and isinstance(translator, Ensemble):
        raise InputError("--alignments needs the attention of one run; give one --run-dir")
    if sentence is not None:
        translator.encode(sentence)  # a sentence that exceeds seq_len is an error here
        if unknown := translator.unknown_words(sentence):
            print(f"warning: not in the vocabulary of this run: {', '.join(unknown)}", file=sys.stderr)
        lines, chunk = [sentence], 1
    else:
        is_interactive = sys.stdin.isatty()
        if is_interactive:
            print("Type a sentence and press Enter; Ctrl-D quits.", file=sys.stderr)
        lines, chunk = read_lines(sys.stdin.buffer, "stdin"), 1 if is_interactive else 512
    search = {"beam_size": beam_size, "length_penalty": length_penalty, "no_repeat_ngram": no_repeat_ngram}
    if n_best:
        output = n_best_lines(translator, lines, chunk, n_best=n_best, **search)
    elif alignments:
        output = alignment_lines(translator, lines, chunk, **search)
    else:
        output = translate_lines(translator, lines, chunk, **search)
    for line in output:
        print(line, flush=True)


if __name__ == "__main__":
    run_command(lambda argv: parse(main, repeat_run_dir(argv)))
