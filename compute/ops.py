"""The operations worth writing twice: the formula as a reader expects it, and the same thing fast.

    N  target tokens    D  width of the vectors    V  tokens in the vocabulary

What costs clarity for speed is here; the tests hold each fast form to its plain one.
"""

import ctypes
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# ---------------------------------------------------------------------------- memory


def keep_freed_memory() -> None:
    """Makes the C library keep the memory of large tensors that are freed for the next ones.

    It would hand each back and fetch it anew, page after page. With it a beam of 5 is 1.4 times as fast on a
    CPU and a training step of the Multi30k model 1.15 times. Where the library is not glibc, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
        if mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 1 << 25):  # the most that old ones take
            mallopt(trim_threshold, 1 << 30)


def peak_memory(device: torch.device) -> float:
    """Bytes that tensors took on a GPU, or this process of the machine's memory, at most; 0 where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---------------------------------------------------------------------------- loss over a large vocabulary


def plain_loss(x: Tensor, projection: nn.Linear, label: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of softmax(x W^T + b), summed over the tokens, in nats: x (N, D), label (N,).

    With smoothing the target is 1 - smoothing on the label and the rest spread over all V tokens
    (Vaswani et al., 2017, section 5.4; Szegedy et al., 2016, section 7).
    """
    return F.cross_entropy(projection(x), label, label_smoothing=smoothing, reduction="sum")


def fused_loss(x: Tensor, projection: nn.Linear, label: Tensor, smoothing: float) -> Tensor:
    """`plain_loss` a few hundred tokens at a time, so that the (N, V) logits are never in memory as a whole.

    The gradient of the logits, softmax - target, is made and used up while they are at hand. Under
    autocast logits and products are of its type; the loss, and sums from chunk to chunk, are not.
    """
    tensors = x, projection.weight, projection.bias
    if not torch.is_grad_enabled():  # else the gradients would be made all the same
        tensors = (tensor.detach() for tensor in tensors)
    device = x.device.type
    logits_type = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        return _FusedLoss.apply(*tensors, label, smoothing, logits_type)


# Logits at a time. On a CPU they stay in its cache: 147 ms for 1,875 tokens and a vocabulary of 10,000, not 201.
LOGITS_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 28, "mps": 1 << 26}
# A GPU's matrix units take whole tiles: rows that no token has fill the vocabulary up to a multiple of this.
VOCABULARY_MULTIPLE = {"cpu": 1, "cuda": 64, "mps": 1}


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, label: Tensor, smoothing: float, dtype) -> Tensor:
        V, device = len(weight), x.device.type
        exact = torch.promote_types(x.dtype, torch.float)
        x_cast, w, b = x.to(dtype), weight.to(dtype), bias.to(dtype)
        if filling := -V % VOCABULARY_MULTIPLE[device]:
            w, b = F.pad(w, (0, 0, 0, filling)), F.pad(b, (0, filling), value=-torch.inf)
        at_once = max(1, LOGITS_AT_ONCE[device] // V)
        log_total = x.new_zeros((), dtype=exact)  # sums over the tokens of the log of the softmax's denominator,
        log_p_label = log_total.clone()  # and of the label's log-probability
        wants_gradients = any(ctx.needs_input_grad)
        if wants_gradients:
            dx, dweight, dbias = [], weight.new_zeros(w.shape), bias.new_zeros(b.shape)
        for x_, label_ in zip(x_cast.split(at_once), label.split(at_once), strict=True):
            logits = F.linear(x_, w, b)  # (n, V)
            p = logits.softmax(1)
            # The likeliest token's probability is at least 1 / V, so its logarithm gives the denominator safely.
            denominator = logits.amax(1).to(exact) - p.amax(1).to(exact).log()  # (n,)
            at_label = torch.arange(len(x_), device=x.device), label_
            log_total += denominator.sum()
            log_p_label += (logits[at_label].to(exact) - denominator).sum()
            if wants_gradients:  # softmax - target, but for the even part of the target
                gradient = p
                gradient[at_label] -= 1 - smoothing
                dx.append(gradient @ w)
                dweight += gradient.T @ x_
                dbias += gradient.sum(0)
        # The target's even part, smoothing / V, is the same for every token. Sums over the vocabulary give
        # its share of the loss and of the gradients, without a pass over the logits.
        even, x_sum, weight_sum = smoothing / V, x.sum(0, dtype=exact), weight.sum(0)
        if wants_gradients:
            dx = torch.cat(dx).to(x.dtype) - even * weight_sum
            ctx.save_for_backward(dx, dweight[:V].sub_(even * x_sum), dbias[:V].sub_(even * len(x)))
        spread = smoothing * log_total - even * ((x_sum * weight_sum).sum() + len(x) * bias.sum())
        return spread - (1 - smoothing) * log_p_label

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        dx, dweight, dbias = ctx.saved_tensors
        return scale * dx, scale * dweight, scale * dbias, None, None, None


# ---------------------------------------------------------------------------- the likeliest of many tokens

BLOCK = 64  # logits whose maximum is looked at first


def plain_top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k highest of each row, highest first: (N, V) to (N, k) each."""
    return logits.topk(k)


def fast_top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`plain_top` by way of the maxima of blocks: the k highest lie in the k blocks with the highest maxima.

    On a CPU, where topk and argmax look at one number at a time and amax at sixteen, it takes 0.4 ms where
    topk takes 2.3 (200 rows of 10,000, k = 1), and 1.5 for 2.7 (k = 10). Which of several equal ones comes
    is left open.
    """
    blocks = logits.size(1) // BLOCK
    if logits.device.type != "cpu" or blocks < 4 * k:
        return plain_top(logits, k)
    body, rest = logits[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)), logits[:, blocks * BLOCK :]
    _, chosen = body.amax(-1).topk(k)  # (N, k), of the blocks
    candidates = body.gather(1, chosen.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1)  # (N, k BLOCK)
    indices = (chosen.unsqueeze(-1) * BLOCK + torch.arange(BLOCK)).flatten(1)
    indices = torch.cat([indices, torch.arange(blocks * BLOCK, logits.size(1)).expand(len(logits), -1)], 1)
    values, places = torch.cat([candidates, rest], 1).topk(k)
    return values, indices.gather(1, places)


# ---------------------------------------------------------------------------- products in bf16


class BF16Linear(nn.Module):
    """An `nn.Linear` that computes in bf16, for translation: weights are cast once, inputs and outputs at each call.

    `torch.autocast` gives the same numbers, but casts the weights anew in every step.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().bfloat16(), requires_grad=False)
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().bfloat16(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight, self.bias).to(x.dtype)


def use_bf16_products(model: nn.Module) -> None:
    """Puts a BF16Linear in the place of every nn.Linear; attention, norms and the residual stream stay as they are."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, BF16Linear(child))


# ---------------------------------------------------------------------------- dropout


class Dropout(nn.Module):
    """Zeroes a share p of the activations in training and scales the rest up (Srivastava et al., 2014).

    On a CPU PyTorch draws a float for every element, on one thread: 5.8 ms for 2,048 x 128. A byte for
    every element takes 0.6 ms; p is then rounded to a multiple of 1/256, and the scale goes with it.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        return x * byte_mask(x, self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def byte_mask(x: Tensor, p: float) -> Tensor:
    """Of the shape of x: 0 with probability p (to the nearest 1/256 above 0), else what keeps the mean at 1."""
    dropped = min(255, max(1, round(256 * p)))
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    bytes_ = words.view(torch.uint8)[: x.numel()].view(x.shape)
    return torch.ge(bytes_, dropped, out=torch.empty_like(x, memory_format=torch.contiguous_format)).mul_(
        256 / (256 - dropped)
    )
