"""The architecture of a run or preset as one picture, with the shapes and parameters of its own modules.

    B  batch (sentences)          D    d_model
    S  source length in tokens    H    attention heads
    T  target length in tokens    V    vocabulary size

The model is built and called on PyTorch's meta device, which computes shapes but no values, so a picture of a large
model takes no memory and needs no weights.
"""

from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path

import altair as alt
import pandas as pd
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from config import Config, InputError, get_config
from corpora.sources import load_split
from dataset import BilingualDataset, batch_of, load_tokenizer
from model import Transformer, get_model
from runs.folder import RunFolder

BATCH_PAIRS = 32  # validation pairs whose shapes are shown
NOMINAL_BATCH = (32, 24, 22)  # B, S, T of a picture without a corpus

TEXT, GRAY, LINE = "#1f2328", "#656d76", "#8c959f"
RED = "#d1495b"
SANS, MONO = "Liberation Sans, Arial, sans-serif", "Liberation Mono, DejaVu Sans Mono, monospace"

# ---------------------------------------------------------------------------- drawing in pixels


@dataclass
class Canvas:
    """Rectangles, lines, arrowheads and text at pixel positions, y downward, drawn by Vega-Lite."""

    width: int
    height: int
    rects: list[dict] = field(default_factory=list)
    lines: list[dict] = field(default_factory=list)
    heads: list[dict] = field(default_factory=list)
    texts: list[dict] = field(default_factory=list)
    cells: list[dict] = field(default_factory=list)

    def rect(self, x: float, y: float, x2: float, y2: float, fill: str, stroke: str = LINE) -> None:
        self.rects.append({"x": x, "y": y, "x2": x2, "y2": y2, "fill": fill, "stroke": stroke})

    def text(self, x: float, y: float, text: str, size: int = 13, color: str = TEXT, **style) -> None:
        """`style` may hold align ("center"), weight ("normal"), font (SANS) and angle (0, in degrees)."""
        style = {"align": "center", "weight": "normal", "font": SANS, "angle": 0, **style}
        self.texts.append({"x": x, "y": y, "text": text, "size": size, "color": color, **style})

    def line(self, *points: tuple[float, float], dashed: bool = False, color: str = TEXT) -> None:
        """A polyline through the points."""
        for (x, y), (x2, y2) in pairwise(points):
            self.lines.append({"x": x, "y": y, "x2": x2, "y2": y2, "dashed": dashed, "stroke": color})

    def arrow(self, *points: tuple[float, float], dashed: bool = False, color: str = TEXT) -> None:
        """A polyline through the points with a head that ends at the last."""
        (x, y), (x2, y2) = points[-2:]
        dx, dy = sign(x2 - x), sign(y2 - y)
        x2, y2 = x2 - 4 * dx, y2 - 4 * dy  # center of the head
        self.line(*points[:-1], (x2, y2), dashed=dashed, color=color)
        angle = {(0, -1): 0, (1, 0): 90, (0, 1): 180, (-1, 0): 270}[dx, dy]
        self.heads.append({"x": x2, "y": y2, "angle": angle, "fill": color})

    def chart(self) -> alt.LayerChart:
        def layer(rows: list[dict]) -> alt.Chart:
            x = alt.X("x:Q", scale=alt.Scale(domain=[0, self.width], nice=False), axis=None)
            y = alt.Y("y:Q", scale=alt.Scale(domain=[self.height, 0], nice=False), axis=None)
            return alt.Chart(pd.DataFrame(rows)).encode(x=x, y=y)

        def literal(name: str) -> dict:
            return {"field": name, "type": "nominal", "scale": None}

        layers = []
        if self.rects:
            boxes = layer(self.rects).mark_rect(cornerRadius=5, strokeWidth=1.2)
            layers.append(boxes.encode(x2="x2", y2="y2", fill=literal("fill"), stroke=literal("stroke")))
        if self.cells:
            viridis = alt.Color("weight:Q", scale=alt.Scale(domain=[0, 1], clamp=True, scheme="viridis"), legend=None)
            layers.append(layer(self.cells).mark_rect().encode(x2="x2", y2="y2", color=viridis))
        for dashed in (False, True):
            if lines := [line for line in self.lines if line["dashed"] == dashed]:
                rules = layer(lines).mark_rule(strokeWidth=1.6, strokeDash=[5, 4] if dashed else [], strokeCap="square")
                layers.append(rules.encode(x2="x2", y2="y2", stroke=literal("stroke")))
        if self.heads:
            heads = layer(self.heads).mark_point(shape="triangle-up", size=70, filled=True, opacity=1)
            layers.append(heads.encode(angle=literal("angle"), fill=literal("fill")))
        # Font and alignment are properties of a mark, so texts that differ in them are layers of their own.
        for (align, weight, font, angle, size), texts in groupby(sorted(self.texts, key=style_of), style_of):
            style = {"align": align, "fontWeight": weight, "font": font, "angle": angle, "fontSize": size}
            words = layer(list(texts)).mark_text(baseline="middle", **style)
            layers.append(words.encode(text="text:N", color=literal("color")))
        chart = alt.layer(*layers).properties(width=self.width, height=self.height)
        return chart.configure(background="white", padding=8).configure_view(stroke="transparent")


