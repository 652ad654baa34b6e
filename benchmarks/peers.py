"""The same model in five hands: this project's, the tutorial's, PyTorch's, Hugging Face's and JoeyNMT's.

    B  sentences in the batch    S  source length    T  target length    V  tokens in the vocabulary

Each way is given the same batches (as `dataset.BilingualDataset` makes them), the same sizes, the same
dropout of 0.1 everywhere, label smoothing of 0.1 and one joint vocabulary whose matrix all embeddings
share. When they translate, the weights are random, but each translation ends where it is told to, as if it
were as long as its reference: [EOS] is made impossible before and certain then.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from compute.ops import keep_freed_memory, use_bf16_products
from config import Config
from dataset import EOS, PAD, SOS, SPECIAL_TOKENS, padding_mask
from model import MultiHeadAttentionBlock, Transformer, build_transformer, causal_mask
from search import beam_search, greedy_decode
from train import train_step
from training.losses import Learner
from training.state import Progress, Run, make_optimizer
from translate import CachedDecoder, Translator, choose_precision, get_model

DROPOUT = SMOOTHING = 0.1
NEVER = -1e9  # the logit of a token that must not be chosen
TUTORIAL_LENGTH = 350  # to which the tutorial pads every sentence
TUTORIAL_BATCH = 8


@dataclass(frozen=True)
class Size:
    d_model: int
    layers: int  # in the encoder, and as many in the decoder
    heads: int
    d_ff: int

    def flops(self, source_tokens: int, target_tokens: int, vocabulary: int) -> float:
        """Of a training step in matrix products with weights: 2 for each weight and token, forward, and twice back."""
        attention, feed_forward = self.d_model**2, 2 * self.d_model * self.d_ff
        source = self.layers * (
            4 * attention + feed_forward + 2 * attention
        )  # the last: keys and values for the decoder
        target = self.layers * (6 * attention + feed_forward) + vocabulary * self.d_model
        return 6.0 * (source_tokens * source + target_tokens * target)


SIZES = {"tiny": Size(128, 4, 4, 256), "small": Size(256, 6, 4, 1024), "base": Size(512, 6, 8, 2048)}


def tokens_of(batch: dict) -> tuple[int, int]:
    """Source and target tokens of a batch, without padding."""
    return int((batch["encoder_input"] != PAD).sum()), int((batch["label"] != PAD).sum())


class Ours:
    """This project: `train.train_step`, and `search` with cached keys and values."""

    name = "this project"

    def __init__(self, size: Size, vocabulary: int, device: torch.device, precision: str = "auto"):
        self.precision = precision
        keep_freed_memory()  # as train.py and translate.py do; the other ways share the process, so have it too
        config = Config(
            d_model=size.d_model,
            encoder_layers=size.layers,
            decoder_layers=size.layers,
            num_heads=size.heads,
            d_ff=size.d_ff,
            dropout=DROPOUT,
            attention_dropout=DROPOUT,
            feed_forward_dropout=DROPOUT,
            label_smoothing=SMOOTHING,
            clip_norm=0.0,
            precision=precision,
        )
        model = get_model(config, vocabulary, vocabulary).to(device)
        self.run = Run(
            config=config,
            device=device,
            precision=choose_precision(precision, device, model),
            model=model,
            learner=Learner(model, SMOOTHING),
            train=None,
            validation=None,
            translator=Translator(model, config, None, None),
            optimizer=make_optimizer(model, config, device),
            total_steps=10**6,
            progress=Progress(),
        )
        self.detail = self.run.precision

    def step(self, batch: dict) -> Tensor:
        self.run.model.train()
        loss, _, _ = train_step(self.run, [batch])
        return loss

    def prepare_to_write(self) -> str:
        """Returns the precision in which it will write."""
        model = self.run.model.eval()
        forbid_end(model)
        precision = choose_precision(self.precision, self.run.device, model)
        if precision == "bf16":
            use_bf16_products(model)
        return precision

    def write(self, source: Tensor, steps: Tensor, beam: int) -> None:
        decoder = CachedDecoder(self.run.model, source, int(steps.max()))
        greedy_decode(decoder, steps) if beam == 1 else beam_search(decoder, steps, beam)


def forbid_end(model: Transformer) -> None:
    with torch.no_grad():
        model.projection_layer.proj.bias[EOS] = NEVER


class Tutorial:
    """The video's way: 8 sentences padded to 350, attention written out, float32, no cache, one sentence at a time."""

    name = "the tutorial's way"
    detail = "fp32"

    def __init__(self, size: Size, vocabulary: int, device: torch.device):
        length = TUTORIAL_LENGTH
        self.model = build_transformer(
            vocabulary, vocabulary, length, length, size.d_model, size.layers, size.heads, DROPOUT, size.d_ff
        ).to(device)
        for block in (block for kind in self.model.attention_blocks().values() for block in kind):
            block.attend = written_out.__get__(block)
        for module in list(self.model.modules()):
            for name, child in module.named_children():
                if type(child).__name__ == "Dropout":
                    setattr(module, name, nn.Dropout(DROPOUT))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, eps=1e-9)
        self.device = device

    def step(self, batch: dict) -> Tensor:
        source, target, label = (
            F.pad(batch[name], (0, TUTORIAL_LENGTH - batch[name].size(1)), value=PAD).to(self.device)
            for name in ("encoder_input", "decoder_input", "label")
        )
        mask = padding_mask(target) & causal_mask(TUTORIAL_LENGTH, self.device)
        logits = self.model(source, target, padding_mask(source), mask)
        loss = F.cross_entropy(logits.flatten(0, 1), label.flatten(), ignore_index=PAD, label_smoothing=SMOOTHING)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss

    def prepare_to_write(self) -> str:
        self.model.eval()
        forbid_end(self.model)
        return "fp32"

    def write(self, source: Tensor, steps: Tensor, beam: int) -> None:
        """Of one sentence (1, S): the whole decoder again for every token."""
        source = F.pad(source, (0, TUTORIAL_LENGTH - source.size(1)), value=PAD)
        mask = padding_mask(source)
        encoder_output = self.model.encode(source, mask)
        written = torch.full((1, 1), SOS, device=source.device)
        for _ in range(int(steps)):
            x = self.model.decode(encoder_output, mask, written, causal_mask(written.size(1), source.device))
            _, best = torch.max(self.model.project(x[:, -1]), dim=1)
            written = torch.cat([written, torch.full((1, 1), best.item(), device=source.device)], dim=1)


