"""Attention changed after the softmax, and parts of the network switched off."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from config import InputError
from interpret.trace import KINDS
from model import Transformer

Change = Callable[[Tensor], Tensor]  # scores (B, H, Q, K) -> scores of the same shape

# ---------------------------------------------------------------------------- corrupted attention


@contextmanager
def intervene(
    model: Transformer, change: Change, kind: str, layers: list[int] | None = None, heads: list[int] | None = None
) -> Iterator[None]:
    """Within it, `change` rewrites the scores of these layers and heads (all where None) of a kind."""
    blocks = model.attention_blocks()[kind]
    for layer in layers or []:
        if not 0 <= layer < len(blocks):
            raise InputError(f"no layer {layer} in the {kind}; it has layers 0 to {len(blocks) - 1}")
    for head in heads or []:
        if not 0 <= head < blocks[0].h:
            raise InputError(f"no head {head}; there are heads 0 to {blocks[0].h - 1}")
    chosen = [block for layer, block in enumerate(blocks) if layers is None or layer in layers]
    before = [block.intervene for block in chosen]

    def changed(earlier: Change | None, scores: Tensor) -> Tensor:
        scores = earlier(scores) if earlier else scores
        if heads is None:
            return change(scores)
        scores = scores.clone()
        scores[:, heads] = change(scores[:, heads])
        return scores

    for block, earlier in zip(chosen, before, strict=True):
        block.intervene = partial(changed, earlier)
    try:
        yield
    finally:
        for block, earlier in zip(chosen, before, strict=True):
            block.intervene = earlier


def unchanged(scores: Tensor) -> Tensor:
    return scores


def uniform(scores: Tensor) -> Tensor:
    """a_ij = 1 / (number of positions j that i may attend to)."""
    return renormalized(scores, scores > 0, flat=True)


def first(scores: Tensor, k: int = 1) -> Tensor:
    """a_ij = 0 unless j is among the first k positions that i may attend to, then rescaled to sum to 1."""
    allowed = scores > 0  # masked positions have exactly 0, others more, short of underflow
    return renormalized(scores, allowed & (allowed.cumsum(-1) <= k))


def last(scores: Tensor, k: int = 1) -> Tensor:
    """a_ij = 0 unless j is among the last k positions that i may attend to, then rescaled to sum to 1."""
    allowed = scores > 0
    rank = allowed.cumsum(-1)
    return renormalized(scores, allowed & (rank > rank[..., -1:] - k))


def shuffled(scores: Tensor, seed: int = 0) -> Tensor:
    """a_ij = a_ip(j): the weights of each row dealt out anew among the positions that i may attend to."""
    allowed = scores > 0
    keys = torch.rand(scores.size(-1), generator=torch.Generator().manual_seed(seed)).to(scores.device)
    dealt = torch.where(allowed, keys, torch.inf).argsort(-1)  # allowed positions in random order, then the others
    places = (~allowed).to(torch.uint8).argsort(dim=-1, stable=True)  # allowed positions in their own order
    return torch.zeros_like(scores).scatter(-1, places, scores.gather(-1, dealt))


def pattern(scores: Tensor, weights: Tensor) -> Tensor:
    """a_ij = the weights (Q', K') of a head on another sentence, cut or continued to this one's size and rescaled."""
    Q, K = scores.shape[-2:]
    rows, columns = torch.arange(Q).clamp(max=weights.size(0) - 1), torch.arange(min(K, weights.size(1)))
    taken = torch.zeros_like(scores)
    taken[..., columns] = weights.to(scores)[rows][:, columns]
    return renormalized(taken, scores > 0)


def off(scores: Tensor) -> Tensor:
    """a_ij = 0: the head adds nothing."""
    return torch.zeros_like(scores)


def renormalized(scores: Tensor, keep: Tensor, flat: bool = False) -> Tensor:
    """Scores where `keep`, rescaled to sum to 1; even over what is kept if `flat`, or where nothing was there."""
    kept, even = scores * keep, keep / keep.sum(-1, keepdim=True).clamp(min=1)
    total = kept.sum(-1, keepdim=True)
    return torch.where((total > 0) & (not flat), kept / total.clamp(min=1e-30), even.to(scores.dtype))


# ---------------------------------------------------------------------------- parts switched off


