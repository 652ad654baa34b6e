"""What a part does, learnt by taking it away: attention corrupted, sublayers switched off, words reordered.

    B  sentences    H  heads    Q  query positions    K  key positions    T  decoder positions    D  d_model

    python experiments.py "I can eat an apple."

The model knows nothing of this file. Attention is changed through `intervene`, after the softmax;
everything else through PyTorch's forward hooks. Each change is a context manager: inside it the
model is the variant, on leaving it the model is as before, and two of them can be nested.
"""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from config import InputError, parse, run_command
from corpora.sources import load_split
from dataset import EOS, SOS, padding_mask
from evaluate import score
from interpret.interventions import UNIFORM_CROSS, VARIANTS, Variant, head_off
from interpret.page import report_page, save_html
from interpret.trace import AttentionTrace, trace
from model import Transformer, causal_mask
from search import greedy_decode
from translate import Translator

# ---------------------------------------------------------------------------- measuring


class PlainDecoder:
    """A StepDecoder without a cache: each step computes all T positions, so that a change may depend on them."""

    def __init__(self, model: Transformer, source: Tensor):
        self.model, self.src_mask = model, padding_mask(source)
        self.encoder_output = model.encode(source, self.src_mask)
        self.written = torch.empty(len(source), 0, dtype=torch.long, device=source.device)

    def step(self, ids: Tensor) -> Tensor:
        self.written = torch.cat([self.written, ids.unsqueeze(1)], 1)  # (N, T)
        mask = causal_mask(self.written.size(1), ids.device)
        return self.model.project(self.model.decode(self.encoder_output, self.src_mask, self.written, mask)[:, -1])

    def select(self, rows: Tensor, sentences: Tensor | None = None) -> None:
        self.written, self.src_mask, self.encoder_output = (
            self.written[rows],
            self.src_mask[rows],
            self.encoder_output[rows],
        )


@torch.inference_mode()
def search_plainly(translator: Translator, sentences: list[str], at_once: int = 100) -> list[list[int]]:
    """Target ids by greedy search over PlainDecoder, at most as long as Translator would make them."""
    sources = [translator.encode(sentence) for sentence in sentences]
    found: list[list[int]] = [[]] * len(sources)
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    for start in range(0, len(order), at_once):
        batch = order[start : start + at_once]
        source, limits = translator.padded([sources[i] for i in batch])
        for i, ids in zip(batch, greedy_decode(PlainDecoder(translator.model, source), limits), strict=True):
            found[i] = ids
    return found


def translate_plainly(translator: Translator, sentences: list[str]) -> list[str]:
    return [translator.tokenizer_tgt.decode(ids) for ids in search_plainly(translator, sentences)]


@torch.inference_mode()
def step_logits(translator: Translator, sentence: str, target_ids: list[int]) -> Tensor:
    """Logits (T, V) of each step of a given translation, its [EOS] included."""
    source = torch.tensor([translator.encode(sentence)], device=translator.device)
    decoder_input = torch.tensor([[SOS, *target_ids]], device=translator.device)
    mask = causal_mask(decoder_input.size(1), source.device)
    return translator.model(source, decoder_input, padding_mask(source), mask)[0].float()


def log_probability(translator: Translator, sentence: str, target_ids: list[int]) -> float:
    """log p(target, [EOS] | sentence), in nats."""
    log_p = step_logits(translator, sentence, target_ids).log_softmax(-1)
    return log_p[torch.arange(len(log_p)), torch.tensor([*target_ids, EOS], device=log_p.device)].sum().item()


