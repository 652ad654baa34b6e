"""The Transformer of "Attention Is All You Need" (Vaswani et al., 2017), written out.

    B  sentences in the batch            D    d_model, width of the residual stream
    S  source length in tokens           H    attention heads
    T  target length in tokens           d_k  size of one head, D / H
    Q  positions that ask (queries)      L    layers
    K  positions that are asked (keys)   V    tokens in the vocabulary

The encoder's self-attention has Q = K = S, the decoder's Q = K = T, cross-attention Q = T and K = S.
Masks are boolean and True where a query may attend. Sublayers are pre-norm (Xiong et al., 2020,
figure 1b), so encoder and decoder each end in a norm of their own.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compute.ops import Dropout

FEW_QUERIES = 8  # a step of a translation asks with one, or with those of a beam


def causal_mask(size: int, device: torch.device | str | None = None) -> Tensor:
    """(1, T, T), True on and below the diagonal: a position sees itself and what came before."""
    return torch.ones(1, size, size, dtype=torch.bool, device=device).tril()


class InputEmbeddings(nn.Module):
    """Token ids to vectors, scaled by sqrt(D) (section 3.4)."""

    def __init__(self, d_model: int, vocab_size: int):
        super().__init__()
        self.d_model = d_model
        self.embedding = nn.Embedding(vocab_size, d_model)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids) * math.sqrt(self.d_model)  # (B, T) -> (B, T, D)


class PositionalEncoding(nn.Module):
    """Adds sines and cosines of the position (section 3.5). Raises ValueError past `seq_len`."""

    def __init__(self, d_model: int, seq_len: int, dropout: float):
        super().__init__()
        self.dropout = Dropout(dropout)
        position = torch.arange(seq_len).unsqueeze(1)  # (seq_len, 1)
        frequency = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10_000.0) / d_model))  # (D / 2)
        pe = torch.zeros(seq_len, d_model)
        pe[:, 0::2] = torch.sin(position * frequency)
        pe[:, 1::2] = torch.cos(position * frequency)
        self.register_buffer("pe", pe, persistent=False)  # (seq_len, D), computed, so not saved

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        end = start + x.size(1)
        if end > self.pe.size(0):
            raise ValueError(f"{end} tokens are more than the {self.pe.size(0)} positions of this model (seq_len)")
        return self.dropout(x + self.pe[start:end])


class KVCache:
    """Keys and values of one attention block during a translation, so that no step projects them again.

    Cross-attention (`grows=False`) projects the encoder's output once. Self-attention appends each
    step to a buffer of `capacity` positions, so that the past is not copied. There the positions come first:
    what is filled lies together, and beams are reordered in a quarter of the time.
    """

    def __init__(self, capacity: int, grows: bool):
        self.capacity, self.grows, self.length = capacity, grows, 0
        self.key: Tensor | None = None  # (capacity, B, H, d_k), or (B, H, S, d_k) for cross-attention
        self.value: Tensor | None = None

    def update(self, project: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The keys and values so far, with those that `project` computes: each (B, H, K, d_k)."""
        if not self.grows:
            if self.key is None:
                # Asked again at every step, so laid out once as the products read them.
                self.key, self.value = (x.contiguous() for x in project())
            return self.key, self.value
        key, value = project()
        key, value = key.permute(2, 0, 1, 3), value.permute(2, 0, 1, 3)  # (B, H, T, d_k) -> (T, B, H, d_k)
        if self.key is None:
            shape = (self.capacity, *key.shape[1:])
            self.key, self.value = key.new_empty(shape), value.new_empty(shape)
        start, self.length = self.length, self.length + len(key)
        self.key[start : self.length] = key
        self.value[start : self.length] = value
        return self.key[: self.length].permute(1, 2, 0, 3), self.value[: self.length].permute(1, 2, 0, 3)

    def select(self, rows: Tensor) -> None:
        """Keeps these rows of the batch, in this order: finished sentences go, beams move."""
        if self.key is None:
            return
        if not self.grows:
            self.key, self.value = self.key[rows], self.value[rows]
            return
        for name in ("key", "value"):  # what lies past `length` is not worth a copy
            old = getattr(self, name)
            new = old.new_empty((self.capacity, len(rows), *old.shape[2:]))
            new[: self.length] = old[: self.length].index_select(1, rows)
            setattr(self, name, new)