@contextmanager
def hooked(modules: list[nn.Module], hook: Callable) -> Iterator[None]:
    """Within it, `hook(module, inputs, output)` takes the place of these modules' outputs."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def silence(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def drop_residual(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return output - inputs[0]


def keep_input(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return inputs[0]


def copy_source(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """The decoder's output (B, T, D) becomes the encoder's at the same positions, its last one where it is shorter."""
    encoder_output = inputs[1]
    positions = torch.arange(output.size(1), device=output.device).clamp(max=encoder_output.size(1) - 1)
    return encoder_output[:, positions]


def blocks_of(model: Transformer, stack: str, layer: int | None) -> list[nn.Module]:
    layers = list((model.encoder if stack == "encoder" else model.decoder).layers)
    return layers if layer is None else [layers[layer]]


@contextmanager
def without(model: Transformer, parts: str, stack: str, layer: int | None = None) -> Iterator[None]:
    """Within it, the named sublayers (of "self_attention cross_attention feed_forward") add nothing to the residual."""
    modules = [getattr(block, f"{part}_block") for block in blocks_of(model, stack, layer) for part in parts.split()]
    with hooked(modules, silence):
        yield


@contextmanager
def only_self_attention(model: Transformer, stack: str, layer: int | None = None) -> Iterator[None]:
    """Within it, a block's output is its self-attention alone, without even the residual path."""
    others = "feed_forward" if stack == "encoder" else "cross_attention feed_forward"
    residuals = [block.residual_connections[0] for block in blocks_of(model, stack, layer)]
    with without(model, others, stack, layer), hooked(residuals, drop_residual):
        yield


@dataclass(frozen=True)
class Variant:
    """One way to take something away: a name, what happens to the data, and the context manager that does it."""

    name: str
    says: str
    apply: Callable[[Transformer], object]


SUBLAYERS = {"encoder": "self_attention feed_forward", "decoder": "self_attention cross_attention feed_forward"}
NOTHING_ADDED = "Every sublayer adds 0: what comes out is norm(x) of the embeddings."
ATTENTION_ALONE = "No residual path: x = SelfAttention(norm(x)), and nothing else."
NO_POSITIONS = "Embeddings go in without positions: x = embedding * sqrt(D)."
NO_FEED_FORWARD = "The feed-forward blocks add 0: x = x + 0."


def corruptions(kind: str) -> list[Variant]:
    """The ways to corrupt all heads of one kind of attention."""

    def variant(name: str, says: str, change: Change) -> Variant:
        return Variant(f"{kind}: {name}", says, lambda model: intervene(model, change, kind))

    return [
        variant("uniform", "Every position gets the same weight: a_ij = 1/n.", uniform),
        variant("first 2", "Only the first two positions are seen.", partial(first, k=2)),
        variant("last 2", "Only the last two positions are seen.", partial(last, k=2)),
        variant("shuffled", "The weights of each row are dealt out anew: a_ij = a_ip(j).", shuffled),
    ]


def switched_off(stack: str) -> list[Variant]:
    """The parts that encoder and decoder both have, each taken from one of them."""
    position = "src_pos" if stack == "encoder" else "tgt_pos"
    return [
        Variant(f"{stack}: only the residual path", NOTHING_ADDED, lambda m: without(m, SUBLAYERS[stack], stack)),
        Variant(f"{stack}: only self-attention", ATTENTION_ALONE, lambda m: only_self_attention(m, stack)),
        Variant(f"{stack}: no feed-forward", NO_FEED_FORWARD, lambda m: without(m, "feed_forward", stack)),
        Variant(f"{stack}: no positions", NO_POSITIONS, lambda m: hooked([getattr(m, position)], keep_input)),
    ]


VARIANTS: list[Variant] = [
    *(variant for kind in KINDS for variant in corruptions(kind)),
    *(variant for stack in SUBLAYERS for variant in switched_off(stack)),
    Variant("no positions", NO_POSITIONS, lambda m: hooked([m.src_pos, m.tgt_pos], keep_input)),
    Variant(
        "decoder: no cross-attention",
        "The decoder never sees the source: x = x + 0.",
        lambda m: without(m, "cross_attention", "decoder"),
    ),
    Variant(
        "decoder: residual path and self-attention",
        "The decoder keeps x = x + SelfAttention(norm(x)); the other sublayers add 0.",
        lambda m: without(m, "cross_attention feed_forward", "decoder"),
    ),
    Variant(
        "decoder: source copied",
        "The decoder's output is replaced by the encoder's: y_t = encoder_t.",
        lambda m: hooked([m.decoder], copy_source),
    ),
]


UNIFORM_CROSS = next(variant for variant in VARIANTS if variant.name == "cross: uniform")


def head_off(kind: str, layer: int, head: int) -> Variant:
    """One head alone switched off."""
    says = f"Head {head} of layer {layer} adds nothing: a_ij = 0."
    return Variant(f"{kind} {layer}.{head} off", says, lambda model: intervene(model, off, kind, [layer], [head]))
