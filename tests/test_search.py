import itertools
import math

import pytest
import torch
from torch import Tensor

from dataset import EOS, PAD, SOS, padding_mask
from model import causal_mask
from search import Hypothesis, beam_search, greedy_decode, length_normalizer
from translate import CachedDecoder, UncachedDecoder


class Script:
    """A StepDecoder that writes down fixed sentences, one logit a token."""

    def __init__(self, sentences: list[list[int]]):
        self.rows = [[*ids, EOS] for ids in sentences]
        self.t, self.asked = 0, []

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        self.asked.append(ids.tolist())
        following = [row[self.t] if self.t < len(row) else PAD for row in self.rows]
        self.t += 1
        return torch.nn.functional.one_hot(torch.tensor(following), 20).float()

    def select(self, rows: torch.Tensor, sentences: Tensor | None = None) -> None:
        self.rows = [self.rows[i] for i in rows]


def test_greedy_search_stops_each_sentence_at_its_end_or_limit():
    sentences = [[5, 6], [], [7] * 11, [8] * 30]
    script = Script(sentences)
    assert greedy_decode(script, torch.tensor([20, 20, 20, 13])) == [[5, 6], [], [7] * 11, [8] * 13]
    assert script.asked[0] == [SOS] * 4
    # It looks every 4 steps: two had finished at the first look, a third at the third, the last at the fourth.
    assert [len(ids) for ids in script.asked] == [4] * 4 + [2] * 8 + [1] * 4


def test_a_few_finished_sentences_stay_until_it_is_worth_moving_the_others():
    sentences = [[5], [6] * 5, [7] * 6, *([i] * 30 for i in range(4, 19))]
    script = Script(sentences)
    assert greedy_decode(script, torch.tensor([20] * 18)) == [ids[:20] for ids in sentences]
    # One of 18 is finished at the first look, less than an eighth; three at the second.
    assert [len(ids) for ids in script.asked] == [18] * 8 + [15] * 12


class Chain:
    """A StepDecoder whose next token depends on the step and the last token alone, and on no source."""

    def __init__(self, vocab: int, seed: int):
        numbers = torch.randn(40, vocab, vocab, generator=torch.Generator().manual_seed(seed))
        self.log_p, self.t = numbers.mul(1.5).log_softmax(-1), -1

    def step(self, ids: Tensor) -> Tensor:
        self.t += 1
        return self.log_p[self.t, ids]

    def select(self, rows: Tensor, sentences: Tensor | None = None) -> None:
        pass


def every_hypothesis(chain: Chain, limit: int, length_penalty: float) -> list[Hypothesis]:
    """All there are: those that end with [EOS] within the limit, and those that the limit cuts."""
    vocab = range(chain.log_p.size(-1))
    others = [i for i in vocab if i != EOS]
    found = []
    for length in range(1, limit + 1):
        for ids in itertools.product(others, repeat=length - 1):
            for last in [EOS] if length < limit else vocab:
                path = [SOS, *ids, last]
                log_p = sum(chain.log_p[t, a, b].item() for t, (a, b) in enumerate(itertools.pairwise(path)))
                kept = [*ids] if last == EOS else [*ids, last]
                found.append(Hypothesis(kept, log_p, log_p / float(length_normalizer(length, length_penalty))))
    return sorted(found, key=lambda h: -h.score)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 2.0])
def test_a_beam_wide_enough_for_all_finds_the_best(seed, length_penalty):
    """Five tokens, four steps: with room for every hypothesis nothing can be pruned or stopped too early."""
    chain = Chain(5, seed)
    expected = every_hypothesis(chain, 4, length_penalty)
    (found,) = beam_search(chain, torch.tensor([4]), len(expected), length_penalty, n_best=10)
    assert [h.ids for h in found] == [h.ids for h in expected[:10]]
    for a, b in zip(found, expected, strict=False):
        assert (a.log_probability, a.score) == pytest.approx((b.log_probability, b.score), abs=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_stopping_early_changes_nothing(seed, monkeypatch):
    """The same search with the bound out of reach runs to the limit and must find the same."""
    limits = torch.tensor([17, 40, 23])
    early = beam_search(Chain(12, seed), limits, beam_size=4, length_penalty=1.0, n_best=3)
    monkeypatch.setattr("search.cannot_improve", lambda nth_best, bound: nth_best > math.inf)
    assert beam_search(Chain(12, seed), limits, beam_size=4, length_penalty=1.0, n_best=3) == early


@pytest.mark.parametrize("seed", range(20))
def test_a_beam_of_one_is_greedy(seed):
    limits = torch.tensor([5, 30, 12, 30])
    greedy = greedy_decode(Chain(12, seed), limits)
    assert [h.ids for (h,) in beam_search(Chain(12, seed), limits, beam_size=1)] == greedy


@torch.inference_mode()
@pytest.mark.parametrize("beam_size", [1, 2, 5])
def test_cached_and_uncached_search_write_the_same(tiny_model, beam_size):
    torch.manual_seed(1)
    source = torch.randint(4, 50, (6, 9))
    source[2, 5:] = source[4, 2:] = PAD
    limits = torch.tensor([20, 25, 30, 5, 25, 1])
    decoders = CachedDecoder(tiny_model, source, 30), UncachedDecoder(tiny_model, source)
    if beam_size == 1:
        cached, uncached = (greedy_decode(decoder, limits) for decoder in decoders)
        assert cached == uncached
        return
    cached, uncached = (beam_search(decoder, limits, beam_size, n_best=2) for decoder in decoders)
    assert [[h.ids for h in best] for best in cached] == [[h.ids for h in best] for best in uncached]


@torch.inference_mode()
def test_log_probabilities_are_those_of_the_model(tiny_model):
    torch.manual_seed(1)
    source = torch.randint(4, 50, (3, 7))
    decoder = CachedDecoder(tiny_model, source, 12)
    for n, hypotheses in enumerate(beam_search(decoder, torch.tensor([12] * 3), 4, 0.6, 4)):
        assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)
        for h in hypotheses:
            label = torch.tensor([[*h.ids, EOS][:12]])
            target = torch.tensor([[SOS, *label[0, :-1].tolist()]])
            x = source[n : n + 1]
            log_p = tiny_model(x, target, padding_mask(x), causal_mask(target.size(1))).log_softmax(-1)
            total = log_p.gather(-1, label.unsqueeze(-1)).sum().item()
            assert h.log_probability == pytest.approx(total, abs=1e-4)
            assert h.score == pytest.approx(total / float(length_normalizer(label.size(1), 0.6)), abs=1e-4)


@torch.inference_mode()
def test_a_batch_finds_what_each_sentence_finds_alone(tiny_model):
    torch.manual_seed(1)
    source, limits = torch.randint(4, 50, (20, 8)), 1 + torch.arange(20) * 13 % 30  # some finish long before the others
    together = beam_search(CachedDecoder(tiny_model, source, 30), limits, 3, n_best=2)
    greedy = greedy_decode(CachedDecoder(tiny_model, source, 30), limits)
    for n in range(20):
        (alone,) = beam_search(CachedDecoder(tiny_model, source[n : n + 1], 30), limits[n : n + 1], 3, n_best=2)
        assert [h.ids for h in alone] == [h.ids for h in together[n]]
        assert greedy_decode(CachedDecoder(tiny_model, source[n : n + 1], 30), limits[n : n + 1]) == [greedy[n]]
