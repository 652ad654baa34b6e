"""Training: the learning rate, single steps, whole runs, resuming, early stopping, errors, signals, R-Drop and EMA."""

import contextlib
import errno
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
from conftest import ROOT, checkpoints, run_path

import train
from compute.device import LossScaler
from compute.ops import Dropout, fused_loss
from config import Config, InputError, get_config
from dataset import get_ds
from runs.checkpoint import load_checkpoint
from runs.folder import RunFolder
from train import count_steps, learning_rate, print_next_steps, train_model
from training.batches import StepBatches
from training.log import StepReport, TrainingLog
from training.losses import LossInputs, TrainingLoss
from training.state import TrainingState, make_optimizer, rng_state
from translate import Translator

CPU = torch.device("cpu")
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class ManualRun:
    """A new run of a config whose steps are made by calling `step`, not by the training loop."""

    def __init__(self, config: Config):
        self.config = config
        self.train, self.validation, *tokenizers = get_ds(config)
        self.state = TrainingState.create(config, *(tokenizer.get_vocab_size() for tokenizer in tokenizers), CPU)
        self.model = self.state.model.train()
        self.loss_module = TrainingLoss(self.model, config.label_smoothing, config.rdrop_alpha)
        self.translator = Translator(self.state.evaluated_model, config, *tokenizers)

    def step(self, *batches: dict) -> StepReport:
        rate = learning_rate(self.state.progress.step, self.config, count_steps(self.config, self.train))
        return train.train_step(self.state, self.loss_module, StepBatches(list(batches), 0, 1), rate, self.config)


def test_learning_rates_follow_the_warmup_and_the_schedule():
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


@pytest.mark.slow
def test_one_epoch_on_the_toy_corpus_translates_held_out_sentences(trained_run):
    """End to end. One epoch reaches a BLEU of about 90; the floor is far below that."""
    (scores,) = RunFolder(trained_run).read_scores()
    assert scores["bleu"] > 50
    assert scores["loss"] < 1
    names = {path.name for path in trained_run.iterdir() if not path.name.startswith(".")}
    assert names == {
        "config.json",
        "run_id",
        "scores.jsonl",
        "tensorboard",
        "tmodel_00.pt",
        "tokenizer_en.json",
        "tokenizer_it.json",
    }


@pytest.mark.slow
def test_tensorboard_has_all_curves(trained_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained_run / "tensorboard"))
    events.Reload()
    curves = {"train/loss", "train/lr", "train/tokens_per_second", "train/gradient_norm"}
    curves |= {f"validation/{name}" for name in ("loss", "bleu", "chrf", "cer", "wer", "exact")}
    assert curves <= set(events.Tags()["scalars"])
    assert "validation/samples/text_summary" in events.Tags()["tensors"]


@pytest.mark.slow
def test_a_model_overfits_twelve_pairs(tmp_path, pairs_file):
    """The loss approaches its minimum, the entropy of the smoothed targets."""
    lines = pairs_file.read_text(encoding="utf8").splitlines(keepends=True)[:12]
    (tmp_path / "twelve.tsv").write_text("".join(lines), encoding="utf8")
    source = str(tmp_path / "twelve.tsv")
    model = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "tokenizer": "bpe", "vocab_size": 400}
    steps = {"num_epochs": 120, "warmup_steps": 20, "lr": 5e-3, "batch_tokens": 4096, "device": "cpu"}
    config = get_config(
        "toy", run_dir=str(tmp_path / "run"), datasource=source, validation_source=source, **model, **steps
    )
    run = ManualRun(config)
    batch = run.train[list(range(12))]
    losses = []
    for step in range(count_steps(config, run.train)):
        run.state.progress.step = step
        losses.append(run.step(batch).loss.item())
    V = run.translator.tokenizer_tgt.get_vocab_size()
    eps = config.label_smoothing
    minimum = -((1 - eps + eps / V) * math.log(1 - eps + eps / V) + (V - 1) * eps / V * math.log(eps / V))
    assert minimum - 1e-3 < losses[-1] < minimum + 0.1 < losses[0]
    run.model.eval()
    assert run.translator.translate(batch["src_text"]) == batch["tgt_text"]


def test_accumulated_batches_of_unequal_size_give_the_same_step_as_one_batch(tiny_config):
    """The loss is the mean over the tokens of the whole step, not a mean of the means of its batches."""
    run = ManualRun(replace(tiny_config, dropout=0.0))
    weights = {name: w.clone() for name, w in run.model.state_dict().items()}
    steps = []
    for parts in ([list(range(12))], [list(range(2)), list(range(2, 12))]):
        run.model.load_state_dict(weights)
        run.state.optimizer = make_optimizer(run.model, run.config, CPU)
        loss, norm, tokens, _ = run.step(*(run.train[part] for part in parts))
        steps.append((loss.item(), norm.item(), tokens))
    assert steps[0] == pytest.approx(steps[1], rel=1e-4)