def style_of(text: dict) -> tuple:
    return tuple(text[name] for name in ("align", "weight", "font", "angle", "size"))


def sign(number: float) -> int:
    return (number > 0) - (number < 0)


# ---------------------------------------------------------------------------- shapes and parameters

Shape = tuple[int, ...]
Sizes = tuple[int, int, int]  # B, S, T of a batch

INPUTS = ("encoder_input", "decoder_input", "encoder_mask", "decoder_mask")
ENCODER_SUBLAYERS = ("self_attention_block", "feed_forward_block")
DECODER_SUBLAYERS = ("self_attention_block", "cross_attention_block", "feed_forward_block")


@dataclass(frozen=True)
class Part:
    """A module of the model that is drawn as a box."""

    class_name: str
    file: str
    shape: Shape  # of its output
    scores: Shape  # of its attention scores, (B, H, Q, K); empty if it has none
    parameters: int  # without a matrix that belongs to another part
    tied_with: str  # the part that such a matrix belongs to, or empty
    copies: int  # how many the model has: one in each block


def part_paths(config: Config) -> dict[str, int]:
    """The paths of the parts in the model, of each stack the first block only, and how many copies there are.

    The target embedding is first, so that tied matrices belong to it.
    """
    paths = dict.fromkeys(("tgt_embed", "src_embed", "src_pos", "tgt_pos"), 1)
    stacks = (
        ("encoder", ENCODER_SUBLAYERS, config.encoder_layers),
        ("decoder", DECODER_SUBLAYERS, config.decoder_layers),
    )
    for stack, sublayers, layers in stacks:
        for i, name in enumerate(sublayers):
            paths[f"{stack}.layers.0.{name}"] = layers
            paths[f"{stack}.layers.0.residual_connections.{i}.norm"] = layers
        if config.norm == "pre":
            paths[f"{stack}.norm"] = 1
    return paths | {"projection_layer": 1}


def describe_parts(config: Config, src_vocab_size: int, tgt_vocab_size: int, batch: Sizes) -> dict[str, Part]:
    """The parts of a config's model by path, with the shapes of a forward pass of a batch of these sizes."""
    B, S, T = batch
    with torch.device("meta"):
        model = get_model(config, src_vocab_size, tgt_vocab_size).eval()
        inputs = batch_of(torch.zeros(B, S, dtype=torch.long), torch.zeros(B, T + 1, dtype=torch.long))
    shapes, scores = recorded_shapes(model, [inputs[name] for name in INPUTS])
    parts: dict[str, Part] = {}
    owner: dict[nn.Parameter, str] = {}
    for path, copies in part_paths(config).items():
        module = model.get_submodule(path)
        tied_with = next((owner[p] for p in module.parameters() if p in owner), "")
        count = sum(p.numel() for p in module.parameters() if p not in owner)
        for parameter in module.parameters():
            owner.setdefault(parameter, path)
        kind = type(module)
        file = "model.py" if kind.__module__ == "model" else "torch.nn"
        parts[path] = Part(kind.__name__, file, shapes[path], scores.get(path, ()), count, tied_with, copies)
    return parts


