"""Batched greedy and beam search over token ids and logits, independent of the model.

B  sentences still being searched    V  target vocabulary
W  beam size                         T  maximum length of all translations
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from compute.ops import fast_top
from dataset import EOS, SOS

CHECK_EVERY = 4  # steps between checks for finished sentences: each check synchronizes with a GPU
# Fraction of the batch that must be done before it shrinks: a CPU sets up bf16 kernels for each new batch size.
DROP_FRACTION = 1 / 8


class StepDecoder(Protocol):
    """What a search needs of a model. The W hypotheses of a sentence are adjacent rows; in greedy search W is 1."""

    def step(self, ids: Tensor) -> Tensor:
        """Logits of the next token (B W, V), given the last token of every hypothesis (B W,)."""

    def select(self, rows: Tensor, sentences: Tensor | None = None) -> None:
        """Keeps these rows of the B W hypotheses, and these of the B sentences (None: all), in this order."""


class EnsembleDecoder:
    """A StepDecoder whose next-token probabilities are the means of those of several decoders."""

    def __init__(self, decoders: list[StepDecoder]):
        self.decoders = decoders

    def step(self, ids: Tensor) -> Tensor:
        log_p = torch.stack([decoder.step(ids).float().log_softmax(-1) for decoder in self.decoders])
        return log_p.logsumexp(0) - math.log(len(self.decoders))  # (models, B W, V) -> (B W, V)

    def select(self, rows: Tensor, sentences: Tensor | None = None) -> None:
        for decoder in self.decoders:
            decoder.select(rows, sentences)


# ---------------------------------------------------------------------------- greedy search


def greedy_decode(decoder: StepDecoder, max_lengths: Tensor, no_repeat_ngram: int = 0) -> list[list[int]]:
    """Ids of the most probable token at each step until [EOS] or the length limit (B,), without [SOS] and [EOS].

    With `no_repeat_ngram` above 0, no n-gram of that many tokens occurs twice in a translation.
    """
    device, limits = max_lengths.device, max_lengths.tolist()
    T = max(limits)
    tokens = torch.full((len(max_lengths), T), EOS, device=device)
    active = torch.arange(len(max_lengths), device=device)  # (B,), rows of `tokens` still being decoded
    ids = torch.full_like(active, SOS)  # (B,)
    is_done = torch.zeros_like(active, dtype=torch.bool)  # (B,)
    for t in range(T):
        logits = decoder.step(ids)  # (B, V)
        if no_repeat_ngram:
            logits = exclude_repeats(logits, tokens[active, :t], no_repeat_ngram)
        ids = fast_top(logits, 1)[1].squeeze(1)  # (B,)
        tokens[active, t] = ids
        is_done |= (ids == EOS) | (max_lengths[active] <= t + 1)
        if (t + 1) % CHECK_EVERY == 0 and (rows := remaining_rows(is_done)) is not None:
            if len(rows) == 0:
                break
            active, ids, is_done = active[rows], ids[rows], is_done[rows]
            decoder.select(rows, rows)
    return [until_eos(row[:limit]) for row, limit in zip(tokens.tolist(), limits, strict=True)]


def remaining_rows(is_done: Tensor) -> Tensor | None:
    """Indices of the rows that are not done; None if too few are done to shrink the batch."""
    rows = (~is_done).nonzero().squeeze(1)
    return rows if len(rows) <= (1 - DROP_FRACTION) * len(is_done) else None


def until_eos(ids: list[int]) -> list[int]:
    """The ids before the first [EOS]."""
    return ids[: ids.index(EOS)] if EOS in ids else ids


def exclude_repeats(scores: Tensor, tokens: Tensor, n: int) -> Tensor:
    """The scores of the next token (N, V), -inf where it would repeat an n-gram of the t tokens so far (N, t).

    N is B or B W. [EOS] is not among the tokens of an unfinished hypothesis, so it is never excluded. (Paulus et al.,
    2018, section 2.5, for n = 3)
    """
    if tokens.size(1) < n:
        return scores
    ngrams = tokens.unfold(1, n, 1)  # (N, t - n + 1, n)
    last = tokens[:, tokens.size(1) - n + 1 :]  # (N, n - 1), which the next token extends to an n-gram
    repeated = (ngrams[..., :-1] == last.unsqueeze(1)).all(-1)  # (N, t - n + 1)
    penalty = torch.zeros_like(repeated, dtype=scores.dtype).masked_fill(repeated, -math.inf)
    return scores.scatter_add(1, ngrams[..., -1], penalty)


# ---------------------------------------------------------------------------- beam search


@dataclass(frozen=True)
class Hypothesis:
    """One translation found by beam search."""

    ids: list[int]  # without [SOS] and [EOS]
    log_probability: float  # ln p(ids, [EOS] | source), in nats; without [EOS] if the length limit was reached
    score: float  # log_probability divided by `length_normalizer`


def length_normalizer(length: Tensor | int, length_penalty: float) -> Tensor | float:
    """((5 + length) / 6) ^ length_penalty; length includes [EOS] (Wu et al., 2016, equation 14)."""
    return ((5 + length) / 6) ** length_penalty


class Finished(NamedTuple):
    """The W best finished hypotheses of each sentence, best first; empty slots have a score of -inf."""

    score: Tensor  # (B, W)
    log_p: Tensor  # (B, W)
    tokens: Tensor  # (B, W, T)

    def merged(self, other: "Finished") -> "Finished":
        """The W best of both."""
        score, best = torch.cat([self.score, other.score], 1).topk(self.score.size(1))  # (B, 2 W) -> (B, W)
        log_p = torch.cat([self.log_p, other.log_p], 1).gather(1, best)
        return Finished(score, log_p, gather_tokens(torch.cat([self.tokens, other.tokens], 1), best))

    def write(self, rows: Tensor, other: "Finished") -> None:
        """Replaces these rows (indices) by those of `other`."""
        for own, new in zip(self, other, strict=True):
            own[rows] = new

    def hypotheses(self, n_best: int) -> list[list[Hypothesis]]:
        """The `n_best` of each sentence."""
        columns = (x[:, :n_best].tolist() for x in (self.tokens, self.log_p, self.score))
        sentences = (zip(*rows, strict=True) for rows in zip(*columns, strict=True))
        return [
            [Hypothesis(until_eos(ids), log_p, score) for ids, log_p, score in rows if score > -math.inf]
            for rows in sentences
        ]


@dataclass
class BeamState:
    """The state of beam search between two steps."""

    sentence: Tensor  # (B,) index in the original batch
    limit: Tensor  # (B,) maximum length
    ids: Tensor  # (B, W) last token of each unfinished hypothesis
    tokens: Tensor  # (B, W, T) the tokens of each so far
    log_p: Tensor  # (B, W) the log-probability of each
    finished: Finished
    is_done: Tensor  # (B,) whether no unfinished hypothesis can still enter the n best

    @classmethod
    def start(cls, max_lengths: Tensor, beam_size: int, T: int) -> "BeamState":
        B, W, device = len(max_lengths), beam_size, max_lengths.device
        log_p = torch.full((B, W), -math.inf, device=device)
        tokens = torch.full((B, W, T), EOS, device=device)
        finished = Finished(log_p.clone(), log_p.clone(), tokens.clone())
        log_p[:, 0] = 0  # all hypotheses start as [SOS], so only one of them may be extended
        return cls(
            sentence=torch.arange(B, device=device),
            limit=max_lengths,
            ids=torch.full((B, W), SOS, device=device),
            tokens=tokens,
            log_p=log_p,
            finished=finished,
            is_done=torch.zeros(B, dtype=torch.bool, device=device),
        )

    def select(self, rows: Tensor) -> "BeamState":
        """The state of these sentences."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "finished"}
        finished = Finished(*(x[rows] for x in self.finished))
        return BeamState(finished=finished, **{name: x[rows] for name, x in values.items()})


