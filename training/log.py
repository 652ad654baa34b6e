"""The training log: loss, gradient norm and speed, for TensorBoard and the progress bar."""

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from compute import distributed
from compute.device import LossScaler
from config import InputError, counted
from runs.folder import RunFolder


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
        """Writes the means since the last call, and returns a line for the progress bar. All processes must call it."""
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
