"""Draw the figures of README.md and docs/ from a trained toy run.

    python docs/pictures.py --run-dir weights/toy.en-it --variants weights/toy.en-de/variants.csv

The CSV is written by `python experiments.py "I can eat an apple." --run-dir weights/toy.en-de --split test
--sentences 1000 --csv weights/toy.en-de/variants.csv`; without --variants, variants.png is not drawn again. The
screenshot of the explorer needs Chromium.
"""

import argparse
import io
import json
import math
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path

import altair as alt
import pandas as pd
import vl_convert
from PIL import Image, ImageChops
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from interpret.charts import grid  # noqa: E402
from interpret.page import save_page  # noqa: E402
from interpret.trace import AttentionTrace, record_trace  # noqa: E402
from translate import Translator  # noqa: E402

SHORT, LONG = "I can eat an apple.", "Today my friend does not want to buy two old books."
TEXT, GRAY, LINE = "#1f2328", "#656d76", "#8c959f"
BLUE, RED, GREEN, PURPLE = "#3b6fb6", "#d1495b", "#2e8b6f", "#8e6bb0"
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
        """`style` may contain align, weight, font and angle (in degrees)."""
        style = {"align": "center", "weight": "normal", "font": SANS, "angle": 0, **style}
        self.texts.append({"x": x, "y": y, "text": text, "size": size, "color": color, **style})

    def arrow(self, *points: tuple[float, float], dashed: bool = False, color: str = TEXT) -> None:
        """A polyline through the points, with an arrowhead at the last one."""
        for (x, y), (x2, y2) in pairwise(points):
            self.lines.append({"x": x, "y": y, "x2": x2, "y2": y2, "dashed": dashed, "stroke": color})
        (x, y), (x2, y2) = points[-2:]
        angle = {(0, -1): 0, (1, 0): 90, (0, 1): 180, (-1, 0): 270}[sign(x2 - x), sign(y2 - y)]
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
        # Font and alignment are properties of a mark, so each style needs a layer.
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


# ---------------------------------------------------------------------------- architecture

ATTENTION, FEED_FORWARD, NORM, EMBEDDING, OUTPUT, GROUP, MASK, DATA = (
    "#fde3c3", "#cfe6f5", "#f5f1c4", "#f9d9dc", "#ddd9f0", "#f6f8fa", "#ffffff", "#e2f0e0"
)  # fmt: skip


