import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, checkpoints, path_of

import train as t
from compute.ops import Dropout
from config import Config, InputError, get_config
from dataset import get_ds
from runs.checkpoint import load_checkpoint
from runs.folder import RunFolder
from train import StepBatches, learning_rate, train_model
from training.log import StepReport, TrainingLog
from training.losses import LossInputs, TrainingLoss, rdrop
from training.state import TrainingState, make_optimizer, rng_state
from translate import Translator

CPU = torch.device("cpu")


class Run:
    """A new run of a config, with `step` in place of the training loop."""

    def __init__(self, config: Config):
        self.config = config
        self.train, self.validation, *tokenizers = get_ds(config)
        self.state = TrainingState.create(config, *(tokenizer.get_vocab_size() for tokenizer in tokenizers), CPU)
        self.model = self.state.model.train()
        self.loss_module = TrainingLoss(self.model, config.label_smoothing, config.rdrop_alpha)
        self.translator = Translator(self.state.evaluated_model, config, *tokenizers)

    def step(self, *batches: dict) -> StepReport:
        rate = learning_rate(self.state.progress.step, self.config, t.count_steps(self.config, self.train))
        return t.train_step(self.state, self.loss_module, StepBatches(list(batches), False, 1), rate, self.config)


def test_learning_rates():
    config = get_config("toy", lr=1.0, warmup_steps=10, lr_schedule="inverse_sqrt")
    rates = [learning_rate(step, config, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[39] == pytest.approx(0.5)
    cosine = replace(config, lr_schedule="cosine")
    assert learning_rate(10, cosine, 100) == pytest.approx(1.0)
    assert learning_rate(55, cosine, 100) == pytest.approx(0.5)
    assert learning_rate(100, cosine, 100) == pytest.approx(0.0)
    flat = replace(config, lr_schedule="constant", warmup_steps=0)
    assert {learning_rate(step, flat, 100) for step in (0, 50, 1000)} == {1.0}


def test_one_epoch_of_the_toy_corpus_translates_held_out_pairings(trained_run):
    """The real thing, end to end; the floor is far below what one epoch reaches (about 90)."""
    (scores,) = [json.loads(line) for line in (trained_run / "scores.jsonl").read_text().splitlines()]
    assert scores["bleu"] > 50
    assert scores["loss"] < 1
    names = {path.name for path in trained_run.iterdir() if not path.name.startswith(".")}
    assert names == {
        "config.json",
        "scores.jsonl",
        "tensorboard",
        "tmodel_00.pt",
        "tokenizer_en.json",
        "tokenizer_it.json",
    }


def test_tensorboard_has_every_curve(trained_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained_run / "tensorboard"))
    events.Reload()
    curves = {"train/loss", "train/lr", "train/tokens_per_second", "train/gradient_norm"}
    curves |= {f"validation/{name}" for name in ("loss", "bleu", "chrf", "cer", "wer", "exact")}
    assert curves <= set(events.Tags()["scalars"])
    assert "validation/samples/text_summary" in events.Tags()["tensors"]


def test_a_handful_of_pairs_is_learnt_by_heart(tmp_path, pairs_file):
    """Loss comes near the floor that label smoothing leaves."""
    lines = pairs_file.read_text(encoding="utf8").splitlines(keepends=True)[:12]
    (tmp_path / "few.tsv").write_text("".join(lines), encoding="utf8")
    few = str(tmp_path / "few.tsv")
    model = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "tokenizer": "bpe", "vocab_size": 400}
    steps = {"num_epochs": 120, "warmup_steps": 20, "lr": 5e-3, "batch_tokens": 4096, "device": "cpu"}
    config = get_config("toy", run_dir=str(tmp_path / "run"), datasource=few, validation_source=few, **model, **steps)
    run = Run(config)
    batch = run.train[list(range(12))]
    losses = []
    for step in range(t.count_steps(config, run.train)):
        run.state.progress.step = step
        losses.append(run.step(batch).loss.item())
    V = run.translator.tokenizer_tgt.get_vocab_size()
    eps = config.label_smoothing
    floor = -((1 - eps + eps / V) * math.log(1 - eps + eps / V) + (V - 1) * eps / V * math.log(eps / V))
    assert floor - 1e-3 < losses[-1] < floor + 0.1 < losses[0]
    run.model.eval()
    assert run.translator.translate(batch["src_text"]) == batch["tgt_text"]


