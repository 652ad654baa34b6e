"""The live explorer without the browser: its state, what it computes, and the tables of its charts."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import altair as alt
import numpy as np
import pytest
import torch
import vl_convert
from conftest import ROOT

from config import InputError
from dataset import EOS, SOS
from interpret import stage_charts
from interpret.interventions import VARIANTS, head_off
from interpret.live import (
    Comparison,
    Forced,
    beam_tree,
    changed,
    changed_tokens,
    compare_scenes,
    gradient_times_input,
    inside_head,
    mixed_heads,
    translate_scene,
)
from interpret.stage import MODES, PANELS, Stage
from interpret.stage_view import LoadedRun, View
from interpret.theme import LIGHT
from interpret.trace import KINDS
from interpret.trace import recorded_pass as pass_with_gradients
from search import beam_search, greedy_decode, length_normalizer
from translate import Translator

recorded_pass = torch.inference_mode()(pass_with_gradients)
SENTENCE = "I can eat an apple."
SHAPES = dict.fromkeys(KINDS, (2, 4))

# ---------------------------------------------------------------------------- state


def test_a_link_restores_every_field():
    stage = Stage(
        run="weights/a ~&=<b>", weights="3", sentence="Is <i>it</i> ~ 100%?", beam=4, prefix=(7, 12), kind="decoder",
        heads=("0.1", "1.3"), row=2, off=("cross.1.0", "encoder.0.2"), changes=("cross: uniform", "no positions"),
        mode=MODES[2], panel=PANELS[1],
    )  # fmt: skip
    assert Stage.from_query(stage.to_query()) == stage
    assert Stage.from_query(replace(stage, heads=()).to_query()) == replace(stage, heads=())
    assert Stage().to_query() == {}


def test_what_a_link_says_wrongly_stays_at_its_default():
    query = {"kind": "all", "row": "-1", "heads": "1.1~x~1", "off": "cross.1~all.0.0", "beam": "3000", "panel": "",
             "changes": "everything~cross: uniform", "prefix": "a~1", "run_dir": "/", "mode": "<script>"}  # fmt: skip
    assert Stage.from_query(query) == Stage(heads=("1.1",), changes=("cross: uniform",), prefix=(1,))


def test_a_click_on_a_head_shows_combines_or_switches_off():
    stage = Stage(heads=("1.0",))
    assert stage.clicked("head 0.2").heads == ("0.2",)
    both = replace(stage, mode="combine").clicked("head 0.2")
    assert both.heads == ("1.0", "0.2")
    assert both.clicked("head 1.0").heads == ("0.2",)
    off = replace(stage, mode="switch off").clicked("head 0.2")
    assert (off.off, off.heads) == (("cross.0.2",), ("1.0",))
    assert off.clicked("head 0.2").off == ()


def test_clicks_select_rows_and_tokens_and_nothing_else():
    assert Stage().clicked("row 3").row == 3
    assert Stage().clicked("prefix 5 9").prefix == (5, 9)
    for command in ("", "row x", "row -1", "head 1", "run /tmp", "None"):
        assert Stage().clicked(command) == Stage()


def test_another_sentence_drops_the_chosen_tokens():
    stage = Stage(prefix=(5, 9), row=4, off=("cross.1.0",))
    assert stage.with_sentence(stage.sentence) is stage
    other = stage.with_sentence("We sleep.")
    assert (other.prefix, other.row, other.off) == ((), 1, ("cross.1.0",))


def test_heads_that_the_model_lacks_are_left_out():
    stage = Stage(heads=("0.1", "5.0"), off=("cross.1.3", "cross.0.9"), changes=("cross: uniform",))
    assert stage.picked((2, 4)) == [(0, 1)]
    assert [v.name for v in stage.variants(SHAPES)] == ["cross 1.3 off", "cross: uniform"]


# ---------------------------------------------------------------------------- tables of the charts

KEYS, QUERIES = ["[SOS]", "an", "apple", "[EOS]"], [("[SOS]", "una"), ("una", "mela"), ("mela", "[EOS]")]
WEIGHTS = np.array([[0.1, 0.7, 0.2, 0.0], [0.0, 0.05, 0.95, 0.0], [0.25, 0.25, 0.25, 0.25]], dtype=np.float32)


def test_ribbons_have_the_weights_and_hide_later_rows():
    links, tokens = stage_charts.ribbon_tables(WEIGHTS, KEYS, QUERIES, row=1, last=1)
    for link in links.itertuples():
        assert link.weight == WEIGHTS[link.row, link.column]
    assert np.allclose(links.groupby("row")["weight"].sum(), 1)
    assert (links.loc[links["row"] == 2, "opacity"] == 0).all()
    queries = tokens[tokens["side"] == "query"]
    assert queries["label"].tolist() == ["una", "mela", "[EOS]"]
    assert queries["note"].tolist() == ["[SOS] →", "una →", "mela →"]
    assert queries["on"].tolist() == [False, True, False]
    assert queries["opacity"].tolist() == [1, 1, 0]
    for _, side in tokens.groupby("side"):
        assert side["x0"].min() >= 0
        assert side["x1"].max() <= 1
        assert all(a < b for a, b in pairwise(side["x"]))


def test_a_heat_map_has_every_weight_that_is_not_masked():
    cells, labels = stage_charts.cell_rows(WEIGHTS, KEYS, QUERIES, row=1, causal=False)
    assert cells["weight"].tolist() == WEIGHTS.ravel().tolist()
    assert cells["number"].tolist()[:4] == ["0.10", "0.70", "0.20", ""]
    assert labels.loc[labels["side"] == "query", "label"].tolist()[1] == "una → mela"
    square = np.tril(np.full((3, 3), 0.5))
    assert len(stage_charts.cell_rows(square, KEYS[:3], QUERIES, 0, causal=True)[0]) == 6


def test_bars_show_four_decimals_and_the_sum():
    rows = stage_charts.bar_rows(WEIGHTS[1], KEYS)
    assert rows["number"].tolist() == ["0.0000", "0.0500", "0.9500", "0.0000", "1.0000"]
    assert rows["position"].tolist() == ["0", "1", "2", "3", ""]


def test_the_gallery_names_the_three_largest_weights_of_each_head():
    weights = np.stack([WEIGHTS, WEIGHTS[::-1]])[None]  # (1, 2, 3, 4)
    roles = {(0, 0): ("aligner", "entropy 0.1 bits")}
    heads = stage_charts.gallery_rows(weights, KEYS, 1, roles, LIGHT.weights, [(0, 0)], {(0, 1)})
    assert heads[["a", "b", "c"]].iloc[0].tolist() == ["0.95 apple", "0.05 an", "0.00 [SOS]"]
    assert heads[["a", "b", "c"]].iloc[1].tolist() == ["", "", ""]  # a head that is off
    assert heads[["role", "on", "off"]].values.tolist() == [["aligner", True, False], ["", False, True]]
    assert heads["image"].str.startswith("data:image/png;base64,").all()


@pytest.mark.parametrize(
    ("chart", "tables", "options"),
    [
        ("ribbons", 2, {}),
        ("candidate_bars", 1, {}),
        ("gallery", 1, {"layers": 2}),
        ("heat_map", 2, {}),
        ("heat_map", 2, {"diverging": True}),
        ("row_bars", 1, {}),
        ("beam_chart", 2, {"beam_size": 3}),
        ("inside_chart", 2, {"keys": 5}),
    ],
)
def test_a_chart_can_be_drawn_before_its_data_are_known(chart, tables, options):
    drawn = getattr(stage_charts, chart)(*(alt.NamedData(f"t{i}") for i in range(tables)), **options)
    drawn.layer[-1] = drawn.layer[-1].add_params(stage_charts.clickable())
    assert vl_convert.vegalite_to_vega(drawn.to_dict())["data"]


def test_changed_tokens_are_new_or_replaced():
    before, after = ["Posso", "mangiare", "una", "mela", "."], ["Posso", "una", "una", "mela", "."]
    assert changed_tokens(before, before) == [False] * 5
    assert changed_tokens(before, after) == [False, True, False, False, False]


# ---------------------------------------------------------------------------- search


class RandomDecoder:
    """A StepDecoder whose logits depend on the last token only; [EOS] becomes more probable with time."""

    def __init__(self, vocabulary: int = 12):
        self.logits, self.t = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(1)), 0

    def step(self, ids):
        self.t += 1
        logits = self.logits[ids].clone()
        logits[:, EOS] += self.t - 3
        return logits

    def select(self, rows, sentences=None):
        pass


@pytest.mark.parametrize("beam_size", [2, 4])
def test_the_tree_of_a_beam_search_leads_to_its_result(beam_size):
    steps = []
    ((best,),) = beam_search(RandomDecoder(), torch.tensor([9]), beam_size, 0.6, watch=steps.append)
    assert beam_search(RandomDecoder(), torch.tensor([9]), beam_size, 0.6) == [[best]]
    tree = beam_tree(steps, best, str, 0.6)
    path = tree[tree["best"]]
    assert path["id"].tolist() == [*best.ids, EOS]
    assert path["log_p"].iloc[-1] == pytest.approx(best.log_probability)
    assert path["score"].iloc[-1] == pytest.approx(best.score)
    assert path["state"].tolist() == ["kept"] * len(best.ids) + ["finished"]
    assert np.allclose(tree["score"], tree["log_p"] / length_normalizer(tree["step"] + 1, 0.6))
    nodes = set(tree["node"])
    for step, group in tree.groupby("step"):
        assert (group["state"] == "kept").sum() == (beam_size if step < tree["step"].max() else 0)
        assert (group["state"] == "finished").sum() <= beam_size
        assert len(group) <= 2 * beam_size
        assert step == 0 or set(group["parent"]) <= nodes


def test_a_forced_beginning_is_kept_by_both_searches():
    prefix = [7, 9]
    (ids,) = greedy_decode(Forced(RandomDecoder(), prefix), torch.tensor([9]))
    assert ids[:2] == prefix
    ((best,),) = beam_search(Forced(RandomDecoder(), prefix), torch.tensor([9]), 3)
    assert best.ids[:2] == prefix
    assert math.isfinite(best.score)
    (ids,) = greedy_decode(Forced(RandomDecoder(), [7, EOS]), torch.tensor([9]))
    assert ids == [7]


# ---------------------------------------------------------------------------- a trained run


@pytest.fixture(scope="module")
def translator(trained_run) -> Translator:
    return Translator.load(trained_run, "cpu")


@pytest.fixture(scope="module")
def run(trained_run) -> LoadedRun:
    return LoadedRun.load(str(trained_run), "best")


@pytest.mark.slow
@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_scene_is_the_translation_of_the_run(translator, beam_size):
    scene = translate_scene(translator, SENTENCE, beam_size)
    assert scene.text == translator.translate([SENTENCE], beam_size, use_cache=False)[0]
    logits, weights = recorded_pass(translator, translator.encode(SENTENCE), [SOS, *scene.ids])
    expected = logits.log_softmax(-1)[range(len(scene.ids) + 1), [*scene.ids, EOS]]
    assert np.abs(scene.log_p - expected.numpy()).max() < 5e-4
    for kind in KINDS:
        assert np.abs(scene.trace.weights[kind] - weights[kind]).max() < 5e-4
    assert (scene.tree is None) == (beam_size == 1)


@pytest.mark.slow
def test_decoding_continues_from_another_candidate(translator):
    baseline = translate_scene(translator, SENTENCE)
    token, _ = baseline.trace.candidates[1][1]
    prefix = [baseline.ids[0], translator.tokenizer_tgt.token_to_id(token)]
    scene = translate_scene(translator, SENTENCE, prefix=prefix)
    assert scene.ids[:2] == prefix
    rest = [step[0][0] for step in scene.trace.candidates[2:]]  # each later token is the most probable one
    assert rest == scene.trace.next_tokens[2:]
    for bad in ("", " "):
        with pytest.raises(InputError, match="empty"):
            translate_scene(translator, bad)
    with pytest.raises(InputError, match="no token 99999"):
        translate_scene(translator, SENTENCE, prefix=[99_999])


@pytest.mark.slow
@pytest.mark.parametrize("beam_size", [1, 3])
def test_at_the_length_limit_no_end_is_invented(translator, monkeypatch, beam_size):
    decoder_and_limits = translator.decoder_and_limits
    monkeypatch.setattr(
        translator, "decoder_and_limits", lambda *a, **k: (decoder_and_limits(*a, **k)[0], torch.tensor([3]))
    )
    scene = translate_scene(translator, SENTENCE, beam_size)
    tokens = [translator.tokenizer_tgt.id_to_token(i) for i in scene.ids]
    assert scene.trace.next_tokens == scene.pieces.next_pieces == tokens
    assert len(tokens) == len(scene.log_p) == len(scene.trace.tgt_tokens) == 3
    table = inside_head(translator, scene, SENTENCE, "decoder", 1, 0, 2)
    assert np.abs(table["weight"] - scene.pieces.weights["decoder"][1, 0, 2]).max() < 5e-4
    assert len(gradient_times_input(translator, scene, SENTENCE, 2)[1]) == 3
    assert compare_scenes(translator, SENTENCE, scene, [], beam_size).change == 0


@pytest.mark.slow
def test_a_comparison_changes_the_model_only_while_it_computes(translator):
    baseline = translate_scene(translator, SENTENCE)
    changes = [head_off("cross", 1, 0), next(v for v in VARIANTS if v.name == "cross: uniform")]
    compared = compare_scenes(translator, SENTENCE, baseline, changes)
    assert compared.change < -1
    assert compared.forced.tgt_tokens == baseline.trace.tgt_tokens
    uniform = compared.forced.weights["cross"][0]
    assert np.allclose(uniform, 1 / uniform.shape[-1], atol=1e-6)
    assert translate_scene(translator, SENTENCE).ids == baseline.ids
    assert np.allclose(translate_scene(translator, SENTENCE).log_p, baseline.log_p)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_the_softmax_of_the_products(translator, kind):
    scene = translate_scene(translator, SENTENCE)
    table = inside_head(translator, scene, SENTENCE, kind, 1, 2, 3)
    assert len(table) == (4 if kind == "decoder" else len(scene.trace.labels(kind)[1]))
    weight = np.exp(table["product"]) / np.exp(table["product"]).sum()
    assert np.abs(weight - table["weight"]).max() < 1e-4
    assert np.abs(table["weight"] - scene.trace.weights[kind][1, 2, 3][: len(table)]).max() < 1e-6


@pytest.mark.slow
def test_a_contribution_is_the_norm_of_what_the_head_adds(translator):
    """Tried where there is one key: in the first row of the decoder."""
    scene = translate_scene(translator, SENTENCE)
    block = translator.model.attention_blocks()["decoder"][0]
    added = []
    handle = block.w_o.register_forward_hook(lambda m, inputs, output: added.append(inputs[0][0, 0].detach()))
    recorded_pass(translator, translator.encode(SENTENCE), [SOS])
    handle.remove()
    for head in range(block.h):
        table = inside_head(translator, scene, SENTENCE, "decoder", 0, head, 0)
        part = slice(head * block.d_k, (head + 1) * block.d_k)
        norm = (block.w_o.weight.detach()[:, part] @ added[0][part]).norm().item()
        assert table["contribution"].tolist() == pytest.approx([norm], abs=1e-4)


@pytest.mark.slow
def test_gradient_times_input_is_the_slope_when_an_embedding_grows(translator):
    scene, step, eps = translate_scene(translator, SENTENCE), 2, 1e-2
    source, target = gradient_times_input(translator, scene, SENTENCE, step)
    assert (len(source), len(target)) == (len(scene.pieces.src_tokens), len(scene.ids) + 1)
    assert np.abs(target[step + 1 :]).max() == 0  # later tokens are masked

    def log_p(scale: float, position: int) -> float:
        def grow(module, inputs, output):
            output = output.clone()
            output[0, position] *= scale
            return output

        handle = translator.model.src_embed.register_forward_hook(grow)
        logits, _ = recorded_pass(translator, translator.encode(SENTENCE), [SOS, *scene.ids])
        handle.remove()
        return logits.double().log_softmax(-1)[step, scene.ids[step]].item()

    for position in (1, 3):
        slope = (log_p(1 + eps, position) - log_p(1 - eps, position)) / (2 * eps)
        assert source[position] == pytest.approx(slope, abs=0.02 + 0.05 * abs(slope))


@pytest.mark.slow
def test_a_view_saves_what_it_shows(run):
    stage = Stage(run="r", sentence=SENTENCE, heads=("1.0", "0.3"), row=2, off=("cross.1.0",))
    baseline = translate_scene(run.translator, SENTENCE)
    view = View(
        stage, run, baseline, compare_scenes(run.translator, SENTENCE, baseline, stage.variants(run.shapes)), LIGHT
    )
    saved = json.loads(view.to_json())
    with changed(run.translator.model, stage.variants(run.shapes)):
        _, weights = recorded_pass(run.translator, run.translator.encode(SENTENCE), [SOS, *view.scene.ids])
    mean = mixed_heads(weights["cross"], [(1, 0), (0, 3)])
    assert np.abs(np.array(saved["weights"]) - mean).max() < 5e-4
    assert np.allclose(saved["row_sums"], 0.5, atol=1e-3)  # one of the two heads is off
    assert view.heads_name == "Mean of heads 1.0 (off), 0.3"
    assert view.to_png().startswith(b"\x89PNG")
    assert view.to_svg().startswith("<svg")
    assert "<html" in view.to_html()
    L, H = run.shapes["cross"]
    assert view.to_csv().count("\ncross,") == L * H * len(view.keys) * len(view.queries)


@pytest.mark.slow
def test_masked_keys_are_not_listed(run):
    view = View(Stage(run="r", kind="decoder", row=0), run, translate_scene(run.translator, SENTENCE), None, LIGHT)
    heads = view.gallery_tables()["heads"]
    assert set(heads["a"]) == {"1.00 [SOS]"}
    assert set(heads["b"]) == {""}


@pytest.mark.slow
def test_the_map_of_a_longer_baseline_frames_the_clicked_row(run):
    baseline, variant = (translate_scene(run.translator, text) for text in (SENTENCE, "We sleep."))
    compared = Comparison(baseline, variant, baseline.trace, 0.0)
    view = View(Stage(run="r", sentence=SENTENCE, row=5), run, baseline, compared, LIGHT)
    assert view.row < 5
    cells = view.map_tables(view.weights(baseline.trace), baseline.trace)["cells"]
    assert set(cells.loc[cells["on"], "row"]) == {5}


@pytest.mark.slow
def test_test_pairs_that_the_run_cannot_read_are_left_out(trained_run, monkeypatch):
    monkeypatch.setattr(Translator, "fits", lambda self, source, target="": len(source.split()) < 5)
    assert all(len(text.split()) < 5 for text in LoadedRun.load(str(trained_run), "best").examples)


@pytest.mark.slow
def test_a_loaded_run_knows_what_its_heads_do(run):
    assert set(run.heads["role"]) <= {
        "aligner",
        "previous",
        "itself",
        "[SOS]",
        "[EOS]",
        "punctuation",
        "spread",
        "near",
        "mixed",
    }
    best = run.heads.loc[run.heads["error"].idxmin()]
    assert run.best_head() == f"{best['layer']}.{best['head']}"
    assert len(run.examples) == 12
    with pytest.raises(InputError):
        LoadedRun.load(str(run.translator.folder) + "x", "best")


def test_a_run_is_judged_by_pairs_that_are_neither_blank_nor_too_long(run_with_odd_pairs):
    assert LoadedRun.load(str(run_with_odd_pairs), "best").examples == ["I sleep."]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_gradient_times_input_is_0_where_a_changed_model_does_not_look(variant):
    translator = Translator.load(ROOT / "pretrained" / "toy.en-it", "cpu")
    with changed(translator.model, [variant]):
        scene = translate_scene(translator, SENTENCE, 3)
        source, target = gradient_times_input(translator, scene, SENTENCE, 0)
    if variant.name == "decoder: no cross-attention":
        assert not source.any()
        assert target.any()
    if variant.name == "decoder: source copied":
        assert source.any()
        assert not target.any()