def architecture() -> alt.LayerChart:
    """The model as boxes with class and file names, and where the masks are built and used."""
    c = Canvas(960, 754)
    encoder, decoder = 190, 770  # centers of the two columns

    def box(x: float, y: float, name: str, note: str, fill: str, width: float = 270, height: float = 46) -> None:
        c.rect(x - width / 2, y, x + width / 2, y + height, fill)
        c.text(x, y + height / 2 - 9, name, 14, weight="bold", font=MONO)
        c.text(x, y + height / 2 + 10, note, 12, GRAY)

    def block(x: float, y: float, y2: float, name: str) -> None:
        c.rect(x - 160, y, x + 160, y2, GROUP)
        c.text(x - 150, y2 - 16, name, 14, weight="bold", font=MONO, align="left")

    # legend
    c.text(30, 24, "Each sublayer f of a block is in a ResidualConnection:", 13, align="left")
    c.text(30, 46, "x + dropout(f(LayerNorm(x)))", 13, align="left", font=MONO)
    sizes = ("B sentences, S source length, T target length,", "D d_model, V vocabulary, N blocks")
    for i, line in enumerate(sizes):
        c.text(30, 80 + 18 * i, line, 12, GRAY, align="left")

    # output
    box(596, 4, "cross_entropy", "training · training/losses.py", OUTPUT, 210)
    box(832, 4, "greedy_decode, beam_search", "translation · search.py", OUTPUT, 240)
    box(decoder, 82, "ProjectionLayer", "logits (B, T, V) · model.py", OUTPUT)
    box(decoder, 148, "LayerNorm", "end of Decoder · model.py", NORM)
    c.arrow((660, 82), (660, 52))
    c.arrow((832, 82), (832, 52))
    c.arrow((decoder, 148), (decoder, 130))

    # encoder and decoder
    block(encoder, 308, 506, "EncoderBlock × N")
    block(decoder, 216, 506, "DecoderBlock × N")
    box(decoder, 230, "FeedForwardBlock", "feed_forward_block · model.py", FEED_FORWARD)
    box(decoder, 310, "MultiHeadAttentionBlock", "cross_attention_block · model.py", ATTENTION, height=60)
    box(decoder, 408, "MultiHeadAttentionBlock", "self_attention_block · model.py", ATTENTION, height=60)
    box(encoder, 240, "LayerNorm", "end of Encoder · model.py", NORM)
    box(encoder, 322, "FeedForwardBlock", "feed_forward_block · model.py", FEED_FORWARD)
    box(encoder, 408, "MultiHeadAttentionBlock", "self_attention_block · model.py", ATTENTION, height=60)
    c.arrow((decoder, 230), (decoder, 196))
    c.arrow((decoder, 310), (decoder, 278))
    c.arrow((decoder, 408), (decoder, 372))
    c.arrow((encoder, 322), (encoder, 288))
    c.arrow((encoder, 408), (encoder, 370))
    c.arrow((encoder, 240), (encoder, 206), (594, 206), (594, 328), (decoder - 137, 328))
    c.text(392, 192, "encoder output (B, S, D): keys and values", 12, GRAY)

    # embeddings
    for x, side, ids in ((encoder, "src", "encoder_input (B, S)"), (decoder, "tgt", "decoder_input (B, T)")):
        box(x, 528, "PositionalEncoding", f"{side}_pos · model.py", EMBEDDING)
        box(x, 592, "InputEmbeddings", f"{side}_embed · model.py", EMBEDDING)
        c.arrow((x, 528), (x, 470))
        c.arrow((x, 592), (x, 576))
        c.arrow((x, 690), (x, 640))
        c.text(x + 12, 668, ids, 12, GRAY, align="left", font=MONO)

    # masks
    c.rect(376, 334, 568, 522, MASK, RED)
    c.text(472, 350, "masks: True = may attend", 12, RED)
    for y, name, shape, built, file in (
        (374, "encoder_mask", "(B, 1, 1, S)", "padding_mask", "dataset.py"),
        (452, "decoder_mask", "(B, 1, T, T)", "padding_mask & causal_mask", "dataset.py, model.py"),
    ):
        c.text(472, y, name, 14, weight="bold", font=MONO)
        c.text(472, y + 18, shape, 12, GRAY)
        c.text(472, y + 35, built, 11, GRAY, font=MONO)
        c.text(472, y + 51, file, 12, GRAY)
    c.arrow((376, 392), (358, 392), (358, 438), (encoder + 137, 438), dashed=True, color=RED)
    c.arrow((568, 392), (594, 392), (594, 352), (decoder - 137, 352), dashed=True, color=RED)
    c.arrow((568, 466), (594, 466), (594, 438), (decoder - 137, 438), dashed=True, color=RED)
    c.arrow((472, 690), (472, 524), dashed=True, color=RED)

    # data
    c.rect(encoder - 160, 690, decoder + 160, 742, DATA)
    c.text(480, 707, "BilingualDataset, Batches", 14, weight="bold", font=MONO)
    c.text(480, 727, "sentence pairs to padded batches with masks and labels · dataset.py", 12, GRAY)
    return c.chart()


# ---------------------------------------------------------------------------- training


def learning_curve(run_dir: Path, target_tokens: int) -> alt.HConcatChart:
    """Training loss every ten steps; validation loss, BLEU and exact match after each epoch.

    The dashed line is the lower bound of the label-smoothed loss for a vocabulary of `target_tokens`.
    """
    smoothing = json.loads((run_dir / "config.json").read_text())["label_smoothing"]
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    training = pd.DataFrame([{"step": event.step, "value": event.value} for event in events.Scalars("train/loss")])
    scores = pd.DataFrame(map(json.loads, (run_dir / "scores.jsonl").read_text().splitlines()))
    last = int(training["step"].max())
    x = alt.X("step:Q", title="optimizer step", scale=alt.Scale(domain=[0, last + 40], nice=False))
    lowest = pd.DataFrame({"step": [0, last], "value": [smoothed_entropy(smoothing, target_tokens)] * 2})

    def line(values: pd.DataFrame, color: str, **style) -> alt.Chart:
        return alt.Chart(values).mark_line(color=color, strokeWidth=2.2, **style).encode(x=x, y="value:Q")

    def after_epochs(column: str, color: str) -> alt.Chart:
        values = scores[["step", column]].rename(columns={column: "value"})
        return line(values, color, point={"color": color, "size": 55})

    def label(step: float, value: float, text: str, color: str, align: str, dx: float, dy: float) -> alt.Chart:
        place = pd.DataFrame([{"step": step, "value": value, "text": text}])
        words = alt.Chart(place).mark_text(align=align, dx=dx, dy=dy, color=color, font=SANS, fontSize=13)
        return words.encode(x=x, y="value:Q", text="text:N")

    first, final = scores.iloc[0], scores.iloc[-1]
    losses = alt.layer(
        line(lowest, LINE, strokeDash=[5, 4]),
        line(training, BLUE),
        after_epochs("loss", RED),
        label(
            last, training["value"].iloc[-1], f"training loss (label smoothing {smoothing:g})", BLUE, "right", 0, -14
        ),
        label(last, final["loss"], "validation loss", RED, "right", 0, -14),
        label(0, lowest["value"][0], "lower bound of the smoothed loss", GRAY, "left", 6, 12),
    ).encode(y=alt.Y("value:Q", title="cross-entropy (nats per target token)"))
    percent = alt.Scale(domain=[80, 101], nice=False)
    quality = alt.layer(
        after_epochs("bleu", GREEN),
        after_epochs("exact", PURPLE),
        label(first["step"], first["bleu"], "BLEU", GREEN, "right", -8, 0),
        label(first["step"], first["exact"], "exact match", PURPLE, "left", 10, 6),
    ).encode(y=alt.Y("value:Q", title="BLEU; exact match (%)", scale=percent, axis=alt.Axis(tickCount=5)))
    return plain(alt.hconcat(losses.properties(width=470, height=250), quality.properties(width=270, height=250)))


