"""A training run: what the loop has at hand, how it begins, how it is saved, how it goes on to the bit."""

import contextlib
import copy
import math
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from compute import distributed
from compute.ops import keep_freed_memory
from config import (
    FIXED_FIELDS,
    Config,
    InputError,
    checkpoint_name,
    closes_epoch,
    get_weights_file_path,
    save_config,
    weights_files,
)
from corpora.sources import count_shared, load_split
from dataset import Batches, BilingualDataset, get_ds, tokenizer_path
from model import Transformer
from runs.checkpoint import (
    DamagedCheckpoint,
    best_first,
    load_checkpoint,
    load_newest,
    load_weights,
    read_scores,
    save_checkpoint,
    set_aside,
    write_scores,
)
from training.losses import Learner, target_tokens
from translate import WEIGHTS_FILE, Translator, check_tokenizers, choose_precision, get_device, get_model


@dataclass
class Progress:
    """Where the run stands: the batch of the epoch that comes next, and the optimizer steps made."""

    epoch: int = 0
    batch: int = 0
    step: int = 0


@dataclass
class Run:
    """What the loop needs at hand.

    `learner` is the model with its loss, wrapped where several processes train. With `ema_decay` the
    model that translates is an average of the one that learns.
    """

    config: Config
    device: torch.device
    precision: str
    model: Transformer
    learner: nn.Module
    train: BilingualDataset
    validation: BilingualDataset
    translator: Translator
    optimizer: torch.optim.Optimizer
    total_steps: int
    progress: Progress
    writer: SummaryWriter | None = None
    signal_here: int = 0  # the signal that this process was sent
    stop_signal: int = 0  # the one on which all processes stop
    unchecked: list[tuple[int, str, Tensor, Tensor]] = field(default_factory=list)  # see check_finite

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def inputs(self, batch: dict) -> list[Tensor]:
        """The arguments of the loss, on the model's device."""
        names = ("encoder_input", "decoder_input", "encoder_mask", "decoder_mask")
        tensors = [*(batch[name] for name in names), *target_tokens(batch)]
        return [tensor.to(self.device, non_blocking=True) for tensor in tensors]

    def together(self, now: bool):
        """Where gradients are averaged over the processes: only at a step's last batch."""
        return contextlib.nullcontext() if now or distributed.world_size() == 1 else self.learner.no_sync()

    def check_finite(self) -> None:
        """Raises InputError for the first step since the last look whose loss or gradient norm is not finite.

        `unchecked` holds each step's number, the first words of its batch, its loss and its norm. A look
        makes a GPU wait.
        """
        steps, self.unchecked = self.unchecked, []
        if not steps:
            return
        values = torch.stack([torch.stack([loss, norm.to(loss)]) for _, _, loss, norm in steps]).tolist()
        for (step, words, *_), (loss, norm) in zip(steps, values, strict=True):
            if not math.isfinite(loss + norm):
                raise InputError(
                    f"loss {loss:.4g} and gradient norm {norm:.4g} at step {step}, in the batch that begins "
                    f"{words[:60]!r}; the step was not made: "
                    "lower --lr or check the data, then go on from the last checkpoint with the same command"
                )

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


def start(config: Config) -> Run:
    """Everything up to the first step: checkpoint found, data prepared, model built or restored."""
    keep_freed_memory()
    device = distributed.own_device(get_device(config.device))
    first = distributed.is_first()
    state, path, in_the_way = choose_checkpoint(config)
    # Bad input has to come to light before anything is written or moved.
    shared = first and count_shared(load_split(config, "train"), load_split(config, "validation"))
    if state is None and in_the_way and first:
        print(f"training afresh: an earlier run's files were moved to {set_aside(in_the_way)}")
    train, validation, tokenizer_src, tokenizer_tgt = get_ds(config)
    torch.manual_seed(config.seed)
    model = get_model(config, tokenizer_src.get_vocab_size(), tokenizer_tgt.get_vocab_size()).to(device)
    optimizer = make_optimizer(model, config, device)
    if not first:
        torch.manual_seed(config.seed + distributed.rank())  # the same weights, another dropout
    batches_a_step = config.accumulation_steps * distributed.world_size()
    steps_per_epoch = math.ceil(len(Batches(train, config, epoch=0)) / batches_a_step)
    total_steps = steps_per_epoch * config.num_epochs
    run = Run(
        config=config,
        device=device,
        precision=choose_precision(config.precision, device, model),
        model=model,
        learner=Learner(model, config.label_smoothing, config.rdrop_alpha),
        train=train,
        validation=validation,
        translator=Translator(
            copy.deepcopy(model).requires_grad_(False).eval() if config.ema_decay else model,
            config,
            tokenizer_src,
            tokenizer_tgt,
        ),
        optimizer=optimizer,
        total_steps=min(total_steps, config.max_steps or total_steps),
        progress=Progress(),
    )
    if first:
        describe(run)
    if shared:
        print(
            f"warning: {shared:,} validation pairs also stand in the training set, so scores will flatter",
            file=sys.stderr,
        )
    if state:
        restore(run, state, path)
        if in_the_way and first:
            print(f"preload {config.preload}: later checkpoints were moved to {set_aside(in_the_way)}")
    if first:
        save_config(config)
        run.writer = SummaryWriter(str(config.folder / "tensorboard"), purge_step=run.progress.step + 1)
    return run


