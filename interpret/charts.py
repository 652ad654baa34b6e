"""Altair charts of an AttentionTrace and of experiments; saving and showing charts.

In every heat map, rows are queries and columns are keys. Axes are ordered by position and labeled with tokens, so a
token that occurs twice has two rows. Masked cells are not drawn. The color scale of weights runs from 0 to 1 in all
charts, so charts can be compared.

Charts store the weights as a `packed_table` (one row per head) and unpack them in Vega: 48 heads of 20 tokens take
0.3 MB instead of 7 MB. `cell_size` is the side length of a heat map cell in pixels.
"""

import base64
import io
from pathlib import Path

import altair as alt
import pandas as pd
import vl_convert
from PIL import Image

from interpret.measures import candidates_table, mean_over_heads, packed_table, rollout
from interpret.trace import KIND_NAMES, KINDS, SIDES, AttentionTrace

HIGHLIGHT, NEUTRAL, TEXT = "#e45756", "#bab0ac", "#333333"
WEIGHT_SCALE = alt.Scale(domain=[0, 1], clamp=True, scheme="viridis")
WEIGHT_COLOR = alt.Color("weight:Q", scale=WEIGHT_SCALE, title="weight")
TOOLTIP = [
    alt.Tooltip("layer:O"),
    alt.Tooltip("head:O"),
    alt.Tooltip("row_token:N", title="query (row)"),
    alt.Tooltip("column_token:N", title="key (column)"),
    alt.Tooltip("weight:Q", format=".3f"),
]

# ---------------------------------------------------------------------------- building blocks of charts


def unpack(chart: alt.Chart) -> alt.Chart:
    """Turns each packed row into one row per weight: kind, layer, head, row, column, weight; drops masked cells."""
    return (
        chart.transform_calculate(w="split(datum.w, ',')")
        .transform_calculate(i="sequence(length(datum.w))", rows="length(datum.w) / datum.columns")
        .transform_flatten(["w", "i"])
        .transform_calculate(
            weight="datum.w / 1000", row="floor(datum.i / datum.columns)", column="datum.i % datum.columns"
        )
        .transform_filter("datum.kind != 'decoder' || datum.column <= datum.row")
    )


def with_tokens(chart: alt.Chart) -> alt.Chart:
    """Adds row_token and column_token for the tooltips."""
    return chart.transform_calculate(
        row_token="(datum.kind == 'encoder' ? src : tgt)[datum.row]",
        column_token="(datum.kind == 'decoder' ? tgt : src)[datum.column]",
    )


def unpacked_weights(packed: pd.DataFrame) -> alt.Chart:
    """A chart of the unpacked weights of a packed table, with tokens."""
    return with_tokens(unpack(alt.Chart(packed)))


def token_params(trace: AttentionTrace) -> list[alt.Parameter]:
    """The tokens as the Vega parameters `src` and `tgt`, for axes and tooltips."""
    return [alt.param(name="src", value=trace.src_tokens), alt.param(name="tgt", value=trace.tgt_tokens)]


def token_axis(tokens: str, **options) -> alt.Axis:
    """An axis over positions; `tokens` is a Vega expression for the list of labels, such as "src"."""
    return alt.Axis(labelExpr=f"({tokens})[datum.value]", labelLimit=90, labelOverlap=False, ticks=False, **options)


def heat_map(chart: alt.Chart, kind: str) -> alt.Chart:
    """Weights as cells, with the tokens on the axes."""
    rows, columns = SIDES[kind]
    return chart.mark_rect().encode(
        x=alt.X("column:O", title=None, axis=token_axis(columns, labelAngle=-60)),
        y=alt.Y("row:O", title=None, axis=token_axis(rows)),
        color=WEIGHT_COLOR,
        tooltip=TOOLTIP,
    )


def sized(chart: alt.Chart, trace: AttentionTrace, kind: str, cell_size: float) -> alt.Chart:
    rows, columns = trace.labels(kind)
    return chart.properties(width=max(40, cell_size * len(columns)), height=max(40, cell_size * len(rows)))