def smoothed_entropy(smoothing: float, classes: int) -> float:
    """Entropy in nats of a label-smoothed target distribution: the lower bound of the cross-entropy."""
    rest = smoothing / classes
    label = 1 - smoothing + rest
    return -label * math.log(label) - (classes - 1) * rest * math.log(rest)


def plain(chart: alt.TopLevelMixin) -> alt.TopLevelMixin:
    """The chart with one font, a light grid and no frame."""
    axis = {"labelFont": SANS, "titleFont": SANS, "labelFontSize": 12, "titleFontSize": 13, "titleFontWeight": "normal"}
    colors = {"labelColor": GRAY, "titleColor": GRAY, "gridColor": "#e6e9ec", "domainColor": LINE, "tickColor": LINE}
    title = {"font": SANS, "fontSize": 14, "color": TEXT}
    return (
        chart.configure(background="white", padding=10)
        .configure_axis(**axis, **colors)
        .configure_view(stroke=None)
        .configure_title(**title)
    )


# ---------------------------------------------------------------------------- experiments


def variant_bars(path: Path) -> alt.HConcatChart:
    """Change in log-probability and BLEU of each variant, from the CSV of experiments.py."""
    table = pd.read_csv(path)
    table["part"] = table["variant"].str.extract("^(encoder|decoder|cross|baseline)", expand=False).fillna("both")
    parts = {"baseline": LINE, "encoder": BLUE, "decoder": GREEN, "cross": RED, "both": PURPLE}
    color = alt.Color("part:N", scale=alt.Scale(domain=list(parts), range=list(parts.values())), legend=None)

    def bars(column: str, title: str, digits: str, domain: list[float], names: alt.Axis | None) -> alt.LayerChart:
        x = alt.X(f"{column}:Q", title=title, scale=alt.Scale(domain=domain, nice=False), axis=alt.Axis(tickCount=5))
        y = alt.Y("variant:N", title=None, sort=table["variant"].tolist(), axis=names)
        negative = domain[0] < 0
        number = {"align": "right" if negative else "left", "dx": -4 if negative else 4, "font": SANS, "fontSize": 11}
        base = alt.Chart(table).encode(x=x, y=y)
        numbers = base.mark_text(color=GRAY, **number).encode(text=alt.Text(f"{column}:Q", format=digits))
        return (base.mark_bar(height=13).encode(color=color) + numbers).properties(width=270, height=19 * len(table))

    names = alt.Axis(labelLimit=320, ticks=False, domain=False)
    change = bars("change", "change in log-probability (nats)", "+.1f", [1.25 * table["change"].min(), 0], names)
    bleu = bars("bleu", "BLEU", ".1f", [0, 112], None)
    return plain(alt.hconcat(change, bleu, spacing=18))


# ---------------------------------------------------------------------------- decoding


