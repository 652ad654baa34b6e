"""Traces, measures, text views, charts, the page and visualize.py."""

import base64
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import altair as alt
import numpy as np
import pytest
import torch
import vl_convert
from conftest import ROOT
from PIL import Image

from config import InputError, get_config
from corpora.toy import toy_pairs
from dataset import SOS, build_bpe_tokenizer, padding_mask
from interpret import charts, measures, page, text
from interpret.measures import attention_mask
from interpret.theme import PALETTES
from interpret.trace import KINDS, AttentionTrace, merge_bytes, merge_words, record_trace, word_indices
from model import build_transformer, causal_mask
from translate import Translator

SENTENCE = "Today my friend does not want to buy two old books."


@pytest.fixture(scope="module")
def translator(trained_run) -> Translator:
    return Translator.load(trained_run, "cpu")


@pytest.fixture(scope="module")
def traced(translator) -> AttentionTrace:
    return record_trace(translator, SENTENCE)


def random_trace(L: int = 2, H: int = 3, S: int = 7, T: int = 5, decoder_L: int | None = None) -> AttentionTrace:
    """A trace of random weights in which every token occurs twice."""
    rng, weights = np.random.default_rng(0), {}
    sizes = {"encoder": (L, S, S), "decoder": (decoder_L or L, T, T), "cross": (decoder_L or L, T, S)}
    for kind, (layers, Q, K) in sizes.items():
        scores = np.exp(3 * rng.normal(size=(layers, H, Q, K))) * attention_mask(kind, Q, K)
        weights[kind] = (scores / scores.sum(-1, keepdims=True)).astype(np.float32)
    src = ["[SOS]", *(f"s{i // 2}" for i in range(S - 2)), "[EOS]"]
    tgt = ["[SOS]", *(f"t{i // 2}" for i in range(T - 1))]
    candidates = [[(token, -0.1), ("other", -2.5)] for token in [*tgt[1:], "[EOS]"]]
    following, numbers = [*tgt[1:], "[EOS]"], ([*range(S)], [*range(T)])
    return AttentionTrace(src, tgt, following, following, *numbers, weights, candidates, "weights/random")


# ---------------------------------------------------------------------------- traces


@pytest.mark.slow
@torch.inference_mode()
def test_trace_holds_the_weights_and_predictions_of_its_tokens(translator, traced):
    source = torch.tensor([translator.encode(SENTENCE)])
    target = torch.tensor([[SOS, *translator.search(source.tolist())[0]]])
    name = translator.tokenizer_tgt.id_to_token
    assert traced.tgt_tokens == [name(i) for i in target[0].tolist()]
    assert traced.next_tokens == [*traced.tgt_tokens[1:], "[EOS]"]
    with translator.model.recording():
        logits = translator.model(source, target, padding_mask(source), causal_mask(target.size(1)))
        for kind, blocks in translator.model.attention_blocks().items():
            for layer, block in enumerate(blocks):
                np.testing.assert_allclose(traced.weights[kind][layer], block.attention_scores[0].numpy(), atol=1e-6)
    best = logits[0].log_softmax(-1).max(-1)
    assert [step[0][0] for step in traced.candidates] == [name(i) for i in best.indices.tolist()]
    np.testing.assert_allclose([step[0][1] for step in traced.candidates], best.values.numpy(), atol=1e-5)
    S, T = source.size(1), target.size(1)
    assert {kind: w.shape[2:] for kind, w in traced.weights.items()} == {
        "encoder": (S, S),
        "decoder": (T, T),
        "cross": (T, S),
    }
    assert measures.check_row_sums(traced) < 1e-5
    assert all(block.attention_scores is None for block in translator.model.attention_blocks()["cross"])


@pytest.mark.slow
def test_given_target_is_traced(translator):
    given = record_trace(translator, "She sleeps.", target="Lavorano.")
    assert given.tgt_tokens == ["[SOS]", "Lavorano", "."]
    assert given.next_tokens == ["Lavorano", ".", "[EOS]"]


