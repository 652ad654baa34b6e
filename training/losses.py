"""The training loss: cross-entropy with label smoothing, and R-Drop.

B  batch (sentences)          N  target tokens, without padding
S  source length in tokens    D  d_model
T  target length in tokens    V  target vocabulary
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from compute.device import autocast
from compute.ops import fused_loss, fused_rdrop
from model import Transformer


class LossInputs(NamedTuple):
    """The inputs of the loss of a batch, on the model's device."""

    encoder_input: Tensor  # (B, S)
    decoder_input: Tensor  # (B, T)
    encoder_mask: Tensor  # (B, 1, 1, S)
    target_positions: Tensor  # (N,), indices of the target tokens in the flattened batch (B T)
    target_tokens: Tensor  # (N,)

    @classmethod
    def of(cls, batch: dict, device: torch.device) -> "LossInputs":
        """The inputs for a batch. If the batch is in pinned memory, the host does not wait for the copies to a GPU."""
        return cls(*(batch[name].to(device, non_blocking=True) for name in cls._fields))


def count_target_tokens(batch: dict) -> int:
    """The number of target tokens in a batch, without padding."""
    return len(batch["target_tokens"])


class TrainingLoss(nn.Module):
    """A model and its loss as one module, which is what DistributedDataParallel wraps."""

    def __init__(self, model: Transformer, label_smoothing: float, rdrop_alpha: float = 0.0, precision: str = "fp32"):
        super().__init__()
        self.model = model
        self.label_smoothing, self.rdrop_alpha, self.precision = label_smoothing, rdrop_alpha, precision

    def forward(self, inputs: LossInputs) -> Tensor:
        """The loss in nats, summed over the N target tokens."""
        with autocast(inputs.target_tokens.device, self.precision):
            if self.rdrop_alpha:
                return rdrop(self.model, inputs, self.label_smoothing, self.rdrop_alpha)
            return cross_entropy(self.model, inputs, self.label_smoothing)


def cross_entropy(model: Transformer, inputs: LossInputs, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy in nats, summed over the N target tokens; padding is dropped before the projection."""
    *tensors, positions, label = inputs
    x = model.hidden(*tensors, decoder_mask=None)  # (B, T, D)
    x = x.flatten(0, 1).index_select(0, positions)  # (B T, D) -> (N, D)
    return fused_loss(x, model.projection_layer.proj, label, label_smoothing)


def rdrop(model: Transformer, inputs: LossInputs, label_smoothing: float, alpha: float) -> Tensor:
    """R-Drop in nats, summed over the N target tokens: `plain_rdrop` of two runs with different dropout masks."""
    *tensors, positions, label = inputs
    x = model.hidden(*(torch.cat([tensor, tensor]) for tensor in tensors), decoder_mask=None)  # (2 B, T, D)
    x = x.unflatten(0, (2, -1)).flatten(1, 2).index_select(1, positions)  # (2, B T, D) -> (2, N, D)
    return fused_rdrop(x, model.projection_layer.proj, label, label_smoothing, alpha)