def compare(translator: Translator, sentence: str, variants: list[Variant] = VARIANTS) -> pd.DataFrame:
    """Every variant on one sentence: variant, translation, change, differs, says.

    `change` is that of the baseline output's log-probability, in nats; `differs` the first token that is
    not the baseline's.
    """
    decode, name = translator.tokenizer_tgt.decode, translator.tokenizer_tgt.id_to_token
    (ids,) = search_plainly(translator, [sentence])
    whole = log_probability(translator, sentence, ids)
    nothing = {"change": 0.0, "differs": "", "says": "Nothing is changed."}
    lines = [{"variant": "baseline", "translation": decode(ids), **nothing}]
    for variant in variants:
        with variant.apply(translator.model):
            (other,) = search_plainly(translator, [sentence])
            change = log_probability(translator, sentence, ids) - whole
        differs = first_difference([*map(name, ids), "[EOS]"], [*map(name, other), "[EOS]"])
        line = {"variant": variant.name, "translation": decode(other), "change": change, "differs": differs}
        lines.append({**line, "says": variant.says})
    return pd.DataFrame(lines)


def first_difference(one: list[str], other: list[str]) -> str:
    """Where and how two translations part, as in "3: essen → lesen"; empty where they do not."""
    for i, (x, y) in enumerate(zip(one, other, strict=False), start=1):
        if x != y:
            return f"{i}: {x} → {y}"
    return ""


def measure(
    translator: Translator, sources: list[str], references: list[str], variants: list[Variant] = VARIANTS
) -> pd.DataFrame:
    """BLEU and exact matches of every variant over some sentences, the baseline first."""
    lines = []
    for variant in tqdm([None, *variants], desc="Variants", unit="variant", leave=False):
        with variant.apply(translator.model) if variant else ExitStack():
            scores = score(translate_plainly(translator, sources), references)
        lines.append(
            {"variant": variant.name if variant else "baseline", "bleu": scores["bleu"], "exact": scores["exact"]}
        )
    return pd.DataFrame(lines)


def head_importance(translator: Translator, sources: list[str], references: list[str]) -> pd.DataFrame:
    """How much worse the translations are with one head off: kind, layer, head, bleu_drop, exact_drop (in points)."""
    heads = [
        (kind, layer, head)
        for kind, blocks in translator.model.attention_blocks().items()
        for layer, block in enumerate(blocks)
        for head in range(block.h)
    ]
    table = measure(translator, sources, references, [head_off(*place) for place in heads])
    whole, rest = table.iloc[0], table.iloc[1:].reset_index(drop=True)
    places = pd.DataFrame(heads, columns=["kind", "layer", "head"])
    return places.assign(bleu_drop=whole["bleu"] - rest["bleu"], exact_drop=whole["exact"] - rest["exact"])


def traced(translator: Translator, sentence: str, target: str | list[int], variant: Variant) -> AttentionTrace:
    """The attention of a variant while it reads a given translation."""
    with variant.apply(translator.model):
        return trace(translator, sentence, target)


def step_table(
    translator: Translator, sentence: str, words: list[str] | None = None, runners_up: int = 1
) -> pd.DataFrame:
    """Each decoding step with the interesting words: step, label, word, logit, probability, chosen.

    Without `words`, those that were written and the `runners_up` likeliest others of each step.
    """
    ids = translator.search([translator.encode(sentence)])[0]
    logits = step_logits(translator, sentence, ids)
    chosen, name = [*ids, EOS], translator.tokenizer_tgt.id_to_token
    if words is None:
        best = logits.topk(runners_up + 1).indices.tolist()
        interesting = list(dict.fromkeys([*chosen, *(i for step in best for i in step)]))
    else:
        interesting = [translator.tokenizer_tgt.token_to_id(word) for word in words]
        if None in interesting:
            raise InputError(f"no token {words[interesting.index(None)]!r} in the target vocabulary of this run")
    p = logits.softmax(-1)
    read = ["[SOS]", *(name(i) for i in ids)]
    return pd.DataFrame([
        {"step": t, "label": f"{t + 1}) {read[t]} → {name(chosen[t])}", "word": name(i), "logit": logits[t, i].item(),
         "probability": p[t, i].item(), "chosen": i == chosen[t]}
        for t in range(len(chosen)) for i in interesting
    ])  # fmt: skip


