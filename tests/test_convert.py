"""Converted weights give the logits of the tutorial's model, which is written out here as a function of its weights.

D  d_model    FF  d_ff    H  heads
"""

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from config import InputError
from convert import main
from dataset import EOS, SOS, SPECIAL_TOKENS
from model import causal_mask
from translate import Translator

D, FF, H, LAYERS, LENGTH = 64, 128, 4, 3, 50


def norm(w: dict, name: str, x: Tensor) -> Tensor:
    """The tutorial's LayerNorm: unbiased standard deviation, epsilon outside the root."""
    centered = x - x.mean(-1, keepdim=True)
    return w[f"{name}.alpha"] * centered / (x.std(-1, keepdim=True) + 1e-6) + w[f"{name}.bias"]


def attention(w: dict, name: str, q: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
    def heads(x: Tensor, matrix: str) -> Tensor:
        return (x @ w[f"{name}.{matrix}.weight"].T).view(len(x), H, D // H).transpose(0, 1)

    scores = heads(q, "w_q") @ heads(kv, "w_k").transpose(1, 2) / math.sqrt(D // H)
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    context = (scores.softmax(-1) @ heads(kv, "w_v")).transpose(0, 1).reshape(len(q), D)
    return context @ w[f"{name}.w_o.weight"].T


def feed_forward(w: dict, name: str, x: Tensor) -> Tensor:
    inner = (x @ w[f"{name}.linear_1.weight"].T + w[f"{name}.linear_1.bias"]).relu()
    return inner @ w[f"{name}.linear_2.weight"].T + w[f"{name}.linear_2.bias"]


def original_logits(w: dict, source: list[int], target: list[int]) -> Tensor:
    def embedded(side: str, ids: list[int]) -> Tensor:
        return w[f"{side}_embed.embedding.weight"][ids] * math.sqrt(D) + w[f"{side}_pos.pe"][0, : len(ids)]

    x = embedded("src", source)
    for i in range(LAYERS):
        block = f"encoder.layers.{i}"
        n = norm(w, f"{block}.residual_connections.0.norm", x)
        x = x + attention(w, f"{block}.self_attention_block", n, n, None)
        x = x + feed_forward(w, f"{block}.feed_forward_block", norm(w, f"{block}.residual_connections.1.norm", x))
    memory = norm(w, "encoder.norm", x)
    y = embedded("tgt", target)
    for i in range(LAYERS):
        block = f"decoder.layers.{i}"
        n = norm(w, f"{block}.residual_connections.0.norm", y)
        y = y + attention(w, f"{block}.self_attention_block", n, n, causal_mask(len(target)))
        n = norm(w, f"{block}.residual_connections.1.norm", y)
        y = y + attention(w, f"{block}.cross_attention_block", n, memory, None)
        y = y + feed_forward(w, f"{block}.feed_forward_block", norm(w, f"{block}.residual_connections.2.norm", y))
    return norm(w, "decoder.norm", y) @ w["projection_layer.proj.weight"].T + w["projection_layer.proj.bias"]


def original_weights(src_vocab: int, tgt_vocab: int, scalar_norms: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    position, frequency = torch.arange(LENGTH).unsqueeze(1), torch.exp(torch.arange(0, D, 2) * -math.log(1e4) / D)
    pe = torch.stack([torch.sin(position * frequency), torch.cos(position * frequency)], -1).view(1, LENGTH, D)
    w = {"src_pos.pe": pe, "tgt_pos.pe": pe}

    def matrix(name: str, out: int, into: int, bias: bool = False) -> None:
        w[f"{name}.weight"] = torch.randn(out, into) / math.sqrt(into)
        if bias:
            w[f"{name}.bias"] = torch.randn(out) / 10

    def norms(name: str) -> None:
        size = 1 if scalar_norms else D
        w[f"{name}.alpha"], w[f"{name}.bias"] = 1 + torch.randn(size) / 5, torch.randn(size) / 5

    matrix("src_embed.embedding", src_vocab, D)
    matrix("tgt_embed.embedding", tgt_vocab, D)
    matrix("projection_layer.proj", tgt_vocab, D, bias=True)
    for part, attentions in (("encoder", ["self"]), ("decoder", ["self", "cross"])):
        norms(f"{part}.norm")
        for i in range(LAYERS):
            block = f"{part}.layers.{i}"
            for kind in attentions:
                for name in ("w_q", "w_k", "w_v", "w_o"):
                    matrix(f"{block}.{kind}_attention_block.{name}", D, D)
            matrix(f"{block}.feed_forward_block.linear_1", FF, D, bias=True)
            matrix(f"{block}.feed_forward_block.linear_2", D, FF, bias=True)
            for j in range(len(attentions) + 1):
                norms(f"{block}.residual_connections.{j}.norm")
    return w


@pytest.fixture
def files(tmp_path):
    """A folder with tokenizers trained as in the tutorial, and their vocabulary sizes."""
    texts = {
        "en": ["the cat sees a dog", "a dog sleeps here"] * 2,
        "it": ["il gatto vede un cane", "un cane dorme"] * 2,
    }
    sizes = []
    for lang, lines in texts.items():
        tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.train_from_iterator(lines, trainers.WordLevelTrainer(special_tokens=SPECIAL_TOKENS, min_frequency=2))
        tokenizer.save(str(tmp_path / f"tokenizer_{lang}.json"))
        sizes.append(tokenizer.get_vocab_size())
    return tmp_path, sizes


def convert(folder, **changes) -> Translator:
    run = folder / "run"
    arguments = {
        "weights": str(folder / "tmodel_19.pt"),
        "tokenizer_src": str(folder / "tokenizer_en.json"),
        "tokenizer_tgt": str(folder / "tokenizer_it.json"),
        "lang_src": "en",
        "lang_tgt": "it",
        "run_dir": str(run),
        "num_heads": H,
    }
    main(**{**arguments, **changes})
    return Translator.load(run, "cpu")


@torch.inference_mode()
@pytest.mark.parametrize("scalar_norms", [False, True])
def test_logits_and_greedy_translations_equal_the_originals(files, scalar_norms):
    folder, sizes = files
    w = original_weights(*sizes, scalar_norms)
    torch.save(
        {"epoch": 19, "model_state_dict": w, "optimizer_state_dict": {}, "global_step": 7}, folder / "tmodel_19.pt"
    )
    translator = convert(folder)
    source = translator.encode("the dog sees a cat")
    target = [SOS, 5, 6, 7, 8, 4]
    mask = torch.ones(1, 1, 1, len(source), dtype=torch.bool)
    ours = translator.model(torch.tensor([source]), torch.tensor([target]), mask, causal_mask(len(target)))[0]
    assert (ours - original_logits(w, source, target)).abs().max() < 1e-4
    greedy = [SOS]
    while greedy[-1] != EOS and len(greedy) <= 2 * len(source) + 10:
        greedy.append(int(original_logits(w, source, greedy)[-1].argmax()))
    assert translator.search([source])[0] == [i for i in greedy[1:] if i != EOS]


@pytest.mark.parametrize("changes", [{"weights": "none.pt"}, {"num_heads": 7}, {"lang_tgt": "en"}])
def test_bad_arguments_raise_an_error_and_write_nothing(files, changes):
    folder, sizes = files
    torch.save({"model_state_dict": original_weights(*sizes, False)}, folder / "tmodel_19.pt")
    with pytest.raises(InputError):
        convert(folder, **changes)
    assert not (folder / "run").exists()


def test_files_that_are_not_the_tutorials_checkpoints_are_rejected(files):
    folder, sizes = files
    for content in ({"model": 1}, {"model_state_dict": {"w": torch.ones(1)}}):
        torch.save(content, folder / "tmodel_19.pt")
        with pytest.raises(InputError, match=r"the tutorial's train\.py"):
            convert(folder)
    torch.save({"model_state_dict": original_weights(sizes[0] + 1, sizes[1], False)}, folder / "tmodel_19.pt")
    with pytest.raises(InputError, match="do not fit the tokenizers"):
        convert(folder)