@pytest.mark.slow
def test_saved_trace_is_loaded_unchanged(traced, tmp_path):
    traced.save(tmp_path / "trace.npz")
    loaded = AttentionTrace.load(tmp_path / "trace.npz")
    for kind in KINDS:
        np.testing.assert_array_equal(loaded.weights[kind], traced.weights[kind])
    for name in ("src_tokens", "tgt_tokens", "next_tokens", "next_pieces", "src_words", "candidates", "run"):
        assert getattr(loaded, name) == getattr(traced, name)
    with np.load(tmp_path / "trace.npz") as arrays:  # the format of existing files
        assert set(arrays) == {"about", *KINDS}
        about = "src_tokens tgt_tokens next_tokens next_pieces src_words tgt_words candidates run"
        assert set(json.loads(str(arrays["about"]))) == set(about.split())
    content = (tmp_path / "trace.npz").read_bytes()
    for bad in (b"no", b"", content[: len(content) // 2]):
        (tmp_path / "bad.npz").write_bytes(bad)
        with pytest.raises(InputError, match=r"bad\.npz is not a saved trace"):
            AttentionTrace.load(tmp_path / "bad.npz")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sentence", "target", "words"),
    [("  ", None, "empty"), ("I " * 80, None, "82 tokens"), ("I sleep.", "Dormo " * 80, "81 tokens")],
)
def test_empty_and_too_long_sentences_are_rejected(translator, sentence, target, words):
    with pytest.raises(InputError, match=words):
        record_trace(translator, sentence, target)


# ---------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("tokens", "numbers"),
    [
        (["[SOS]", "▁un", "believ", "able", ".", "[EOS]"], [0, 1, 1, 1, 2, 3]),
        (["[SOS]", "▁l", "'", "uomo", "▁a", "[EOS]"], [0, 1, 2, 3, 4, 5]),
        (["[SOS]", "▁", "<0xF0>", "<0x9F>", "▁b", "c"], [0, 1, 1, 1, 2, 2]),
        (["[SOS]", "▁said", "▁", '"', "yes", '"', ".", "▁", "[EOS]"], [0, 1, 2, 2, 3, 4, 5, 6, 7]),
        (["a", "b"], [0, 0]),
        (["[SOS]", "▁हि", "ं", "दी"], [0, 1, 1, 1]),
    ],
)
def test_subwords_are_assigned_to_words(tokens, numbers):
    assert word_indices(tokens, whole_words=False) == numbers
    assert word_indices(tokens, whole_words=True) == list(range(len(tokens)))


@pytest.mark.slow
def test_unknown_words_show_themselves(translator):
    traced = record_trace(translator, "The zebra sleeps.", target="Il gorilla dorme.")
    assert traced.src_tokens == ["[SOS]", "The", "zebra [UNK]", "sleeps", ".", "[EOS]"]
    assert traced.next_tokens == ["Il", "gorilla [UNK]", "dorme", ".", "[EOS]"]
    assert traced.next_pieces[1] == "[UNK]"
    assert traced.row_labels("cross")[1] == "Il → gorilla [UNK]"
    assert traced.row_labels("encoder") == traced.src_tokens


def test_bytes_of_a_character_are_merged():
    trace = random_trace(S=7, T=5)
    source = ["[SOS]", "▁", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "[EOS]"]
    trace = replace(trace, src_tokens=source, tgt_tokens=["[SOS]", "▁caff", "<0xC3>", "<0xA8>", "▁nero"])
    merged = merge_bytes(trace)
    assert merged.src_tokens == ["[SOS]", "▁", "🙂", "[EOS]"]
    assert merged.tgt_tokens == ["[SOS]", "▁caff", "è", "▁nero"]
    assert merged.weights["cross"].shape[2:] == (4, 4)
    summed = trace.weights["cross"][1, 0, 2:4, 2:6].sum(1).mean()
    assert merged.weights["cross"][1, 0, 2, 2] == pytest.approx(summed, abs=1e-6)
    assert measures.check_row_sums(merged) < 1e-5