def step_text(table: pd.DataFrame, value: str = "logit") -> str:
    """The step table for the terminal; the chosen word stands in brackets."""
    words = list(dict.fromkeys(table["word"]))
    width = max(9, *(len(word) + 1 for word in words))
    left = max(len(label) for label in table["label"])
    lines = [" " * left + "".join(f"{word:>{width}}" for word in words)]
    for _, group in table.groupby("step"):
        cells = [f"[{v:.2f}]" if mark else f"{v:.2f} " for v, mark in zip(group[value], group["chosen"], strict=True)]
        lines.append(f"{group['label'].iloc[0]:<{left}}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def reordered(sentence: str, order: list[int]) -> str:
    """The sentence's words in another order: reordered("I can eat apples", [2, 3, 1, 0]) is "eat apples can I"."""
    words = sentence.split()
    if sorted(order) != list(range(len(words))):
        raise InputError(f"the order {order} does not name each of the {len(words)} words 0 to {len(words) - 1} once")
    return " ".join(words[i] for i in order)


def as_text(table: pd.DataFrame, width: int = 44) -> str:
    """The table of variants for the terminal."""
    numbers = [name for name in ("bleu", "exact") if name in table]
    lines = [f"{'variant':<42} {'change':>7} {''.join(f'{name:>7}' for name in numbers)}  translation"]
    for row in table.to_dict("records"):
        text = row["translation"] if len(row["translation"]) <= width else row["translation"][: width - 1] + "…"
        scores = "".join(f"{row[name]:7.1f}" for name in numbers)
        lines.append(f"{row['variant']:<42} {row['change']:+7.1f} {scores}  {text}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------- command line


def command(
    sentence: Annotated[str | None, tyro.conf.Positional] = None,
    /,
    run_dir: str = "",
    heads: bool = False,
    split: Literal["", "validation", "test"] = "",
    sentences: int = 200,
    html: str = "",
    csv: str = "",
    device: str = "auto",
) -> None:
    """Takes parts of a trained run away and shows what that does to a translation.

    Args:
        sentence: what to translate with every variant
        run_dir: the run's folder; empty: the run trained last
        heads: also measure how much worse a split gets with each head off
        split: also measure every variant over this split: validation or test
        sentences: how many sentences of the split
        html: write the results as one page that needs no network
        csv: write the table of variants to this file, and head importance beside it
        device: auto, cuda, mps or cpu
    """
    if not sentence or not sentence.strip():
        raise InputError('give a sentence, as in python experiments.py "I can eat an apple."')
    for path in (html, csv):
        if path and (Path(path).is_dir() or not Path(path).parent.is_dir()):
            raise InputError(f"cannot write {path}; give the name of a file in a folder that is there")
    translator = Translator.load(run_dir, device)
    steps = step_table(translator, sentence)
    print(step_text(steps) + "\n")
    table = compare(translator, sentence)
    importance = None
    if heads or split:
        pairs = load_split(translator.config, split or "validation")
        pairs = pairs.select(range(min(sentences, len(pairs))))
        sources, references = list(pairs["src"]), list(pairs["tgt"])
        if split:
            table = table.merge(measure(translator, sources, references), on="variant")
        if heads:
            importance = head_importance(translator, sources, references)
    print(as_text(table))
    if importance is not None:
        print("\n" + importance.sort_values("bleu_drop", ascending=False).round(2).to_string(index=False))
    for path, frame in ((csv, table), (str(Path(csv).with_suffix(".heads.csv")) if csv else "", importance)):
        if path and frame is not None:
            frame.to_csv(path, index=False)
            print(f"wrote {path}", file=sys.stderr)
    if html:
        corrupted = traced(translator, sentence, translator.search([translator.encode(sentence)])[0], UNIFORM_CROSS)
        save_html(report_page(sentence, trace(translator, sentence), corrupted, steps, table, importance), html)
        print(f"wrote {html} ({Path(html).stat().st_size / 1e6:.2f} MB)", file=sys.stderr)


if __name__ == "__main__":
    run_command(lambda argv: parse(command, argv))
