"""Logits and probabilities of the decoding steps of one translation.

    T  target tokens that the decoder reads    V  target vocabulary

Translations are greedy and computed without caches, because an intervention may change all positions.
"""

import pandas as pd
import torch
from torch import Tensor

from config import InputError
from dataset import EOS, SOS, padding_mask
from interpret import trace
from model import causal_mask
from translate import Translator


@torch.inference_mode()
def step_logits(translator: Translator, sentence: str, target_ids: list[int]) -> Tensor:
    """Logits (T, V) of all steps of a given translation, including the step that predicts [EOS]."""
    source = torch.tensor([translator.encode(sentence)], device=translator.device)
    decoder_input = torch.tensor([[SOS, *target_ids]], device=translator.device)
    mask = causal_mask(decoder_input.size(1), source.device)
    return translator.model(source, decoder_input, padding_mask(source), mask)[0].float()


def log_probability(translator: Translator, sentence: str, target_ids: list[int]) -> float:
    """log p(target, [EOS] | sentence) in nats."""
    log_p = step_logits(translator, sentence, target_ids).log_softmax(-1)
    return log_p.gather(1, torch.tensor([[i] for i in [*target_ids, EOS]], device=log_p.device)).sum().item()


def step_table(
    translator: Translator, sentence: str, words: list[str] | None = None, runners_up: int = 1
) -> pd.DataFrame:
    """Logits and probabilities of the decoding steps: step, label, word, logit, probability, chosen.

    One row per step and word. By default, the words are the tokens of the translation and the `runners_up` next most
    probable tokens of each step. Raises InputError for a word that is not in the vocabulary.
    """
    ids = trace.target_ids(translator, translator.encode(sentence), None)
    logits = step_logits(translator, sentence, ids).cpu()
    chosen = [*ids, int(logits[-1].argmax())]  # [EOS], except at the length limit
    token = translator.tokenizer_tgt.id_to_token
    if words is None:
        top = logits.topk(runners_up + 1).indices.tolist()
        shown = list(dict.fromkeys([*chosen, *(i for step in top for i in step)]))
    else:
        shown = [translator.tokenizer_tgt.token_to_id(word) for word in words]
        if None in shown:
            raise InputError(f"no token {words[shown.index(None)]!r} in the target vocabulary of this run")
    p = logits.softmax(-1)
    read = ["[SOS]", *(token(i) for i in ids)]
    return pd.DataFrame([
        {"step": t, "label": f"{t + 1}) {read[t]} → {token(chosen[t])}", "word": token(i), "logit": logits[t, i].item(),
         "probability": p[t, i].item(), "chosen": i == chosen[t]}
        for t in range(len(chosen)) for i in shown
    ])  # fmt: skip
