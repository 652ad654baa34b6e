"""Everything that can be set, in one place: the `Config`, its presets, file names, command lines."""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import functools
import io
import json
import math
import os
import re
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

WEIGHTS_FOLDER = Path("weights")
MODEL_BASENAME = "tmodel_"


class InputError(Exception):
    """Something the person at the keyboard can mend: one line that names the thing and the fix."""


@dataclass(frozen=True)
class Config:
    """Trains a Transformer. With no flags: English to Italian on the Hub's opus_books.

    Sources (datasource, validation_source, test_source) are each one of: toy, the embedded corpus;
    a Hub dataset or a local folder laid out like one, with :SPLIT at the end for a split other than
    train; a .tsv, .csv, .jsonl or .parquet file; or the prefix of two aligned text files, where
    data/train means data/train.en and data/train.de.
    """

    # fmt: off
    preset: Literal["opus_books", "tutorial", "toy", "multi30k", "wmt14"] = "opus_books"  # the starting point, which the other flags change
    run_dir: str = ""                     # the run's folder; empty: weights/<corpus>.<src>-<tgt>

    datasource: str = "Helsinki-NLP/opus_books"  # where the training pairs come from
    validation_source: str = ""           # empty: a seeded part of datasource is split off
    test_source: str = ""                 # read by evaluate.py alone
    validation_fraction: float = 0.1      # the part split off where there is no validation_source, up to 10,000 pairs
    lang_src: str = "en"                  # language to translate from
    lang_tgt: str = "it"                  # language to translate into
    tokenizer: Literal["bpe", "word"] = "bpe"  # pieces of words, nothing unknown; or whole words seen at least twice
    vocab_size: int = 16_000              # tokens in a vocabulary, at most
    shared_vocab: bool = True             # one vocabulary for both languages
    seq_len: int = 350                    # longest sentence in tokens, [SOS] and [EOS] included; longer pairs are skipped
    batch_tokens: int = 8_192             # sentences x longest sentence in a batch; 0: batch_size sentences
    batch_size: int = 8                   # sentences a batch where batch_tokens is 0
    num_workers: int = 0                  # processes that prepare batches; 0: the training process does

    d_model: int = 512                    # width of the residual stream (D)
    encoder_layers: int = 6               # blocks in the encoder
    decoder_layers: int = 6               # blocks in the decoder
    num_heads: int = 8                    # attention heads in a block (H)
    d_ff: int = 2_048                     # width inside the feed-forward block
    dropout: float = 0.1                  # share of activations zeroed in training: of embeddings and sublayers
    attention_dropout: float = 0.1        # of the attention weights
    feed_forward_dropout: float = 0.1     # of the feed-forward block's inner activations
    share_embeddings: Literal["none", "target", "all"] = "all"  # which share one matrix: target embedding and projection; source too

    num_epochs: int = 20                  # passes over the training pairs
    max_steps: int = 0                    # stop after this many optimizer steps; 0: no limit
    lr: float = 7e-4                      # learning rate at its highest
    lr_schedule: Literal["constant", "inverse_sqrt", "cosine"] = "inverse_sqrt"  # how it moves after the warmup
    warmup_steps: int = 4_000             # steps over which it rises from 0 to lr
    adam_beta2: float = 0.98              # memory of Adam's second moment
    weight_decay: float = 0.0             # of AdamW, on matrices only
    label_smoothing: float = 0.1          # probability spread evenly over the vocabulary
    accumulation_steps: int = 1           # batches added up for one optimizer step
    clip_norm: float = 1.0                # longest gradient; 0: not clipped
    rdrop_alpha: float = 0.0              # weight of R-Drop, two passes whose dropout must agree (Wu et al., 2021); 0: one pass
    bpe_dropout: float = 0.0              # share of merges left out when words are cut anew each epoch (Provilkov et al., 2020)
    ema_decay: float = 0.0                # of the moving average of the weights that translates; 0: none is kept
    seed: int = 42                        # of the split, the order, the weights and the dropout

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: CUDA, then Apple's MPS, then CPU
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the device gains from it
    preload: str = "latest"               # checkpoint to go on from: latest, none (train afresh) or an epoch
    save_every_steps: int = 0             # also save in mid-epoch, every so many steps; 0: at an epoch's end alone
    keep_checkpoints: int = 3             # epochs whose checkpoints stay, beside the best; 0: all
    best_by: Literal["loss", "bleu", "chrf", "exact"] = "loss"  # what makes an epoch the best; the loss is over the whole validation set
    patience: int = 0                     # stop after so many epochs without a better score; 0: never
    mirror_dir: str = ""                  # a folder on a Drive or share that gets a verified copy of the run; empty: none
    validation_sentences: int = 200       # validation sentences translated after an epoch for BLEU and the like
    validation_examples: int = 2          # how many of them are shown
    # fmt: on

    def __post_init__(self):
        check_types(self)
        check_values(self)

    @property
    def folder(self) -> Path:
        """The run's folder: config, tokenizers, checkpoints and TensorBoard files."""
        if self.run_dir:
            return Path(self.run_dir)
        corpus = re.sub(r"\.(tsv|csv|jsonl|parquet)$", "", Path(self.datasource.split(":")[0]).name)
        corpus = re.sub(r"[^A-Za-z0-9._-]", "_", corpus)
        return WEIGHTS_FOLDER / f"{corpus}.{self.lang_src}-{self.lang_tgt}"

    def model_arguments(self) -> dict:
        """The arguments of `build_transformer` beside the vocabulary sizes."""
        return {
            "src_seq_len": self.seq_len,
            "tgt_seq_len": self.seq_len,
            "d_model": self.d_model,
            "N": self.encoder_layers,
            "decoder_N": self.decoder_layers,
            "h": self.num_heads,
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
            "feed_forward_dropout": self.feed_forward_dropout,
            "d_ff": self.d_ff,
            "share_embeddings": self.share_embeddings,
        }