def titled(chart: alt.TopLevelMixin, kind: str, details: str = "") -> alt.TopLevelMixin:
    """Adds a title such as "Cross-attention, <details>", and a subtitle that explains rows and columns."""
    sides = {"src": "source", "tgt": "target"}
    rows, columns = SIDES[kind]
    name = KIND_NAMES[kind].capitalize()
    subtitle = f"rows: {sides[rows]} queries, columns: {sides[columns]} keys"
    return chart.properties(title=alt.TitleParams(f"{name}, {details}" if details else name, subtitle=subtitle))


# ---------------------------------------------------------------------------- heads


def grid(
    trace: AttentionTrace,
    kind: str,
    layers: list[int] | None = None,
    heads: list[int] | None = None,
    cell_size: float = 11,
) -> alt.Chart:
    """A grid of heat maps: one row per layer, one column per head; all layers and heads unless given."""
    packed = packed_table(trace, kind)
    packed = packed[packed["layer"].isin(layers if layers is not None else packed["layer"])]
    packed = packed[packed["head"].isin(heads if heads is not None else packed["head"])]
    panel = sized(heat_map(unpacked_weights(packed), kind), trace, kind, cell_size)
    chart = panel.encode(row=alt.Row("layer:O", title="layer"), column=alt.Column("head:O", title="head"))
    return titled(chart.add_params(*token_params(trace)).configure_facet(spacing=6), kind)


def single_head(trace: AttentionTrace, kind: str, layer: int, head: int, cell_size: float = 26) -> alt.Chart:
    """One head, with the weights written into the cells, except those below 0.005."""
    base = unpacked_weights(packed_table(trace, kind, layer, head))
    numbers = (
        base.transform_filter("datum.weight >= 0.005")
        .mark_text(fontSize=10)
        .encode(
            x="column:O",
            y="row:O",
            text=alt.Text("weight:Q", format=".2f"),
            color=alt.condition("datum.weight > 0.6", alt.value("black"), alt.value("white")),
        )
    )
    chart = sized(heat_map(base, kind) + numbers, trace, kind, cell_size).add_params(*token_params(trace))
    return titled(chart, kind, f"layer {layer}, head {head}")


def mean_heads(trace: AttentionTrace, kind: str, cell_size: float = 16) -> alt.Chart:
    """The mean over the heads of each layer."""
    return titled(grid(mean_over_heads(trace), kind, cell_size=cell_size), kind, "mean over heads")


def rollout_layers(trace: AttentionTrace, kind: str, cell_size: float = 16) -> alt.Chart:
    """Attention rollout from each layer down to the input."""
    return titled(grid(rollout(trace), kind, cell_size=cell_size), kind, "rollout to the input")


def query_in_all_heads(trace: AttentionTrace, kind: str, row: int, cell_size: float = 18) -> alt.Chart:
    """The weights of one query in all heads: one heat map per layer, one row per head."""
    rows, columns = trace.labels(kind)
    heads = unpacked_weights(packed_table(trace, kind)).transform_filter(f"datum.row == {row}")
    chart = heads.mark_rect().encode(
        x=alt.X("column:O", title=None, axis=token_axis(SIDES[kind][1], labelAngle=-60)),
        y=alt.Y("head:O", title="head"),
        row=alt.Row("layer:O", title="layer"),
        color=WEIGHT_COLOR,
        tooltip=TOOLTIP,
    )
    chart = chart.properties(width=cell_size * len(columns), height=cell_size * trace.weights[kind].shape[1])
    title = f"{KIND_NAMES[kind].capitalize()} of query {row} ({rows[row]}) in all heads"
    return chart.add_params(*token_params(trace)).properties(title=title)


def value_per_head(
    table: pd.DataFrame, value: str, title: str, scale: alt.Scale | None = None, cell_size: int = 34
) -> alt.Chart:
    """One number per head: one heat map per kind, one row per layer, one column per head.

    The table has the columns kind, layer, head and `value`.
    """
    base = alt.Chart(table).encode(x=alt.X("head:O", title="head"), y=alt.Y("layer:O", title="layer"))
    scale = scale or alt.Scale(scheme="viridis")
    cells = base.mark_rect().encode(color=alt.Color(f"{value}:Q", title=value.replace("_", " "), scale=scale))
    # Black numbers with a white outline are legible on dark and on light cells.
    numbers = base.encode(text=alt.Text(f"{value}:Q", format=".2f"))
    outline = numbers.mark_text(fontSize=10, stroke="white", strokeWidth=2.5, strokeJoin="round")
    size = {"width": cell_size * table["head"].nunique(), "height": cell_size * table["layer"].nunique()}
    chart = (cells + outline + numbers.mark_text(fontSize=10)).properties(**size)
    return chart.facet(column=alt.Column("kind:N", title=None, sort=list(KINDS))).properties(title=title)


