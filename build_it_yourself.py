"""The Transformer in twelve steps. Write the functions; the checks name the mistakes.

python build_it_yourself.py             # checks all steps in order, stops at the first failure
python build_it_yourself.py --step 3    # checks one step
python build_it_yourself.py --hint 3    # prints a hint
python build_it_yourself.py --train     # trains your model on the toy corpus and translates

    B  batch (sentences)          D    d_model, width of the residual stream
    S  source length in tokens    H    attention heads
    T  target length in tokens    d_k  head size, D / H
    Q  query positions            V    vocabulary size
    K  key positions              W    beam size

Masks are boolean, True where a query may attend to a key. "The paper" is Vaswani et al., 2017, "Attention Is All You
Need". Build_It_Yourself.ipynb has the same exercises with explanations; docs/course.md says how to work with both.
"""

import math  # noqa: F401
from collections.abc import Callable

import torch  # noqa: F401
from torch import Tensor, nn

from dataset import EOS, PAD, SOS  # noqa: F401

# ---------------------------------------------------------------------------- step 1: embeddings


def embeddings(ids: Tensor, weight: Tensor) -> Tensor:
    """The row of the table for each token, multiplied by sqrt(D) (the paper, section 3.4).

    ids (B, T), weight (V, D) -> (B, T, D)
    """
    raise NotImplementedError


# ---------------------------------------------------------------------------- step 2: positions


def positional_encoding(seq_len: int, d_model: int) -> Tensor:
    """The positional encodings (the paper, section 3.5): (seq_len, D).

    PE(pos, 2i) = sin(pos / 10000^(2i / D)) and PE(pos, 2i + 1) = cos(pos / 10000^(2i / D)), pos from 0.
    """
    raise NotImplementedError


def embed(ids: Tensor, weight: Tensor, dropout: Callable[[Tensor], Tensor]) -> Tensor:
    """The input of the first layer: `dropout` applied to embeddings plus positional encodings (the paper, section 5.4).

    ids (B, T), weight (V, D) -> (B, T, D)
    """
    raise NotImplementedError


# ---------------------------------------------------------------------------- step 3: layer normalization


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Each vector to mean 0 and variance 1, then gain and bias (Ba et al., 2016, equation 4).

    gain * (x - mean) / sqrt(variance + eps) + bias, with the mean squared deviation as the variance (divided by D).
    x (B, T, D), gain (D,), bias (D,) -> (B, T, D)
    """
    raise NotImplementedError


# ---------------------------------------------------------------------------- step 4: feed-forward


def feed_forward(x: Tensor, linear_1: nn.Linear, linear_2: nn.Linear) -> Tensor:
    """Two linear layers with a ReLU in between (the paper, equation 2): max(0, x W_1 + b_1) W_2 + b_2.

    linear_1 maps D to d_ff, linear_2 maps d_ff to D. x (B, T, D) -> (B, T, D)
    """
    raise NotImplementedError


# ---------------------------------------------------------------------------- step 5: one head of attention


def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention (the paper, equation 1): softmax(Q K^T / sqrt(d_k)) V.

    Returns the pair (context, scores); as in the tutorial, the returned scores are those after the softmax, the
    attention weights, whose rows sum to 1.
    query (..., Q, d_k), key and value (..., K, d_k) -> context (..., Q, d_k), scores (..., Q, K)
    """
    raise NotImplementedError


# ---------------------------------------------------------------------------- step 6: masks


def padding_mask(ids: Tensor) -> Tensor:
    """True where a token is not PAD, with dimensions for heads and queries: ids (B, S) -> (B, 1, 1, S), boolean."""
    raise NotImplementedError


def causal_mask(size: int) -> Tensor:
    """True where a query may attend to a key: itself and earlier positions (the paper, section 3.2.3).

    size T -> (1, T, T), boolean; rows are queries, columns are keys
    """
    raise NotImplementedError


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """As `attention`, with Q K^T / sqrt(d_k) set to -infinity where mask is False, before the softmax.

    The shapes are those of `attention`; mask is boolean and broadcasts to (..., Q, K).
    """
    raise NotImplementedError


# ---------------------------------------------------------------------------- step 7: many heads


def multi_head_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    w_q: nn.Linear,
    w_k: nn.Linear,
    w_v: nn.Linear,
    w_o: nn.Linear,
    h: int,
) -> tuple[Tensor, Tensor]:
    """Projects q, k and v, attends in h heads of d_k = D / h dimensions, joins the heads, applies w_o.

    Head 0 has the dimensions 0 to d_k - 1 of the projected vectors, and so on (the paper, section 3.2.2).
    k and v may have another length than q (cross-attention, K ≠ Q).
    q (B, Q, D), k and v (B, K, D), mask broadcasts to (B, H, Q, K) -> output (B, Q, D), scores (B, H, Q, K)
    """
    raise NotImplementedError


# ---------------------------------------------------------------------------- step 8: residual connections


