"""The picture of the architecture and docs/from_the_video.md: names and numbers are those of the code."""

import re
from pathlib import Path

import altair as alt
import numpy as np
import pytest
import torch
from conftest import ROOT

import visualize
from config import Config, InputError, get_config
from dataset import batch_of, build_word_tokenizer
from interpret.architecture import (
    ENCODER_TOP,
    ENCODER_X,
    GROUP,
    INPUTS,
    architecture,
    describe_parts,
    nominal_batch,
    preset_architecture,
    recorded_shapes,
    run_architecture,
)
from interpret.charts import save_picture
from interpret.trace import AttentionTrace
from model import get_model
from runs.folder import RunFolder

PRESETS = {"toy": "target", "multi30k": "all", "opus_books": "all", "tutorial": "none"}
VOCABULARIES = {"target": (254, 593), "all": (10_000, 10_000), "none": (15_698, 22_463)}  # source, target


def parameters_of(config: Config) -> int:
    with torch.device("meta"):
        model = get_model(config, *VOCABULARIES[config.share_embeddings])
    return sum(p.numel() for p in model.parameters())


def rows_with(chart: alt.LayerChart, name: str) -> list[dict]:
    """The drawn items that have this property."""
    return [row for rows in chart.to_dict()["datasets"].values() for row in rows if name in row]


def texts_of(chart: alt.LayerChart) -> list[str]:
    return [row["text"] for row in rows_with(chart, "text")]


def numbers(texts: list[str], pattern: str) -> list[int]:
    """The number in each text that the pattern, with one group, matches."""
    found = (re.search(pattern, text) for text in texts)
    return [int(match[1].replace(",", "")) for match in found if match]


@pytest.fixture
def untrained_run(tmp_path) -> str:
    """A run before its first checkpoint, with vocabularies of 10 source and 12 target tokens."""
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"a b c {'d ' * (i % 7)}\ta b {'c ' * (i % 5)}\n" for i in range(80)), encoding="utf8")
    corpus = {"datasource": str(pairs), "validation_source": "", "validation_fraction": 0.5}
    config = get_config("toy", run_dir=str(tmp_path / "run"), d_model=32, **corpus)
    folder = RunFolder.of(config)
    folder.path.mkdir()
    folder.save_config(config)
    for lang, words in (("en", "a b c d e f"), ("it", "a b c d e f g h")):
        folder.tokenizer_file(lang).write_text(build_word_tokenizer([words, words], 100).to_str(), encoding="utf8")
    return str(folder)


# ---------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_of_the_boxes_sum_to_those_of_the_model(preset, norm):
    config = get_config(preset, encoder_layers=3, norm=norm)
    assert config.share_embeddings == PRESETS[preset]
    chart = architecture(config, *VOCABULARIES[config.share_embeddings])
    blocks = [row for row in rows_with(chart, "fill") if row["fill"] == GROUP]
    texts = rows_with(chart, "text")

    def inside(block: dict) -> list[str]:
        is_inside = (block["x"] < t["x"] < block["x2"] and block["y"] < t["y"] < block["y2"] for t in texts)
        return [t["text"] for t, inside in zip(texts, is_inside, strict=True) if inside]

    total = sum(numbers(texts_of(chart), r"· ([\d,]+) parameters"))
    for block in blocks:
        boxes = sum(numbers(inside(block), r"· ([\d,]+) parameters"))
        (layers,) = numbers(inside(block), r"Block × (\d+)")
        assert numbers(inside(block), r"^([\d,]+) parameters") == [boxes]
        assert numbers(inside(block), r"^× \d+ = ([\d,]+)") == [layers * boxes]
        total += (layers - 1) * boxes
    assert total == parameters_of(config)
    assert f"{total:,} parameters" in texts_of(chart)