def written_out(block: MultiHeadAttentionBlock, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = (query @ key.transpose(-2, -1)) / math.sqrt(block.d_k)
    scores.masked_fill_(mask == 0, -1e9)
    return block.dropout(scores.softmax(dim=-1)) @ value


class PyTorch(nn.Module):
    """`torch.nn.Transformer` between shared embeddings, with fused AdamW."""

    name = "torch.nn.Transformer"

    def __init__(self, size: Size, vocabulary: int, device: torch.device):
        super().__init__()
        self.d_model = size.d_model
        self.embedding = nn.Embedding(vocabulary, size.d_model)
        self.body = nn.Transformer(
            size.d_model,
            size.heads,
            size.layers,
            size.layers,
            size.d_ff,
            DROPOUT,
            batch_first=True,
            norm_first=True,
        )
        self.projection = nn.Linear(size.d_model, vocabulary)
        nn.init.xavier_uniform_(self.embedding.weight)
        self.projection.weight = self.embedding.weight
        self.dropout = nn.Dropout(DROPOUT)
        reference = build_transformer(4, 4, 512, 512, size.d_model, 1, 1)
        self.register_buffer("pe", reference.src_pos.pe)
        self.to(device)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)
        self.device, self.autocast = device, autocast_of(device)
        self.detail = "bf16" if device.type == "cuda" else "fp32"

    def embedded(self, ids: Tensor) -> Tensor:
        return self.dropout(self.embedding(ids) * math.sqrt(self.d_model) + self.pe[: ids.size(1)])

    def step(self, batch: dict) -> Tensor:
        names = ("encoder_input", "decoder_input", "label")
        source, target, label = (batch[name].to(self.device, non_blocking=True) for name in names)
        later = ~causal_mask(target.size(1), self.device)[0]
        with self.autocast():
            x = self.body(
                self.embedded(source),
                self.embedded(target),
                tgt_mask=later,
                src_key_padding_mask=source == PAD,
                tgt_key_padding_mask=target == PAD,
                memory_key_padding_mask=source == PAD,
                tgt_is_causal=True,
            )
            logits = self.projection(x)
        return backward(logits, label, self.optimizer)


