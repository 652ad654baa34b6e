"""All settings of a run (`Config`), the presets, validation of values, and command-line parsing."""

import contextlib
import dataclasses
import difflib
import errno
import functools
import io
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


class InputError(Exception):
    """An error that the user can fix: one line that names the value, the limit and the remedy."""


@dataclass(frozen=True)
class Config:
    """Train a Transformer for translation, or resume a run. Default: English to Italian on opus_books from the Hugging Face Hub.

    A source (datasource, validation_source, test_source) is one of: toy, the built-in corpus; a dataset of the Hub or a
    local folder in the same layout, with :SPLIT appended for a split other than train; a .tsv, .csv, .jsonl, .parquet,
    .xlsx or .tmx file; or the prefix of two aligned text files, so that data/train means data/train.en and data/train.de.
    Text files may be compressed: .tsv.gz, data/train.en.gz. With stream, datasource may also be a folder or a pattern of
    such files, or several separated by commas.
    """

    # fmt: off
    preset: Literal["opus_books", "tutorial", "toy", "multi30k", "wmt14"] = "opus_books"  # default values, which the other flags override
    run_dir: str = ""                     # folder of the run; empty: weights/<corpus>.<src>-<tgt>

    datasource: str = "Helsinki-NLP/opus_books"  # source of the training pairs
    validation_source: str = ""           # source of the validation pairs; empty: a seeded split of datasource
    test_source: str = ""                 # source of the test pairs, not used in training
    validation_fraction: float = 0.1      # fraction of datasource held out if validation_source is empty, at most 10,000 pairs
    lang_src: str = "en"                  # source language
    lang_tgt: str = "it"                  # target language
    tokenizer: Literal["bpe", "word"] = "bpe"  # bpe: subwords, no unknown words; word: whole words that occur at least twice
    vocab_size: int = 16_000              # maximum vocabulary size
    shared_vocab: bool = True             # one vocabulary for both languages
    seq_len: int = 350                    # maximum sentence length in tokens, including [SOS] and [EOS]; longer pairs are skipped
    max_length_ratio: float = 0.0         # training pairs whose longer side has more than this many times the characters of the shorter one are removed; 0: off
    drop_duplicates: bool = False         # remove exact duplicates of earlier training pairs
    batch_tokens: int = 8_192             # maximum number of tokens per batch, padding included (sentences x longest sentence); 0: use batch_size
    batch_size: int = 8                   # sentences per batch if batch_tokens is 0
    stream: bool = False                  # read datasource while training, without a copy on disk: a folder, pattern or list of shards, or a Hub dataset; needs max_steps and validation_source
    stream_buffer: int = 50_000           # with stream: pairs that are shuffled and sorted by length at a time
    num_workers: int = 0                  # data loader worker processes; 0: load in the training process

    d_model: int = 512                    # model dimension (D): size of the embeddings and of the residual stream
    encoder_layers: int = 6               # number of encoder blocks (N)
    decoder_layers: int = 6               # number of decoder blocks
    num_heads: int = 8                    # number of attention heads per block (H)
    d_ff: int = 2_048                     # hidden size of the feed-forward block
    norm: Literal["pre", "post"] = "pre"  # LayerNorm before each sublayer (Xiong et al., 2020) or after each sum (Vaswani et al., 2017)
    dropout: float = 0.1                  # dropout probability on embeddings and sublayer outputs
    attention_dropout: float = 0.1        # dropout probability on the attention weights
    feed_forward_dropout: float = 0.1     # dropout probability on the hidden layer of the feed-forward block
    share_embeddings: Literal["none", "target", "all"] = "all"  # weight tying; target: target embedding and projection; all: source embedding as well

    num_epochs: int = 20                  # number of passes over the training pairs
    max_steps: int = 0                    # maximum number of optimizer steps; 0: no limit
    lr: float = 7e-4                      # peak learning rate
    lr_schedule: Literal["constant", "inverse_sqrt", "cosine"] = "inverse_sqrt"  # learning rate schedule after the warmup
    warmup_steps: float = 0.1             # steps of linear warmup from 0 to lr; below 1: that share of the steps of the run
    adam_beta2: float = 0.98              # Adam's beta2
    weight_decay: float = 0.0             # weight decay (AdamW), applied to matrices only
    label_smoothing: float = 0.1          # probability mass that label smoothing spreads over the vocabulary; 0: off
    accumulation_steps: int = 1           # batches per optimizer step (gradient accumulation)
    clip_norm: float = 1.0                # maximum gradient norm; 0: no clipping
    rdrop_alpha: float = 0.0              # weight of R-Drop consistency regularization (Liang et al., 2021); 0: off
    bpe_dropout: float = 0.0              # BPE-dropout (Provilkov et al., 2020): probability of skipping a merge, drawn again in every epoch; 0: off
    ema_decay: float = 0.0                # decay of an exponential moving average (EMA) of the weights, which is evaluated and used for translation; 0: off
    seed: int = 42                        # random seed for the split, the batch order, the initial weights and dropout

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: CUDA if available, then Apple's MPS, then CPU
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on CUDA GPUs and CPUs with native bf16, except for small models on a CPU; fp16 on older GPUs with tensor cores, such as a T4; otherwise fp32
    init_from: str = ""                   # run whose weights and tokenizers a new run starts from (fine-tuning); its architecture is used; empty: random weights
    init_weights: str = "best"            # which weights of init_from: best, latest or an epoch number
    distill_from: str = ""                # run whose translations of the training pairs replace their targets (sequence-level knowledge distillation; Kim and Rush, 2016); empty: off
    preload: str = "latest"               # checkpoint to resume from: latest, none (train from scratch) or an epoch number
    save_every_steps: int = 0             # optimizer steps between checkpoints within an epoch; 0: only at the end of each epoch
    keep_checkpoints: int = 3             # number of latest checkpoints kept besides the best one; 0: all
    best_by: Literal["loss", "bleu", "chrf", "exact"] = "loss"  # validation metric that selects the best checkpoint
    patience: int = 0                     # epochs without improvement before early stopping; 0: off
    ddp_timeout: float = 600.0            # several processes: seconds without a response after which one counts as hung and the others end
    shard: bool = False                   # several processes: each keeps only its part of the weights, gradients, optimizer state and EMA, for models that outgrow one GPU
    mirror_dir: str = ""                  # folder on another disk that keeps a verified copy of the run; empty: none
    validation_sentences: int = 200       # number of validation sentences translated after each epoch for BLEU, chrF and error rates
    validation_examples: int = 2          # number of translations printed after each epoch
    # fmt: on

    def __post_init__(self):
        check_types(self)
        check_values(self)


