"""The plan of each preset: steps, peak of the learning rate, estimates of memory and time; progress of a run."""

import json
import math
import re
import sys
from dataclasses import asdict, replace

import pytest
import torch
from conftest import ROOT
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from config import PRESETS, Config, get_config
from dataset import get_ds
from model import causal_mask
from runs.folder import RunFolder
from train import count_steps, count_warmup_steps, learning_rate, peak_learning_rate, planned_steps, train_model
from training import log
from training.estimate import communicated_bytes, estimated_memory, estimated_seconds, memory_parts, training_flops
from training.log import duration

sys.path.insert(0, str(ROOT / "benchmarks"))
import presets

# ---------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("preset", "steps", "peak_step", "peak"),
    [
        ("opus_books", 2_400, 240, 1e-3),
        ("tutorial", 72_760, 1, 1e-4),
        ("toy", 860, 100, 3e-3),
        ("multi30k", 22_950, 1_000, 3e-3),
        ("wmt14", 100_000, 4_000, 7e-4),
    ],
)
def test_every_preset_reaches_its_peak_early_in_the_run(preset, steps, peak_step, peak):
    config = get_config(preset)
    assert planned_steps(config, presets.CORPORA[preset].batches) == steps
    assert peak_learning_rate(config, steps) == (peak_step, peak)
    rates = [learning_rate(step, config, steps) for step in range(steps)]
    assert rates.index(max(rates)) == peak_step - 1
    for total in (steps // 10, 3 * steps):  # other corpora, or other numbers of epochs
        expected = peak_step * total / steps if config.warmup_steps else 1
        assert peak_learning_rate(config, total)[0] == pytest.approx(expected, rel=0.02)


def test_the_toy_corpus_has_the_expected_number_of_steps(tmp_path):
    config = get_config("toy", run_dir=str(tmp_path))
    train, _, *tokenizers = get_ds(config)
    corpus = presets.CORPORA["toy"]
    assert (len(train), count_steps(config, train)) == (corpus.pairs, 860)
    assert tuple(tokenizer.get_vocab_size() for tokenizer in tokenizers) == corpus.vocabulary


def test_a_warmup_in_steps_has_the_rates_of_earlier_versions(tmp_path):
    """Earlier versions wrote an integer into config.json."""
    values = {**asdict(get_config()), "warmup_steps": 4_000, "run_dir": ""}
    (tmp_path / "config.json").write_text(json.dumps(values))
    for schedule in ("constant", "inverse_sqrt", "cosine"):
        config = replace(RunFolder(tmp_path).load_config(), lr_schedule=schedule)
        for total in (1_180, 100_000):
            for step in (0, 17, 999, 3_999, 4_000, 4_001, 50_000):
                after = {
                    "constant": config.lr,
                    "inverse_sqrt": config.lr * math.sqrt(4_000 / (step + 1)),
                    "cosine": config.lr
                    * 0.5
                    * (1 + math.cos(math.pi * min(1.0, (step - 4_000) / max(1, total - 4_000)))),
                }
                expected = config.lr * (step + 1) / 4_000 if step < 4_000 else after[schedule]
                assert learning_rate(step, config, total) == expected


def test_a_warmup_below_one_is_a_share_of_the_run():
    config = get_config("opus_books", warmup_steps=0.25)
    assert [count_warmup_steps(config, total) for total in (3, 4, 100, 1_000)] == [0, 1, 25, 250]
    assert count_warmup_steps(replace(config, warmup_steps=1), 1_000) == 1
    assert learning_rate(0, config, 3) == config.lr


# ---------------------------------------------------------------------------- estimates


def test_flops_and_memory_agree_with_those_of_a_forward_pass(monkeypatch):
    """On the meta device, which has shapes and no data. Dropout has the form that it has on a GPU."""
    B, T = 8, 32
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p: torch.native_dropout(x, p, True)[0])
    config = get_config("opus_books", attention_dropout=0, batch_tokens=B * T)
    model = presets.meta_model(config, (1_000, 1_000)).train()
    ids = torch.zeros(B, T, dtype=torch.long, device="meta")
    masks = torch.ones(B, 1, 1, T, dtype=torch.bool, device="meta"), causal_mask(T, "meta").unsqueeze(1)
    saved: dict[int, int] = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor._base, torch.nn.Parameter):
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            held.append(tensor)
        return tensor

    held: list[torch.Tensor] = []
    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        model.project(model.hidden(ids, ids, *masks))
    assert training_flops(model, B * T) == pytest.approx(3 * counter.get_total_flops(), rel=0.03)
    parameters = sum(p.numel() for p in model.parameters())
    activations = estimated_memory(config, model, "mps", "fp32") - 16 * parameters - 2 * 4 * 1_000 * B * T  # logits
    assert activations == pytest.approx(sum(saved.values()), rel=0.1)


