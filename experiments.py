"""Ablation experiments: attention is corrupted, sublayers and heads are switched off, words are reordered.

    python experiments.py "I can eat an apple."

The variants are defined in interpret/interventions.py; the baseline is the unchanged model. Translations are greedy and
computed without caches, because a variant may change all positions.
"""

# config comes first: it makes Ctrl-C quiet during the imports below
from config import InputError, parse, run_command

# isort: split
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
import tyro
from tqdm import tqdm

from corpora.sources import load_split
from evaluate import score
from interpret.findings import measure_findings
from interpret.interventions import UNIFORM_CROSS, VARIANTS, Variant, head_off
from interpret.steps import log_probability, step_table
from interpret.study import STUDY, study
from interpret.text import findings_text, step_table_text, variants_text
from interpret.trace import AttentionTrace, record_trace, target_ids
from runs.files import check_outputs, output_file
from translate import Translator, blank_long

# ---------------------------------------------------------------------------- one sentence


def compare(translator: Translator, sentence: str, variants: list[Variant] = VARIANTS) -> pd.DataFrame:
    """The baseline and every variant on one sentence: variant, translation, change, differs, description.

    `change` is the change in log-probability of the baseline's translation, in nats. `differs` is the first token
    that differs from the baseline's translation.
    """
    decode, token = translator.tokenizer_tgt.decode, translator.tokenizer_tgt.id_to_token
    source = translator.encode(sentence)
    baseline_ids = target_ids(translator, source, None)
    baseline_log_p = log_probability(translator, sentence, baseline_ids)
    baseline = {"variant": "baseline", "translation": decode(baseline_ids), "change": 0.0, "differs": ""}
    rows = [{**baseline, "description": "The unchanged model."}]
    for variant in variants:
        with variant.apply(translator.model):
            (ids,) = translator.search([source], use_cache=False)
            change = log_probability(translator, sentence, baseline_ids) - baseline_log_p
        differs = first_difference([*map(token, baseline_ids), "[EOS]"], [*map(token, ids), "[EOS]"])
        row = {"variant": variant.name, "translation": decode(ids), "change": change, "differs": differs}
        rows.append({**row, "description": variant.description})
    return pd.DataFrame(rows)


def first_difference(tokens: list[str], others: list[str]) -> str:
    """Position (from 1) and tokens of the first difference, such as "3: essen → lesen"; empty if there is none."""
    for i, (token, other) in enumerate(zip(tokens, others, strict=False), start=1):
        if token != other:
            return f"{i}: {token} → {other}"
    return ""


def trace_variant(translator: Translator, sentence: str, target: str | list[int], variant: Variant) -> AttentionTrace:
    """The trace of the variant on a given translation (teacher forcing)."""
    with variant.apply(translator.model):
        return record_trace(translator, sentence, target)


def reordered(sentence: str, order: list[int]) -> str:
    """The words of a sentence in another order: reordered("I can eat apples", [2, 3, 1, 0]) is "eat apples can I".

    Raises InputError unless `order` names each word once.
    """
    words = sentence.split()
    if sorted(order) != list(range(len(words))):
        raise InputError(f"the order {order} must name each of the {len(words)} words, 0 to {len(words) - 1}, once")
    return " ".join(words[i] for i in order)


# ---------------------------------------------------------------------------- many sentences


def measure(
    translator: Translator, sources: list[str], references: list[str], variants: list[Variant] = VARIANTS
) -> pd.DataFrame:
    """BLEU and exact match (percent) of the baseline and of every variant: variant, bleu, exact."""
    rows = []
    for variant in tqdm([None, *variants], desc="Variants", unit="variant", leave=False):
        with variant.apply(translator.model) if variant else ExitStack():
            scores = score(translator.translate(sources, use_cache=False), references)
        name = variant.name if variant else "baseline"
        rows.append({"variant": name, "bleu": scores["bleu"], "exact": scores["exact"]})
    return pd.DataFrame(rows)