class BeamStep(NamedTuple):
    """What one step of beam search extended, finished and kept."""

    ids: Tensor  # (B, 2 W) tokens of the best extensions, best first
    origin: Tensor  # (B, 2 W) the hypothesis, 0 … W - 1, that each extends
    log_p: Tensor  # (B, 2 W)
    is_end: Tensor  # (B, W) whether each of the W best is finished
    kept: Tensor  # (B, W) which extensions are the hypotheses of the next step
    is_done: Tensor  # (B,) whether the search of the sentence ends with this step


def beam_search(
    decoder: StepDecoder,
    max_lengths: Tensor,
    beam_size: int,
    length_penalty: float = 0.6,
    no_repeat_ngram: int = 0,
    n_best: int = 1,
    watch: Callable[[BeamStep], None] | None = None,
) -> list[list[Hypothesis]]:
    """The `n_best` hypotheses of each sentence, best first, at most `max_lengths` (B,) tokens long.

    Each step extends the W hypotheses of a sentence. Of the W most probable extensions, those that end with [EOS] or
    reach the limit are finished; the W most probable without [EOS] continue. A sentence is done when no unfinished
    hypothesis can enter its n best: log-probabilities only fall as a hypothesis grows, so its score cannot exceed its
    current log-probability divided by the normalizer of the maximum length. With W = 1 the search stops at the first
    [EOS], as greedy search does. With `no_repeat_ngram` above 0, no n-gram of that many tokens occurs twice in a
    hypothesis; log-probabilities remain those of the model. `watch` is called after each step, with the sentences still
    in the batch.
    """
    W, T = beam_size, int(max_lengths.max())
    state = BeamState.start(max_lengths, W, T)
    results = Finished(*(x.clone() for x in state.finished))  # of all sentences, read only at the end
    for t in range(T):
        # Extend every hypothesis by its 2 W most probable tokens. Of the 2 W best extensions, at most W end with [EOS].
        log_p = decoder.step(state.ids.flatten()).float().log_softmax(-1)  # (B W, V)
        if no_repeat_ngram:
            log_p = exclude_repeats(log_p, state.tokens[:, :, :t].flatten(0, 1), no_repeat_ngram)
        log_p, ids = fast_top(log_p, min(2 * W, log_p.size(-1)))  # (B W, 2 W), or (B W, V) if that is less
        extended = (state.log_p.unsqueeze(-1) + log_p.unflatten(0, (-1, W))).flatten(1)  # (B, W * 2 W)
        log_p, best = extended.topk(2 * W)  # (B, 2 W), best first
        origin = best // ids.size(-1)  # (B, 2 W), the hypothesis that was extended
        ids = ids.view(len(best), -1).gather(1, best)  # (B, 2 W)
        tokens = gather_tokens(state.tokens, origin)  # (B, 2 W, T)
        tokens[:, :, t] = ids

        # Collect the finished hypotheses among the W best.
        is_end = ((ids == EOS) | (state.limit.unsqueeze(1) <= t + 1))[:, :W] & ~state.is_done.unsqueeze(1)  # (B, W)
        score = (log_p[:, :W] / length_normalizer(t + 1, length_penalty)).masked_fill(~is_end, -math.inf)
        state.finished = state.finished.merged(Finished(score, log_p[:, :W], tokens[:, :W]))

        # Continue with the W best that do not end with [EOS].
        state.log_p, kept = log_p.masked_fill(ids == EOS, -math.inf).topk(W)  # (B, 2 W) -> (B, W)
        state.ids, state.tokens = ids.gather(1, kept), gather_tokens(tokens, kept)
        rows = origin.gather(1, kept) + W * torch.arange(len(kept), device=kept.device).unsqueeze(1)  # 0 … B W - 1

        # Find the sentences that are done, and every few steps drop them from the batch.
        bound = state.log_p[:, 0] / length_normalizer(state.limit, length_penalty)  # (B,)
        state.is_done |= (state.limit <= t + 1) | cannot_improve(state.finished.score[:, n_best - 1], bound)
        if W == 1:
            state.is_done |= state.finished.score[:, 0].isfinite()
        if watch:
            watch(BeamStep(ids, origin, log_p, is_end, kept, state.is_done.clone()))
        is_check = (t + 1) % CHECK_EVERY == 0 or t + 1 == T
        remaining = remaining_rows(state.is_done) if is_check else None
        if remaining is not None:
            results.write(state.sentence, state.finished)
            if len(remaining) == 0:
                break
            state, rows = state.select(remaining), rows[remaining]
        decoder.select(rows.flatten(), remaining)
    return results.hypotheses(n_best)


def cannot_improve(nth_best: Tensor, bound: Tensor) -> Tensor:
    """Whether the n-th best finished score (B,) is at least the upper bound of the unfinished ones (B,): (B,)."""
    return nth_best >= bound


def gather_tokens(tokens: Tensor, hypotheses: Tensor) -> Tensor:
    """The tokens (B, W, T) of M of the W hypotheses, given by their indices (B, M): (B, M, T)."""
    return tokens.gather(1, hypotheses.unsqueeze(-1).expand(-1, -1, tokens.size(-1)))
