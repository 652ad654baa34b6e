"""The variants of the logits study: cross-attention replaced by fixed weights, and a decoder with parts taken away.

    B  sentences    H  heads    Q  query positions    K  key positions    T  target tokens    D  d_model

interpret/findings.py measures them on many sentences; docs/studies.md has the results.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn

from interpret.interventions import Variant, encoder_as_output, first_keys, intervene, last_keys, replace_outputs
from interpret.steps import step_table
from interpret.trace import AttentionTrace, first_steps, record_trace
from model import ResidualConnection, Transformer
from translate import Translator

# ---------------------------------------------------------------------------- cross-attention replaced by fixed weights


def word_ranks(scores: Tensor) -> tuple[Tensor, Tensor]:
    """For scores (B, H, Q, K): the rank of each source word from 0, and the number of words, [SOS] and [EOS] left out.

    Masked keys have score 0. Ranks are -1 for keys that are not words.
    """
    allowed = scores > 0
    rank, count = allowed.cumsum(-1) - 2, allowed.sum(-1, keepdim=True) - 2
    return torch.where(allowed & (rank < count), rank, -1), count


def equal(scores: Tensor) -> Tensor:
    """a_ij = 1/n on each of the n source words."""
    rank, count = word_ranks(scores)
    return (rank >= 0) / count.to(scores.dtype)


def beginning(scores: Tensor) -> Tensor:
    """a_ij = 1/3 on each of the first three source words, 1/7 on every other; the sum is not rescaled to 1."""
    rank, _ = word_ranks(scores)
    return ((rank >= 0) / 7 + ((rank >= 0) & (rank < 3)) * (1 / 3 - 1 / 7)).to(scores.dtype)


def end(scores: Tensor) -> Tensor:
    """a_ij = 0.8 on the last source word; the other words share 0.2."""
    rank, count = word_ranks(scores)
    others = 0.2 / (count - 1).clamp(min=1)
    return torch.where(rank == count - 1, 0.8, (rank >= 0) * others).to(scores.dtype)


def end_token(scores: Tensor) -> Tensor:
    """a_ij = 0.8 on [EOS]; the words share 0.2."""
    rank, count = word_ranks(scores)
    is_end = (scores > 0) & ((scores > 0).cumsum(-1) == count + 2)
    return torch.where(is_end, 0.8, (rank >= 0) * 0.2 / count).to(scores.dtype)


# ---------------------------------------------------------------------------- a decoder with parts taken away

Residual = Callable[[ResidualConnection, Tensor, Callable[[Tensor], Tensor]], Tensor]


def skipped(residual: ResidualConnection, x: Tensor, sublayer: Callable) -> Tensor:
    """x, as if the sublayer were not there."""
    return x


def sublayer_output(residual: ResidualConnection, x: Tensor, sublayer: Callable) -> Tensor:
    """SelfAttention(x) alone, without residual path; with pre-norm SelfAttention(norm(x))."""
    return sublayer(residual.norm(x) if residual.is_pre_norm else x)


def without_norm(residual: ResidualConnection, x: Tensor, sublayer: Callable) -> Tensor:
    """x + SelfAttention(x), not normalized; with pre-norm x + SelfAttention(norm(x))."""
    return x + sublayer_output(residual, x, sublayer)


def normed_output(residual: ResidualConnection, x: Tensor, sublayer: Callable) -> Tensor:
    """norm(SelfAttention(x)): the normalized output, without residual path."""
    return residual.norm(sublayer_output(residual, x, sublayer))


def decoder_with(*sublayers: Residual | None) -> Callable[[Transformer], AbstractContextManager]:
    """Replaces the residual connections of each decoder block: self-attention, cross-attention, feed-forward.

    None leaves one as it is.
    """

    def hook(change: Residual, residual: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return change(residual, *inputs)

    def apply(model: Transformer) -> AbstractContextManager:
        stack = ExitStack()
        for i, change in enumerate(sublayers):
            if change:
                modules = [block.residual_connections[i] for block in model.decoder.layers]
                stack.enter_context(replace_outputs(modules, partial(hook, change)))
        return stack

    return apply


def cross_attention(change: Callable[[Tensor], Tensor]) -> Callable[[Transformer], AbstractContextManager]:
    return lambda model: intervene(model, change, "cross")


SELF_ATTENTION = "self-attention alone"
NO_CROSS_ATTENTION, NO_FEED_FORWARD, RESIDUAL = "no cross-attention", "no feed-forward", "residual without norm"
NORMED, COPIED = "normed self-attention alone", "source copied"
STUDY: list[Variant] = [
    Variant("equal", "a_ij = 1/n on each of the n source words", cross_attention(equal)),
    Variant("beginning", "a_ij = 1/3 on the first three source words, 1/7 on the others", cross_attention(beginning)),
    Variant("beginning, hard", "only the first two keys, rescaled", cross_attention(partial(first_keys, n=2))),
    Variant("end", "a_ij = 0.8 on the last source word, 0.2 shared by the others", cross_attention(end)),
    Variant("end, on [EOS]", "a_ij = 0.8 on [EOS], 0.2 shared by the words", cross_attention(end_token)),
    Variant("end, hard", "only the last two keys, rescaled", cross_attention(partial(last_keys, n=2))),
    Variant(NO_CROSS_ATTENTION, "x = x in place of cross-attention", decoder_with(None, skipped, None)),
    Variant(SELF_ATTENTION, "x = SelfAttention(x)", decoder_with(sublayer_output, skipped, skipped)),
    Variant(RESIDUAL, "x = x + SelfAttention(x)", decoder_with(without_norm, skipped, skipped)),
    Variant(NORMED, "x = norm(SelfAttention(x))", decoder_with(normed_output, skipped, skipped)),
    Variant(COPIED, "the encoder output in place of the decoder output",
            lambda model: replace_outputs([model.decoder], encoder_as_output)),
    Variant(NO_FEED_FORWARD, "x = x in place of the feed-forward block", decoder_with(None, None, skipped)),
]  # fmt: skip
BASELINE = Variant("baseline", "the unchanged model", lambda model: nullcontext())
VARIANTS = {variant.name: variant for variant in (BASELINE, *STUDY)}


def study(translator: Translator, sentence: str) -> Iterator[tuple[Variant, pd.DataFrame, AttentionTrace]]:
    """For the baseline and every variant: the `step_table` and the trace of the variant's own translation.

    Translations are cut three steps after the baseline's end, because some variants repeat a word without end.
    """
    limit = None
    for variant in VARIANTS.values():
        with variant.apply(translator.model):
            steps, trace = step_table(translator, sentence), record_trace(translator, sentence)
        limit = limit or len(trace.tgt_tokens) + 3
        yield variant, steps[steps["step"] < limit], first_steps(trace, limit)