def head_importance(translator: Translator, sources: list[str], references: list[str]) -> pd.DataFrame:
    """Head importance: the drop in BLEU and exact match (points) when one head is switched off.

    One row per head: kind, layer, head, bleu_drop, exact_drop.
    """
    heads = [
        (kind, layer, head)
        for kind, blocks in translator.model.attention_blocks().items()
        for layer, block in enumerate(blocks)
        for head in range(block.h)
    ]
    table = measure(translator, sources, references, [head_off(*head) for head in heads])
    baseline, ablated = table.iloc[0], table.iloc[1:].reset_index(drop=True)
    drops = {f"{name}_drop": baseline[name] - ablated[name] for name in ("bleu", "exact")}
    return pd.DataFrame(heads, columns=["kind", "layer", "head"]).assign(**drops)


# ---------------------------------------------------------------------------- command line


def main(
    sentence: Annotated[str | None, tyro.conf.Positional] = None,
    /,
    run_dir: str = "",
    logits_study: bool = False,
    findings: bool = False,
    heads: bool = False,
    split: Literal["", "validation", "test"] = "",
    sentences: int = 200,
    html: str = "",
    csv: str = "",
    device: str = "auto",
) -> None:
    """Compare a model with variants of it on a sentence: attention corrupted, parts switched off (ablation).

    Args:
        sentence: sentence to translate
        run_dir: folder of the run; empty: the most recently trained run
        logits_study: the variants of the logits study (docs/studies.md) in place of the others
        findings: measure the findings of the logits study in addition, on a run of a built-in corpus
        heads: head importance in addition: the drop in BLEU with each head switched off
        split: split on which BLEU and exact match of every variant are measured in addition: validation or test
        sentences: number of sentences that are translated for the split, head importance and findings
        html: HTML file for a report that works offline; with --logits-study, the steps of every variant
        csv: file for the table of variants; head importance goes to a second file beside it
        device: auto, cuda, mps or cpu
    """
    if not sentence or not sentence.strip():
        raise InputError('give a sentence, as in python experiments.py "I can eat an apple."')
    if sentences < 1:
        raise InputError(f"--sentences is {sentences}; give 1 or more")
    for path in (html, csv):
        if path and (Path(path).is_dir() or not Path(path).parent.is_dir()):
            raise InputError(f"cannot write {path}; give the name of a file in an existing folder")
    heads_csv = str(Path(csv).with_suffix(".heads.csv")) if csv and heads else ""
    check_outputs([html, csv, heads_csv])
    if html:
        from interpret.page import save_report, save_study  # needs the packages of requirements-charts.txt
    translator = Translator.load(run_dir, device)
    steps, variants = step_table(translator, sentence), STUDY if logits_study else VARIANTS
    print(step_table_text(steps) + "\n")
    table = compare(translator, sentence, variants)
    importance = None
    if heads or split:
        pairs = load_split(translator.config, split or "validation")
        pairs = pairs.select(range(min(sentences, len(pairs))))
        sources, references = blank_long(translator, pairs["src"][:]), list(pairs["tgt"])
        if split:
            table = table.merge(measure(translator, sources, references, variants), on="variant")
        if heads:
            importance = head_importance(translator, sources, references)
    print(variants_text(table))
    if importance is not None:
        print("\n" + importance.sort_values("bleu_drop", ascending=False).round(2).to_string(index=False))
    if findings:
        print("\n" + findings_text(measure_findings(translator, sentences)))
    if csv:
        write_csv(table, Path(csv))
        if importance is not None:
            write_csv(importance, Path(heads_csv))
    if html and logits_study:
        save_study(html, study(translator, sentence))
    elif html:
        trace = record_trace(translator, sentence)
        ids = target_ids(translator, translator.encode(sentence), None)
        corrupted = trace_variant(translator, sentence, ids, UNIFORM_CROSS)
        save_report(html, sentence, trace, corrupted, steps, table, importance)
    if html:
        print(f"wrote {html} ({Path(html).stat().st_size / 1e6:.2f} MB)", file=sys.stderr)


def write_csv(table: pd.DataFrame, path: Path) -> None:
    with output_file(path) as file:
        table.to_csv(file, index=False)
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    run_command(lambda argv: parse(main, argv))