PRESETS: dict[str, dict] = {
    "opus_books": {"dropout": 0.3},
    # The video's very settings: two word vocabularies, 8 sentences a batch, Adam at a constant rate.
    "tutorial": {
        "tokenizer": "word",
        "vocab_size": 30_000,
        "shared_vocab": False,
        "share_embeddings": "none",
        "batch_tokens": 0,
        "batch_size": 8,
        "lr": 1e-4,
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "adam_beta2": 0.999,
        "clip_norm": 0.0,
    },
    # The embedded corpus, on a laptop in about a minute.
    "toy": {
        "datasource": "toy",
        "validation_source": "toy:validation",
        "test_source": "toy:test",
        "tokenizer": "word",
        "shared_vocab": False,
        "share_embeddings": "target",
        "seq_len": 64,
        "batch_tokens": 1_024,
        "d_model": 128,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "num_heads": 8,
        "d_ff": 256,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "feed_forward_dropout": 0.0,
        "num_epochs": 4,
        "lr": 3e-3,
        "lr_schedule": "cosine",
        "warmup_steps": 100,
    },
    # Transformer-Tiny of Wu et al. 2021, "Good for Misconceived Reasons", section 4, but pre-norm, in smaller
    # batches, with a cosine and a moving average, so that two hours on two CPU cores are enough.
    "multi30k": {
        "datasource": "bentrevett/multi30k",
        "validation_source": "bentrevett/multi30k:validation",
        "test_source": "bentrevett/multi30k:test",
        "lang_tgt": "de",
        "vocab_size": 10_000,
        "seq_len": 128,
        "d_model": 128,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "num_heads": 4,
        "d_ff": 256,
        "dropout": 0.3,
        "attention_dropout": 0.0,
        "feed_forward_dropout": 0.0,
        "batch_tokens": 2_048,
        "num_epochs": 90,
        "lr": 3e-3,
        "lr_schedule": "cosine",
        "warmup_steps": 1_000,
        "ema_decay": 0.999,
        "keep_checkpoints": 10,
        "validation_sentences": 1_014,
    },
    # The base model of Vaswani et al. 2017, table 3.
    "wmt14": {
        "datasource": "wmt/wmt14",
        "validation_source": "wmt/wmt14:validation",
        "test_source": "wmt/wmt14:test",
        "lang_tgt": "de",
        "vocab_size": 32_000,
        "seq_len": 256,
        "batch_tokens": 25_000,
        "max_steps": 100_000,
        "save_every_steps": 1_000,
        "validation_sentences": 1_000,
    },
}

# Settings of one invocation, not of the run: a folder may move, and another machine may go on with it.
INVOCATION_FIELDS = ("run_dir", "mirror_dir", "preload", "device", "num_workers")

# What shapes the weights, the split or the order of the batches, so cannot change when a run goes on.
# fmt: off
FIXED_FIELDS = (
    "lang_src", "lang_tgt", "tokenizer", "vocab_size", "shared_vocab", "seq_len", "batch_tokens", "batch_size",
    "accumulation_steps", "seed", "ema_decay", "bpe_dropout", "d_model", "encoder_layers", "decoder_layers", "num_heads", "d_ff", "share_embeddings",
)
# fmt: on