PRESETS: dict[str, dict] = {
    # Peak and schedule were chosen in a rehearsal on other text of the same size: benchmarks/default_recipe.md.
    "opus_books": {"dropout": 0.3, "lr": 1e-3, "lr_schedule": "cosine"},
    # The tutorial's hyperparameters: two word vocabularies, 8 sentences per batch, Adam with a constant learning rate.
    "tutorial": {
        "tokenizer": "word",
        "vocab_size": 30_000,
        "shared_vocab": False,
        "share_embeddings": "none",
        "batch_tokens": 0,
        "lr": 1e-4,
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "adam_beta2": 0.999,
        "clip_norm": 0.0,
    },
    # The built-in corpus; trains on a laptop in about a minute.
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
        "d_ff": 256,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "feed_forward_dropout": 0.0,
        "num_epochs": 4,
        "lr": 3e-3,
        "lr_schedule": "cosine",
        "warmup_steps": 0.1163,  # 100 of 860
    },
    # Transformer-Tiny of Zhiyong Wu et al., 2021, "Good for Misconceived Reasons", section 4, but pre-norm and with smaller
    # batches, a cosine schedule and an EMA, so that one to three hours on two CPU cores are enough.
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
        "warmup_steps": 0.0436,  # 1,000 of 22,950
        "ema_decay": 0.999,
        "keep_checkpoints": 10,
        "validation_sentences": 1_014,
    },
    # The size and the warmup of the base model (Vaswani et al., 2017, table 3), but pre-norm, with dropout inside the blocks too.
    "wmt14": {
        "datasource": "wmt/wmt14",
        "validation_source": "wmt/wmt14:validation",
        "test_source": "wmt/wmt14:test",
        "lang_tgt": "de",
        "vocab_size": 32_000,
        "seq_len": 256,
        "batch_tokens": 25_000,
        "max_steps": 100_000,
        "warmup_steps": 0.04,  # 4,000, as in the paper
        "save_every_steps": 1_000,
        "validation_sentences": 1_000,
    },
}