# ---------------------------------------------------------------------------- decoding step by step


def decode_stepper(trace: AttentionTrace, step: int | None = None) -> alt.VConcatChart:
    """The translation so far, the top-k next tokens, and the cross-attention of a decoding step (mean over heads).

    A slider selects the step; if `step` is given, the chart shows that step and has no slider.
    """
    last = len(trace.tgt_tokens) - 1
    slider = alt.binding_range(min=0, max=last, step=1, name="decoding step ") if step is None else alt.Undefined
    shown = alt.param(name="step", value=last // 2 if step is None else step, bind=slider)
    below = alt.hconcat(step_candidates(trace), step_attention(trace), spacing=30)
    return alt.vconcat(step_sentence(trace), below).add_params(*token_params(trace), shown)


def step_sentence(trace: AttentionTrace) -> alt.Chart:
    """The tokens written so far, with that of the step highlighted."""
    last = len(trace.next_tokens) - 1
    written = pd.DataFrame({"i": range(last + 1), "token": trace.next_tokens})
    return (
        alt.Chart(written)
        .transform_filter("datum.i <= step")
        .mark_text(fontSize=14)
        .encode(
            x=alt.X("i:Q", scale=alt.Scale(domain=[-0.5, last + 0.5], nice=False), axis=None),
            text="token:N",
            color=alt.condition("datum.i == step", alt.value(HIGHLIGHT), alt.value(TEXT)),
        )
        .properties(
            width=max(420, 62 * (last + 1)), height=24, title="Translation so far; in red: the token of this step"
        )
    )


def step_candidates(trace: AttentionTrace) -> alt.LayerChart:
    """The most probable next tokens of the step, with the chosen one highlighted."""
    bars = (
        alt.Chart(candidates_table(trace))
        .transform_filter("datum.step == step")
        .mark_bar()
        .encode(
            x=alt.X("probability:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%")),
            y=alt.Y("rank:O", title=None, axis=None),
            color=alt.condition("datum.chosen", alt.value(HIGHLIGHT), alt.value(NEUTRAL)),
            tooltip=[
                "token",
                alt.Tooltip("probability", format=".3f"),
                alt.Tooltip("log_probability", format=".3f", title="log-probability"),
            ],
        )
    )
    names = (
        bars.mark_text(align="left", dx=4)
        .encode(text="label:N", color=alt.value(TEXT), x=alt.X("probability:Q"))
        .transform_calculate(label="datum.token + '  ' + format(datum.probability, '.1%')")
    )
    return (bars + names).properties(width=300, height=110, title="Most probable next tokens")