@pytest.mark.parametrize("clip_norm", [0.0, 0.01])
def test_a_step_uses_the_given_learning_rate_and_clips_the_gradient(tiny_config, clip_norm):
    run = ManualRun(replace(tiny_config, clip_norm=clip_norm, lr=1.0, warmup_steps=4))
    norms, rates = [], []

    def observe(optimizer, *_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        rates.extend(group["lr"] for group in optimizer.param_groups)

    run.state.optimizer.register_step_pre_hook(observe)
    report = run.step(run.train[[0, 1, 2]])
    assert report.gradient_norm.item() > 0.01  # before clipping
    assert norms == [pytest.approx(clip_norm or report.gradient_norm.item(), rel=1e-3)]
    assert rates == [0.25, 0.25]


def test_weight_decay_applies_to_matrices_only(tiny_config):
    run = ManualRun(replace(tiny_config, weight_decay=0.5))
    decay = {id(p): group["weight_decay"] for group in run.state.optimizer.param_groups for p in group["params"]}
    for name, parameter in run.model.named_parameters():
        is_vector = name.endswith("bias") or ".norm." in name
        assert decay[id(parameter)] == (0.0 if is_vector else 0.5), name


def test_labels_are_smoothed_in_training_but_not_in_validation(tiny_config, monkeypatch):
    smoothing: dict[bool, set[float]] = {True: set(), False: set()}  # by whether gradients are computed

    def observe(x, projection, label, label_smoothing):
        smoothing[torch.is_grad_enabled()].add(label_smoothing)
        return fused_loss(x, projection, label, label_smoothing)

    monkeypatch.setattr("training.losses.fused_loss", observe)
    train_model(replace(tiny_config, label_smoothing=0.3, num_epochs=1))
    assert smoothing == {True: {0.3}, False: {0.0}}


def is_identical(a, b) -> bool:
    """Whether two nested states are bit-identical."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_identical(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(is_identical, a, b))
    return a == b


def final_state(config: Config) -> dict:
    """What changes while training, from the last checkpoint of a run."""
    state = load_checkpoint(checkpoints(config)[-1])
    return {name: state[name] for name in ("model", "ema_model", "optimizer", "scaler", "progress", "rng")}


@pytest.mark.slow
@pytest.mark.parametrize(("accumulation", "workers"), [(1, 0), (4, 0), (1, 2), (4, 2)])
def test_an_interrupted_run_ends_bit_identical_to_an_uninterrupted_one(tiny_config, tmp_path, accumulation, workers):
    options = {"accumulation_steps": accumulation, "num_workers": workers, "batch_tokens": 512 // accumulation}
    cosine = replace(tiny_config, run_dir=str(tmp_path / "cosine"), **options)
    # The cosine schedule depends on max_steps, the constant one does not.
    uninterrupted = replace(cosine, run_dir=str(tmp_path / "uninterrupted"), lr_schedule="constant")
    interrupted = replace(uninterrupted, run_dir=str(tmp_path / "interrupted"))
    for max_steps in (3, 5, 9):  # within an epoch, more than once
        train_model(replace(interrupted, max_steps=max_steps))
    for config in (interrupted, uninterrupted, cosine):
        train_model(config)
    assert is_identical(final_state(interrupted), final_state(uninterrupted))
    assert not is_identical(final_state(interrupted)["model"], final_state(cosine)["model"])  # the comparison can fail


def test_resuming_from_an_earlier_epoch_repeats_the_next_epoch_bit_identically(tiny_config, tmp_path):
    train_model(tiny_config)
    end = final_state(tiny_config)
    train_model(replace(tiny_config, preload="0"))
    assert is_identical(end, final_state(tiny_config))
    assert (run_path(tiny_config) / "set_aside" / "tmodel_01.pt").exists()


STATE = ["model", "ema_model", "optimizer", "progress.epoch", "progress.batch", "progress.step", "rng"]


@pytest.mark.slow
@pytest.mark.parametrize("field", STATE)
def test_without_any_one_part_of_the_state_a_resumed_run_ends_differently(tiny_config, field, monkeypatch):
    """With one part as in a new run, the result must differ; otherwise the tests above prove nothing."""
    config = replace(tiny_config, lr_schedule="constant", ema_decay=0.9, warmup_steps=50)
    train_model(replace(config, max_steps=10))  # two steps into epoch 1
    partly_restored = replace(config, run_dir=str(run_path(config).with_name("partly_restored")))
    restored = replace(config, run_dir=str(run_path(config).with_name("restored")))
    for copy in (partly_restored, restored):
        shutil.copytree(run_path(config), run_path(copy))
    train_model(config)
    train_model(restored)
    assert is_identical(final_state(config), final_state(restored))
    load_state_dict = TrainingState.load_state_dict

    def load_without_field(state, saved):
        new = {
            "model": state.model.state_dict(),
            "ema_model": state.ema_model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "progress": {"epoch": 0, "batch": 0, "step": 0},
            "rng": [rng_state()],
        }
        name, *inner = field.split(".")
        load_state_dict(state, {**saved, name: {**saved[name], inner[0]: new[name][inner[0]]} if inner else new[name]})

    monkeypatch.setattr(TrainingState, "load_state_dict", load_without_field)
    train_model(partly_restored)
    assert not is_identical(final_state(config), final_state(partly_restored))


def test_the_parts_above_are_all_that_a_checkpoint_restores(tiny_config):
    """The other parts are only compared when a run resumes; other tests change each of them."""
    train_model(replace(tiny_config, max_steps=1, ema_decay=0.9))
    state = load_checkpoint(checkpoints(tiny_config)[-1])
    compared = {"schema", "name", "config", "corpus", "validation", "tokenizers", "run_id"}
    others = {"scaler", "batches_per_step"}  # used in fp16 only, and with another number of processes
    assert set(state) - compared == others | {field.split(".")[0] for field in STATE}
    assert set(state["progress"]) == {field.split(".")[1] for field in STATE if field.startswith("progress")}


def test_of_the_checkpoints_within_an_epoch_the_last_two_are_kept(tiny_config, monkeypatch):
    names_after_save, save = [], train.save

    def save_and_list(config, *others):
        save(config, *others)
        names_after_save.append([file.name for file in checkpoints(config)])

    monkeypatch.setattr(train, "save", save_and_list)
    train_model(replace(tiny_config, save_every_steps=3, num_epochs=1))
    assert names_after_save[0] == ["tmodel_00_step_00000003.pt"]
    assert names_after_save[1] == ["tmodel_00_step_00000003.pt", "tmodel_00_step_00000006.pt"]
    assert all(len(names) <= 2 for names in names_after_save)
    assert names_after_save[-1] == ["tmodel_00.pt"]


def test_a_finished_run_is_reported_and_left_unchanged(tiny_config, capsys):
    train_model(tiny_config)
    modified = {p: p.stat().st_mtime_ns for p in checkpoints(tiny_config)}
    train_model(tiny_config)
    assert "nothing left to train: 2 epochs" in capsys.readouterr().out
    assert modified == {p: p.stat().st_mtime_ns for p in checkpoints(tiny_config)}


def test_a_run_killed_before_validation_validates_when_it_resumes(tiny_config):
    train_model(tiny_config)
    scores = run_path(tiny_config) / "scores.jsonl"
    lines = scores.read_text().splitlines()
    scores.write_text(lines[0] + "\n")
    train_model(tiny_config)
    assert scores.read_text().splitlines() == lines


def test_a_run_killed_before_its_last_validation_within_an_epoch_validates_when_it_resumes(tiny_config):
    config = replace(tiny_config, max_steps=3)
    train_model(config)
    scores = run_path(config) / "scores.jsonl"
    lines = scores.read_text().splitlines()
    assert json.loads(lines[-1])["batch"] > 0
    scores.write_text("".join(f"{line}\n" for line in lines[:-1]))
    train_model(config)
    assert scores.read_text().splitlines() == lines


def test_settings_that_differ_from_the_checkpoint_are_listed(tiny_config):
    train_model(tiny_config)
    with pytest.raises(InputError, match="settings: seq_len 64 there, 32 now; d_ff 64 there, 96 now; give"):
        train_model(replace(tiny_config, d_ff=96, seq_len=32))
    with pytest.raises(InputError, match=r"tmodel_07\.pt; available: tmodel_00\.pt, tmodel_01\.pt"):
        train_model(replace(tiny_config, preload="7"))


def test_a_run_does_not_resume_on_a_changed_corpus(tiny_config):
    train_model(tiny_config)
    path = Path(tiny_config.datasource)
    path.write_text("".join(path.read_text(encoding="utf8").splitlines(keepends=True)[:-20]), encoding="utf8")
    with pytest.raises(InputError, match="the corpus has changed since"):
        train_model(replace(tiny_config, num_epochs=3))


def test_training_from_scratch_moves_the_files_of_the_earlier_run(tiny_config, capsys):
    train_model(tiny_config)
    train_model(replace(tiny_config, preload="none", d_ff=96, num_epochs=1))
    assert "the files of an earlier run were moved to" in capsys.readouterr().out
    assert [p.name for p in checkpoints(tiny_config)] == ["tmodel_00.pt"]
    moved = {path.name for path in (run_path(tiny_config) / "set_aside").iterdir()}
    others = {"config.json", "run_id", "tokenizer_en.json", "tokenizer_it.json"}
    assert moved == {"tmodel_00.pt", "tmodel_01.pt", "scores.jsonl"} | others
    with pytest.raises(InputError, match=r"none\.tsv"):  # bad input moves no files
        train_model(replace(tiny_config, preload="none", datasource="none.tsv"))
    assert [p.name for p in checkpoints(tiny_config)] == ["tmodel_00.pt"]
    assert len(Translator.load(run_path(tiny_config), "cpu").translate(["She sleeps."])) == 1


def test_a_second_process_cannot_train_in_the_same_folder(tiny_config):
    run_path(tiny_config).mkdir()
    with RunFolder.of(tiny_config).locked(), pytest.raises(InputError, match="another process is training"):
        train_model(tiny_config)
    train_model(replace(tiny_config, max_steps=1))


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_gives_a_warning(code, tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(code, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunFolder(tmp_path).locked():
        assert f"warning: no lock on {tmp_path} ([Errno {code}] No locks available)" in capsys.readouterr().err


def test_a_lock_that_is_a_symbolic_link_is_not_followed(tmp_path):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf8")
    (tmp_path / ".lock").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(OSError, match=r"\.lock"), RunFolder(tmp_path).locked():
        pass
    assert (tmp_path / "mine.txt").read_text(encoding="utf8") == "mine"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked on Linux only")
def test_a_killed_process_leaves_no_lock_to_its_workers(tmp_path):
    """Data loader workers notice only after seconds that the training process has been killed."""
    code = f"""
import os, signal, time
from runs.folder import RunFolder
with RunFolder({str(tmp_path)!r}).locked():
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    assert process.wait(timeout=60) == -signal.SIGKILL
    try:
        with RunFolder(tmp_path).locked():
            os.killpg(process.pid, 0)  # the worker still runs
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_tokenizers_other_than_those_of_the_checkpoint_are_rejected(tiny_config):
    train_model(tiny_config)
    path = run_path(tiny_config) / "tokenizer_it.json"
    path.write_text(path.read_text(encoding="utf8").replace('"[EOS]": 3', '"[EOS]": 4'), encoding="utf8")
    with pytest.raises(InputError, match=r"tokenizer_it\.json is not"):
        train_model(replace(tiny_config, num_epochs=3))
    with pytest.raises(InputError, match=r"tokenizer_it\.json is not"):
        Translator.load(run_path(tiny_config), "cpu")


def test_a_requested_checkpoint_that_is_damaged_is_an_error(tiny_config):
    train_model(tiny_config)
    Path(checkpoints(tiny_config)[0]).write_bytes(b"")
    with pytest.raises(InputError, match=r"tmodel_00\.pt is damaged"):
        train_model(replace(tiny_config, preload="0"))


def test_new_optimizer_settings_take_effect_when_a_run_resumes(tiny_config):
    train_model(tiny_config)
    optimizer = train_model(replace(tiny_config, weight_decay=0.5, adam_beta2=0.9)).optimizer
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.9)
    assert optimizer.state


