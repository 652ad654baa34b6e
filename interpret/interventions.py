"""Interventions: attention changed after the softmax, parts of the network switched off, and the variants to compare.

    B  sentences    H  heads    Q  query positions    K  key positions
    S  source tokens    T  target tokens    D  d_model

The model does not depend on this file. Attention is changed through the `intervene` attribute of its attention blocks,
everything else through PyTorch's forward hooks. Every change is a context manager: it holds inside the `with` block
and is undone afterwards. Changes can be nested; the outer one is applied first.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from config import InputError
from interpret.trace import KIND_NAMES, KINDS
from model import Transformer

Change = Callable[[Tensor], Tensor]  # softmax scores (B, H, Q, K) -> scores of the same shape

# ---------------------------------------------------------------------------- changes of attention


@contextmanager
def intervene(
    model: Transformer, change: Change, kind: str, layers: list[int] | None = None, heads: list[int] | None = None
) -> Iterator[None]:
    """Replaces the softmax scores of one kind of attention with `change(scores)`, in all layers and heads unless given.

    Raises InputError for a layer or head out of range.
    """
    blocks = model.attention_blocks()[kind]
    for layer in layers or []:
        if not 0 <= layer < len(blocks):
            raise InputError(f"no layer {layer} in {KIND_NAMES[kind]}; it has layers 0 to {len(blocks) - 1}")
    for head in heads or []:
        if not 0 <= head < blocks[0].h:
            raise InputError(f"no head {head} in {KIND_NAMES[kind]}; it has heads 0 to {blocks[0].h - 1}")
    chosen = [block for layer, block in enumerate(blocks) if layers is None or layer in layers]
    before = [block.intervene for block in chosen]
    # A list would be copied to a GPU at every call.
    index = None if heads is None else torch.tensor(heads, dtype=torch.long, device=next(model.parameters()).device)

    def changed(outer: Change | None, scores: Tensor) -> Tensor:
        scores = outer(scores) if outer else scores
        if index is None:
            return change(scores)
        scores = scores.clone()
        scores[:, index] = change(scores[:, index])
        return scores

    for block, outer in zip(chosen, before, strict=True):
        block.intervene = partial(changed, outer)
    try:
        yield
    finally:
        for block, outer in zip(chosen, before, strict=True):
            block.intervene = outer


# A key is allowed if its score is above 0: masked keys have exactly 0, others more, unless they underflow.


def identity(scores: Tensor) -> Tensor:
    """No change."""
    return scores


def zero(scores: Tensor) -> Tensor:
    """a_ij = 0: the head adds nothing."""
    return torch.zeros_like(scores)


def uniform(scores: Tensor) -> Tensor:
    """a_ij = 1 / n, where n is the number of allowed keys of query i."""
    return renormalized(scores, scores > 0, flat=True)


def first_keys(scores: Tensor, n: int = 1) -> Tensor:
    """a_ij = 0 unless j is one of the first n allowed keys of query i; the others are rescaled to sum to 1."""
    allowed = scores > 0
    return renormalized(scores, allowed & (allowed.cumsum(-1) <= n))


def last_keys(scores: Tensor, n: int = 1) -> Tensor:
    """a_ij = 0 unless j is one of the last n allowed keys of query i; the others are rescaled to sum to 1."""
    allowed = scores > 0
    rank = allowed.cumsum(-1)
    return renormalized(scores, allowed & (rank > rank[..., -1:] - n))


def shuffled(scores: Tensor, seed: int = 0) -> Tensor:
    """a_ij = a_iπ(j): the weights of each row, permuted randomly among its allowed keys."""
    allowed = scores > 0
    order = torch.rand(scores.size(-1), generator=torch.Generator().manual_seed(seed)).to(scores.device)  # (K,)
    origin = torch.where(allowed, order, torch.inf).argsort(-1)  # allowed keys in random order, then the others
    target = (~allowed).to(torch.uint8).argsort(dim=-1, stable=True)  # allowed keys in their own order, then the others
    return torch.zeros_like(scores).scatter(-1, target, scores.gather(-1, origin))


def fixed_pattern(scores: Tensor, weights: Tensor) -> Tensor:
    """a_ij = weights_ij: the weights of a head on another sentence, cropped or padded to this one and renormalized.

    Surplus rows and columns of `weights` are dropped; missing rows repeat the last one, missing columns are 0.
    """
    Q, K = scores.shape[-2:]
    rows = torch.arange(Q, device=scores.device).clamp(max=weights.size(0) - 1)
    columns = min(K, weights.size(1))
    fitted = torch.zeros_like(scores)
    fitted[..., :columns] = weights.to(scores)[rows, :columns]
    return renormalized(fitted, scores > 0)


def renormalized(scores: Tensor, keep: Tensor, flat: bool = False) -> Tensor:
    """The scores where `keep` is True, else 0, rescaled so that each row sums to 1.

    With `flat`, and in rows whose kept scores are all 0, the kept keys get equal weights.
    """
    kept, even = scores * keep, keep / keep.sum(-1, keepdim=True).clamp(min=1)
    total = kept.sum(-1, keepdim=True)
    return torch.where((total > 0) & (not flat), kept / total.clamp(min=1e-30), even.to(scores.dtype))


# ---------------------------------------------------------------------------- parts switched off (ablation)

SUBLAYERS = {
    "encoder": ("self_attention", "feed_forward"),
    "decoder": ("self_attention", "cross_attention", "feed_forward"),
}


@contextmanager
def replace_outputs(modules: Iterable[nn.Module], hook: Callable) -> Iterator[None]:
    """Replaces the outputs of the modules with `hook(module, inputs, output)`."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def zero_output(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def sublayer_only(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """For a residual connection: the output without x, sublayer(norm(x)) or, with post-norm, norm(sublayer(x))."""
    x, sublayer = inputs
    return sublayer(module.norm(x)) if module.is_pre_norm else module.norm(sublayer(x))


def input_as_output(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return inputs[0]


def encoder_as_output(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """For the decoder: the encoder output at the same position, (B, S, D) -> (B W, T, D).

    Where the source is shorter than the target, its last position is repeated. All W hypotheses have the same source.
    """
    _, encoded, src_mask, *_ = inputs
    last = src_mask.flatten(1).sum(1, keepdim=True) - 1  # (B, 1, 1, S) -> (B, 1), before the padding
    positions = torch.arange(output.size(1), device=output.device).minimum(last)  # (B, T)
    copied = encoded.gather(1, positions.unsqueeze(-1).expand(-1, -1, encoded.size(-1)))  # (B, T, D)
    return copied.repeat_interleave(len(output) // len(encoded), 0)


def blocks_of(model: Transformer, stack: str, layer: int | None = None) -> list[nn.Module]:
    """The blocks of a stack: all, or only that of one layer."""
    layers = list((model.encoder if stack == "encoder" else model.decoder).layers)
    return layers if layer is None else [layers[layer]]


@contextmanager
def without_sublayers(
    model: Transformer, stack: str, sublayers: Iterable[str], layer: int | None = None
) -> Iterator[None]:
    """The given sublayers (see SUBLAYERS) of all blocks, or of one layer, add 0 to the residual stream."""
    blocks = blocks_of(model, stack, layer)
    modules = [getattr(block, f"{sublayer}_block") for block in blocks for sublayer in sublayers]
    with replace_outputs(modules, zero_output):
        yield


@contextmanager
def only_self_attention(model: Transformer, stack: str, layer: int | None = None) -> Iterator[None]:
    """The output of each block, or of one layer, is that of its self-attention alone, without the residual path."""
    others = [sublayer for sublayer in SUBLAYERS[stack] if sublayer != "self_attention"]
    residuals = [block.residual_connections[0] for block in blocks_of(model, stack, layer)]
    with without_sublayers(model, stack, others, layer), replace_outputs(residuals, sublayer_only):
        yield


# ---------------------------------------------------------------------------- variants


@dataclass(frozen=True)
class Variant:
    """A changed model: `with variant.apply(model): ...`"""

    name: str
    description: str  # what is changed, with the formula
    apply: Callable[[Transformer], AbstractContextManager]


# Formulas are those of pre-norm; with post-norm, LayerNorm comes after each sum instead.
ONLY_RESIDUAL = "Every sublayer adds 0: the output is norm(x) of the embeddings."
ONLY_SELF_ATTENTION = "No residual path: x = SelfAttention(norm(x)); the other sublayers add 0."
NO_FEED_FORWARD = "The feed-forward blocks add 0: x = x + 0."
NO_POSITIONS = "No positional encoding: x = embedding * sqrt(D)."


def attention_variants(kind: str) -> list[Variant]:
    """Variants that change all heads of one kind of attention."""

    def variant(name: str, description: str, change: Change) -> Variant:
        return Variant(f"{kind}: {name}", description, lambda model: intervene(model, change, kind))

    return [
        variant("uniform", "All n allowed keys get the same weight: a_ij = 1/n.", uniform),
        variant("first 2", "Only the first two allowed keys are attended to.", partial(first_keys, n=2)),
        variant("last 2", "Only the last two allowed keys are attended to.", partial(last_keys, n=2)),
        variant("shuffled", "The weights of each row are permuted at random: a_ij = a_iπ(j).", shuffled),
    ]


def stack_variants(stack: str) -> list[Variant]:
    """Variants of one stack, for the parts that both stacks have."""
    sublayers, position = SUBLAYERS[stack], "src_pos" if stack == "encoder" else "tgt_pos"
    return [
        Variant(
            f"{stack}: only the residual path", ONLY_RESIDUAL, lambda model: without_sublayers(model, stack, sublayers)
        ),
        Variant(f"{stack}: only self-attention", ONLY_SELF_ATTENTION, lambda model: only_self_attention(model, stack)),
        Variant(
            f"{stack}: no feed-forward",
            NO_FEED_FORWARD,
            lambda model: without_sublayers(model, stack, ["feed_forward"]),
        ),
        Variant(
            f"{stack}: no positions",
            NO_POSITIONS,
            lambda model: replace_outputs([getattr(model, position)], input_as_output),
        ),
    ]


VARIANTS: list[Variant] = [
    *(variant for kind in KINDS for variant in attention_variants(kind)),
    *(variant for stack in SUBLAYERS for variant in stack_variants(stack)),
    Variant(
        "no positions",
        NO_POSITIONS,
        lambda model: replace_outputs([model.src_pos, model.tgt_pos], input_as_output),
    ),
    Variant(
        "decoder: no cross-attention",
        "The decoder gets nothing from the source: x = x + 0.",
        lambda model: without_sublayers(model, "decoder", ["cross_attention"]),
    ),
    Variant(
        "decoder: residual path and self-attention",
        "The decoder keeps x = x + SelfAttention(norm(x)); its other sublayers add 0.",
        lambda model: without_sublayers(model, "decoder", ["cross_attention", "feed_forward"]),
    ),
    Variant(
        "decoder: source copied",
        "The decoder output is replaced by the encoder output: y_t = encoder_t.",
        lambda model: replace_outputs([model.decoder], encoder_as_output),
    ),
]

UNIFORM_CROSS = next(variant for variant in VARIANTS if variant.name == "cross: uniform")


def head_off(kind: str, layer: int, head: int) -> Variant:
    """The variant with one head switched off."""
    description = f"Head {head} of layer {layer} adds nothing: a_ij = 0."
    return Variant(
        f"{kind} {layer}.{head} off", description, lambda model: intervene(model, zero, kind, [layer], [head])
    )
