"""The benchmark scripts run, with those peers that are installed, and their ways do the same work."""

import sys

import pytest
import torch
from conftest import ROOT

from dataset import EOS, PAD, SOS
from model import KVCache

sys.path.insert(0, str(ROOT / "benchmarks"))
import corpus_size
import decoding_speed as decoding
import engines
import gpu
import growth
import peers as ways
import precision
import training_speed as training
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


def test_engines_write_the_same(trained_run, monkeypatch, capsys):
    monkeypatch.setattr(engines, "ROUNDS", 1)
    monkeypatch.setattr(sys, "argv", ["engines.py", "--run-dir", str(trained_run), "--sentences", "20"])
    engines.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "sentences/s" not in line]
    same = {(row[0].strip("| "), row[1]): row[3] for row in rows if len(row) == 5 and row[1] != "---"}
    assert len(same) == 8
    for search in ("greedy", "beam 5"):
        assert same["this project, float32", search] == same["CTranslate2, float32", search] == "20 of 20"


def test_both_precisions_are_trained_and_drawn(tmp_path, capsys):
    for part, pairs in (("train", 60), ("val", 10), ("test_2016_flickr", 10)):
        for lang in ("en", "de"):
            lines = [f"{lang} {i % 7} {i % 5} {part}\n" for i in range(pairs)]
            (tmp_path / f"{part}.lc.norm.tok.{lang}").write_text("".join(lines))
    small = "--num-epochs 2 --d-model 32 --d-ff 32 --encoder-layers 1 --decoder-layers 1 --num-heads 2 --vocab-size 300"
    small += " --warmup-steps 2 --batch-tokens 128 --device cpu"
    runs = ["--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "--picture", str(tmp_path / "curves.svg")]
    precision.main([*runs, "--", *small.split()])
    assert "bf16" in capsys.readouterr().out
    assert (tmp_path / "curves.svg").stat().st_size > 1000


def test_a_corpus_is_prepared_and_its_memory_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["corpus_size.py", "--pairs", "500", "--folder", str(tmp_path / "new")])
    corpus_size.main()
    *_, row = capsys.readouterr().out.splitlines()
    pairs, *seconds, own, whole = (float(cell) for cell in row.strip("| ").replace(",", "").split(" | "))
    assert (pairs, len(seconds)) == (500, 3)
    assert 0.05 < own < whole


def test_the_script_for_a_gpu_runs(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "TRAINING", gpu.TRAINING[:2])  # compiling takes minutes
    small = "--size tiny --vocabulary 60 --batch-tokens 64 --batches 1 --rounds 1 --sentences 6 --device cpu"
    monkeypatch.setattr(sys, "argv", ["gpu.py", *small.split()])
    gpu.main()
    printed = capsys.readouterr().out
    assert "| fp32 | 0.0e+00 | 0.0e+00 | 100% | 100% |" in printed
    assert printed.count("| bf16 |") == 4


def test_the_check_for_a_gpu_sees_a_wrong_gradient(monkeypatch):
    gradients = gpu.loss_and_gradients
    calls = []

    def wrong(way, batch):
        loss, gradient = gradients(way, batch)
        calls.append(way)
        return loss, gradient * (1.01 if len(calls) > 1 else 1)

    monkeypatch.setattr(gpu, "loss_and_gradients", wrong)
    with pytest.raises(AssertionError, match="fp32"):
        gpu.check(CPU)


@pytest.mark.parametrize("grows", [True, False])
def test_the_check_for_a_gpu_sees_a_wrong_cache(monkeypatch, grows):
    decoders, select = [], KVCache.select
    make = gpu.CachedDecoder

    def wrong(cache, rows):
        select(cache, rows.flip(0) if len(decoders) == 2 and cache.grows == grows else rows)

    monkeypatch.setattr(gpu, "CachedDecoder", lambda *given: decoders.append(given) or make(*given))
    monkeypatch.setattr(KVCache, "select", wrong)
    with pytest.raises(AssertionError):
        gpu.check(CPU)