def test_accumulated_batches_make_the_same_step_as_one(tiny_config):
    """Loss a token over the whole step: cutting a batch in unequal parts changes nothing."""
    run = Run(replace(tiny_config, dropout=0.0))
    weights = {name: w.clone() for name, w in run.model.state_dict().items()}
    steps = []
    for parts in ([list(range(12))], [list(range(2)), list(range(2, 12))]):
        run.model.load_state_dict(weights)
        run.state.optimizer = make_optimizer(run.model, run.config, CPU)
        loss, norm, tokens, _ = run.step(*(run.train[part] for part in parts))
        steps.append((loss.item(), norm.item(), tokens))
    assert steps[0] == pytest.approx(steps[1], rel=1e-4)


def weights_of(path: Path) -> dict:
    return load_checkpoint(path)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def final_state(config: Config) -> dict:
    state = load_checkpoint(checkpoints(config)[-1])
    return {name: state[name] for name in ("model", "ema_model", "optimizer", "progress", "rng")}


@pytest.mark.parametrize(("accumulation", "workers"), [(1, 0), (4, 0), (1, 2), (4, 2)])
def test_a_run_interrupted_anywhere_ends_bit_identical(tiny_config, tmp_path, accumulation, workers):
    options = {"accumulation_steps": accumulation, "num_workers": workers, "batch_tokens": 512 // accumulation}
    whole = replace(tiny_config, run_dir=str(tmp_path / "whole"), **options)
    train_model(whole)
    broken = replace(whole, run_dir=str(tmp_path / "broken"))
    for max_steps in (3, 5, 9):  # in mid-epoch, more than once
        train_model(replace(broken, max_steps=max_steps, lr_schedule="constant"))
    # A schedule that does not depend on max_steps for both, then to the end.
    train_model(replace(broken, run_dir=str(tmp_path / "reference"), lr_schedule="constant"))
    train_model(replace(broken, lr_schedule="constant"))
    assert same(final_state(broken), final_state(replace(broken, run_dir=str(tmp_path / "reference"))))
    assert not same(final_state(broken)["model"], final_state(whole)["model"])  # the comparison can fail


def test_going_on_from_an_epoch_gives_the_same_next_epoch(tiny_config, tmp_path):
    train_model(tiny_config)
    end = final_state(tiny_config)
    train_model(replace(tiny_config, preload="0"))
    assert same(end, final_state(tiny_config))
    assert (path_of(tiny_config) / "set_aside" / "tmodel_01.pt").exists()


STATE = ["model", "ema_model", "optimizer", "progress.epoch", "progress.batch", "progress.step", "rng"]


@pytest.mark.parametrize("field", STATE)
def test_every_part_of_the_state_is_needed(tiny_config, field, monkeypatch):
    """Going on with one part as it was at the very start must end elsewhere, else the tests above prove nothing."""
    config = replace(tiny_config, lr_schedule="constant", ema_decay=0.9, warmup_steps=50)
    train_model(replace(config, max_steps=10))  # two steps into epoch 1
    shutil.copytree(path_of(config), path_of(config).with_name("halfway"))
    train_model(config)
    end = final_state(config)
    load_state_dict = TrainingState.load_state_dict

    def without(state, saved):
        new = {
            "model": state.model.state_dict(),
            "ema_model": state.ema_model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "progress": {"epoch": 0, "batch": 0, "step": 0},
            "rng": [rng_state()],
        }
        name, *inner = field.split(".")
        load_state_dict(state, {**saved, name: {**saved[name], inner[0]: new[name][inner[0]]} if inner else new[name]})

    halfway = replace(config, run_dir=str(path_of(config).with_name("halfway")))
    shutil.copytree(path_of(halfway), path_of(halfway).with_name("whole"))
    whole = replace(halfway, run_dir=str(path_of(halfway).with_name("whole")))
    train_model(whole)
    assert same(end, final_state(whole))
    monkeypatch.setattr(TrainingState, "load_state_dict", without)
    train_model(halfway)
    assert not same(end, final_state(halfway))


def test_no_part_of_the_state_is_untested(tiny_config):
    """The rest of the state is checked on going on, not used; other tests see each refuse what does not fit."""
    train_model(replace(tiny_config, max_steps=1, ema_decay=0.9))
    state = load_checkpoint(checkpoints(tiny_config)[-1])
    checked = {"schema", "name", "config", "corpus", "tokenizers"}
    assert set(state) - checked == {field.split(".")[0] for field in STATE}
    assert set(state["progress"]) == {field.split(".")[1] for field in STATE if field.startswith("progress")}


def test_saving_within_an_epoch_keeps_one_to_fall_back_on(tiny_config, monkeypatch):
    seen, save = [], t.save

    def watched(config, *others):
        save(config, *others)
        seen.append([file.name for file in checkpoints(config)])

    monkeypatch.setattr(t, "save", watched)
    train_model(replace(tiny_config, save_every_steps=3, num_epochs=1))
    assert seen[0] == ["tmodel_00_step_00000003.pt"]
    assert seen[1] == ["tmodel_00_step_00000003.pt", "tmodel_00_step_00000006.pt"]
    assert all(len(names) <= 2 for names in seen)
    assert seen[-1] == ["tmodel_00.pt"]


def test_a_finished_run_says_so(tiny_config, capsys):
    train_model(tiny_config)
    before = {p: p.stat().st_mtime_ns for p in checkpoints(tiny_config)}
    train_model(tiny_config)
    assert "nothing left to train: 2 epochs" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in checkpoints(tiny_config)}


