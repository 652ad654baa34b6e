"""Export of a trained run to CTranslate2, or to safetensors for the Hugging Face Hub.

python export.py --output-dir fast                       # CTranslate2, float32
python export.py --output-dir fast --quantization int8
python export.py --output-dir hub --form safetensors     # then: hf upload NAME hub

D  d_model
"""

# config comes first: it makes Ctrl-C quiet during the imports below
from config import Config, InputError, parse, run_command

# isort: split
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from dataset import EOS, SOS, SPECIAL_TOKENS, UNK
from model import DecoderBlock, EncoderBlock, MultiHeadAttentionBlock, PositionalEncoding
from runs.files import check_new_folder, new_folder
from runs.folder import RunFolder
from translate import Translator

UNKNOWN_CORPUS = "unknown"  # the datasource of converted weights (convert.py)
Quantization = Literal["float32", "int8", "int16", "float16", "bfloat16"]

# ---------------------------------------------------------------------------- CTranslate2


def to_ctranslate2(translator: Translator, output_dir: str | Path, quantization: Quantization = "float32") -> None:
    """Writes the model and its tokenizers to a folder that `ctranslate2.Translator` loads.

    That class takes and returns token strings, and adds [SOS] and [EOS] to the source itself.
    """
    from ctranslate2.specs import TransformerSpec  # optional package

    model, config = translator.model, translator.config
    is_pre_norm = config.norm == "pre"
    spec = TransformerSpec.from_config(
        (config.encoder_layers, config.decoder_layers), config.num_heads, pre_norm=is_pre_norm
    )
    for side, embeddings, positions in (
        (spec.encoder, model.src_embed, model.src_pos),
        (spec.decoder, model.tgt_embed, model.tgt_pos),
    ):
        table = side.embeddings[0] if isinstance(side.embeddings, list) else side.embeddings
        table.weight = to_numpy(embeddings.embedding.weight)
        set_positions(side, positions)
    for block, layer in zip(spec.encoder.layer, model.encoder.layers, strict=True):
        set_encoder_block(block, layer)
    for block, layer in zip(spec.decoder.layer, model.decoder.layers, strict=True):
        set_decoder_block(block, layer)
    if is_pre_norm:
        set_norm(spec.encoder.layer_norm, model.encoder.norm)
        set_norm(spec.decoder.layer_norm, model.decoder.norm)
    set_linear(spec.decoder.projection, model.projection_layer.proj)
    spec.register_source_vocabulary(vocabulary(translator.tokenizer_src))
    spec.register_target_vocabulary(vocabulary(translator.tokenizer_tgt))
    spec.config.unk_token = SPECIAL_TOKENS[UNK]
    spec.config.bos_token = spec.config.decoder_start_token = SPECIAL_TOKENS[SOS]
    spec.config.eos_token = SPECIAL_TOKENS[EOS]
    spec.config.add_source_bos = spec.config.add_source_eos = True
    spec.config.layer_norm_epsilon = model.encoder.layers[0].residual_connections[0].norm.eps
    spec.validate()
    spec.optimize(quantization=None if quantization == "float32" else quantization)
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    spec.save(str(output_dir))
    copy_tokenizers(translator, Path(output_dir))


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A float32 copy: CTranslate2 quantizes in place, which must not change the model."""
    return tensor.detach().float().cpu().numpy().copy()


def vocabulary(tokenizer: Tokenizer) -> list[str]:
    """All tokens, in the order of their ids."""
    return [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]


def set_encoder_block(block, layer: EncoderBlock) -> None:
    norms = [residual.norm for residual in layer.residual_connections]
    set_attention(block.self_attention, layer.self_attention_block, norms[0], fused="qkv")
    set_feed_forward(block.ffn, layer.feed_forward_block, norms[1])


def set_decoder_block(block, layer: DecoderBlock) -> None:
    norms = [residual.norm for residual in layer.residual_connections]
    set_attention(block.self_attention, layer.self_attention_block, norms[0], fused="qkv")
    set_attention(block.attention, layer.cross_attention_block, norms[1], fused="kv")
    set_feed_forward(block.ffn, layer.feed_forward_block, norms[2])


def set_attention(spec, block: MultiHeadAttentionBlock, norm: nn.LayerNorm, fused: str) -> None:
    """Copies an attention block and the LayerNorm of its residual connection.

    `fused` names the projections that CTranslate2 stores in one matrix: qkv in self-attention, kv in cross-attention.
    """
    set_norm(spec.layer_norm, norm)
    projections = {"q": block.w_q, "k": block.w_k, "v": block.w_v}
    if fused == "kv":
        set_linear(spec.linear[0], block.w_q)
    fused_linear = spec.linear[0 if fused == "qkv" else 1]
    fused_linear.weight = to_numpy(torch.cat([projections[name].weight for name in fused]))  # (3 D, D) or (2 D, D)
    set_linear(spec.linear[-1], block.w_o)


def set_feed_forward(spec, block: nn.Module, norm: nn.LayerNorm) -> None:
    set_norm(spec.layer_norm, norm)
    set_linear(spec.linear_0, block.linear_1)
    set_linear(spec.linear_1, block.linear_2)


def set_linear(spec, linear: nn.Linear) -> None:
    spec.weight = to_numpy(linear.weight)
    if linear.bias is not None:
        spec.bias = to_numpy(linear.bias)


def set_norm(spec, norm: nn.LayerNorm) -> None:
    spec.gamma, spec.beta = to_numpy(norm.weight), to_numpy(norm.bias)


def set_positions(spec, positions: PositionalEncoding) -> None:
    spec.position_encodings.encodings = to_numpy(positions.pe)


# ---------------------------------------------------------------------------- safetensors


def to_safetensors(translator: Translator, output_dir: str | Path) -> None:
    """Writes weights, config.json, tokenizers and a model card.

    `Translator.load` takes the folder, or the Hub repository that it was uploaded to.
    """
    folder = RunFolder(output_dir)
    folder.path.mkdir(parents=True, exist_ok=True)
    try:
        safetensors.torch.save_model(translator.model, str(folder.exported_weights))
    except safetensors.SafetensorError as error:
        raise InputError(f"cannot write {folder} ({error}); free some space or choose another folder") from None
    folder.exported_weights.chmod(0o644)  # safetensors writes files that only their owner may read
    folder.save_config(without_paths(translator.config))
    copy_tokenizers(translator, folder.path)
    folder.write_checksum()
    (folder.path / "README.md").write_text(model_card(translator), encoding="utf8")


def without_paths(config: Config) -> Config:
    """The config with the names of local files and folders in place of their paths, which are private."""
    names = ("datasource", "validation_source", "test_source", "init_from", "distill_from")
    sources = {name: getattr(config, name).split(",") for name in names}  # --stream takes several
    return replace(config, **{name: ",".join(map(public_name, parts)) for name, parts in sources.items()})


def public_name(source: str) -> str:
    """The last part of a path; names of the Hub, NAME or NAME/NAME, stay as they are."""
    path = Path(source.strip())
    is_path = path.is_absolute() or path.parent.is_dir() or len(path.parts) > 2 or path.parts[:1] in (("..",), ("~",))
    return path.name if is_path else source


def copy_tokenizers(translator: Translator, folder: Path) -> None:
    """Copies the two tokenizer files, unless the folder is that of the run."""
    for lang in (translator.config.lang_src, translator.config.lang_tgt):
        source = translator.folder.tokenizer_file(lang)
        if source.parent.resolve() != folder.resolve():
            shutil.copy(source, folder / source.name)


def model_card(translator: Translator) -> str:
    """The README.md of a Hub repository, with its metadata."""
    config = without_paths(translator.config)
    parameters = sum(p.numel() for p in translator.model.parameters())
    trained = "" if config.datasource == UNKNOWN_CORPUS else f", trained on {config.datasource}"
    return f"""---