def test_tied_matrices_are_counted_once_and_named():
    def tied(preset: str) -> dict[str, str]:
        config = get_config(preset, encoder_layers=1, decoder_layers=1)
        parts = describe_parts(config, *VOCABULARIES[config.share_embeddings], nominal_batch(config))
        return {path: part.tied_with for path, part in parts.items() if part.tied_with}

    assert tied("toy") == {"projection_layer": "tgt_embed"}
    assert tied("opus_books") == {"projection_layer": "tgt_embed", "src_embed": "tgt_embed"}
    assert tied("tutorial") == {}
    texts = texts_of(preset_architecture("opus_books"))
    assert "(32, 24, 512) · tied with tgt_embed" in texts
    assert "matrix tied with tgt_embed" in texts


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_layer_norm_is_drawn_before_the_sublayer_or_after_the_sum(norm):
    """From top to bottom, the picture shows what is computed last to first."""
    rows = rows_with(architecture(get_config("toy", norm=norm), 10, 12), "text")
    column = sorted((row["y"], row["text"]) for row in rows if row["x"] == ENCODER_X and row["y"] > ENCODER_TOP)
    names = [re.match(r"\+|LayerNorm|FeedForwardBlock|MultiHeadAttentionBlock", text) for _, text in column]
    order = [name[0] for name in names if name]
    if norm == "pre":
        assert order == ["+", "FeedForwardBlock", "LayerNorm", "+", "MultiHeadAttentionBlock", "LayerNorm"]
    else:
        assert order == ["LayerNorm", "+", "FeedForwardBlock", "LayerNorm", "+", "MultiHeadAttentionBlock"]


def test_all_layers_of_a_stack_have_the_same_size():
    """The picture draws the first and multiplies it."""
    model = get_model(get_config("toy", encoder_layers=3, decoder_layers=2), 10, 12)
    for stack in (model.encoder, model.decoder):
        assert len({sum(p.numel() for p in layer.parameters()) for layer in stack.layers}) == 1


def test_shapes_are_those_of_a_forward_pass_with_values():
    config = get_config("toy", d_model=32, num_heads=2)
    model = get_model(config, 10, 12).eval()
    inputs = batch_of(torch.randint(4, 10, (3, 7)), torch.randint(4, 12, (3, 6)))
    shapes, scores = recorded_shapes(model, [inputs[name] for name in INPUTS])
    parts = describe_parts(config, 10, 12, (3, 7, 5))
    assert {path: part.shape for path, part in parts.items()} == {path: shapes[path] for path in parts}
    assert {path: part.scores for path, part in parts.items()} == {path: scores.get(path, ()) for path in parts}
    assert parts["projection_layer"].shape == (3, 5, 12)
    assert parts["decoder.layers.0.cross_attention_block"].scores == (3, 2, 5, 7)


# ---------------------------------------------------------------------------- runs and presets


def test_the_picture_of_a_run_shows_a_batch_of_its_validation_pairs(untrained_run):
    texts = texts_of(run_architecture(untrained_run))
    assert "batch: 32 sentences, 11 source and 7 target tokens (validation pairs)" in texts  # the longest of each side
    assert {"run", "(32, 11, 32) · 320 parameters", "(32, 7, 32) · 384 parameters"} <= set(texts)


def test_without_the_corpus_the_batch_is_nominal(untrained_run, tmp_path):
    (tmp_path / "pairs.tsv").unlink()
    assert "batch: 32 sentences, 24 source and 22 target tokens (nominal)" in texts_of(run_architecture(untrained_run))


def test_with_lengths_the_batch_is_one_sentence(untrained_run):
    assert "batch: 1 sentence, 5 source and 6 target tokens" in texts_of(run_architecture(untrained_run, (5, 6)))


@pytest.mark.parametrize("preset", ["toy", "tutorial", "wmt14"])
def test_no_text_is_wider_than_its_box(preset):
    """Characters are half as wide as the font size on average; a box is 270 pixels wide."""
    for row in rows_with(preset_architecture(preset), "text"):
        if row["align"] == "center" and row["x"] in (190, 810):
            assert 0.5 * row["size"] * len(row["text"]) <= 262, row["text"]


