"""Training: python train.py --preset toy

`train_model` at the end shows a whole run. Above it are the learning rate, the optimizer step and validation. The loss
of a step is the sum over all target tokens of its batches divided by their number, so that neither padding nor batch
sizes change the weight of a token.
"""

from __future__ import annotations

# config comes first: it makes Ctrl-C quiet during the imports below
from config import INHERITED_FIELDS, INVOCATION_FIELDS, PRESETS, Config, counted, get_config, parse, run_command

# isort: split
import argparse
import contextlib
import math
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import torch
from torch import nn

from compute import distributed, sharding
from compute.device import (
    allow_tf32,
    choose_precision,
    device_name,
    explained_out_of_memory,
    keep_freed_memory,
    peak_memory,
    runs_asynchronously,
)
from compute.threads import share_cores
from dataset import Batches, BilingualDataset, make_loader
from evaluate import format_scores, score
from runs import mirror
from runs.checkpoint import weights_crc32
from runs.folder import RunFolder, merits
from training.batches import StepBatches, optimizer_steps
from training.estimate import estimated_memory, estimated_seconds
from training.initial import start_from
from training.log import ProgressBar, StepReport, TrainingLog, duration, print_line, shows_bars, warn
from training.losses import LossInputs, TrainingLoss, count_target_tokens
from training.preparation import Prepared, prepare
from training.resume import ResumePoint, batches_per_step, load_state
from training.signals import StopSignal
from training.state import Progress, TrainingState
from training.streaming import StreamedPairs
from translate import Translator

LOG_EVERY = 10  # optimizer steps per point of the training curves


def count_warmup_steps(config: Config, total_steps: int) -> int:
    """The number of warmup steps: `warmup_steps`, or that share of the whole run if it is below 1."""
    return int(config.warmup_steps * total_steps if config.warmup_steps < 1 else config.warmup_steps)