# Largest values. Sizes beyond are mistakes or damage, and building such a model would take hours before it fails; the
# other integers must fit into 64 bits.
LIMITS = {
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1_000),
    **dict.fromkeys(("d_model", "d_ff", "seq_len"), 1_000_000),
    "vocab_size": 100_000_000,
    "num_workers": 1_000,
}
MAX_INTEGER = 2**63 - 1

# Settings of one invocation. They are not in config.json, so that the run can be moved to another machine.
INVOCATION_FIELDS = ("run_dir", "mirror_dir", "preload", "device", "num_workers", "shard", "ddp_timeout")

# Settings that determine the first weights, their shapes, the split or the batch order: they must not change when a run resumes.
# fmt: off
FIXED_FIELDS = (
    "lang_src", "lang_tgt", "tokenizer", "vocab_size", "shared_vocab", "seq_len", "max_length_ratio", "drop_duplicates",
    "stream", "stream_buffer", "batch_tokens", "batch_size", "accumulation_steps", "seed", "ema_decay", "bpe_dropout", "d_model", "encoder_layers", "decoder_layers", "num_heads", "d_ff", "norm",
    "share_embeddings", "init_from", "init_weights", "distill_from",
)

# Settings that a run that starts from another one (init_from) takes from it.
INHERITED_FIELDS = (
    "lang_src", "lang_tgt", "tokenizer", "vocab_size", "shared_vocab", "d_model", "encoder_layers", "decoder_layers", "num_heads", "d_ff", "norm",
    "share_embeddings",
)
# fmt: on


def get_config(preset: str = "opus_books", **overrides) -> Config:
    """The config of a preset, with overrides. Raises InputError for an unknown name or an invalid value."""
    if preset not in PRESETS:
        raise InputError(f"no preset {preset!r}{did_you_mean(preset, PRESETS)}; available: {', '.join(PRESETS)}")
    reject_unknown(overrides)
    return Config(**{"preset": preset, **PRESETS[preset], **overrides})


def split_source(source: str) -> tuple[str, str]:
    """Name and split of a source (see `Config`); the split is "" if none is given. The drive in C:/data is no name."""
    drive, path = os.path.splitdrive(source)
    name, _, split = path.partition(":")
    return drive + name, split


def counted(number: int, noun: str) -> str:
    """The number with its noun: 1 epoch, 2,500 steps."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


# ---------------------------------------------------------------------------- checks


def did_you_mean(name: str, known) -> str:
    """A suggestion such as " (did you mean d_model?)", or "" if no known name is similar."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f" (did you mean {close[0]}?)" if close else ""


def reject_unknown(values: dict) -> None:
    """Raises InputError for a name that is not a field of Config."""
    known = [field.name for field in dataclasses.fields(Config)]
    for name in values:
        if name not in known:
            raise InputError(f"unknown setting {name!r}{did_you_mean(name, known)}")


def changed_settings(saved: dict, config: Config, names: Iterable[str], here: str = "now") -> str:
    """The settings of these names that differ: "seed 7 there, 42 now; …", or ""."""
    saved = {**dataclasses.asdict(Config()), **saved}  # settings that did not exist yet had their defaults
    changed = [name for name in names if saved[name] != getattr(config, name)]
    return "; ".join(f"{name} {saved[name]!r} there, {getattr(config, name)!r} {here}" for name in changed)


