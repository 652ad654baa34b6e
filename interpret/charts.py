"""Altair charts of an AttentionTrace and of experiments; saving and showing charts.

In every heat map, rows are queries and columns are keys. Axes are ordered by position and labeled with tokens, so a
token that occurs twice has two rows. Masked cells are not drawn. The color scale of weights runs from 0 to 1 in all
charts, so charts can be compared.

Charts store the weights as a `packed_table` (one row per head) and unpack them in Vega: 48 heads of 20 tokens take
0.3 MB instead of 7 MB. `cell_size` is the side length of a heat map cell in pixels.
"""

import base64
import io
import json
import textwrap
import uuid
from pathlib import Path

import altair as alt
import pandas as pd
import vl_convert
from altair.utils.html import spec_to_html
from PIL import Image

import interpret.theme  # noqa: F401  (registers and enables the Altair theme)
from interpret import views
from interpret.measures import check_heads, mean_over_heads, packed_table, rollout, weights_of_query
from interpret.trace import KIND_NAMES, KINDS, SIDES, AttentionTrace
from interpret.views import WEIGHT_SCALE, token_axis, unpack, view_data, view_params, view_state
from runs.files import output_file

WEIGHT_COLOR = alt.Color("weight:Q", scale=WEIGHT_SCALE, title="weight")
TOOLTIP = [
    alt.Tooltip("layer:O"),
    alt.Tooltip("head:O"),
    alt.Tooltip("row_token:N", title="query (row)"),
    alt.Tooltip("column_token:N", title="key (column)"),
    alt.Tooltip("weight:Q", format=".4f"),
]

# ---------------------------------------------------------------------------- building blocks of charts


def unpacked_weights(packed: pd.DataFrame) -> alt.Chart:
    """A chart of the weights of a packed table, one row each, with the labels of row and column."""
    return unpack(alt.Chart(packed)).transform_calculate(
        row_token="rows[datum.kind][datum.row]", column_token="(datum.kind == 'decoder' ? tgt : src)[datum.column]"
    )


def token_params(trace: AttentionTrace) -> list[alt.Parameter]:
    """The tokens and the labels of rows as Vega parameters, for axes and tooltips."""
    rows = {kind: trace.row_labels(kind) for kind in KINDS}
    return view_params({"src": trace.src_tokens, "tgt": trace.tgt_tokens, "rows": rows})


def heat_map(chart: alt.Chart, kind: str) -> alt.Chart:
    """Weights as cells, with the tokens on the axes; decoder rows are labeled "read → written"."""
    columns = SIDES[kind][1]
    return chart.mark_rect().encode(
        x=alt.X("column:O", title=None, axis=token_axis(columns, labelAngle=-60)),
        y=alt.Y("row:O", title=None, axis=token_axis(f"rows.{kind}", labelLimit=180)),
        color=WEIGHT_COLOR,
        tooltip=TOOLTIP,
    )


def sized(chart: alt.Chart, trace: AttentionTrace, kind: str, cell_size: float) -> alt.Chart:
    rows, columns = trace.labels(kind)
    return chart.properties(width=max(40, cell_size * len(columns)), height=max(40, cell_size * len(rows)))


def sentence_line(trace: AttentionTrace) -> str:
    return f"{trace.source} → {trace.translation}"


def titled(chart: alt.TopLevelMixin, kind: str, details: str = "", *lines: str) -> alt.TopLevelMixin:
    """Adds a title such as "Cross-attention, <details>"; below it the lines, and what rows and columns are."""
    sides = {"encoder": "source", "decoder": "target, read → written", "cross": "target, read → written"}
    columns = {"src": "source", "tgt": "target"}[SIDES[kind][1]]
    name = KIND_NAMES[kind].capitalize()
    about = f"rows: queries ({sides[kind]}) · columns: keys ({columns})"
    below = [part for line in lines for part in textwrap.wrap(line, 90)] + [about]
    return chart.properties(title=alt.TitleParams(f"{name}, {details}" if details else name, subtitle=below))


# ---------------------------------------------------------------------------- heads