def learning_rate(step: int, config: Config, total_steps: int) -> float:
    """The learning rate of a step, counted from 0: linear warmup, then the schedule of the config."""
    warmup_steps = count_warmup_steps(config, total_steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    if config.lr_schedule == "inverse_sqrt":  # Vaswani et al., section 5.3, scaled to peak at lr
        return config.lr * math.sqrt(max(1, warmup_steps) / (step + 1))
    if config.lr_schedule == "cosine":
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr


def peak_learning_rate(config: Config, total_steps: int) -> tuple[int, float]:
    """The step of the highest learning rate, counted from 1, and that rate."""
    step = min(max(1, count_warmup_steps(config, total_steps)), total_steps)
    return step, learning_rate(step - 1, config, total_steps)


# ---------------------------------------------------------------------------- one optimizer step


def train_step(
    state: TrainingState, loss_module: nn.Module, step: StepBatches, learning_rate: float, config: Config
) -> StepReport:
    """One optimizer step on these batches and those of the other processes.

    If the loss or the gradient norm is not finite, the weights are not updated; `TrainingLog.check_finite` reports it,
    unless it is an overflow in fp16, which the scaler corrects.
    """
    own = len(step.batches) - step.dummies
    tokens = distributed.sum_over_processes(sum(map(count_target_tokens, step.batches[:own])))
    loss = torch.zeros((), device=state.device)
    for i, batch in enumerate(step.batches):
        is_last = i == len(step.batches) - 1
        with contextlib.nullcontext() if is_last else distributed.without_averaging(loss_module):
            batch_loss = loss_module(LossInputs.of(batch, state.device))
            # Every token of the step has the same weight; gradients are averaged over processes.
            batch_loss = batch_loss * ((i < own) * distributed.world_size() / tokens)
            state.scaler.scale(batch_loss).backward()
        loss += batch_loss.detach()

    state.scaler.unscale_(state.optimizer)
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    norm = sharding.whole(nn.utils.get_total_norm([p.grad for p in parameters]))
    if config.clip_norm:
        nn.utils.clip_grads_with_norm_(parameters, config.clip_norm, norm)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    is_finite = torch.isfinite(norm + loss)
    if state.optimizer.defaults["fused"]:
        state.optimizer.found_inf = (~is_finite).float()  # the fused kernel skips the update if this is 1
        state.optimizer.step()
    elif is_finite:
        state.optimizer.step()
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    if config.ema_decay:
        state.update_ema(config.ema_decay)
    return StepReport(loss, norm, tokens, step.batches[0]["src_text"][0])


def within_memory(*batches: dict) -> contextlib.AbstractContextManager:
    """Context in which a GPU's out-of-memory error becomes an InputError with the sizes of these batches."""
    sizes = (f"{len(b['label'])} sentences of {b['label'].size(1)} tokens" for b in batches)
    return explained_out_of_memory(" and ".join(sizes), "lower --batch-tokens or --seq-len")


# ---------------------------------------------------------------------------- validation


@torch.inference_mode()
def validation_loss(model: nn.Module, validation: BilingualDataset, config: Config, precision: str) -> float:
    """Cross-entropy of the whole validation set in nats per target token, without label smoothing."""
    loss_module = TrainingLoss(model, label_smoothing=0.0, precision=precision)
    device = next(model.parameters()).device
    losses, tokens = [], 0  # losses stay on the device until the end, so that the host does not wait for each
    for batch in make_loader(validation, Batches(validation, config, epoch=None), pin_memory=device.type == "cuda"):
        with within_memory(batch):
            losses.append(loss_module(LossInputs.of(batch, device)))
        tokens += count_target_tokens(batch)
    return sum(torch.stack(losses).tolist()) / tokens


def run_validation(
    translator: Translator, validation: BilingualDataset, config: Config, precision: str, log: TrainingLog, step: int
) -> dict[str, float]:
    """The loss on the whole validation set, and scores of `validation_sentences` greedy translations.

    Prints `validation_examples` of them.
    """
    translator.model.eval()
    scores = {"loss": validation_loss(translator.model, validation, config, precision)}
    line = f"validation   loss {scores['loss']:.3f}"
    count = min(config.validation_sentences, len(validation))
    if count:
        rows = validation.encoded[np.linspace(0, len(validation) - 1, count).astype(int).tolist()]
        sources, references = rows["src"].to_pylist(), rows["tgt"].to_pylist()
        predicted = translator.translate(sources, show_progress=shows_bars())
        scores |= score(predicted, references)
        line += f"   {format_scores({k: v for k, v in scores.items() if k != 'loss'})} of {counted(count, 'sentence')}"
        examples = list(zip(sources, references, predicted, strict=True))[: config.validation_examples]
        for source, reference, prediction in examples:
            print_line(f"    source  {source}\n    target  {reference}\n predicted  {prediction}\n")
        text = "\n\n".join(f"**source** {s}  \n**target** {r}  \n**predicted** {p}" for s, r, p in examples)
        log.add_text("validation/samples", text, step)
    print_line(line)
    log.add_scalars("validation", scores, step)
    return scores


# ---------------------------------------------------------------------------- phases of a run


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def count_steps(config: Config, train: BilingualDataset | StreamedPairs, batches_per_step: int = 0) -> int:
    """Number of optimizer steps of the whole run; with `batches_per_step` 0, of a new one."""
    if config.stream:
        return config.max_steps
    return planned_steps(config, len(Batches(train, config, epoch=0)), batches_per_step)


def planned_steps(config: Config, batches_per_epoch: int, batches_per_step: int = 0) -> int:
    batches_per_step = batches_per_step or config.accumulation_steps * distributed.world_size()
    steps = math.ceil(batches_per_epoch / batches_per_step) * config.num_epochs
    return min(steps, config.max_steps or steps)


def describe(config: Config, folder: RunFolder, prepared: Prepared, model: nn.Module, precision: str) -> None:
    """Prints device, run folder, corpus, model size and number of steps."""
    device, train, validation, tokenizer_src, tokenizer_tgt, _ = prepared
    parameters = count_parameters(model)
    sizes = tokenizer_src.get_vocab_size(), tokenizer_tgt.get_vocab_size()
    processes = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    processes += ", sharded" if sharding.is_wanted(config) else ""
    print(f"device       {device.type} ({device_name(device)}), {precision}{processes}")
    print(f"run          {folder}")
    print(f"corpus       {config.datasource}, {config.lang_src} to {config.lang_tgt}")
    if config.distill_from:
        print(f"             training targets translated by {config.distill_from}")
    validation_source = config.validation_source or "held out"
    if config.stream:
        shards = counted(len(train.shards.names), "shard")
        print(f"             streamed from {shards}; tokenizers from {train.first_pairs:,} of their first pairs")
        train, training, name = train.sample, "", "sample"
    else:
        training, name = f"{len(train):,} training pairs, ", "training"
    print(f"             {training}{len(validation):,} validation pairs ({validation_source})")
    if any(train.removed):
        duplicates, length_ratio = train.removed
        print(f"             removed in {name}: {duplicates:,} duplicates (--drop-duplicates),", end=" ")
        print(f"{length_ratio:,} pairs by --max-length-ratio")
    for part, data in ((name, train), ("validation", validation)):
        if data.skipped_blank or data.skipped_long:
            print(f"             skipped in {part}: {data.skipped_blank:,} pairs with a blank side,", end=" ")
            print(f"{data.skipped_long:,} with more than {config.seq_len} tokens (--seq-len)")
    print(f"model        {parameters:,} parameters, vocabulary of {sizes[0]:,} source and {sizes[1]:,} target tokens")
    preset = PRESETS[config.preset]
    if config.validation_source == preset.get("validation_source") and config.datasource != preset["datasource"]:
        warn(f"validation pairs are those of the preset, {config.validation_source}; give --validation-source FILE")
        if not config.stream:  # which cannot hold out a part
            warn(f"or --validation-source '' to hold out a part of {config.datasource}")


def describe_plan(config: Config, total_steps: int, prepared: Prepared, model: nn.Module, precision: str) -> None:
    """Prints the number of steps, the peak of the learning rate, and estimates of memory and, for known GPUs, time."""
    device, train, *_ = prepared
    train = train.sample if config.stream else train
    step, peak = peak_learning_rate(config, total_steps)
    memory = estimated_memory(config, model, device.type, precision, distributed.world_size())
    mean_length = max(lengths.mean() for lengths in train.lengths())
    seconds = estimated_seconds(config, model, total_steps, mean_length, device_name(device), precision)
    print(f"training     {counted(total_steps, 'step')}, up to {counted(config.num_epochs, 'epoch')}")
    print(f"             peak of the learning rate: {peak:.1e}, in step {step:,}")
    print(f"             about {memory / 1e9:.2g} GB of memory" + (f", {duration(seconds)}" if seconds else ""))
    if config.keep_checkpoints:
        checkpoints = counted(config.keep_checkpoints, "checkpoint")
        print(f"             keeping the best and the last {checkpoints} (--keep-checkpoints)")
    if (warmup_steps := count_warmup_steps(config, total_steps)) >= total_steps:
        warn(
            f"the warmup ({counted(warmup_steps, 'step')}) never ends, so the learning rate only rises; "
            "give a share of the run, such as --warmup-steps 0.1"
        )
    if config.stream and not config.save_every_steps:
        warn("--stream without --save-every-steps saves only at the end of an epoch, which may be long")


def is_finished(progress: Progress, config: Config) -> bool:
    return progress.epoch >= config.num_epochs or 0 < config.max_steps <= progress.step


def out_of_patience(config: Config, folder: RunFolder) -> bool:
    """Early stopping: whether the last `patience` epochs brought no better validation score (Prechelt, 1998)."""
    found = []
    if distributed.is_first():
        found = merits([row for row in folder.read_scores() if row["batch"] == 0], config.best_by)
    is_out = 0 < config.patience < len(found) and max(found[-config.patience :]) <= max(found[: -config.patience])
    return distributed.broadcast(is_out)


def resume(
    config: Config,
    folder: RunFolder,
    state: TrainingState,
    train: BilingualDataset | StreamedPairs,
    resume_point: ResumePoint,
) -> None:
    """Restores the state, sets later checkpoints aside and removes later scores."""
    load_state(state, config, train, resume_point)
    if distributed.is_first():
        if aside := folder.set_aside(resume_point.conflicting):
            print(f"preload {config.preload}: later checkpoints were moved to {aside}")
        folder.drop_scores_after(state.progress.step)
        epoch, batch, step = asdict(state.progress).values()
        where = f"batch {batch} of epoch" if batch else "the start of epoch"
        print(f"resuming     from {resume_point.path.name}, at {where} {epoch}, step {step:,}")
        batches = batches_per_step(config, resume_point)
        describe_processes(len(resume_point.state["rng"]), distributed.world_size(), batches)


def describe_processes(before: int, now: int, batches: int) -> None:
    """Says how the batches of a step are divided if the number of processes has changed since the checkpoint."""
    if now != before:
        share = math.ceil(batches / now)
        print(f"processes    {before} before, {now} now; still {batches} batches per step, up to {share} per process")
        if batches < now:
            warn(f"{now - batches} of {now} processes are idle: a run keeps the number of batches per step ({batches})")


def save(
    config: Config,
    folder: RunFolder,
    state: TrainingState,
    train: BilingualDataset | StreamedPairs,
    constants: dict,
    log: TrainingLog,
) -> None:
    """Writes a checkpoint, with what is the same in all of them, and updates the mirror. All processes must call it."""
    log.check_finite()
    saved = state.state_dict() | ({"stream": train.state_dict()} if config.stream else {})
    if distributed.is_first():
        tokenizers = [folder.tokenizer_file(lang).read_text("utf8") for lang in (config.lang_src, config.lang_tgt)]
        complete = {**saved, **constants, "config": asdict(config), "tokenizers": tokenizers}
        folder.save(complete, config.best_by)
        update_mirror(config, folder, log)
    distributed.broadcast(None)  # the others wait here, where they may wait for long, rather than in the next step


def validate(
    config: Config,
    folder: RunFolder,
    state: TrainingState,
    translator: Translator,
    validation: BilingualDataset,
    precision: str,
    log: TrainingLog,
) -> None:
    """Validates in the first process, unless already done at this step, and prunes checkpoints."""
    with state.gathering():
        if distributed.is_first() and state.progress.step not in [row["step"] for row in folder.read_scores()]:
            scores = run_validation(translator, validation, config, precision, log, state.progress.step)
            crc = weights_crc32(state.evaluated_model.state_dict())
            folder.write_scores([*folder.read_scores(), {**asdict(state.progress), "weights_crc32": crc, **scores}])
    if distributed.is_first():
        folder.prune(config.keep_checkpoints, config.best_by)
        update_mirror(config, folder, log)
        state.model.train()


def update_mirror(config: Config, folder: RunFolder, log: TrainingLog) -> None:
    if config.mirror_dir:
        log.flush()
        mirror.update(RunFolder(config.mirror_dir), folder, config.best_by)


# ---------------------------------------------------------------------------- a whole run


def train_model(config: Config) -> TrainingState:
    """Trains the run that `config` describes, or resumes it; returns the final state.

    Raises InputError for bad input, before an existing run is changed.
    """
    keep_freed_memory()
    share_cores()
    folder = RunFolder.of(config)
    with distributed.process_group(config.ddp_timeout), contextlib.ExitStack() as resources:
        # Prepare: the first process encodes the corpus, the others then load it from the cache
        prepared = distributed.first_then_others(lambda: prepare(config, folder, resources))
        device, train, validation, *tokenizers, resume_point = prepared
        allow_tf32(device)
        constants = {"corpus": train.fingerprint, "validation": validation.fingerprint}
        state = TrainingState.create(config, *(t.get_vocab_size() for t in tokenizers), device)
        precision = choose_precision(config.precision, device, state.model)
        step_size = constants["batches_per_step"] = batches_per_step(config, resume_point)
        total_steps = count_steps(config, train, step_size)
        if distributed.is_first():
            describe(config, folder, prepared, state.model, precision)
            describe_plan(config, total_steps, prepared, state.model, precision)

        # Resume, or start from another run
        if resume_point.state:
            resume(config, folder, state, train, resume_point)
        elif resume_point.initial:
            start_from(resume_point.initial, state, train.sample if config.stream else train)
        known_id = (resume_point.state or {}).get("run_id", "")
        del prepared, resume_point  # frees the loaded checkpoint
        if distributed.is_first():
            folder.save_config(config)
            folder.save_run_id(known_id)
            if config.mirror_dir:
                copy = RunFolder(config.mirror_dir)
                resources.enter_context(mirror.locked(copy))
                mirror.begin(copy, count_parameters(state.model), has_ema=config.ema_decay > 0)
        log = TrainingLog(folder, state.progress.step, state.scaler)
        resources.callback(log.close)
        translator = Translator(state.evaluated_model, config, *tokenizers)
        is_end = state.progress.batch == 0 or is_finished(state.progress, config)
        if state.progress.step and is_end:  # perhaps killed between saving and validating
            validate(config, folder, state, translator, validation, precision, log)

        # Train
        loss_module = TrainingLoss(state.model.train(), config.label_smoothing, config.rdrop_alpha, precision)
        if not state.is_sharded:
            loss_module = distributed.averaging_gradients(loss_module, device)
        start_step, start_time = state.progress.step, time.perf_counter()
        with StopSignal() as stop, ProgressBar(state.progress, total_steps) as bar:
            while not (stop.received() or is_finished(state.progress, config) or out_of_patience(config, folder)):
                # One epoch, or the rest of it
                progress = state.progress
                train.begin_epoch(progress.epoch)
                is_end_of_epoch = True
                for step in optimizer_steps(train, step_size, config, progress, device):
                    # One step
                    rate = learning_rate(progress.step, config, total_steps)
                    with within_memory(*step.batches):
                        log.add(progress.step, train_step(state, loss_module, step, rate, config))
                    progress.step, progress.batch = progress.step + 1, progress.batch + step.consumed
                    bar.update(progress)

                    # Log
                    is_end_of_epoch = step.is_last
                    is_log_step = progress.step % LOG_EVERY == 0 or is_end_of_epoch
                    if is_log_step or not runs_asynchronously(device):
                        log.check_finite()
                    if is_log_step:
                        bar.report(progress, log.write(progress.step, rate), is_end_of_epoch)

                    # Stop, or save within the epoch
                    if stop.received() or is_finished(progress, config):
                        break
                    if config.save_every_steps and progress.step % config.save_every_steps == 0:
                        save(config, folder, state, train, constants, log)

                # Save
                if config.stream:
                    print_line(train.summary())
                if is_end_of_epoch:
                    progress.epoch, progress.batch = progress.epoch + 1, 0
                save(config, folder, state, train, constants, log)
                if progress.batch:
                    print_line(f"saved {folder.checkpoint(**asdict(progress))}")

                # Validate
                if not stop.number:
                    validate(config, folder, state, translator, validation, precision, log)

        report_end(config, folder, state, start_step, time.perf_counter() - start_time)
        state.stop_signal = stop.number
        state.model.eval()
        del loss_module  # DistributedDataParallel must be deleted before the process group is
    return state


def report_end(config: Config, folder: RunFolder, state: TrainingState, start_step: int, seconds: float) -> None:
    """Prints why training ended, the time and the peak memory."""
    progress, is_early = state.progress, out_of_patience(config, folder)
    if progress.step == start_step and (is_early or is_finished(progress, config)):
        done = f"{counted(progress.epoch, 'epoch')} and {counted(progress.step, 'step')} are done"
        print_line(f"nothing left to train: {done}; to continue, raise --num-epochs, --max-steps or --patience")
        return
    if is_early:
        print_line(f"stopped early: no better validation score for {counted(config.patience, 'epoch')} (--patience)")
    memory = peak_memory(state.device)
    print_line(f"trained in {seconds:.0f} s" + (f", peak memory {memory / 1e9:.1f} GB" if memory else ""))


# ---------------------------------------------------------------------------- command line


def parse_config(argv: list[str]) -> Config:
    """The config of a command line: that of a preset, or of the run in --run-dir, overridden by the other flags.

    With --init-from, a new run takes INHERITED_FIELDS from that run.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?")
    parser.add_argument("--run-dir", "--run_dir", nargs="?", default="")
    parser.add_argument("--init-from", "--init_from", nargs="?", default="")
    given, _ = parser.parse_known_args(argv)
    folder = RunFolder(given.run_dir or "")
    if given.preset is None and given.run_dir and folder.has_config:
        default = folder.load_config()
    else:
        default = get_config(given.preset or "opus_books")
    if given.init_from:  # which is no longer needed once the run has a checkpoint
        has_started = given.run_dir and folder.checkpoints()
        other = (folder if has_started else RunFolder.find(given.init_from)).load_config()
        default = replace(default, **{name: getattr(other, name) for name in INHERITED_FIELDS})
    return parse(Config, argv, default=default)


def main(argv: list[str]) -> None:
    config = parse_config(argv)
    if not shows_bars():
        from datasets import disable_progress_bars

        disable_progress_bars()
    state = train_model(config)
    if distributed.is_first():
        print_next_steps(config, state.stop_signal)
    status = 128 + state.stop_signal if state.stop_signal else 0
    if state.is_sharded:
        sharding.end_process(status)
    if status:
        sys.exit(status)


def print_next_steps(config: Config, stop_signal: int) -> None:
    folder = RunFolder.of(config)
    if stop_signal:
        print(f"stopped; to resume: python train.py --run-dir {folder}{flags_not_saved(config)}", file=sys.stderr)
        return
    print("\nNext:")
    print(f'  python translate.py --run-dir {folder} "SENTENCE"')
    print(f"  python evaluate.py --run-dir {folder}")
    print(f'  python visualize.py --run-dir {folder} "SENTENCE" --html attention.html')
    print(f"  tensorboard --logdir {folder.tensorboard}")


def flags_not_saved(config: Config) -> str:
    """The flags of this invocation that config.json does not contain and that the next one needs, too."""
    values = {name: getattr(config, name) for name in INVOCATION_FIELDS if name not in ("run_dir", "preload")}
    changed = {name.replace("_", "-"): value for name, value in values.items() if value != getattr(Config, name)}
    return "".join(f" --{name}" if value is True else f" --{name} {value}" for name, value in changed.items())


if __name__ == "__main__":
    run_command(main)
