"""Search for a translation, a token at a time: greedy and beam. It sees ids and logits, never a model.

B  sentences in the batch    N  of them still unfinished    K  hypotheses a sentence, the beam    V  target vocabulary
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from compute.ops import fast_top
from dataset import EOS, SOS

DROP_EVERY = 4  # steps between looks at which sentences are finished; each look makes a GPU wait
DROP_FROM = 1 / 8  # they stay until they are this share of the batch: a CPU prepares bf16 anew for each size of it


class StepDecoder(Protocol):
    """What a search sees of a model: the next token's logits, and which hypotheses go on.

    There are K hypotheses of each of the N sentences, side by side; in greedy search K is 1.
    """

    def step(self, ids: Tensor) -> Tensor:
        """The newest token of each hypothesis (N K,): logits of the next one (N K, V)."""

    def select(self, rows: Tensor, sentences: Tensor | None = None) -> None:
        """Goes on with these rows (M K,) of the N K hypotheses, which belong to these M sentences; None: to all N."""


def greedy_decode(decoder: StepDecoder, max_lengths: Tensor) -> list[list[int]]:
    """The likeliest token at every step, until [EOS] or the sentence's limit (B,); ids without [SOS] and [EOS]."""
    device, longest = max_lengths.device, int(max_lengths.max())
    written = torch.full((len(max_lengths), longest), EOS, device=device)  # (B, longest)
    alive = torch.arange(len(max_lengths), device=device)  # (N,), rows of `written`
    ids = torch.full_like(alive, SOS)
    finished = torch.zeros_like(alive, dtype=torch.bool)
    for t in range(longest):
        ids = fast_top(decoder.step(ids), 1)[1].squeeze(1)
        written[alive, t] = ids
        finished |= (ids == EOS) | (max_lengths[alive] <= t + 1)
        if (t + 1) % DROP_EVERY == 0:
            going = (~finished).nonzero().squeeze(1)
            if len(going) == 0:
                break
            if len(going) <= (1 - DROP_FROM) * len(alive):
                alive, ids, finished = alive[going], ids[going], finished[going]
                decoder.select(going, going)
    return [until_end(row[:limit]) for row, limit in zip(written.tolist(), max_lengths.tolist(), strict=True)]


@dataclass(frozen=True)
class Hypothesis:
    """A translation as a search found it."""

    ids: list[int]  # without [SOS] and [EOS]
    log_probability: float  # ln p(ids, [EOS] | source); without [EOS] where the limit cut it off
    score: float  # log_probability over the length penalty, by which hypotheses of different lengths compare


def length_penalty(length: Tensor | int, alpha: float) -> Tensor | float:
    """((5 + length) / 6) ^ alpha, [EOS] counted (Wu et al., 2016, equation 14). With 0 short ones are favoured."""
    return ((5 + length) / 6) ** alpha


