"""The Transformer of "Attention Is All You Need" (Vaswani et al., 2017), from scratch.

    B  batch (sentences)          D    d_model, width of the residual stream
    S  source length in tokens    H    attention heads
    T  target length in tokens    d_k  head size, D / H
    Q  query positions            V    vocabulary size
    K  key positions              W    beam size, hypotheses per sentence
    N  blocks of a stack

Encoder self-attention has Q = K = S, decoder self-attention Q = K = T, cross-attention Q = T and K = S. Modules that
both stacks use are annotated with T. Masks are boolean, True where a query may attend to a key.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compute.ops import Dropout, fused_attention_is_faster
from config import Config


def causal_mask(size: int, device: torch.device | str | None = None) -> Tensor:
    """(1, size, size), True on and below the diagonal: a position may attend to itself and to earlier positions."""
    return torch.ones(1, size, size, dtype=torch.bool, device=device).tril()


class InputEmbeddings(nn.Module):
    """Embeddings of token ids, multiplied by sqrt(D) (section 3.4)."""

    def __init__(self, d_model: int, vocab_size: int):
        super().__init__()
        self.d_model = d_model
        self.embedding = nn.Embedding(vocab_size, d_model)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids) * math.sqrt(self.d_model)  # (B, T) -> (B, T, D)


class PositionalEncoding(nn.Module):
    """Adds sinusoidal positional encodings (section 3.5). Raises ValueError for positions beyond `seq_len`."""

    def __init__(self, d_model: int, seq_len: int, dropout: float):
        super().__init__()
        self.dropout = Dropout(dropout)
        position = torch.arange(seq_len).unsqueeze(1)  # (seq_len, 1)
        frequency = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10_000.0) / d_model))  # (D / 2)
        pe = torch.zeros(seq_len, d_model)
        pe[:, 0::2] = torch.sin(position * frequency)
        pe[:, 1::2] = torch.cos(position * frequency)
        self.register_buffer("pe", pe, persistent=False)  # (seq_len, D), not saved in checkpoints

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """x (B, T, D) holds the positions from `start` on; returns (B, T, D)."""
        end = start + x.size(1)
        if end > self.pe.size(0):
            raise ValueError(f"{end} tokens exceed the {self.pe.size(0)} positions of this model (seq_len)")
        return self.dropout(x + self.pe[start:end])


class SelfAttentionCache:
    """Keys and values of the target positions decoded so far, for one attention block.

    Each step appends to a buffer of `capacity` entries: one per sentence, or in beam search one per hypothesis. They
    are the first dimension, so that the filled part is contiguous, which makes copying it four times as fast.
    """

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self.key: Tensor | None = None  # (capacity, B, H, d_k), filled up to `length`
        self.value: Tensor | None = None

    def update(self, project: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Appends the keys and values that `project` computes, (B, H, T, d_k); returns all of them, (B, H, K, d_k)."""
        key, value = (x.permute(2, 0, 1, 3) for x in project())  # (B, H, T, d_k) -> (T, B, H, d_k)
        if self.key is None:
            shape = (self.capacity, *key.shape[1:])
            self.key, self.value = key.new_empty(shape), value.new_empty(shape)
        start, self.length = self.length, self.length + len(key)
        self.key[start : self.length] = key
        self.value[start : self.length] = value
        # (K, B, H, d_k) -> (B, H, K, d_k)
        return self.key[: self.length].permute(1, 2, 0, 3), self.value[: self.length].permute(1, 2, 0, 3)

    def select(self, rows: Tensor) -> None:
        """Keeps these rows of the batch, in this order."""
        if self.key is not None:
            self.key, self.value = (self.selected(x, rows) for x in (self.key, self.value))

    def selected(self, buffer: Tensor, rows: Tensor) -> Tensor:
        copy = buffer.new_empty((self.capacity, len(rows), *buffer.shape[2:]))
        copy[: self.length] = buffer[: self.length].index_select(1, rows)  # the unfilled part is not copied
        return copy


