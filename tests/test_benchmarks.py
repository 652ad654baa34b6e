"""The benchmark scripts run, with those peers that are installed, and their ways do the same work."""

import sys

import pytest
import torch
from conftest import ROOT

from dataset import EOS, PAD, SOS

sys.path.insert(0, str(ROOT / "benchmarks"))
import decoding
import growth
import training
import ways
from workload import MadeUp, in_turn, sentences_to_write, training_batches

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # PyTorch speaks of its own fast path
CPU = torch.device("cpu")
SMALL = ["--sizes", "tiny", "--vocabulary", "60", "--rounds", "1"]


def test_made_up_pairs_are_batches_like_those_of_text():
    batches = training_batches("", vocabulary=50, batch_tokens=300, count=3)
    assert len(batches) == 3
    for batch in batches:
        source, label = batch["encoder_input"], batch["label"]
        assert source.numel() <= 300
        assert (source[:, 0] == SOS).all()
        assert ((source == EOS).sum(1) == 1).all()
        assert ((label == EOS).sum(1) == 1).all()
        assert torch.equal(batch["decoder_input"][:, 1:][label[:, 1:] != PAD], label[:, :-1][label[:, 1:] != PAD])


def test_every_way_learns_a_batch():
    pairs = MadeUp(8, vocabulary=40, mean_length=6)
    batch = pairs[list(range(8))]
    for way in (ways.Ours, ways.PyTorch, ways.Tutorial):
        torch.manual_seed(0)
        here = way(ways.Size(d_model=32, layers=1, heads=2, d_ff=64), 40, CPU)
        losses = [here.step(batch).item() for _ in range(25)]
        assert losses[-1] < losses[0] < 2 * torch.log(torch.tensor(40.0))


def test_the_tables_name_every_way(monkeypatch, capsys):
    monkeypatch.setattr(training, "peak_memory", lambda *_: 1e9)
    monkeypatch.setattr(
        sys, "argv", ["training.py", "--sizes", "tiny", "--vocabulary", "60", "--batch-tokens", "64", "--rounds", "1"]
    )
    training.main()
    monkeypatch.setattr(
        sys, "argv", ["decoding.py", "--sizes", "tiny", "--vocabulary", "60", "--sentences", "6", "--rounds", "1"]
    )
    decoding.main()
    printed = capsys.readouterr().out
    for way in (ways.Ours, ways.Tutorial):
        assert printed.count(f"| {way.name} |") == 2 + (way is ways.Ours)
    assert f"| {ways.PyTorch.name} |" in printed


def test_translations_end_where_they_are_told_to():
    (batch,) = sentences_to_write("", "", 50, 10_000, 7, CPU)
    source, steps = batch
    ours = ways.Ours(ways.SIZES["tiny"], 50, CPU)
    ours.prepare_to_write()
    written = []
    original = ways.greedy_decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ways, "greedy_decode", lambda *args: written.extend(original(*args)))
        with torch.inference_mode():
            ours.write(source, steps, beam=1)
    assert [len(ids) for ids in written] == steps.tolist()


def test_growth_is_drawn(monkeypatch):
    monkeypatch.setattr(growth, "SIZES", {"tiny": ways.Size(16, 1, 2, 32)})
    monkeypatch.setattr(growth, "VOCABULARY", 40)
    monkeypatch.setattr(growth, "CASES", {"sentence length": [("tiny", length, 64) for length in (8, 16)]})
    found = growth.speeds(CPU, rounds=1)
    assert len(found) == 4
    assert growth.picture(found).to_dict()["hconcat"]


def test_ways_take_turns():
    calls = []
    seconds = in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2, device=CPU)
    assert calls == list("ababab")
    assert [len(found) for found in seconds.values()] == [2, 2]