def step_attention(trace: AttentionTrace) -> alt.Chart:
    """The cross-attention of the step in each layer, averaged over heads."""
    return (
        unpacked_weights(packed_table(mean_over_heads(trace), "cross"))
        .transform_filter("datum.row == step")
        .mark_rect()
        .encode(
            x=alt.X("column:O", title=None, axis=token_axis("src", labelAngle=-60)),
            y=alt.Y("layer:O", title="layer"),
            color=WEIGHT_COLOR,
            tooltip=[field for field in TOOLTIP if field["shorthand"] != "head:O"],
        )
        .properties(
            width=22 * len(trace.src_tokens),
            height=26 * len(trace.weights["cross"]),
            title="Cross-attention, mean over heads",
        )
    )


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
    scale = alt.Scale(scheme="blues", **({"domain": [0, 1]} if value == "probability" else {}))
    cells = base.mark_rect().encode(
        color=alt.Color(f"{value}:Q", scale=scale, title=value),
        tooltip=[
            alt.Tooltip("label", title="step"),
            "word",
            alt.Tooltip("logit", format=".2f"),
            alt.Tooltip("probability", format=".3f"),
        ],
    )
    frames = base.transform_filter("datum.chosen").mark_rect(fillOpacity=0, stroke=HIGHLIGHT, strokeWidth=2)
    numbers = base.mark_text(fontSize=9).encode(
        text=alt.Text(f"{value}:Q", format=".1f" if value == "logit" else ".2f")
    )
    height = 22 * steps["step"].nunique()
    table = (cells + frames + numbers).properties(
        width=30 * len(words), height=height, title=f"{value.capitalize()} of each word; framed: the chosen word"
    )
    last_layer = packed_table(mean_over_heads(trace), "cross", len(trace.weights["cross"]) - 1)
    attention = heat_map(unpacked_weights(last_layer), "cross").properties(
        width=22 * len(trace.src_tokens), height=height, title="Cross-attention of the last layer, mean over heads"
    )
    both = alt.hconcat(table, attention, spacing=20).resolve_scale(color="independent")
    return both.add_params(*token_params(trace))


def variant_bars(table: pd.DataFrame) -> alt.HConcatChart:
    """The change in log-probability of each variant as bars, beside its translation; `table` is from `compare`."""
    variants, height = table["variant"].tolist(), 20 * len(table)
    bars = (
        alt.Chart(table)
        .mark_bar(color=HIGHLIGHT)
        .encode(
            x=alt.X("change:Q", title="change in log-probability of the baseline's translation (nats)"),
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

    diverging = alt.Scale(domain=[-1, 1], clamp=True, scheme="redblue")
    charts = alt.hconcat(
        head_of(before, "Before"),
        head_of(after, "After"),
        head_of(changed, "After - before").encode(color=alt.Color("weight:Q", scale=diverging, title="difference")),
    )
    charts = charts.resolve_scale(color="independent").add_params(*token_params(before))
    return titled(charts, kind, f"layer {layer}, head {head}")


def importance_heat_map(importance: pd.DataFrame, value: str = "bleu_drop") -> alt.FacetChart:
    """Head importance: the drop in BLEU, or in another `value`, with each head switched off."""
    name = {"bleu_drop": "Drop in BLEU", "exact_drop": "Drop in exact match (points)"}.get(value, value)
    return value_per_head(importance, value, f"{name} with one head switched off", alt.Scale(scheme="oranges"))


# ---------------------------------------------------------------------------- saving and showing


def save_png(chart: alt.TopLevelMixin, path: str | Path, scale: float = 2.0) -> None:
    """Writes the chart as a PNG file."""
    Path(path).write_bytes(vl_convert.vegalite_to_png(chart.to_dict(), scale=scale))


def save_gif(trace: AttentionTrace, path: str | Path, seconds: float = 1.0) -> None:
    """Writes the decode stepper as an animated GIF with one frame of `seconds` per step."""
    frames = []
    for step in range(len(trace.tgt_tokens)):
        png = vl_convert.vegalite_to_png(decode_stepper(trace, step).to_dict(), scale=1.2)
        frames.append(Image.open(io.BytesIO(png)).convert("RGB"))
    size = max(frame.width for frame in frames), max(frame.height for frame in frames)
    canvases = [Image.new("RGB", size, "white") for _ in frames]
    for canvas, frame in zip(canvases, frames, strict=True):
        canvas.paste(frame)
    first, *rest = (canvas.quantize(64) for canvas in canvases)
    first.save(path, save_all=True, append_images=rest, duration=int(1000 * seconds), loop=0)


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
        alt.renderers.enable("html", embed_options={"renderer": "canvas"})


def render_vega_and_png(spec: dict, **_) -> dict:
    """The output of a notebook cell: the Vega-Lite specification and a PNG. No HTML, which viewers would prefer."""
    title = spec.get("title", "chart")
    return {
        "application/vnd.vegalite.v5+json": spec,
        "image/png": base64.b64encode(vl_convert.vegalite_to_png(spec, ppi=96)).decode(),
        "text/plain": f"<{title['text'] if isinstance(title, dict) else title}>",
    }