class CrossAttentionCache:
    """Keys and values of the encoder output, projected once per translation."""

    def __init__(self):
        self.key: Tensor | None = None  # (B, H, S, d_k)
        self.value: Tensor | None = None

    def update(self, project: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The keys and values, each (B, H, S, d_k); `project` computes them in the first call."""
        if self.key is None:
            self.key, self.value = (x.contiguous() for x in project())  # read at every step
        return self.key, self.value

    def select(self, rows: Tensor) -> None:
        """Keeps these rows of the batch, in this order."""
        if self.key is not None:
            self.key, self.value = self.key[rows], self.value[rows]


class LayerCache(NamedTuple):
    """The caches of one decoder block."""

    self_attention: SelfAttentionCache
    cross_attention: CrossAttentionCache


class MultiHeadAttentionBlock(nn.Module):
    """Scaled dot-product attention in H heads (section 3.2).

    "Scores" are the attention weights: the output of the softmax, before dropout. While `record` is True, they are
    kept in `attention_scores` (B, H, Q, K), which is None otherwise. If `intervene` is set, it is called with the
    scores, and its result replaces them. With neither, a fused kernel that returns no scores may compute the output.

    Raises ValueError if d_model is not a multiple of h.
    """

    def __init__(self, d_model: int, h: int, dropout: float):
        super().__init__()
        if d_model % h:
            raise ValueError(f"d_model {d_model} is not divisible by the {h} heads")
        self.h, self.d_k = h, d_model // h
        self.w_q = nn.Linear(d_model, d_model, bias=False)
        self.w_k = nn.Linear(d_model, d_model, bias=False)
        self.w_v = nn.Linear(d_model, d_model, bias=False)
        self.w_o = nn.Linear(d_model, d_model, bias=False)
        self.dropout = Dropout(dropout)
        self.record = False
        self.intervene: Callable[[Tensor], Tensor] | None = None
        self.attention_scores: Tensor | None = None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        cache: SelfAttentionCache | CrossAttentionCache | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attention of q (B, Q, D) over k and v (B, K, D): (B, Q, D). The mask is broadcast to (B, H, Q, K).

        `is_causal` stands for a causal mask, with Q = K; kernels that need no mask are the fastest on a GPU.

        In beam search without a cache, q is (B W, T, D): the tokens of the W hypotheses become queries on the keys of
        their sentence.
        """
        query = self.split_heads(self.w_q(q.view(len(k), -1, q.size(-1))))  # (B, Q, D) -> (B, H, Q, d_k)

        def project() -> tuple[Tensor, Tensor]:
            return self.split_heads(self.w_k(k)), self.split_heads(self.w_v(v))

        key, value = cache.update(project) if cache else project()
        context = self.attend(query, key, value, mask, is_causal)
        return self.w_o(context.transpose(1, 2).flatten(2)).view_as(q)  # (B, H, Q, d_k) -> (B, Q, D)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.h, self.d_k)).transpose(1, 2)  # (B, T, D) -> (B, H, T, d_k)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool = False) -> Tensor:
        """softmax(query key^T / sqrt(d_k)) value (equation 1): (B, H, Q, d_k)."""
        self.attention_scores = None
        dropout = self.dropout.p if self.training else 0.0
        scores_are_needed = self.record or self.intervene
        if not scores_are_needed and fused_attention_is_faster(query, dropout, self.training):
            return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal)
        if is_causal:
            mask = causal_mask(query.size(2), query.device)
        scores = self.scores(query, key, mask)
        if self.intervene:
            scores = self.intervene(scores)
        if self.record:
            self.attention_scores = scores.detach()
        return self.dropout(scores) @ value

    @staticmethod
    def scores(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(query key^T / sqrt(d_k)): (B, H, Q, K), each row sums to 1."""
        scores = (query / math.sqrt(query.size(-1))) @ key.transpose(-2, -1)  # (B, H, Q, K)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return scores.softmax(dim=-1)


class FeedForwardBlock(nn.Module):
    """Two linear layers with a ReLU in between, applied to each position separately (section 3.3)."""

    def __init__(self, d_model: int, d_ff: int, dropout: float):
        super().__init__()
        self.linear_1 = nn.Linear(d_model, d_ff)
        self.dropout = Dropout(dropout)
        self.linear_2 = nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.dropout(F.relu(self.linear_1(x))))  # (B, T, D) -> (B, T, d_ff) -> (B, T, D)


class ResidualConnection(nn.Module):
    """A sublayer with its residual path and LayerNorm.

    `norm` is "pre" (Xiong et al., 2020, figure 1b) or "post" (Vaswani et al., 2017, section 3.1). Pre-norm leaves the
    sum unnormalized, so each stack then ends with a LayerNorm.
    """

    def __init__(self, d_model: int, dropout: float, norm: str = "pre"):
        super().__init__()
        self.is_pre_norm = norm == "pre"
        self.norm = nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        if self.is_pre_norm:
            return x + self.dropout(sublayer(self.norm(x)))
        return self.norm(x + self.dropout(sublayer(x)))


def final_norm(d_model: int, norm: str) -> nn.Module:
    """The end of a stack: a LayerNorm for pre-norm, nothing for post-norm."""
    return nn.LayerNorm(d_model) if norm == "pre" else nn.Identity()


class EncoderBlock(nn.Module):
    """Self-attention, then feed-forward."""

    def __init__(
        self,
        d_model: int,
        h: int,
        d_ff: int,
        dropout: float,
        attention_dropout: float,
        feed_forward_dropout: float,
        norm: str = "pre",
    ):
        super().__init__()
        self.self_attention_block = MultiHeadAttentionBlock(d_model, h, attention_dropout)
        self.feed_forward_block = FeedForwardBlock(d_model, d_ff, feed_forward_dropout)
        self.residual_connections = nn.ModuleList([ResidualConnection(d_model, dropout, norm) for _ in range(2)])

    def forward(self, x: Tensor, src_mask: Tensor) -> Tensor:
        x = self.residual_connections[0](x, lambda x: self.self_attention_block(x, x, x, src_mask))
        return self.residual_connections[1](x, self.feed_forward_block)


class Encoder(nn.Module):
    """N encoder blocks, with pre-norm followed by a LayerNorm."""

    def __init__(self, layers: list[EncoderBlock], d_model: int, norm: str = "pre"):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = final_norm(d_model, norm)

    def forward(self, x: Tensor, src_mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, src_mask)
        return self.norm(x)


class DecoderBlock(nn.Module):
    """Masked self-attention, cross-attention to the encoder output, then feed-forward."""

    def __init__(
        self,
        d_model: int,
        h: int,
        d_ff: int,
        dropout: float,
        attention_dropout: float,
        feed_forward_dropout: float,
        norm: str = "pre",
    ):
        super().__init__()
        self.self_attention_block = MultiHeadAttentionBlock(d_model, h, attention_dropout)
        self.cross_attention_block = MultiHeadAttentionBlock(d_model, h, attention_dropout)
        self.feed_forward_block = FeedForwardBlock(d_model, d_ff, feed_forward_dropout)
        self.residual_connections = nn.ModuleList([ResidualConnection(d_model, dropout, norm) for _ in range(3)])

    def forward(
        self,
        x: Tensor,
        encoder_output: Tensor,
        src_mask: Tensor,
        tgt_mask: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        self_cache, cross_cache = cache or (None, None)

        def self_attention(x: Tensor) -> Tensor:
            is_causal = tgt_mask is None and x.size(1) > 1
            return self.self_attention_block(x, x, x, tgt_mask, self_cache, is_causal)

        def cross_attention(x: Tensor) -> Tensor:
            return self.cross_attention_block(x, encoder_output, encoder_output, src_mask, cross_cache)

        x = self.residual_connections[0](x, self_attention)
        x = self.residual_connections[1](x, cross_attention)
        return self.residual_connections[2](x, self.feed_forward_block)


class Decoder(nn.Module):
    """N decoder blocks, with pre-norm followed by a LayerNorm."""

    def __init__(self, layers: list[DecoderBlock], d_model: int, norm: str = "pre"):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = final_norm(d_model, norm)

    def forward(
        self,
        x: Tensor,
        encoder_output: Tensor,
        src_mask: Tensor,
        tgt_mask: Tensor | None,
        caches: list[LayerCache] | None = None,
    ) -> Tensor:
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x = layer(x, encoder_output, src_mask, tgt_mask, cache)
        return self.norm(x)


class ProjectionLayer(nn.Module):
    """The linear layer from the decoder output to logits over the target vocabulary."""

    def __init__(self, d_model: int, vocab_size: int):
        super().__init__()
        self.proj = nn.Linear(d_model, vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)  # (B, T, D) -> (B, T, V)


class Transformer(nn.Module):
    """Embeddings, encoder, decoder and projection.

    Training calls `forward` (teacher forcing). Translation calls `encode`, then `decode` and `project` step by step.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        src_embed: InputEmbeddings,
        tgt_embed: InputEmbeddings,
        src_pos: PositionalEncoding,
        tgt_pos: PositionalEncoding,
        projection_layer: ProjectionLayer,
    ):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.src_embed, self.tgt_embed = src_embed, tgt_embed
        self.src_pos, self.tgt_pos = src_pos, tgt_pos
        self.projection_layer = projection_layer

    def encode(self, src: Tensor, src_mask: Tensor) -> Tensor:
        """The encoder output (B, S, D) for source ids (B, S) and mask (B, 1, 1, S)."""
        return self.encoder(self.src_pos(self.src_embed(src)), src_mask)

    def decode(
        self,
        encoder_output: Tensor,
        src_mask: Tensor,
        tgt: Tensor,
        tgt_mask: Tensor | None,
        caches: list[LayerCache] | None = None,
        position: int | None = None,
    ) -> Tensor:
        """The decoder output (B, T, D) for target ids (B, T) and a mask that broadcasts to (B, 1, T, T); None: causal.

        A causal mask is enough if padding is on the right: no token before it can attend to it.

        With `caches` (from `new_caches`), `tgt` holds only the new tokens; a single token needs no mask. In beam search
        it holds the last tokens of W hypotheses, (B, W), all at the same `position`. They share the cached keys of
        their sentence; the mask (B, 1, W, K) says which of these belong to each.
        """
        x = self.tgt_embed(tgt)  # (B, T) -> (B, T, D)
        if position is None:
            x = self.tgt_pos(x, start=caches[0].self_attention.length if caches else 0)
        else:
            x = self.tgt_pos(x.flatten(0, 1).unsqueeze(1), position).view_as(x)  # (B W, 1, D) and back
        return self.decoder(x, encoder_output, src_mask, tgt_mask, caches)

    def project(self, x: Tensor) -> Tensor:
        """Logits (B, T, V) of the decoder output (B, T, D)."""
        return self.projection_layer(x)

    def hidden(
        self, encoder_input: Tensor, decoder_input: Tensor, encoder_mask: Tensor, decoder_mask: Tensor | None
    ) -> Tensor:
        """The decoder output (B, T, D) with teacher forcing: `forward` without the projection."""
        encoder_output = self.encode(encoder_input, encoder_mask)
        return self.decode(encoder_output, encoder_mask, decoder_input, decoder_mask)

    def forward(
        self, encoder_input: Tensor, decoder_input: Tensor, encoder_mask: Tensor, decoder_mask: Tensor | None
    ) -> Tensor:
        """Logits (B, T, V) with teacher forcing: each position predicts the token that follows it."""
        return self.project(self.hidden(encoder_input, decoder_input, encoder_mask, decoder_mask))

    def new_caches(self, capacity: int) -> list[LayerCache]:
        """An empty cache for each decoder block, for up to `capacity` target tokens, of all hypotheses together."""
        return [LayerCache(SelfAttentionCache(capacity), CrossAttentionCache()) for _ in self.decoder.layers]

    def attention_blocks(self) -> dict[str, list[MultiHeadAttentionBlock]]:
        """The attention blocks by kind and layer: encoder, decoder (self-attention) and cross."""
        return {
            "encoder": [layer.self_attention_block for layer in self.encoder.layers],
            "decoder": [layer.self_attention_block for layer in self.decoder.layers],
            "cross": [layer.cross_attention_block for layer in self.decoder.layers],
        }

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context in which every attention block keeps the scores of its last forward pass in `attention_scores`."""
        blocks = [block for kind in self.attention_blocks().values() for block in kind]
        for block in blocks:
            block.record = True
        try:
            yield
        finally:
            for block in blocks:
                block.record, block.attention_scores = False, None


def build_transformer(
    src_vocab_size: int,
    tgt_vocab_size: int,
    src_seq_len: int,
    tgt_seq_len: int,
    d_model: int = 512,
    N: int = 6,
    h: int = 8,
    dropout: float = 0.1,
    d_ff: int = 2048,
    decoder_N: int | None = None,
    share_embeddings: str = "none",
    attention_dropout: float | None = None,
    feed_forward_dropout: float | None = None,
    norm: str = "pre",
) -> Transformer:
    """A Transformer with Xavier-uniform initialization of all matrices (Glorot and Bengio, 2010).

    The encoder has N blocks, the decoder `decoder_N` (default: N). `dropout` applies to embeddings and sublayer
    outputs, and inside attention and feed-forward blocks unless these have their own. `share_embeddings` (section 3.4):
    "target" ties the target embedding and the projection, "all" also the source embedding, which requires one
    vocabulary for both languages: raises ValueError if the sizes differ. `norm` is pre or post, see ResidualConnection.
    """
    inner_dropouts = [dropout if p is None else p for p in (attention_dropout, feed_forward_dropout)]
    block = (d_model, h, d_ff, dropout, *inner_dropouts, norm)
    encoder = Encoder([EncoderBlock(*block) for _ in range(N)], d_model, norm)
    decoder = Decoder([DecoderBlock(*block) for _ in range(decoder_N or N)], d_model, norm)
    transformer = Transformer(
        encoder,
        decoder,
        InputEmbeddings(d_model, src_vocab_size),
        InputEmbeddings(d_model, tgt_vocab_size),
        PositionalEncoding(d_model, src_seq_len, dropout),
        PositionalEncoding(d_model, tgt_seq_len, dropout),
        ProjectionLayer(d_model, tgt_vocab_size),
    )
    if share_embeddings in ("target", "all"):
        transformer.projection_layer.proj.weight = transformer.tgt_embed.embedding.weight
    if share_embeddings == "all":
        if src_vocab_size != tgt_vocab_size:
            raise ValueError(
                f"share_embeddings=all needs one vocabulary, not {src_vocab_size} and {tgt_vocab_size} tokens"
            )
        transformer.src_embed.embedding.weight = transformer.tgt_embed.embedding.weight
    for parameter in transformer.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    return transformer


def get_model(config: Config, src_vocab_size: int, tgt_vocab_size: int) -> Transformer:
    """The model that a config describes, with randomly initialized weights."""
    return build_transformer(
        src_vocab_size,
        tgt_vocab_size,
        src_seq_len=config.seq_len,
        tgt_seq_len=config.seq_len,
        d_model=config.d_model,
        N=config.encoder_layers,
        decoder_N=config.decoder_layers,
        h=config.num_heads,
        d_ff=config.d_ff,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        feed_forward_dropout=config.feed_forward_dropout,
        share_embeddings=config.share_embeddings,
        norm=config.norm,
    )