def test_merged_weights_are_summed_over_keys_and_averaged_over_queries():
    trace = random_trace(S=7, T=5)
    object.__setattr__(trace, "src_words", [0, 1, 1, 2, 3, 3, 4])
    object.__setattr__(trace, "tgt_words", [0, 1, 1, 1, 2])
    merged = merge_words(trace)
    cross = trace.weights["cross"]
    assert merged.weights["cross"].shape[2:] == (3, 5)
    by_hand = cross[1, 2, 1:4][:, 4:6].sum(1).mean()
    assert merged.weights["cross"][1, 2, 1, 3] == pytest.approx(by_hand, abs=1e-6)
    assert measures.check_row_sums(merged) < 1e-5
    assert merged.src_tokens == ["[SOS]", "s0s0", "s1", "s1s2", "[EOS]"]
    assert merged.next_tokens == ["t0t0t1", "t1", "[EOS]"]
    assert merged.candidates == [trace.candidates[i] for i in (0, 3, 4)]
    assert not np.triu(merged.weights["decoder"], 1).any()


# ---------------------------------------------------------------------------- tables and measures


@pytest.mark.parametrize("kind", KINDS)
def test_weights_table_has_queries_as_rows_and_no_masked_cell(kind):
    trace = random_trace()
    table = measures.weights_table(trace, kind)
    rows, columns = trace.labels(kind)
    assert (len(rows), len(columns)) == trace.weights[kind].shape[2:]
    for line in table.sample(30, random_state=0).itertuples():
        assert line.weight == trace.weights[kind][line.layer, line.head, line.row, line.column]
        assert (line.row_token, line.column_token) == (rows[line.row], columns[line.column])
    if kind == "decoder":
        assert (table["column"] <= table["row"]).all()
    sums = table.groupby(["layer", "head", "row"])["weight"].sum()
    assert np.allclose(sums, 1, atol=1e-5)
    with pytest.raises(InputError, match=r"no layer 9 .* layers 0 to 1"):
        measures.weights_table(trace, kind, layers=[9])


def test_packed_table_holds_the_weights_and_the_row_sums():
    trace = random_trace(decoder_L=3)
    for line in measures.packed_table(trace).itertuples():
        weights = trace.weights[line.kind][line.layer, int(line.head)]
        w = np.array(line.w.split(","), dtype=float).reshape(-1, line.columns) / 10_000
        np.testing.assert_allclose(w, weights, atol=5.01e-5)
        np.testing.assert_allclose(np.array(line.sums.split(","), dtype=float), weights.sum(-1), atol=1e-5)


def test_gallery_has_every_head_the_mean_and_rollout_of_each_layer():
    trace = random_trace(decoder_L=3)
    table = measures.gallery_table(trace)
    assert len(table) == (2 + 3 + 3) * (3 + 2)
    assert table.groupby("slot")["head"].unique().str.join("").tolist() == ["0", "1", "2", "mean", "rollout"]
    (mean,) = table.query("kind == 'cross' and layer == 2 and head == 'mean'")["w"]
    expected = trace.weights["cross"][2].mean(0).ravel()
    np.testing.assert_allclose(np.array(mean.split(","), dtype=float) / 10_000, expected, atol=5.01e-5)


def test_description_of_the_weights_quotes_one_of_them():
    trace = random_trace()
    described = text.describe_weights(trace, "cross")
    assert "(2, 3, 5, 7) is 2 layers, 3 heads, 5 queries (rows), 7 keys (columns)" in described
    place, weight = re.search(r"weights\[(.*?)\] = ([\d.]+)", described).groups()
    assert trace.weights["cross"][tuple(map(int, place.split(", ")))] == pytest.approx(float(weight), abs=1e-3)


