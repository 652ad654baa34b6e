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
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import merit, only_trainer, read_scores, sweep, write_scores
from config import Config, InputError, get_config, get_weights_file_path, parse_config, run_command, weights_files
from dataset import PAD, make_batches, make_loader
from evaluate import format_scores, score
from model import Transformer
from ops import fused_loss
from training_run import Run, check_writable, prune, save, save_within_epoch, start, update_average

LOG_EVERY = 10  # optimizer steps between two lines of the log


def real_labels(batch: dict, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where in the flat batch (B T) the N target tokens stand that are no padding, and their labels, each (N,).

    Found where the batch was made, so that no device has to wait for the count.
    """
    label = batch["label"].flatten()
    real = (label != PAD).nonzero().squeeze(1)
    return real.to(device, non_blocking=True), label[real].to(device, non_blocking=True)


def batch_loss(run: Run, model: Transformer, batch: dict, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy in nats, summed over the batch's target tokens; padding is left out before the projection."""
    real, label = real_labels(batch, run.device)
    with run.autocast():
        x = model.hidden(*run.inputs(batch)).flatten(0, 1).index_select(0, real)  # (B, T, D) -> (N, D)
        return fused_loss(x, model.projection_layer.proj, label, smoothing)


def training_loss(run: Run, batch: dict) -> Tensor:
    return batch_loss(run, run.model, batch, run.config.label_smoothing)


def rdrop_loss(run: Run, batch: dict) -> Tensor:
    """R-Drop (Wu et al., 2021, equation 4), halved: two passes under different dropout, which should agree.

    The mean of their two losses, and alpha / 4 times the Kullback-Leibler divergence between their
    predictions, both ways; summed over the batch's target tokens.
    """
    real, label = real_labels(batch, run.device)
    twice = [torch.cat([tensor, tensor]) for tensor in run.inputs(batch)]
    with run.autocast():
        x = run.model.hidden(*twice).unflatten(0, (2, -1)).flatten(1, 2).index_select(1, real)  # (2, N, D)
        logits = run.model.project(x).float()  # (2, N, V)
    smoothing = run.config.label_smoothing
    loss = F.cross_entropy(logits.flatten(0, 1), label.repeat(2), label_smoothing=smoothing, reduction="sum")
    log_p, log_q = logits.log_softmax(-1)
    divergence = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()  # KL(p, q) + KL(q, p)
    return loss / 2 + run.config.rdrop_alpha / 4 * divergence


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
    for batch in make_loader(run.validation, make_batches(run.validation, run.config, epoch=None)):
        loss += batch_loss(run, run.translator.model, batch).item()
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


def train_step(run: Run, batches: list[dict]) -> tuple[Tensor, Tensor, int]:
    """One optimizer step over these batches: loss a target token, gradient norm, number of target tokens."""
    tokens = sum(int((batch["label"] != PAD).sum()) for batch in batches)
    rate = learning_rate(run.progress.step, run.config, run.total_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    total = torch.zeros((), device=run.device)
    for batch in batches:
        loss = (rdrop_loss if run.config.rdrop_alpha else training_loss)(run, batch) / tokens
        loss.backward()
        total += loss.detach()
    parameters = [p for p in run.model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if not torch.isfinite(norm + total):
        raise InputError(
            f"loss {total.item():.4g} and gradient norm {norm.item():.4g} at step {run.progress.step}, "
            f"in the batch that begins {batches[0]['src_text'][0][:60]!r}; the step was not made: "
            "lower --lr or check the data, then go on from the last checkpoint with the same command"
        )
    if run.config.clip_norm:
        nn.utils.clip_grads_with_norm_(parameters, run.config.clip_norm, norm)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.config.ema_decay:
        update_average(run)
    return total, norm, tokens


def train_epoch(run: Run) -> None:
    """The rest of the current epoch, or until a signal or max_steps."""
    config, progress = run.config, run.progress
    batches = make_batches(run.train, config, progress.epoch)
    run.train.begin_epoch(progress.epoch)
    loader = iter(make_loader(run.train, batches[progress.batch :], config.num_workers, run.device.type == "cuda"))
    meter = Meter(run)
    with tqdm(
        total=len(batches), initial=progress.batch, unit="batch", desc=f"Epoch {progress.epoch:02d}", dynamic_ncols=True
    ) as bar:
        while group := next_batches(loader, config):
            try:
                meter.add(*train_step(run, group))
            except torch.OutOfMemoryError:
                sizes = " and ".join(f"{len(b['label'])} sentences of {b['label'].size(1)} tokens" for b in group)
                raise InputError(f"out of memory in a batch of {sizes}; lower --batch-tokens, or --seq-len") from None
            progress.batch += len(group)
            progress.step += 1
            bar.update(len(group))
            if progress.step % LOG_EVERY == 0 or progress.batch == len(batches):
                bar.set_postfix_str(meter.log())
            if run.stop_signal or run.done():
                break
            if config.save_every_steps and progress.step % config.save_every_steps == 0:
                save_within_epoch(run)
    if progress.batch == len(batches):
        progress.epoch, progress.batch = progress.epoch + 1, 0


def next_batches(loader: Iterator[dict], config: Config) -> list[dict]:
    """The batches of one optimizer step; fewer, or none, at the epoch's end."""
    try:
        return list(islice(loader, config.accumulation_steps))
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
        """Loss is the mean since the last look, in nats a target token; speed in target tokens a second."""
        step = self.run.progress.step
        values = {
            "loss": float(self.loss) / self.tokens,
            "lr": self.run.optimizer.param_groups[0]["lr"],
            "tokens_per_second": self.tokens / (time.perf_counter() - self.since),
            "gradient_norm": float(self.norm),
        }
        for name, value in values.items():
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
        run.stop_signal = number
        signal.signal(number, signal.SIG_DFL)
        tqdm.write(f"{signal.Signals(number).name}: saving after this step; once more stops at once", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_model(config: Config) -> Run:
    """Trains, or goes on training, the run in `config.folder`; the model it returns is ready to translate."""
    check_writable(config.folder)
    new = not config.folder.exists()
    config.folder.mkdir(parents=True, exist_ok=True)
    with only_trainer(config.folder):
        sweep(config.folder)
        try:
            run = start(config)
        except InputError:
            if new:  # bad input leaves nothing behind
                shutil.rmtree(config.folder, ignore_errors=True)
                with contextlib.suppress(OSError):
                    config.folder.parent.rmdir()  # weights/, if it was made for this run
            raise
        train_to_the_end(run)
    run.translator.model.eval()
    return run


def train_to_the_end(run: Run) -> None:
    """Epoch after epoch, each saved, then validated."""
    config = run.config
    if run.progress.step and run.progress.batch == 0 and not validated(run):
        run_validation(run)
    if run.done() or out_of_patience(config):
        done = f"{run.progress.epoch} epochs and {run.progress.step:,} steps are done"
        print(f"nothing left to train: {done}; raise --num-epochs, --max-steps or --patience to go on")
        return
    run.model.train()
    begun = time.perf_counter()
    with stop_at_step_boundary(run):
        while not (run.done() or run.stop_signal or out_of_patience(config)):
            epoch = run.progress.epoch
            train_epoch(run)
            if run.progress.epoch > epoch:
                save(run, get_weights_file_path(config, epoch))
            elif run.progress.batch:
                path = save_within_epoch(run)
                tqdm.write(f"saved {path}")
            if not run.stop_signal:
                run_validation(run)
                prune(config)
    run.writer.close()
    if out_of_patience(config):
        print(f"stopped early: no better {config.best_by} for {config.patience} epochs")
    print(f"trained in {time.perf_counter() - begun:.0f} s")


def out_of_patience(config: Config) -> bool:
    """Whether the last `patience` validations have brought nothing better (Prechelt, 1998)."""
    merits = [merit(row, config.best_by) for row in read_scores(config.folder)]
    return 0 < config.patience < len(merits) and max(merits[-config.patience :]) <= max(merits[: -config.patience])


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
    print(f'  python attention.py --run-dir {folder} "A sentence." --html attention.html')
    print(f"  tensorboard --logdir {folder}/tensorboard")


def main(argv: list[str]) -> None:
    run = train_model(parse_config(argv))
    if run.stop_signal:
        print(
            f"stopped; the same command goes on from here: python train.py --run-dir {run.config.folder}",
            file=sys.stderr,
        )
        sys.exit(128 + run.stop_signal)
    what_next(run)


if __name__ == "__main__":
    run_command(main)
