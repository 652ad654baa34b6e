"""Operations in two versions: a plain reference, and a faster equivalent.

    N  target tokens, or rows of logits    D    d_model        B  batch    Q  query positions
    V  target vocabulary                   d_k  head size      H  heads

Code that trades clarity for speed is kept here; the tests compare each fast version with its plain one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# ---------------------------------------------------------------------------- loss over a large vocabulary


def plain_loss(x: Tensor, projection: nn.Linear, label: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of softmax(x W^T + b), summed over the tokens, in nats: x (N, D), label (N,) -> ().

    Label smoothing moves the probability mass `smoothing` from the label to all V tokens evenly (Vaswani et al., 2017,
    section 5.4; Szegedy et al., 2016, section 7).
    """
    return F.cross_entropy(projection(x), label, label_smoothing=smoothing, reduction="sum")


def fused_loss(x: Tensor, projection: nn.Linear, label: Tensor, smoothing: float) -> Tensor:
    """`plain_loss` in chunks of a few hundred tokens, so that the (N, V) logits are never materialized as a whole.

    The gradient of a chunk's logits, softmax - target, is computed and consumed in the forward pass. Under
    autocast the logits have its dtype; the loss and the sums over chunks stay in fp32.
    """
    tensors = x, projection.weight, projection.bias
    if not torch.is_grad_enabled():  # in `forward`, needs_input_grad is set even under no_grad
        tensors = (tensor.detach() for tensor in tensors)
    dtype = logits_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return _FusedLoss.apply(*tensors, label, smoothing, dtype)


