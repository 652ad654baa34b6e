"""Checks of the twelve steps of build_it_yourself.py.

    B  batch (sentences)          D    d_model, width of the residual stream
    S  source length in tokens    H    attention heads
    T  target length in tokens    d_k  head size, D / H
    Q  query positions            V    vocabulary size
    K  key positions              W    beam size

A check runs the learner's functions on random inputs. It compares the results with those of the project's own modules,
and with those of the usual mistakes: a result that equals a mistake's result is reported by the name of the mistake.
Inputs are small; a check takes a fraction of a second.
"""

import functools
import inspect
import itertools
import math
import random
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dataset
import model
import search
from compute.ops import plain_loss
from dataset import EOS, PAD, SOS


class CheckFailed(Exception):
    """One sentence that names the mistake."""

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows: the sentence without a traceback."""
        return [f"CheckFailed: {self}"]


class Step(NamedTuple):
    """An exercise: the functions to write, and their check, which takes them in this order."""

    number: int
    title: str
    names: tuple[str, ...]
    check: Callable


STEPS: list[Step] = []


def step(title: str) -> Callable:
    """Registers a check as the next step. Its parameters are the functions to write; it returns what is right."""

    def register(check: Callable) -> Callable:
        number = len(STEPS) + 1

        @functools.wraps(check)
        def run(*functions: Callable) -> None:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                print(f"Step {number} passed: {check(*functions)}.")

        STEPS.append(Step(number, title, tuple(inspect.signature(check).parameters), run))
        return run

    return register


def step_of(name: str) -> Step:
    """The step in which a function is written."""
    return next(step for step in STEPS if name in step.names)


def own_functions(namespace: Mapping) -> SimpleNamespace:
    """The functions of all steps, from globals() or a module's variables. Raises CheckFailed if one is missing."""
    return SimpleNamespace(**{name: find(namespace, name) for step in STEPS for name in step.names})


def find(namespace: Mapping, name: str) -> Callable:
    if not callable(namespace.get(name)):
        raise CheckFailed(f"Step {step_of(name).number}, {name}, is missing: there is no function of that name")
    return namespace[name]


def run_step(step: Step, namespace: Mapping) -> None:
    """Checks the functions of one step."""
    step.check(*(find(namespace, name) for name in step.names))


# ---------------------------------------------------------------------------- calling and comparing


def fail(name: str, sentence: str) -> NoReturn:
    raise CheckFailed(f"Step {step_of(name).number}, {name}: {sentence}") from None


def call(name: str, function: Callable, *arguments, sizes: str = ""):
    """The function's result. It must not change its arguments. `sizes` completes the message of a RuntimeError."""
    copies = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
    result = result_of(name, function, copies, sizes)
    if result is None:
        raise CheckFailed(f"Step {step_of(name).number}, {name}, is not written yet: it returns None")
    require_unchanged(name, function, arguments, copies)
    require_gradient(name, function, arguments, sizes)
    return result


def result_of(name: str, function: Callable, arguments: list, sizes: str):
    """The function's result; an exception is reported with its line."""
    try:
        result = function(*arguments)
    except NotImplementedError as error:
        report_missing(name, error)
    except CheckFailed:
        raise
    except Exception as error:
        place = next((f.line for f in reversed(traceback.extract_tb(error.__traceback__)) if f.name == name), "")
        where = f" in the line `{place}`" if place else ""
        text = " ".join(str(error).split())
        if text == "'Tensor' object is not callable":
            text += "; give a function of x, as in lambda x: …, not its result"
        if name == "beam_search" and "selected index k out of range" in text:
            text += "; beam_size may be larger than the number of candidates: use min(beam_size, …)"
        if sizes and isinstance(error, RuntimeError):
            text += f" (here {sizes})"
        fail(name, f"{type(error).__name__}{where}: {text}")
    return result


def require_unchanged(name: str, function: Callable, arguments: tuple, copies: list) -> None:
    """Raises CheckFailed if the function has changed an argument, which training would not survive."""
    for i, (before, after) in enumerate(zip(arguments, copies, strict=True)):
        if isinstance(before, Tensor) and not before.equal(after):
            x = parameter_name(function, i)
            instead = f"write {x} = {x} + … instead of {x} += …, and likewise for other operations"
            fail(name, f"it changes its input {x} in place; {instead}")


def parameter_name(function: Callable, i: int) -> str:
    """The name of a parameter, or x if the function does not tell."""
    try:
        return list(inspect.signature(function).parameters)[i]
    except (ValueError, IndexError):
        return "x"


def require_gradient(name: str, function: Callable, arguments: tuple, sizes: str) -> None:
    """Raises CheckFailed if an operation in place destroys a tensor that the gradient needs."""
    if not any(isinstance(x, Tensor) and x.is_floating_point() for x in arguments):
        return
    with torch.enable_grad():
        leaves = [x.detach().clone() if isinstance(x, Tensor) else x for x in arguments]
        for x in leaves:
            if isinstance(x, Tensor) and x.is_floating_point():
                x.requires_grad_()
        result = result_of(name, function, leaves, sizes)
        outputs = [x for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, Tensor)]
        outputs = [x for x in outputs if x.requires_grad]
        if not outputs:  # everything dropped
            return
        try:
            torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
        except RuntimeError as error:
            if "inplace operation" in str(error):
                fail(name, "it changes a tensor in place that the gradient needs; write y = y / z instead of y /= z")
            fail(name, f"the gradient cannot be computed: {' '.join(str(error).split())}")


def report_missing(name: str, error: NotImplementedError) -> NoReturn:
    """Says which function is not written: this one, or one that it calls."""
    missing = traceback.extract_tb(error.__traceback__)[-1].name
    number = step_of(name).number
    if missing != name and any(missing in step.names for step in STEPS):
        needed = f"Step {step_of(missing).number}, {missing}, which is not written yet"
        raise CheckFailed(f"Step {number}, {name}, needs {needed}") from None
    raise CheckFailed(f"Step {number}, {name}, is not written yet") from None


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.to(b.dtype), b, rtol=1e-4, atol=1e-4, equal_nan=True)


def require_tensor(name: str, result, shape: tuple[int, ...], what: str = "the result") -> None:
    if not isinstance(result, Tensor):
        fail(name, f"{what} is of type {type(result).__name__}; return a tensor")
    if tuple(result.shape) != tuple(shape):
        fail(name, f"{what} has the shape {tuple(result.shape)}, not {tuple(shape)}")
    if result.is_floating_point() and result.dtype != torch.float32:
        fail(name, f"{what} holds {result.dtype}; the project computes with torch.float32")


def require_equal(
    name: str, result, expected: Tensor, mistakes: dict[str, Tensor] | None = None, what: str = "the result"
) -> None:
    """Raises CheckFailed unless the result is as expected. `mistakes`: what each mistake leads to, by its sentence."""
    require_tensor(name, result, expected.shape, what)
    if equal(result, expected):
        return
    for sentence, wrong in (mistakes or {}).items():
        if equal(result, wrong):
            fail(name, sentence)
    if result.isnan().any():
        fail(name, f"{what} contains NaN")
    difference = (result - expected).abs().flatten()
    place = tuple(int(i) for i in torch.unravel_index(difference.argmax(), expected.shape))
    where = f" at {place}" if place else ""
    found = f"{what} is {result[place]:.3f}{where}, where the reference has {expected[place]:.3f}"
    ratio = constant_ratio(result, expected)
    fail(name, found if ratio is None else f"{found}: everywhere {ratio:.3g} times the reference")


def constant_ratio(result: Tensor, expected: Tensor) -> float | None:
    """The factor between result and reference, if it is the same everywhere."""
    ratio = (result * expected).sum() / (expected * expected).sum()
    if expected.dim() and ratio.isfinite() and ratio.abs() > 1e-3 and equal(result, ratio * expected):
        return ratio.item()
    return None