def test_time_follows_from_the_flops_or_from_the_number_of_kernels():
    config = get_config("opus_books")
    model = presets.meta_model(config, (16_000, 16_000))
    D, d_ff = 512, 2_048
    weights = 6 * (4 * D * D + 2 * D * d_ff) + 6 * (8 * D * D + 2 * D * d_ff) + 16_000 * D
    seconds = 2_400 * 6 * weights * 8_192 / (0.15 * 65e12)
    assert estimated_seconds(config, model, 2_400, 33, "Tesla T4", "fp16") == pytest.approx(seconds)
    assert estimated_seconds(config, model, 2_400, 33, "8 threads", "bf16") is None
    assert estimated_seconds(config, model, 2_400, 33, "Tesla T4", "bf16") is None
    small = replace(config, batch_tokens=64)
    assert estimated_seconds(small, model, 1_000, 33, "Tesla T4", "fp16") == pytest.approx(1_000 * 12 * 2e-3)


def test_sharding_divides_what_belongs_to_parameters_and_sends_weights_for_every_batch():
    config = get_config("opus_books", ema_decay=0.9, accumulation_steps=2)
    model = presets.meta_model(config, (16_000, 16_000))
    others, total = 16_000 * 513 + 4 * 512, sum(p.numel() for p in model.parameters())
    one, ddp = (memory_parts(config, model, "cuda", "bf16", processes) for processes in (1, 4))
    sharded = memory_parts(replace(config, shard=True), model, "cuda", "bf16", 4)
    assert sum(ddp.values()) - sum(one.values()) == 4 * total
    for name in ("weights", "gradients", "optimizer", "EMA"):
        assert sharded[name] == ddp[name] / 4
    assert communicated_bytes(config, model, 4) == 0.75 * 8 * total
    expected = 0.75 * 2 * (12 * (total - others) + 8 * others)
    assert communicated_bytes(replace(config, shard=True), model, 4) == expected
    assert communicated_bytes(config, model, 1) == 0


def test_the_documentation_shows_the_table_of_the_presets():
    assert presets.table() in (ROOT / "docs" / "training.md").read_text(encoding="utf8")


# ---------------------------------------------------------------------------- progress


def test_the_plan_is_printed_before_training(tiny_config, capsys):
    train_model(replace(tiny_config, max_steps=8, warmup_steps=0.25))
    printed = capsys.readouterr().out
    assert "training     8 steps, up to 2 epochs\n             peak of the learning rate: 3.0e-03, in step 2" in printed
    assert re.search(r"about 0\.5\d? GB of memory\n", printed)


def test_without_a_terminal_a_line_is_printed_per_epoch_and_every_few_minutes(tiny_config, capsys, monkeypatch):
    config = replace(tiny_config, batch_tokens=128)
    train_model(config)
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("Epoch")]
    total = int(re.search(r"training +(\d+) steps", out)[1])
    assert [line.split(":")[0] for line in lines] == ["Epoch 00", "Epoch 00", "Epoch 01"]  # first a tenth of the run
    assert re.fullmatch(rf"Epoch 01: step {total} of {total}, loss .*, lr .*, .* tokens/s, 0 s left", lines[-1])
    assert "step/s" not in err
    monkeypatch.setattr(log, "SECONDS_BETWEEN_LINES", 0)
    train_model(replace(config, preload="none"))
    assert sum(line.startswith("Epoch") for line in capsys.readouterr().out.splitlines()) > len(lines)


def test_one_bar_covers_the_whole_run_and_resumes_where_it_stopped(tiny_config, capsys, monkeypatch):
    config = replace(tiny_config, batch_tokens=128, lr_schedule="constant")
    monkeypatch.setattr(log, "shows_bars", lambda: True)
    train_model(replace(config, num_epochs=1))
    out, err = capsys.readouterr()
    steps = int(re.search(r"training +(\d+) steps", out)[1])
    assert f"{steps}/{steps}" in err
    assert re.search(r"Epoch 00: step .* left", out)
    train_model(config)
    out, err = capsys.readouterr()
    bars = [(int(a), int(b)) for a, b in re.findall(r"Epoch \d\d: .*?\| (\d+)/(\d+) \[", err)]
    assert min(bars) >= (steps + 1, 2 * steps)
    assert max(bars) == (2 * steps, 2 * steps)
    assert "Epoch 01:" in err
    assert "Epoch 00:" not in err
    train_model(config)  # nothing is left
    assert "step/s" not in capsys.readouterr().err


def test_bars_are_off_without_a_terminal_or_with_tqdm_disable(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert not log.shows_bars()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert log.shows_bars()
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert not log.shows_bars()


def test_durations_are_rounded():
    assert [duration(seconds) for seconds in (7.4, 99, 100, 5_999, 12_600)] == [
        "7 s",
        "99 s",
        "2 min",
        "100 min",
        "3.5 h",
    ]


def test_presets_and_their_corpora_correspond():
    assert list(presets.CORPORA) == list(PRESETS)
    assert Config().warmup_steps < 1