def test_rows_of_mean_and_rollout_sum_to_one():
    trace = random_trace()
    assert measures.check_row_sums(measures.mean_over_heads(trace)) < 1e-5
    flow = measures.rollout(trace)
    assert measures.check_row_sums(flow) < 1e-5
    first, second = (0.5 * trace.weights["encoder"][i].mean(0) + 0.5 * np.eye(7) for i in (0, 1))
    np.testing.assert_allclose(flow.weights["encoder"][1, 0], second @ first, atol=1e-6)
    assert not np.triu(flow.weights["decoder"], 1).any()


def test_token_lookup_finds_the_largest_weights_in_every_row_of_a_token():
    trace = random_trace()
    table = measures.token_lookup(trace, "cross", "t0")
    assert set(table["row"]) == {1, 2}  # t0 occurs twice
    for (layer, head, row), group in table.groupby(["layer", "head", "row"]):
        expected = np.argsort(-trace.weights["cross"][layer, head, row])[:3]
        assert group["column"].tolist() == expected.tolist()
        assert group["rank"].tolist() == [1, 2, 3]
    with pytest.raises(InputError, match="no token 'x'"):
        measures.token_lookup(trace, "cross", "x")
    with pytest.raises(InputError, match="rows 0 to 4"):
        measures.weights_of_query(trace, "cross", 5)


def test_head_statistics_of_known_patterns():
    trace = random_trace(L=1, H=3, S=6, T=5)
    w = np.zeros((1, 3, 6, 6), dtype=np.float32)
    w[0, 0] = np.eye(6)
    w[0, 1, :, 0] = 1
    w[0, 2] = 1 / 6
    trace.weights["encoder"] = w
    statistics = measures.head_statistics(trace).query("kind == 'encoder'").set_index("head")
    assert statistics.loc[0, ["entropy", "max_weight", "distance", "own_position"]].tolist() == pytest.approx(
        [0, 1, 0, 1], abs=1e-6
    )
    assert statistics.loc[1, ["[SOS]", "[EOS]", "previous_position"]].tolist() == pytest.approx([1, 0, 1 / 6])
    assert statistics.loc[2, "entropy"] == pytest.approx(np.log2(6), abs=1e-4)


@pytest.mark.slow
def test_alignment_error_is_zero_for_gold_heads_and_one_for_heads_on_sos(translator, monkeypatch):
    pairs = toy_pairs("en", "it", "test")[:20]

    def gold(translator, sentence, target):
        trace = record_trace(translator, sentence, target)
        (pair,) = [p for p in pairs if p.src_text == sentence]
        cross = np.full_like(trace.weights["cross"], 1e-6)
        for i, j in sorted(pair.alignment - pair.sure) + sorted(pair.sure):
            cross[0, :, j] = 1e-6
            cross[0, :, j, i + 1] = 1  # the row that predicts word j
        cross[1, :, :, 0] = 1  # [SOS]: no link at all
        trace.weights["cross"] = cross
        return trace

    monkeypatch.setattr(measures, "record_trace", gold)
    table = measures.alignment_errors(translator, pairs).set_index(["layer", "head", "shift"])["error"]
    assert table[0, 0, 1] == table[0, "mean", 1] == 0
    assert table[0, 0, 0] > 0.5
    assert table[1, 0, 1] == 1


# ---------------------------------------------------------------------------- text


@pytest.mark.slow
def test_text_heat_map_shows_every_weight_in_hundredths(traced):
    drawn = text.heat_map_text(traced, "cross", 1, 0, width=400)
    lines, labels = drawn.splitlines()[2:], traced.row_labels("cross")
    margin = max(map(len, labels))
    for line, label, weights in zip(lines, labels, traced.weights["cross"][1, 0], strict=True):
        assert line[:margin].strip() == label
        shown = [int(re.sub(r"\D", "", cell) or 0) for cell in line[margin:].split() if cell]
        numbers = [round(100 * float(w)) for w in weights]
        assert [n for n in shown if n] == [n for n in numbers if n]
    narrow = text.heat_map_text(traced, "decoder", 0, 0, width=60)
    assert max(map(len, narrow.splitlines()[1:])) <= 60