def require_pair(name: str, result, what: str) -> tuple:
    if not isinstance(result, tuple | list) or len(result) != 2:
        fail(name, f"the result is one {type(result).__name__}; return the pair ({what})")
    return tuple(result)


def identity(x: Tensor) -> Tensor:
    return x


def drop_all(x: Tensor) -> Tensor:
    """Dropout with probability 1."""
    return torch.zeros_like(x)


def randomized(module: nn.Module) -> nn.Module:
    """The module with random weights everywhere, so that no bias is 0 and no gain is 1."""
    for parameter in module.parameters():
        parameter.copy_(0.4 * torch.randn(parameter.shape))
    return module.eval()


# ---------------------------------------------------------------------------- steps 1 to 4


@step("Embeddings")
def check_embeddings(embeddings: Callable) -> str:
    name = "embeddings"
    for V, D in ((50, 16), (30, 36)):
        reference = model.InputEmbeddings(D, V)
        weight, ids = reference.embedding.weight, torch.randint(V, (2, 40))
        rows, expected = weight[ids], reference(ids)
        result = call(name, embeddings, ids, weight)
        require_tensor(name, result, expected.shape)
        std = f"their standard deviation is {result.std():.2f}, not {expected.std():.2f}"
        mistakes = {
            f"the embeddings are not multiplied by sqrt(d_model): {std}": rows,
            f"the embeddings are multiplied by d_model instead of sqrt(d_model): {std}": rows * D,
            f"the embeddings are divided by sqrt(d_model) instead of multiplied: {std}": rows / math.sqrt(D),
        }
        require_equal(name, result, expected, mistakes)
    return "embeddings equal those of model.InputEmbeddings"


def encodings(angle: Tensor) -> Tensor:
    """Sine and cosine of angles (T, D / 2), alternating: (T, D)."""
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


@step("Positions")
def check_positions(positional_encoding: Callable, embed: Callable) -> str:
    name, T, D, V = "positional_encoding", 12, 16, 50
    expected = model.PositionalEncoding(D, T, 0.0).pe
    result = call(name, positional_encoding, T, D)
    require_tensor(name, result, expected.shape)
    position, exponent = torch.arange(T).unsqueeze(1), torch.arange(0, D, 2) / D
    angle = position / 10_000**exponent
    first = f"row 0 starts with {result[0, 0]:.0f}, {result[0, 1]:.0f}, not 0, 1"
    own_exponents = position / 10_000 ** (torch.arange(D) / D)
    mixed = torch.where(torch.arange(D) % 2 == 0, own_exponents.sin(), own_exponents.cos())
    small = f"the last sine of row 1 is {result[1, -2]:.5f}, not {expected[1, -2]:.5f}"
    mistakes = {
        f"sine and cosine are swapped: {first}": encodings(angle).unflatten(1, (-1, 2)).flip(-1).flatten(1),
        "the sines come first and the cosines after them; they have to alternate": torch.cat(
            [angle.sin(), angle.cos()], 1
        ),
        f"the base is 1,000 instead of 10,000: {small}": encodings(position / 1_000**exponent),
        f"the base is 100,000 instead of 10,000: {small}": encodings(position / 100_000**exponent),
        f"the base is e instead of 10,000: {small}": encodings(position / math.e**exponent),
        f"the exponent is i / D instead of 2i / D, where i counts the pairs: {small}": encodings(
            position / 10_000 ** (exponent / 2)
        ),
        f"the exponent is 4i / D instead of 2i / D, where i counts the pairs: {small}": encodings(
            position / 10_000 ** (2 * exponent)
        ),
        "sine and cosine of a pair have different exponents; they share the exponent 2i / D": mixed,
        f"the position is multiplied by 10000^(2i / D) instead of divided: {small}": encodings(
            position * 10_000**exponent
        ),
        f"positions are counted from 1 instead of 0: row 0 starts with {result[0, 0]:.3f}": encodings(
            (position + 1) / 10_000**exponent
        ),
    }
    require_equal(name, result, expected, mistakes)

    name = "embed"
    table, ids = torch.randn(V, D) / 4, torch.randint(V, (2, T))
    rows = table[ids]
    scaled = rows * math.sqrt(D)
    mistakes = {
        "positions are added before the embeddings are multiplied by sqrt(d_model), which multiplies them as well": (
            rows + expected
        )
        * math.sqrt(D),
        "the positions are not added": scaled,
        "sqrt(D) is applied twice; embeddings already does it": rows * D + expected,
        "the embeddings are not multiplied by sqrt(d_model): call your function of step 1": rows + expected,
    }
    require_equal(name, call(name, embed, ids, table, identity), scaled + expected, mistakes)
    dropped = call(name, embed, ids, table, drop_all)
    mistakes = {
        "positions are added after dropout, so they are never dropped": expected.expand_as(scaled),
        "dropout is not applied": scaled + expected,
        "dropout is applied to the positions only": scaled,
    }
    require_equal(name, dropped, torch.zeros_like(scaled), mistakes, "with everything dropped the result")
    return "encodings equal those of model.PositionalEncoding, added to the scaled embeddings before dropout"


@step("Layer normalization")
def check_layer_norm(layer_norm: Callable) -> str:
    name, B, T, D, eps = "layer_norm", 3, 5, 8, 1e-5
    reference = randomized(nn.LayerNorm(D))
    gain, bias = reference.weight, reference.bias

    def over(x: Tensor, axes: int | tuple[int, ...]) -> Tensor:
        centered = x - x.mean(axes, keepdim=True)
        return gain * centered / torch.sqrt(x.var(axes, correction=0, keepdim=True) + eps) + bias

    x = 3 + 2 * torch.randn(B, T, D)
    centered, variance = x - x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    result = call(name, layer_norm, x, gain, bias, eps)
    require_tensor(name, result, x.shape)
    plain = (result - bias) / gain
    unbiased = centered / torch.sqrt(variance * D / (D - 1) + eps)
    found = f"before gain and bias the variance of a vector is {plain.var(-1, correction=0).mean():.3f}, not 1"
    mean = f"before gain and bias the mean of a vector is {plain.mean(-1)[0, 0]:.2f}, not 0"
    mistakes = {
        f"the variance is the unbiased one, divided by D - 1 instead of D: {found}": gain * unbiased + bias,
        f"mean and variance are over the positions (dimension 1), not over each vector (dimension -1): {mean}": over(
            x, 1
        ),
        f"mean and variance are over the batch (dimension 0), not over each vector (dimension -1): {mean}": over(x, 0),
        f"mean and variance are over positions and dimensions together, not over each vector: {mean}": over(x, (1, 2)),
        f"mean and variance are over the whole batch, not over each vector: {mean}": over(x, (0, 1, 2)),
        f"the mean is not subtracted: {mean}": gain * x / torch.sqrt(variance + eps) + bias,
        f"the variance is divided by without its square root: {found}": gain * centered / (variance + eps) + bias,
        "gain and bias are not applied": centered / torch.sqrt(variance + eps),
        "gain is not applied": centered / torch.sqrt(variance + eps) + bias,
        "bias is not added": gain * centered / torch.sqrt(variance + eps),
    }
    require_equal(name, result, reference(x), mistakes)

    constant = torch.full((1, 1, D), 2.0)
    result = call(name, layer_norm, constant, gain, bias, eps)
    if not result.isfinite().all():
        fail(name, "eps is missing: a vector of equal numbers, with variance 0, becomes NaN")
    small = 1e-3 * x
    deviation = small.var(-1, correction=0, keepdim=True).sqrt()
    difference = small - small.mean(-1, keepdim=True)
    mistakes = {
        "eps is added to the standard deviation; it belongs to the variance, inside the square root": gain
        * difference
        / (deviation + eps)
        + bias,
        "eps is missing: small vectors are scaled up to variance 1": gain * difference / deviation + bias,
    }
    result = call(name, layer_norm, small, gain, bias, eps)
    require_equal(name, result, reference(small), mistakes, "for small vectors the result")
    return "the result equals nn.LayerNorm, also for constant and for small vectors"


