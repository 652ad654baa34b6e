"""The Transformer: shapes, masks, recording, intervening, caches, initialization.

B  batch (sentences)    S  source length    T  target length
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compute.ops import Dropout
from config import get_config
from dataset import PAD, padding_mask
from model import MultiHeadAttentionBlock, PositionalEncoding, build_transformer, causal_mask, get_model


def random_ids(B: int = 3, S: int = 9, T: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Source ids (B, S) and target ids (B, T) without special tokens."""
    torch.manual_seed(1)
    return torch.randint(4, 50, (B, S)), torch.randint(4, 50, (B, T))


def logits(model: nn.Module, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return model(source, target, padding_mask(source), padding_mask(target) & causal_mask(target.size(1)))


def test_recorded_scores_have_the_right_shapes_and_rows_that_sum_to_one(tiny_model):
    source, target = random_ids()
    with tiny_model.recording():
        assert logits(tiny_model, source, target).shape == (3, 7, 60)
        shapes = {
            kind: [b.attention_scores.shape for b in blocks] for kind, blocks in tiny_model.attention_blocks().items()
        }
        for blocks in tiny_model.attention_blocks().values():
            for block in blocks:
                assert torch.allclose(block.attention_scores.sum(-1), torch.ones(()), atol=1e-6)
    assert shapes == {"encoder": [(3, 4, 9, 9)] * 3, "decoder": [(3, 4, 7, 7)] * 2, "cross": [(3, 4, 7, 9)] * 2}
    logits(tiny_model, source, target)
    for blocks in tiny_model.attention_blocks().values():
        assert all(block.attention_scores is None for block in blocks)


def test_written_out_attention_equals_the_fused_kernel(tiny_model, monkeypatch):
    calls, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    source, target = random_ids(T=12)  # with fewer queries than FEW_QUERIES both are written out
    source[1, 5:], target[2, 3:] = PAD, PAD
    fused = logits(tiny_model, source, target)
    assert len(calls) == 3 + 2 + 2  # encoder, decoder and cross-attention blocks
    with tiny_model.recording():
        written_out = logits(tiny_model, source, target)
    assert len(calls) == 3 + 2 + 2
    assert torch.allclose(fused, written_out, atol=1e-5)


@pytest.mark.parametrize("attention_dropout", [0.0, 0.3])  # the fused kernel, and written out
def test_without_a_decoder_mask_training_is_the_same_as_with_causal_and_padding_mask(tiny_model, attention_dropout):
    """At all positions that are not padding, and in the gradients of their sum."""
    source, target = random_ids(T=12)
    source[1, 5:], target[1, 7:], target[2, 1:] = PAD, PAD, PAD
    for block in tiny_model.train().modules():
        if isinstance(block, MultiHeadAttentionBlock):
            block.dropout.p = attention_dropout
        elif isinstance(block, Dropout):
            block.p = 0.0
    results = []
    for mask in (padding_mask(target) & causal_mask(12), None):
        torch.manual_seed(0)
        tiny_model.zero_grad()
        found = tiny_model(source, target, padding_mask(source), mask)[target != PAD]
        found.sum().backward()
        results.append([found, *(p.grad.clone() for p in tiny_model.parameters())])
    for with_mask, without in zip(*results, strict=True):
        assert torch.allclose(with_mask, without, atol=1e-5)


def test_scores_are_recorded_before_dropout():
    block = MultiHeadAttentionBlock(16, 2, dropout=0.9).train()
    block.record = True
    x = torch.randn(2, 5, 16)
    block(x, x, x, None)
    assert torch.allclose(block.attention_scores.sum(-1), torch.ones(()), atol=1e-6)


def test_the_result_of_an_intervention_replaces_the_scores():
    block = MultiHeadAttentionBlock(16, 2, dropout=0.0)
    x = torch.randn(2, 5, 16)
    plain = block(x, x, x, None)
    block.intervene = lambda scores: scores
    assert torch.allclose(plain, block(x, x, x, None), atol=1e-6)
    block.intervene = lambda scores: torch.full_like(scores, 1 / 5)
    mean = block.w_v(x).mean(1, keepdim=True).expand_as(x)
    assert torch.allclose(block(x, x, x, None), block.w_o(mean), atol=1e-5)


def test_padding_does_not_change_the_logits(tiny_model):
    source, target = random_ids()
    padded_source = torch.cat([source, torch.full((3, 4), PAD)], 1)
    padded_target = torch.cat([target, torch.full((3, 2), PAD)], 1)
    padded = logits(tiny_model, padded_source, padded_target)[:, :7]
    assert torch.allclose(logits(tiny_model, source, target), padded, atol=1e-5)


def test_the_decoder_is_causal_and_the_encoder_is_bidirectional(tiny_model):
    source, target = random_ids()
    before = logits(tiny_model, source, target)
    target[:, 4] = (target[:, 4] + 1) % 46 + 4
    after = logits(tiny_model, source, target)
    assert torch.allclose(before[:, :4], after[:, :4], atol=1e-6)
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-3)
    source[:, -1] = (source[:, -1] + 1) % 46 + 4
    assert not torch.allclose(after[:, 0], logits(tiny_model, source, target)[:, 0], atol=1e-3)


