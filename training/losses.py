"""What training makes small.

B  sentences in the batch    T  target length in tokens    N  target tokens without padding
D  width of the vectors      V  target vocabulary
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compute.ops import fused_loss
from dataset import PAD
from model import Transformer


class Learner(nn.Module):
    """A model with its loss, so that one call is all that a training step differentiates."""

    def __init__(self, model: Transformer, label_smoothing: float, rdrop_alpha: float = 0.0):
        super().__init__()
        self.model, self.label_smoothing, self.rdrop_alpha = model, label_smoothing, rdrop_alpha

    def forward(self, *inputs: Tensor) -> Tensor:
        """The loss summed over the target tokens of a batch, given as the arguments of `cross_entropy`."""
        if self.rdrop_alpha:
            return rdrop(self.model, *inputs, smoothing=self.label_smoothing, alpha=self.rdrop_alpha)
        return cross_entropy(self.model, *inputs, smoothing=self.label_smoothing)


def target_tokens(batch: dict) -> tuple[Tensor, Tensor]:
    """Where in the flat batch (B T) the target tokens stand that are no padding, and their labels, each (N,).

    Found where the batch was made, so that no device has to wait for the count.
    """
    label = batch["label"].flatten()
    real = (label != PAD).nonzero().squeeze(1)
    return real, label[real]


def cross_entropy(
    model: Transformer,
    encoder_input: Tensor,
    decoder_input: Tensor,
    encoder_mask: Tensor,
    decoder_mask: Tensor,
    real: Tensor,
    label: Tensor,
    smoothing: float = 0.0,
) -> Tensor:
    """In nats, summed over the target tokens (N,); padding is left out before the projection."""
    x = model.hidden(encoder_input, decoder_input, encoder_mask, decoder_mask)  # (B, T, D)
    x = x.flatten(0, 1).index_select(0, real)  # (N, D)
    return fused_loss(x, model.projection_layer.proj, label, smoothing)


def rdrop(
    model: Transformer,
    encoder_input: Tensor,
    decoder_input: Tensor,
    encoder_mask: Tensor,
    decoder_mask: Tensor,
    real: Tensor,
    label: Tensor,
    smoothing: float,
    alpha: float,
) -> Tensor:
    """R-Drop (Wu et al., 2021, equation 4), halved: two passes under different dropout, which should agree.

    The mean of their two losses, and alpha / 4 times the Kullback-Leibler divergence between their
    predictions, both ways; summed over the target tokens (N,).
    """
    twice = [torch.cat([tensor, tensor]) for tensor in (encoder_input, decoder_input, encoder_mask, decoder_mask)]
    x = model.hidden(*twice).unflatten(0, (2, -1)).flatten(1, 2)  # (2 B, T, D) -> (2, B T, D)
    logits = model.project(x.index_select(1, real)).float()  # (2, N, V)
    loss = F.cross_entropy(logits.flatten(0, 1), label.repeat(2), label_smoothing=smoothing, reduction="sum")
    log_p, log_q = logits.log_softmax(-1)
    divergence = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()  # KL(p, q) + KL(q, p)
    return loss / 2 + alpha / 4 * divergence