@step("Feed-forward")
def check_feed_forward(feed_forward: Callable) -> str:
    name, x = "feed_forward", torch.randn(2, 5, 8)
    block = randomized(model.FeedForwardBlock(8, 32, 0.0))
    linear_1, linear_2 = block.linear_1, block.linear_2
    mistakes = {
        "the ReLU is missing: without it f(x) + f(-x) = 2 f(0), so two layers can do no more than one": linear_2(
            linear_1(x)
        ),
        "the ReLU comes after the second layer: no output is negative": F.relu(linear_2(linear_1(x))),
        "there is a ReLU after the second layer, too: no output is negative": F.relu(block(x)),
        "the ReLU comes before the first layer instead of after it": linear_2(linear_1(F.relu(x))),
        "the activation is GELU; the paper has ReLU": linear_2(F.gelu(linear_1(x))),
        "the input is added; the residual connection is step 8": x + block(x),
    }
    require_equal(name, call(name, feed_forward, x, linear_1, linear_2), block(x), mistakes)
    return "the result equals model.FeedForwardBlock"


# ---------------------------------------------------------------------------- steps 5 to 7: attention

# Three words with d_k = 2, small enough to compute by hand.
THREE_WORDS = {
    "query": torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
    "key": torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]),
    "value": torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]),
}