def check_types(config: Config) -> None:
    """Raises InputError for a value that is not of its declared type; converts an int where a float is declared."""
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
    """Raises InputError for values out of range, unsafe parts of paths, and settings that contradict each other."""

    def require(valid: bool, name: str, remedy: str) -> None:
        if not valid:
            raise InputError(f"{name} is {getattr(config, name)!r}; {remedy}")

    positive = "d_model encoder_layers decoder_layers num_heads d_ff num_epochs lr accumulation_steps batch_size vocab_size stream_buffer"
    for name in positive.split():
        require(0 < getattr(config, name) < math.inf, name, "give a number above 0")
    not_negative = "batch_tokens num_workers max_steps warmup_steps weight_decay clip_norm save_every_steps keep_checkpoints patience rdrop_alpha validation_sentences validation_examples seed"
    for name in not_negative.split():
        require(0 <= getattr(config, name) < math.inf, name, "give 0 or more")
    for field in dataclasses.fields(Config):
        if type(getattr(config, field.name)) is int:
            limit = LIMITS.get(field.name, MAX_INTEGER)
            require(getattr(config, field.name) <= limit, field.name, f"give at most {limit:,}")
    for name in (
        "dropout",
        "bpe_dropout",
        "attention_dropout",
        "feed_forward_dropout",
        "label_smoothing",
        "adam_beta2",
        "ema_decay",
    ):
        require(0 <= getattr(config, name) < 1, name, "give a number from 0 (inclusive) to 1 (exclusive)")
    require(
        config.max_length_ratio == 0 or 1 <= config.max_length_ratio < math.inf,
        "max_length_ratio",
        "give 1 or more, or 0",
    )
    require(0 < config.validation_fraction < 1, "validation_fraction", "give a number between 0 and 1")
    require(5 <= config.ddp_timeout <= 43_200, "ddp_timeout", "give 5 to 43,200 seconds")
    require(config.seq_len >= 3, "seq_len", "give 3 or more: [SOS], a word, [EOS]")
    require(config.datasource != "", "datasource", "name a source, or use --preset toy")
    require(config.d_model % config.num_heads == 0, "d_model", f"give a multiple of num_heads ({config.num_heads})")
    require(config.d_model % 2 == 0, "d_model", "give an even number: positional encodings pair sines with cosines")
    for name in ("lang_src", "lang_tgt"):
        safe = re.fullmatch(r"[A-Za-z0-9._-]+", getattr(config, name)) and set(getattr(config, name)) != {"."}
        require(bool(safe), name, "give letters, digits, '.', '_' and '-' only, such as en")
    require(config.lang_src != config.lang_tgt, "lang_tgt", "give two different languages")
    require(
        config.preload in ("latest", "none") or config.preload.isdecimal(),
        "preload",
        "give latest, none or an epoch number",
    )
    if config.stream:
        require(
            config.max_steps > 0, "max_steps", "with --stream give the number of steps, which the learning rate needs"
        )
        require(
            config.validation_source != "", "validation_source", "with --stream name a source, which is read as a whole"
        )
        require(
            not config.drop_duplicates, "drop_duplicates", "with --stream remove duplicates from the shards beforehand"
        )
        require(config.distill_from == "", "distill_from", "with --stream translate the shards beforehand")
    if config.bpe_dropout:
        require(
            config.tokenizer == "bpe",
            "bpe_dropout",
            "a word tokenizer has no merges to drop; give 0, or --tokenizer bpe",
        )
    if config.share_embeddings == "all":
        require(config.shared_vocab, "share_embeddings", "all needs --shared-vocab; or give target")


# ---------------------------------------------------------------------------- command lines


MIN_COLUMNS = 40  # narrower help takes minutes to wrap and gigabytes


