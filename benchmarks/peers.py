"""The same model in five implementations: this project, the tutorial, PyTorch, Hugging Face's Marian and JoeyNMT.

    B  batch    S  source length    T  target length    V  vocabulary

All implementations get the same batches (as `dataset.BilingualDataset` builds them), the same sizes, dropout of 0.1
everywhere, label smoothing of 0.1, and one joint vocabulary. All but the tutorial's tie their embeddings. Decoding uses
random weights; each translation is as long as its reference, because [EOS] is impossible before that length and certain
at that length.
"""

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from compute.device import choose_precision, keep_freed_memory
from compute.ops import use_low_precision_products
from config import Config, InputError
from dataset import EOS, PAD, SOS, SPECIAL_TOKENS, padding_mask
from model import MultiHeadAttentionBlock, Transformer, build_transformer, causal_mask
from search import beam_search, greedy_decode
from train import train_step
from training.batches import StepBatches
from training.losses import TrainingLoss
from training.state import TrainingState
from translate import CachedDecoder

DROPOUT = SMOOTHING = 0.1
INPUTS = ("encoder_input", "decoder_input", "label")  # tensors of a batch that all implementations use
IMPOSSIBLE = -1e9  # logit of a token that must not be generated
TUTORIAL_LENGTH = 350  # the tutorial pads every sentence to this length
TUTORIAL_BATCH = 8


# ---------------------------------------------------------------------------- model sizes and batches


@dataclass(frozen=True)
class ModelSize:
    d_model: int
    layers: int  # of the encoder and of the decoder, each
    heads: int
    d_ff: int

    def flops(self, source_tokens: int, target_tokens: int, vocab_size: int) -> float:
        """FLOPs of a training step in multiplications with weights: 2 per weight and token forward, 4 backward."""
        attention, feed_forward = self.d_model**2, 2 * self.d_model * self.d_ff
        # The last term: keys and values of cross-attention are computed for each source token.
        source = self.layers * (4 * attention + feed_forward + 2 * attention)
        target = self.layers * (6 * attention + feed_forward) + vocab_size * self.d_model
        return 6.0 * (source_tokens * source + target_tokens * target)


SIZES = {"tiny": ModelSize(128, 4, 4, 256), "small": ModelSize(256, 6, 4, 1024), "base": ModelSize(512, 6, 8, 2048)}


def count_tokens(batches: list[dict]) -> tuple[int, int]:
    """Source and target tokens, without padding."""
    source, target = (sum(int((batch[name] != PAD).sum()) for batch in batches) for name in ("encoder_input", "label"))
    return source, target


# ---------------------------------------------------------------------------- this project


class ThisProject:
    """This project: `train.train_step`, and search with cached keys and values."""

    name = "this project"

    def __init__(self, size: ModelSize, vocab_size: int, device: torch.device, precision: str = "auto"):
        self.precision = precision
        keep_freed_memory()  # as train.py and translate.py do; it also applies to the peers, in the same process
        self.config = Config(
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
        self.state = TrainingState.create(self.config, vocab_size, vocab_size, device)
        self.model = self.state.model
        self.training_precision = choose_precision(precision, device, self.model)
        self.loss_module = TrainingLoss(self.model, SMOOTHING, precision=self.training_precision)

    def step(self, batch: dict) -> Tensor:
        self.model.train()
        batches = StepBatches([batch], dummies=0, consumed=1)
        return train_step(self.state, self.loss_module, batches, self.config.lr, self.config).loss

    def prepare_for_decoding(self) -> str:
        """Puts the model into evaluation mode and returns the precision of decoding."""
        forbid_eos(self.model.eval())
        precision = choose_precision(self.precision, self.state.device, self.model)
        if precision == "bf16":
            use_low_precision_products(self.model, torch.bfloat16)
        return precision

    def decode(self, source: Tensor, lengths: Tensor, beam_size: int) -> list[list[int]]:
        return search_with_limits(self.model, source, lengths, beam_size)


def search_with_limits(model: Transformer, source: Tensor, limits: Tensor, beam_size: int) -> list[list[int]]:
    """Target ids for source ids (B, S); each translation is at most as long as its limit (B,).

    `Translator.search` cannot be used, because it derives the limits from the source lengths.
    """
    decoder = CachedDecoder(model, source, int(limits.max()))
    if beam_size == 1:
        return greedy_decode(decoder, limits)
    return [hypotheses[0].ids for hypotheses in beam_search(decoder, limits, beam_size)]


def forbid_eos(model: Transformer) -> None:
    """Makes the model never end a translation before its limit."""
    with torch.no_grad():
        model.projection_layer.proj.bias[EOS] = IMPOSSIBLE


# ---------------------------------------------------------------------------- the tutorial


class Tutorial:
    """The tutorial's implementation, rebuilt from this project's modules, with separate embeddings.

    It trains on batches of 8 sentences padded to 350 tokens, in fp32, with explicit attention and PyTorch's dropout. It
    decodes one sentence at a time without a cache.
    """

    name = "tutorial's implementation"

    def __init__(self, size: ModelSize, vocab_size: int, device: torch.device, build=build_transformer):
        length = TUTORIAL_LENGTH
        self.model = build(
            vocab_size, vocab_size, length, length, size.d_model, size.layers, size.heads, DROPOUT, size.d_ff
        ).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, eps=1e-9)
        self.device = device
        if build is build_transformer:
            self.use_plain_operations()

    def use_plain_operations(self) -> None:
        for block in (block for blocks in self.model.attention_blocks().values() for block in blocks):
            block.attend = explicit_attention.__get__(block)
        for module in list(self.model.modules()):
            for name, child in module.named_children():
                if type(child).__name__ == "Dropout":
                    setattr(module, name, nn.Dropout(DROPOUT))

    def step(self, batch: dict) -> Tensor:
        source, target, label = (
            F.pad(batch[name], (0, TUTORIAL_LENGTH - batch[name].size(1)), value=PAD).to(self.device) for name in INPUTS
        )
        mask = padding_mask(target) & causal_mask(TUTORIAL_LENGTH, self.device)
        source_mask = padding_mask(source)
        encoder_output = self.model.encode(source, source_mask)
        logits = self.model.project(self.model.decode(encoder_output, source_mask, target, mask))
        return update(self.optimizer, cross_entropy(logits, label))

    def prepare_for_decoding(self) -> str:
        self.model.eval()
        forbid_eos(self.model)
        return "fp32"

    def decode(self, source: Tensor, lengths: Tensor, beam_size: int) -> None:
        """Decodes one sentence (1, S) greedily. Each step runs the decoder over all tokens so far."""
        source = F.pad(source, (0, TUTORIAL_LENGTH - source.size(1)), value=PAD)
        mask = padding_mask(source)
        encoder_output = self.model.encode(source, mask)
        target = torch.full((1, 1), SOS, device=source.device)
        for _ in range(int(lengths)):
            x = self.model.decode(encoder_output, mask, target, causal_mask(target.size(1), source.device))
            _, best = torch.max(self.model.project(x[:, -1]), dim=1)
            target = torch.cat([target, torch.full((1, 1), best.item(), device=source.device)], dim=1)