def raw_scores(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.transpose(-2, -1)


def logit_variance(scores: Tensor) -> float:
    """The variance over the keys of what the softmax was applied to, from its result."""
    return scores.clamp_min(1e-37).log().var(-1).mean().item()


@step("One head of attention")
def check_attention(attention: Callable) -> str:
    name, reference, d_k = "attention", model.MultiHeadAttentionBlock.scores, 16
    query, key, value = torch.randn(2, 4, 200, d_k), torch.randn(2, 4, 220, d_k), torch.randn(2, 4, 220, d_k)
    context, scores = require_pair(name, call(name, attention, query, key, value), "context, scores")
    expected, raw, scale = reference(query, key, None), raw_scores(query, key), math.sqrt(d_k)
    require_tensor(name, scores, expected.shape, "scores")
    variance = f"their variance is {logit_variance(scores):.1f}, not 1"
    rows = f"row 0 sums to {scores[0, 0, 0].sum():.2f}, not 1"
    mistakes = {
        f"scores are not divided by sqrt(d_k): {variance}": raw.softmax(-1),
        f"scores are divided by d_k instead of sqrt(d_k): {variance}": (raw / d_k).softmax(-1),
        f"scores are multiplied by sqrt(d_k) instead of divided: {variance}": (raw * scale).softmax(-1),
        f"the softmax is over the queries (dimension -2) instead of the keys (dimension -1): {rows}": (
            raw / scale
        ).softmax(-2),
        f"the softmax is over the queries, and scores are not divided by sqrt(d_k): {rows}": raw.softmax(-2),
        f"the softmax is over the heads (dimension 1) instead of the keys (dimension -1): {rows}": (
            raw / scale
        ).softmax(1),
        f"the division by sqrt(d_k) comes after the softmax: {rows}": raw.softmax(-1) / scale,
        f"the softmax is missing from scores: {rows}": raw / scale,
        f"scores have neither softmax nor division by sqrt(d_k): {rows}": raw,
    }
    require_equal(name, scores, expected, mistakes, "scores")
    mistakes = {
        "the context is computed from scores before the softmax": raw / scale @ value,
        "the context is computed from the keys instead of the values": expected @ key,
    }
    require_equal(name, context, expected @ value, mistakes, "the context")

    query, key, value = THREE_WORDS.values()
    context, scores = call(name, attention, query, key, value)
    expected = reference(query, key, None)
    require_equal(name, scores, expected, what="for the three words, scores")
    require_equal(name, context, expected @ value, what="for the three words, the context")
    return "scores equal those of model.MultiHeadAttentionBlock, and rows sum to 1"


@step("Masks")
def check_masks(padding_mask: Callable, causal_mask: Callable, masked_attention: Callable) -> str:
    check_padding_mask(padding_mask)
    check_causal_mask(causal_mask)
    check_masked_attention(masked_attention)
    return "no position sees padding or the future, and rows still sum to 1"


def check_padding_mask(padding_mask: Callable) -> None:
    name, ids = "padding_mask", torch.tensor([[SOS, 7, 0, 9, EOS], [SOS, 8, EOS, PAD, PAD]])
    result, expected = call(name, padding_mask, ids), dataset.padding_mask(ids)
    require_tensor(name, result, expected.shape)
    if result.dtype != torch.bool:
        fail(name, f"the mask holds {result.dtype}; give booleans, True = may attend")
    if result.equal(~expected):
        fail(name, "the padding mask is inverted: in row 1 it hides the three tokens and shows the two [PAD]")
    if result.equal((ids != 0)[:, None, None, :]):
        fail(name, f"the mask hides the id 0; [PAD] has the id {PAD}, as in dataset.PAD")
    if not result.equal(expected):
        fail(name, f"row 1 is {result[1].flatten().tolist()}, not {expected[1].flatten().tolist()}")


def check_causal_mask(causal_mask: Callable) -> None:
    name = "causal_mask"
    for size in (4, 1):
        result = call(name, causal_mask, size)
        require_tensor(name, result, (1, size, size))
        if result.dtype != torch.bool:
            fail(name, f"the mask holds {result.dtype}; give booleans, True = may attend")
        if size > 1 and result.equal(model.causal_mask(size).mT):
            fail(name, "it is transposed: row 0 sees all positions, the mask lets the future in; use tril, not triu")
        future, past = result[0].triu(1), result[0].tril(-1)
        if future.any():
            row, column = future.nonzero()[-1].tolist()
            inverted = "it is inverted; " if not past.any() else ""
            fail(name, f"{inverted}row {row} sees position {column}: the mask lets the future in")
        hidden = (~result[0]).diagonal().nonzero().flatten().tolist()
        if hidden:
            fail(name, f"the diagonal is missing: row {hidden[-1]} does not see its own position")
        if not result.equal(model.causal_mask(size)):
            fail(name, "some rows do not see all earlier positions")


def check_masked_attention(masked_attention: Callable) -> None:
    name, reference = "masked_attention", model.MultiHeadAttentionBlock.scores
    query, key, value = torch.randn(2, 4, 5, 16), torch.randn(2, 4, 7, 16), torch.randn(2, 4, 7, 16)
    mask = torch.ones(1, 5, 7, dtype=torch.bool).tril()
    result = call(name, masked_attention, query, key, value, mask)
    context, scores = require_pair(name, result, "context, scores")
    expected, raw, scale = reference(query, key, mask), raw_scores(query, key), 4.0
    require_tensor(name, scores, expected.shape, "scores")
    row, hidden = f"row 0 sums to {scores[0, 0, 0].sum():.2f}", f"{scores[0, 0, 0, 1]:.2f}"
    unmasked = (raw / scale).softmax(-1)
    mistakes = {
        f"the mask is applied after the softmax: {row}, not 1": unmasked * mask,
        "the mask is inverted: row 0 sees positions 1 to 6 instead of position 0": reference(query, key, ~mask),
        f"the mask is not applied: row 0 gives position 1, which is masked, the weight {hidden}": unmasked,
        f"masked scores are set to 0 instead of -infinity before the softmax: position 1 gets {hidden} from row 0": (
            raw / scale * mask
        ).softmax(-1),
        "scores are not divided by sqrt(d_k), as they are in step 5": reference(query * scale, key, mask),
        "the softmax is applied twice: mask Q K^T / sqrt(d_k), not the result of attention": unmasked.masked_fill(
            ~mask, -math.inf
        ).softmax(-1),
        f"-infinity is written after the softmax: {row}": unmasked.masked_fill(~mask, -math.inf),
        "the softmax is over the queries (dimension -2) instead of the keys (dimension -1)": (raw / scale)
        .masked_fill(~mask, -math.inf)
        .softmax(-2)
        .nan_to_num(),
    }
    require_equal(name, scores.nan_to_num() if scores.isnan().any() else scores, expected, mistakes, "scores")
    mistakes = {"the context is computed from scores without the mask": unmasked @ value}
    require_equal(name, context, expected @ value, mistakes, "the context")


@step("Many heads")
def check_multi_head_attention(multi_head_attention: Callable) -> str:
    name, B, Q, K, D, h = "multi_head_attention", 2, 5, 7, 16, 4
    block = randomized(model.MultiHeadAttentionBlock(D, h, 0.0))
    q, k, v = torch.randn(B, Q, D), torch.randn(B, K, D), torch.randn(B, K, D)
    mask = torch.ones(B, 1, 1, K, dtype=torch.bool)
    mask[1, ..., 4:] = False
    linears = block.w_q, block.w_k, block.w_v, block.w_o

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (h, -1)).transpose(1, 2)

    def split_wrongly(x: Tensor) -> Tensor:
        return x.reshape(x.size(0), h, x.size(1), -1)

    def interleave(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, h)).permute(0, 3, 1, 2)

    def join(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    def join_wrongly(x: Tensor) -> Tensor:
        return x.reshape(B, Q, D)

    def attend(split=split, join=join, w_o=block.w_o, mask=mask, key=None, value=None) -> tuple[Tensor, Tensor]:
        key, value = block.w_k(k) if key is None else key, block.w_v(v) if value is None else value
        scores = block.scores(split(block.w_q(q)), split(key), mask)
        return w_o(join(scores @ split(value))), scores

    block.record = True
    expected = block(q, k, v, mask)
    sizes = f"B {B}, Q {Q}, K {K}, D {D}, h {h}"
    result = call(name, multi_head_attention, q, k, v, mask, *linears, h, sizes=sizes)
    output, scores = require_pair(name, result, "output, scores")
    require_tensor(name, output, expected.shape, "output")
    mixed = "heads are split without the transpose, which mixes up positions and heads: view(B, T, H, d_k), then "
    joined = "heads are joined without the transpose back, which mixes up positions and heads"
    mistakes = {
        mixed + "transpose(1, 2)": attend(split_wrongly),
        mixed + "transpose(1, 2), and back when they are joined": attend(split_wrongly, join_wrongly),
        joined: attend(join=join_wrongly),
        "w_o is missing: the joined heads are returned as they are": attend(w_o=identity),
        f"{joined}, and w_o is missing": attend(join=join_wrongly, w_o=identity),
        "the mask is not passed on: the padding of sentence 1 gets weight": attend(mask=None),
        "the dimensions are dealt to the heads in turn; head 0 has the first d_k of them": attend(interleave),
        "the keys are projected with w_q instead of w_k": attend(key=block.w_q(k)),
        "the values are projected with w_k instead of w_v": attend(value=block.w_k(v)),
        "the values are computed from k instead of v": attend(value=block.w_v(k)),
        "the keys are not projected with w_k": attend(key=k),
        "the values are not projected with w_v": attend(value=v),
    }
    for sentence, (wrong, wrong_scores) in mistakes.items():
        same_scores = not isinstance(scores, Tensor) or equal(scores, wrong_scores)
        if not equal(output, expected) and equal(output, wrong) and same_scores:
            fail(name, sentence)
    single = block.scores(block.w_q(q), block.w_k(k), mask[:, 0])
    if equal(output, block.w_o(single @ block.w_v(v))):
        fail(name, f"there is one head of {D} dimensions instead of {h} of {D // h}: the heads are not split")
    require_equal(name, output, expected, what="the output")
    require_equal(name, scores, block.attention_scores, what="scores")
    return "output and scores equal those of model.MultiHeadAttentionBlock"


# ---------------------------------------------------------------------------- steps 8 to 10: layers


@step("Residual connections")
def check_residual(residual: Callable) -> str:
    name, x = "residual", torch.randn(2, 5, 8)
    sublayer, connection = randomized(nn.Linear(8, 8)), randomized(model.ResidualConnection(8, 0.0))
    norm = connection.norm
    mistakes = {
        "the residual is missing: x is not added to the sublayer's output": sublayer(norm(x)),
        "the norm is on the wrong side (post-norm): norm(x + sublayer(x)); pre-norm is x + sublayer(norm(x))": norm(
            x + sublayer(x)
        ),
        "the norm is missing": x + sublayer(x),
        "the norm is applied to the sublayer's output instead of its input": x + norm(sublayer(x)),
        "norm(x) is added instead of x": norm(x) + sublayer(norm(x)),
        "the sum is normalized as well; pre-norm leaves it as it is": norm(x + sublayer(norm(x))),
        "the sublayer is not applied": x + norm(x),
    }
    require_equal(name, call(name, residual, x, sublayer, norm, identity), connection(x, sublayer), mistakes)
    mistakes = {
        "dropout is applied to the sum; it belongs to the sublayer's output, so that x always passes": torch.zeros(
            2, 5, 8
        ),
        "dropout is not applied": connection(x, sublayer),
        "dropout is applied to the sublayer's input instead of its output": x + sublayer(torch.zeros(2, 5, 8)),
    }
    result = call(name, residual, x, sublayer, norm, drop_all)
    require_equal(name, result, x, mistakes, "with everything dropped the result")
    return "the result equals model.ResidualConnection, and x passes when everything is dropped"


UNUSED = "the sublayer does not use its argument: lambda y: …(x, …) attends to x before the norm; use y"
UNUSED_IN_FEED_FORWARD = "the feed-forward sublayer does not use its argument: lambda y: …(x) takes x before the norm"
KEYS_BEFORE_NORM = "keys and values of self-attention are x before the norm; use the sublayer's argument for all three"
FIRST_SENTENCE = (
    "[0] on the result of {} takes the first sentence of the batch; the blocks return one tensor, (B, T, D)"
)
TWICE = "x is added twice: residual_connections already adds it"


def twice(connection: Callable, x: Tensor, sublayer: Callable) -> Tensor:
    """A residual connection with x added once more."""
    return x + connection(x, sublayer)


def require_stack(
    name: str, result: Tensor, expected: Tensor, run: Callable[[nn.Module, Tensor], Tensor], layers: list, norm, x
) -> None:
    """Compares an encoder's or decoder's output; `run` applies one layer."""
    *_, final = outputs = list(itertools.accumulate(layers, lambda x, layer: run(layer, x), initial=x))
    found = f"the standard deviation of the output is {result.std():.2f}, not {expected.std():.2f}"
    normed = x
    for layer in layers:
        normed = norm(run(layer, normed))
    mistakes = {
        f"the final norm is missing: {found}": final,
        "only the first layer is used": norm(outputs[1]),
        "every layer gets the input of the first: use the output of one as the input of the next": norm(
            run(layers[-1], x)
        ),
        "the norm is applied after every layer instead of once at the end": normed,
        "the layers are applied in reverse order": norm(
            functools.reduce(lambda x, layer: run(layer, x), layers[::-1], x)
        ),
    }
    require_equal(name, result, expected, mistakes)


@step("Encoder")
def check_encoder(encoder_block: Callable, encoder: Callable) -> str:
    name, x = "encoder_block", torch.randn(2, 6, 16)
    layers = [randomized(model.EncoderBlock(16, 4, 32, 0.0, 0.0, 0.0)) for _ in range(3)]
    norm = randomized(nn.LayerNorm(16))
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    mask[1, ..., 4:] = False
    block = layers[0]
    first, second = block.residual_connections
    feed_forward = block.feed_forward_block

    def self_attention(x: Tensor, mask: Tensor | None = mask) -> Tensor:
        return block.self_attention_block(x, x, x, mask)

    def attention_of_first(y: Tensor) -> Tensor:
        return self_attention(y)[0]

    def keys_before_norm(y: Tensor) -> Tensor:
        return block.self_attention_block(y, x, x, mask)

    after_attention = first(x, self_attention)
    plain = x + self_attention(x)
    expected = block(x, mask)
    result = call(name, encoder_block, x, mask, block, sizes="B 2, S 6, D 16")
    require_tensor(name, result, x.shape)
    other = x.clone()
    other[1, 4:] += torch.randn(2, 16)  # a constant would vanish in the norm
    changed = call(name, encoder_block, other, mask, block)
    leak = (changed - result)[1, :4].abs().max()
    mistakes = {
        f"src_mask is not passed to the attention: changing padding changes the words by {leak:.2f}": second(
            first(x, lambda x: self_attention(x, None)), feed_forward
        ),
        "the feed-forward sublayer is missing": after_attention,
        "the self-attention sublayer is missing": second(x, feed_forward),
        "feed-forward comes before self-attention": first(second(x, feed_forward), self_attention),
        "feed-forward comes before self-attention; each uses the other's residual connection": second(
            first(x, feed_forward), self_attention
        ),
        UNUSED: second(plain, feed_forward),
        KEYS_BEFORE_NORM: second(first(x, keys_before_norm), feed_forward),
        UNUSED_IN_FEED_FORWARD: after_attention + feed_forward(after_attention),
        FIRST_SENTENCE.format("self-attention"): second(first(x, attention_of_first), feed_forward),
        f"{TWICE}, in both sublayers": twice(second, twice(first, x, self_attention), feed_forward),
        f"{TWICE}, in self-attention": second(twice(first, x, self_attention), feed_forward),
        f"{TWICE}, in feed-forward": twice(second, after_attention, feed_forward),
        "the second residual connection is used first": first(second(x, self_attention), feed_forward),
        "residual_connections[0] is used twice; feed-forward has its own, [1]": first(after_attention, feed_forward),
        "the residual connections are not used: their norm and the addition of x are missing": feed_forward(
            self_attention(x)
        ),
        "the norms are missing: the residual connections are not used, or no sublayer uses its argument": plain
        + feed_forward(plain),
        "feed-forward gets the block's input instead of the output of self-attention": second(x, feed_forward)
        + after_attention
        - x,
    }
    require_equal(name, result, expected, mistakes)
    if leak > 1e-4:
        fail(name, f"changing padding changes the words by {leak:.2f}")

    name, reference = "encoder", model.Encoder(layers, 16)
    reference.norm = norm
    result = call(name, encoder, x, mask, layers, norm)
    require_tensor(name, result, x.shape)
    require_stack(name, result, reference(x, mask), lambda layer, x: layer(x, mask), layers, norm, x)
    return "block and stack equal model.EncoderBlock and model.Encoder, and padding changes no word"


@step("Decoder")
def check_decoder(decoder_block: Callable, decoder: Callable) -> str:
    name, B, S, T, D = "decoder_block", 2, 6, 5, 16
    x, memory = torch.randn(B, T, D), torch.randn(B, S, D)
    layers = [randomized(model.DecoderBlock(D, 4, 32, 0.0, 0.0, 0.0)) for _ in range(3)]
    norm = randomized(nn.LayerNorm(D))
    src_mask, tgt_mask = torch.ones(B, 1, 1, S, dtype=torch.bool), model.causal_mask(T)
    src_mask[1, ..., 4:] = False
    expected = layers[0](x, memory, src_mask, tgt_mask)
    sizes = f"B {B}, S {S}, T {T}, D {D}"
    result = call(name, decoder_block, x, memory, src_mask, tgt_mask, layers[0], sizes=sizes)
    require_tensor(name, result, x.shape)

    def run(x: Tensor = x, memory: Tensor = memory) -> Tensor:
        return call(name, decoder_block, x, memory, src_mask, tgt_mask, layers[0])

    later, padded = x.clone(), memory.clone()
    later[:, 3:] += torch.randn(B, 2, D)  # a constant would vanish in the norm
    padded[1, 4:] += torch.randn(2, D)
    future = (run(later) - result)[:, :3].abs().amax((0, 2))
    leak = (run(memory=padded) - result).abs().max()
    cross = f"changing a [PAD] of the source changes the output by {leak:.2f}"
    seen = f"position {int(future.argmax())} changes by {future.max():.2f} when position 3 does"
    mistakes = decoder_mistakes(x, memory, src_mask, tgt_mask, layers[0], cross, seen)
    require_equal(name, result, expected, mistakes)
    if future.max() > 1e-4:
        fail(name, f"the decoder sees the future: {seen}")

    name, reference = "decoder", model.Decoder(layers, D)
    reference.norm = norm
    result = call(name, decoder, x, memory, src_mask, tgt_mask, layers, norm)
    expected = reference(x, memory, src_mask, tgt_mask)
    require_tensor(name, result, expected.shape)
    require_stack(name, result, expected, lambda layer, x: layer(x, memory, src_mask, tgt_mask), layers, norm, x)
    caches = [model.LayerCache(model.SelfAttentionCache(T), model.CrossAttentionCache()) for _ in layers]
    one_by_one = [reference(x[:, t : t + 1], memory, src_mask, None, caches) for t in range(T)]
    require_equal(name, result, torch.cat(one_by_one, 1), what="compared with cached decoding, the result")
    return "block and stack equal model.DecoderBlock and model.Decoder, and no position sees the future"


def decoder_mistakes(
    x: Tensor, memory: Tensor, src_mask: Tensor, tgt_mask: Tensor, block: model.DecoderBlock, cross: str, seen: str
) -> dict[str, Tensor]:
    """The results of the usual mistakes in a decoder block. `cross` and `seen` are the evidence for two of them."""
    first, second, third = block.residual_connections
    feed_forward = block.feed_forward_block

    def self_attention(x: Tensor, mask: Tensor | None = tgt_mask) -> Tensor:
        return block.self_attention_block(x, x, x, mask)

    def cross_attention(x: Tensor, mask: Tensor | None = src_mask) -> Tensor:
        return block.cross_attention_block(x, memory, memory, mask)

    after_self = first(x, self_attention)
    after_cross = second(after_self, cross_attention)
    plain = x + self_attention(x)
    plain_cross = plain + cross_attention(plain)
    T = x.size(1)
    return {
        "cross-attention takes keys and values from the decoder; they come from encoder_output": third(
            second(after_self, lambda x: block.cross_attention_block(x, x, x, tgt_mask)), feed_forward
        ),
        "cross-attention takes keys and values from the decoder, without a mask": third(
            second(after_self, lambda x: block.cross_attention_block(x, x, x, None)), feed_forward
        ),
        "cross-attention takes keys from the decoder; they come from encoder_output": third(
            second(after_self, lambda x: block.cross_attention_block(x, x, memory[:, :T], src_mask[..., :T])),
            feed_forward,
        ),
        f"src_mask is not applied in cross-attention: {cross}": third(
            second(after_self, lambda x: cross_attention(x, None)), feed_forward
        ),
        f"tgt_mask is not applied in self-attention: {seen}": third(
            second(first(x, lambda x: self_attention(x, None)), cross_attention), feed_forward
        ),
        f"tgt_mask is inverted in self-attention: {seen}": third(
            second(first(x, lambda x: self_attention(x, ~tgt_mask)), cross_attention), feed_forward
        ),
        f"self-attention has src_mask instead of tgt_mask: {seen}": third(
            second(first(x, lambda x: self_attention(x, src_mask[..., :T])), cross_attention), feed_forward
        ),
        "cross-attention comes before self-attention": third(
            first(second(x, cross_attention), self_attention), feed_forward
        ),
        "cross-attention comes before self-attention; each uses the other's residual connection": third(
            second(first(x, cross_attention), self_attention), feed_forward
        ),
        "feed-forward comes before cross-attention": second(third(after_self, feed_forward), cross_attention),
        "feed-forward comes before cross-attention; each uses the other's residual connection": third(
            second(after_self, feed_forward), cross_attention
        ),
        UNUSED: third(second(x + self_attention(x), cross_attention), feed_forward),
        KEYS_BEFORE_NORM: third(
            second(first(x, lambda y: block.self_attention_block(y, x, x, tgt_mask)), cross_attention), feed_forward
        ),
        UNUSED + ", in cross-attention": third(after_self + cross_attention(after_self), feed_forward),
        UNUSED + ", in both attentions": third(plain_cross, feed_forward),
        UNUSED_IN_FEED_FORWARD: after_cross + feed_forward(after_cross),
        "the norms are missing: the residual connections are not used, or no sublayer uses its argument": plain_cross
        + feed_forward(plain_cross),
        FIRST_SENTENCE.format("self-attention"): third(
            second(first(x, lambda y: self_attention(y)[0]), cross_attention), feed_forward
        ),
        FIRST_SENTENCE.format("cross-attention"): third(
            second(after_self, lambda y: cross_attention(y)[0]), feed_forward
        ),
        FIRST_SENTENCE.format("both attentions"): third(
            second(first(x, lambda y: self_attention(y)[0]), lambda y: cross_attention(y)[0]), feed_forward
        ),
        f"{TWICE}, in all sublayers": twice(
            third, twice(second, twice(first, x, self_attention), cross_attention), feed_forward
        ),
        f"{TWICE}, in self-attention": third(second(twice(first, x, self_attention), cross_attention), feed_forward),
        f"{TWICE}, in cross-attention": third(twice(second, after_self, cross_attention), feed_forward),
        f"{TWICE}, in feed-forward": twice(third, after_cross, feed_forward),
        "the cross-attention sublayer is missing": third(after_self, feed_forward),
        "the cross-attention sublayer is missing, and feed-forward uses residual_connections[1]": second(
            after_self, feed_forward
        ),
        "the self-attention sublayer is missing": third(second(x, cross_attention), feed_forward),
        "the feed-forward sublayer is missing": after_cross,
        "residual_connections[0] is used three times; each sublayer has its own": first(
            first(after_self, cross_attention), feed_forward
        ),
        "feed-forward uses residual_connections[1] again; it has its own, [2]": second(after_cross, feed_forward),
        "the residual connections are not used": feed_forward(cross_attention(self_attention(x))),
    }


# ---------------------------------------------------------------------------- step 11: loss


@step("Projection and loss")
def check_loss(project: Callable, shift_labels: Callable, smoothed_loss: Callable) -> str:
    check_project(project)
    check_shift_labels(shift_labels)
    check_smoothed_loss(smoothed_loss)
    return "labels are shifted by one, and the loss equals compute.ops.plain_loss per target token"


def check_project(project: Callable) -> None:
    name, layer, x = "project", randomized(model.ProjectionLayer(8, 20)), torch.randn(2, 5, 8)
    weight, bias, logits = layer.proj.weight, layer.proj.bias, layer(x)
    mistakes = {
        "a softmax is applied; the loss and the search expect logits": logits.softmax(-1),
        "a log-softmax is applied; the loss and the search expect logits": logits.log_softmax(-1),
        "the bias is not added": logits - bias,
    }
    require_equal(name, call(name, project, x, weight, bias), logits, mistakes)


def check_shift_labels(shift_labels: Callable) -> None:
    name = "shift_labels"
    target = torch.tensor([[SOS, 5, 6, 7, EOS], [SOS, 8, 9, EOS, PAD]])
    decoder_input, label = require_pair(name, call(name, shift_labels, target), "decoder_input, label")
    for tensor, what in ((decoder_input, "decoder_input"), (label, "label")):
        if isinstance(tensor, Tensor) and tensor.equal(target):
            fail(name, f"labels are not shifted: {what} is the whole target, from [SOS] to [EOS]")
    if isinstance(label, Tensor) and isinstance(decoder_input, Tensor) and label.equal(decoder_input):
        fail(name, "labels are not shifted: the label of a position is the token that the decoder reads there")
    if isinstance(label, Tensor) and label.equal(target[:, 2:]):
        fail(name, "labels are shifted by two positions instead of one (off by one): the first word is no label")
    expected = dataset.batch_of(target, target)
    if isinstance(label, Tensor) and label.equal(target[:, :-1]):
        fail(name, "decoder_input and label are swapped: [SOS] is a label, and the decoder reads the word to predict")
    require_equal(name, label, expected["label"], what="label")
    is_token = expected["label"] != PAD  # what the decoder reads elsewhere makes no difference
    require_tensor(name, decoder_input, label.shape, "decoder_input")
    if not decoder_input[is_token].equal(expected["decoder_input"][is_token]):
        fail(name, f"decoder_input is {decoder_input.tolist()}, not {target[:, :-1].tolist()}")


def check_smoothed_loss(smoothed_loss: Callable) -> None:
    name, V, smoothing = "smoothed_loss", 20, 0.1
    label = torch.randint(4, V, (3, 6))
    logits = 2 * torch.randn(3, 6, V) + 5 * F.one_hot(label, V)  # as of a trained model
    label[1, 4:] = label[2, 2:] = PAD
    is_token = label != PAD
    count = is_token.sum()

    def losses(smoothing: float = smoothing, logits: Tensor = logits) -> Tensor:
        """(B, T), also at padding."""
        return F.cross_entropy(logits.transpose(1, 2), label, label_smoothing=smoothing, reduction="none")

    per_token = losses()
    kept = per_token * is_token
    expected = plain_loss(logits[is_token], nn.Identity(), label[is_token], smoothing) / count
    log_p = logits.log_softmax(-1)
    of_label = -log_p.gather(-1, label.unsqueeze(-1)).squeeze(-1)
    others = (-log_p.sum(-1) - of_label) / (V - 1)
    to_others = (((1 - smoothing) * of_label + smoothing * others) * is_token).sum() / count
    excess = (((1 - smoothing) * of_label + smoothing * -log_p.sum(-1)) * is_token).sum() / count
    only_label = ((1 - smoothing) * of_label * is_token).sum() / count
    kept_mass = ((of_label + smoothing * -log_p.mean(-1)) * is_token).sum() / count
    masses = "the target distribution has {} on the label and {} on each other token, not 0.905 and 0.005"
    mistakes = {
        "padding is counted in the loss: the mean is over 18 positions, of which 6 are [PAD]": per_token.mean(),
        "padding is counted in the number of tokens: the sum is divided by 18 positions instead of 12 tokens": (
            kept.sum() / label.numel()
        ),
        "the loss is a sum over the tokens instead of their mean": kept.sum(),
        "the loss is divided by the number of sentences instead of target tokens": kept.sum() / len(label),
        "the loss is the mean of the sentences' means; a word of a short sentence then counts more": (
            kept.sum(1) / is_token.sum(1)
        ).mean(),
        "label smoothing is missing: this is the loss for smoothing = 0": (losses(0.0) * is_token).sum() / count,
        "the smoothing mass is wrong: " + masses.format("0.9", "0.1 / (V - 1) = 0.00526"): to_others,
        "the smoothing mass is wrong: " + masses.format("1.0", "0.1, V times too much"): excess,
        "the smoothing mass is wrong: " + masses.format("0.9", "0"): only_label,
        "the smoothing mass is wrong: " + masses.format("1.005", "0.005"): kept_mass,
        "the smoothing mass is wrong: the shares of label and other tokens are swapped": (
            losses(1 - smoothing) * is_token
        ).sum()
        / count,
        "the softmax is applied twice: give logits to the log-softmax": (
            losses(logits=logits.softmax(-1)) * is_token
        ).sum()
        / count,
        "the sign is wrong: log-probabilities are negative, the loss is positive": -expected,
    }
    require_equal(name, call(name, smoothed_loss, logits, label, smoothing), expected, mistakes, "the loss")
    result, closed = call(name, smoothed_loss, logits, label, 0.0), (of_label * is_token).sum() / count
    require_equal(name, result, closed, what="without smoothing the loss")
    uniform = call(name, smoothed_loss, torch.zeros(3, 6, V), label, smoothing)
    require_equal(name, uniform, torch.tensor(math.log(V)), what="for equal logits, where it is ln V, the loss")


# ---------------------------------------------------------------------------- step 12: search

WORDS = (4, 5, 6)
VOCABULARY = 7
MAX_LENGTH = 4
LENGTH_PENALTY = 1.5
EVERYTHING = 400  # a beam size that holds all sentences
SEEDS = (3, 5, 6, 7, 11, 12, 14, 33, 40)  # of random models that tell the usual mistakes apart
SMALL_SEEDS = (2, 8, 11, 33, 94, 138)


class RandomModel:
    """Logits that depend on the whole prefix. Their mean varies, which changes logits but no probability."""

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, ids: list[int]) -> Tensor:
        return random_logits(self.seed, tuple(ids)).clone()