def test_masked_keys_have_zero_attention_scores(tiny_model):
    source, target = random_ids()
    source[1, 5:] = PAD
    with tiny_model.recording():
        logits(tiny_model, source, target)
        blocks = tiny_model.attention_blocks()
        assert (blocks["cross"][0].attention_scores[1, :, :, 5:] == 0).all()
        assert (blocks["encoder"][0].attention_scores[1, :, :, 5:] == 0).all()
        assert not blocks["decoder"][1].attention_scores.triu(1).any()


def test_cached_decoding_step_by_step_equals_one_full_forward_pass(tiny_model):
    source, target = random_ids()
    source[1, 5:] = PAD
    mask = padding_mask(source)
    encoder_output = tiny_model.encode(source, mask)
    full = tiny_model.decode(encoder_output, mask, target, causal_mask(7))
    projections = []
    w_k = tiny_model.decoder.layers[0].cross_attention_block.w_k
    w_k.register_forward_hook(lambda *_: projections.append(1))
    caches = tiny_model.new_caches(capacity=10)
    steps = [tiny_model.decode(encoder_output, mask, target[:, t : t + 1], None, caches) for t in range(7)]
    assert torch.allclose(full, torch.cat(steps, 1), atol=1e-5)
    assert len(projections) == 1  # the keys of the encoder output are computed once


def test_a_cache_keeps_the_selected_rows_in_the_given_order(tiny_model):
    source, target = random_ids()
    mask = padding_mask(source)
    encoder_output = tiny_model.encode(source, mask)
    full = tiny_model.decode(encoder_output, mask, target, causal_mask(7))
    caches = tiny_model.new_caches(capacity=7)
    for t in range(4):
        tiny_model.decode(encoder_output, mask, target[:, t : t + 1], None, caches)
    rows = torch.tensor([2, 0])
    for layer in caches:
        layer.self_attention.select(rows)
        layer.cross_attention.select(rows)
    step = tiny_model.decode(encoder_output[rows], mask[rows], target[rows, 4:5], None, caches)
    assert torch.allclose(full[rows, 4:5], step, atol=1e-5)