def parse(target, argv: list[str], **options):
    """`tyro.cli` with one-line errors. `target` is a dataclass to build, or a function to call with the flags.

    Raises InputError for bad flags.
    """
    import tyro  # takes a while, and quiet_interrupts should be called early

    @functools.wraps(target, updated=())
    def deferred(*args, **kwargs):  # otherwise tyro would call the target before unknown flags are reported
        return functools.partial(target, *args, **kwargs)

    if shutil.get_terminal_size().columns < MIN_COLUMNS:
        os.environ["COLUMNS"] = str(MIN_COLUMNS)
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            value, unknown = tyro.cli(
                target if isinstance(target, type) else deferred, args=argv, return_unknown_args=True, **options
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise InputError(f"{_first_paragraph(message.getvalue())}; see --help") from None
    if unknown:
        flags = [f"--{name.replace('_', '-')}" for name in typing.get_type_hints(target) if name != "return"]
        if not unknown[0].startswith("-"):
            raise InputError(f"unknown extra argument {unknown[0]} (a sentence needs quotes); see --help")
        raise InputError(f"unknown flag {unknown[0]}{did_you_mean(unknown[0], flags)}; see --help")
    return value if isinstance(target, type) else value()


def _first_paragraph(box: str) -> str:
    """The text of tyro's boxed message up to its first horizontal rule."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    end = next((i for i, line in enumerate(lines) if line.startswith(("─", "╰"))), len(lines))
    return " ".join(lines[:end]).rstrip(".")


def run_command(main) -> None:
    """Calls main(argv) of a script. An error that the user can fix becomes one line on stderr, and exit status 2.

    `python -X dev train.py …` shows the traceback of such an error.
    """
    signal.signal(signal.SIGINT, INTERRUPT_HANDLER)
    use_utf8()
    threading.excepthook = report_thread
    try:
        if sys.version_info < (3, 11):  # noqa: UP036
            raise InputError(f"this is Python {sys.version.split()[0]}; use 3.11 or newer")
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of stdout has closed it, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        line = explanation(error)
        if line is None or sys.flags.dev_mode:
            raise
        print(f"error: {' '.join(line.split())}", file=sys.stderr)
        sys.exit(2)


def report_thread(failed: threading.ExceptHookArgs) -> None:
    """Reports an error of a thread, such as the one that writes the curves; one line if it has an explanation."""
    if (line := explanation(failed.exc_value)) is None or sys.flags.dev_mode:
        threading.__excepthook__(failed)
    else:
        print(f"warning: {' '.join(line.split())}", file=sys.stderr)


def use_utf8() -> None:
    """Makes stdout and stderr UTF-8, whatever the locale: on Windows, redirected output is cp1252 otherwise.

    Streams that the caller has closed are opened on the null device.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf8"))  # noqa: SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf8", errors="backslashreplace")


# The file that lists a package which not every command needs, by the name under which it is imported.
OPTIONAL_PACKAGES = {
    "altair": "requirements-charts.txt",
    "vl_convert": "requirements-charts.txt",
    "PIL": "requirements-charts.txt",
    "ctranslate2": "requirements-export.txt",
}

FREE_SPACE = "free some space, then run the same command again"
REMEDIES = {
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR), "check the path"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "fix its permissions or choose another path"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), FREE_SPACE),
    errno.EROFS: "choose a folder that can be written to",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def explanation(error: Exception) -> str | None:
    """One line for an error that is due to input, files or the machine; None for an error of this project."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):  # PyTorch raises a RuntimeError
        return f"out of memory ({error}); lower --batch-tokens, --seq-len or the size of the model"
    if isinstance(error, OSError):
        remedy = REMEDIES.get(error.errno, "check the file and its disk")
        if remedy == FREE_SPACE and not error.filename:  # Arrow and PyTorch do not say where
            cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
            remedy += f"; besides the run, corpora are stored in {cache} (HF_HOME) and {tempfile.gettempdir()} (TMPDIR)"
        return f"{error}; {remedy}"
    if isinstance(error, UnicodeError):
        return f"a text or a file name is not UTF-8 ({error}); convert or rename it"
    if isinstance(error, ModuleNotFoundError) and error.name in OPTIONAL_PACKAGES:
        return f"{error.name} is not installed; pip install -r {OPTIONAL_PACKAGES[error.name]}"
    return None


# ---------------------------------------------------------------------------- Ctrl-C during imports

INTERRUPT_HANDLER = signal.getsignal(signal.SIGINT)


def quiet_interrupts() -> None:
    """Ctrl-C while a command imports its packages, which takes seconds, ends it at once and without a traceback.

    Data loader workers, which import them as well where they are not forked, ignore it: the training process ends them
    after saving. Called when this module is imported, before PyTorch.
    """
    is_command = Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent
    if is_command and INTERRUPT_HANDLER is signal.default_int_handler:
        is_worker = multiprocessing.parent_process() is not None
        signal.signal(signal.SIGINT, signal.SIG_IGN if is_worker else signal.SIG_DFL)


quiet_interrupts()
