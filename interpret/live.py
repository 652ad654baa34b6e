"""What the live explorer computes: translations of a changed model, the tree of a beam search, a look inside a head.

    B  sentences          T  target tokens that the decoder reads    H  heads    d_k  head size
    S  source tokens      W  beam size                               D  d_model  V    target vocabulary

Everything here is of one sentence, so B is 1. Searches use no caches, because a change may concern all positions.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from config import InputError
from dataset import EOS, SOS, padding_mask
from interpret.interventions import Variant
from interpret.trace import AttentionTrace, character_indices, first_steps, merge_bytes, record_trace, recorded_pass
from model import Transformer, causal_mask
from search import BeamStep, Hypothesis, StepDecoder, beam_search, greedy_decode, length_normalizer
from translate import Translator

TOP_K = 8  # candidates of each step

# ---------------------------------------------------------------------------- one translation


@dataclass(frozen=True)
class Scene:
    """A translation and what is shown of it. A row of `trace` may join several tokens: the bytes of a character."""

    ids: list[int]  # of the translation, without [SOS] and [EOS]
    text: str
    trace: AttentionTrace  # bytes of a character joined
    pieces: AttentionTrace  # the same, token by token
    log_p: np.ndarray  # (T,) ln p of each token written, in nats; the last is [EOS], except at the length limit
    tree: pd.DataFrame | None  # of the beam search, see `beam_tree`; None for greedy search

    @property
    def decoder_ids(self) -> list[int]:
        """(T,) The tokens that the decoder reads."""
        return [SOS, *self.ids][: len(self.log_p)]

    def last_piece(self, kind: str, row: int) -> int:
        """The position, token by token, of the last token of a row."""
        tokens = self.pieces.labels(kind)[0]
        groups = character_indices(tokens)
        return max(i for i, group in enumerate(groups) if group <= row)


@contextmanager
def changed(model: Transformer, changes: Sequence[Variant]) -> Iterator[None]:
    """The model with all of these changes."""
    with ExitStack() as stack:
        for variant in changes:
            stack.enter_context(variant.apply(model))
        yield


@torch.inference_mode()
def translate_scene(
    translator: Translator,
    sentence: str,
    beam_size: int = 1,
    prefix: Sequence[int] = (),
    changes: Sequence[Variant] = (),
    length_penalty: float = 0.6,
) -> Scene:
    """Translates with greedy (beam size 1) or beam search; the translation starts with the ids of `prefix`.

    Raises InputError for an empty sentence, one longer than `seq_len`, and a prefix of other ids than the vocabulary's.
    """
    if not sentence.strip():
        raise InputError("the sentence is empty; give at least one word")
    if bad := [i for i in prefix if not 0 <= i < translator.tokenizer_tgt.get_vocab_size()]:
        raise InputError(f"no token {bad[0]} in the target vocabulary of this run")
    source, tree = translator.encode(sentence), None
    with changed(translator.model, changes):
        decoder, limits = translator.decoder_and_limits([source], use_cache=False)
        decoder = Forced(decoder, prefix)
        if beam_size == 1:
            (ids,) = greedy_decode(decoder, limits)
        else:
            steps: list[BeamStep] = []
            ((best,),) = beam_search(decoder, limits, beam_size, length_penalty, watch=steps.append)
            ids, tree = best.ids, beam_tree(steps, best, translator.tokenizer_tgt.id_to_token, length_penalty)
        is_complete = len(ids) < int(limits)  # otherwise the search ended without [EOS]
        return scene_of(translator, sentence, ids[: translator.config.seq_len - 1], tree, is_complete)


def scene_of(
    translator: Translator, sentence: str, ids: list[int], tree: pd.DataFrame | None = None, is_complete: bool = True
) -> Scene:
    """The scene of a given translation, which is complete if [EOS] follows it."""
    pieces = record_trace(translator, sentence, ids, TOP_K)
    log_p = log_probabilities(translator, sentence, ids)
    if not is_complete:
        pieces, log_p = first_steps(pieces, len(ids)), log_p[:-1]
    return Scene(ids, translator.tokenizer_tgt.decode(ids), merge_bytes(pieces), pieces, log_p, tree)


@torch.inference_mode()
def log_probabilities(translator: Translator, sentence: str, ids: list[int]) -> np.ndarray:
    """(T,) ln p of each token of a translation and of the [EOS] after it, in nats."""
    logits, _ = recorded_pass(translator, translator.encode(sentence), [SOS, *ids])  # (T, V)
    written = torch.tensor([*ids, EOS], device=logits.device)
    return logits.log_softmax(-1).gather(1, written.unsqueeze(1)).squeeze(1).cpu().numpy()


class Forced:
    """A StepDecoder whose first tokens are given: all others get the probability 0."""

    def __init__(self, decoder: StepDecoder, prefix: Sequence[int]):
        self.decoder, self.prefix = decoder, list(prefix)

    def step(self, ids: Tensor) -> Tensor:
        logits = self.decoder.step(ids)  # (B W, V)
        if not self.prefix:
            return logits
        token = self.prefix.pop(0)
        only = torch.full_like(logits, -math.inf)
        only[:, token] = logits[:, token]
        return only

    def select(self, rows: Tensor, sentences: Tensor | None = None) -> None:
        self.decoder.select(rows, sentences)


def beam_tree(steps: list[BeamStep], best: Hypothesis, token_of, length_penalty: float) -> pd.DataFrame:
    """The extensions that a beam search of one sentence considered, up to 2 W at each step.

    Columns node, parent, step, rank (from 0, the most probable first), token, log_p (in nats), score (log_p divided by
    the length normalizer), state, and best: whether the node is on the way to the best hypothesis. The state is kept;
    finished; or pruned: not among the W best, or the search ended first.
    """
    rows, hypotheses = [], ["root"] * steps[0].is_end.size(1)
    for t, step in enumerate(steps):
        ids, origin, log_p, is_end, kept = (x[0].tolist() for x in step[:-1])
        is_done = bool(step.is_done[0])
        for rank, (token, parent, value) in enumerate(zip(ids, origin, log_p, strict=True)):
            if value == -math.inf:
                continue
            is_finished = rank < len(is_end) and is_end[rank]
            state = "finished" if is_finished else "kept" if rank in kept and not is_done else "pruned"
            rows.append(
                {"node": f"{t}.{rank}", "parent": hypotheses[parent], "step": t, "rank": rank, "token": token_of(token),
                 "id": token, "log_p": value, "score": value / length_normalizer(t + 1, length_penalty), "state": state}
            )  # fmt: skip
        hypotheses = [f"{t}.{rank}" for rank in kept]
        if is_done:
            break
    table = pd.DataFrame(rows)
    finished = table[table["state"] == "finished"]
    node = finished.loc[(finished["score"] - best.score).abs().idxmin(), "node"]
    parents, path = dict(zip(table["node"], table["parent"], strict=True)), set()
    while node in parents:
        path.add(node)
        node = parents[node]
    return table.assign(best=table["node"].isin(path))


# ---------------------------------------------------------------------------- baseline and variant


@dataclass(frozen=True)
class Comparison:
    """A changed model beside the unchanged one."""

    baseline: Scene
    variant: Scene  # with the translation of the changed model
    forced: AttentionTrace  # the changed model on the translation of the baseline
    change: float  # of the log-probability of the baseline's translation, in nats


def compare_scenes(
    translator: Translator,
    sentence: str,
    baseline: Scene,
    changes: Sequence[Variant],
    beam_size: int = 1,
    prefix: Sequence[int] = (),
) -> Comparison:
    """The changed model on the sentence of a baseline scene."""
    variant = translate_scene(translator, sentence, beam_size, prefix, changes)
    with changed(translator.model, changes):
        forced = scene_of(translator, sentence, baseline.ids, is_complete=len(baseline.log_p) > len(baseline.ids))
    return Comparison(baseline, variant, forced.trace, float(forced.log_p.sum() - baseline.log_p.sum()))


def changed_tokens(tokens: list[str], others: list[str]) -> list[bool]:
    """For each of the other tokens, whether it is new or replaced in comparison with the tokens."""
    same = difflib.SequenceMatcher(a=tokens, b=others, autojunk=False).get_matching_blocks()
    kept = {block.b + i for block in same for i in range(block.size)}
    return [i not in kept for i in range(len(others))]


# ---------------------------------------------------------------------------- inside a head


@torch.inference_mode()
def inside_head(
    translator: Translator, scene: Scene, sentence: str, kind: str, layer: int, head: int, row: int
) -> pd.DataFrame:
    """The parts of one row of a head: column, token, product, weight, value_norm, contribution.

    `product` is query·key / sqrt(d_k), of which the softmax is the weight; `value_norm` the norm of the value; and
    `contribution` the norm of weight x value after the head's part of w_o, which is what the head adds to the residual
    stream (Kobayashi et al., 2020). Rows are tokens, not joined bytes; masked keys are omitted.
    """
    block = translator.model.attention_blocks()[kind][layer]
    with outputs_of([block.w_q, block.w_k, block.w_v]) as outputs:
        _, weights = recorded_pass(translator, translator.encode(sentence), scene.decoder_ids)
    query, key, value = (block.split_heads(outputs[m])[0, head].float() for m in (block.w_q, block.w_k, block.w_v))
    projection = block.w_o.weight[:, head * block.d_k : (head + 1) * block.d_k].float()  # (D, d_k)
    weight = torch.from_numpy(weights[kind][layer, head, row]).to(value.device)  # (K,)
    seen = row + 1 if kind == "decoder" else len(key)
    table = pd.DataFrame({
        "column": range(len(key)),
        "token": scene.pieces.labels(kind)[1],
        "product": (key @ query[row] / math.sqrt(block.d_k)).cpu().numpy(),
        "weight": weight.cpu().numpy(),
        "value_norm": value.norm(dim=-1).cpu().numpy(),
        "contribution": (weight * (value @ projection.T).norm(dim=-1)).cpu().numpy(),
    })  # fmt: skip
    return table[:seen]


@contextmanager
def outputs_of(modules: list[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """The outputs of the modules in their last forward pass."""
    outputs: dict[nn.Module, Tensor] = {}
    handles = [module.register_forward_hook(lambda m, _, output: outputs.update({m: output})) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode(False)
@torch.enable_grad()
def gradient_times_input(
    translator: Translator, scene: Scene, sentence: str, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Gradient x input of the log-probability of the token written at a step: (S,) source and (T,) target tokens.

    The dot product of each embedding with its gradient (Shrikumar et al., 2016): to first order, the change of the
    log-probability if the embedding were scaled up.
    """
    model = translator.model
    source, target = (torch.tensor([ids]) for ids in (translator.encode(sentence), scene.decoder_ids))
    source, target = source.to(translator.device), target.to(translator.device)
    embeddings = [embed(ids).detach().requires_grad_() for embed, ids in
                  ((model.src_embed, source), (model.tgt_embed, target))]  # fmt: skip
    mask = padding_mask(source)
    encoded = model.encoder(model.src_pos(embeddings[0]), mask)
    x = model.decoder(model.tgt_pos(embeddings[1]), encoded, mask, causal_mask(target.size(1), source.device))
    log_p = model.project(x)[0, step].float().log_softmax(-1)[[*scene.ids, EOS][step]]
    # A changed model may not depend on one of the two: its gradient is 0.
    gradients = torch.autograd.grad(log_p, embeddings, allow_unused=True, materialize_grads=True)
    return tuple((x * g).sum(-1)[0].detach().cpu().numpy() for x, g in zip(embeddings, gradients, strict=True))


def mixed_heads(weights: np.ndarray, picked: Sequence[tuple[int, int]]) -> np.ndarray:
    """The mean over the picked (layer, head) of weights (L, H, Q, K): (Q, K). None picked: the mean over all."""
    if not picked:
        return weights.mean((0, 1))
    return np.mean([weights[layer, head] for layer, head in picked], axis=0)
