"""Training: python train.py --preset toy

    B  sentences in the batch    T  target length in tokens    V  target vocabulary

Reads top to bottom: the loss, the learning rate, validation, then the run and its loop. One
optimizer step adds up the gradients of `accumulation_steps` batches; its loss is the sum over all
their target tokens divided by the number of those tokens, so padding and batch sizes do not tilt it.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from checkpoint import (
    DamagedCheckpoint,
    load_checkpoint,
    load_newest,
    load_weights,
    only_trainer,
    save_checkpoint,
    set_aside,
    sweep,
)
from config import (
    FIXED_FIELDS,
    Config,
    InputError,
    get_config,
    get_weights_file_path,
    parse_config,
    run_command,
    save_config,
    weights_files,
    write_atomically,
)
from dataset import PAD, BilingualDataset, count_shared, get_ds, load_split, make_batches, make_loader, tokenizer_path
from evaluate import format_scores, score
from translate import Translator, check_tokenizers, get_device, get_model

LOG_EVERY = 10  # optimizer steps between two lines of the log


def token_loss(logits: Tensor, label: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy summed over the target tokens: logits (B, T, V), label (B, T), padding not counted.

    With smoothing the target is 1 - smoothing on the label and the rest spread over all V tokens
    (section 5.4; Szegedy et al., 2016, section 7).
    """
    return F.cross_entropy(
        logits.flatten(0, 1), label.flatten(), ignore_index=PAD, label_smoothing=smoothing, reduction="sum"
    )


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
def validation_loss(run: "Run") -> float:
    """Cross-entropy in nats a target token, without smoothing, over the whole validation set."""
    loss, tokens = 0.0, 0
    for batch in make_loader(run.validation, make_batches(run.validation, run.config, epoch=None)):
        with run.autocast():
            logits = run.model(*run.inputs(batch))
        label = batch["label"].to(run.device)
        loss += token_loss(logits.float(), label).item()
        tokens += (label != PAD).sum().item()
    return loss / tokens


def run_validation(run: "Run") -> dict[str, float]:
    """Loss over the whole validation set, scores of some greedy translations, a few of them shown.

    Every row goes to TensorBoard and to scores.jsonl in the run's folder.
    """
    config = run.config
    run.model.eval()
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
    with (config.folder / "scores.jsonl").open("a", encoding="utf8") as file:
        file.write(json.dumps({**asdict(run.progress), **scores}) + "\n")
    return scores


def validated(run: "Run") -> bool:
    """Whether scores.jsonl has this step's line; a run killed between saving and validating lacks it."""
    path = run.config.folder / "scores.jsonl"
    lines = path.read_text(encoding="utf8").splitlines() if path.is_file() else []
    return any(f'"step": {run.progress.step},' in line for line in lines)


# ---------------------------------------------------------------------------- the run


@dataclass
class Progress:
    """Where the run stands: the batch of the epoch that comes next, and the optimizer steps made."""

    epoch: int = 0
    batch: int = 0
    step: int = 0


@dataclass
class Run:
    """What the loop needs at hand."""

    config: Config
    device: torch.device
    precision: str
    train: BilingualDataset
    validation: BilingualDataset
    translator: Translator
    optimizer: torch.optim.Optimizer
    total_steps: int
    progress: Progress
    writer: SummaryWriter | None = None
    stop_signal: int | None = field(default=None)

    @property
    def model(self) -> nn.Module:
        return self.translator.model

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def inputs(self, batch: dict) -> list[Tensor]:
        """The model's four arguments, on its device."""
        names = ("encoder_input", "decoder_input", "encoder_mask", "decoder_mask")
        return [batch[name].to(self.device, non_blocking=True) for name in names]

    def done(self) -> bool:
        progress, config = self.progress, self.config
        return progress.epoch >= config.num_epochs or 0 < config.max_steps <= progress.step


def make_optimizer(model: nn.Module, config: Config, device: torch.device) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, not on biases and norms."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.adam_beta2), eps=1e-9, fused=device.type != "mps")