@functools.cache
def random_logits(seed: int, ids: tuple) -> Tensor:
    rng = random.Random(f"{seed} {list(ids)}")
    logits = torch.full((VOCABULARY,), -20.0)
    for token in (EOS, *WORDS):
        logits[token] = rng.gauss(0, 1.5)
    return logits + rng.gauss(0, 3)


def garden_path(ids: list[int]) -> Tensor:
    """The most probable first word, 4, leads to three improbable ends; the second, 5, to a probable one."""
    p = {(SOS,): {4: 0.55, 5: 0.45}, (SOS, 5): {EOS: 1.0}}.get(tuple(ids), {4: 0.34, 5: 0.33, EOS: 0.33})
    return torch.tensor([p.get(token, 1e-9) for token in range(VOCABULARY)]).log()


class TableDecoder:
    """A function of the ids as the StepDecoder of search.py, for one sentence."""

    def __init__(self, next_logits: Callable[[list[int]], Tensor]):
        self.next_logits, self.prefixes = next_logits, None

    def step(self, ids: Tensor) -> Tensor:
        self.prefixes = [[*p, i] for p, i in zip(self.prefixes or [[]] * len(ids), ids.tolist(), strict=True)]
        return torch.stack([self.next_logits(prefix) for prefix in self.prefixes])

    def select(self, rows: Tensor, sentences: Tensor | None = None) -> None:
        self.prefixes = [self.prefixes[row] for row in rows.tolist()]


