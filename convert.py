"""Brings weights trained with the video's own code into a run of this project, to translate and to look inside.

python convert.py --weights tmodel_19.pt --tokenizer-src tokenizer_en.json --tokenizer-tgt tokenizer_it.json \\
    --lang-src en --lang-tgt it --run-dir weights/mine

Two things differ there. Its LayerNorm divides by the unbiased standard deviation plus 1e-6, ours by the
root of the biased variance plus 1e-5: for D features the unbiased one is larger by sqrt(D / (D - 1)),
which goes into the scale. What the epsilons leave, 5e-6 over the variance, is not converted. And its
alpha and bias may be single numbers for all features.
"""

import math
import pickle
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor

from config import InputError, check_new_folder, get_config, parse, run_command
from dataset import load_tokenizer
from export import UNKNOWN_CORPUS, to_safetensors
from translate import Translator, get_model


def convert(
    weights: str,
    tokenizer_src: str,
    tokenizer_tgt: str,
    lang_src: str,
    lang_tgt: str,
    run_dir: str,
    num_heads: int = 8,
) -> None:
    """Writes a folder that translate.py, evaluate.py, visualize.py and the notebooks take as a run.

    Args:
        weights: a checkpoint of the video's train.py
        tokenizer_src: the tokenizer file of the source language
        tokenizer_tgt: the tokenizer file of the target language
        lang_src: the source language, such as en
        lang_tgt: the target language, such as it
        run_dir: the folder to write, new or empty
        num_heads: attention heads, 8 in the video; the weights do not tell, and a wrong number translates badly
    """
    folder = Path(run_dir)
    check_new_folder(folder)
    state = read_weights(Path(weights))
    shape = architecture(state, Path(weights))
    config = get_config(
        "tutorial",
        run_dir=run_dir,
        datasource=UNKNOWN_CORPUS,
        lang_src=lang_src,
        lang_tgt=lang_tgt,
        num_heads=num_heads,
        dropout=0.1,
        **shape,
    )
    tokenizers = [load_tokenizer(Path(path)) for path in (tokenizer_src, tokenizer_tgt)]
    model = get_model(config, *(tokenizer.get_vocab_size() for tokenizer in tokenizers))
    try:
        model.load_state_dict(dict(renamed(state)))
    except RuntimeError as error:
        raise InputError(f"{weights} does not fit the tokenizers or is not of the video's code ({error})") from None
    folder.mkdir(parents=True, exist_ok=True)
    for lang, path in ((lang_src, tokenizer_src), (lang_tgt, tokenizer_tgt)):
        shutil.copy(path, folder / f"tokenizer_{lang}.json")
    to_safetensors(Translator(model, config, *tokenizers), folder)
    print(f'wrote {folder}; try: python translate.py --run-dir {folder} "A sentence."')
    print(f"to score it: python evaluate.py --run-dir {folder} --source FILE --reference FILE")


def read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"no file {path}; give a checkpoint of the video's train.py")
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"])
    except (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, TypeError, ValueError):
        raise InputError(f"{path} is not a checkpoint of the video's train.py, or damaged; give another") from None


def architecture(state: dict[str, Tensor], path: Path) -> dict[str, int]:
    """Sizes that the shapes of the weights tell."""

    def layers(part: str) -> int:
        found = [re.match(rf"{part}\.layers\.(\d+)\.", name) for name in state]
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    try:
        return {
            "d_model": state["src_embed.embedding.weight"].size(1),
            "d_ff": state["encoder.layers.0.feed_forward_block.linear_1.weight"].size(0),
            "encoder_layers": layers("encoder"),
            "decoder_layers": layers("decoder"),
            "seq_len": state["src_pos.pe"].size(1),
        }
    except (LookupError, AttributeError) as error:
        raise InputError(
            f"{path} is not the video's model ({error}); give a checkpoint of the video's train.py"
        ) from None


def renamed(state: dict[str, Tensor]):
    """The weights under our names: LayerNorm's alpha is rescaled, and the sines are computed, not stored."""
    D = state["src_embed.embedding.weight"].size(1)
    for name, weight in state.items():
        if name.endswith(".pe"):
            continue
        if ".norm." in name:
            weight = weight.expand(D).clone()
            if name.endswith(".alpha"):
                name, weight = name.removesuffix("alpha") + "weight", weight * math.sqrt((D - 1) / D)
        yield name, weight


if __name__ == "__main__":
    run_command(lambda argv: parse(convert, argv))