def test_a_run_killed_before_its_validation_validates_first(tiny_config):
    train_model(tiny_config)
    scores = path_of(tiny_config) / "scores.jsonl"
    lines = scores.read_text().splitlines()
    scores.write_text(lines[0] + "\n")
    train_model(tiny_config)
    assert scores.read_text().splitlines() == lines


def test_settings_that_cannot_change_are_listed(tiny_config):
    train_model(tiny_config)
    with pytest.raises(InputError, match=r"d_ff 64 there, 96 now; seq_len|seq_len.*d_ff 64 there, 96 now"):
        train_model(replace(tiny_config, d_ff=96, seq_len=32))
    with pytest.raises(InputError, match=r"tmodel_07\.pt; available: tmodel_00\.pt, tmodel_01\.pt"):
        train_model(replace(tiny_config, preload="7"))


def test_a_changed_corpus_is_noticed(tiny_config):
    train_model(tiny_config)
    path = Path(tiny_config.datasource)
    path.write_text("".join(path.read_text(encoding="utf8").splitlines(keepends=True)[:-20]), encoding="utf8")
    with pytest.raises(InputError, match="the corpus has changed since"):
        train_model(replace(tiny_config, num_epochs=3))


def test_training_afresh_sets_the_old_run_aside(tiny_config, capsys):
    train_model(tiny_config)
    train_model(replace(tiny_config, preload="none", d_ff=96, num_epochs=1))
    assert "the files of an earlier run were moved to" in capsys.readouterr().out
    assert [p.name for p in checkpoints(tiny_config)] == ["tmodel_00.pt"]
    aside = {path.name for path in (path_of(tiny_config) / "set_aside").iterdir()}
    assert aside == {"tmodel_00.pt", "tmodel_01.pt", "scores.jsonl"}
    with pytest.raises(InputError, match=r"none\.tsv"):  # bad input moves nothing
        train_model(replace(tiny_config, preload="none", datasource="none.tsv"))
    assert [p.name for p in checkpoints(tiny_config)] == ["tmodel_00.pt"]
    assert translated(tiny_config)