def residual(
    x: Tensor,
    sublayer: Callable[[Tensor], Tensor],
    norm: Callable[[Tensor], Tensor],
    dropout: Callable[[Tensor], Tensor],
) -> Tensor:
    """A pre-norm residual connection (Xiong et al., 2020, figure 1b): x + dropout(sublayer(norm(x))).

    x (B, T, D) -> (B, T, D)
    """
    raise NotImplementedError


# ---------------------------------------------------------------------------- step 9: encoder


def encoder_block(x: Tensor, src_mask: Tensor, block) -> Tensor:
    """Self-attention, then feed-forward, each in its residual connection (the paper, section 3.1).

    The block has the sublayers as functions:
        block.self_attention_block(q, k, v, mask), which returns the output (B, S, D) alone, without the scores
        block.feed_forward_block(x)
        block.residual_connections[0](x, sublayer) and [1], where sublayer is a function of x

    x (B, S, D), src_mask (B, 1, 1, S) -> (B, S, D)
    """
    raise NotImplementedError


def encoder(x: Tensor, src_mask: Tensor, layers: list, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """The blocks one after the other, as layer(x, src_mask), then the final norm that pre-norm needs.

    x (B, S, D), src_mask (B, 1, 1, S) -> (B, S, D)
    """
    raise NotImplementedError


# ---------------------------------------------------------------------------- step 10: decoder


def decoder_block(x: Tensor, encoder_output: Tensor, src_mask: Tensor, tgt_mask: Tensor, block) -> Tensor:
    """Self-attention, cross-attention and feed-forward, each in its residual connection (the paper, section 3.1).

    In cross-attention the queries come from the decoder, keys and values from the encoder (section 3.2.3). The block
    has what an encoder block has, and:
        block.cross_attention_block(q, k, v, mask), which returns the output (B, T, D) alone, without the scores
        block.residual_connections[0], [1] and [2]

    x (B, T, D), encoder_output (B, S, D), src_mask (B, 1, 1, S), tgt_mask (B or 1, 1, T, T) -> (B, T, D)
    """
    raise NotImplementedError


def decoder(
    x: Tensor,
    encoder_output: Tensor,
    src_mask: Tensor,
    tgt_mask: Tensor,
    layers: list,
    norm: Callable[[Tensor], Tensor],
) -> Tensor:
    """The blocks one after the other, as layer(x, encoder_output, src_mask, tgt_mask), then the final norm.

    x (B, T, D), encoder_output (B, S, D), src_mask (B, 1, 1, S), tgt_mask (B or 1, 1, T, T) -> (B, T, D)
    """
    raise NotImplementedError


# ---------------------------------------------------------------------------- step 11: projection and loss


def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Decoder output to logits, without a softmax (the paper, section 3.4): x W^T + b.

    x (B, T, D), weight (V, D), bias (V,) -> (B, T, V)
    """
    raise NotImplementedError


def shift_labels(target: Tensor) -> tuple[Tensor, Tensor]:
    """Target sentences, [SOS] … [EOS] and padding, to what the decoder reads and what it has to predict there.

    The token that the decoder reads at position t is the label of position t - 1.
    target (B, T + 1) -> decoder_input (B, T), label (B, T)
    """
    raise NotImplementedError


def smoothed_loss(logits: Tensor, label: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with label smoothing (the paper, section 5.4; Szegedy et al., 2016, section 7), in nats.

    The target distribution has smoothing / V on every token and 1 - smoothing more on the label. The loss is the mean
    over all target tokens of the batch; positions whose label is PAD do not count.
    logits (B, T, V), label (B, T) -> ()
    """
    raise NotImplementedError


# ---------------------------------------------------------------------------- step 12: greedy decoding, beam search


def greedy_decode(next_logits: Callable[[list[int]], Tensor], max_length: int) -> list[int]:
    """The most probable token at each step, until [EOS] or until there are max_length tokens, not counting SOS.

    next_logits(ids) gives the logits (V,) of the token that follows ids. The first call gets [SOS] alone.
    Returns the ids as ints, without SOS and EOS.
    """
    raise NotImplementedError


def beam_search(
    next_logits: Callable[[list[int]], Tensor], max_length: int, beam_size: int, length_penalty: float = 0.6
) -> list[int]:
    """The best translation found with beam_size hypotheses (the paper, section 6.1).

    Each step extends every hypothesis by every token and keeps the beam_size extensions with the highest
    log-probabilities. Those that end with EOS, or have max_length tokens, are finished and set aside; the others are
    the hypotheses of the next step, until none is left. The best finished one has the highest score,
    log-probability / ((5 + length) / 6)^length_penalty (Wu et al., 2016, equation 14), where length is the number of
    tokens after SOS, EOS included. beam_size may be larger than V. Returns its ids as ints, without SOS and EOS.
    """
    raise NotImplementedError


if __name__ == "__main__":
    from course.command import main

    main(globals())