def logits_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product with x: that of autocast, if it is enabled."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def label_log_probabilities(
    logits: Tensor, p: Tensor, at_label: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the labels, and logarithms of the softmax's denominators, both (n,).

    logits and the softmax p are (n, V), and `at_label` indexes one element in each row.
    """
    label_logits, label_p = logits[at_label].to(dtype), p[at_label]  # (n,)
    # On a CPU, finding the maxima takes a seventh of the loss in bf16. On a GPU, this check would wait for the kernels.
    if p.device.type == "cpu" and (label_p > torch.finfo(p.dtype).tiny).all():
        log_p = label_p.to(dtype).log()
        return log_p, label_logits - log_p
    # The largest probability is at least 1 / V, so its logarithm is exact where p of the label underflows.
    log_denominator = logits.amax(1).to(dtype) - p.amax(1).to(dtype).log()
    return label_logits - log_denominator, log_denominator


# Logits per chunk. A chunk fits into a CPU's cache: 147 ms instead of 201 for 1,875 tokens and a vocabulary of 10,000.
LOGITS_PER_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 28, "mps": 1 << 26}
# Tensor cores work on whole tiles: the vocabulary is padded with unused rows to a multiple of this.
VOCABULARY_MULTIPLE = {"cpu": 1, "cuda": 64, "mps": 1}


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, label: Tensor, smoothing: float, dtype) -> Tensor:
        V, device = len(weight), x.device.type
        sum_type = torch.promote_types(x.dtype, torch.float)
        x_cast, w, b = x.to(dtype), weight.to(dtype), bias.to(dtype)
        if padding := -V % VOCABULARY_MULTIPLE[device]:
            w, b = F.pad(w, (0, 0, 0, padding)), F.pad(b, (0, padding), value=-torch.inf)
        chunk = max(1, LOGITS_PER_CHUNK[device] // V)
        log_z = x.new_zeros((), dtype=sum_type)  # sum over tokens of the log of the softmax's denominator
        log_p_label = log_z.clone()  # sum over tokens of the label's log-probability
        needs_gradients = any(ctx.needs_input_grad)
        if needs_gradients:
            dx, dweight, dbias = [], weight.new_zeros(w.shape), bias.new_zeros(b.shape)
        for x_, label_ in zip(x_cast.split(chunk), label.split(chunk), strict=True):
            logits = F.linear(x_, w, b)  # (n, V) for the n tokens of the chunk
            p = logits.softmax(1)
            at_label = torch.arange(len(x_), device=x.device), label_
            log_p, log_denominator = label_log_probabilities(logits, p, at_label, sum_type)  # (n,)
            log_z += log_denominator.sum()
            log_p_label += log_p.sum()
            if needs_gradients:  # softmax - target, without the uniform part of the target
                gradient = p
                gradient[at_label] = (log_p.exp() - (1 - smoothing)).to(dtype)  # 1 - smoothing in bf16 would be biased
                dx.append(gradient @ w)
                dweight += gradient.T @ x_
                dbias += gradient.sum(0)
        # The uniform part of the target, smoothing / V, is the same for every token. What it adds to the loss and the
        # gradients follows from sums over the vocabulary, without another pass over the logits.
        uniform, x_sum, weight_sum = smoothing / V, x.sum(0, dtype=sum_type), weight.sum(0)
        if needs_gradients:
            dx = torch.cat(dx).to(x.dtype) - uniform * weight_sum
            ctx.save_for_backward(dx, dweight[:V].sub_(uniform * x_sum), dbias[:V].sub_(uniform * len(x)))
        uniform_loss = smoothing * log_z - uniform * ((x_sum * weight_sum).sum() + len(x) * bias.sum())
        return uniform_loss - (1 - smoothing) * log_p_label

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        dx, dweight, dbias = ctx.saved_tensors
        return scale * dx, scale * dweight, scale * dbias, None, None, None


# ---------------------------------------------------------------------------- R-Drop over a large vocabulary


def plain_rdrop(x: Tensor, projection: nn.Linear, label: Tensor, smoothing: float, alpha: float) -> Tensor:
    """R-Drop (Liang et al., 2021, equation 4), halved, summed over the tokens, in nats: x (2, N, D), label (N,) -> ().

    x holds the decoder outputs of two runs with different dropout masks. The loss is the mean of the two
    cross-entropies plus alpha / 4 times the symmetric Kullback-Leibler divergence between the two predictions.
    """
    log_p, log_q = projection(x).log_softmax(-1)
    divergence = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()  # KL(p, q) + KL(q, p)
    return plain_loss(x.flatten(0, 1), projection, label.repeat(2), smoothing) / 2 + alpha / 4 * divergence


def fused_rdrop(x: Tensor, projection: nn.Linear, label: Tensor, smoothing: float, alpha: float) -> Tensor:
    """`plain_rdrop` in chunks, with the gradients computed in the forward pass, as in `fused_loss`. Needs gradients.

    In bf16, 1,875 target tokens and a vocabulary of 6,000 take 0.13 s, and 0.35 s with autograd and checkpoints.
    """
    dtype = logits_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return _FusedRDrop.apply(x, projection.weight, projection.bias, label, smoothing, alpha, dtype)


class _FusedRDrop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, label: Tensor, smoothing: float, alpha: float, dtype):
        N, V, device = len(label), len(weight), x.device.type
        sum_type = torch.promote_types(x.dtype, torch.float)
        x_cast, w, b = x.to(dtype), weight.to(dtype), bias.to(dtype)
        if padding := -V % VOCABULARY_MULTIPLE[device]:
            w, b = F.pad(w, (0, 0, 0, padding)), F.pad(b, (0, padding), value=-1e4)  # finite: log ratios are computed
        chunk = max(1, LOGITS_PER_CHUNK[device] // (2 * V))
        beta, uniform = alpha / 4, smoothing / (2 * V)
        loss = x.new_zeros((), dtype=sum_type)
        dx, dweight, dbias = [], weight.new_zeros(w.shape), bias.new_zeros(b.shape)
        for x_, label_ in zip(x_cast.split(chunk, 1), label.split(chunk), strict=True):
            n, x_ = len(label_), x_.flatten(0, 1)  # (2, n, D) -> (2 n, D)
            logits = F.linear(x_, w, b)  # (2 n, V)
            p_and_q = logits.softmax(1)
            at_label = torch.arange(2 * n, device=x.device), label_.repeat(2)
            log_p_label, log_denominator = label_log_probabilities(logits, p_and_q, at_label, sum_type)  # (2 n,)
            loss += smoothing / 2 * log_denominator.sum() - (1 - smoothing) / 2 * log_p_label.sum()

            # With r = log p - log q, and the means of r under p and under q, the divergence is mean_p - mean_q. Its
            # derivative by the logits of p is p (r - mean_p) + p - q, and by those of q it is q (mean_q - r) + q - p.
            p, q = p_and_q.split(n)  # (n, V)
            r = logits[:n] - logits[n:] - (log_denominator[:n] - log_denominator[n:]).unsqueeze(1).to(dtype)
            p_r, q_r = p * r, q * r
            mean_p, mean_q = (t.sum(1, keepdim=True, dtype=sum_type) for t in (p_r, q_r))  # (n, 1)
            loss += beta * (mean_p - mean_q).sum()
            mean = torch.cat([mean_p, -mean_q])  # (2 n, 1)
            gradient = p_and_q * (0.5 + beta - beta * mean).to(
                dtype
            )  # (2 n, V), without the uniform part of the target
            gradient[:n].add_(p_r.sub_(q), alpha=beta)
            gradient[n:].sub_(q_r.add_(p), alpha=beta)
            p_label = log_p_label.exp()
            r_label, difference = (t - t.roll(n) for t in (log_p_label, p_label))  # roll exchanges p and q
            divergence_label = p_label * (r_label - mean.squeeze(1)) + difference
            gradient[at_label] = ((p_label - (1 - smoothing)) / 2 + beta * divergence_label).to(dtype)
            dx.append((gradient @ w).unflatten(0, (2, n)))
            dweight += gradient.T @ x_
            dbias += gradient.sum(0)
        x_sum, weight_sum = x.sum((0, 1), dtype=sum_type), weight.sum(0)
        dx = torch.cat(dx, 1).to(x.dtype) - uniform * weight_sum
        ctx.save_for_backward(dx, dweight[:V].sub_(uniform * x_sum), dbias[:V].sub_(uniform * 2 * N))
        return loss - uniform * ((x_sum * weight_sum).sum() + 2 * N * bias.sum())

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        dx, dweight, dbias = ctx.saved_tensors
        return scale * dx, scale * dweight, scale * dbias, None, None, None, None


# ---------------------------------------------------------------------------- top-k over a large vocabulary

BLOCK = 64  # logits per block in `fast_top`


def plain_top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k largest logits of each row, in descending order: (N, V) -> (N, k), (N, k)."""
    return logits.topk(k)


