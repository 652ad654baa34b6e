"""Each fast operation gives the result of its plain version."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from compute import ops
from compute.ops import (
    Dropout,
    byte_mask,
    fast_top,
    fused_loss,
    fused_rdrop,
    plain_loss,
    plain_rdrop,
    plain_top,
)

# For each fast loss: its plain version, the fast one, their further arguments, and the shape of x (..., N, D) without D
LOSSES = {
    "loss": (plain_loss, fused_loss, (), (40,)),
    "R-Drop": (plain_rdrop, fused_rdrop, (5.0,), (2, 40)),
}


def test_the_plain_loss_is_label_smoothed_cross_entropy_summed_over_tokens():
    torch.manual_seed(0)
    x, projection, label, eps = torch.randn(3, 4), nn.Linear(4, 10), torch.tensor([4, 5, 6]), 0.1
    log_p = projection(x).log_softmax(-1)
    expected = -sum((1 - eps) * log_p[i, label[i]] + eps / 10 * log_p[i].sum() for i in range(3))
    assert torch.allclose(plain_loss(x, projection, label, eps), expected)


def test_plain_rdrop_is_half_of_equation_4_of_wu_et_al():
    torch.manual_seed(0)
    logits, label, eps, alpha = torch.randn(2, 3, 10), torch.tensor([4, 5, 6]), 0.1, 3.0
    identity = nn.Linear(10, 10, bias=False)
    nn.init.eye_(identity.weight)
    p, q = logits.softmax(-1)
    losses = [nn.functional.cross_entropy(z, label, label_smoothing=eps, reduction="sum") for z in logits]
    divergences = (p * (p / q).log()).sum() + (q * (q / p).log()).sum()
    expected = (losses[0] + losses[1] + alpha / 2 * divergences) / 2
    assert torch.allclose(plain_rdrop(logits, identity, label, eps, alpha), expected)


def loss_and_gradients(loss_of: Callable, x: torch.Tensor, projection: nn.Linear, *arguments) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    projection.zero_grad()
    loss = 0.5 * loss_of(x, projection, *arguments)
    loss.backward()
    return [loss.detach(), x.grad, projection.weight.grad.clone(), projection.bias.grad.clone()]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("logits_per_chunk", [1, 14 * 50, 1 << 20])  # one token, some of 40 tokens, all tokens
@pytest.mark.parametrize("multiple", [1, 64])
def test_fused_and_plain_losses_and_their_gradients_agree(name, smoothing, logits_per_chunk, multiple, monkeypatch):
    monkeypatch.setitem(ops.LOGITS_PER_CHUNK, "cpu", logits_per_chunk)
    monkeypatch.setitem(ops.VOCABULARY_MULTIPLE, "cpu", multiple)
    torch.manual_seed(0)
    plain, fused, options, shape = LOSSES[name]
    x, projection = torch.randn(*shape, 16, dtype=torch.double), nn.Linear(16, 50).double()
    arguments = x, projection, torch.randint(0, 50, (40,)), smoothing, *options
    for a, b in zip(loss_and_gradients(plain, *arguments), loss_and_gradients(fused, *arguments), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 2e-2)])
def test_fused_and_plain_losses_agree_in_fp32_and_under_bf16_autocast(name, bf16, tolerance):
    torch.manual_seed(0)
    plain, fused, options, shape = LOSSES[name]
    arguments = torch.randn(*shape, 16), nn.Linear(16, 50), torch.randint(0, 50, (40,)), 0.1, *options
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected, actual = (loss_and_gradients(loss_of, *arguments) for loss_of in (plain, fused))
    for a, b in zip(expected, actual, strict=True):
        assert b.dtype == torch.float
        assert (a - b).norm() <= tolerance * a.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_the_fused_loss_are_hardly_biased_in_low_precision(dtype):
    """Projected on the exact gradient, where labels have a probability of about 0.9.

    When 1 - smoothing was subtracted in bf16, they were 1% too short.
    """
    torch.manual_seed(0)
    projection, label, results = nn.Linear(64, 500), torch.randint(0, 500, (400,)), []
    rows = projection.weight.detach()[label]
    values = 9 * rows / rows.pow(2).sum(1, keepdim=True) + 0.5 * torch.randn(400, 64)
    for loss_of, is_low in ((plain_loss, False), (fused_loss, True)):
        x = values.clone().requires_grad_()
        projection.zero_grad()
        with torch.autocast("cpu", dtype, enabled=is_low):
            loss = loss_of(x, projection, label, 0.1)
        loss.backward()
        results.append([x.grad, projection.weight.grad.clone(), projection.bias.grad.clone()])
    for exact, low in zip(*results, strict=True):
        assert abs((low * exact).sum() / (exact * exact).sum() - 1) < 3e-3


def test_the_fused_loss_computes_gradients_only_if_they_are_needed(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__setitem__", None)  # used to compute the gradient
    projection, x, label = nn.Linear(4, 10), torch.randn(3, 4), torch.tensor([1, 2, 3])
    with torch.no_grad():
        assert torch.allclose(fused_loss(x, projection, label, 0.1), plain_loss(x, projection, label, 0.1))
    with pytest.raises(TypeError):
        fused_loss(x, projection, label, 0.1)


def test_the_fused_loss_is_exact_where_the_softmax_underflows():
    projection = nn.Linear(1, 3, bias=False)
    projection.weight.data = torch.tensor([[0.0], [500.0], [-500.0]])
    projection.bias = nn.Parameter(torch.zeros(3))
    x, label = torch.ones(1, 1, requires_grad=True), torch.tensor([2])
    assert fused_loss(x, projection, label, 0.0).item() == plain_loss(x, projection, label, 0.0).item() == 1000


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("V", [7, 64, 640, 2560, 2561, 5000])
def test_fast_top_finds_the_k_largest_logits(k, V):
    k = min(k, V)
    logits = torch.randn(9, V, generator=torch.Generator().manual_seed(0))
    logits[0] = torch.linspace(-1, 1, V)  # the largest are in the last block and the remainder
    logits[1] = -logits[0]
    logits[2, 5:] = -torch.inf
    values, indices = fast_top(logits, k)
    assert torch.equal(values, plain_top(logits, k)[0])
    assert torch.equal(logits.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_dropout_keeps_the_mean_and_zeroes_a_fraction_p():
    torch.manual_seed(0)
    x = torch.ones(1000, 301)  # not a multiple of the 8 bytes that are drawn at a time
    for p in (0.1, 0.3, 0.5):
        dropped = Dropout(p)(x)
        assert (dropped == 0).float().mean().item() == pytest.approx(p, abs=0.004)
        assert dropped.mean().item() == pytest.approx(1, abs=0.004)
        assert len(dropped.unique()) == 2
    for byte in range(8):  # each byte of a 64-bit word is equally random
        assert (byte_mask(x, 0.25).flatten()[byte::8] == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_dropout_uses_one_mask_forward_and_backward_and_follows_the_seed():
    x = torch.ones(50, 50, requires_grad=True)
    torch.manual_seed(1)
    first = Dropout(0.3)(x)
    first.sum().backward()
    assert torch.equal(x.grad, first)
    torch.manual_seed(1)
    assert torch.equal(Dropout(0.3)(x), first)
    assert not torch.equal(Dropout(0.3)(x), first)
    assert Dropout(0.3).eval()(x) is x
    assert Dropout(0.0)(x) is x


@pytest.mark.parametrize("p", [0.0001, 0.9999])
def test_dropout_works_with_probabilities_near_0_and_1(p):
    x = torch.ones(1000, 100)
    dropped = Dropout(p)(x)
    assert dropped.mean().item() == pytest.approx(1, abs=0.2)
    assert 0 < (dropped == 0).float().mean() < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_products_equal_autocast_and_cast_the_weights_once(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4, bias=False))
    x = torch.randn(3, 8)
    with torch.autocast("cpu", dtype):
        expected = model(x)
    ops.use_low_precision_products(model, dtype)
    assert [p.dtype for p in model.parameters()] == [dtype] * 2 + [torch.float] * 2 + [dtype]
    assert model(x).dtype == torch.float
    assert torch.equal(model(x), expected.float())
