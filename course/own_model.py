"""A model made of the learner's functions: assembled, trained on the toy corpus, and used for translation.

B  batch (sentences)          D  d_model
S  source length in tokens    V  vocabulary size
T  target length in tokens

The parameters are held by the modules of `model.build_transformer`; what is computed with them is the learner's.
`functions` is the namespace that `checks.own_functions` returns.
"""

import time
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from compute.threads import share_cores
from config import Config, get_config
from corpora.sources import load_split
from dataset import EOS, SOS, Batches, BilingualDataset, build_word_tokenizer, make_loader
from evaluate import score
from interpret.trace import AttentionTrace, record_trace
from model import (
    DecoderBlock,
    EncoderBlock,
    FeedForwardBlock,
    MultiHeadAttentionBlock,
    ResidualConnection,
    Transformer,
    get_model,
)
from train import learning_rate
from translate import Translator

LIMIT = 30  # tokens of a translation; the longest of the toy corpus has 14


# ---------------------------------------------------------------------------- the model


class OwnTransformer(Transformer):
    """The parameters of a Transformer, with the learner's functions in place of its forward methods."""

    def __init__(self, functions: SimpleNamespace, template: Transformer):
        super().__init__(
            template.encoder,
            template.decoder,
            template.src_embed,
            template.tgt_embed,
            template.src_pos,
            template.tgt_pos,
            template.projection_layer,
        )
        self.functions = functions
        for module in self.modules():
            replace_forward(functions, module)

    def encode(self, src: Tensor, src_mask: Tensor) -> Tensor:
        """Source ids (B, S) to the encoder output (B, S, D)."""
        x = self.functions.embed(src, self.src_embed.embedding.weight, self.src_pos.dropout)
        return self.functions.encoder(x, src_mask, self.encoder.layers, self.encoder.norm)

    def decode(self, encoder_output: Tensor, src_mask: Tensor, tgt: Tensor, tgt_mask: Tensor, caches=None) -> Tensor:
        """Target ids (B, T) to the decoder output (B, T, D). There are no caches."""
        x = self.functions.embed(tgt, self.tgt_embed.embedding.weight, self.tgt_pos.dropout)
        return self.functions.decoder(x, encoder_output, src_mask, tgt_mask, self.decoder.layers, self.decoder.norm)

    def project(self, x: Tensor) -> Tensor:
        """Decoder output (B, T, D) to logits (B, T, V)."""
        return self.functions.project(x, self.projection_layer.proj.weight, self.projection_layer.proj.bias)


def replace_forward(functions: SimpleNamespace, module: nn.Module) -> None:
    """Makes a module compute its forward pass with the learner's function."""
    if isinstance(module, nn.LayerNorm):
        module.forward = lambda x: functions.layer_norm(x, module.weight, module.bias, module.eps)
    elif isinstance(module, FeedForwardBlock):
        module.forward = lambda x: functions.feed_forward(x, module.linear_1, module.linear_2)
    elif isinstance(module, MultiHeadAttentionBlock):
        module.forward = partial(attend, functions, module)
    elif isinstance(module, ResidualConnection):
        module.forward = lambda x, sublayer: functions.residual(x, sublayer, module.norm, module.dropout)
    elif isinstance(module, EncoderBlock):
        module.forward = lambda x, src_mask: functions.encoder_block(x, src_mask, module)
    elif isinstance(module, DecoderBlock):
        module.forward = lambda x, encoder_output, src_mask, tgt_mask: functions.decoder_block(
            x, encoder_output, src_mask, tgt_mask, module
        )


def attend(
    functions: SimpleNamespace, block: MultiHeadAttentionBlock, q: Tensor, k: Tensor, v: Tensor, mask: Tensor
) -> Tensor:
    """The output of the learner's attention; the block keeps the scores while it records."""
    output, scores = functions.multi_head_attention(q, k, v, mask, block.w_q, block.w_k, block.w_v, block.w_o, block.h)
    block.attention_scores = scores.detach() if block.record else None
    return output


# ---------------------------------------------------------------------------- the corpus


class ToyCorpus(NamedTuple):
    """The built-in corpus, English to Italian, encoded."""

    config: Config
    train: BilingualDataset
    tokenizer_src: Tokenizer
    tokenizer_tgt: Tokenizer
    sources: list[str]  # held-out sentences
    references: list[str]


def load_corpus(sentences: int = 200, **settings) -> ToyCorpus:
    """The toy corpus, with so many sentences of its test split; `settings` are fields of the toy preset."""
    config = get_config("toy", **{"device": "cpu", "warmup_steps": 100, **settings})
    pairs, test = load_split(config, "train"), load_split(config, "test")
    tokenizers = [build_word_tokenizer(pairs[side], config.vocab_size) for side in ("src", "tgt")]
    train = BilingualDataset(pairs, *tokenizers, config.seq_len)
    return ToyCorpus(config, train, *tokenizers, test["src"][:sentences], test["tgt"][:sentences])


# ---------------------------------------------------------------------------- training


def new_model(functions: SimpleNamespace, corpus: ToyCorpus) -> OwnTransformer:
    """A model with new weights, the same at every call."""
    torch.manual_seed(corpus.config.seed)
    sizes = [tokenizer.get_vocab_size() for tokenizer in (corpus.tokenizer_src, corpus.tokenizer_tgt)]
    return OwnTransformer(functions, get_model(corpus.config, *sizes))