def test_a_warning_counts_the_pairs_in_both_training_and_validation_set(tiny_config, capsys):
    train_model(replace(tiny_config, validation_source=tiny_config.datasource, max_steps=1))
    assert "validation pairs that are also in the training set" in capsys.readouterr().err


def test_a_trained_model_is_in_evaluation_mode(tiny_config):
    assert not train_model(tiny_config).model.training
    assert not train_model(tiny_config).model.training  # also if nothing was left to train


def test_a_resumed_run_continues_its_curves(tiny_config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_model(tiny_config)
    train_model(replace(tiny_config, num_epochs=3))
    events = EventAccumulator(str(run_path(tiny_config) / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("validation/loss")) == 3


def test_a_step_whose_loss_is_not_finite_is_skipped_and_reported(tiny_config):
    run = ManualRun(tiny_config)
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
    steps, train_step = [], train.train_step

    def diverging(*arguments):
        report = train_step(*arguments)
        steps.append(report)
        return report._replace(loss=report.loss * math.nan) if len(steps) == 3 else report

    monkeypatch.setattr(train, "train_step", diverging)
    with pytest.raises(InputError, match=r"loss nan .* at step 2"):
        train_model(tiny_config)
    assert len(steps) == 3


def test_an_asynchronous_device_reports_a_loss_that_is_not_finite_before_the_next_save(tiny_config, monkeypatch):
    """As on a GPU: that step leaves the weights unchanged, training continues, and the next save reports it."""
    is_unchanged, train_step = [], train.train_step

    def step_with_nan_once(state, loss_module, *others):
        before = {name: w.clone() for name, w in state.model.state_dict().items()}
        is_bad = len(is_unchanged) == 1
        report = train_step(state, (lambda inputs: loss_module(inputs) * math.nan) if is_bad else loss_module, *others)
        is_unchanged.append(all(torch.equal(w, before[name]) for name, w in state.model.state_dict().items()))
        return report

    monkeypatch.setattr(train, "runs_asynchronously", lambda device: True)
    monkeypatch.setattr(train, "train_step", step_with_nan_once)
    with pytest.raises(InputError, match=r"loss nan .* at step 1, .*the step was skipped"):
        train_model(replace(tiny_config, save_every_steps=3))
    assert is_unchanged == [False, True, False]
    assert not checkpoints(tiny_config)


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root can write anywhere")
def test_a_folder_without_write_permission_is_an_error(tiny_config):
    run_path(tiny_config).mkdir()
    run_path(tiny_config).chmod(0o500)
    with pytest.raises(InputError, match="cannot write into"):
        train_model(tiny_config)


def flags_of(config: Config) -> list[str]:
    """The command line of train.py that gives this config."""
    words = []
    for name, value in vars(config).items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def test_the_hint_for_resuming_names_the_flags_that_are_not_saved(tiny_config, capsys):
    config = replace(tiny_config, device="auto", mirror_dir="/drive/run", shard=True, preload="none", num_epochs=60)
    print_next_steps(config, signal.SIGINT)
    command = f"python train.py --run-dir {config.run_dir} --mirror-dir /drive/run --shard\n"
    assert capsys.readouterr().err.endswith(command)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_a_checkpoint_and_the_same_command_resumes(tiny_config, tmp_path, number):
    config = replace(tiny_config, num_epochs=60)
    command = [sys.executable, "-u", str(ROOT / "train.py"), *flags_of(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert any("Epoch 00" in line for line in iter(process.stdout.readline, ""))  # training has begun
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "saving after this step" in errors
    state = load_checkpoint(checkpoints(config)[-1])
    step = state["progress"]["step"]
    assert step > 0
    resumed = subprocess.run([*command, "--max-steps", str(step + 1)], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert f"step {step:,}" in resumed.stdout
    assert "python translate.py --run-dir" in resumed.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="terminals of Unix")
def test_closing_the_terminal_saves_a_checkpoint(tiny_config):
    config = replace(tiny_config, num_epochs=60)
    terminal, end_of_process = os.openpty()
    command = [sys.executable, "-c", "import os; os.login_tty(0); import train; train.run_command(train.main)"]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), end_of_process)
    process = subprocess.Popen([*command, *flags_of(config)], cwd=ROOT, start_new_session=False, **streams)
    os.close(end_of_process)
    with os.fdopen(terminal, "rb", buffering=0) as output:
        shown = b""
        while b"validation   loss" not in shown:  # the first of 60
            shown += output.read(1_000)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert load_checkpoint(checkpoints(config)[-1])["progress"]["step"] > 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_ctrl_c_saves_while_workers_start(tiny_config, method):
    """In a terminal, Ctrl-C also reaches the workers. Those that are not forked take seconds to start."""
    config = replace(tiny_config, num_epochs=60, num_workers=2)
    code = f"""
import dataset, train
from training import batches
def starting_workers(original=batches.starting_workers):
    print("starting workers", flush=True)
    return original()
dataset.START_METHOD, batches.starting_workers = {method!r}, starting_workers
train.run_command(train.main)
"""
    command = [sys.executable, "-c", code, *flags_of(config)]
    streams = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf8"}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams) as process:
        assert any("starting workers" in line for line in iter(process.stdout.readline, ""))
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate()
    assert "saving after this step" in errors
    assert "Traceback" not in errors
    assert process.returncode == 130, errors
    assert load_checkpoint(checkpoints(config)[-1])["progress"]["step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--datasource", "none.tsv"], "no file none.tsv"),
        ([], "Helsinki-NLP/opus_books"),
        (["--preset", "toy", "--d-model", "100", "--num-heads", "8"], "d_model is 100; give a multiple of num_heads"),
        (["--preset", "toy", "--lang-tgt", "fr"], "no language 'fr'; it has en, it, de"),
    ],
)
def test_bad_input_prints_one_line_and_leaves_no_folder(tmp_path, arguments, message):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_the_best_and_the_last_checkpoints_are_kept_and_can_be_loaded_or_averaged(tiny_config, monkeypatch):
    scores = iter([10.0, 30.0, 30.0, 20.0, 25.0, 5.0])
    monkeypatch.setattr(train, "score", lambda *_: {"bleu": next(scores)})
    config = replace(tiny_config, num_epochs=6, keep_checkpoints=2, best_by="bleu")
    train_model(config)
    assert [p.name for p in checkpoints(config)] == ["tmodel_02.pt", "tmodel_04.pt", "tmodel_05.pt"]
    best = load_checkpoint(run_path(config) / "tmodel_02.pt")["model"]
    latest = load_checkpoint(run_path(config) / "tmodel_05.pt")["model"]
    assert is_identical(dict(Translator.load(run_path(config), "cpu").model.state_dict()), best)
    assert is_identical(dict(Translator.load(run_path(config), "cpu", "latest").model.state_dict()), latest)
    assert is_identical(dict(Translator.load(run_path(config), "cpu", "5").model.state_dict()), latest)
    two = Translator.load(run_path(config), "cpu", "latest", average=2).model.state_dict()
    second = load_checkpoint(run_path(config) / "tmodel_04.pt")["model"]
    assert all(torch.allclose(two[name], (latest[name] + second[name]) / 2) for name in two)
    best_two = Translator.load(run_path(config), "cpu", average=2).model.state_dict()
    assert all(torch.allclose(best_two[name], (best[name] + second[name]) / 2) for name in best_two)