def watched(
    name: str, next_logits: Callable, max_length: int, beam_size: int | None = None
) -> Callable[[list[int]], Tensor]:
    """The function, which fails with the name of the mistake if it gets ids that it should not get."""
    extended: dict[int, set] = {}  # length -> the hypotheses of that length

    def checked(ids) -> Tensor:
        ids = [int(i) for i in (ids.flatten().tolist() if isinstance(ids, Tensor) else ids)]
        if ids[:1] != [SOS]:
            fail(name, f"[SOS] is missing: next_logits got {ids}; the ids start with SOS, which is {SOS}")
        if ids[1:2] == [SOS] and name == "greedy_decode":
            fail(name, f"[SOS] is given twice: next_logits got {ids}")
        if EOS in ids:
            fail(name, f"[EOS] is ignored: next_logits got {ids}, in which {EOS} is [EOS], the end")
        if len(ids) > max_length:
            asked, limit = f"token {len(ids)} is asked for", f"max_length is {max_length}"
            fail(name, f"the length limit is ignored: {asked}, and {limit}")
        hypotheses = extended.setdefault(len(ids), set())
        hypotheses.add(tuple(ids))
        if beam_size is not None and len(hypotheses) > beam_size:
            kept = f"keep beam_size = {beam_size} of the extensions of all hypotheses together"
            fail(name, f"at length {len(ids)} the search extends {len(hypotheses)} hypotheses or more; {kept}")
        return next_logits(ids)

    return checked