def grid(
    trace: AttentionTrace,
    kind: str,
    layers: list[int] | None = None,
    heads: list[int] | None = None,
    cell_size: float = 11,
) -> alt.Chart:
    """A grid of heat maps: one row per layer, one column per head; all layers and heads unless given.

    Raises InputError for a layer or head out of range.
    """
    check_heads(trace, kind, layers, heads)
    packed = packed_table(trace, kind)
    packed = packed[packed["layer"].isin(layers if layers is not None else packed["layer"])]
    packed = packed[packed["head"].isin([str(head) for head in heads] if heads is not None else packed["head"])]
    return titled(panels(trace, kind, packed, cell_size), kind, "", sentence_line(trace))


def panels(trace: AttentionTrace, kind: str, packed: pd.DataFrame, cell_size: float) -> alt.FacetChart:
    """The heads of a packed table as heat maps: one row per layer, one column per head."""
    panel = sized(heat_map(unpacked_weights(packed), kind), trace, kind, cell_size)
    columns = alt.Column("head:N", title="head", sort=packed["head"].unique().tolist())
    chart = panel.encode(row=alt.Row("layer:O", title="layer"), column=columns)
    return chart.add_params(*token_params(trace)).configure_facet(spacing=6)


def single_head(trace: AttentionTrace, kind: str, layer: int, head: int, cell_size: float = 26) -> alt.Chart:
    """One head, with the weights written into the cells, except those below 0.005."""
    base = unpacked_weights(packed_table(trace, kind, layer, head))
    numbers = cell_numbers(
        base.transform_filter("datum.weight >= 0.005").encode(x="column:O", y="row:O"), "weight", "datum.weight >= 0.5"
    )
    chart = sized(alt.layer(heat_map(base, kind), *numbers), trace, kind, cell_size).add_params(*token_params(trace))
    return titled(chart, kind, f"layer {layer}, head {head}", sentence_line(trace))


def cell_numbers(base: alt.Chart, field: str, is_high: str, digits: str = ".2f", size: int = 10) -> list[alt.Chart]:
    """Numbers in cells. The expression `is_high` tells which cells have the other end of the color scale."""
    text = base.encode(text=alt.Text(f"{field}:Q", format=digits))
    return [
        text.transform_filter(f"{negation}({is_high})").mark_text(style=style, fontSize=size)
        for style, negation in (("low", "!"), ("high", ""))
    ]


def mean_heads(trace: AttentionTrace, kind: str, cell_size: float = 16, layers: list[int] | None = None) -> alt.Chart:
    """The mean over the heads of each layer; all layers unless given."""
    packed = packed_table(mean_over_heads(trace), kind).assign(head="mean")
    packed = packed[packed["layer"].isin(layers if layers is not None else packed["layer"])]
    return titled(panels(trace, kind, packed, cell_size), kind, "mean over heads", sentence_line(trace))


def rollout_layers(trace: AttentionTrace, kind: str, cell_size: float = 16) -> alt.Chart:
    """Attention rollout from each layer down to the input."""
    packed = packed_table(rollout(trace), kind).assign(head="rollout")
    return titled(panels(trace, kind, packed, cell_size), kind, "rollout to the input", sentence_line(trace))


def query_in_all_heads(trace: AttentionTrace, kind: str, row: int, cell_size: float = 18) -> alt.Chart:
    """The weights of one query in all heads: one heat map per layer, one row per head."""
    columns, label = trace.labels(kind)[1], trace.row_labels(kind)[row]
    heads = unpacked_weights(packed_table(trace, kind)).transform_filter(f"datum.row == {row}")
    chart = heads.mark_rect().encode(
        x=alt.X("column:O", title=None, axis=token_axis(SIDES[kind][1], labelAngle=-60)),
        y=alt.Y("head:O", title="head"),
        row=alt.Row("layer:O", title="layer"),
        color=WEIGHT_COLOR,
        tooltip=TOOLTIP,
    )
    chart = chart.properties(width=cell_size * len(columns), height=cell_size * trace.weights[kind].shape[1])
    title = f"{KIND_NAMES[kind].capitalize()} of row {row} ({label}) in all heads"
    return chart.add_params(*token_params(trace)).properties(title=title)