def test_a_best_checkpoint_that_is_damaged_is_skipped_with_a_warning(tiny_config, capsys):
    train_model(tiny_config)
    best, other = RunFolder.of(tiny_config).best_first(tiny_config.best_by)
    best.write_bytes(best.read_bytes()[:-1])
    weights = Translator.load(run_path(tiny_config), "cpu").model.state_dict()
    assert is_identical(dict(weights), load_checkpoint(other)["model"])
    assert f"{best} is skipped" in capsys.readouterr().err


def test_patience_stops_the_run_early_and_a_higher_one_resumes_it(tiny_config, monkeypatch, capsys):
    scores = [10.0, 30.0, 20.0, 30.0, 40.0]
    remaining = iter(scores)
    monkeypatch.setattr(train, "score", lambda *_: {"bleu": next(remaining)})
    config = replace(tiny_config, num_epochs=5, patience=2, best_by="bleu")
    assert train_model(config).progress.epoch == 4
    assert "no better validation score for 2 epochs" in capsys.readouterr().out
    train_model(config)
    assert "nothing left to train: 4 epochs" in capsys.readouterr().out
    assert train_model(replace(config, patience=3)).progress.epoch == 5
    assert [row["bleu"] for row in RunFolder.of(config).read_scores()] == scores


def best_checkpoints(config: Config) -> list[str]:
    """The names of a run's checkpoints, best first."""
    return [path.name for path in RunFolder.of(config).best_first(config.best_by)]