@torch.no_grad()
def recorded_shapes(model: Transformer, inputs: list[Tensor]) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Shapes of the outputs of all modules in a forward pass, and of the attention scores, by path."""
    paths = {module: path for path, module in model.named_modules()}
    shapes: dict[str, Shape] = {}

    def record(module: nn.Module, _, output: Tensor) -> None:
        shapes[paths[module]] = tuple(output.shape)

    hooks = [module.register_forward_hook(record) for module in paths]
    with model.recording():
        model(*inputs)
        blocks = [block for kind in model.attention_blocks().values() for block in kind]
        scores = {paths[block]: tuple(block.attention_scores.shape) for block in blocks}
    for hook in hooks:
        hook.remove()
    return shapes, scores


# ---------------------------------------------------------------------------- the picture

ATTENTION, FEED_FORWARD, NORM, EMBEDDING, OUTPUT, GROUP, MASK, DATA = (
    "#fde3c3", "#cfe6f5", "#f5f1c4", "#f9d9dc", "#ddd9f0", "#f6f8fa", "#ffffff", "#e2f0e0"
)  # fmt: skip
ENCODER_X, DECODER_X = 190, 810  # centers of the two columns
ENCODER_TOP, DECODER_TOP = 414, 264  # of the blocks
HALF = 135  # half the width of a box
SKIP = 150  # distance of the residual path from the center of a column


def architecture(
    config: Config,
    src_vocab_size: int,
    tgt_vocab_size: int,
    batch: Sizes = NOMINAL_BATCH,
    title: str = "",
    note: str = "",
) -> alt.LayerChart:
    """The model of a config as boxes, each with class, file, output shape for a batch (B, S, T) and parameters.

    Dashed lines show where the masks are built and used. The parameters of the boxes, those in a block times its
    copies, sum to the total. `note` says where the batch is from.
    """
    parts = describe_parts(config, src_vocab_size, tgt_vocab_size, batch)
    c = Canvas(1000, 1020)
    draw_legend(c, config, parts, (src_vocab_size, tgt_vocab_size), batch, title, note)
    draw_outputs(c, parts)
    draw_stack(c, parts, "encoder", ENCODER_X, -1, ENCODER_TOP)
    draw_stack(c, parts, "decoder", DECODER_X, 1, DECODER_TOP)
    draw_inputs(c, parts, batch)
    draw_connections(c, batch, config)
    return c.chart()


def draw_legend(
    c: Canvas,
    config: Config,
    parts: dict[str, Part],
    vocab_sizes: tuple[int, int],
    batch: Sizes,
    title: str,
    note: str,
) -> None:
    B, S, T = batch
    total = sum(part.parameters * part.copies for part in parts.values())
    c.text(30, 24, title if len(title) <= 46 else f"{title[:45]}…", 17, align="left", weight="bold")
    c.text(30, 48, f"{total:,} parameters", 15, align="left")
    vocabulary = "vocabularies of {:,} source and {:,} target tokens".format(*vocab_sizes)
    if config.shared_vocab:
        vocabulary = f"one vocabulary of {vocab_sizes[0]:,} tokens"
    lines = (
        f"d_model {config.d_model:,}, d_ff {config.d_ff:,}, {config.num_heads} heads per attention block",
        vocabulary,
        f"batch: {B} {'sentence' if B == 1 else 'sentences'}, {S} source and {T} target tokens{note and f' ({note})'}",
        "each box: class, name in the model · file, output shape · parameters",
    )
    for i, line in enumerate(lines):
        c.text(30, 78 + 19 * i, line, 12.5, GRAY, align="left")
    c.text(30, 180, "Each sublayer f of a block is in a ResidualConnection:", 13, align="left")
    formula = "x + dropout(f(LayerNorm(x)))" if config.norm == "pre" else "LayerNorm(x + dropout(f(x)))"
    c.text(30, 202, formula, 13, align="left", font=MONO)


def draw_outputs(c: Canvas, parts: dict[str, Part]) -> None:
    draw_box(c, 640, 8, "cross_entropy", ["training · training/losses.py"], OUTPUT, width=210)
    draw_box(c, 872, 8, "greedy_decode, beam_search", ["translation · search.py"], OUTPUT, width=240)
    draw_part(c, DECODER_X, 80, parts, "projection_layer", OUTPUT, height=80)
    c.arrow((710, 80), (710, 54))
    c.arrow((872, 80), (872, 54))
    c.arrow((DECODER_X, 178), (DECODER_X, 160))


def draw_stack(c: Canvas, parts: dict[str, Part], stack: str, x: float, side: int, top: float) -> None:
    """The blocks of the encoder or decoder as one block from `top` down, with pre-norm a final LayerNorm above it.

    The residual path is to the left (`side` -1) or to the right (1) of the sublayers.
    """
    block = {path: part for path, part in parts.items() if path.startswith(f"{stack}.layers.0.")}
    sublayers = [path for path in block if not path.endswith(".norm")]
    norms = [path for path in block if path.endswith(".norm")]
    is_pre_norm = f"{stack}.norm" in parts
    if is_pre_norm:
        draw_part(c, x, top - 86, parts, f"{stack}.norm", NORM, name=f"end of {stack.capitalize()}")
    else:
        c.line((x, top - 24), (x, top - 86))
    c.rect(x - 165, top, x + 165, 748, GROUP)
    end = top - 24  # of the arrow out of a sublayer
    y = top + 10  # where the residual connection of a sublayer begins
    for sublayer, norm in zip(reversed(sublayers), reversed(norms), strict=True):
        is_attention = bool(parts[sublayer].scores)
        height, fill = (80, ATTENTION) if is_attention else (62, FEED_FORWARD)
        # From y down: sum, sublayer, LayerNorm for pre-norm; LayerNorm, sum, sublayer for post-norm
        plus, box, norm_y = (y + 8, y + 24, y + 24 + height) if is_pre_norm else (y + 33, y + 48, y)
        draw_part(c, x, box, parts, sublayer, fill, height)
        c.rect(x - HALF, norm_y, x + HALF, norm_y + 24, NORM)
        text = f"{parts[norm].class_name} · {parts[norm].file} · {count_text(parts[norm])}"
        c.text(x, norm_y + 12, text, 12)
        bottom = y + height + 48
        c.line((x, box), (x, plus + 9))
        c.line((x, bottom + 14), (x + side * SKIP, bottom + 14), (x + side * SKIP, plus), (x + side * 9, plus))
        c.arrow((x, min(plus - 9, norm_y)), (x, end))
        c.rect(x - 9, plus - 9, x + 9, plus + 9, MASK, TEXT)
        c.text(x, plus, "+", 15)
        y, end = bottom + 22, bottom
    c.arrow((x, 766), (x, end))
    layers = next(iter(block.values())).copies
    each = sum(part.parameters for part in block.values())
    c.text(x - 153, 726, f"{stack.capitalize()}Block × {layers}", 14, weight="bold", font=MONO, align="left")
    c.text(x + 14, 717, f"{each:,} parameters", 12, align="left")
    c.text(x + 14, 734, f"× {layers} = {layers * each:,}", 12, align="left")


def draw_inputs(c: Canvas, parts: dict[str, Part], batch: Sizes) -> None:
    B, S, T = batch
    for x, side, ids in (
        (ENCODER_X, "src", f"encoder_input ({B}, {S})"),
        (DECODER_X, "tgt", f"decoder_input ({B}, {T})"),
    ):
        draw_part(c, x, 766, parts, f"{side}_pos", EMBEDDING)
        draw_part(c, x, 848, parts, f"{side}_embed", EMBEDDING)
        c.arrow((x, 848), (x, 828))
        c.arrow((x, 960), (x, 910))
        c.text(x + 12, 938, ids, 12, GRAY, align="left", font=MONO)
    c.rect(ENCODER_X - 165, 960, DECODER_X + 165, 1012, DATA)
    c.text(500, 977, "BilingualDataset, Batches", 14, weight="bold", font=MONO)
    c.text(500, 997, "sentence pairs to padded batches with masks and labels · dataset.py", 12, GRAY)


def draw_connections(c: Canvas, batch: Sizes, config: Config) -> None:
    """The encoder output, and the masks."""
    B, S, T = batch
    c.arrow((ENCODER_X, 328), (ENCODER_X, 292), (622, 292), (622, 464), (DECODER_X - HALF, 464))
    c.text(406, 278, f"encoder output {(B, S, config.d_model)}: keys and values", 12, GRAY)
    c.rect(404, 484, 596, 672, MASK, RED)
    c.text(500, 500, "masks: True = may attend", 12, RED)
    for y, name, shape, built, file in (
        (524, "encoder_mask", (B, 1, 1, S), "padding_mask", "dataset.py"),
        (602, "decoder_mask", (B, 1, T, T), "padding_mask & causal_mask", "dataset.py, model.py"),
    ):
        c.text(500, y, name, 14, weight="bold", font=MONO)
        c.text(500, y + 18, str(shape), 12)
        c.text(500, y + 35, built, 11, GRAY, font=MONO)
        c.text(500, y + 51, file, 12, GRAY)
    c.arrow((404, 542), (378, 542), (378, 620), (ENCODER_X + HALF, 620), dashed=True, color=RED)
    c.arrow((596, 542), (622, 542), (622, 490), (DECODER_X - HALF, 490), dashed=True, color=RED)
    c.arrow((596, 620), (DECODER_X - HALF, 620), dashed=True, color=RED)
    c.arrow((500, 960), (500, 674), dashed=True, color=RED)


def draw_part(
    c: Canvas, x: float, y: float, parts: dict[str, Part], path: str, fill: str, height: float = 62, name: str = ""
) -> None:
    """A part as a box with its top at y: class, name and file, shape and parameters, scores or tied matrix."""
    part = parts[path]
    lines = [f"{name or path.rpartition('.')[2]} · {part.file}", f"{part.shape} · {count_text(part)}"]
    if part.scores:
        lines.append(f"scores {part.scores}")
    if part.parameters and part.tied_with:
        lines.append(f"matrix tied with {part.tied_with}")
    draw_box(c, x, y, part.class_name, lines, fill, 2 * HALF, height)


def count_text(part: Part) -> str:
    if part.parameters:
        return f"{part.parameters:,} parameters"
    return f"tied with {part.tied_with}" if part.tied_with else "no parameters"


def draw_box(
    c: Canvas, x: float, y: float, name: str, lines: list[str], fill: str, width: float, height: float = 46
) -> None:
    """A box with its top at y: a name, and lines of which the first is gray."""
    c.rect(x - width / 2, y, x + width / 2, y + height, fill)
    first = y + height / 2 - 9 * len(lines)
    c.text(x, first, name, 14, weight="bold", font=MONO)
    for i, line in enumerate(lines):
        c.text(x, first + 19 + 18 * i, line, 12, TEXT if i else GRAY)


# ---------------------------------------------------------------------------- of a run or a preset


def run_architecture(run_dir: str | Path = "", lengths: tuple[int, int] | None = None) -> alt.LayerChart:
    """The picture of a run, by default the latest one trained; its checkpoints are not read.

    Shapes are those of one sentence pair of these lengths (S, T); without lengths those of 32 validation pairs, or of a
    nominal batch if the corpus is not available. Raises InputError for a missing run.
    """
    folder = RunFolder.find(run_dir)
    config = folder.load_config()
    tokenizers = [load_tokenizer(folder.tokenizer_file(lang)) for lang in (config.lang_src, config.lang_tgt)]
    batch, note = ((1, *lengths), "") if lengths else validation_batch(config, *tokenizers)
    sizes = (tokenizer.get_vocab_size() for tokenizer in tokenizers)
    name = Path(run_dir).name or folder.path.resolve().name
    return architecture(config, *sizes, batch, name, note)


def validation_batch(config: Config, tokenizer_src: Tokenizer, tokenizer_tgt: Tokenizer) -> tuple[Sizes, str]:
    """Sizes (B, S, T) of a batch of the first validation pairs, or of the nominal batch, and which of them it is."""
    try:
        pairs = load_split(config, "validation")
        data = BilingualDataset(
            pairs.select(range(min(BATCH_PAIRS, len(pairs)))), tokenizer_src, tokenizer_tgt, config.seq_len
        )
    except InputError:
        return nominal_batch(config), "nominal"
    batch = data[list(range(len(data)))]
    return (*batch["encoder_input"].shape, batch["decoder_input"].size(1)), "validation pairs"


def preset_architecture(name: str) -> alt.LayerChart:
    """The picture of a preset's model, whose vocabularies have the maximum size. Raises InputError for another name."""
    config = get_config(name)
    title = f"preset {name}, not trained"
    return architecture(config, config.vocab_size, config.vocab_size, nominal_batch(config), title, "nominal")


def nominal_batch(config: Config) -> Sizes:
    B, S, T = NOMINAL_BATCH
    return B, min(S, config.seq_len), min(T, config.seq_len)
