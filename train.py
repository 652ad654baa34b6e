"""Training: python train.py --preset toy

    B  sentences in the batch    T  target length in tokens    V  target vocabulary

Reads top to bottom: the loss, the learning rate, validation, then the loop. One
optimizer step adds up the gradients of `accumulation_steps` batches; its loss is the sum over all
their target tokens divided by the number of those tokens, so padding and batch sizes do not tilt it.
"""

import contextlib
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from compute import distributed
from compute.ops import peak_memory
from config import Config, InputError, get_config, parse_config, run_command, weights_files
from dataset import PAD, Batches, make_loader
from evaluate import format_scores, score
from runs.checkpoint import merits, only_trainer, read_scores, sweep, write_scores
from runs.mirror import check_mounted, fetch, push
from training.losses import cross_entropy
from training.state import Run, check_writable, prune, save_here, start

LOG_EVERY = 10  # optimizer steps between two lines of the log
CHECKED_LATER = ("cuda",)  # devices that work ahead, so that asking them whether a loss is finite means waiting


def learning_rate(step: int, config: Config, total_steps: int) -> float:
    """The rate of a step, counted from 0: a linear warmup, then the config's schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "inverse_sqrt":  # section 5.3, scaled so that the peak is lr
        return config.lr * math.sqrt(max(1, config.warmup_steps) / (step + 1))
    if config.lr_schedule == "cosine":
        share = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return config.lr


# ---------------------------------------------------------------------------- validation


@torch.inference_mode()
def validation_loss(run: Run) -> float:
    """Cross-entropy in nats a target token, without smoothing, over the whole validation set."""
    loss, tokens = 0.0, 0
    for batch in make_loader(run.validation, Batches(run.validation, run.config, epoch=None)):
        with run.autocast():
            loss += cross_entropy(run.translator.model, *run.inputs(batch)).item()
        tokens += (batch["label"] != PAD).sum().item()
    return loss / tokens


def run_validation(run: Run) -> dict[str, float]:
    """Loss over the whole validation set, scores of some greedy translations, a few of them shown.

    Every row goes to TensorBoard and to scores.jsonl in the run's folder.
    """
    config = run.config
    run.translator.model.eval()
    scores = {"loss": validation_loss(run)}
    line = f"validation   loss {scores['loss']:.3f}"
    count = min(config.validation_sentences, len(run.validation))
    if count:
        rows = run.validation.encoded[np.linspace(0, len(run.validation) - 1, count).astype(int).tolist()]
        sources, references = rows["src"].to_pylist(), rows["tgt"].to_pylist()
        predicted = run.translator.translate(sources, progress=True)
        scores |= score(predicted, references)
        line += f"   {format_scores({k: v for k, v in scores.items() if k != 'loss'})} of {count} sentences"
        examples = list(zip(sources, references, predicted, strict=True))[: config.validation_examples]
        for source, reference, prediction in examples:
            tqdm.write(f"    source  {source}\n    target  {reference}\n predicted  {prediction}\n")
        text = "\n\n".join(f"**source** {s}  \n**target** {r}  \n**predicted** {p}" for s, r, p in examples)
        run.writer.add_text("validation/samples", text, run.progress.step)
    tqdm.write(line)
    for name, value in scores.items():
        run.writer.add_scalar(f"validation/{name}", value, run.progress.step)
    run.model.train()
    write_scores(config.folder, [*read_scores(config.folder), {**asdict(run.progress), **scores}])
    return scores


def validated(run: Run) -> bool:
    """Whether scores.jsonl has this step's line; a run killed between saving and validating lacks it."""
    return any(row["step"] == run.progress.step for row in read_scores(run.config.folder))


# ---------------------------------------------------------------------------- the loop


