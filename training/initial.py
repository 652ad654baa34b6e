"""Fine-tuning: a new run that starts from the weights and tokenizers of another one (`--init-from`)."""

import sys
from collections.abc import Sequence
from dataclasses import asdict

import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from compute import distributed
from config import INHERITED_FIELDS, Config, InputError, changed_settings
from dataset import BYTES, UNK, BilingualDataset
from runs.folder import RunFolder
from training.state import TrainingState
from translate import Translator

PAIRS_AT_A_TIME = 10_000
MANY_UNKNOWN = 0.05  # share of unknown tokens that is worth a warning


def load_initial_run(config: Config) -> Translator | None:
    """The run that the config starts from, with the weights that `init_weights` selects; the EMA if it has one.

    None if the config names no run. Raises InputError if that run is missing, damaged or this one, or differs in one of
    INHERITED_FIELDS. With a shared vocabulary, that run may translate in the opposite direction.
    """
    if not config.init_from:
        return None
    initial = Translator.load(config.init_from, "cpu", config.init_weights)
    if initial.folder.path.resolve() == RunFolder.of(config).path.resolve():
        raise InputError(f"the new run would be in {config.init_from}, the run to start from; give another --run-dir")
    settings = asdict(initial.config)
    if config.shared_vocab and languages(initial.config) == languages(config)[::-1]:
        settings |= {"lang_src": config.lang_src, "lang_tgt": config.lang_tgt}
    if changed := changed_settings(settings, config, INHERITED_FIELDS, "here"):
        raise InputError(
            f"the weights of {config.init_from} do not fit: {changed}; "
            "omit these settings, or train without --init-from"
        )
    return initial


def languages(config: Config) -> tuple[str, str]:
    return config.lang_src, config.lang_tgt


def start_from(initial: Translator, state: TrainingState, train: BilingualDataset) -> None:
    """Copies the weights into the state, its EMA included, and prints how much of the new corpus is unknown."""
    state.load_weights(initial.model.state_dict())
    if not distributed.is_first():
        return
    shares = unknown_shares(train, (initial.tokenizer_src, initial.tokenizer_tgt))
    text = f"{shares[0]:.1%} of the source tokens and {shares[1]:.1%} of the target tokens"
    print(f"starting     from {initial.folder}, {initial.weights}; unknown to its tokenizers: {text}")
    if max(shares) > MANY_UNKNOWN:
        what = "become [UNK]" if initial.config.tokenizer == "word" else "are characters split into bytes"
        remedy = "start from a run on similar text, or train without --init-from"
        print(f"warning: {text} are unknown and {what}; {remedy}", file=sys.stderr)


def unknown_shares(train: BilingualDataset, tokenizers: Sequence[Tokenizer]) -> list[float]:
    """The share of source and target tokens that the tokenizers do not know.

    They are [UNK] in a word tokenizer, and bytes of unknown characters in a BPE tokenizer.
    """
    shares = []
    for side, tokenizer in zip(("src_ids", "tgt_ids"), tokenizers, strict=True):
        known_bytes = [i for i in map(tokenizer.token_to_id, BYTES) if i is not None]
        unknown = pa.array([UNK, *known_bytes], pa.int32())
        count = total = 0
        for batch in train.encoded.iter(PAIRS_AT_A_TIME):
            ids = pc.list_flatten(batch[side])
            count += pc.sum(pc.is_in(ids, unknown)).as_py()
            total += len(ids) - 2 * len(batch)  # without [SOS] and [EOS]
        shares.append(count / total)
    return shares