def require_ids(name: str, result, what: str = "the result") -> list[int]:
    if isinstance(result, Tensor):
        result = result.flatten().tolist()
    if not isinstance(result, list):
        fail(name, f"{what} is of type {type(result).__name__}; return a list of ids")
    ids = [int(i) for i in result]
    for token, text in ((SOS, "[SOS]"), (EOS, "[EOS]")):
        if token in ids:
            fail(name, f"{what} is {ids}, which contains {text} ({token}); return the ids without it")
    return ids


class Sentence(NamedTuple):
    """A finished sentence of a RandomModel."""

    ids: list[int]  # without SOS and EOS
    length: int  # EOS counted
    log_p: float
    logits: float  # their sum

    @property
    def ends(self) -> bool:
        """Whether it ends with EOS, not at the limit."""
        return len(self.ids) < self.length


def sentences(next_logits: Callable, prefix: tuple = (SOS,), sums: tuple = (0, 0)) -> Iterator[Sentence]:
    """All sentences of up to MAX_LENGTH tokens. `sums`: log-probabilities and logits of the prefix."""
    logits = next_logits(list(prefix))
    log_ps = logits.log_softmax(-1)
    for token in (EOS, *WORDS):
        new = sums[0] + log_ps[token].item(), sums[1] + logits[token].item()
        if token == EOS or len(prefix) == MAX_LENGTH:
            words = [*prefix[1:], *([] if token == EOS else [token])]
            yield Sentence(words, len(prefix), *new)
        else:
            yield from sentences(next_logits, (*prefix, token), new)


def beam_mistakes(found: list[Sentence]) -> dict[str, list[int]]:
    """What the usual mistakes return if the beam holds all sentences."""

    def best(score: Callable[[Sentence], float], among: Callable[[Sentence], bool] = lambda s: True) -> list[int]:
        return max(filter(among, found), key=score).ids

    def normalizer(s: Sentence, more: int = 0) -> float:
        return search.length_normalizer(s.length + more, LENGTH_PENALTY)

    dropped = "finished hypotheses are dropped: only those that reach max_length are compared"
    return {
        "logits are summed instead of log-probabilities": best(lambda s: s.logits / normalizer(s)),
        "logits are summed instead of log-probabilities, without length normalization": best(lambda s: s.logits),
        "there is no length normalization: the highest log-probability wins, which favors short sentences": best(
            lambda s: s.log_p
        ),
        "the score is multiplied by the length normalizer instead of divided": best(lambda s: s.log_p * normalizer(s)),
        "the score is divided by the length instead of ((5 + length) / 6)^length_penalty": best(
            lambda s: s.log_p / s.length
        ),
        "the score is divided by length^length_penalty instead of ((5 + length) / 6)^length_penalty": best(
            lambda s: s.log_p / s.length**LENGTH_PENALTY
        ),
        dropped: best(lambda s: s.log_p / normalizer(s), lambda s: s.length == MAX_LENGTH),
        f"{dropped}, as they are without [EOS]": best(
            lambda s: s.log_p / normalizer(s), lambda s: len(s.ids) == MAX_LENGTH
        ),
        "hypotheses that reach max_length are dropped; hypotheses with max_length tokens are finished too": best(
            lambda s: s.log_p / normalizer(s), lambda s: s.ends
        ),
        "the length is counted without [EOS]; it is the number of tokens after SOS, EOS included": best(
            lambda s: s.log_p / normalizer(s, -s.ends)
        ),
        "SOS is counted in the length; it is the number of tokens after SOS, EOS included": best(
            lambda s: s.log_p / normalizer(s, 1)
        ),
        "SOS is counted in the length instead of EOS; it is the number of tokens after SOS, EOS included": best(
            lambda s: s.log_p / normalizer(s, 1 - s.ends)
        ),
        "the score is made from the probability of the sentence instead of its log-probability": best(
            lambda s: math.exp(s.log_p) / normalizer(s)
        ),
        "the search stops at the first [EOS], although longer hypotheses may have a better score": [],
        "the score is the worst one instead of the best": min(found, key=lambda s: s.log_p / normalizer(s)).ids,
    }


