"""The findings of the logits study, measured on many sentences of a built-in corpus.

T  target tokens    V  target vocabulary
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor
from tqdm import tqdm

from config import InputError
from corpora.sources import gold_pairs, load_split
from corpora.toy import Pair, tokens_of
from dataset import EOS
from interpret.measures import alignment_errors
from interpret.steps import step_logits
from interpret.study import (
    BASELINE,
    COPIED,
    NO_CROSS_ATTENTION,
    NO_FEED_FORWARD,
    NORMED,
    RESIDUAL,
    SELF_ATTENTION,
    VARIANTS,
)
from translate import Translator


class Sample:
    """Sentence pairs with gold alignments, and their translations by the model and each variant, as lists of words."""

    def __init__(self, translator: Translator, pairs: list[Pair], training_targets: list[str]):
        self.translator, self.pairs = translator, pairs
        self.references = [self.words(pair.tgt_text) for pair in pairs]
        self.frequency: Counter[str] = Counter()
        self.followers: dict[str, set[str]] = defaultdict(set)  # word -> words that follow it in the training targets
        for text in training_targets:
            words = ["[SOS]", *self.words(text), "[EOS]"]
            self.frequency.update(words)
            for word, following in pairwise(words):
                self.followers[word].add(following)
        self.outputs: dict[str, list[list[str]]] = {}

    def words(self, text: str) -> list[str]:
        return self.translator.tokenizer_tgt.encode(text).tokens

    def output(self, variant: str = BASELINE.name) -> list[list[str]]:
        """The translations of all sentences with a variant."""
        if variant not in self.outputs:
            self.outputs[variant] = self.translate([pair.src_text for pair in self.pairs], variant)
        return self.outputs[variant]

    def translate(self, sources: list[str], variant: str = BASELINE.name) -> list[list[str]]:
        token = self.translator.tokenizer_tgt.id_to_token
        with VARIANTS[variant].apply(self.translator.model):
            found = self.translator.search([self.translator.encode(text) for text in sources], use_cache=False)
        return [[token(i) for i in ids] for ids in found]

    def logits(self, variant: str = BASELINE.name) -> Iterator[tuple[list[str], Tensor]]:
        """Each reference with the logits (T, V) of its steps, [EOS] included, by teacher forcing."""
        ids = self.translator.tokenizer_tgt.token_to_id
        with VARIANTS[variant].apply(self.translator.model):
            for pair, reference in zip(self.pairs, self.references, strict=True):
                target = [ids(word) for word in reference]
                yield reference, step_logits(self.translator, pair.src_text, target)

    # Figures, all in percent

    def exact(self, outputs: list[list[str]]) -> float:
        return percent(a == b for a, b in zip(outputs, self.references, strict=True))

    def recall(self, outputs: list[list[str]]) -> float:
        """Words of the reference that the output contains."""
        pairs = zip(outputs, self.references, strict=True)
        return percent((Counter(a) & Counter(b)).total() / len(b) for a, b in pairs)

    def doubled(self, outputs: list[list[str]]) -> float:
        """Outputs in which a word occurs twice that occurs once in the reference."""
        return percent(
            any(n > 1 and n > Counter(b)[word] for word, n in Counter(a).items())
            for a, b in zip(outputs, self.references, strict=True)
        )

    def first_word(self, outputs: list[list[str]]) -> float:
        return percent(a[:1] == b[:1] for a, b in zip(outputs, self.references, strict=True))


def percent(values: Iterable[float]) -> float:
    """The mean, in percent."""
    return 100 * float(np.mean(list(values)))


# ---------------------------------------------------------------------------- the findings
# Each function returns the figures, and whether the finding holds by the criterion in its docstring.


class Finding(NamedTuple):
    figures: str
    holds: bool


def places(sample: Sample) -> Finding:
    """1. The highest logits of a step are words that may stand there (90% of the top three follow the word before)."""
    token = sample.translator.tokenizer_tgt.id_to_token
    allowed = []
    for reference, logits in sample.logits():
        for read, top in zip(["[SOS]", *reference], logits.topk(3).indices.tolist(), strict=True):
            followers = sample.followers[read]
            allowed += [token(i) in followers for i in top[: len(followers)]]
    return Finding(f"{percent(allowed):.0f}% of the top three", percent(allowed) >= 90)


def order_of_attention(sample: Sample) -> Finding:
    """2. Attention moves over the source in the order of the target (alignment error of the best head up to 0.1)."""
    errors = alignment_errors(sample.translator, sample.pairs)
    best = errors.iloc[0]
    return Finding(
        f"alignment error {best['error']:.2f} (layer {best['layer']}, head {best['head']})", best["error"] <= 0.1
    )


def reordered_source(sample: Sample) -> Finding:
    """3. With the source words in another order, the translation stays right (half of the sentences)."""
    generator = np.random.default_rng(0)
    outputs = sample.translate([shuffled_words(pair.src_text, generator) for pair in sample.pairs])
    exact = sample.exact(outputs)
    return Finding(f"{exact:.0f}% exact, {sample.recall(outputs):.0f}% of the words", exact >= 50)


def shuffled_words(text: str, generator: np.random.Generator) -> str:
    """The words in another order; a final punctuation mark stays at the end."""
    words = tokens_of(text)
    end = [words.pop()] if words[-1] in ".?" else []
    order = [*range(len(words))]
    while len(words) > 1 and order == sorted(order):
        order = generator.permutation(len(words)).tolist()
    return " ".join([*(words[i] for i in order), *end])


def equal_weights(sample: Sample) -> Finding:
    """4. Equal weights: short sentences survive more often than long ones, and words are doubled in those."""
    outputs = sample.output("equal")
    lengths = [len(reference) for reference in sample.references]
    is_short = [n <= np.quantile(lengths, 0.25) for n in lengths]
    right = [a == b for a, b in zip(outputs, sample.references, strict=True)]
    short, long = (percent(r for r, s in zip(right, is_short, strict=True) if s == flag) for flag in (True, False))
    doubled = sample.doubled(outputs)
    return Finding(
        f"{short:.0f}% of short, {long:.0f}% of long sentences exact, {doubled:.0f}% doubled",
        short > long and doubled > 5,
    )


def equal_weights_object(sample: Sample) -> Finding:
    """4b. Equal weights: the object has a high logit at every step (among the top five in 80% of the steps)."""
    ids, found = sample.translator.tokenizer_tgt.token_to_id, []
    for reference, logits in sample.logits("equal"):
        rarest = min(reference, key=lambda word: sample.frequency[word])
        found += (logits.topk(5).indices == ids(rarest)).any(1).tolist()
    return Finding(f"{percent(found):.0f}% of the steps", percent(found) >= 80)


def attention_at_beginning(sample: Sample) -> Finding:
    """5. Weight at the beginning: the first word is right (80%), the sentence is not (less than 50% exact)."""
    outputs = sample.output("beginning")
    first, exact = sample.first_word(outputs), sample.exact(outputs)
    return Finding(
        f"first word {first:.0f}%, exact {exact:.0f}%, doubled {sample.doubled(outputs):.0f}%",
        first >= 80 and exact < 50,
    )


def attention_at_end(sample: Sample) -> Finding:
    """6. Weight at the end: the first word, a word that usually ends a sentence, then [EOS] (half are too short)."""
    return too_short(sample, "end")


def attention_on_end_token(sample: Sample) -> Finding:
    """6b. The same with the weight on [EOS] in place of the last word."""
    return too_short(sample, "end, on [EOS]")


def too_short(sample: Sample, variant: str) -> Finding:
    outputs = sample.output(variant)
    short = percent(len(a) < len(b) for a, b in zip(outputs, sample.references, strict=True))
    final = percent(bool(a) and "[EOS]" in sample.followers[a[-1]] for a in outputs)
    first = sample.first_word(outputs)
    return Finding(f"{short:.0f}% too short, {final:.0f}% end with a final word, first word {first:.0f}%", short >= 50)


def without_cross_attention(sample: Sample) -> Finding:
    """7. Without cross-attention, the output has nothing to do with the source (one output for all sentences)."""
    outputs = sample.output(NO_CROSS_ATTENTION)
    longest = max(outputs, key=len)
    same = percent(words == longest[: len(words)] for words in outputs)  # the length limit depends on the source
    return Finding(f"{same:.0f}% the same: {shortened(longest)}", same == 100)


def self_attention_alone(sample: Sample) -> Finding:
    """8. Self-attention alone writes frequent words in good order (90% of neighboring words occur in training)."""
    return good_order(sample, SELF_ATTENTION)


def self_attention_and_feed_forward(sample: Sample) -> Finding:
    """8b. The same with the residual path, norm and feed-forward kept (variant 7)."""
    return good_order(sample, NO_CROSS_ATTENTION)


def good_order(sample: Sample, variant: str) -> Finding:
    outputs = sample.output(variant)
    order = percent(b in sample.followers[a] for words in outputs for a, b in pairwise(["[SOS]", *words, "[EOS]"]))
    return Finding(f"{order:.0f}% of neighboring words: {shortened(outputs[0])}", order >= 90)


def shortened(words: list[str]) -> str:
    return " ".join(words[:6]) + " …" * (len(words) > 6)


def residual_alone(sample: Sample) -> Finding:
    """9. The residual path catches more of the source than 7 and 8 (recall), and [EOS] fails by a small margin."""
    recalls = [sample.recall(sample.output(name)) for name in (RESIDUAL, NO_CROSS_ATTENTION, SELF_ATTENTION)]
    margin = np.mean([(logits[-1].max() - logits[-1, EOS]).item() for _, logits in sample.logits(RESIDUAL)])
    figures = (
        f"recall {recalls[0]:.0f}% (7: {recalls[1]:.0f}%, 8: {recalls[2]:.0f}%), [EOS] {margin:.1f} below the top logit"
    )
    return Finding(figures, recalls[0] > max(recalls[1:]))


def normed_alone(sample: Sample) -> Finding:
    """10. Normed self-attention alone writes the same as self-attention alone (90% of the outputs)."""
    same = percent(a == b for a, b in zip(sample.output(NORMED), sample.output(SELF_ATTENTION), strict=True))
    return Finding(f"{same:.0f}% of the outputs", same >= 90)


def source_copied(sample: Sample) -> Finding:
    """11. With the encoder output in place of the decoder output, the translation ends at once (half are empty)."""
    lengths = [len(words) for words in sample.output(COPIED)]
    empty = percent(n == 0 for n in lengths)
    return Finding(f"{empty:.0f}% empty, {np.mean(lengths):.1f} words on average", empty >= 50)


def without_feed_forward(sample: Sample) -> Finding:
    """12. Without feed-forward, some sentences are right, and others repeat a word (25% or more)."""
    outputs = sample.output(NO_FEED_FORWARD)
    exact, doubled = sample.exact(outputs), sample.doubled(outputs)
    return Finding(f"{exact:.0f}% exact, {doubled:.0f}% doubled", exact > 0 and doubled >= 25)


FINDINGS = [
    places, order_of_attention, reordered_source, equal_weights, equal_weights_object, attention_at_beginning,
    attention_at_end, attention_on_end_token, without_cross_attention, self_attention_alone,
    self_attention_and_feed_forward, residual_alone, normed_alone, source_copied, without_feed_forward,
]  # fmt: skip


def measure_findings(translator: Translator, sentences: int = 200) -> pd.DataFrame:
    """The findings on sentences of the run's corpus, one per row: finding, figures, holds.

    Raises InputError unless the run was trained on a built-in corpus, whose alignments are known.
    """
    config = translator.config
    pairs = gold_pairs(config)
    if not pairs:
        raise InputError(
            f"the run in {translator.folder} was trained on {config.datasource}; the findings need a corpus with "
            "alignments, toy or patterns"
        )
    if not (pairs := [pair for pair in pairs if translator.fits(pair.src_text, pair.tgt_text)]):
        raise InputError(f"no test pair is short enough for the run in {translator.folder} (seq_len {config.seq_len})")
    sample = Sample(translator, pairs[:sentences], list(load_split(config, "train")["tgt"]))
    rows = [(function.__doc__, *function(sample)) for function in tqdm(FINDINGS, desc="Findings", leave=False)]
    return pd.DataFrame(rows, columns=["finding", "figures", "holds"])