def describe(run: Run) -> None:
    """Says what will be trained on what, and where."""
    config, device = run.config, run.device
    names = {"cuda": torch.cuda.get_device_name, "cpu": lambda _: f"{torch.get_num_threads()} threads"}
    name = names.get(device.type, lambda _: "Apple GPU")(device)
    parameters = sum(p.numel() for p in run.model.parameters())
    sizes = run.translator.tokenizer_src.get_vocab_size(), run.translator.tokenizer_tgt.get_vocab_size()
    processes = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    print(f"device       {device.type} ({name}), {run.precision}{processes}")
    print(f"run          {config.folder}")
    print(f"corpus       {config.datasource}, {config.lang_src} to {config.lang_tgt}")
    print(f"             {len(run.train):,} pairs to train on, {len(run.validation):,} to validate on")
    for part, data in (("training", run.train), ("validation", run.validation)):
        if data.skipped_blank or data.skipped_long:
            print(f"             left out of {part}: {data.skipped_blank:,} pairs with a blank side,", end=" ")
            print(f"{data.skipped_long:,} with over {config.seq_len} tokens (--seq-len)")
    print(f"model        {parameters:,} parameters, {sizes[0]:,} source and {sizes[1]:,} target tokens")
    print(f"training     {run.total_steps:,} steps, {config.num_epochs} epochs at most")
    if config.keep_checkpoints:
        print(f"             the last {config.keep_checkpoints} checkpoints and the best stay (--keep-checkpoints)")


def check_writable(folder: Path) -> None:
    """Before any waiting, and without making the folder yet: bad input should leave nothing behind."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"{there} is a file; choose another --run-dir")
    if (folder / WEIGHTS_FILE).is_file():
        raise InputError(f"{folder} holds exported weights, which cannot be trained on; choose another --run-dir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"cannot write into {there}; mend its permissions or choose another --run-dir")


# ---------------------------------------------------------------------------- saving and going on


def save(run: Run, path: str | Path) -> None:
    """Everything that a run needs to go on as if it had never stopped; the first process writes it."""
    run.check_finite()
    config, progress = run.config, run.progress
    rng = distributed.gather(rng_state())
    if not distributed.is_first():
        return
    save_checkpoint(
        path,
        {
            "model": run.translator.model.state_dict(),
            "learner": run.model.state_dict() if config.ema_decay else None,
            "optimizer": run.optimizer.state_dict(),
            "progress": asdict(progress),
            "rng": rng,
            "config": asdict(config),
            "corpus": run.train.fingerprint,
            "tokenizers": [
                tokenizer_path(config, lang).read_text(encoding="utf8") for lang in (config.lang_src, config.lang_tgt)
            ],
        },
    )
    # What was saved within an epoch is superseded by what was saved later, but for one to fall back on.
    within = [file for file in weights_files(config.folder) if not closes_epoch(file)]
    here = within.index(Path(path)) if Path(path) in within else -1
    keep = within[max(0, here - 1) : here + 1]
    for old in within:
        if old not in keep:
            old.unlink(missing_ok=True)


def prune(config: Config) -> None:
    """Removes the checkpoints of epochs before the last `keep_checkpoints`, but for the best."""
    epochs = [path for path in weights_files(config.folder) if closes_epoch(path)]
    if config.keep_checkpoints:
        best = next((path for path in best_first(config) if path in epochs), None)
        for path in epochs[: -config.keep_checkpoints]:
            if path != best:
                path.unlink(missing_ok=True)


def save_here(run: Run) -> Path:
    """Saves the run under the name that fits where it stands."""
    path = run.config.folder / checkpoint_name(**asdict(run.progress))
    save(run, path)
    return path


def rng_state() -> dict:
    """State of the generators that dropout draws from."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    if torch.backends.mps.is_available() and state["mps"] is not None:
        torch.mps.set_rng_state(state["mps"])


def choose_checkpoint(config: Config) -> tuple[dict | None, Path | None, list[Path]]:
    """The state to go on from, as `preload` says, its file, and the files that would get in the way."""
    files = weights_files(config.folder)
    scores = [path for path in [config.folder / "scores.jsonl"] if path.is_file()]
    if config.preload == "none":
        return None, None, files + scores
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
        return None, None, scores
    path, state = found
    check_same_run(config, state["config"], path)
    later = files[files.index(path) + 1 :] if config.preload != "latest" else []
    return state, path, later


def check_same_run(config: Config, saved: dict, path: Path) -> None:
    """What shapes the weights or the order of the data cannot change within a run."""
    saved = {**asdict(Config()), **saved}  # a field that was not there yet had its default
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
    if state["corpus"] != run.train.fingerprint:
        before = state["corpus"].split()[0]
        raise InputError(
            f"the corpus has changed since {path} was saved ({before} training pairs then, {len(run.train)} now); "
            "restore it, or train in another --run-dir"
        )
    check_tokenizers(run.config, state, path)
    load_weights(run.translator.model, state["model"])
    if run.config.ema_decay:
        load_weights(run.model, state["learner"])
    settings = [
        {name: group[name] for name in ("weight_decay", "betas", "fused")} for group in run.optimizer.param_groups
    ]
    run.optimizer.load_state_dict(state["optimizer"])
    for group, mine in zip(run.optimizer.param_groups, settings, strict=True):
        group.update(mine)  # what the command line says now, not what it said then
    run.progress = Progress(**state["progress"])
    if len(state["rng"]) == distributed.world_size():  # else dropout goes another way
        set_rng_state(state["rng"][distributed.rank()])
    if distributed.is_first():
        drop_later_scores(run)
        where = f"batch {run.progress.batch} of epoch" if run.progress.batch else "the start of epoch"
        print(f"going on     from {path.name}, at {where} {run.progress.epoch}, step {run.progress.step:,}")


def drop_later_scores(run: Run) -> None:
    """Takes from scores.jsonl what an earlier try wrote past the step that the run goes on from."""
    rows = read_scores(run.config.folder)
    kept = [row for row in rows if row["step"] <= run.progress.step]
    if kept != rows:
        write_scores(run.config.folder, kept)