def test_if_some_epochs_have_no_bleu_the_loss_selects_the_best(tiny_config, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(train, "validation_loss", lambda *_: next(losses))
    config = replace(tiny_config, best_by="bleu")
    train_model(replace(config, num_epochs=1))
    train_model(replace(config, num_epochs=3, validation_sentences=0, patience=1))
    rows = RunFolder.of(config).read_scores()
    assert [row["loss"] for row in rows] == [3.0, 1.0, 2.0]  # patience is counted in losses too
    assert ["bleu" in row for row in rows] == [True, False, False]
    assert best_checkpoints(config) == ["tmodel_01.pt", "tmodel_02.pt", "tmodel_00.pt"]


def test_scores_of_deleted_checkpoints_are_moved_when_training_restarts(tiny_config, capsys):
    train_model(tiny_config)
    for path in checkpoints(tiny_config):
        path.unlink()
    train_model(replace(tiny_config, patience=1))
    assert "training from scratch: the files of an earlier run were moved" in capsys.readouterr().out
    assert len(RunFolder.of(tiny_config).read_scores()) == 2


def test_a_new_checkpoint_is_kept_beside_later_ones_that_are_damaged(tiny_config):
    folder = RunFolder.of(tiny_config)
    folder.path.mkdir()
    names = [f"tmodel_00_step_{step:08d}.pt" for step in (3, 6, 9)]
    for name in names:
        (folder.path / name).write_bytes(b"damaged")
    path = folder.save({"progress": {"epoch": 0, "batch": 4, "step": 4}})
    assert path.name == "tmodel_00_step_00000004.pt"
    assert load_checkpoint(path)["progress"]["step"] == 4


def test_the_best_checkpoint_by_loss_has_the_lowest_loss(tiny_config, monkeypatch):
    losses = iter([2.0, 1.0, 3.0])
    monkeypatch.setattr(train, "validation_loss", lambda *_: next(losses))
    config = replace(tiny_config, num_epochs=3, best_by="loss", validation_sentences=0)
    train_model(config)
    assert best_checkpoints(config) == ["tmodel_01.pt", "tmodel_00.pt", "tmodel_02.pt"]


def test_the_ema_is_a_weighted_mean_of_all_weights_since_the_start_and_is_evaluated(tiny_config):
    """In closed form: the weights after step i count (1 - d_i) times the product of all later decays d_j."""
    run = ManualRun(replace(tiny_config, ema_decay=0.28))
    weights = [torch.nn.utils.parameters_to_vector(run.model.parameters()).detach().clone()]
    for step in range(5):
        run.state.progress.step = step
        run.step(run.train[[0, 1, 2]])
        weights.append(torch.nn.utils.parameters_to_vector(run.model.parameters()).detach().clone())
    decays = [1 / 10, 2 / 11, 3 / 12, 0.28, 0.28]  # (1 + step) / (10 + step), at most ema_decay
    shares = [math.prod(decays)] + [(1 - decays[i]) * math.prod(decays[i + 1 :]) for i in range(5)]
    expected = sum(share * w for share, w in zip(shares, weights, strict=True))
    average = torch.nn.utils.parameters_to_vector(run.translator.model.parameters())
    assert torch.allclose(average, expected, atol=1e-6)
    assert not torch.allclose(average, weights[-1], atol=1e-4)
    assert not torch.allclose(average, weights[0], atol=1e-4)
    assert not any(w.requires_grad for w in run.translator.model.parameters())
    saved = run.state.state_dict()
    assert is_identical(saved["ema_model"], dict(run.translator.model.state_dict()))
    assert is_identical(saved["model"], dict(run.model.state_dict()))


@pytest.mark.slow
def test_runs_with_all_regularizers_resume_bit_identically(tiny_config, tmp_path):
    options = {"tokenizer": "bpe", "vocab_size": 400, "bpe_dropout": 0.2, "rdrop_alpha": 1.0, "ema_decay": 0.9}
    uninterrupted = replace(tiny_config, run_dir=str(tmp_path / "uninterrupted"), lr_schedule="constant", **options)
    train_model(uninterrupted)
    interrupted = replace(uninterrupted, run_dir=str(tmp_path / "interrupted"))
    train_model(replace(interrupted, max_steps=4))
    train_model(interrupted)
    assert is_identical(final_state(interrupted), final_state(uninterrupted))


def test_rdrop_equals_the_plain_loss_without_dropout_and_exceeds_it_with_dropout(tiny_config):
    run = ManualRun(replace(tiny_config, rdrop_alpha=5.0))
    inputs = LossInputs.of(run.train[[0, 1, 2, 3]], CPU)
    plain = TrainingLoss(run.model, run.config.label_smoothing)
    assert run.loss_module(inputs).item() > plain(inputs).item() * 1.001
    for module in run.model.modules():
        if isinstance(module, Dropout):
            module.p = 0.0
    assert run.loss_module(inputs).item() == pytest.approx(plain(inputs).item(), rel=1e-5)


def test_running_out_of_memory_in_validation_is_explained(tiny_config, monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError

    run = ManualRun(tiny_config)
    monkeypatch.setattr(TrainingLoss, "forward", out_of_memory)
    with pytest.raises(InputError, match=r"out of memory in a batch of \d+ sentences of \d+ tokens; lower --batch-tok"):
        train.validation_loss(run.model, run.validation, run.config, "fp32")
    monkeypatch.setattr("translate.greedy_decode", out_of_memory)
    with pytest.raises(
        InputError, match=r"out of memory in a batch of 1 sentence of up to \d+ tokens; lower --beam-size"
    ):
        run.translator.translate(["I sleep."])


def overflowing(config: Config, monkeypatch) -> Config:
    """The config in fp16, with a loss scale at which the gradients of the first steps overflow."""
    scaler = LossScaler.__init__

    def with_large_scale(self, *args):
        scaler(self, *args)
        self._init_scale = 2.0**40

    monkeypatch.setattr(LossScaler, "__init__", with_large_scale)
    return replace(config, precision="fp16")


def test_an_overflow_in_fp16_skips_the_step_halves_the_scale_and_is_counted(tiny_config, monkeypatch):
    run = ManualRun(overflowing(tiny_config, monkeypatch))
    run.loss_module.precision = "fp16"
    log = TrainingLog(RunFolder.of(tiny_config), 0, run.state.scaler)
    before = run.state.model.state_dict()["encoder.norm.weight"].clone()
    report = run.step(run.train[[0, 1, 2]])
    log.add(0, report)
    log.check_finite()
    assert report.loss.isfinite()
    assert not report.gradient_norm.isfinite()
    assert torch.equal(run.model.encoder.norm.weight, before)
    assert (run.state.scaler.get_scale(), run.state.scaler.skipped_steps) == (2.0**39, 1)
    assert "1 step skipped" in log.write(1, 1e-3)
    for _ in range(40):
        log.add(1, report := run.step(run.train[[0, 1, 2]]))
        if report.gradient_norm.isfinite():
            break
    log.check_finite()
    assert not torch.equal(run.model.encoder.norm.weight, before)
    assert run.state.scaler.get_scale() == 2.0 ** (40 - run.state.scaler.skipped_steps)


def test_overflows_that_no_scale_prevents_are_an_error(tiny_config):
    run = ManualRun(replace(tiny_config, precision="fp16"))
    log = TrainingLog(RunFolder.of(tiny_config), 0, run.state.scaler)
    run.model.projection_layer.proj.weight.register_hook(lambda gradient: gradient * math.inf)
    for step in range(16):  # the scale falls from 2^16 to 1
        log.add(step, run.step(run.train[[0]]))
        log.check_finite()
    log.add(16, run.step(run.train[[0]]))
    with pytest.raises(InputError, match=r"gradient norm (nan|inf) at step 16, .* lower --lr or use fp32"):
        log.check_finite()


def test_gradients_in_fp16_are_unscaled_before_they_are_clipped_and_averaged(tiny_config):
    """Steps in fp16 move the weights and their EMA as steps in fp32 do."""
    vectors = []
    for precision in ("fp32", "fp16"):
        run = ManualRun(replace(tiny_config, precision=precision, dropout=0.0, clip_norm=0.01, ema_decay=0.9))
        run.loss_module.precision = precision
        for first in range(3):
            report = run.step(run.train[[first]], run.train[[first + 1, first + 2]])  # two accumulated batches
        vectors.append(torch.nn.utils.parameters_to_vector(run.state.ema_model.parameters()))
        vectors.append(report.gradient_norm)
    assert vectors[2] == pytest.approx(vectors[0], abs=5e-3)
    assert vectors[3].item() == pytest.approx(vectors[1].item(), rel=1e-2)


@pytest.mark.slow
def test_a_run_in_fp16_that_is_interrupted_after_an_overflow_ends_bit_identical(tiny_config, tmp_path, monkeypatch):
    config = overflowing(replace(tiny_config, lr_schedule="constant", num_epochs=5), monkeypatch)
    uninterrupted = replace(config, run_dir=str(tmp_path / "uninterrupted"))
    for max_steps in (3, 11, 0):
        train_model(replace(config, max_steps=max_steps))
    train_model(uninterrupted)
    end = final_state(uninterrupted)
    assert 3 < end["scaler"]["skipped_steps"] < end["progress"]["step"]
    assert is_identical(final_state(config), end)


@pytest.mark.slow
def test_fp16_reaches_the_loss_of_fp32(tiny_config):
    """Within 1% after 500 steps on the toy corpus.

    Rounding alone changes the loss of this small model by up to 0.2%; of the full toy preset, it is about 1%.
    """
    config = replace(tiny_config, datasource="toy", validation_source="toy:validation", validation_sentences=0)
    config = replace(config, max_steps=500, batch_tokens=256, dropout=0.0)
    losses = []
    for precision in ("fp32", "fp16"):
        run = replace(config, run_dir=f"{config.run_dir}.{precision}", precision=precision)
        train_model(run)
        losses.append(RunFolder.of(run).read_scores()[-1]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[0] < 3


def test_a_lost_run_is_restored_from_its_mirror_and_resumes(tiny_config, tmp_path, capsys):
    (tmp_path / "drive").mkdir()
    config = replace(tiny_config, mirror_dir=str(tmp_path / "drive" / "run"), save_every_steps=3)
    train_model(replace(config, num_epochs=1, lr_schedule="constant"))
    shutil.rmtree(run_path(config))
    train_model(config)
    assert "restored from" in capsys.readouterr().out
    assert len(RunFolder(tmp_path / "drive" / "run").read_scores()) == 2
    assert checkpoints(config.mirror_dir)[-1].name == "tmodel_01.pt"
    with pytest.raises(InputError, match="mount the Drive first"):
        train_model(replace(config, run_dir=str(tmp_path / "new"), mirror_dir=str(tmp_path / "gone" / "run")))
    assert not (tmp_path / "new").exists()


def test_a_warmup_that_never_ends_and_validation_pairs_of_the_preset_are_reported(tiny_config, capsys):
    train_model(replace(tiny_config, warmup_steps=100, max_steps=2))
    assert "warning: the warmup (100 steps) never ends" in capsys.readouterr().err
    train_model(replace(tiny_config, max_steps=3, warmup_steps=1))
    assert "warning" not in capsys.readouterr().err
    other = replace(tiny_config, run_dir=tiny_config.run_dir + "2", validation_source="toy:validation", max_steps=1)
    train_model(other)
    out, err = capsys.readouterr()
    assert "1,000 validation pairs (toy:validation)" in out
    assert "warning: validation pairs are those of the preset, toy:validation; give --validation-source" in err


def test_the_new_folder_of_another_process_that_holds_the_lock_is_not_removed(tiny_config, monkeypatch):
    """Two processes start in the same new folder: the one that comes too late for the lock must leave it alone."""
    folder, create = RunFolder.of(tiny_config), RunFolder.create
    other = contextlib.ExitStack()

    def create_too_late(run):
        create(run)
        other.enter_context(RunFolder(run.path).locked())  # the other process is faster
        (run.path / "tmodel_00.pt").write_bytes(b"of the other process")

    monkeypatch.setattr(RunFolder, "create", create_too_late)
    with other, pytest.raises(InputError, match="another process is training"):
        train_model(tiny_config)
    assert (folder.path / "tmodel_00.pt").read_bytes() == b"of the other process"
