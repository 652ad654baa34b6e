"""Conversion of weights trained with the tutorial's code into a run of this project.

python convert.py --weights tmodel_19.pt --tokenizer-src tokenizer_en.json --tokenizer-tgt tokenizer_it.json \\
    --lang-src en --lang-tgt it --run-dir weights/mine

Only LayerNorm differs. For D features (D is d_model), the tutorial computes

    alpha * (x - mean) / (unbiased standard deviation + 1e-6) + bias

and PyTorch's LayerNorm

    weight * (x - mean) / sqrt(biased variance + 1e-5) + bias

The unbiased standard deviation is larger than the biased one by a factor of sqrt(D / (D - 1)), so the conversion sets
weight = alpha * sqrt((D - 1) / D). The difference between the epsilons remains: it changes the output by a factor of
about 1 + 5e-6 / variance. The tutorial's alpha and bias may be single numbers; they are repeated for all D features.
"""

# config comes first: it makes Ctrl-C quiet during the imports below
from config import InputError, get_config, parse, run_command

# isort: split
import math
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dataset import load_tokenizer
from export import UNKNOWN_CORPUS, to_safetensors
from model import get_model
from runs.checkpoint import DamagedCheckpoint, check_contents
from runs.files import check_new_folder, new_folder
from runs.folder import RunFolder
from translate import Translator


def main(
    weights: str,
    tokenizer_src: str,
    tokenizer_tgt: str,
    lang_src: str,
    lang_tgt: str,
    run_dir: str,
    num_heads: int = 8,
) -> None:
    """Convert weights trained with the tutorial's code into a run of this project.

    Args:
        weights: checkpoint written by the tutorial's train.py
        tokenizer_src: tokenizer file of the source language
        tokenizer_tgt: tokenizer file of the target language
        lang_src: source language, such as en
        lang_tgt: target language, such as it
        run_dir: folder to write the run to, new or empty
        num_heads: number of attention heads, 8 in the tutorial; not stored in the weights, so it cannot be checked
    """
    folder = RunFolder(run_dir)
    check_new_folder(folder.path)
    state = read_weights(Path(weights))
    sizes = architecture(state, Path(weights))
    config = get_config(
        "tutorial",  # pre-norm
        run_dir=run_dir,
        datasource=UNKNOWN_CORPUS,
        lang_src=lang_src,
        lang_tgt=lang_tgt,
        num_heads=num_heads,
        dropout=0.1,
        **sizes,
    )
    tokenizers = [load_tokenizer(Path(path)) for path in (tokenizer_src, tokenizer_tgt)]
    model = get_model(config, *(tokenizer.get_vocab_size() for tokenizer in tokenizers))
    try:
        model.load_state_dict(convert_weights(state))
    except RuntimeError as error:
        raise InputError(
            f"the weights in {weights} do not fit the tokenizers or are not from the tutorial's code ({error})"
        ) from None
    with new_folder(folder.path) as partial:
        for lang, path in ((lang_src, tokenizer_src), (lang_tgt, tokenizer_tgt)):
            shutil.copy(path, RunFolder(partial).tokenizer_file(lang))
        translator = Translator(model, replace(config, run_dir=str(partial)), *tokenizers)
        to_safetensors(translator, partial)
    print(f'wrote {folder}; try: python translate.py --run-dir {folder} "A sentence."')
    print(f"to evaluate it: python evaluate.py --run-dir {folder} --source FILE --reference FILE")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint of the tutorial. Raises InputError if it is missing, damaged or something else."""
    if not path.is_file():
        raise InputError(f"no file {path}; give a checkpoint of the tutorial's train.py")
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"])
        check_contents({"model": state})
        return state
    except DamagedCheckpoint as error:
        raise InputError(f"{path} is no checkpoint of the tutorial's train.py ({error}); give another file") from None
    except (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, TypeError, ValueError):
        raise InputError(
            f"{path} is damaged or not a checkpoint of the tutorial's train.py; give another file"
        ) from None


def architecture(state: dict[str, Tensor], path: Path) -> dict[str, int]:
    """The settings of `Config` that follow from names and shapes. Raises InputError if they do not fit."""

    def count_layers(part: str) -> int:
        matches = [re.match(rf"{part}\.layers\.(\d+)\.", name) for name in state]
        return 1 + max((int(match[1]) for match in matches if match), default=-1)

    try:
        return {
            "d_model": state["src_embed.embedding.weight"].size(1),
            "d_ff": state["encoder.layers.0.feed_forward_block.linear_1.weight"].size(0),
            "encoder_layers": count_layers("encoder"),
            "decoder_layers": count_layers("decoder"),
            "seq_len": state["src_pos.pe"].size(1),
        }
    except (LookupError, AttributeError) as error:
        raise InputError(
            f"{path} is not the tutorial's model ({error}); give a checkpoint of the tutorial's train.py"
        ) from None


def convert_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under this project's names, with LayerNorms rescaled and without the positional encodings."""
    D = state["src_embed.embedding.weight"].size(1)
    weights = {}
    for name, weight in state.items():
        if name.endswith(".pe"):
            continue
        if ".norm." in name:
            weight = weight.expand(D).clone()  # (1,) or (D,) -> (D,)
            if name.endswith(".alpha"):
                name, weight = name.removesuffix("alpha") + "weight", weight * math.sqrt((D - 1) / D)
        weights[name] = weight
    return weights


if __name__ == "__main__":
    run_command(lambda argv: parse(main, argv))