def beam_search(
    decoder: StepDecoder, max_lengths: Tensor, beam_size: int, alpha: float = 0.6, n_best: int = 1
) -> list[list[Hypothesis]]:
    """The `n_best` hypotheses of each sentence that a beam of K finds, best first; limits are (B,).

    At each step the K likeliest continuations of a sentence are looked at: those that end are finished
    and kept, and the K likeliest that do not end go on. A sentence is settled once no other hypothesis
    can still come among its n best: a log-probability only falls as the hypothesis grows, so what it is
    now, over the penalty of the longest, bounds the score. A beam of 1 stops at its first end, as greedy
    search does.
    """
    B, K, device, longest = len(max_lengths), beam_size, max_lengths.device, int(max_lengths.max())
    found: list[list[Hypothesis]] = [[] for _ in range(B)]
    alive = torch.arange(B, device=device)  # (N,), the sentences still searched
    ids = torch.full((B, K), SOS, device=device)
    written = torch.full((B, K, longest), EOS, device=device)
    total = torch.full((B, K), -math.inf, device=device)  # log-probabilities; at first all places of a beam
    total[:, 0] = 0  # are alike, so one of them counts
    finished = Finished(torch.full_like(total, -math.inf), total.clone(), written.clone())
    settled = torch.zeros(B, dtype=torch.bool, device=device)
    for t in range(longest):
        log_p = decoder.step(ids.flatten()).float().log_softmax(-1)  # (N K, V)
        log_p, following = fast_top(log_p, min(2 * K, log_p.size(-1)))  # (N K, 2 K), or V if that is less
        # Each hypothesis can end in one way only, so of the 2 K likeliest of a sentence at least K go on.
        likeliest, index = (total.unsqueeze(-1) + log_p.unflatten(0, (-1, K))).flatten(1).topk(2 * K)  # (N, 2 K)
        origin, ids = index // log_p.size(-1), following.view(len(alive), -1).gather(1, index)
        written = pick(written, origin)
        written[:, :, t] = ids
        limit = max_lengths[alive].unsqueeze(1)  # (N, 1)
        ends = ((ids == EOS) | (limit <= t + 1))[:, :K] & ~settled.unsqueeze(1)
        scores = (likeliest[:, :K] / length_penalty(t + 1, alpha)).masked_fill(~ends, -math.inf)
        finished = finished.best_of(Finished(scores, likeliest[:, :K], written[:, :K]))
        total, going = likeliest.masked_fill(ids == EOS, -math.inf).topk(K)  # (N, K)
        origin, ids, written = origin.gather(1, going), ids.gather(1, going), pick(written, going)
        bound = total[:, 0] / length_penalty(limit.squeeze(1), alpha)
        settled |= (limit.squeeze(1) <= t + 1) | cannot_improve(finished.scores[:, n_best - 1], bound)
        if K == 1:
            settled |= finished.scores[:, 0].isfinite()
        left = None
        rows = origin + K * torch.arange(len(alive), device=device).unsqueeze(1)  # (N, K), of the N K
        if (t + 1) % DROP_EVERY == 0 or t + 1 == longest:
            left = (~settled).nonzero().squeeze(1)
            if len(left) > (1 - DROP_FROM) * len(alive):
                left = None
            else:
                for n in settled.nonzero().squeeze(1).tolist():
                    found[alive[n]] = finished.hypotheses(n, n_best)
                if len(left) == 0:
                    break
                finished = Finished(*(column[left] for column in finished))
                alive, ids, written, total, settled, rows = (
                    tensor[left] for tensor in (alive, ids, written, total, settled, rows)
                )
        decoder.select(rows.flatten(), left)
    return found


def cannot_improve(nth_best: Tensor, bound: Tensor) -> Tensor:
    """Whether the n-th best score so far (N,) is out of reach for what goes on."""
    return nth_best >= bound


def pick(written: Tensor, places: Tensor) -> Tensor:
    """Ids (N, K, T) of these places (N, M) of each beam: (N, M, T)."""
    return written.gather(1, places.unsqueeze(-1).expand(-1, -1, written.size(-1)))


class Finished(NamedTuple):
    """The finished hypotheses of each sentence, best first; empty places have a score of -inf."""

    scores: Tensor  # (N, K)
    totals: Tensor  # (N, K), log-probabilities
    written: Tensor  # (N, K, T)

    def best_of(self, more: "Finished") -> "Finished":
        """The K best of these and of more."""
        scores, places = torch.cat([self.scores, more.scores], 1).topk(self.scores.size(1))
        totals = torch.cat([self.totals, more.totals], 1).gather(1, places)
        return Finished(scores, totals, pick(torch.cat([self.written, more.written], 1), places))

    def hypotheses(self, n: int, n_best: int) -> list[Hypothesis]:
        columns = (self.written[n].tolist(), self.totals[n].tolist(), self.scores[n].tolist())
        rows = list(zip(*columns, strict=True))[:n_best]
        return [Hypothesis(until_end(ids), total, score) for ids, total, score in rows if score > -math.inf]


def until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOS)] if EOS in ids else ids