def test_position_encodings_are_the_sines_and_cosines_of_the_paper():
    pe = PositionalEncoding(d_model=8, seq_len=20, dropout=0.0).pe
    for position, i in [(0, 0), (3, 0), (7, 2), (19, 3)]:
        angle = position / 10_000 ** (2 * i / 8)
        assert pe[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
        assert pe[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_a_sentence_longer_than_the_position_encodings_is_rejected(tiny_model):
    source, target = random_ids(S=41)
    with pytest.raises(ValueError, match="41 tokens exceed the 40 positions"):
        logits(tiny_model, source, target)


@pytest.mark.parametrize("share", ["none", "target", "all"])
def test_tied_embeddings_are_the_same_parameter(share):
    model = build_transformer(50, 50, 10, 10, d_model=16, N=1, h=2, share_embeddings=share)
    source, target, projection = (
        model.src_embed.embedding.weight,
        model.tgt_embed.embedding.weight,
        model.projection_layer.proj.weight,
    )
    assert (target is projection) == (share in ("target", "all"))
    assert (source is target) == (share == "all")


def test_sizes_that_do_not_fit_are_rejected():
    with pytest.raises(ValueError, match="one vocabulary, not 50 and 60"):
        build_transformer(50, 60, 10, 10, d_model=16, N=1, h=2, share_embeddings="all")
    with pytest.raises(ValueError, match="not divisible by the 3 heads"):
        build_transformer(50, 50, 10, 10, d_model=16, N=1, h=3)


def test_each_dropout_setting_reaches_its_layers():
    config = get_config("toy", dropout=0.1, attention_dropout=0.2, feed_forward_dropout=0.3)
    for name, module in get_model(config, 50, 60).named_modules():
        if isinstance(module, Dropout):
            expected = 0.2 if "attention_block" in name else 0.3 if "feed_forward_block" in name else 0.1
            assert module.p == expected, name


def test_matrices_are_initialized_xavier_uniform():
    model = build_transformer(50, 50, 10, 10, d_model=64, N=1, h=2)
    weight = model.encoder.layers[0].feed_forward_block.linear_1.weight
    bound = math.sqrt(6 / (weight.size(0) + weight.size(1)))
    assert 0.95 * bound < weight.abs().max() <= bound


def torch_layer_weights(block: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a block under the names of PyTorch's TransformerEncoderLayer or TransformerDecoderLayer."""
    D = block.self_attention_block.w_q.in_features
    attentions = {"self_attn": block.self_attention_block}
    if hasattr(block, "cross_attention_block"):
        attentions["multihead_attn"] = block.cross_attention_block
    weights = {}
    for name, attention in attentions.items():
        weights[f"{name}.in_proj_weight"] = torch.cat([w.weight for w in (attention.w_q, attention.w_k, attention.w_v)])
        weights[f"{name}.out_proj.weight"] = attention.w_o.weight
        weights |= {f"{name}.in_proj_bias": torch.zeros(3 * D), f"{name}.out_proj.bias": torch.zeros(D)}
    for i, residual in enumerate(block.residual_connections, start=1):
        weights |= {f"norm{i}.{name}": w for name, w in residual.norm.state_dict().items()}
    for i, linear in enumerate((block.feed_forward_block.linear_1, block.feed_forward_block.linear_2), start=1):
        weights |= {f"linear{i}.{name}": w for name, w in linear.state_dict().items()}
    return weights


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_encoder_and_decoder_equal_those_of_pytorch_with_the_same_weights(norm):
    torch.manual_seed(0)
    model = build_transformer(50, 50, 20, 20, d_model=32, N=2, h=4, d_ff=64, norm=norm).eval()
    for name, parameter in model.named_parameters():
        if ".norm." in name:
            nn.init.normal_(parameter, mean=1.0)  # otherwise a LayerNorm in the wrong place might not matter
    sizes = {"d_model": 32, "nhead": 4, "dim_feedforward": 64, "norm_first": norm == "pre", "batch_first": True}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**sizes), 2, model.encoder.norm, False).eval()
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes), 2, model.decoder.norm).eval()
    for theirs, ours in ((encoder, model.encoder), (decoder, model.decoder)):
        for layer, block in zip(theirs.layers, ours.layers, strict=True):
            layer.load_state_dict(torch_layer_weights(block))
    x, y = torch.randn(2, 9, 32), torch.randn(2, 7, 32)
    ids = torch.full((2, 9), 4)
    ids[1, 5:] = PAD
    expected = decoder(
        y, encoder(x, src_key_padding_mask=ids == PAD), ~causal_mask(7)[0], memory_key_padding_mask=ids == PAD
    )
    mask = padding_mask(ids)
    assert torch.allclose(model.decoder(y, model.encoder(x, mask), mask, causal_mask(7)), expected, atol=1e-5)


def test_weights_have_the_names_of_the_tutorial():
    names = set(build_transformer(50, 50, 10, 10, d_model=16, N=1, h=2).state_dict())
    for name in [
        "src_embed.embedding.weight",
        "encoder.layers.0.self_attention_block.w_q.weight",
        "decoder.layers.0.cross_attention_block.w_o.weight",
        "decoder.layers.0.feed_forward_block.linear_1.weight",
        "decoder.layers.0.residual_connections.2.norm.weight",
        "projection_layer.proj.weight",
    ]:
        assert name in names
