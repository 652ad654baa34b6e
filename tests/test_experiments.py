"""Interventions, variants and experiments.py."""

import math
import subprocess
import sys
from contextlib import ExitStack
from functools import partial

import altair as alt
import pandas as pd
import pytest
import torch
from conftest import ROOT

import experiments as e
from config import InputError
from corpora.sources import load_split
from dataset import PAD, padding_mask
from interpret import charts, interventions, page, text
from interpret.interventions import VARIANTS, head_off, intervene, zero
from interpret.study import STUDY
from interpret.trace import KINDS, record_trace
from model import build_transformer, causal_mask
from translate import Translator

SENTENCE = "I can eat an apple."


@pytest.fixture(scope="module")
def translator(trained_run) -> Translator:
    return Translator.load(trained_run, "cpu")


def scores(B: int = 2, H: int = 3, Q: int = 5, K: int = 5, causal: bool = True) -> torch.Tensor:
    """Softmax scores of two sentences, the second with one key of padding."""
    torch.manual_seed(0)
    mask = torch.ones(B, 1, Q, K, dtype=torch.bool)
    mask[1, :, :, -1] = False
    if causal:
        mask = mask & causal_mask(K)
    return torch.randn(B, H, Q, K).masked_fill(~mask, -math.inf).softmax(-1)


CHANGES = [
    interventions.identity,
    interventions.uniform,
    partial(interventions.first_keys, n=2),
    partial(interventions.last_keys, n=2),
    interventions.shuffled,
    partial(interventions.fixed_pattern, weights=torch.rand(3, 9)),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_rows_sum_to_one_and_masked_keys_stay_zero(change, causal):
    before = scores(causal=causal)
    after = change(before)
    assert torch.allclose(after.sum(-1), torch.ones(()), atol=1e-5)
    assert (after[before == 0] == 0).all()


def test_each_change_has_its_formula():
    before = scores()
    assert torch.allclose(interventions.uniform(before)[0, 0, 3], torch.tensor([0.25, 0.25, 0.25, 0.25, 0]))
    assert (interventions.first_keys(before, 2)[..., 2:] == 0).all()
    last = interventions.last_keys(before, 2)
    assert (last[0, 0, 4] > 0).tolist() == [False, False, False, True, True]
    assert (last[1, 0, 4] > 0).tolist() == [False, False, True, True, False]  # the last key is padding
    shuffled = interventions.shuffled(before)
    assert torch.allclose(shuffled.sort(-1).values, before.sort(-1).values)
    assert not torch.allclose(shuffled, before)
    head = torch.eye(4)[[1, 1, 0]]  # argmax of the rows: 1, 1, 0; further rows repeat the last
    assert interventions.fixed_pattern(scores(causal=False), head)[0, 0].argmax(-1).tolist() == [1, 1, 0, 0, 0]
    assert not zero(before).any()


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_sublayers_switched_off_leave_the_formulas_of_pre_norm_and_post_norm(norm):
    torch.manual_seed(0)
    model = build_transformer(50, 60, 40, 40, d_model=32, N=2, h=4, d_ff=64, norm=norm).eval()
    for name, parameter in model.named_parameters():
        if ".norm." in name:
            torch.nn.init.normal_(parameter, mean=1.0)
    x, mask = torch.randn(1, 6, 32), torch.ones(1, 1, 1, 6, dtype=torch.bool)
    by_name = {variant.name: variant for variant in VARIANTS}
    with torch.inference_mode():
        expected = x
        for block in model.encoder.layers:
            for residual in block.residual_connections:
                expected = expected if norm == "pre" else residual.norm(expected)
        with by_name["encoder: only the residual path"].apply(model):
            assert torch.allclose(model.encoder(x, mask), model.encoder.norm(expected), atol=1e-6)
        expected = x
        for block in model.encoder.layers:
            attend, (first, second) = block.self_attention_block, block.residual_connections
            y = first.norm(expected) if norm == "pre" else expected
            y = attend(y, y, y, mask)
            expected = y if norm == "pre" else second.norm(first.norm(y))
        with by_name["encoder: only self-attention"].apply(model):
            assert torch.allclose(model.encoder(x, mask), model.encoder.norm(expected), atol=1e-6)


def outputs(translator: Translator) -> torch.Tensor:
    source = torch.tensor([translator.encode(SENTENCE), [*translator.encode("She sleeps."), PAD, PAD, PAD]])
    target = torch.tensor([[2, 10, 11, 12], [2, 20, 21, 22]])
    with torch.inference_mode():
        return translator.model(source, target, padding_mask(source), causal_mask(4))


@pytest.mark.slow
def test_identity_intervention_gives_bit_identical_output(translator):
    """Compared with the explicit attention used for recording; the fused kernel rounds differently."""
    with translator.model.recording():
        plain = outputs(translator)
    with ExitStack() as stack:
        for kind in KINDS:
            stack.enter_context(intervene(translator.model, interventions.identity, kind))
        assert torch.equal(plain, outputs(translator))
    assert torch.allclose(plain, outputs(translator), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*VARIANTS, head_off("cross", 1, 2)], ids=lambda v: v.name)