@pytest.mark.slow
def test_files(tmp_path):
    chart = preset_architecture("toy")
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<svg")):
        save_picture(chart, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)


# ---------------------------------------------------------------------------- command line


def test_command_line(tmp_path, capsys):
    path = tmp_path / "model.SVG"
    visualize.main(architecture=str(path), preset="toy")
    assert f"wrote {path} (" in capsys.readouterr().out
    assert "preset toy, not trained" in path.read_text(encoding="utf8")


def test_with_a_sentence_the_picture_has_its_lengths(untrained_run, monkeypatch, tmp_path):
    """Also if the tokens that are shown are merged: the bytes of é."""
    tokens = ["[SOS]", "▁", "<0xC3>", "<0xA9>", "[EOS]"], ["[SOS]", "b", "c", "d"], ["b", "c", "d", "[EOS]"]
    sizes = {"encoder": (5, 5), "decoder": (4, 4), "cross": (4, 5)}
    weights = {kind: np.zeros((1, 1, *size)) for kind, size in sizes.items()}
    trace = AttentionTrace(*tokens, tokens[2], [0, 1, 1, 1, 2], [0, 1, 2, 3], weights, [[]] * 4, "run")
    monkeypatch.setattr(visualize, "load_traces", lambda *_: [trace])
    visualize.main("é", run_dir=untrained_run, words=True, architecture=str(tmp_path / "a.svg"))
    assert "1 sentence, 5 source and 4 target tokens" in (tmp_path / "a.svg").read_text(encoding="utf8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"architecture": "a.pdf"}, "a.pdf does not end in .png or .svg"),
        ({"architecture": "a.svg", "preset": "toys"}, r"no preset 'toys' \(did you mean toy\?\)"),
        ({"architecture": "a.svg", "preset": "toy", "run_dir": "run"}, "name two models"),
        ({"architecture": "a.svg", "run_dir": "none"}, "no run in 'none'"),
        ({"architecture": "a.svg", "trace_file": "t.npz"}, "--trace-file has no model"),
        ({"architecture": "no/a.svg", "preset": "toy"}, "no folder no"),
        ({"preset": "toy"}, "add --architecture"),
    ],
)
def test_bad_command_lines(tmp_path: Path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words) as error:
        visualize.main(**arguments)
    assert "\n" not in str(error.value)


def test_a_preset_cannot_translate():
    with pytest.raises(InputError, match="omit the sentence"):
        visualize.main("I sleep.", architecture="a.svg", preset="toy")


# ---------------------------------------------------------------------------- docs/from_the_video.md


def rows_of_the_page() -> list[list[str]]:
    lines = (ROOT / "docs" / "from_the_video.md").read_text(encoding="utf8").splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and not line.startswith("| |")]


def linked_texts(cell: str) -> list[str]:
    """The texts of the pages and code that a cell links to."""
    paths = (ROOT / "docs" / link for link in re.findall(r"\]\(([\w./]+\.(?:py|md))\)", cell))
    return [path.read_text(encoding="utf8") for path in paths]


def test_the_names_of_each_topic_are_defined_in_a_linked_file():
    rows = [row for row in rows_of_the_page() if len(row) == 3 and row[0] != "tutorial"]
    assert len(rows) >= 25
    for _, here, _ in rows:
        code = "\n".join(linked_texts(here))
        for name in re.findall(r"`(\w+)`", here):
            assert re.search(rf"^ *(class|def) {name}\b|^{name}\b.* = ", code, re.MULTILINE), name


def test_lines_and_minutes_of_the_reading_path_are_right_within_a_tenth():
    rows = [row for row in rows_of_the_page() if len(row) == 5]
    assert [int(row[0]) for row in rows] == list(range(1, 12))
    for _, stage, files, lines, minutes in rows:
        count = sum(len(text.splitlines()) for text in linked_texts(files))
        assert 0.9 * count <= int(lines) <= 1.1 * count, f"{stage}: {count} lines"
        assert int(minutes) == round(int(lines) / 15), stage