def autocast_of(device: torch.device):
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def backward(logits: Tensor, label: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    loss = F.cross_entropy(logits.flatten(0, 1).float(), label.flatten(), ignore_index=PAD, label_smoothing=SMOOTHING)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


class Marian:
    """Hugging Face's Marian from random weights, with fused AdamW."""

    name = "Marian"

    def __init__(self, size: Size, vocabulary: int, device: torch.device):
        from transformers import MarianConfig, MarianMTModel

        config = MarianConfig(
            vocab_size=vocabulary,
            d_model=size.d_model,
            encoder_layers=size.layers,
            decoder_layers=size.layers,
            encoder_attention_heads=size.heads,
            decoder_attention_heads=size.heads,
            encoder_ffn_dim=size.d_ff,
            decoder_ffn_dim=size.d_ff,
            dropout=DROPOUT,
            attention_dropout=DROPOUT,
            activation_dropout=DROPOUT,
            activation_function="relu",
            scale_embedding=True,
            pad_token_id=PAD,
            bos_token_id=SOS,
            eos_token_id=EOS,
            forced_eos_token_id=None,
            decoder_start_token_id=SOS,
            max_position_embeddings=512,
            attn_implementation="sdpa",
        )
        self.model = MarianMTModel(config).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.device, self.autocast = device, autocast_of(device)
        self.detail = "bf16" if device.type == "cuda" else "fp32"

    def step(self, batch: dict) -> Tensor:
        self.model.train()
        names = ("encoder_input", "decoder_input", "label")
        source, target, label = (batch[name].to(self.device, non_blocking=True) for name in names)
        with self.autocast():
            logits = self.model(input_ids=source, attention_mask=source != PAD, decoder_input_ids=target).logits
        return backward(logits, label, self.optimizer)

    def prepare_to_write(self) -> str:
        self.model.eval()
        self.model.final_logits_bias[:, EOS] = NEVER
        return "fp32"

    def write(self, source: Tensor, steps: Tensor, beam: int) -> None:
        limits = steps.repeat_interleave(beam)

        def end_at_limit(written: Tensor, logits: Tensor) -> Tensor:
            ends = limits <= written.size(1)
            if ends.any():
                logits[ends] = NEVER
                logits[ends, EOS] = 0
            return logits

        written = self.model.generate(
            input_ids=source,
            attention_mask=(source != PAD).long(),
            max_new_tokens=int(steps.max()),
            num_beams=beam,
            do_sample=False,
            logits_processor=[end_at_limit],
            **({"early_stopping": True, "length_penalty": 0.6} if beam > 1 else {}),
        )
        assert written.size(1) == steps.max() + 1, written.shape


class MarianInBF16(Marian):
    """The whole of it in bf16, as a user could have it."""

    name = "Marian, cast to bf16"

    def prepare_to_write(self) -> str:
        super().prepare_to_write()
        self.model.bfloat16()
        return "bf16"


class JoeyNMT:
    """JoeyNMT 2.3: its model, loss and search, with fused AdamW."""

    name = "JoeyNMT"

    def __init__(self, size: Size, vocabulary: int, device: torch.device):
        from joeynmt.model import build_model
        from joeynmt.vocabulary import Vocabulary

        unk, pad, sos, eos = SPECIAL_TOKENS
        special = {"unk_token": unk, "pad_token": pad, "bos_token": sos, "eos_token": eos, "sep_token": None}
        ids = {"unk_id": 0, "pad_id": PAD, "bos_id": SOS, "eos_id": EOS}
        words = Vocabulary(dummy_words(vocabulary), SimpleNamespace(**special, **ids, lang_tags=[]))
        half = {
            "type": "transformer",
            "num_layers": size.layers,
            "num_heads": size.heads,
            "hidden_size": size.d_model,
            "ff_size": size.d_ff,
            "dropout": DROPOUT,
            "layer_norm": "pre",
            "embeddings": {"embedding_dim": size.d_model, "scale": True, "dropout": DROPOUT},
        }
        initializers = {"initializer": "xavier_uniform", "embed_initializer": "xavier_uniform"}
        self.model = build_model(
            dict(encoder=half, decoder=half, tied_embeddings=True, tied_softmax=True, **initializers), words, words
        ).to(device)
        self.model.loss_function = ("crossentropy", SMOOTHING)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.device, self.autocast = device, autocast_of(device)
        self.detail = "bf16" if device.type == "cuda" else "fp32"

    def batch_of(self, source: Tensor, target: Tensor | None):
        from joeynmt.batch import Batch

        lengths = (source != PAD).sum(1)
        return Batch(source, lengths, None, target, None, torch.arange(len(source)), self.device, PAD, EOS)

    def step(self, batch: dict) -> Tensor:
        self.model.train()
        start = batch["decoder_input"][:, :1]
        theirs = self.batch_of(batch["encoder_input"], torch.cat([start, batch["label"]], dim=1))
        with self.autocast():
            loss, *_ = self.model(return_type="loss", **vars(theirs))
        loss = theirs.normalize(loss, "tokens")
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def prepare_to_write(self) -> str:
        self.model.eval()
        return "fp32"

    def write(self, source: Tensor, steps: Tensor, beam: int) -> None:
        """All to the longest: its search goes on with every sentence until the last has ended."""
        from joeynmt.search import search

        batch, longest = self.batch_of(source, None), int(steps.max())
        written, _, _ = search(self.model, batch, longest, beam, 0.6, min_output_length=longest + 1)
        assert written.shape == (len(source), longest), written.shape


def dummy_words(vocabulary: int) -> list[str]:
    return [f"word{i}" for i in range(vocabulary - len(SPECIAL_TOKENS))]
