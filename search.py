"""Search for a translation, a token at a time: greedy and beam. It sees ids and logits, never a model.

B  sentences in the batch    N  of them still unfinished    K  slots of a beam    V  target vocabulary
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dataset import EOS, SOS

DROP_EVERY = 4  # steps between looks at which sentences are finished; each look makes a GPU wait


class StepDecoder(Protocol):
    """What a search sees of a model: the next token's logits, and which sentences go on."""

    def step(self, ids: Tensor) -> Tensor:
        """The newest token of each sentence (N,): logits of the next one (N, V)."""

    def select(self, rows: Tensor) -> None:
        """Goes on with these rows (M,) of the N, in this order."""


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
    return [until_end(row[:limit]) for row, limit in zip(written.tolist(), max_lengths.tolist(), strict=True)]


@dataclass(frozen=True)
class Hypothesis:
    """A translation as a search found it."""

    ids: list[int]  # without [SOS] and [EOS]
    log_probability: float  # ln p(ids, [EOS] | source); without [EOS] where the limit cut it off
    score: float  # log_probability over the length penalty, by which hypotheses of different lengths compare


def length_penalty(length: Tensor, alpha: float) -> Tensor:
    """((5 + length) / 6) ^ alpha, [EOS] counted (Wu et al., 2016, equation 14). With 0 short ones are favoured."""
    return ((5 + length) / 6) ** alpha


def beam_search(
    decoder: StepDecoder, max_lengths: Tensor, beam_size: int, alpha: float = 0.6, n_best: int = 1
) -> list[list[Hypothesis]]:
    """The `n_best` hypotheses of each sentence that `beam_size` slots find, best first; limits are (B,).

    At each step the likeliest continuations of a sentence's hypotheses fill its slots. One that has
    ended keeps its slot, so a beam of 1 is greedy search. A sentence stops early only where no other
    can still come among its n best: a log-probability only falls as the hypothesis grows, so what it
    is now, over the penalty of the longest, bounds the score.
    """
    B, K, device, longest = len(max_lengths), beam_size, max_lengths.device, int(max_lengths.max())
    found: list[list[Hypothesis]] = [[] for _ in range(B)]
    alive = torch.arange(B, device=device)  # (N,), the sentences still searched
    ids = torch.full((B, K), SOS, device=device)
    written = torch.full((B, K, longest), EOS, device=device)
    total = torch.full((B, K), -math.inf, device=device)  # log-probabilities; at first all slots are alike,
    total[:, 0] = 0  # so one of them counts
    finished = torch.zeros_like(ids, dtype=torch.bool)
    length = torch.zeros_like(ids)
    decoder.select(alive.repeat_interleave(K))
    for t in range(longest):
        log_p = decoder.step(ids.flatten()).float().log_softmax(-1).unflatten(0, (-1, K))  # (N, K, V)
        total, origin, ids = extend(total, finished, log_p)
        finished, length = finished.gather(1, origin), length.gather(1, origin)
        written = written.gather(1, origin.unsqueeze(-1).expand_as(written))
        written[:, :, t] = ids
        limit = max_lengths[alive].unsqueeze(1)  # (N, 1)
        ended = ~finished & ((ids == EOS) | (limit <= t + 1))
        finished, length = finished | ended, length.masked_fill(ended, t + 1)
        rows = origin + K * torch.arange(len(alive), device=device).unsqueeze(1)  # (N, K), of the N K
        if (t + 1) % DROP_EVERY == 0 or t + 1 == longest:
            scores = total / length_penalty(length, alpha)
            nth_best = scores.masked_fill(~finished, -math.inf).topk(n_best).values[:, -1]
            settled = finished.all(1) | (nth_best >= bound_on_score(total, finished, limit, alpha))
            for n in settled.nonzero().squeeze(1).tolist():
                kept = finished[n] & total[n].isfinite()
                columns = (written[n], total[n], scores[n])
                found[alive[n]] = best_hypotheses(*(column[kept].tolist() for column in columns), n_best)
            going = (~settled).nonzero().squeeze(1)
            if len(going) == 0:
                break
            alive, ids, written, total, finished, length, rows = (
                tensor[going] for tensor in (alive, ids, written, total, finished, length, rows)
            )
        decoder.select(rows.flatten())
    return found


def extend(total: Tensor, finished: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest continuations: log-probabilities, the slots they come from and their new ids, each (N, K).

    From total and finished (N, K) and log_p (N, K, V). A finished hypothesis goes on as it is.
    """
    candidates = (total.unsqueeze(-1) + log_p).masked_fill(finished.unsqueeze(-1), -math.inf)
    candidates[:, :, EOS] = candidates[:, :, EOS].masked_fill(finished, math.inf)
    likeliest, index = candidates.flatten(1).topk(total.size(1))
    origin = index // log_p.size(-1)
    return likeliest.where(likeliest < math.inf, total.gather(1, origin)), origin, index % log_p.size(-1)


def bound_on_score(total: Tensor, finished: Tensor, limit: Tensor, alpha: float) -> Tensor:
    """The highest score (N,) that the unfinished hypotheses may still reach; -inf where all have finished."""
    return total.masked_fill(finished, -math.inf).amax(1) / length_penalty(limit.squeeze(1), alpha)


def best_hypotheses(
    written: list[list[int]], totals: list[float], scores: list[float], n_best: int
) -> list[Hypothesis]:
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[:n_best]
    return [Hypothesis(until_end(written[i]), totals[i], scores[i]) for i in order]


def until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOS)] if EOS in ids else ids