def train_step(run: Run, batches: list[dict], counts: bool = True) -> tuple[Tensor, Tensor, int]:
    """One optimizer step over these batches, and those of the other processes.

    Returns the loss a target token, the gradient norm and the number of target tokens. Where the batches
    do not count, the process goes through the same motions and adds nothing.
    """
    own = sum(int((batch["label"] != PAD).sum()) for batch in batches) if counts else 0
    tokens = distributed.total(own)
    rate = learning_rate(run.progress.step, run.config, run.total_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    total = torch.zeros((), device=run.device)
    for i, batch in enumerate(batches):
        with run.together(i == len(batches) - 1):
            with run.autocast():
                loss = run.learner(*run.inputs(batch))
            # Gradients are averaged over the processes, but each token of the step has the same weight.
            loss = loss * (counts * distributed.world_size() / tokens)
            loss.backward()
        total += loss.detach()
    parameters = [p for p in run.model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    run.unchecked.append((run.progress.step, batches[0]["src_text"][0], total, norm))
    if run.device.type in CHECKED_LATER:  # a fused optimizer leaves out the step for which this is 1
        run.optimizer.found_inf = (~torch.isfinite(norm + total)).float()
    else:
        run.check_finite()
    if run.config.clip_norm:
        nn.utils.clip_grads_with_norm_(parameters, run.config.clip_norm, norm)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.config.ema_decay:
        update_average(run)
    return total, norm, tokens


@torch.no_grad()
def update_average(run: Run) -> None:
    """Moves the model that translates a little towards the one that learns (Polyak and Juditsky, 1992).

    The average reaches back 1 / (1 - ema_decay) steps; at the start, about a ninth of the steps made.
    """
    decay = min(run.config.ema_decay, (1 + run.progress.step) / (10 + run.progress.step))
    torch._foreach_lerp_(list(run.translator.model.parameters()), list(run.model.parameters()), 1 - decay)


def train_epoch(run: Run) -> None:
    """The rest of the current epoch, or until a signal or max_steps."""
    config, progress = run.config, run.progress
    batches = Batches(run.train, config, progress.epoch)
    run.train.begin_epoch(progress.epoch)
    own = distributed.own_batches(batches.starting_at(progress.batch), config.accumulation_steps)
    loader = iter(make_loader(run.train, own, config.num_workers, run.device.type == "cuda"))
    meter = Meter(run)
    with tqdm(
        total=len(batches),
        initial=progress.batch,
        unit="batch",
        desc=f"Epoch {progress.epoch:02d}",
        dynamic_ncols=True,
        disable=not distributed.is_first(),
    ) as bar:
        for count in distributed.own_counts(len(batches) - progress.batch, config.accumulation_steps):
            group = next_batches(loader, max(1, count), config)
            try:
                meter.add(*train_step(run, group, counts=count > 0))
            except torch.OutOfMemoryError:
                sizes = " and ".join(f"{len(b['label'])} sentences of {b['label'].size(1)} tokens" for b in group)
                raise InputError(f"out of memory in a batch of {sizes}; lower --batch-tokens, or --seq-len") from None
            done = min(config.accumulation_steps * distributed.world_size(), len(batches) - progress.batch)
            progress.batch += done
            progress.step += 1
            bar.update(done)
            if progress.step % LOG_EVERY == 0 or progress.batch == len(batches):
                run.check_finite()
                bar.set_postfix_str(meter.log())
            if asked_to_stop(run) or run.done():
                break
            if config.save_every_steps and progress.step % config.save_every_steps == 0:
                save_here(run)
                copy_out(run)
    if progress.batch >= len(batches):
        progress.epoch, progress.batch = progress.epoch + 1, 0


def next_batches(loader: Iterator[dict], count: int, config: Config) -> list[dict]:
    """The batches of one optimizer step."""
    try:
        return list(islice(loader, count))
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            "a process that prepares batches was killed, perhaps for want of memory; "
            f"lower --num-workers, which is {config.num_workers}, and go on with the same command"
        ) from None


class Meter:
    """Adds up what the steps report and tells TensorBoard and the bar once in a while."""

    def __init__(self, run: Run):
        self.run = run
        self.clear()

    def clear(self) -> None:
        self.loss, self.norm, self.tokens, self.since = 0.0, 0.0, 0, time.perf_counter()

    def add(self, loss: Tensor, norm: Tensor, tokens: int) -> None:
        self.loss, self.norm = self.loss + loss * tokens, norm
        self.tokens += tokens

    def log(self) -> str:
        """Loss is the mean since the last look, in nats a target token, with R-Drop's term where it is on."""
        step = self.run.progress.step
        values = {
            "loss": distributed.total(float(self.loss)) / distributed.world_size() / self.tokens,
            "lr": self.run.optimizer.param_groups[0]["lr"],
            "tokens_per_second": self.tokens / (time.perf_counter() - self.since),
            "gradient_norm": float(self.norm),
        }
        for name, value in values.items():
            if self.run.writer:
                self.run.writer.add_scalar(f"train/{name}", value, step)
        self.clear()
        return f"loss {values['loss']:.3f}, lr {values['lr']:.1e}, {values['tokens_per_second']:,.0f} tokens/s"


@contextlib.contextmanager
def stop_at_step_boundary(run: Run) -> Iterator[None]:
    """Ctrl-C or SIGTERM asks the loop to save and stop; the second one stops at once."""
    if threading.current_thread() is not threading.main_thread():  # Python lets only that one handle signals
        yield
        return
    trainer = os.getpid()

    def ask(number: int, frame) -> None:
        if os.getpid() != trainer:  # a worker that prepares batches inherits this; it ends with the trainer
            return
        run.signal_here = number
        signal.signal(number, signal.SIG_DFL)
        tqdm.write(f"{signal.Signals(number).name}: saving after this step; once more stops at once", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def asked_to_stop(run: Run) -> bool:
    """Whether a signal has come, to whichever process: all have to stop after the same step."""
    run.stop_signal = distributed.largest(run.signal_here)
    return run.stop_signal > 0


def train_model(config: Config) -> Run:
    """Trains, or goes on training, the run in `config.folder`; the model it returns is ready to translate."""
    with distributed.process_group(), contextlib.ExitStack() as held:
        run = distributed.first_then_others(lambda: begin(config, held))
        alone, run.learner = run.learner, distributed.wrapped(run.learner, run.device)
        train_to_the_end(run)
        run.learner = alone  # the wrapper has to go before the processes part
    run.translator.model.eval()
    return run


def begin(config: Config, held: contextlib.ExitStack) -> Run:
    """Takes the run's folder, under a lock that `held` keeps, and starts; bad input leaves nothing behind."""
    if not distributed.is_first():
        return start(config)
    check_writable(config.folder)
    if config.mirror_dir:
        check_mounted(config.mirror_dir)
    new = not config.folder.exists()
    config.folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(only_trainer(config.folder))
    sweep(config.folder)
    try:
        if config.mirror_dir and fetch(config.mirror_dir, config.folder):
            print(f"brought back from {config.mirror_dir}")
        return start(config)
    except InputError:
        if new:
            shutil.rmtree(config.folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                config.folder.parent.rmdir()  # weights/, if it was made for this run
        raise


def train_to_the_end(run: Run) -> None:
    """Epoch after epoch, each saved, then validated."""
    config = run.config
    if run.progress.step and run.progress.batch == 0:
        validate(run, unless_done=True)
    if run.done() or no_more_patience(config):
        done = f"{run.progress.epoch} epochs and {run.progress.step:,} steps are done"
        say(f"nothing left to train: {done}; raise --num-epochs, --max-steps or --patience to go on")
        close_writer(run)
        return
    run.learner.train()
    begun = time.perf_counter()
    with stop_at_step_boundary(run):
        while not (run.done() or asked_to_stop(run) or no_more_patience(config)):
            epoch = run.progress.epoch
            train_epoch(run)
            if run.progress.epoch > epoch:
                save_here(run)
            elif run.progress.batch:
                say(f"saved {save_here(run)}")
                copy_out(run)
            if not run.stop_signal:
                validate(run)
    close_writer(run)
    if no_more_patience(config):
        say(f"stopped early: validation has brought nothing better for {config.patience} epochs (--patience)")
    memory = peak_memory(run.device)
    peak = f"; this process took {memory / 1e9:.1f} GB of memory at most" if memory else ""
    say(f"trained in {time.perf_counter() - begun:.0f} s{peak}")


def validate(run: Run, unless_done: bool = False) -> None:
    """The first process validates, and removes the checkpoints that are worth no more."""
    if distributed.is_first():
        if not (unless_done and validated(run)):
            run_validation(run)
        prune(run.config)
        copy_out(run)


def copy_out(run: Run) -> None:
    if run.config.mirror_dir and distributed.is_first():
        run.writer.flush()
        push(run.config.folder, run.config.mirror_dir)


def close_writer(run: Run) -> None:
    if run.writer:
        run.writer.close()


def say(words: str) -> None:
    if distributed.is_first():
        tqdm.write(words)


def no_more_patience(config: Config) -> bool:
    return distributed.from_first(distributed.is_first() and out_of_patience(config))


def out_of_patience(config: Config) -> bool:
    """Whether the last `patience` epochs have brought nothing better (Prechelt, 1998)."""
    found = merits([row for row in read_scores(config.folder) if row["batch"] == 0], config.best_by)
    return 0 < config.patience < len(found) and max(found[-config.patience :]) <= max(found[: -config.patience])


def trained_run(run_dir: str, preset: str = "toy", **overrides) -> str:
    """The folder of a run, trained first where it holds no checkpoint yet: how the notebooks begin."""
    if not weights_files(run_dir):
        train_model(get_config(preset, run_dir=run_dir, **overrides))
    return run_dir


def what_next(run: Run) -> None:
    folder = run.config.folder
    print("\nWhat to type next:")
    print(f'  python translate.py --run-dir {folder} "A sentence."')
    print(f"  python evaluate.py --run-dir {folder}")
    print(f'  python visualize.py --run-dir {folder} "A sentence." --html attention.html')
    print(f"  tensorboard --logdir {folder}/tensorboard")


def main(argv: list[str]) -> None:
    run = train_model(parse_config(argv))
    if run.stop_signal:
        if distributed.is_first():
            print(f"stopped; to go on from here: python train.py --run-dir {run.config.folder}", file=sys.stderr)
        sys.exit(128 + run.stop_signal)
    if distributed.is_first():
        what_next(run)


if __name__ == "__main__":
    run_command(main)
