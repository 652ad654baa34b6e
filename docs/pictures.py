"""Draw the figures of README.md and docs/ from a trained toy run.

    python docs/pictures.py --run-dir weights/toy.en-it --variants variants.csv

The CSV is written by `python experiments.py "I can eat an apple." --run-dir pretrained/toy.en-de --split test
--sentences 1000 --csv variants.csv`; without --variants, variants.png is not drawn again. The screenshot of the
explorer needs Chromium.
"""

import argparse
import io
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import altair as alt
import pandas as pd
import vl_convert
from PIL import Image, ImageChops
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from interpret.architecture import GRAY, LINE, RED, SANS, TEXT, run_architecture  # noqa: E402
from interpret.charts import grid, save_gif  # noqa: E402
from interpret.page import save_page  # noqa: E402
from interpret.trace import AttentionTrace, record_trace  # noqa: E402
from translate import Translator  # noqa: E402

SHORT, LONG = "I can eat an apple.", "Today my friend does not want to buy two old books."
BLUE, GREEN, PURPLE = "#3b6fb6", "#2e8b6f", "#8e6bb0"

# ---------------------------------------------------------------------------- training


def learning_curve(run_dir: Path, target_tokens: int) -> alt.HConcatChart:
    """Training loss every ten steps; validation loss, BLEU and exact match after each epoch.

    The dashed line is the lower bound of the label-smoothed loss for a vocabulary of `target_tokens`.
    """
    smoothing = json.loads((run_dir / "config.json").read_text(encoding="utf8"))["label_smoothing"]
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    training = pd.DataFrame([{"step": event.step, "value": event.value} for event in events.Scalars("train/loss")])
    scores = pd.DataFrame(map(json.loads, (run_dir / "scores.jsonl").read_text(encoding="utf8").splitlines()))
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


# ---------------------------------------------------------------------------- the explorer


def save_explorer(traced: AttentionTrace, path: Path, chromium: str) -> None:
    """Writes a screenshot of the page of visualize.py --html, cropped to its content."""
    with tempfile.TemporaryDirectory() as folder:
        save_page(traced, f"{folder}/page.html")
        flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
        flags += " disable-component-update disable-sync hide-scrollbars force-device-scale-factor=1"
        flags += f" window-size=1440,1300 virtual-time-budget=8000 user-data-dir={folder}/profile"
        command = [chromium, *(f"--{flag}" for flag in flags.split()), f"--screenshot={path}", f"{folder}/page.html"]
        subprocess.run(command, check=True, capture_output=True)
    shot = Image.open(path).convert("RGB")
    background = Image.new("RGB", shot.size, shot.getpixel((0, 0)))
    bottom = ImageChops.difference(shot, background).getbbox()[3]
    shot = shot.crop((0, 0, shot.width, min(shot.height, bottom + 20)))
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
    save(run_architecture(arguments.run_dir), to / "architecture.png")
    save(learning_curve(arguments.run_dir, translator.tokenizer_tgt.get_vocab_size()), to / "learning_curve.png")
    save(grid(record_trace(translator, SHORT), "cross"), to / "grid.png")
    save_gif(record_trace(translator, LONG), to / "decoding.gif")
    if arguments.variants:
        save(variant_bars(arguments.variants), to / "variants.png")
    if chromium := shutil.which("chromium") or shutil.which("google-chrome"):
        save_explorer(record_trace(translator, LONG), to / "explorer.png", chromium)
    else:
        print("no Chromium on this machine: explorer.png is not written")


if __name__ == "__main__":
    main()