language: ["{config.lang_src}", "{config.lang_tgt}"]
pipeline_tag: translation
---
A Transformer that translates from {config.lang_src} to {config.lang_tgt}{trained}:
{config.encoder_layers} encoder and {config.decoder_layers} decoder layers,
d_model {config.d_model}, {parameters:,} parameters.

To translate, run this in the folder of the project that trained it, "Transformer from scratch". Its module
`translate` is not the package of that name on PyPI.

```python
from translate import Translator

print(Translator.load("USER/MODEL").translate(["A sentence."]))
```
"""


def main(
    output_dir: str,
    run_dir: str = "",
    form: Literal["ctranslate2", "safetensors"] = "ctranslate2",
    quantization: Quantization = "float32",
    weights: str = "best",
    average: int = 1,
) -> None:
    """Export a trained run to another format.

    Args:
        output_dir: folder to write to, new or empty
        run_dir: folder of the run; empty: the most recently trained run
        form: ctranslate2, a fast C++ inference engine, or safetensors, for the Hugging Face Hub
        quantization: data type of the CTranslate2 model's weights
        weights: best (on the validation set), latest, or an epoch number
        average: number of checkpoints whose weights are averaged, the best or the latest ones
    """
    folder = Path(os.path.realpath(output_dir))
    check_new_folder(folder)
    translator = Translator.load(run_dir, "cpu", weights, average)
    with new_folder(folder) as partial:
        if form == "ctranslate2":
            to_ctranslate2(translator, partial, quantization)
        else:
            to_safetensors(translator, partial)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"wrote {folder} ({size / 1e6:.1f} MB): {', '.join(sorted(path.name for path in folder.iterdir()))}")


if __name__ == "__main__":
    run_command(lambda argv: parse(main, argv))
