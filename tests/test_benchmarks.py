"""The benchmark scripts run with the installed peers, and all implementations do the same work."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from config import InputError
from dataset import EOS, PAD, SOS
from model import CrossAttentionCache, SelfAttentionCache, Transformer

sys.path.insert(0, str(ROOT / "benchmarks"))
import busy
import corpus_size
import decoding_speed
import engines
import gpu
import growth
import multi30k
import peers
import precision
import several_gpus
import training_speed
from workload import SyntheticPairs, decoding_batches, time_interleaved, training_batches

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:enable_nested_tensor")]  # from torch.nn.Transformer
CPU = torch.device("cpu")
SMALL = ["--sizes", "tiny", "--vocabulary", "60", "--rounds", "1"]


def test_synthetic_batches_have_the_format_of_text_batches():
    batches = training_batches("", vocab_size=50, batch_tokens=300, count=3)
    assert len(batches) == 3
    for batch in batches:
        source, label = batch["encoder_input"], batch["label"]
        assert source.numel() <= 300
        assert (source[:, 0] == SOS).all()
        assert ((source == EOS).sum(1) == 1).all()
        assert ((label == EOS).sum(1) == 1).all()
        assert torch.equal(batch["decoder_input"][:, 1:][label[:, 1:] != PAD], label[:, :-1][label[:, 1:] != PAD])


def test_every_implementation_learns_a_batch():
    pairs = SyntheticPairs(8, vocab_size=40, mean_length=6)
    batch = pairs[list(range(8))]
    for implementation in (peers.ThisProject, peers.PyTorch, peers.Tutorial):
        torch.manual_seed(0)
        model = implementation(peers.ModelSize(d_model=32, layers=1, heads=2, d_ff=64), 40, CPU)
        losses = [model.step(batch).item() for _ in range(25)]
        assert losses[-1] < losses[0] < 2 * torch.log(torch.tensor(40.0))


def test_the_tables_list_every_implementation(monkeypatch, capsys):
    monkeypatch.setattr(training_speed, "peak_memory", lambda *_: 1e9)
    monkeypatch.setattr(sys, "argv", ["training_speed.py", *SMALL, "--batch-tokens", "64"])
    training_speed.main(sys.argv[1:])
    monkeypatch.setattr(sys, "argv", ["decoding_speed.py", *SMALL, "--sentences", "6"])
    decoding_speed.main()
    printed = capsys.readouterr().out
    # two tables of training, in fp32 and bf16, and two of decoding, with beams of 1 and 5
    for implementation, tables in ((peers.ThisProject, 4), (peers.PyTorch, 2), (peers.Tutorial, 2)):
        assert printed.count(f"| {implementation.name} |") == tables


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_the_peak_memory_of_training_is_measured():
    batches = training_batches("", 50, 1_000, 2)
    assert training_speed.resident_memory_growth(peers.ThisProject, peers.SIZES["small"], 50, batches) > 1e7


def test_the_model_of_a_checkout_of_the_tutorial_is_measured(tmp_path):
    text = (ROOT / "model.py").read_text(encoding="utf8")  # it has the same classes
    (tmp_path / "model.py").write_text(text, encoding="utf8")
    factories = training_speed.implementations("fp32", str(tmp_path))
    assert "tutorial's repository" in factories
    assert "tutorial's repository" not in training_speed.implementations("bf16", str(tmp_path))
    torch.manual_seed(0)
    project = factories["tutorial's repository"](peers.ModelSize(d_model=32, layers=1, heads=2, d_ff=64), 40, CPU)
    assert type(project.model) is not Transformer
    batch = SyntheticPairs(2, vocab_size=40, mean_length=6)[[0, 1]]
    losses = [project.step(batch).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    with pytest.raises(InputError, match=re.escape(f"no {Path('other/model.py')}")):
        training_speed.implementations("fp32", "other")["tutorial's repository"](peers.SIZES["tiny"], 40, CPU)


@pytest.mark.parametrize("beam_size", [1, 5])
def test_translations_are_as_long_as_their_references(beam_size):
    (batch,) = decoding_batches("", "", 50, 10_000, 7, CPU)
    source, lengths = batch
    project = peers.ThisProject(peers.SIZES["tiny"], 50, CPU)
    project.prepare_for_decoding()
    with torch.inference_mode():
        translations = project.decode(source, lengths, beam_size)
    assert [len(ids) for ids in translations] == lengths.tolist()


def test_speed_beside_a_busy_process_is_measured(monkeypatch, capsys):
    small = ["--tasks", "toy training", "--settings", busy.DEFAULT, busy.SHARED]
    monkeypatch.setattr(sys, "argv", ["busy.py", *small, "--rounds", "1", "--seconds", "0.1", "--adapt", "0.1"])
    busy.main()
    *_, default, shared = capsys.readouterr().out.splitlines()
    assert default.startswith(f"| {busy.DEFAULT} |")
    assert default.split(" | ")[2] == "1.00"
    assert shared.startswith(f"| {busy.SHARED} |")


def test_growth_is_measured_and_drawn(monkeypatch):
    monkeypatch.setattr(growth, "SIZES", {"tiny": peers.ModelSize(16, 1, 2, 32)})
    monkeypatch.setattr(growth, "VOCABULARY", 40)
    monkeypatch.setattr(growth, "CASES", {"sentence length": [("tiny", length, 64) for length in (8, 16)]})
    measured = growth.measure(CPU, rounds=1)
    assert len(measured) == 4
    assert growth.chart(measured).to_dict()["hconcat"]


def test_tasks_are_interleaved():
    calls = []
    seconds = time_interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2, device=CPU)
    assert calls == list("ababab")
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_ctranslate2_gives_identical_translations(trained_run, monkeypatch, capsys):
    monkeypatch.setattr(engines, "ROUNDS", 1)
    monkeypatch.setattr(sys, "argv", ["engines.py", "--run-dir", str(trained_run), "--sentences", "20"])
    engines.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "sentences/s" not in line]
    identical = {(row[0].strip("| "), row[1]): row[3] for row in rows if len(row) == 5 and row[1] != "---"}
    assert len(identical) == 8
    for search in ("greedy", "beam 5"):
        assert identical["this project, float32", search] == identical["CTranslate2, float32", search] == "20 of 20"


def test_learning_curves_of_both_precisions_are_drawn(tmp_path, capsys):
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


def test_corpus_preparation_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["corpus_size.py", "--pairs", "500", "--folder", str(tmp_path / "new")])
    corpus_size.main()
    *_, row = capsys.readouterr().out.splitlines()
    pairs, *seconds, private, total = (float(cell) for cell in row.strip("| ").replace(",", "").split(" | "))
    assert (pairs, len(seconds)) == (500, 3)
    assert 0.05 < private < total


def test_the_gpu_script_runs(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "TRAINING", gpu.TRAINING[:2])  # compiling takes minutes
    small = "--size tiny --vocabulary 60 --batch-tokens 64 --batches 1 --rounds 1 --sentences 6 --device cpu"
    monkeypatch.setattr(sys, "argv", ["gpu.py", *small.split()])
    gpu.main()
    printed = capsys.readouterr().out
    assert "| fp32 | 0.0e+00 | 0.0e+00 | 100% | 100% |" in printed
    assert printed.count("| bf16 |") == 4


def test_the_gpu_check_detects_a_wrong_gradient(monkeypatch):
    loss_and_gradients = gpu.loss_and_gradients
    calls = []

    def wrong(project, batch):
        loss, gradients = loss_and_gradients(project, batch)
        calls.append(project)
        return loss, gradients * (1.01 if len(calls) > 1 else 1)

    monkeypatch.setattr(gpu, "loss_and_gradients", wrong)
    with pytest.raises(AssertionError, match="fp32"):
        gpu.check(CPU)


@pytest.mark.parametrize("cache_type", [SelfAttentionCache, CrossAttentionCache])
def test_the_gpu_check_detects_a_wrong_cache(monkeypatch, cache_type):
    decoders, select = [], cache_type.select
    make = peers.CachedDecoder

    def wrong(cache, rows):
        select(cache, rows.flip(0) if len(decoders) == 2 else rows)

    monkeypatch.setattr(peers, "CachedDecoder", lambda *given: decoders.append(given) or make(*given))
    monkeypatch.setattr(cache_type, "select", wrong)
    with pytest.raises(AssertionError):
        gpu.check(CPU)


def test_the_arithmetic_of_several_gpus_agrees_with_what_two_processes_hold_and_send():
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", several_gpus.__file__]
    flags = [
        "--d-model=32",
        "--num-heads=2",
        "--d-ff=64",
        "--vocab-size=100",
        "--ema-decay=0.9",
        "--accumulation-steps=2",
    ]
    command += ["--measure", "--", "--preset=toy", *flags]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert len(rows) == 10
    for form, name, expected, measured in rows:
        if name.startswith("sent"):  # with headers, and with what other programs send
            assert float(measured) > float(expected)
        else:
            assert measured == expected, (form, name)


def test_the_plan_of_several_gpus_shows_what_fits(capsys):
    flags = ["--preset=wmt14", "--d-model=4096", "--num-heads=32", "--d-ff=16384", "--batch-tokens=1024"]
    several_gpus.main(["--gpus=16", "--kind=A100-40", "--", *flags])
    printed = capsys.readouterr().out
    assert "16 GPUs that send 300 GB/s each and compute 46.8 TFLOP/s" in printed
    assert "| fits into 40 GB | no | yes |" in printed
    several_gpus.main(["--kind=T4", "--memory=24", "--bandwidth=1.25", "--teraflops=20"])
    printed = capsys.readouterr().out
    assert "fp16, 8 GPUs that send 1.25 GB/s each and compute 20 TFLOP/s" in printed
    assert "| fits into 24 GB | yes | yes |" in printed
    with pytest.raises(InputError, match="no bf16 on this GPU; choose one of fp32, fp16"):
        several_gpus.main(["--kind=T4", "--", "--precision=bf16"])


def test_multi30k_scores_each_seed_and_their_ensemble(tmp_path, capsys):
    sentences = [" ".join(f"w{(i * j) % 7}" for j in range(1, 5)) for i in range(1, 21)]
    for part, lines in (("train", sentences), ("val", sentences[:4]), ("test_2016_flickr", sentences[4:8])):
        for lang in ("en", "de"):
            (tmp_path / f"{part}.lc.norm.tok.{lang}").write_text("\n".join(lines) + "\n", encoding="utf8")
    small = "--num-epochs 5 --vocab-size 100 --d-model 16 --d-ff 16 --encoder-layers 1 --decoder-layers 1 --seq-len 16"
    seeds = ["--seeds", "1", "2", "--at-once", "2", "--runs", str(tmp_path / "runs")]
    multi30k.main(["--data", str(tmp_path), *seeds, "--", *small.split(), "--validation-sentences", "0"])
    printed = capsys.readouterr().out
    scores = dict(re.findall(r"^(.*), Test 2016: BLEU ([\d.]+)", printed, re.MULTILINE))
    assert list(scores) == ["multi30k.tok.1", "multi30k.tok.2", "ensemble of 2"]
    mean = (float(scores["multi30k.tok.1"]) + float(scores["multi30k.tok.2"])) / 2
    assert float(re.search(r"^BLEU ([\d.]+) ±", printed, re.MULTILINE)[1]) == pytest.approx(mean, abs=0.011)
    assert "selected: " in printed
    assert "| latest | 5 |" in printed
    assert "| latest | 10 |" not in printed  # a run of five epochs has no ten to average


def test_multi30k_selects_the_lowest_length_penalty_among_equal_searches(tmp_path, monkeypatch):
    """Higher ones gain little and let some translations run on."""
    bleus = {0.0: 41.0, 0.6: 42.79, 1.0: 42.81, 1.4: 42.9, 1.8: 43.0, 2.4: 36.0}
    monkeypatch.setattr(multi30k, "validation_bleu", lambda runs, tokenizer, weights, search: bleus[search[1]])
    assert multi30k.select([tmp_path], "none")[1] == multi30k.Search(5, 1.0, 0)