@step("Greedy decoding and beam search")
def check_decoding(greedy_decode: Callable, beam_search: Callable) -> str:
    check_greedy_decode(greedy_decode)
    check_beam_search(beam_search)
    return "both searches find what search.py finds, and a beam of 1 is greedy decoding"


def check_greedy_decode(greedy_decode: Callable) -> None:
    name = "greedy_decode"
    for seed in range(20):
        next_logits, max_length = RandomModel(seed), 2 + seed % 5
        result = call(name, greedy_decode, watched(name, next_logits, max_length), max_length)
        (expected,) = search.greedy_decode(TableDecoder(next_logits), torch.tensor([max_length]))
        ids = require_ids(name, result)
        if expected and ids == expected[:-1]:
            short = "; max_length does not count SOS" if len(ids) == max_length - 1 else ""
            fail(name, f"the last token is missing: the result is {ids}, not {expected}{short}")
        if ids != expected:
            fail(name, f"the result is {ids}, not {expected}: take the token with the highest logit at each step")


def check_beam_search(beam_search: Callable) -> None:
    name, results = "beam_search", []
    for seed in SEEDS:
        checked = watched(name, RandomModel(seed), MAX_LENGTH)
        results.append(require_ids(name, call(name, beam_search, checked, MAX_LENGTH, EVERYTHING, LENGTH_PENALTY)))
    expected = [best_of_all(seed) for seed in SEEDS]
    if results != expected:
        seed, result, best = next(x for x in zip(SEEDS, results, expected, strict=True) if x[1] != x[2])
        found = {tuple(s.ids): s for s in sentences(RandomModel(seed))}
        mistakes = [mistakes_of_all(seed) for seed in SEEDS]
        for sentence in mistakes[0]:
            if results == [mistake[sentence] for mistake in mistakes]:
                fail(name, f"{sentence}: it returns {described(result, found)}, not {described(best, found)}")
        check_small_beams(beam_search)
        fail(name, f"a beam that holds all sentences returns {result}, not the best one, {best}")
    check_small_beams(beam_search)
    for seed in SEEDS:
        next_logits = RandomModel(seed)
        checked = watched(name, next_logits, MAX_LENGTH, 1)
        single = require_ids(name, call(name, beam_search, checked, MAX_LENGTH, 1))
        (greedy,) = search.greedy_decode(TableDecoder(next_logits), torch.tensor([MAX_LENGTH]))
        if single != greedy:
            fail(name, f"a beam of 1 returns {single}, greedy decoding {greedy}; they have to be the same")
    checked = watched(name, garden_path, MAX_LENGTH, 2)
    two = require_ids(name, call(name, beam_search, checked, MAX_LENGTH, 2, 0.0))
    if two != (right := best_of_project(garden_path, MAX_LENGTH, 2, 0.0)):
        fail(name, f"a beam of 2 returns {two} (greedy: [4, 4, 4, 4]) instead of {right}, with probability 0.45")


@functools.cache
def best_of_all(seed: int) -> list[int]:
    return best_of_project(RandomModel(seed), MAX_LENGTH, EVERYTHING)


@functools.cache
def mistakes_of_all(seed: int) -> dict[str, list[int]]:
    return beam_mistakes(list(sentences(RandomModel(seed))))


def check_small_beams(beam_search: Callable) -> None:
    """Compares beams of 1 to 3 with those of the usual mistakes in what a beam keeps."""
    name, cases = "beam_search", [(seed, W) for seed in SMALL_SEEDS for W in (1, 2, 3)]
    results = []
    for seed, W in cases:
        checked = watched(name, RandomModel(seed), MAX_LENGTH, W)
        results.append(require_ids(name, call(name, beam_search, checked, MAX_LENGTH, W, LENGTH_PENALTY)))
    if results == [small_beam(seed, W) for seed, W in cases]:
        return
    mistakes = {
        "extensions are sorted in ascending order: the beam keeps those with the lowest log-probabilities": {
            "keeps_best": False
        },
        "finished hypotheses stay in the beam, where they take the place of others; set them aside": {
            "sets_aside": False
        },
        "finished hypotheses are not cut to beam_size: only those among the beam_size best extensions are finished": {
            "cuts_finished": False
        },
        "log-probabilities are not summed: the score is that of the last token alone": {"sums": False},
        "probabilities are summed instead of log-probabilities": {"value": Tensor.softmax},
        "probabilities are summed instead of log-probabilities, without length normalization": {
            "value": Tensor.softmax,
            "penalty": 0.0,
        },
    }
    for sentence, options in mistakes.items():
        if results == [small_beam(seed, W, **options) for seed, W in cases]:
            fail(name, sentence)


@functools.cache
def small_beam(
    seed: int,
    W: int,
    keeps_best: bool = True,
    sets_aside: bool = True,
    cuts_finished: bool = True,
    sums: bool = True,
    value: Callable = Tensor.log_softmax,
    penalty: float = LENGTH_PENALTY,
) -> list[int]:
    """The beam search of the exercise for a RandomModel. Options other than the defaults are mistakes."""
    beam, finished = [(0.0, [SOS])], []
    for length in range(1, MAX_LENGTH + 1):
        kept = [] if sets_aside else [h for h in beam if h[1][-1] == EOS]
        extensions = [
            (log_p * sums + more, [*ids, token])
            for log_p, ids in beam
            if ids[-1] != EOS
            for token, more in enumerate(value(random_logits(seed, tuple(ids)), -1).tolist())
        ]
        ends = [h for h in extensions if h[1][-1] == EOS]
        if not cuts_finished:
            finished += ends
            extensions = [h for h in extensions if h[1][-1] != EOS]
        beam = sorted(kept + extensions, reverse=keeps_best)[:W]
        if sets_aside:
            finished += [h for h in beam if h[1][-1] == EOS or length == MAX_LENGTH]
            beam = [h for h in beam if h[1][-1] != EOS]
    if not sets_aside:
        finished = beam
    _, best = max((log_p / search.length_normalizer(len(ids) - 1, penalty), ids) for log_p, ids in finished)
    return [token for token in best if token not in (SOS, EOS)]


def best_of_project(
    next_logits: Callable, max_length: int, beam_size: int, penalty: float = LENGTH_PENALTY
) -> list[int]:
    ((best,),) = search.beam_search(TableDecoder(next_logits), torch.tensor([max_length]), beam_size, penalty)
    return best.ids


def described(ids: list[int], found: dict[tuple, Sentence]) -> str:
    """The ids with their score."""
    sentence = found.get(tuple(ids))
    if sentence is None:
        return str(ids)
    return f"{ids} (score {sentence.log_p / search.length_normalizer(sentence.length, LENGTH_PENALTY):.2f})"