def get_config(preset: str = "opus_books", **overrides) -> Config:
    """The preset's config with some fields changed. Raises InputError on a name or value it cannot take."""
    if preset not in PRESETS:
        raise InputError(f"no preset {preset!r}{did_you_mean(preset, PRESETS)}; there are {', '.join(PRESETS)}")
    reject_unknown(overrides)
    return Config(**{"preset": preset, **PRESETS[preset], **overrides})


# ---------------------------------------------------------------------------- checks


def did_you_mean(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def reject_unknown(values: dict) -> None:
    known = [field.name for field in dataclasses.fields(Config)]
    for name in values:
        if name not in known:
            raise InputError(f"unknown config key {name!r}{did_you_mean(name, known)}")


def check_types(config: Config) -> None:
    """Each field holds its declared type; a whole number may stand where a float is wanted."""
    for name, kind in typing.get_type_hints(Config).items():
        value = getattr(config, name)
        if typing.get_origin(kind) is Literal:
            if value not in typing.get_args(kind):
                choices = ", ".join(typing.get_args(kind))
                raise InputError(f"{name} is {value!r}; choose one of {choices}")
        elif kind is float and type(value) is int:
            object.__setattr__(config, name, float(value))
        elif type(value) is not kind:
            raise InputError(f"{name} is {value!r}, of type {type(value).__name__}; give a {kind.__name__}")


def check_values(config: Config) -> None:
    """Numbers in their ranges, names that are safe in a path, settings that go together."""

    def require(good: bool, name: str, wanted: str) -> None:
        if not good:
            raise InputError(f"{name} is {getattr(config, name)!r}; {wanted}")

    positive = (
        "d_model encoder_layers decoder_layers num_heads d_ff num_epochs lr accumulation_steps batch_size vocab_size"
    )
    for name in positive.split():
        require(0 < getattr(config, name) < math.inf, name, "give a number above 0")
    not_negative = "batch_tokens num_workers max_steps warmup_steps weight_decay clip_norm save_every_steps keep_checkpoints patience rdrop_alpha validation_sentences validation_examples seed"
    for name in not_negative.split():
        require(0 <= getattr(config, name) < math.inf, name, "give 0 or more")
    for name in (
        "dropout",
        "bpe_dropout",
        "attention_dropout",
        "feed_forward_dropout",
        "label_smoothing",
        "adam_beta2",
        "ema_decay",
    ):
        require(0 <= getattr(config, name) < 1, name, "give a number from 0 up to, not including, 1")
    require(0 < config.validation_fraction < 1, "validation_fraction", "give a number between 0 and 1")
    require(config.seq_len >= 3, "seq_len", "give 3 or more: [SOS], a word, [EOS]")
    require(config.datasource != "", "datasource", "name a source; --preset toy needs none")
    require(
        config.d_model % config.num_heads == 0, "d_model", f"give a multiple of num_heads, which is {config.num_heads}"
    )
    require(config.d_model % 2 == 0, "d_model", "give an even number: positions come as sine and cosine pairs")
    for name in ("lang_src", "lang_tgt"):
        safe = re.fullmatch(r"[A-Za-z0-9._-]+", getattr(config, name)) and set(getattr(config, name)) != {"."}
        require(bool(safe), name, "give letters, digits, '.', '_' and '-' only, such as en")
    require(config.lang_src != config.lang_tgt, "lang_tgt", "the same as lang_src; give two languages")
    require(
        config.preload in ("latest", "none") or config.preload.isdecimal(),
        "preload",
        "give latest, none or an epoch's number",
    )
    if config.bpe_dropout:
        require(config.tokenizer == "bpe", "bpe_dropout", "whole words cannot be cut; give 0, or --tokenizer bpe")
    if config.share_embeddings == "all":
        require(config.shared_vocab, "share_embeddings", "sharing all of them needs --shared-vocab; or use target")


# ---------------------------------------------------------------------------- the run's folder


def get_weights_file_path(config: Config, epoch: int | str) -> str:
    """The checkpoint of one epoch: weights/<run>/tmodel_07.pt."""
    return str(config.folder / f"{MODEL_BASENAME}{int(epoch):02d}.pt")


def weights_files(run_dir: str | Path) -> list[Path]:
    """The run's checkpoints, oldest first; numbers compare as numbers (100 after 99).

    tmodel_07.pt closes epoch 7; tmodel_07_step_00001200.pt was saved within it, so comes before.
    """
    return sorted(filter(checkpoint_age, Path(run_dir).glob(f"{MODEL_BASENAME}*.pt")), key=checkpoint_age)


def checkpoint_age(path: Path) -> tuple[int, float] | None:
    """Epoch and step of a checkpoint's name, which sort as they were written; None where it is no such name."""
    match = re.fullmatch(rf"{MODEL_BASENAME}(\d+)(?:_step_(\d+))?\.pt", path.name)
    return match and (int(match[1]), int(match[2]) if match[2] else math.inf)


def checkpoint_name(epoch: int, batch: int, step: int) -> str:
    """The file of a run that stands before this batch of this epoch, after so many steps."""
    return f"{MODEL_BASENAME}{epoch:02d}_step_{step:08d}.pt" if batch else f"{MODEL_BASENAME}{epoch - 1:02d}.pt"


def closes_epoch(path: Path) -> bool:
    return "_step_" not in path.name


def latest_weights_file_path(config: Config) -> str | None:
    """The newest checkpoint's path, or None where there is none."""
    files = weights_files(config.folder)
    return str(files[-1]) if files else None


def save_config(config: Config) -> None:
    """Writes config.json into the run's folder."""
    kept = {k: v for k, v in dataclasses.asdict(config).items() if k not in INVOCATION_FIELDS}
    write_atomically(config.folder / "config.json", json.dumps(kept, indent=2) + "\n")


def load_config(run_dir: str | Path) -> Config:
    """Reads the run's config.json."""
    path = Path(run_dir) / "config.json"
    if not path.is_file():
        raise InputError(
            f"no run in {str(run_dir)!r}: it has no config.json; train one with python train.py --run-dir {run_dir}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf8"))
        reject_unknown(values)
        # Runs from before these fields kept every checkpoint and had one dropout for all.
        inside = dict.fromkeys(("attention_dropout", "feed_forward_dropout"), values.get("dropout", 0.1))
        return Config(**{"keep_checkpoints": 0, **inside, **values, "run_dir": str(run_dir)})
    except (ValueError, TypeError, InputError) as error:
        raise InputError(f"{path}: {error}; restore the file, or train afresh in another --run-dir") from None