@pytest.mark.parametrize("head", [1, "mean"])
def test_row_as_text_has_position_weight_percentage_bar_and_sum(head):
    trace = random_trace()
    row = trace.weights["cross"][0, 1, 2] if head == 1 else trace.weights["cross"][0].mean(0)[2]
    title, *lines, total = text.row_bars_text(trace, "cross", 0, head, 2).splitlines()
    assert title == f"cross-attention, layer 0, {'head 1' if head == 1 else 'mean over heads'}, row 2: t0 → t1"
    for i, (line, token, weight) in enumerate(zip(lines, trace.src_tokens, row, strict=True)):
        position, name, number, percent, *bar = line.split()
        assert (int(position), name, float(number)) == (i, token, pytest.approx(weight, abs=5e-5))
        assert float(percent.rstrip("%")) == pytest.approx(100 * weight, abs=5e-3)
        assert len("".join(bar)) == round(50 * weight)
    assert total.split() == ["sum", "1.0000", "100.00%"]
    with pytest.raises(InputError, match="no head 7"):
        text.row_bars_text(trace, "cross", 0, 7, 2)


def test_top_keys_as_text_are_the_largest_weights_of_every_head():
    trace = random_trace()
    _, *lines = text.top_keys_text(trace, "encoder", 3).splitlines()
    assert len(lines) == 2 * 3
    largest = np.argsort(-trace.weights["encoder"][1, 2, 3])[:3]
    assert [int(position) for position in re.findall(r" (\d+) (?:s|\[)", lines[5])] == largest.tolist()


# ---------------------------------------------------------------------------- charts


def png_of(chart: alt.TopLevelMixin, folder: Path) -> Image.Image:
    charts.save_picture(chart, folder / "chart.png", scale=1)
    return Image.open(folder / "chart.png")


@pytest.mark.slow
@pytest.mark.parametrize(
    "trace",
    [random_trace(), random_trace(L=1, H=2, S=4, T=9, decoder_L=3), random_trace(L=1, H=1, S=60, T=60)],
    ids=["plain", "different depths and lengths", "60 tokens"],
)
def test_every_chart_is_drawn(trace, tmp_path):
    drawn = [
        *(charts.grid(trace, kind) for kind in KINDS),
        charts.single_head(trace, "decoder", 0, 0),
        charts.mean_heads(trace, "cross"),
        charts.rollout_layers(trace, "encoder"),
        charts.query_in_all_heads(trace, "cross", 2),
        charts.top_keys(trace, "cross", 2),
        charts.decode_stepper(trace),
        charts.value_per_head(measures.head_statistics(trace), "entropy", "Entropy in bits"),
    ]
    for chart in drawn:
        assert np.asarray(png_of(chart, tmp_path)).std() > 10  # not blank


@pytest.mark.slow
@pytest.mark.parametrize(
    "tokens", [["مرحبا", "بالعالم", "مرحبا"], ["🙂", "日本語", "🙂"], ['"', "\\", "'"], ["<b>", "&amp;", "a"]]
)
def test_tokens_of_any_script_are_drawn(tokens, tmp_path):
    trace = random_trace(S=5, T=4)
    object.__setattr__(trace, "src_tokens", ["[SOS]", *tokens, "[EOS]"])
    object.__setattr__(trace, "tgt_tokens", ["[SOS]", *tokens])
    png_of(charts.decode_stepper(trace), tmp_path)
    page.save_page(trace, tmp_path / "page.html")


