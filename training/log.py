"""The training log: loss, gradient norm and speed, for TensorBoard and the terminal."""

import math
import os
import sys
import time
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from compute import distributed
from compute.device import LossScaler
from config import InputError, counted
from runs.folder import RunFolder
from training.state import Progress


class StepReport(NamedTuple):
    """Results of one optimizer step. Loss and norm stay on the device, so that a report does not wait for it."""

    loss: Tensor  # nats per target token
    gradient_norm: Tensor
    tokens: int  # number of target tokens, of all processes
    text: str  # the first source sentence of this process


class TrainingLog:
    """Collects step reports and writes their means; `check_finite` ends a run whose loss has diverged."""

    def __init__(self, folder: RunFolder, step: int, scaler: LossScaler | None = None):
        """Continues the curves after this step; later points of an interrupted run are hidden."""
        from torch.utils.tensorboard import SummaryWriter  # imported here because it takes a second

        is_first, self.scaler = distributed.is_first(), scaler
        self.writer = SummaryWriter(str(folder.tensorboard), purge_step=step + 1) if is_first else None
        self.unchecked: list[tuple[int, StepReport]] = []
        self.clear()

    def clear(self) -> None:
        self.loss, self.gradient_norm, self.tokens, self.start = 0.0, 0.0, 0, time.perf_counter()

    def add(self, step: int, report: StepReport) -> None:
        self.unchecked.append((step, report))

    def check_finite(self) -> None:
        """Raises InputError for the first step since the last check whose loss or gradient norm is not finite.

        In fp16, a gradient that is not finite is an overflow: the step is counted as skipped, and training continues
        with a lower loss scale. Reading the values synchronizes with the GPU, so this is not called after every step
        there.
        """
        reports, self.unchecked = self.unchecked, []
        if not reports:
            return
        values = torch.stack([torch.stack([r.loss, r.gradient_norm.to(r.loss)]) for _, r in reports]).tolist()
        for (step, report), (loss, norm) in zip(reports, values, strict=True):
            self.loss, self.tokens = self.loss + loss * report.tokens, self.tokens + report.tokens
            if math.isfinite(loss + norm):
                self.gradient_norm = norm
            elif math.isfinite(loss) and self.is_scaled() and self.scaler.get_scale() >= self.scaler.MIN_SCALE:
                self.scaler.skipped_steps += 1
            else:
                raise InputError(
                    f"loss {loss:.4g} and gradient norm {norm:.4g} at step {step}, in the batch that begins with "
                    f"{report.text[:60]!r}; the step was skipped: lower --lr{' or use fp32' * self.is_scaled()} "
                    "or check the data, then resume from the last checkpoint with the same command"
                )

    def is_scaled(self) -> bool:
        """Whether the loss is scaled, as it is in fp16."""
        return self.scaler is not None and self.scaler.is_enabled()

    def write(self, step: int, learning_rate: float) -> str:
        """Writes the means since the last call, and returns a line for the terminal. All processes must call it."""
        values = {
            "loss": distributed.sum_over_processes(self.loss) / distributed.world_size() / self.tokens,
            "lr": learning_rate,
            "tokens_per_second": self.tokens / (time.perf_counter() - self.start),
            "gradient_norm": self.gradient_norm,
        }
        line = f"loss {values['loss']:.3f}, lr {values['lr']:.1e}, {values['tokens_per_second']:,.0f} tokens/s"
        if self.is_scaled():
            values |= {"loss_scale": self.scaler.get_scale(), "skipped_steps": self.scaler.skipped_steps}
            line += f", {counted(self.scaler.skipped_steps, 'step')} skipped"
        self.add_scalars("train", values, step)
        self.clear()
        return line

    def add_scalars(self, group: str, values: dict[str, float], step: int) -> None:
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def add_text(self, name: str, text: str, step: int) -> None:
        if self.writer:
            self.writer.add_text(name, text, step)

    def flush(self) -> None:
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        if self.writer:
            self.writer.close()


# ---------------------------------------------------------------------------- terminal

SECONDS_BETWEEN_LINES = 300


def print_line(line: str) -> None:
    """Prints a line above the progress bar, in the first process."""
    if distributed.is_first():
        tqdm.write(line)
        sys.stdout.flush()


def warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def duration(seconds: float) -> str:
    """A rounded time: 45 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6_000 else f"{seconds / 3_600:.1f} h"


def shows_bars() -> bool:
    """Whether progress bars are wanted and can be redrawn: in a terminal or a notebook, without TQDM_DISABLE."""
    is_notebook = type(sys.stderr).__module__.startswith("ipykernel")
    return "TQDM_DISABLE" not in os.environ and (sys.stderr.isatty() or is_notebook)


class ProgressBar:
    """A bar over all steps of a run; where none can be shown, a line after each epoch and every few minutes."""

    def __init__(self, progress: Progress, total_steps: int):
        self.start_step, self.total_steps = progress.step, total_steps
        self.start_time = self.last_line = time.perf_counter()
        self.first_line = progress.step + min(100, (total_steps - progress.step) // 10)
        shown = distributed.is_first() and shows_bars()
        # Without smoothing, the remaining time follows from the mean speed, which includes validation. The delay hides
        # the bar if nothing is left to train.
        options = {"smoothing": 0, "miniters": 1, "delay": 1e-3, "dynamic_ncols": True, "disable": not shown}
        self.bar = tqdm(total=total_steps, initial=progress.step, unit="step", **options)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def update(self, progress: Progress) -> None:
        self.bar.set_description_str(f"Epoch {progress.epoch:02d}", refresh=False)
        self.bar.update()

    def report(self, progress: Progress, values: str, is_end_of_epoch: bool) -> None:
        """Shows these values of the last steps in the bar, or prints them if a line is due.

        A line with the remaining time is always printed after a tenth of the steps, 100 at most.
        """
        self.bar.set_postfix_str(values)
        now = time.perf_counter()
        is_due = is_end_of_epoch or now - self.last_line > SECONDS_BETWEEN_LINES
        if (is_due and self.bar.disable) or progress.step >= self.first_line > 0:
            remaining = (now - self.start_time) / (progress.step - self.start_step) * (self.total_steps - progress.step)
            done = f"step {progress.step:,} of {self.total_steps:,}"
            print_line(f"Epoch {progress.epoch:02d}: {done}, {values}, {duration(remaining)} left")
            self.last_line, self.first_line = now, 0