def newest_run() -> Path:
    """The run trained last: the folder under weights/ whose newest checkpoint is the youngest."""
    runs = {folder: weights_files(folder) for folder in WEIGHTS_FOLDER.glob("*") if (folder / "config.json").is_file()}
    runs = {folder: files[-1].stat().st_mtime for folder, files in runs.items() if files}
    if not runs:
        raise InputError("no trained run under weights/; train one first: python train.py --preset toy")
    return max(runs, key=runs.get)


def check_new_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already; give a new or an empty folder")


def write_atomically(path: Path, text: str) -> None:
    """Writes beside the target and renames, so that a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error}); free some space or choose another folder") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- command lines


def parse(target, argv: list[str], **options):
    """`tyro.cli` whose complaints fit one line. `target` is a dataclass or a function, called with the flags."""

    @functools.wraps(target, updated=())
    def later(*args, **kwargs):  # tyro would call the target before we have looked for unknown flags
        return functools.partial(target, *args, **kwargs)

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            value, unknown = tyro.cli(
                target if isinstance(target, type) else later, args=argv, return_unknown_args=True, **options
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise InputError(f"{_first_paragraph(complaint.getvalue())}; --help lists the flags") from None
    if unknown:
        flags = [f"--{name.replace('_', '-')}" for name in typing.get_type_hints(target) if name != "return"]
        kind = "flag" if unknown[0].startswith("-") else "extra argument"
        raise InputError(f"unknown {kind} {unknown[0]}{did_you_mean(unknown[0], flags)}; --help lists the flags")
    return value if isinstance(target, type) else value()


def _first_paragraph(box: str) -> str:
    """The words of tyro's framed message above its first rule."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    end = next((i for i, line in enumerate(lines) if line.startswith(("─", "╰"))), len(lines))
    return " ".join(lines[:end]).rstrip(".")


def parse_config(argv: list[str]) -> Config:
    """The command line of train.py: a preset, or the run already in --run-dir, and the other flags over it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", nargs="?")
    first.add_argument("--run-dir", "--run_dir", nargs="?", default="")
    given, _ = first.parse_known_args(argv)
    if given.preset is None and given.run_dir and (Path(given.run_dir) / "config.json").is_file():
        default = load_config(given.run_dir)
    else:
        default = get_config(given.preset or "opus_books")
    return parse(Config, argv, default=default)


def run_command(main) -> None:
    """Runs a script's main(argv): an InputError is one line on stderr and exit status 2."""
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        print(f"error: {error}; free some space, then type the same command again", file=sys.stderr)
        sys.exit(2)
