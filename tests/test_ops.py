"""Each fast operation gives the result of its plain version."""

import pytest
import torch
from torch import nn

from compute import ops
from compute.ops import Dropout, byte_mask, fast_top, fused_loss, plain_loss, plain_top


def test_the_plain_loss_is_label_smoothed_cross_entropy_summed_over_tokens():
    torch.manual_seed(0)
    x, projection, label, eps = torch.randn(3, 4), nn.Linear(4, 10), torch.tensor([4, 5, 6]), 0.1
    log_p = projection(x).log_softmax(-1)
    expected = -sum((1 - eps) * log_p[i, label[i]] + eps / 10 * log_p[i].sum() for i in range(3))
    assert torch.allclose(plain_loss(x, projection, label, eps), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("logits_per_chunk", [1, 7 * 50, 1 << 20])  # one token, 7 of 40 tokens, all tokens
@pytest.mark.parametrize("multiple", [1, 64])
def test_fused_and_plain_loss_and_their_gradients_agree(smoothing, logits_per_chunk, multiple, monkeypatch):
    monkeypatch.setitem(ops.LOGITS_PER_CHUNK, "cpu", logits_per_chunk)
    monkeypatch.setitem(ops.VOCABULARY_MULTIPLE, "cpu", multiple)
    torch.manual_seed(0)
    projection, label = nn.Linear(16, 50).double(), torch.randint(0, 50, (40,))
    results = []
    for loss_of in (plain_loss, fused_loss):
        x = torch.linspace(-3, 3, 640, dtype=torch.double).view(40, 16).requires_grad_()
        projection.zero_grad()
        loss = 0.5 * loss_of(x, projection, label, smoothing)
        loss.backward()
        results.append([loss.detach(), x.grad, projection.weight.grad.clone(), projection.bias.grad.clone()])
    for plain, fused in zip(*results, strict=True):
        assert torch.allclose(plain, fused, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 2e-2)])
def test_fused_and_plain_loss_agree_in_fp32_and_under_bf16_autocast(bf16, tolerance):
    torch.manual_seed(0)
    projection, label, results = nn.Linear(16, 50), torch.randint(0, 50, (40,)), []
    for loss_of in (plain_loss, fused_loss):
        x = torch.linspace(-3, 3, 640).view(40, 16).requires_grad_()
        projection.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(x, projection, label, 0.1)
        loss.backward()
        assert loss.dtype == x.grad.dtype == projection.weight.grad.dtype == torch.float
        results.append([loss.detach(), x.grad, projection.weight.grad.clone(), projection.bias.grad.clone()])
    for plain, fused in zip(*results, strict=True):
        assert (plain - fused).norm() <= tolerance * plain.norm()


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