def test_variant_changes_the_output_and_restores_the_model(translator, variant):
    plain = outputs(translator)
    weights = {name: w.clone() for name, w in translator.model.state_dict().items()}
    with variant.apply(translator.model):
        assert not torch.equal(plain, outputs(translator))
    assert torch.equal(plain, outputs(translator))
    assert all(torch.equal(w, weights[name]) for name, w in translator.model.state_dict().items())
    blocks = [block for kind in translator.model.attention_blocks().values() for block in kind]
    assert all(block.intervene is None for block in blocks)
    assert not any(module._forward_hooks for module in translator.model.modules())
    assert variant.description.endswith((".", "/n."))


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*VARIANTS, *STUDY], ids=lambda variant: variant.name)
def test_a_variant_translates_a_sentence_alone_and_in_a_batch_alike(variant):
    translator = Translator.load(ROOT / "pretrained" / "toy.en-de", "cpu")
    sources = ["We sleep.", "My sister must not drink the old wine with her friends.", SENTENCE]
    with variant.apply(translator.model):
        for beam_size in (1, 2):
            alone = [translator.translate([source], beam_size, use_cache=False)[0] for source in sources]
            assert translator.translate(sources, beam_size, use_cache=False) == alone


def test_sentences_of_a_split_that_are_too_long_count_as_blank(run_with_odd_pairs, capsys):
    e.main("I sleep.", run_dir=str(run_with_odd_pairs), split="validation", device="cpu")
    assert "line 3 is left blank" in capsys.readouterr().err


def test_model_is_restored_after_an_error(translator):
    plain = outputs(translator)
    with pytest.raises(RuntimeError), interventions.without_sublayers(translator.model, "decoder", ["cross_attention"]):
        raise RuntimeError
    assert torch.equal(plain, outputs(translator))


@pytest.mark.slow
def test_interventions_can_be_nested(translator):
    """The inner one gets the result of the outer one; interventions on two heads both take effect."""
    model, seen = translator.model, []
    with (
        intervene(model, zero, "cross", [0], [1]),
        intervene(model, lambda s: seen.append(s) or s, "cross", [0]),
    ):
        outputs(translator)
    assert not seen[0][:, 1].any()
    assert seen[0][:, 0].any()
    with (
        intervene(model, zero, "cross", [0], [1]),
        intervene(model, zero, "cross", [0], [2]),
    ):
        both = outputs(translator)
    with intervene(model, zero, "cross", [0], [1, 2]):
        assert torch.equal(both, outputs(translator))


@pytest.mark.slow
def test_variants_follow_their_formulas(translator):
    model = translator.model
    source = torch.tensor([translator.encode(SENTENCE)])
    mask, target = padding_mask(source), torch.tensor([[2, 10, 11]])
    with torch.inference_mode():
        encoder_output = model.encode(source, mask)
        by_name = {variant.name: variant for variant in VARIANTS}
        with by_name["encoder: only the residual path"].apply(model):
            bare = model.encoder.norm(model.src_pos(model.src_embed(source)))
            assert torch.allclose(model.encode(source, mask), bare, atol=1e-6)
        with by_name["decoder: source copied"].apply(model):
            assert torch.equal(model.decode(encoder_output, mask, target, causal_mask(3)), encoder_output[:, :3])
        with by_name["encoder: no positions"].apply(model):
            order = torch.tensor([0, 3, 1, 2, *range(4, source.size(1))])
            moved = model.encode(source[:, order], mask)
            assert torch.allclose(moved, model.encode(source, mask)[:, order], atol=1e-5)  # order no longer matters
        with by_name["decoder: no cross-attention"].apply(model):
            one, other = (model.decode(x, mask, target, causal_mask(3)) for x in (encoder_output, encoder_output * 0))
            assert torch.equal(one, other)


@pytest.mark.slow
def test_decoding_without_cache_equals_decoding_with_cache(translator):
    sentences = list(load_split(translator.config, "validation")["src"][:40])
    assert translator.translate(sentences, use_cache=False) == translator.translate(sentences)


@pytest.mark.slow
def test_invalid_layers_heads_orders_and_words_are_rejected(translator):
    with (
        pytest.raises(InputError, match="no layer 7"),
        intervene(translator.model, zero, "cross", [7]),
    ):
        pass
    with (
        pytest.raises(InputError, match="no head 9"),
        intervene(translator.model, zero, "cross", [0], [9]),
    ):
        pass
    with pytest.raises(InputError, match="each of the 5 words"):
        e.reordered(SENTENCE, [0, 1, 2])
    with pytest.raises(InputError, match="'Quark'"):
        e.step_table(translator, SENTENCE, ["Quark"])


@pytest.mark.slow
def test_compare_lists_the_baseline_and_all_variants(translator):
    table = e.compare(translator, SENTENCE)
    assert table["variant"].tolist() == ["baseline", *(variant.name for variant in VARIANTS)]
    ids = translator.search([translator.encode(SENTENCE)])[0]
    assert table["translation"][0] == translator.tokenizer_tgt.decode(ids)
    sourceless = table.set_index("variant").loc["decoder: no cross-attention"]
    assert sourceless["change"] < -5
    assert " → " in sourceless["differs"]
    assert e.reordered(SENTENCE, [2, 4, 1, 0, 3]) == "eat apple. can I an"