def test_decoder_chart_has_no_masked_cell(tmp_path):
    """Cells on and below the diagonal are colored, those above are white."""
    trace, side = random_trace(L=1, H=1, T=6), 40
    chart = charts.panels(trace, "decoder", measures.packed_table(trace, "decoder"), side)
    picture = np.asarray(png_of(chart, tmp_path).convert("RGB")).astype(int)
    colored = picture.min(2) < 250  # a weight of 0 is light blue
    left = np.argmax(colored.sum(0) > 5 * side)  # the first column of cells; no label is as tall
    top = np.argmax(colored[:, left + side // 2])
    for row in range(6):
        for column in range(6):
            center = colored[top + side * row + side // 2, left + side * column + side // 2]
            assert center == (column <= row), (row, column)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["GIF", "PNG"])
def test_animation_has_a_frame_for_every_step_and_frames_between_two_steps(tmp_path, form):
    trace, path = random_trace(), tmp_path / f"steps.{form.lower()}"
    charts.save_gif(trace, path, seconds=0.7, between=2)
    gif = Image.open(path)
    assert gif.format == form
    steps = len(trace.tgt_tokens)
    assert gif.n_frames == steps + 2 * (steps - 1)
    durations = [gif.seek(i) or gif.info["duration"] for i in range(gif.n_frames)]
    assert durations == [*([700, 60, 60] * (steps - 1)), 700]


def data_of(path: Path) -> dict:
    """The data that a page holds, read as a script would read it."""
    html = path.read_text(encoding="utf8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL).group(1))


@pytest.mark.slow
def test_page_holds_the_weights_of_the_model(tmp_path):
    """The weights in the page's data differ from the tensors by at most half a ten-thousandth; rows sum to 1."""
    torch.manual_seed(0)
    tokenizer = build_bpe_tokenizer(["a b c d e f g"] * 3, 280)
    config = get_config("toy", tokenizer="bpe", d_model=32, num_heads=4)
    V = tokenizer.get_vocab_size()
    model = build_transformer(V, V, 64, 64, d_model=32, N=2, h=4, d_ff=32, decoder_N=3).eval()
    translator = Translator(model, config, tokenizer, tokenizer)
    traces = [
        record_trace(translator, "a b c d e", target="g f e d c b a"),
        record_trace(translator, "g", target="a b"),
    ]
    page.save_page(traces, tmp_path / "page.html")
    for trace, shown in zip(traces, data_of(tmp_path / "page.html")["traces"], strict=True):
        assert (shown["state"]["src"], shown["state"]["tgt"]) == (trace.src_tokens, trace.tgt_tokens)
        assert shown["state"]["out"] == trace.next_tokens
        rows = [row for row in shown["heads"] if row["head"].isdigit()]
        assert len(rows) == 4 * (2 + 3 + 3)
        for row in rows:
            weights = trace.weights[row["kind"]][row["layer"], int(row["head"])]
            found = np.array(row["w"].split(","), dtype=float).reshape(-1, row["columns"]) / 10_000
            np.testing.assert_allclose(found, weights, atol=5.01e-5)
            np.testing.assert_allclose(np.array(row["sums"].split(","), dtype=float), weights.sum(-1), atol=1e-5)
        for line in shown["candidates"]:
            token, log_p = trace.candidates[line["step"]][line["rank"] - 1]
            assert (line["token"], line["log_probability"]) == (token, pytest.approx(log_p))


SCRIPT = "</script><script>window.attacked=1</script><img src=x onerror=window.attacked=1>"


def hostile_trace() -> AttentionTrace:
    """A trace with script in every token and in the name of the run."""
    trace = random_trace()
    script = [SCRIPT] * 9
    tokens = {name: script[: len(getattr(trace, name))] for name in ("src_tokens", "tgt_tokens", "next_tokens")}
    return replace(trace, **tokens, candidates=[[(SCRIPT, -0.1)]] * 5, run=SCRIPT)


def test_no_token_or_name_becomes_part_of_a_page(tmp_path):
    trace = hostile_trace()
    trace.save(tmp_path / "trace.npz")
    page.save_page([AttentionTrace.load(tmp_path / "trace.npz")] * 2, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf8")
    assert "<script>window.attacked" not in html
    assert "<img src=x" not in html
    assert html.count("</script>") == 3
    assert data_of(tmp_path / "page.html")["traces"][0]["state"]["src"] == trace.src_tokens


@pytest.mark.parametrize("render", [charts.render_html, charts.render_vega_and_png])
def test_no_token_becomes_part_of_a_notebook(render):
    out = render(charts.grid(hostile_trace(), "cross").to_dict())
    assert "<script>window.attacked" not in out.get("text/html", "")
    assert "<img src=x" not in out.get("text/html", "")


def test_notebook_output_has_vega_and_png():
    chart = charts.grid(random_trace(), "cross")
    out = charts.render_vega_and_png(chart.to_dict())
    png = base64.b64decode(out["image/png"])
    assert Image.open(io.BytesIO(png)).mode == "P"  # a palette
    assert "text/html" not in out
    assert out["application/vnd.vegalite.v5+json"]["$schema"].endswith("/v5.json")  # JupyterLab warns about a later one


@pytest.mark.slow
def test_charts_are_valid_vega_lite_5():
    """JupyterLab draws Vega-Lite 5; the picture is the same as with version 6."""
    for chart in (charts.grid(random_trace(), "cross"), charts.decode_stepper(random_trace())):
        spec = chart.to_dict()
        old = vl_convert.vegalite_to_png({**spec, "$schema": charts.VEGA_LITE_5}, vl_version="5.20")
        new = vl_convert.vegalite_to_png(spec)
        old, new = (np.asarray(Image.open(io.BytesIO(png)).convert("L"), dtype=float) for png in (old, new))
        assert old.shape == new.shape
        assert np.abs(old - new).mean() < 2


@pytest.mark.parametrize("palette", PALETTES.values(), ids=PALETTES)
def test_numbers_are_legible_on_their_cells(palette):
    """The contrast of a number with its cell, as defined by WCAG 2; the best that one color scale allows is 4.58."""

    def luminance(color: np.ndarray) -> float:
        linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def rgb(name: str) -> np.ndarray:
        return np.array([int(name[i : i + 2], 16) / 255 for i in (1, 3, 5)])

    stops, places = np.array([rgb(name) for name in palette.weights]), np.linspace(0, 1, len(palette.weights))
    for weight in np.linspace(0, 1, 101):
        cell = luminance(np.array([np.interp(weight, places, stops[:, i]) for i in range(3)]))
        number = luminance(rgb(palette.on_high if weight >= 0.5 else palette.on_low))
        assert (max(cell, number) + 0.05) / (min(cell, number) + 0.05) > 4.2, weight


# ---------------------------------------------------------------------------- command line


def shell(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "visualize.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.mark.slow
def test_command_line(trained_run, tmp_path):
    done = shell(
        "--run-dir", str(trained_run), "--html", "p.html", "--png", "p.png", "--save", "t.npz", SENTENCE, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "wrote p.html (" in done.stdout
    again = shell("--trace-file", "t.npz", "--text", "--words", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "cross-attention, layer 1, head 0" in again.stdout
    shell("--trace-file", "t.npz", "--png", "p.svg", "--row", "2", cwd=tmp_path)
    assert (tmp_path / "p.svg").read_text(encoding="utf8").startswith("<svg")
    (tmp_path / "two.txt").write_text("She sleeps.\n\nThe zebra sleeps.\n")
    both = shell("--run-dir", str(trained_run), "--file", "two.txt", "--html", "p.html", cwd=tmp_path)
    assert both.returncode == 0, both.stderr
    traces = data_of(tmp_path / "p.html")["traces"]
    assert [trace["title"][0] for trace in traces] == ["She sleeps.", "The zebra [UNK] sleeps."]
    bad = shell("--trace-file", "t.npz", "--row", "99", "--html", "q.html", cwd=tmp_path)
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
    assert not (tmp_path / "q.html").exists()
    assert "[SOS] →" in again.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a sentence"),
        (["--trace-file", "none.npz"], "none.npz"),
        (["--html", ".", "hi"], "folder"),
        (["--png", "no/x.png", "hi"], "no folder no"),
        (["--png", "x.jpg", "hi"], "x.jpg does not end in .png or .svg"),
        (["--file", "none.txt", "--png", "x.png"], "--file is for --html and --text"),
    ],
)
def test_bad_command_lines_are_one_line_errors(tmp_path, arguments, words):
    done = shell(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert words in done.stderr