def choose_precision(config: Config, device: torch.device) -> str:
    """bf16 on a GPU with units for it (compute capability 8 and up); on a CPU casting costs more than it saves."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"


def start(config: Config) -> Run:
    """Everything up to the first step: checkpoint found, data prepared, model built or restored."""
    device = get_device(config.device)
    state, path, in_the_way = choose_checkpoint(config)
    # Bad input has to come to light before anything is written or moved.
    shared = count_shared(load_split(config, "train"), load_split(config, "validation"))
    if state is None and in_the_way:
        print(f"preload none: an earlier run's checkpoints were moved to {set_aside(in_the_way)}")
    train, validation, tokenizer_src, tokenizer_tgt = get_ds(config)
    torch.manual_seed(config.seed)
    model = get_model(config, tokenizer_src.get_vocab_size(), tokenizer_tgt.get_vocab_size()).to(device)
    optimizer = make_optimizer(model, config, device)
    steps_per_epoch = math.ceil(len(make_batches(train, config, epoch=0)) / config.accumulation_steps)
    total_steps = steps_per_epoch * config.num_epochs
    run = Run(
        config=config,
        device=device,
        precision=choose_precision(config, device),
        train=train,
        validation=validation,
        translator=Translator(model, config, tokenizer_src, tokenizer_tgt),
        optimizer=optimizer,
        total_steps=min(total_steps, config.max_steps or total_steps),
        progress=Progress(),
    )
    describe(run)
    if shared:
        print(
            f"warning: {shared:,} validation pairs also stand in the training set, so scores will flatter",
            file=sys.stderr,
        )
    if state:
        restore(run, state, path)
        if in_the_way:
            print(f"preload {config.preload}: later checkpoints were moved to {set_aside(in_the_way)}")
    save_config(config)
    run.writer = SummaryWriter(str(config.folder / "tensorboard"), purge_step=run.progress.step + 1)
    return run


def describe(run: Run) -> None:
    """Says what will be trained on what, before any waiting."""
    config, device = run.config, run.device
    names = {"cuda": torch.cuda.get_device_name, "cpu": lambda _: f"{torch.get_num_threads()} threads"}
    name = names.get(device.type, lambda _: "Apple GPU")(device)
    parameters = sum(p.numel() for p in run.model.parameters())
    sizes = run.translator.tokenizer_src.get_vocab_size(), run.translator.tokenizer_tgt.get_vocab_size()
    print(f"device       {device.type} ({name}), {run.precision}")
    print(f"run          {config.folder}")
    print(f"corpus       {config.datasource}, {config.lang_src} to {config.lang_tgt}")
    print(f"             {len(run.train):,} pairs to train on, {len(run.validation):,} to validate on")
    for part, data in (("training", run.train), ("validation", run.validation)):
        if data.skipped_blank or data.skipped_long:
            print(f"             left out of {part}: {data.skipped_blank:,} pairs with a blank side,", end=" ")
            print(f"{data.skipped_long:,} with over {config.seq_len} tokens (--seq-len)")
    print(f"model        {parameters:,} parameters, {sizes[0]:,} source and {sizes[1]:,} target tokens")
    print(f"training     {run.total_steps:,} steps, {config.num_epochs} epochs at most")


def check_writable(folder: Path) -> None:
    """Before any waiting, and without making the folder yet: bad input should leave nothing behind."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"{there} is a file; choose another --run-dir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"cannot write into {there}; mend its permissions or choose another --run-dir")


# ---------------------------------------------------------------------------- saving and going on


def save(run: Run, path: str | Path) -> None:
    """Everything that a run needs to go on as if it had never stopped."""
    config, progress = run.config, run.progress
    save_checkpoint(
        path,
        {
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "progress": asdict(progress),
            "rng": rng_state(),
            "config": asdict(config),
            "corpus": corpus_fingerprint(run.train),
            "tokenizers": [
                tokenizer_path(config, lang).read_text(encoding="utf8") for lang in (config.lang_src, config.lang_tgt)
            ],
        },
    )
    # What was saved within an epoch is superseded by what was saved later, but for one to fall back on.
    within = [file for file in weights_files(config.folder) if "_step_" in file.name]
    keep = within[-2:] if Path(path) in within else []
    for old in within:
        if old not in keep:
            old.unlink(missing_ok=True)


def save_within_epoch(run: Run) -> Path:
    stem = get_weights_file_path(run.config, run.progress.epoch).removesuffix(".pt")
    path = Path(f"{stem}_step_{run.progress.step:08d}.pt")
    save(run, path)
    return path