def batch_loss(functions: SimpleNamespace, model: OwnTransformer, batch: dict, smoothing: float = 0.1) -> Tensor:
    """The loss of a batch of the project's BilingualDataset, with the learner's masks, labels and loss."""
    source = batch["encoder_input"]
    target = torch.cat([batch["decoder_input"][:, :1], batch["label"]], 1)  # [SOS] … [EOS], (B, T + 1)
    decoder_input, label = functions.shift_labels(target)
    tgt_mask = functions.padding_mask(decoder_input) & functions.causal_mask(decoder_input.size(1))
    logits = model(source, decoder_input, functions.padding_mask(source), tgt_mask)
    return functions.smoothed_loss(logits, label, smoothing)


def train(
    functions: SimpleNamespace, corpus: ToyCorpus, steps: int = 280, lr: float = 3e-3, log_every: int = 50
) -> OwnTransformer:
    """Trains a new model with Adam, linear warmup and a cosine schedule. Prints the loss every `log_every` steps."""
    share_cores()
    config, model = corpus.config, new_model(functions, corpus)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.98), eps=1e-9)
    start, model = time.perf_counter(), model.train()
    for step, batch in enumerate(batches(corpus, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config, steps) * lr / config.lr
        loss = batch_loss(functions, model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if log_every and (step + 1) % log_every == 0:
            print(f"step {step + 1:3}   loss {loss:.3f}   {time.perf_counter() - start:.0f} s")
    return model.eval()


def batches(corpus: ToyCorpus, steps: int):
    """So many training batches, in the order of the project's training."""
    epoch = 0
    while steps > 0:
        for batch in make_loader(corpus.train, Batches(corpus.train, corpus.config, epoch)):
            if steps == 0:
                return
            steps -= 1
            yield batch
        epoch += 1


# ---------------------------------------------------------------------------- translation


def encode(corpus: ToyCorpus, sentence: str) -> Tensor:
    """Source ids with [SOS] and [EOS]: (1, S)."""
    return torch.tensor([[SOS, *corpus.tokenizer_src.encode(sentence).ids, EOS]])


def next_logits_of(functions: SimpleNamespace, model: Transformer, source: Tensor, src_mask: Tensor | None = None):
    """The model as greedy_decode and beam_search see it: a function of the target ids, for a source (1, S)."""
    src_mask = functions.padding_mask(source) if src_mask is None else src_mask
    encoder_output = model.encode(source, src_mask)

    def next_logits(ids: list[int]) -> Tensor:
        target = torch.as_tensor(ids).view(1, -1)  # (1, T)
        x = model.decode(encoder_output, src_mask, target, functions.causal_mask(target.size(1)))
        return model.project(x[:, -1])[0]  # (1, T, D) -> (V,)

    return next_logits


@torch.inference_mode()
def translate(
    functions: SimpleNamespace, model: Transformer, corpus: ToyCorpus, sentences: list[str], beam_size: int = 0
) -> list[str]:
    """Translations by the learner's greedy decoding, or beam search if a beam size is given."""
    translations = []
    for sentence in sentences:
        next_logits = next_logits_of(functions, model, encode(corpus, sentence))
        if beam_size:
            ids = functions.beam_search(next_logits, LIMIT, beam_size)
        else:
            ids = functions.greedy_decode(next_logits, LIMIT)
        translations.append(corpus.tokenizer_tgt.decode([int(i) for i in ids]))
    return translations


def bleu(functions: SimpleNamespace, model: Transformer, corpus: ToyCorpus, sentences: int = 100) -> float:
    """BLEU of greedy translations of held-out sentences."""
    predicted = translate(functions, model, corpus, corpus.sources[:sentences])
    return score(predicted, corpus.references[:sentences])["bleu"]


# ---------------------------------------------------------------------------- looking inside


def with_own_weights(model: OwnTransformer, corpus: ToyCorpus) -> Transformer:
    """The project's Transformer with the learner's weights."""
    sizes = [tokenizer.get_vocab_size() for tokenizer in (corpus.tokenizer_src, corpus.tokenizer_tgt)]
    reference = get_model(corpus.config, *sizes)
    reference.load_state_dict(model.state_dict())
    return reference.eval()


def translator_of(model: Transformer, corpus: ToyCorpus) -> Translator:
    """The project's Translator around a model of the toy corpus."""
    return Translator(model, corpus.config, corpus.tokenizer_src, corpus.tokenizer_tgt)


def trace(functions: SimpleNamespace, model: Transformer, corpus: ToyCorpus, sentence: str) -> AttentionTrace:
    """The attention weights of the learner's greedy translation of a sentence."""
    next_logits = next_logits_of(functions, model, encode(corpus, sentence))
    with torch.inference_mode():
        ids = [int(i) for i in functions.greedy_decode(next_logits, LIMIT)]
    return record_trace(translator_of(model, corpus), sentence, ids)


def draw_cross_attention(functions: SimpleNamespace, model: Transformer, corpus: ToyCorpus, sentence: str):
    """Heat maps of the cross-attention of each layer, mean over the heads: an Altair chart."""
    from interpret import charts  # needs the packages of requirements-charts.txt

    return charts.mean_heads(trace(functions, model, corpus, sentence), "cross", cell_size=26)