def translated(config: Config) -> bool:
    return len(Translator.load(path_of(config), "cpu").translate(["She sleeps."])) == 1


def test_a_second_trainer_is_refused(tiny_config):
    path_of(tiny_config).mkdir()
    with RunFolder.of(tiny_config).locked(), pytest.raises(InputError, match="another process is training"):
        train_model(tiny_config)
    train_model(replace(tiny_config, max_steps=1))


def test_other_tokenizers_are_refused(tiny_config):
    train_model(tiny_config)
    path = path_of(tiny_config) / "tokenizer_it.json"
    path.write_text(path.read_text(encoding="utf8").replace('"[EOS]": 3', '"[EOS]": 4'), encoding="utf8")
    for use in (
        lambda: train_model(replace(tiny_config, num_epochs=3)),
        lambda: Translator.load(path_of(tiny_config), "cpu"),
    ):
        with pytest.raises(InputError, match=r"tokenizer_it\.json is not"):
            use()


def test_a_damaged_epoch_asked_for_is_named(tiny_config):
    train_model(tiny_config)
    Path(checkpoints(tiny_config)[0]).write_bytes(b"")
    with pytest.raises(InputError, match=r"tmodel_00\.pt is damaged"):
        train_model(replace(tiny_config, preload="0"))


def test_new_optimizer_settings_hold_after_going_on(tiny_config):
    train_model(tiny_config)
    optimizer = train_model(replace(tiny_config, weight_decay=0.5, adam_beta2=0.9)).optimizer
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.9)
    assert optimizer.state


def test_pairs_in_both_training_and_validation_are_said(tiny_config, capsys):
    train_model(replace(tiny_config, validation_source=tiny_config.datasource, max_steps=1))
    assert "validation pairs that are also in the training set" in capsys.readouterr().err


def test_a_trained_model_is_ready_to_translate(tiny_config):
    assert not train_model(tiny_config).model.training
    assert not train_model(tiny_config).model.training  # also where nothing was left to train