def top_keys(trace: AttentionTrace, kind: str, row: int, top_k: int = 3) -> alt.LayerChart:
    """The keys with the largest weights of one row, a line per head. Raises InputError for the row."""
    heads = alt.Chart(packed_table(trace, kind)).data
    weights_of_query(trace, kind, row)
    chart = views.top_keys(heads, top_k).add_params(*view_params({**view_state(trace), "kind": kind, "t": row}))
    L, H = trace.weights[kind].shape[:2]
    about = f"Row {row}, {trace.row_labels(kind)[row]}: the {top_k} keys with the largest weights, for each head"
    return titled(chart.properties(width=520, height=22 * L * H), kind, "all heads", sentence_line(trace), about)


def value_per_head(table: pd.DataFrame, value: str, title: str, cell_size: int = 34) -> alt.Chart:
    """One number per head: one heat map per kind, one row per layer, one column per head.

    The table has the columns kind, layer, head and `value`.
    """
    base = alt.Chart(table).encode(x=alt.X("head:O", title="head"), y=alt.Y("layer:O", title="layer"))
    low, high = table[value].min(), table[value].max()
    scale = alt.Scale(range="heatmap", domain=[low, high])
    cells = base.mark_rect().encode(color=alt.Color(f"{value}:Q", title=value.replace("_", " "), scale=scale))
    numbers = cell_numbers(base, value, f"datum['{value}'] > {(low + high) / 2}")
    size = {"width": cell_size * table["head"].nunique(), "height": cell_size * table["layer"].nunique()}
    chart = alt.layer(cells, *numbers).properties(**size)
    return chart.facet(column=alt.Column("kind:N", title=None, sort=list(KINDS))).properties(title=title)


# ---------------------------------------------------------------------------- decoding step by step