@pytest.mark.slow
def test_measure_and_head_importance_on_a_split(translator):
    pairs = load_split(translator.config, "validation").select(range(30))
    table = e.measure(translator, list(pairs["src"]), list(pairs["tgt"])).set_index("variant")
    assert table.loc["baseline", "bleu"] > 50
    assert table.loc["decoder: no cross-attention", "bleu"] < 10
    importance = e.head_importance(translator, list(pairs["src"]), list(pairs["tgt"]))
    assert len(importance) == 3 * 2 * 8
    assert importance["bleu_drop"].max() > 0


@pytest.mark.slow
def test_step_table_holds_the_logits_of_the_model(translator):
    table = e.step_table(translator, SENTENCE)
    ids = translator.search([translator.encode(SENTENCE)])[0]
    assert table[table["chosen"]]["word"].tolist() == [*(translator.tokenizer_tgt.id_to_token(i) for i in ids), "[EOS]"]
    assert table.groupby("step")["logit"].max().tolist() == table[table["chosen"]]["logit"].tolist()
    assert table["label"][0].startswith("1) [SOS] → ")
    assert f"[{table['logit'][0]:.2f}]" in text.step_table_text(table)
    total = sum(math.log(p) for p in table[table["chosen"]]["probability"])
    assert total == pytest.approx(e.log_probability(translator, SENTENCE, ids), abs=1e-3)


@pytest.mark.slow
def test_charts_of_experiments_are_drawn(translator, tmp_path):
    steps, table = e.step_table(translator, SENTENCE), e.compare(translator, SENTENCE, VARIANTS[:3])
    before = record_trace(translator, SENTENCE)
    after = e.trace_variant(translator, SENTENCE, table["translation"][0], VARIANTS[0])
    importance = pd.DataFrame({"kind": "cross", "layer": [0, 0], "head": [0, 1], "bleu_drop": [0.5, 1.5]})
    drawn: list[alt.TopLevelMixin] = [
        charts.step_heat_map(steps, before),
        charts.step_heat_map(steps, before, "probability"),
        charts.variant_bars(table),
        charts.difference(before, after, "encoder", 0, 0),
        charts.importance_heat_map(importance),
    ]
    for i, chart in enumerate(drawn):
        charts.save_picture(chart, tmp_path / f"{i}.png")
    corrupted = e.trace_variant(translator, SENTENCE, table["translation"][0], interventions.UNIFORM_CROSS)
    page.save_report(tmp_path / "report.html", SENTENCE, before, corrupted, steps, table, importance)
    assert table["translation"][0] in (tmp_path / "report.html").read_text(encoding="utf8")
    with pytest.raises(ValueError, match="different tokens"):
        charts.difference(before, record_trace(translator, "She sleeps."), "encoder", 0, 0)


@pytest.mark.slow
def test_command_line(trained_run, tmp_path):
    command = [sys.executable, str(ROOT / "experiments.py"), "--run-dir", str(trained_run)]
    outputs = ["--csv", "t.csv", "--html", "t.html", "--heads", "--split", "test", "--sentences", "10"]
    done = subprocess.run([*command, SENTENCE, *outputs], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "decoder: no cross-attention" in done.stdout
    assert len(pd.read_csv(tmp_path / "t.csv")) == 1 + len(VARIANTS)
    assert len(pd.read_csv(tmp_path / "t.heads.csv")) == 48
    assert (tmp_path / "t.html").stat().st_size < 2e6
    for bad in ([], [SENTENCE, "--html", "no/x.html"], [SENTENCE, "--split", "training"]):
        done = subprocess.run([*command, *bad], capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


@pytest.mark.slow
def test_a_translation_that_reaches_the_length_limit_can_be_compared(translator, monkeypatch):
    endless = [5] * translator.config.seq_len
    monkeypatch.setattr(translator, "search", lambda sources, **_: [endless])
    assert len(e.compare(translator, SENTENCE, VARIANTS[:1])) == 2
    steps = e.step_table(translator, SENTENCE)
    assert steps["chosen"].sum() == len(endless)
    assert record_trace(translator, SENTENCE).next_tokens[-1] == steps[steps["chosen"]]["word"].iloc[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoder: source copied", "decoder: shuffled"])
def test_step_table_and_trace_within_a_variant_show_the_translation_of_that_variant(translator, name):
    (variant,) = [variant for variant in VARIANTS if variant.name == name]
    translation = e.compare(translator, SENTENCE, [variant])["translation"][1]
    with variant.apply(translator.model):
        steps, trace = e.step_table(translator, SENTENCE), record_trace(translator, SENTENCE)
    written = steps[steps["chosen"]]["word"].tolist()[:-1]
    for tokens in (written, trace.tgt_tokens[1:]):
        ids = [translator.tokenizer_tgt.token_to_id(token) for token in tokens]
        assert translator.tokenizer_tgt.decode(ids) == translation
