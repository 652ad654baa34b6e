"""interpret/study.py and interpret/findings.py."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from config import get_config
from corpora.patterns import pattern_pairs
from interpret import findings, study
from interpret.interventions import VARIANTS
from interpret.measures import check_row_sums
from model import causal_mask
from train import train_model
from translate import Translator


@pytest.fixture(scope="module")
def translator(tmp_path_factory) -> Translator:
    """A post-norm run on the three patterns, trained for a few seconds."""
    splits = {f"{split}_source": f"patterns:{split}" for split in ("validation", "test")}
    sizes = {"d_model": 32, "encoder_layers": 1, "num_heads": 2, "d_ff": 64, "num_epochs": 8, "norm": "post"}
    folder = tmp_path_factory.mktemp("patterns") / "run"
    train_model(get_config("toy", run_dir=str(folder), datasource="patterns", lang_tgt="de", **splits, **sizes))
    return Translator.load(folder, "cpu")


def test_fixed_weights_of_a_sentence_with_padding():
    allowed = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0], dtype=torch.bool)  # [SOS], four words, [EOS], padding
    scores = torch.randn(1, 2, 3, 8).masked_fill(~allowed, -math.inf).softmax(-1)
    expected = {
        study.equal: [0, 1 / 4, 1 / 4, 1 / 4, 1 / 4, 0, 0, 0],
        study.beginning: [0, 1 / 3, 1 / 3, 1 / 3, 1 / 7, 0, 0, 0],
        study.end: [0, 0.2 / 3, 0.2 / 3, 0.2 / 3, 0.8, 0, 0, 0],
        study.end_token: [0, 0.05, 0.05, 0.05, 0.05, 0.8, 0, 0],
    }
    for change, weights in expected.items():
        assert torch.allclose(change(scores), torch.tensor(weights).expand(1, 2, 3, 8)), change.__name__


def decoded(model, variant) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    encoded, ids = torch.randn(2, 5, 32, generator=generator), torch.randint(4, 60, (2, 7), generator=generator)
    with torch.inference_mode(), variant.apply(model):
        return model.decode(encoded, torch.ones(2, 1, 1, 5, dtype=torch.bool), ids, causal_mask(7))


def test_skipped_sublayers_equal_sublayers_that_add_zero_with_pre_norm(tiny_model):
    if not tiny_model.decoder.layers[0].residual_connections[0].is_pre_norm:
        pytest.skip("with post-norm, x + 0 is normalized")
    by_name = {variant.name: variant for variant in VARIANTS}
    same = {
        study.NO_CROSS_ATTENTION: "decoder: no cross-attention",
        study.NO_FEED_FORWARD: "decoder: no feed-forward",
        study.SELF_ATTENTION: "decoder: only self-attention",
        study.RESIDUAL: "decoder: residual path and self-attention",
    }
    for name, other in same.items():
        assert torch.allclose(decoded(tiny_model, study.VARIANTS[name]), decoded(tiny_model, by_name[other]), atol=1e-5)


def test_every_variant_changes_the_decoder_and_is_undone(tiny_model):
    before = decoded(tiny_model, study.BASELINE)
    for variant in study.STUDY:
        if "source" not in variant.name:
            assert not torch.allclose(decoded(tiny_model, variant), before, atol=1e-3), variant.name
    assert torch.equal(decoded(tiny_model, study.BASELINE), before)


def test_figures_of_outputs():
    words = SimpleNamespace(encode=lambda text: SimpleNamespace(tokens=text.split()))
    pairs = [SimpleNamespace(src_text="", tgt_text=text) for text in ("a b c", "a a b")]
    sample = findings.Sample(SimpleNamespace(tokenizer_tgt=words), pairs, ["a b", "a c"])
    outputs = [["a", "b", "b"], ["a", "a", "b"]]
    assert (sample.exact(outputs), sample.doubled(outputs), sample.first_word(outputs)) == (50, 50, 100)
    assert sample.recall(outputs) == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert sample.followers == {"[SOS]": {"a"}, "a": {"b", "c"}, "b": {"[EOS]"}, "c": {"[EOS]"}}


@pytest.mark.slow
def test_study_shows_the_steps_of_each_variant(translator):
    for variant, steps, trace in study.study(translator, "I can eat apple"):
        chosen = steps[steps["chosen"]]
        assert chosen["word"].tolist()[:-1] == trace.tgt_tokens[1:], variant.name
        assert len(trace.tgt_tokens) == trace.weights["cross"].shape[2] == steps["step"].nunique()
        if variant.name in ("baseline", "equal", "end"):
            check_row_sums(trace)


@pytest.mark.slow
def test_findings_of_a_run(translator):
    table = findings.measure_findings(translator, sentences=20).set_index("finding")
    assert [finding.partition(".")[0] for finding in table.index] == [
        "1", "2", "3", "4", "4b", "5", "6", "6b", "7", "8", "8b", "9", "10", "11", "12"
    ]  # fmt: skip
    assert table[table.index.str.startswith("7.")]["holds"].all()  # the decoder sees the source in no other place


def test_shuffled_words_are_in_another_order():
    generator = np.random.default_rng(0)
    for pair in pattern_pairs("test"):
        words = findings.shuffled_words(pair.src_text, generator).split()
        assert words != pair.src_text.split()
        assert sorted(words) == sorted(pair.src_text.split())
    assert findings.shuffled_words("Hi there.", generator) == "there Hi ."