def decode_stepper(trace: AttentionTrace, step: float | None = None) -> alt.HConcatChart:
    """The words written so far, the cross-attention of a decoding step and the most probable next tokens.

    The attention is that of the last layer, averaged over heads. A slider selects the step; if `step` is given, the
    chart shows that step, or between two steps their mixture, and has no slider.
    """
    last = len(trace.tgt_tokens) - 1
    slider = alt.binding_range(min=0, max=last, step=1, name="decoding step ") if step is None else alt.Undefined
    state, data = view_state(trace), view_data(trace)
    shown = alt.param(name="t", value=last // 2 if step is None else step, bind=slider)
    others = view_params({**{name: value for name, value in state.items() if name != "t"}, "film": True})
    attention = views.ribbons(data["heads"][lambda heads: (heads["kind"] == "cross") & (heads["head"] == "mean")])
    title = alt.TitleParams("Cross-attention, mean over the heads of the last layer", subtitle=sentence_line(trace))
    stage = attention.properties(width=max(360, state["place"]["cross"]["width"]), height=200, title=title)
    bars = views.candidate_bars(data["candidates"]).properties(width=220, height=200, title="Most probable next tokens")
    return alt.hconcat(stage, bars, spacing=40).add_params(*others, shown)


# ---------------------------------------------------------------------------- experiments


def step_heat_map(steps: pd.DataFrame, trace: AttentionTrace, value: str = "logit") -> alt.HConcatChart:
    """Logits or probabilities of every decoding step, beside the cross-attention of the step.

    `steps` is a `step_table` of interpret/steps.py: one row per step, one column per word, the chosen word framed. The
    attention is that of the last layer, averaged over heads.
    """
    words = list(dict.fromkeys(steps["word"]))
    base = alt.Chart(steps).encode(
        x=alt.X("word:N", title=None, sort=words, axis=alt.Axis(labelAngle=-60)),
        y=alt.Y("label:N", title=None, sort=alt.SortField("step"), axis=alt.Axis(labelLimit=220, ticks=False)),
    )
    low, high = (0, 1) if value == "probability" else (steps[value].min(), steps[value].max())
    scale = alt.Scale(range="heatmap", domain=[low, high])
    cells = base.mark_rect().encode(
        color=alt.Color(f"{value}:Q", scale=scale, title=value),
        tooltip=[
            alt.Tooltip("label", title="step"),
            "word",
            alt.Tooltip("logit", format=".2f"),
            alt.Tooltip("probability", format=".3f"),
        ],
    )
    frames = base.transform_filter("datum.chosen").mark_rect(style="frame")
    digits = ".1f" if value == "logit" else ".2f"
    numbers = cell_numbers(base, value, f"datum['{value}'] > {(low + high) / 2}", digits)
    height = 24 * steps["step"].nunique()
    table = alt.layer(cells, frames, *numbers).properties(
        width=34 * len(words), height=height, title=f"{value.capitalize()} of each word (framed: chosen)"
    )
    last_layer = packed_table(mean_over_heads(trace), "cross", len(trace.weights["cross"]) - 1)
    rows = alt.Y("row:O", title=None, axis=None)  # those of the table
    attention = heat_map(unpacked_weights(last_layer), "cross").encode(y=rows)
    attention = attention.properties(
        width=22 * len(trace.src_tokens), height=height, title="Cross-attention of the step"
    )
    both = alt.hconcat(table, attention, spacing=8).resolve_scale(color="independent")
    return both.add_params(*token_params(trace))


def variant_bars(table: pd.DataFrame) -> alt.HConcatChart:
    """The change in log-probability of each variant as bars, beside its translation; `table` is from `compare`."""
    variants, height = table["variant"].tolist(), 20 * len(table)
    bars = (
        alt.Chart(table)
        .mark_bar(style="chosen")
        .encode(
            x=alt.X(
                "change:Q",
                title="change in log-probability of the baseline's translation (nats)",
                axis=alt.Axis(tickCount=5),
            ),
            y=alt.Y("variant:N", title=None, sort=variants, axis=alt.Axis(labelLimit=300)),
            tooltip=["variant", "description", "translation"],
        )
        .properties(width=260, height=height)
    )
    translations = (
        alt.Chart(table)
        .mark_text(align="left", limit=460)
        .encode(x=alt.value(0), y=alt.Y("variant:N", title=None, sort=variants, axis=None), text="translation:N")
        .properties(width=460, height=height, title="Translation")
    )
    return alt.hconcat(bars, translations)


def difference(
    before: AttentionTrace, after: AttentionTrace, kind: str, layer: int, head: int, cell_size: float = 18
) -> alt.HConcatChart:
    """One head in two traces, and their difference on a scale from -1 to 1.

    Raises ValueError unless both traces have the same tokens.
    """
    if (before.src_tokens, before.tgt_tokens) != (after.src_tokens, after.tgt_tokens):
        raise ValueError(
            "the two traces have different tokens; record the second with the translation of the first as target"
        )
    change = after.weights[kind] - before.weights[kind]
    changed = AttentionTrace(**{**vars(after), "weights": {**after.weights, kind: change}})

    def head_of(trace: AttentionTrace, title: str) -> alt.Chart:
        chart = heat_map(unpacked_weights(packed_table(trace, kind, layer, head)), kind)
        return sized(chart, trace, kind, cell_size).properties(title=title)

    diverging = alt.Scale(domain=[-1, 1], clamp=True, range="diverging")
    charts = alt.hconcat(
        head_of(before, "Before"),
        head_of(after, "After"),
        head_of(changed, "After - before").encode(color=alt.Color("weight:Q", scale=diverging, title="difference")),
    )
    charts = charts.resolve_scale(color="independent").add_params(*token_params(before))
    return titled(charts, kind, f"layer {layer}, head {head}", sentence_line(before))


def importance_heat_map(importance: pd.DataFrame, value: str = "bleu_drop") -> alt.FacetChart:
    """Head importance: the drop in BLEU, or in another `value`, with each head switched off."""
    name = {"bleu_drop": "Drop in BLEU", "exact_drop": "Drop in exact match (points)"}.get(value, value)
    return value_per_head(importance, value, f"{name} with one head switched off")


# ---------------------------------------------------------------------------- saving and showing


SUFFIXES = (".png", ".svg")
VEGA_LITE_5 = "https://vega.github.io/schema/vega-lite/v5.json"


def picture(
    trace: AttentionTrace, kind: str, layer: int | None, head: int | str | None, row: int | None
) -> alt.TopLevelMixin:
    """The chart of a row, if one is given, else of the mean over heads, of one head, or of all heads that remain."""
    if row is not None:
        return top_keys(trace, kind, row)
    if head == "mean":
        return mean_heads(trace, kind, layers=None if layer is None else [layer])
    if None not in (layer, head):
        return single_head(trace, kind, layer, head)
    return grid(trace, kind, None if layer is None else [layer], None if head is None else [head])


def save_picture(chart: alt.TopLevelMixin, path: str | Path, scale: float = 2.0) -> None:
    """Writes the chart as SVG if the name ends in .svg, otherwise as PNG."""
    if Path(path).suffix.lower() == ".svg":
        picture = vl_convert.vegalite_to_svg(chart.to_dict()).encode()
    else:
        picture = vl_convert.vegalite_to_png(chart.to_dict(), scale=scale)
    with output_file(path) as file:
        file.write_bytes(picture)


def save_gif(trace: AttentionTrace, path: str | Path, seconds: float = 1.0, between: int = 3) -> None:
    """Writes the decoding steps as an animated GIF, or as an animated PNG if the name ends in .png.

    Each step is shown for `seconds`, with `between` frames to the next one.
    """
    vega = vl_convert.vegalite_to_vega(decode_stepper(trace, 0).to_dict())  # once: it takes as long as a frame
    (t,) = [signal for signal in vega["signals"] if signal["name"] == "t"]
    frames, durations = [], []
    for i in range((len(trace.tgt_tokens) - 1) * (between + 1) + 1):
        step = i / (between + 1)
        t["value"] = eased(step)
        frames.append(Image.open(io.BytesIO(vl_convert.vega_to_png(vega, scale=1.2))).convert("RGB"))
        durations.append(round(1000 * seconds) if step.is_integer() else 60)
    palette = frames[-1].quantize(128, Image.Quantize.MAXCOVERAGE)
    first, *rest = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    form = "PNG" if Path(path).suffix.lower() == ".png" else "GIF"
    with output_file(path) as file:
        first.save(file, form, save_all=True, append_images=rest, duration=durations, loop=0, optimize=True)


def eased(step: float) -> float:
    """The step with a slow start and a slow end between two whole numbers."""
    whole, part = divmod(step, 1)
    return whole + part * part * (3 - 2 * part)


def show_in_notebooks() -> None:
    """Makes notebooks show charts: interactive and offline in JupyterLab, as PNG in viewers such as GitHub.

    nbclient rejects Altair's `mimetype` renderer. Colab has no renderer for Vega, so it gets HTML.
    """
    try:
        import google.colab  # noqa: F401
    except ImportError:
        alt.renderers.register("vega_and_png", render_vega_and_png)
        alt.renderers.enable("vega_and_png")
    else:
        alt.renderers.register("escaped_html", render_html)
        alt.renderers.enable("escaped_html")


def render_vega_and_png(spec: dict, **_) -> dict:
    """The output of a notebook cell: the Vega-Lite specification and a PNG. No HTML, which viewers would prefer.

    JupyterLab renders Vega-Lite 5.6 and warns about the schema of a later version. The charts are valid in versions 5
    and 6, so the specification names version 5.
    """
    title = spec.get("title", "chart")
    return {
        "application/vnd.vegalite.v5+json": {**spec, "$schema": VEGA_LITE_5},
        "image/png": base64.b64encode(small_png(spec)).decode(),
        "text/plain": f"<{title['text'] if isinstance(title, dict) else title}>",
    }


def render_html(spec: dict, **_) -> dict:
    """The output of a Colab cell: HTML in which no text of the chart can end the script."""
    escaped = {"cls": EscapedJSON}
    html = spec_to_html(
        spec, mode="vega-lite", output_div=f"chart-{uuid.uuid4().hex}", json_kwds=escaped,
        vega_version=alt.VEGA_VERSION, vegaembed_version=alt.VEGAEMBED_VERSION, vegalite_version=alt.VEGALITE_VERSION,
        embed_options={"renderer": "canvas"}, fullhtml=False, template="universal",
    )  # fmt: skip
    return {"text/html": html}


class EscapedJSON(json.JSONEncoder):
    """JSON that is safe in a <script> of a page: "<" is written as an escape, so "</script>" cannot occur."""

    def encode(self, o: object) -> str:
        return super().encode(o).replace("<", "\\u003c")


def small_png(spec: dict, colors: int = 128) -> bytes:
    """A chart as a PNG with a palette of this number of colors, a fifth of the size of true color.

    Maximum coverage keeps the rare dark cells of a heat map: no color is off by more than 7 of 255 in the grids of
    Attention_Visualization.ipynb. The default, median cut, is off by up to 95.
    """
    image, out = Image.open(io.BytesIO(vl_convert.vegalite_to_png(spec, ppi=96))).convert("RGB"), io.BytesIO()
    image.quantize(colors, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()