def rng_state() -> dict:
    """State of the generators that dropout draws from."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def corpus_fingerprint(dataset: BilingualDataset) -> str:
    """Notices a corpus that has changed under a run: the lengths of all its sentences, in order."""
    lengths = np.stack([dataset.src_lengths, dataset.tgt_lengths])
    return f"{len(dataset)} pairs {hashlib.sha256(lengths.astype(np.int32).tobytes()).hexdigest()[:16]}"


def choose_checkpoint(config: Config) -> tuple[dict | None, Path | None, list[Path]]:
    """The state to go on from, as `preload` says, its file, and the files that would get in the way."""
    files = weights_files(config.folder)
    if config.preload == "none":
        scores = config.folder / "scores.jsonl"
        return None, None, files + [scores] * scores.is_file()
    if config.preload == "latest":
        found = load_newest(config.folder)
    else:
        path = Path(get_weights_file_path(config, config.preload))
        if path not in files:
            have = ", ".join(p.name for p in files) or "none"
            raise InputError(f"no checkpoint {path}; there are {have}")
        try:
            found = path, load_checkpoint(path)
        except DamagedCheckpoint as error:
            raise InputError(f"{path} is damaged ({error}); choose another epoch, or --preload latest") from None
    if found is None:
        return None, None, []
    path, state = found
    check_same_run(config, state["config"], path)
    later = files[files.index(path) + 1 :] if config.preload != "latest" else []
    return state, path, later


def check_same_run(config: Config, saved: dict, path: Path) -> None:
    """What shapes the weights or the order of the data cannot change within a run."""
    changed = [
        f"{name} {saved[name]!r} there, {getattr(config, name)!r} now"
        for name in FIXED_FIELDS
        if saved[name] != getattr(config, name)
    ]
    if changed:
        raise InputError(
            f"{path} was trained with other settings: {'; '.join(changed)}; "
            "give the old ones, another --run-dir, or --preload none"
        )


def restore(run: Run, state: dict, path: Path) -> None:
    """Puts a saved state back, to the bit."""
    if state["corpus"] != corpus_fingerprint(run.train):
        before = state["corpus"].split()[0]
        raise InputError(
            f"the corpus has changed since {path} was saved ({before} training pairs then, {len(run.train)} now); "
            "restore it, or train in another --run-dir"
        )
    check_tokenizers(run.config, state, path)
    load_weights(run.model, state["model"])
    settings = [
        {name: group[name] for name in ("weight_decay", "betas", "fused")} for group in run.optimizer.param_groups
    ]
    run.optimizer.load_state_dict(state["optimizer"])
    for group, mine in zip(run.optimizer.param_groups, settings, strict=True):
        group.update(mine)  # what the command line says now, not what it said then
    run.progress = Progress(**state["progress"])
    torch.set_rng_state(state["rng"]["cpu"])
    if torch.cuda.is_available() and len(state["rng"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["rng"]["cuda"])
    if torch.backends.mps.is_available() and state["rng"]["mps"] is not None:
        torch.mps.set_rng_state(state["rng"]["mps"])
    where = f"batch {run.progress.batch} of epoch" if run.progress.batch else "the start of epoch"
    drop_later_scores(run)
    print(f"going on     from {path.name}, at {where} {run.progress.epoch}, step {run.progress.step:,}")


def drop_later_scores(run: Run) -> None:
    """Takes from scores.jsonl what an earlier try wrote past the step that the run goes on from."""
    path = run.config.folder / "scores.jsonl"
    if path.is_file():
        lines = path.read_text(encoding="utf8").splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= run.progress.step]
        if kept != lines:
            write_atomically(path, "".join(kept))


# ---------------------------------------------------------------------------- the loop


def train_step(run: Run, batches: list[dict]) -> tuple[Tensor, Tensor, int]:
    """One optimizer step over these batches: loss a target token, gradient norm, number of target tokens."""
    tokens = sum(int((batch["label"] != PAD).sum()) for batch in batches)
    rate = learning_rate(run.progress.step, run.config, run.total_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    total = torch.zeros((), device=run.device)
    for batch in batches:
        with run.autocast():
            logits = run.model(*run.inputs(batch))
            loss = (
                token_loss(logits, batch["label"].to(run.device, non_blocking=True), run.config.label_smoothing)
                / tokens
            )
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
    return total, norm, tokens


def train_epoch(run: Run) -> None:
    """The rest of the current epoch, or until a signal or max_steps."""
    config, progress = run.config, run.progress
    batches = make_batches(run.train, config, progress.epoch)
    loader = iter(make_loader(run.train, batches[progress.batch :], config.num_workers, run.device.type == "cuda"))
    meter = Meter(run)
    with tqdm(
        total=len(batches), initial=progress.batch, unit="batch", desc=f"Epoch {progress.epoch:02d}", dynamic_ncols=True
    ) as bar:
        while group := list(islice(loader, config.accumulation_steps)):
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


@contextmanager
def stop_at_step_boundary(run: Run) -> Iterator[None]:
    """Ctrl-C or SIGTERM asks the loop to save and stop; the second one stops at once."""

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
    run.model.eval()
    return run


def train_to_the_end(run: Run) -> None:
    """Epoch after epoch, each saved, then validated."""
    config = run.config
    if run.progress.step and run.progress.batch == 0 and not validated(run):
        run_validation(run)
    if run.done():
        done = f"{run.progress.epoch} epochs and {run.progress.step:,} steps are done"
        print(f"nothing left to train: {done}; raise --num-epochs or --max-steps to go on")
        return
    run.model.train()
    begun = time.perf_counter()
    with stop_at_step_boundary(run):
        while not run.done() and not run.stop_signal:
            epoch = run.progress.epoch
            train_epoch(run)
            if run.progress.epoch > epoch:
                save(run, get_weights_file_path(config, epoch))
            elif run.progress.batch:
                path = save_within_epoch(run)
                tqdm.write(f"saved {path}")
            if not run.stop_signal:
                run_validation(run)
    run.writer.close()
    print(f"trained in {time.perf_counter() - begun:.0f} s")


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