class MultiHeadAttentionBlock(nn.Module):
    """Scaled dot-product attention in H heads (section 3.2).

    The softmax scores, before dropout, stay in `attention_scores` (B, H, Q, K) while `record` is on;
    `intervene`, where set, is a function of those scores whose result takes their place. Otherwise
    `attention_scores` is None, and the fused kernel computes the same where it is the faster way.
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

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: KVCache | None = None) -> Tensor:
        """q (B, Q, D) attends to k and v (B, K, D) where mask (B or 1, 1, Q or 1, K) allows: (B, Q, D)."""
        query = self.split_heads(self.w_q(q))

        def project() -> tuple[Tensor, Tensor]:
            return self.split_heads(self.w_k(k)), self.split_heads(self.w_v(v))

        key, value = project() if cache is None else cache.update(project)
        context = self.attend(query, key, value, mask)
        return self.w_o(context.transpose(1, 2).flatten(2))  # (B, H, Q, d_k) -> (B, Q, D)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.h, self.d_k)).transpose(1, 2)  # (B, T, D) -> (B, H, T, d_k)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Context (B, H, Q, d_k), by the fused kernel where it is the faster way and nobody wants the scores."""
        self.attention_scores = None
        p = self.dropout.p if self.training else 0.0
        # On a CPU the kernel draws dropout on one thread, in bf16 it takes several times what is below,
        # and for the one query of a translation's step 1.2 to 1.9 times.
        few = query.size(2) < FEW_QUERIES and not self.training
        slow_kernel = query.device.type == "cpu" and (p > 0 or query.dtype == torch.bfloat16 or few)
        if not (self.record or self.intervene or slow_kernel):
            return F.scaled_dot_product_attention(query, key, value, mask, dropout_p=p)
        scores = self.scores(query, key, mask)
        if self.intervene:
            scores = self.intervene(scores)
        if self.record:
            self.attention_scores = scores.detach()
        return self.dropout(scores) @ value

    @staticmethod
    def scores(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(Q K^T / sqrt(d_k)) (equation 1): (B, H, Q, K), rows summing to 1."""
        scores = (query / math.sqrt(query.size(-1))) @ key.transpose(-2, -1)  # (B, H, Q, K)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return scores.softmax(dim=-1)


class FeedForwardBlock(nn.Module):
    """Two linear maps with a ReLU between, at each position alone (section 3.3)."""

    def __init__(self, d_model: int, d_ff: int, dropout: float):
        super().__init__()
        self.linear_1 = nn.Linear(d_model, d_ff)
        self.dropout = Dropout(dropout)
        self.linear_2 = nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.dropout(F.relu(self.linear_1(x))))  # (B, T, D) -> (B, T, d_ff) -> (B, T, D)


class ResidualConnection(nn.Module):
    """x + dropout(sublayer(norm(x)))."""

    def __init__(self, d_model: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        return x + self.dropout(sublayer(self.norm(x)))


class EncoderBlock(nn.Module):
    """Self-attention, then feed-forward."""

    def __init__(
        self, d_model: int, h: int, d_ff: int, dropout: float, attention_dropout: float, feed_forward_dropout: float
    ):
        super().__init__()
        self.self_attention_block = MultiHeadAttentionBlock(d_model, h, attention_dropout)
        self.feed_forward_block = FeedForwardBlock(d_model, d_ff, feed_forward_dropout)
        self.residual_connections = nn.ModuleList([ResidualConnection(d_model, dropout) for _ in range(2)])

    def forward(self, x: Tensor, src_mask: Tensor) -> Tensor:
        x = self.residual_connections[0](x, lambda x: self.self_attention_block(x, x, x, src_mask))
        return self.residual_connections[1](x, self.feed_forward_block)


class Encoder(nn.Module):
    """N encoder blocks and the final norm."""

    def __init__(self, layers: list[EncoderBlock], d_model: int):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, src_mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, src_mask)
        return self.norm(x)


class DecoderBlock(nn.Module):
    """Masked self-attention, cross-attention over the encoder's output, then feed-forward."""

    def __init__(
        self, d_model: int, h: int, d_ff: int, dropout: float, attention_dropout: float, feed_forward_dropout: float
    ):
        super().__init__()
        self.self_attention_block = MultiHeadAttentionBlock(d_model, h, attention_dropout)
        self.cross_attention_block = MultiHeadAttentionBlock(d_model, h, attention_dropout)
        self.feed_forward_block = FeedForwardBlock(d_model, d_ff, feed_forward_dropout)
        self.residual_connections = nn.ModuleList([ResidualConnection(d_model, dropout) for _ in range(3)])

    def forward(
        self,
        x: Tensor,
        encoder_output: Tensor,
        src_mask: Tensor,
        tgt_mask: Tensor | None,
        caches: tuple[KVCache | None, KVCache | None] = (None, None),
    ) -> Tensor:
        own, cross = caches

        def ask_source(x: Tensor) -> Tensor:
            # The W hypotheses of a beam search ask their sentence's source together: (B W, 1, D) -> (B, W, D).
            side_by_side = x.view(len(encoder_output), -1, x.size(-1))
            return self.cross_attention_block(side_by_side, encoder_output, encoder_output, src_mask, cross).view_as(x)

        x = self.residual_connections[0](x, lambda x: self.self_attention_block(x, x, x, tgt_mask, own))
        x = self.residual_connections[1](x, ask_source)
        return self.residual_connections[2](x, self.feed_forward_block)


class Decoder(nn.Module):
    """N decoder blocks and the final norm."""

    def __init__(self, layers: list[DecoderBlock], d_model: int):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(d_model)

    def forward(
        self,
        x: Tensor,
        encoder_output: Tensor,
        src_mask: Tensor,
        tgt_mask: Tensor | None,
        caches: list[tuple[KVCache, KVCache]] | None = None,
    ) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x, encoder_output, src_mask, tgt_mask, caches[i] if caches else (None, None))
        return self.norm(x)