class TutorialRepository(Tutorial):
    """The model of the tutorial's own repository, from a checkout, with the training step of its train.py."""

    name = "tutorial's repository"

    def __init__(self, size: ModelSize, vocab_size: int, device: torch.device, path: str):
        super().__init__(size, vocab_size, device, build_of_repository(path))


def build_of_repository(path: str) -> Callable[..., nn.Module]:
    """`build_transformer` of the model.py in this folder."""
    file = Path(path) / "model.py"
    if not file.is_file():
        raise InputError(f"no {file}; give the folder of a checkout of the tutorial's repository")
    spec = importlib.util.spec_from_file_location("tutorial_model", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_transformer


def explicit_attention(
    block: MultiHeadAttentionBlock, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, is_causal: bool = False
) -> Tensor:
    scores = (query @ key.transpose(-2, -1)) / math.sqrt(block.d_k)
    scores.masked_fill_(mask == 0, -1e9)
    return block.dropout(scores.softmax(dim=-1)) @ value


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Mean over the target tokens: logits (B, T, V), label (B, T) -> ()."""
    return F.cross_entropy(logits.flatten(0, 1).float(), label.flatten(), ignore_index=PAD, label_smoothing=SMOOTHING)


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """Backward pass and optimizer step; returns the loss."""
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


# ---------------------------------------------------------------------------- libraries


class LibraryPeer:
    """A model from a library, trained with fused AdamW, in fp32 or with bf16 autocast."""

    def __init__(self, model: nn.Module, device: torch.device, precision: str):
        self.model, self.device, self.precision = model.to(device), device, precision
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def step(self, batch: dict) -> Tensor:
        self.model.train()
        source, target, label = (batch[name].to(self.device, non_blocking=True) for name in INPUTS)
        with self.autocast():
            logits = self.logits(source, target)
        return update(self.optimizer, cross_entropy(logits, label))

    def logits(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits (B, T, V) for source ids (B, S) and target ids (B, T)."""
        raise NotImplementedError


class PyTorch(LibraryPeer):
    """`torch.nn.Transformer` with tied embeddings."""

    name = "torch.nn.Transformer"

    def __init__(self, size: ModelSize, vocab_size: int, device: torch.device, precision: str = "fp32"):
        super().__init__(PyTorchModel(size, vocab_size), device, precision)

    def logits(self, source: Tensor, target: Tensor) -> Tensor:
        return self.model(source, target)


class PyTorchModel(nn.Module):
    def __init__(self, size: ModelSize, vocab_size: int):
        super().__init__()
        self.d_model = size.d_model
        self.embedding = nn.Embedding(vocab_size, size.d_model)
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
        self.projection = nn.Linear(size.d_model, vocab_size)
        nn.init.xavier_uniform_(self.embedding.weight)
        self.projection.weight = self.embedding.weight
        self.dropout = nn.Dropout(DROPOUT)
        reference = build_transformer(4, 4, 512, 512, size.d_model, 1, 1)
        self.register_buffer("pe", reference.src_pos.pe)

    def embed(self, ids: Tensor) -> Tensor:
        return self.dropout(self.embedding(ids) * math.sqrt(self.d_model) + self.pe[: ids.size(1)])

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x = self.body(
            self.embed(source),
            self.embed(target),
            tgt_mask=~causal_mask(target.size(1), target.device)[0],  # PyTorch's masks: True = may not attend
            src_key_padding_mask=source == PAD,
            tgt_key_padding_mask=target == PAD,
            memory_key_padding_mask=source == PAD,
            tgt_is_causal=True,
        )
        return self.projection(x)


class Marian(LibraryPeer):
    """Hugging Face's Marian, randomly initialized."""

    name = "Marian"

    def __init__(self, size: ModelSize, vocab_size: int, device: torch.device, precision: str = "fp32"):
        from transformers import MarianConfig, MarianMTModel

        config = MarianConfig(
            vocab_size=vocab_size,
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
        super().__init__(MarianMTModel(config), device, precision)

    def logits(self, source: Tensor, target: Tensor) -> Tensor:
        return self.model(input_ids=source, attention_mask=source != PAD, decoder_input_ids=target).logits

    def prepare_for_decoding(self) -> str:
        self.model.eval()
        self.model.final_logits_bias[:, EOS] = IMPOSSIBLE
        return "fp32"

    def decode(self, source: Tensor, lengths: Tensor, beam_size: int) -> None:
        limits = lengths.repeat_interleave(beam_size)

        def end_at_limit(target: Tensor, logits: Tensor) -> Tensor:
            at_limit = limits <= target.size(1)
            if at_limit.any():
                logits[at_limit] = IMPOSSIBLE
                logits[at_limit, EOS] = 0
            return logits

        target = self.model.generate(
            input_ids=source,
            attention_mask=(source != PAD).long(),
            max_new_tokens=int(lengths.max()),
            num_beams=beam_size,
            do_sample=False,
            logits_processor=[end_at_limit],
            **({"early_stopping": True, "length_penalty": 0.6} if beam_size > 1 else {}),
        )
        assert target.size(1) == lengths.max() + 1, target.shape


class MarianInBF16(Marian):
    """Marian with the whole model cast to bf16, which takes one line of code."""

    name = "Marian (cast to bf16)"

    def prepare_for_decoding(self) -> str:
        super().prepare_for_decoding()
        self.model.bfloat16()
        return "bf16"


class JoeyNMT(LibraryPeer):
    """JoeyNMT 2.3: its model, loss and search."""

    name = "JoeyNMT"

    def __init__(self, size: ModelSize, vocab_size: int, device: torch.device, precision: str = "fp32"):
        from joeynmt.model import build_model
        from joeynmt.vocabulary import Vocabulary

        unk, pad, sos, eos = SPECIAL_TOKENS
        special = {"unk_token": unk, "pad_token": pad, "bos_token": sos, "eos_token": eos, "sep_token": None}
        ids = {"unk_id": 0, "pad_id": PAD, "bos_id": SOS, "eos_id": EOS}
        words = [f"word{i}" for i in range(vocab_size - len(SPECIAL_TOKENS))]
        vocabulary = Vocabulary(words, SimpleNamespace(**special, **ids, lang_tags=[]))
        stack = {  # the same settings for the encoder and the decoder
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
        model = build_model(
            dict(encoder=stack, decoder=stack, tied_embeddings=True, tied_softmax=True, **initializers),
            vocabulary,
            vocabulary,
        )
        model.loss_function = ("crossentropy", SMOOTHING)
        super().__init__(model, device, precision)

    def make_batch(self, source: Tensor, target: Tensor | None):
        from joeynmt.batch import Batch

        lengths = (source != PAD).sum(1)
        return Batch(source, lengths, None, target, None, torch.arange(len(source)), self.device, PAD, EOS)

    def step(self, batch: dict) -> Tensor:
        self.model.train()
        sos = batch["decoder_input"][:, :1]
        batch = self.make_batch(batch["encoder_input"], torch.cat([sos, batch["label"]], dim=1))
        with self.autocast():
            loss, *_ = self.model(return_type="loss", **vars(batch))
        return update(self.optimizer, batch.normalize(loss, "tokens"))

    def prepare_for_decoding(self) -> str:
        self.model.eval()
        return "fp32"

    def decode(self, source: Tensor, lengths: Tensor, beam_size: int) -> None:
        """All translations get the maximum length, because JoeyNMT decodes all sentences until the last one ends."""
        from joeynmt.search import search

        batch, longest = self.make_batch(source, None), int(lengths.max())
        target, _, _ = search(self.model, batch, longest, beam_size, 0.6, min_output_length=longest + 1)
        assert target.shape == (len(source), longest), target.shape