def fast_top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`plain_top` in two stages: the k largest logits lie in the k blocks with the largest maxima.

    On a CPU, topk and argmax are scalar loops and amax is vectorized, so this takes 0.4 ms instead of 2.3 (200 rows of
    10,000 logits, k = 1) and 1.5 ms instead of 2.7 (k = 10). The order of equal logits is unspecified.
    """
    blocks = logits.size(1) // BLOCK
    if logits.device.type != "cpu" or blocks < 4 * k:
        return plain_top(logits, k)
    body, tail = logits[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)), logits[:, blocks * BLOCK :]
    _, best_blocks = body.amax(-1).topk(k)  # (N, k)
    candidates = body.gather(1, best_blocks.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1)  # (N, k * BLOCK)
    indices = (best_blocks.unsqueeze(-1) * BLOCK + torch.arange(BLOCK)).flatten(1)
    indices = torch.cat([indices, torch.arange(blocks * BLOCK, logits.size(1)).expand(len(logits), -1)], 1)
    values, positions = torch.cat([candidates, tail], 1).topk(k)
    return values, indices.gather(1, positions)


# ---------------------------------------------------------------------------- linear layers in bf16 or fp16


class LowPrecisionLinear(nn.Module):
    """An `nn.Linear` in bf16 or fp16, for inference: weights are cast once, inputs and outputs in each call.

    `torch.autocast` gives the same numbers, but casts the weights in every call.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


def use_low_precision_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Replaces every nn.Linear with a LowPrecisionLinear; attention, norms and the residual stream keep their dtype."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, LowPrecisionLinear(child, dtype))


# ---------------------------------------------------------------------------- dropout


class Dropout(nn.Module):
    """In training, zeroes activations with probability p and scales the rest by 1 / (1 - p) (Srivastava et al., 2014).

    On a CPU, PyTorch draws one float per element on one thread: 5.8 ms for 2,048 x 128. Drawing one byte per element
    takes 0.6 ms; p is then rounded to a multiple of 1/256, and the scale is adapted.
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
    """A dropout mask of the shape of x: 0 with probability p (rounded to 1/256, at least 1/256), else 1 / (1 - p)."""
    dropped = min(255, max(1, round(256 * p)))
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    bytes_ = words.view(torch.uint8)[: x.numel()].view(x.shape)
    return torch.ge(bytes_, dropped, out=torch.empty_like(x, memory_format=torch.contiguous_format)).mul_(
        256 / (256 - dropped)
    )


# ---------------------------------------------------------------------------- choice of the attention kernel

FEW_QUERIES = 8  # a decoding step has one query position, or one per hypothesis of a beam


def fused_attention_is_faster(query: Tensor, dropout: float, is_training: bool) -> bool:
    """Whether PyTorch's fused kernel is faster than explicit attention for queries (B, H, Q, d_k).

    On a CPU, the fused kernel draws dropout on one thread, is several times slower in bf16, and 1.2 to 1.9 times
    slower for a single query (benchmarks/README.md).
    """
    if query.device.type != "cpu":
        return True
    few_queries = query.size(2) < FEW_QUERIES and not is_training
    return not (dropout > 0 or query.dtype == torch.bfloat16 or few_queries)