def test_curves_survive_a_resume(tiny_config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_model(tiny_config)
    train_model(replace(tiny_config, num_epochs=3))
    events = EventAccumulator(str(path_of(tiny_config) / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("validation/loss")) == 3


def test_a_loss_that_is_not_finite_stops_before_the_step(tiny_config):
    run = Run(tiny_config)
    with torch.no_grad():
        run.model.encoder.norm.weight[0] = float("inf")
    before = {name: w.clone() for name, w in run.model.state_dict().items()}
    for is_fused in (True, False):
        run.state.optimizer = torch.optim.AdamW(run.model.parameters(), fused=is_fused)
        log = TrainingLog(RunFolder.of(tiny_config), step=0)
        log.add(7, run.step(run.train[[0, 1]]))
        with pytest.raises(InputError, match=r"at step 7, in the batch that begins with .*the step was skipped"):
            log.check_finite()
        assert all(torch.equal(w, before[name]) for name, w in run.model.state_dict().items())


def test_training_stops_at_the_first_loss_that_is_not_finite(tiny_config, monkeypatch):
    steps, train_step = [], t.train_step

    def diverging(*arguments):
        report = train_step(*arguments)
        steps.append(report)
        return report._replace(loss=report.loss * math.nan) if len(steps) == 3 else report

    monkeypatch.setattr(t, "train_step", diverging)
    with pytest.raises(InputError, match=r"loss nan .* at step 2"):
        train_model(tiny_config)
    assert len(steps) == 3


def test_an_asynchronous_device_is_not_made_to_wait_and_a_bad_step_is_found_before_the_next_save(
    tiny_config, monkeypatch
):
    """As on a GPU: the bad step leaves the weights as they are, training continues, and the next save reports it."""
    steps, train_step = [], t.train_step

    def with_one_bad_step(state, loss_module, *others):
        before = {name: w.clone() for name, w in state.model.state_dict().items()}
        is_bad = len(steps) == 1
        report = train_step(state, (lambda inputs: loss_module(inputs) * math.nan) if is_bad else loss_module, *others)
        steps.append(all(torch.equal(w, before[name]) for name, w in state.model.state_dict().items()))
        return report

    monkeypatch.setattr(t, "runs_asynchronously", lambda device: True)
    monkeypatch.setattr(t, "train_step", with_one_bad_step)
    with pytest.raises(InputError, match=r"loss nan .* at step 1, .*the step was skipped"):
        train_model(replace(tiny_config, save_every_steps=3))
    assert steps == [False, True, False]
    assert not checkpoints(tiny_config)


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tiny_config):
    path_of(tiny_config).mkdir()
    path_of(tiny_config).chmod(0o500)
    with pytest.raises(InputError, match="cannot write into"):
        train_model(tiny_config)


def flags(config: Config) -> list[str]:
    values = {f"--{k.replace('_', '-')}": v for k, v in vars(config).items() if not isinstance(v, bool)}
    sharing = "--shared-vocab" if config.shared_vocab else "--no-shared-vocab"
    return [word for flag, value in values.items() for word in (flag, str(value))] + [sharing]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(tiny_config, tmp_path, number):
    config = replace(tiny_config, num_epochs=60)
    command = [sys.executable, "-u", str(ROOT / "train.py"), *flags(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while "Epoch 00" not in process.stderr.readline():
        pass
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "saving after this step" in errors
    state = load_checkpoint(checkpoints(config)[-1])
    step = state["progress"]["step"]
    assert step > 0
    again = subprocess.run([*command, "--max-steps", str(step + 1)], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"step {step:,}" in again.stdout
    assert "python translate.py --run-dir" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--datasource", "none.tsv"], "no file none.tsv"),
        ([], "Helsinki-NLP/opus_books"),
        (["--preset", "toy", "--d-model", "100", "--num-heads", "8"], "d_model is 100; give a multiple of num_heads"),
        (["--preset", "toy", "--lang-tgt", "fr"], "no language 'fr'; it has en, it, de"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_run(tmp_path, arguments, words):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_the_best_epoch_translates_and_the_last_few_and_it_are_kept(tiny_config, monkeypatch):
    merits = iter([10.0, 30.0, 30.0, 20.0, 25.0, 5.0])
    monkeypatch.setattr(t, "score", lambda *_: {"bleu": next(merits)})
    config = replace(tiny_config, num_epochs=6, keep_checkpoints=2, best_by="bleu")
    train_model(config)
    assert [p.name for p in checkpoints(config)] == ["tmodel_02.pt", "tmodel_04.pt", "tmodel_05.pt"]
    best = load_checkpoint(path_of(config) / "tmodel_02.pt")["model"]
    latest = load_checkpoint(path_of(config) / "tmodel_05.pt")["model"]
    assert same(dict(Translator.load(path_of(config), "cpu").model.state_dict()), best)
    assert same(dict(Translator.load(path_of(config), "cpu", "latest").model.state_dict()), latest)
    assert same(dict(Translator.load(path_of(config), "cpu", "5").model.state_dict()), latest)
    two = Translator.load(path_of(config), "cpu", "latest", average=2).model.state_dict()
    before = load_checkpoint(path_of(config) / "tmodel_04.pt")["model"]
    assert all(torch.allclose(two[name], (latest[name] + before[name]) / 2) for name in two)
    best_two = Translator.load(path_of(config), "cpu", average=2).model.state_dict()
    assert all(torch.allclose(best_two[name], (best[name] + before[name]) / 2) for name in best_two)


def test_a_damaged_best_is_passed_over(tiny_config, capsys):
    train_model(tiny_config)
    best, other = RunFolder.of(tiny_config).best_first(tiny_config.best_by)
    best.write_bytes(best.read_bytes()[:-1])
    weights = Translator.load(path_of(tiny_config), "cpu").model.state_dict()
    assert same(dict(weights), load_checkpoint(other)["model"])
    assert f"{best} is skipped" in capsys.readouterr().err


def test_patience_ends_the_run_and_the_same_command_says_so(tiny_config, monkeypatch, capsys):
    merits = [10.0, 30.0, 20.0, 30.0, 40.0]
    calls = iter(merits)
    monkeypatch.setattr(t, "score", lambda *_: {"bleu": next(calls)})
    config = replace(tiny_config, num_epochs=5, patience=2, best_by="bleu")
    assert train_model(config).progress.epoch == 4
    assert "no better validation score for 2 epochs" in capsys.readouterr().out
    train_model(config)
    assert "nothing left to train: 4 epochs" in capsys.readouterr().out
    assert train_model(replace(config, patience=3)).progress.epoch == 5
    assert [row["bleu"] for row in RunFolder.of(config).read_scores()] == merits


def test_where_some_epochs_were_not_scored_the_loss_decides(tiny_config):
    config = replace(tiny_config, best_by="bleu")
    train_model(replace(config, num_epochs=1))
    train_model(replace(config, num_epochs=3, validation_sentences=0, patience=1))
    rows = RunFolder.of(tiny_config).read_scores()
    assert len(rows) == 3  # the loss still falls
    lowest = min(rows, key=lambda row: row["loss"])["epoch"] - 1
    assert RunFolder.of(config).best_first(config.best_by)[0].name == f"tmodel_{lowest:02d}.pt"


def test_scores_without_their_checkpoints_are_set_aside(tiny_config, capsys):
    train_model(tiny_config)
    for path in checkpoints(tiny_config):
        path.unlink()
    train_model(replace(tiny_config, patience=1))
    assert "training from scratch: the files of an earlier run were moved" in capsys.readouterr().out
    assert len(RunFolder.of(tiny_config).read_scores()) == 2


def test_the_checkpoint_just_written_stays_beside_damaged_later_ones(tiny_config):
    folder = RunFolder.of(tiny_config)
    folder.path.mkdir()
    names = [f"tmodel_00_step_{step:08d}.pt" for step in (3, 6, 9)]
    for name in names:
        (folder.path / name).write_bytes(b"damaged")
    path = folder.save({"progress": {"epoch": 0, "batch": 4, "step": 4}})
    assert path.name == "tmodel_00_step_00000004.pt"
    assert load_checkpoint(path)["progress"]["step"] == 4


def test_the_best_by_loss_is_the_lowest(tiny_config):
    train_model(replace(tiny_config, best_by="loss", validation_sentences=0))
    rows = RunFolder.of(tiny_config).read_scores()
    lowest = min(rows, key=lambda row: row["loss"])["epoch"] - 1
    assert RunFolder.of(tiny_config).best_first("loss")[0].name == f"tmodel_{lowest:02d}.pt"


def test_the_ema_is_the_weighted_sum_of_all_weights_since_the_start_and_translates(tiny_config):
    """In closed form: after n steps, w_0 and each w_i after it weigh (1 - d_i) times the product of the later d_j."""
    run = Run(replace(tiny_config, ema_decay=0.15))
    weights = [torch.nn.utils.parameters_to_vector(run.model.parameters()).detach().clone()]
    for step in range(5):
        run.state.progress.step = step
        run.step(run.train[[0, 1, 2]])
        weights.append(torch.nn.utils.parameters_to_vector(run.model.parameters()).detach().clone())
    decays = [0.1, 0.15, 0.15, 0.15, 0.15]  # (1 + step) / (10 + step) until that exceeds ema_decay
    shares = [math.prod(decays)] + [(1 - decays[i]) * math.prod(decays[i + 1 :]) for i in range(5)]
    assert sum(shares) == pytest.approx(1)
    expected = sum(share * w for share, w in zip(shares, weights, strict=True))
    average = torch.nn.utils.parameters_to_vector(run.translator.model.parameters())
    assert torch.allclose(average, expected, atol=1e-6)
    assert not torch.allclose(average, weights[-1], atol=1e-4)
    assert not torch.allclose(average, weights[0], atol=1e-4)
    assert not any(w.requires_grad for w in run.translator.model.parameters())
    saved = run.state.state_dict()
    assert same(saved["ema_model"], dict(run.translator.model.state_dict()))
    assert same(saved["model"], dict(run.model.state_dict()))


def test_every_regulariser_resumes_bit_identical(tiny_config, tmp_path):
    bpe = {"tokenizer": "bpe", "vocab_size": 400, "bpe_dropout": 0.2, "rdrop_alpha": 1.0, "ema_decay": 0.9}
    whole = replace(tiny_config, run_dir=str(tmp_path / "whole"), lr_schedule="constant", **bpe)
    train_model(whole)
    broken = replace(whole, run_dir=str(tmp_path / "broken"))
    train_model(replace(broken, max_steps=4))
    train_model(broken)
    assert same(final_state(broken), final_state(whole))


def test_rdrop_is_the_loss_where_nothing_is_dropped_and_more_where_it_is(tiny_config):
    run = Run(replace(tiny_config, rdrop_alpha=5.0))
    inputs = LossInputs.of(run.train[[0, 1, 2, 3]], CPU)
    plain = TrainingLoss(run.model, run.config.label_smoothing)
    assert run.loss_module(inputs).item() > plain(inputs).item() * 1.001
    for module in run.model.modules():
        if isinstance(module, Dropout):
            module.p = 0.0
    assert run.loss_module(inputs).item() == pytest.approx(plain(inputs).item(), rel=1e-5)


def test_rdrop_is_equation_4_halved():
    """By hand, on a model that knows two answers: one for each of the two passes."""
    logits = torch.randn(2, 3, 10, dtype=torch.double)

    class TwoAnswers:
        def hidden(self, encoder_input, *_):
            assert len(encoder_input) == 2  # one sentence, twice
            return logits

        def project(self, x):
            return x

    batch = [torch.zeros(1, 3)] * 4
    label, eps, alpha = torch.tensor([4, 5, 6]), 0.1, 3.0
    p, q = logits.float().softmax(-1)
    losses = [torch.nn.functional.cross_entropy(z.float(), label, label_smoothing=eps, reduction="sum") for z in logits]
    divergences = (p * (p / q).log()).sum() + (q * (q / p).log()).sum()
    expected = (losses[0] + losses[1] + alpha / 2 * divergences) / 2
    assert torch.allclose(rdrop(TwoAnswers(), LossInputs(*batch, torch.arange(3), label), eps, alpha), expected)


def test_a_machine_that_vanished_is_taken_up_from_the_mirror(tiny_config, tmp_path, capsys):
    (tmp_path / "drive").mkdir()
    config = replace(tiny_config, mirror_dir=str(tmp_path / "drive" / "run"), save_every_steps=3)
    train_model(replace(config, num_epochs=1, lr_schedule="constant"))
    shutil.rmtree(path_of(config))
    train_model(config)
    assert "restored from" in capsys.readouterr().out
    assert len(RunFolder(tmp_path / "drive" / "run").read_scores()) == 2
    assert [p.name for p in checkpoints(config.mirror_dir)] == ["tmodel_00.pt", "tmodel_01.pt"]
    with pytest.raises(InputError, match="mount the Drive first"):
        train_model(replace(config, run_dir=str(tmp_path / "new"), mirror_dir=str(tmp_path / "gone" / "run")))
    assert not (tmp_path / "new").exists()