class ProjectionLayer(nn.Module):
    """Vectors to logits over the target vocabulary."""

    def __init__(self, d_model: int, vocab_size: int):
        super().__init__()
        self.proj = nn.Linear(d_model, vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)  # (B, T, D) -> (B, T, V)


class Transformer(nn.Module):
    """Encoder, decoder and projection. Training calls `forward`; translation `encode`, then `decode` step by step."""

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
        """Source ids (B, S), mask (B, 1, 1, S): (B, S, D)."""
        return self.encoder(self.src_pos(self.src_embed(src)), src_mask)

    def decode(
        self,
        encoder_output: Tensor,
        src_mask: Tensor,
        tgt: Tensor,
        tgt_mask: Tensor | None,
        caches: list[tuple[KVCache, KVCache]] | None = None,
    ) -> Tensor:
        """Target ids (B, T), mask (B or 1, 1, T, T): (B, T, D).

        With `caches` (from `new_caches`), `tgt` holds the new tokens alone and `tgt_mask` is None
        where it is a single one, which may attend to all before it. Then it may also hold W hypotheses of
        each sentence, side by side (B W, 1).
        """
        start = caches[0][0].length if caches else 0
        x = self.tgt_pos(self.tgt_embed(tgt), start)
        return self.decoder(x, encoder_output, src_mask, tgt_mask, caches)

    def project(self, x: Tensor) -> Tensor:
        """(B, T, D): logits (B, T, V)."""
        return self.projection_layer(x)

    def hidden(
        self, encoder_input: Tensor, decoder_input: Tensor, encoder_mask: Tensor, decoder_mask: Tensor
    ) -> Tensor:
        """Teacher forcing up to the projection: (B, T, D)."""
        encoder_output = self.encode(encoder_input, encoder_mask)
        return self.decode(encoder_output, encoder_mask, decoder_input, decoder_mask)

    def forward(
        self, encoder_input: Tensor, decoder_input: Tensor, encoder_mask: Tensor, decoder_mask: Tensor
    ) -> Tensor:
        """Teacher forcing: logits (B, T, V) of the token after each position of decoder_input."""
        return self.project(self.hidden(encoder_input, decoder_input, encoder_mask, decoder_mask))

    def new_caches(self, capacity: int) -> list[tuple[KVCache, KVCache]]:
        """An empty (self, cross) pair of caches for each decoder layer, for up to `capacity` target tokens."""
        return [(KVCache(capacity, grows=True), KVCache(capacity, grows=False)) for _ in self.decoder.layers]

    def attention_blocks(self) -> dict[str, list[MultiHeadAttentionBlock]]:
        """The blocks of each kind, by layer: encoder, decoder (its self-attention) and cross."""
        return {
            "encoder": [layer.self_attention_block for layer in self.encoder.layers],
            "decoder": [layer.self_attention_block for layer in self.decoder.layers],
            "cross": [layer.cross_attention_block for layer in self.decoder.layers],
        }

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within it, every attention block keeps the scores of its last pass in `attention_scores`."""
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
) -> Transformer:
    """A Transformer with fresh weights, Xavier-uniform (Glorot and Bengio, 2010) in every matrix.

    N blocks in the encoder, `decoder_N` (or N) in the decoder. `dropout` is that of the residual stream
    and the embeddings; inside attention and feed-forward it is the same unless given. `share_embeddings` (section 3.4):
    "target", the target embedding and the projection are one matrix; "all", the source embedding too,
    which takes one vocabulary for both languages (ValueError where the sizes differ).
    """
    inside = [dropout if p is None else p for p in (attention_dropout, feed_forward_dropout)]
    encoder = Encoder([EncoderBlock(d_model, h, d_ff, dropout, *inside) for _ in range(N)], d_model)
    decoder = Decoder([DecoderBlock(d_model, h, d_ff, dropout, *inside) for _ in range(decoder_N or N)], d_model)
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
                f"sharing all embeddings needs one vocabulary, not {src_vocab_size} and {tgt_vocab_size} tokens"
            )
        transformer.src_embed.embedding.weight = transformer.tgt_embed.embedding.weight
    for parameter in transformer.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    return transformer