def decoding_frame(traced: AttentionTrace, step: int) -> alt.LayerChart:
    """The translation up to a step, the cross-attention so far and the most probable next tokens.

    Attention is averaged over the heads of the last layer: one row per step, one column per source token.
    """
    attention = traced.weights["cross"][-1].mean(0)  # (T, S): target and source tokens
    T, S = attention.shape
    size, left, top = 20, 180, 106  # side of a cell, corner of the heat map
    right, bars = left + size * S, left + size * S + 60
    c = Canvas(820, top + size * T + 4)
    for y, name, tokens, weight in (
        (14, "source", traced.src_tokens[1:-1], "normal"),
        (40, "translation", traced.next_tokens[: step + 1], "bold"),
    ):
        c.text(left - 10, y, name, 13, GRAY, align="right")
        c.text(left, y, " ".join(tokens), 16, align="left", weight=weight)
    c.text(left - 10, top - 14, "cross-attention", 13, GRAY, align="right")
    c.rect(left, top, right, top + size * T, "#f0f1f3", "transparent")
    for column, token in enumerate(traced.src_tokens):
        c.text(left + size * (column + 0.5), top - 10, token, 12, GRAY, align="left", angle=315)
    for row in range(step + 1):
        y = top + size * row
        step_name = f"{traced.tgt_tokens[row]} → {traced.next_tokens[row]}"
        c.text(left - 10, y + size / 2, step_name, 12, TEXT if row == step else GRAY, align="right")
        for column, weight in enumerate(attention[row].tolist()):
            x = left + size * column
            c.cells.append({"x": x, "y": y, "x2": x + size, "y2": y + size, "weight": weight})
    c.text(bars, top - 14, "next token", 13, GRAY, align="left")
    for rank, (token, log_p) in enumerate(traced.candidates[step]):
        y, p = top + 6 + 34 * rank, math.exp(log_p)
        color, fill = (TEXT, RED) if token == traced.next_pieces[step] else (GRAY, LINE)
        c.text(bars, y + 6, token, 13, color, align="left")
        c.text(bars + 220, y + 6, f"{p:.1%}", 13, color, align="right")
        c.rect(bars, y + 16, bars + max(2, 220 * p), y + 25, fill, "transparent")
    return c.chart()


def save_decoding(traced: AttentionTrace, path: Path, seconds: float = 0.9) -> None:
    """Writes the frames as an animated GIF that pauses on the last one."""
    frames = [pixels(decoding_frame(traced, step)) for step in range(len(traced.next_tokens))]
    palette = frames[-1].quantize(128)
    first, *rest = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    durations = [round(1000 * seconds)] * len(rest) + [round(3000 * seconds)]
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0, optimize=True)


# ---------------------------------------------------------------------------- the explorer


def save_explorer(traced: AttentionTrace, path: Path, chromium: str) -> None:
    """Writes a screenshot of the page of visualize.py --html, cropped to its content."""
    with tempfile.TemporaryDirectory() as folder:
        save_page(traced, f"{folder}/page.html")
        flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
        flags += " disable-component-update disable-sync hide-scrollbars force-device-scale-factor=1.5"
        flags += f" window-size=1180,1400 virtual-time-budget=8000 user-data-dir={folder}/profile"
        command = [chromium, *(f"--{flag}" for flag in flags.split()), f"--screenshot={path}", f"{folder}/page.html"]
        subprocess.run(command, check=True, capture_output=True)
    shot = Image.open(path).convert("RGB")
    left, top, right, bottom = ImageChops.difference(shot, Image.new("RGB", shot.size, "white")).getbbox()
    shot = shot.crop((left - 12, top - 12, right + 12, bottom + 12))
    shot.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


# ---------------------------------------------------------------------------- saving


def pixels(chart: alt.TopLevelMixin) -> Image.Image:
    """The chart at twice its resolution, for high-density screens."""
    return Image.open(io.BytesIO(vl_convert.vegalite_to_png(chart.to_dict(), scale=2))).convert("RGB")


def save(chart: alt.TopLevelMixin, path: Path) -> None:
    """Writes a PNG with at most 256 colors, which is a third of the size of true color."""
    pixels(chart).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


# ---------------------------------------------------------------------------- command line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("weights/toy.en-it"), help="folder of a trained toy run")
    parser.add_argument("--variants", type=Path, help="CSV file written by experiments.py --split test --csv")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "docs", help="folder for the figures (default: docs)")
    arguments = parser.parse_args()
    translator = Translator.load(arguments.run_dir, device="cpu")
    to = arguments.output_dir
    save(architecture(), to / "architecture.png")
    save(learning_curve(arguments.run_dir, translator.tokenizer_tgt.get_vocab_size()), to / "learning_curve.png")
    save(grid(record_trace(translator, SHORT), "cross"), to / "grid.png")
    save_decoding(record_trace(translator, LONG), to / "decoding.gif")
    if arguments.variants:
        save(variant_bars(arguments.variants), to / "variants.png")
    if chromium := shutil.which("chromium") or shutil.which("google-chrome"):
        save_explorer(record_trace(translator, LONG), to / "explorer.png", chromium)
    else:
        print("no Chromium on this machine: explorer.png is not written")


if __name__ == "__main__":
    main()
