"""Solutions of the exercises of build_it_yourself.py."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dataset import EOS, PAD, SOS


def embeddings(ids: Tensor, weight: Tensor) -> Tensor:
    return weight[ids] * math.sqrt(weight.size(1))


def positional_encoding(seq_len: int, d_model: int) -> Tensor:
    position = torch.arange(seq_len).unsqueeze(1)  # (seq_len, 1)
    angle = position / 10_000 ** (torch.arange(0, d_model, 2) / d_model)  # (seq_len, D / 2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # (seq_len, D / 2, 2) -> (seq_len, D)


def embed(ids: Tensor, weight: Tensor, dropout: Callable[[Tensor], Tensor]) -> Tensor:
    return dropout(embeddings(ids, weight) + positional_encoding(ids.size(1), weight.size(1)))


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    variance = (centered**2).mean(-1, keepdim=True)
    return gain * centered / torch.sqrt(variance + eps) + bias


def feed_forward(x: Tensor, linear_1: nn.Linear, linear_2: nn.Linear) -> Tensor:
    return linear_2(torch.relu(linear_1(x)))


def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    scores = (query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))).softmax(-1)
    return scores @ value, scores


def padding_mask(ids: Tensor) -> Tensor:
    return (ids != PAD)[:, None, None, :]


def causal_mask(size: int) -> Tensor:
    return torch.ones(1, size, size, dtype=torch.bool).tril()


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))
    scores = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return scores @ value, scores


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
    def split(x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1), h, -1).transpose(1, 2)  # (B, T, D) -> (B, H, T, d_k)

    context, scores = masked_attention(split(w_q(q)), split(w_k(k)), split(w_v(v)), mask)
    return w_o(context.transpose(1, 2).flatten(2)), scores  # (B, H, Q, d_k) -> (B, Q, D)


def residual(
    x: Tensor,
    sublayer: Callable[[Tensor], Tensor],
    norm: Callable[[Tensor], Tensor],
    dropout: Callable[[Tensor], Tensor],
) -> Tensor:
    return x + dropout(sublayer(norm(x)))


def encoder_block(x: Tensor, src_mask: Tensor, block) -> Tensor:
    x = block.residual_connections[0](x, lambda x: block.self_attention_block(x, x, x, src_mask))
    return block.residual_connections[1](x, block.feed_forward_block)


def encoder(x: Tensor, src_mask: Tensor, layers: list, norm: Callable[[Tensor], Tensor]) -> Tensor:
    for layer in layers:
        x = layer(x, src_mask)
    return norm(x)


def decoder_block(x: Tensor, encoder_output: Tensor, src_mask: Tensor, tgt_mask: Tensor, block) -> Tensor:
    x = block.residual_connections[0](x, lambda x: block.self_attention_block(x, x, x, tgt_mask))
    x = block.residual_connections[1](
        x, lambda x: block.cross_attention_block(x, encoder_output, encoder_output, src_mask)
    )
    return block.residual_connections[2](x, block.feed_forward_block)


def decoder(
    x: Tensor,
    encoder_output: Tensor,
    src_mask: Tensor,
    tgt_mask: Tensor,
    layers: list,
    norm: Callable[[Tensor], Tensor],
) -> Tensor:
    for layer in layers:
        x = layer(x, encoder_output, src_mask, tgt_mask)
    return norm(x)


def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.T + bias


def shift_labels(target: Tensor) -> tuple[Tensor, Tensor]:
    return target[:, :-1], target[:, 1:]


def smoothed_loss(logits: Tensor, label: Tensor, smoothing: float) -> Tensor:
    log_p = logits.log_softmax(-1)  # (B, T, V)
    of_label = log_p.gather(-1, label.unsqueeze(-1)).squeeze(-1)  # (B, T)
    loss = -(1 - smoothing) * of_label - smoothing * log_p.mean(-1)  # (B, T)
    is_token = label != PAD
    return (loss * is_token).sum() / is_token.sum()


def greedy_decode(next_logits: Callable[[list[int]], Tensor], max_length: int) -> list[int]:
    ids = [SOS]
    while len(ids) <= max_length:
        token = int(next_logits(ids).argmax())
        if token == EOS:
            break
        ids.append(token)
    return ids[1:]


def beam_search(
    next_logits: Callable[[list[int]], Tensor], max_length: int, beam_size: int, length_penalty: float = 0.6
) -> list[int]:
    hypotheses, finished = [(0.0, [SOS])], []
    for length in range(1, max_length + 1):
        extensions = []
        for log_p, ids in hypotheses:
            for token, more in enumerate(next_logits(ids).log_softmax(-1).tolist()):
                extensions.append((log_p + more, [*ids, token]))
        extensions = sorted(extensions, reverse=True)[:beam_size]
        is_last = length == max_length
        done = [(log_p, ids) for log_p, ids in extensions if ids[-1] == EOS or is_last]
        finished += [(log_p / ((5 + length) / 6) ** length_penalty, ids) for log_p, ids in done]
        hypotheses = [(log_p, ids) for log_p, ids in extensions if not (ids[-1] == EOS or is_last)]
    _, best = max(finished)
    return [token for token in best if token not in (SOS, EOS)]
