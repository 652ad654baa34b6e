"""Greedy and beam search, over scripted decoders and over a small Transformer.

B  sentences being searched    V  vocabulary    W  beam size
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from dataset import EOS, PAD, SOS, padding_mask
from model import causal_mask
from search import EnsembleDecoder, Hypothesis, beam_search, greedy_decode, length_normalizer
from translate import CachedDecoder, UncachedDecoder


class ScriptedDecoder:
    """A StepDecoder that predicts the tokens of given sentences, and records the ids of each step."""

    def __init__(self, sentences: list[list[int]]):
        self.rows = [[*ids, EOS] for ids in sentences]
        self.t, self.inputs = 0, []

    def step(self, ids: Tensor) -> Tensor:
        self.inputs.append(ids.tolist())
        following = [row[self.t] if self.t < len(row) else PAD for row in self.rows]
        self.t += 1
        return torch.nn.functional.one_hot(torch.tensor(following), 20).float()

    def select(self, rows: Tensor, sentences: Tensor | None = None) -> None:
        self.rows = [self.rows[i] for i in rows]


def test_greedy_search_ends_each_sentence_at_eos_or_at_its_length_limit():
    sentences = [[5, 6], [], [7] * 11, [8] * 30]
    decoder = ScriptedDecoder(sentences)
    assert greedy_decode(decoder, torch.tensor([20, 20, 20, 13])) == [[5, 6], [], [7] * 11, [8] * 13]
    assert decoder.inputs[0] == [SOS] * 4
    # Finished sentences are dropped every 4 steps: two after 4 steps, one after 12, the last after 16.
    assert [len(ids) for ids in decoder.inputs] == [4] * 4 + [2] * 8 + [1] * 4


def test_the_batch_shrinks_only_when_an_eighth_is_finished():
    sentences = [[5], [6] * 5, [7] * 6, *([i] * 30 for i in range(4, 19))]
    decoder = ScriptedDecoder(sentences)
    assert greedy_decode(decoder, torch.tensor([20] * 18)) == [ids[:20] for ids in sentences]
    # After 4 steps one of 18 is finished, less than an eighth; after 8 steps three are.
    assert [len(ids) for ids in decoder.inputs] == [18] * 8 + [15] * 12


@pytest.mark.parametrize(
    ("length", "length_penalty", "expected"), [(1, 0.6, 1), (19, 0.5, 2), (19, 1.0, 4), (7, 2.0, 4), (19, 0.0, 1)]
)
def test_the_length_normalizer_is_equation_14_of_wu_et_al(length, length_penalty, expected):
    assert length_normalizer(length, length_penalty) == pytest.approx(expected)
    assert length_normalizer(torch.tensor([length]), length_penalty).item() == pytest.approx(expected)


class MarkovDecoder:
    """A StepDecoder whose next token depends only on the step and the previous token, not on a source sentence."""

    def __init__(self, V: int, seed: int):
        logits = 1.5 * torch.randn(40, V, V, generator=torch.Generator().manual_seed(seed))
        self.log_p, self.steps = logits.log_softmax(-1), 0

    def step(self, ids: Tensor) -> Tensor:
        self.steps += 1
        return self.log_p[self.steps - 1, ids]

    def select(self, rows: Tensor, sentences: Tensor | None = None) -> None:
        pass


def all_hypotheses(decoder: MarkovDecoder, limit: int, length_penalty: float) -> list[Hypothesis]:
    """Every hypothesis, best first: those that end with [EOS] within the limit, and those that the limit cuts off."""
    vocabulary = range(decoder.log_p.size(-1))
    others = [i for i in vocabulary if i != EOS]
    found = []
    for length in range(1, limit + 1):
        for ids in itertools.product(others, repeat=length - 1):
            for last in [EOS] if length < limit else vocabulary:
                path = [SOS, *ids, last]
                log_p = sum(decoder.log_p[t, a, b].item() for t, (a, b) in enumerate(itertools.pairwise(path)))
                without_eos = [*ids] if last == EOS else [*ids, last]
                found.append(Hypothesis(without_eos, log_p, log_p / ((5 + length) / 6) ** length_penalty))
    return sorted(found, key=lambda h: -h.score)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 2.0])
def test_a_beam_as_large_as_the_search_space_finds_the_best_hypotheses(seed, length_penalty):
    """Five tokens and four steps: the beam holds every hypothesis, so none can be pruned."""
    decoder = MarkovDecoder(5, seed)
    expected = all_hypotheses(decoder, 4, length_penalty)
    (found,) = beam_search(decoder, torch.tensor([4]), len(expected), length_penalty, n_best=10)
    assert [h.ids for h in found] == [h.ids for h in expected[:10]]
    for a, b in zip(found, expected, strict=False):
        assert (a.log_probability, a.score) == pytest.approx((b.log_probability, b.score), abs=1e-5)


def test_an_ensemble_searches_with_the_mean_of_the_probabilities_of_its_members():
    members = [MarkovDecoder(5, seed) for seed in range(3)]
    mean = MarkovDecoder(5, 0)
    mean.log_p = torch.stack([decoder.log_p.exp() for decoder in members]).mean(0).log()
    expected = all_hypotheses(mean, 4, 0.6)
    (found,) = beam_search(EnsembleDecoder(members), torch.tensor([4]), len(expected), 0.6, n_best=10)
    assert [h.ids for h in found] == [h.ids for h in expected[:10]]
    assert found[0].log_probability == pytest.approx(expected[0].log_probability, abs=1e-5)
    limits = torch.tensor([9, 12, 4])
    members = [MarkovDecoder(5, seed) for seed in range(3)]
    mean.steps = 0
    assert greedy_decode(EnsembleDecoder(members), limits) == greedy_decode(mean, limits)


def ngrams(ids: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def repeats(ids: list[int], n: int) -> bool:
    """Whether an n-gram occurs twice."""
    return len(set(ngrams(ids, n))) < len(ngrams(ids, n))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [1, 2])
def test_a_large_beam_without_repeated_ngrams_finds_the_best_of_the_other_hypotheses(seed, n):
    """Log-probabilities are those of the model: excluding a token makes the others no more probable."""
    decoder = MarkovDecoder(5, seed)
    hypotheses = all_hypotheses(decoder, 5, 1.0)
    expected = [h for h in hypotheses if not repeats(h.ids, n)]
    assert len(expected) < len(hypotheses)
    (found,) = beam_search(decoder, torch.tensor([5]), len(expected), 1.0, n_best=10, no_repeat_ngram=n)
    assert [h.ids for h in found] == [h.ids for h in expected[:10]]
    for a, b in zip(found, expected, strict=False):
        assert a.log_probability == pytest.approx(b.log_probability, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [1, 2, 3])
def test_greedy_search_without_repeated_ngrams_takes_the_most_probable_other_token(seed, n):
    decoder = MarkovDecoder(6, seed)
    decoder.log_p[:, 5, 5] += 10  # a token that repeats itself
    expected: list[int] = []
    while len(expected) < 30:
        log_p = decoder.log_p[len(expected), expected[-1] if expected else SOS]
        token = next(i for i in log_p.argsort(descending=True).tolist() if i == EOS or not repeats([*expected, i], n))
        if token == EOS:
            break
        expected.append(token)
    limits = torch.tensor([30, 2, 9])
    found = greedy_decode(decoder, limits, no_repeat_ngram=n)
    assert found == [expected[:limit] for limit in limits]
    decoder.steps = 0
    assert [h.ids for (h,) in beam_search(decoder, limits, 1, no_repeat_ngram=n)] == found


@pytest.mark.parametrize("seed", range(20))
def test_stopping_early_does_not_change_the_result_of_beam_search(seed, monkeypatch):
    """Compared with a search to the length limit, whose bound is never reached."""
    limits = torch.tensor([17, 40, 23])
    early, complete = MarkovDecoder(12, seed), MarkovDecoder(12, seed)
    found = beam_search(early, limits, beam_size=4, length_penalty=1.0, n_best=3)
    monkeypatch.setattr("search.cannot_improve", lambda nth_best, bound: nth_best > math.inf)
    assert beam_search(complete, limits, beam_size=4, length_penalty=1.0, n_best=3) == found
    assert early.steps <= complete.steps == 40


def test_beam_search_stops_when_no_unfinished_hypothesis_can_improve():
    decoder = MarkovDecoder(12, seed=0)
    decoder.log_p[..., EOS] += 10
    decoder.log_p = decoder.log_p.log_softmax(-1)
    assert [h.ids for (h,) in beam_search(decoder, torch.tensor([40, 17]), beam_size=4)] == [[], []]
    assert decoder.steps == 4  # the first check for finished sentences


@pytest.mark.parametrize("seed", range(20))
def test_beam_search_with_a_beam_of_one_equals_greedy_search(seed):
    limits = torch.tensor([5, 30, 12, 30])
    greedy = greedy_decode(MarkovDecoder(12, seed), limits)
    assert [h.ids for (h,) in beam_search(MarkovDecoder(12, seed), limits, beam_size=1)] == greedy


@torch.inference_mode()
@pytest.mark.parametrize("beam_size", [1, 2, 5])
def test_search_finds_the_same_with_and_without_a_cache(tiny_model, beam_size):
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
def test_hypotheses_have_the_log_probabilities_of_the_model(tiny_model):
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
            assert h.score == pytest.approx(total / ((5 + label.size(1)) / 6) ** 0.6, abs=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("n", [0, 2])
def test_searching_a_batch_equals_searching_each_sentence_separately(tiny_model, n):
    torch.manual_seed(1)
    source, limits = torch.randint(4, 50, (20, 8)), 1 + torch.arange(20) * 13 % 30  # limits from 1 to 30
    together = beam_search(CachedDecoder(tiny_model, source, 30), limits, 3, n_best=2, no_repeat_ngram=n)
    greedy = greedy_decode(CachedDecoder(tiny_model, source, 30), limits, n)
    if n:
        assert not any(repeats(ids, n) for ids in [*greedy, *(h.ids for found in together for h in found)])
    for i in range(20):
        one, limit = source[i : i + 1], limits[i : i + 1]
        (alone,) = beam_search(CachedDecoder(tiny_model, one, 30), limit, 3, n_best=2, no_repeat_ngram=n)
        assert [h.ids for h in alone] == [h.ids for h in together[i]]
        assert greedy_decode(CachedDecoder(tiny_model, one, 30), limit, n) == [greedy[i]]
