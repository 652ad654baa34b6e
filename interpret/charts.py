"""Altair charts of an AttentionTrace, and how to save and show them.

    L  layers    H  heads    Q  query positions (rows)    K  key positions (columns)

Every chart draws from small packed tables (a row a head, its weights as one list) that are unpacked
in the chart, so that 48 heads of 20 tokens are 0.3 MB and not 7. Axes count positions and are
labelled with tokens, so that a word that occurs twice stands twice, in order. Masked cells are not
drawn; colours run from weight 0 to 1 in every chart, so that charts can be compared.
"""

import base64
import io
from pathlib import Path

import altair as alt
import pandas as pd
import vl_convert
from PIL import Image

from interpret.measures import mean_over_heads, packed_table, rollout, steps_table
from interpret.trace import KINDS, AttentionTrace

WEIGHT = alt.Scale(domain=[0, 1], clamp=True, scheme="viridis")
NOTE = "Attention shows where a head reads. It is not an explanation, and only some heads align words."

# ---------------------------------------------------------------------------- parts


def unpack(chart: alt.Chart) -> alt.Chart:
    """A packed row into one row a weight: layer, head, row, column, weight; what is masked drops out."""
    return (
        chart.transform_calculate(w="split(datum.w, ',')")
        .transform_calculate(i="sequence(length(datum.w))", rows="length(datum.w) / datum.columns")
        .transform_flatten(["w", "i"])
        .transform_calculate(
            weight="datum.w / 1000", row="floor(datum.i / datum.columns)", column="datum.i % datum.columns"
        )
        .transform_filter("datum.kind != 'decoder' || datum.column <= datum.row")
    )


def tokens_as_params(trace: AttentionTrace) -> list[alt.Parameter]:
    return [alt.param(name="src", value=trace.src_tokens), alt.param(name="tgt", value=trace.tgt_tokens)]


ROW_TOKEN = "(datum.kind == 'encoder' ? src : tgt)[datum.row]"
COLUMN_TOKEN = "(datum.kind == 'decoder' ? tgt : src)[datum.column]"
TOOLTIP = [
    alt.Tooltip("layer:O"),
    alt.Tooltip("head:O"),
    alt.Tooltip("row_token:N", title="query (row)"),
    alt.Tooltip("column_token:N", title="key (column)"),
    alt.Tooltip("weight:Q", format=".3f"),
]


def named(chart: alt.Chart) -> alt.Chart:
    """Adds the tokens that the tooltips show."""
    return chart.transform_calculate(row_token=ROW_TOKEN, column_token=COLUMN_TOKEN)


def token_axis(tokens: str, **options) -> alt.Axis:
    """An axis over positions, labelled from the list that the expression `tokens` names."""
    return alt.Axis(labelExpr=f"({tokens})[datum.value]", labelLimit=90, labelOverlap=False, ticks=False, **options)


def heat_map(chart: alt.Chart, kind: str) -> alt.Chart:
    """Squares of weights with the tokens of `kind` on the axes."""
    rows, columns = ("src" if kind == "encoder" else "tgt"), ("tgt" if kind == "decoder" else "src")
    return chart.mark_rect().encode(
        x=alt.X("column:O", title=None, axis=token_axis(columns, labelAngle=-60)),
        y=alt.Y("row:O", title=None, axis=token_axis(rows)),
        color=alt.Color("weight:Q", scale=WEIGHT, title="weight"),
        tooltip=TOOLTIP,
    )


def sized(chart: alt.Chart, trace: AttentionTrace, kind: str, square: float) -> alt.Chart:
    rows, columns = trace.labels(kind)
    return chart.properties(width=max(40, square * len(columns)), height=max(40, square * len(rows)))


def caption(kind: str) -> str:
    rows, columns = {"encoder": ("source", "source"), "decoder": ("target", "target"), "cross": ("target", "source")}[
        kind
    ]
    return f"{kind} attention: {rows} rows look at {columns} columns"


# ---------------------------------------------------------------------------- single pictures


def grid(
    trace: AttentionTrace,
    kind: str,
    layers: list[int] | None = None,
    heads: list[int] | None = None,
    square: float = 11,
) -> alt.Chart:
    """All layers (down) and heads (across) of a kind; `square` is the side of a weight in pixels."""
    packed = packed_table(trace, kind)
    packed = packed[packed["layer"].isin(layers if layers is not None else packed["layer"])]
    packed = packed[packed["head"].isin(heads if heads is not None else packed["head"])]
    cell = sized(heat_map(named(unpack(alt.Chart(packed))), kind), trace, kind, square)
    return (
        cell.encode(row=alt.Row("layer:O", title="layer"), column=alt.Column("head:O", title="head"))
        .add_params(*tokens_as_params(trace))
        .properties(title=caption(kind))
        .configure_facet(spacing=6)
    )


def single_head(trace: AttentionTrace, kind: str, layer: int, head: int, square: float = 26) -> alt.Chart:
    """One head, large, with its weights written in hundredths."""
    packed = packed_table(trace, kind, layer, head)
    base = named(unpack(alt.Chart(packed)))
    squares = heat_map(base, kind)
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
    chart = sized(squares + numbers, trace, kind, square).add_params(*tokens_as_params(trace))
    return chart.properties(title=f"{caption(kind)}, layer {layer}, head {head}")


def mean_heads(trace: AttentionTrace, kind: str, square: float = 16) -> alt.Chart:
    """The mean over the heads of each layer."""
    return grid(mean_over_heads(trace), kind, square=square).properties(title=f"{caption(kind)}, mean over heads")


def flow(trace: AttentionTrace, kind: str, square: float = 16) -> alt.Chart:
    """Attention rollout down to the input, layer by layer."""
    return grid(rollout(trace), kind, square=square).properties(title=f"{caption(kind)}, rolled out to the input")


def layers_of_query(trace: AttentionTrace, kind: str, row: int, square: float = 18) -> alt.Chart:
    """One query's row in every head, layer below layer."""
    packed = packed_table(trace, kind)
    base = named(unpack(alt.Chart(packed))).transform_filter(f"datum.row == {row}")
    rows, columns = trace.labels(kind)
    strip = base.mark_rect().encode(
        x=alt.X("column:O", title=None, axis=token_axis("tgt" if kind == "decoder" else "src", labelAngle=-60)),
        y=alt.Y("head:O", title="head"),
        row=alt.Row("layer:O", title="layer"),
        color=alt.Color("weight:Q", scale=WEIGHT, title="weight"),
        tooltip=TOOLTIP,
    )
    strip = strip.properties(width=square * len(columns), height=square * trace.weights[kind].shape[1])
    return strip.add_params(*tokens_as_params(trace)).properties(title=f"{rows[row]} (row {row}) through the layers")


def heads_heat_map(
    table: pd.DataFrame, value: str, title: str, scale: alt.Scale | None = None, size: int = 34
) -> alt.Chart:
    """A number for each head, layers down and heads across; the table has columns kind, layer, head and `value`."""
    color = alt.Color(f"{value}:Q", title=value, scale=scale or alt.Scale(scheme="viridis"))
    base = alt.Chart(table).encode(x=alt.X("head:O", title="head"), y=alt.Y("layer:O", title="layer"))
    # On light squares and dark ones: black, on a white that is painted first.
    numbers = base.encode(text=alt.Text(f"{value}:Q", format=".2f"))
    halo = numbers.mark_text(fontSize=10, stroke="white", strokeWidth=2.5, strokeJoin="round")
    both = base.mark_rect().encode(color=color) + halo + numbers.mark_text(fontSize=10)
    counts = {axis: table[axis].nunique() for axis in ("head", "layer")}
    both = both.properties(width=size * counts["head"], height=size * counts["layer"])
    return both.facet(column=alt.Column("kind:N", title=None, sort=list(KINDS))).properties(title=title)


# ---------------------------------------------------------------------------- decoding, step by step


def decode_stepper(trace: AttentionTrace, step: int | None = None) -> alt.VConcatChart:
    """What has been written, the likeliest next tokens, and where the decoder looks then (mean over heads).

    With a slider over the steps; or fixed at `step`, for a still picture.
    """
    last = len(trace.tgt_tokens) - 1
    bind = alt.binding_range(min=0, max=last, step=1, name="decoding step ") if step is None else alt.Undefined
    slider = alt.param(name="step", value=last // 2 if step is None else step, bind=bind)
    at_step = "datum.step == step"
    steps = steps_table(trace)
    written = pd.DataFrame({"i": range(len(trace.next_tokens)), "token": trace.next_tokens})
    sentence = (
        alt.Chart(written)
        .transform_filter("datum.i <= step")
        .mark_text(fontSize=14)
        .encode(
            x=alt.X("i:Q", scale=alt.Scale(domain=[-0.5, last + 0.5], nice=False), axis=None),
            text="token:N",
            color=alt.condition("datum.i == step", alt.value("#e45756"), alt.value("#333333")),
        )
        .properties(width=max(420, 62 * (last + 1)), height=24, title="written so far, and the token of this step")
    )
    candidates = (
        alt.Chart(steps)
        .transform_filter(at_step)
        .mark_bar()
        .encode(
            x=alt.X("probability:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%")),
            y=alt.Y("rank:O", title=None, axis=None),
            color=alt.condition("datum.chosen", alt.value("#e45756"), alt.value("#bab0ac")),
            tooltip=["token", alt.Tooltip("probability", format=".3f"), alt.Tooltip("log_probability", format=".3f")],
        )
    )
    names = (
        candidates.mark_text(align="left", dx=4)
        .encode(text="label:N", color=alt.value("#333333"), x=alt.X("probability:Q"))
        .transform_calculate(label="datum.token + '  ' + format(datum.probability, '.1%')")
    )
    packed = packed_table(mean_over_heads(trace), "cross")
    look = (
        named(unpack(alt.Chart(packed)))
        .transform_filter("datum.row == step")
        .mark_rect()
        .encode(
            x=alt.X("column:O", title=None, axis=token_axis("src", labelAngle=-60)),
            y=alt.Y("layer:O", title="layer"),
            color=alt.Color("weight:Q", scale=WEIGHT, title="weight"),
            tooltip=[t for t in TOOLTIP if t["shorthand"] != "head:O"],
        )
        .properties(
            width=22 * len(trace.src_tokens),
            height=26 * len(trace.weights["cross"]),
            title="where it looks in the source",
        )
    )
    bars = (candidates + names).properties(width=300, height=110, title="likeliest next tokens")
    return alt.vconcat(sentence, alt.hconcat(bars, look, spacing=30)).add_params(*tokens_as_params(trace), slider)


def save_gif(trace: AttentionTrace, path: str | Path, seconds: float = 1.0) -> None:
    """The decode stepper as an animation, one frame a step."""
    frames = []
    for step in range(len(trace.tgt_tokens)):
        chart = decode_stepper(trace, step)
        frames.append(Image.open(io.BytesIO(vl_convert.vegalite_to_png(chart.to_dict(), scale=1.2))).convert("RGB"))
    size = max(f.width for f in frames), max(f.height for f in frames)
    canvases = [Image.new("RGB", size, "white") for _ in frames]
    for canvas, frame in zip(canvases, frames, strict=True):
        canvas.paste(frame)
    first, *rest = (canvas.quantize(64) for canvas in canvases)
    first.save(path, save_all=True, append_images=rest, duration=int(1000 * seconds), loop=0)


# ---------------------------------------------------------------------------- experiments


def step_heat_map(steps: pd.DataFrame, trace: AttentionTrace, value: str = "logit") -> alt.HConcatChart:
    """The step table: words down the columns, the chosen one framed; beside it each step's cross-attention.

    `steps` has step, label, word, `value` and chosen. Attention is the last layer's mean over heads.
    """
    order = list(dict.fromkeys(steps["word"]))
    y = alt.Y("label:N", title=None, sort=alt.SortField("step"), axis=alt.Axis(labelLimit=220, ticks=False))
    base = alt.Chart(steps).encode(x=alt.X("word:N", title=None, sort=order, axis=alt.Axis(labelAngle=-60)), y=y)
    scale = alt.Scale(scheme="blues", **({"domain": [0, 1]} if value == "probability" else {}))
    squares = base.mark_rect().encode(
        color=alt.Color(f"{value}:Q", scale=scale, title=value),
        tooltip=["label", "word", alt.Tooltip("logit", format=".2f"), alt.Tooltip("probability", format=".3f")],
    )
    frames = base.transform_filter("datum.chosen").mark_rect(fillOpacity=0, stroke="#e45756", strokeWidth=2)
    numbers = base.mark_text(fontSize=9).encode(
        text=alt.Text(f"{value}:Q", format=".1f" if value == "logit" else ".2f")
    )
    size = {"height": 22 * steps["step"].nunique()}
    left = (squares + frames + numbers).properties(
        width=30 * len(order), title=f"{value} of each word, chosen framed", **size
    )
    mean = mean_over_heads(trace)
    layer = len(mean.weights["cross"]) - 1
    packed = packed_table(mean, "cross", layer)
    look = heat_map(named(unpack(alt.Chart(packed))), "cross").properties(
        width=22 * len(trace.src_tokens), title="what the step looks at", **size
    )
    return alt.hconcat(left, look, spacing=20).resolve_scale(color="independent").add_params(*tokens_as_params(trace))


def variants_chart(table: pd.DataFrame) -> alt.HConcatChart:
    """Each variant's change of the log-probability, with the translation it makes."""
    y = alt.Y("variant:N", title=None, sort=table["variant"].tolist(), axis=alt.Axis(labelLimit=300))
    size = {"height": 20 * len(table)}
    bars = (
        alt.Chart(table)
        .mark_bar(color="#e45756")
        .encode(
            x=alt.X("change:Q", title="change of the baseline output's log-probability (nats)"),
            y=y,
            tooltip=["variant", "says", "translation"],
        )
    )
    texts = (
        alt.Chart(table)
        .mark_text(align="left", limit=460)
        .encode(
            x=alt.value(0),
            y=alt.Y("variant:N", title=None, sort=table["variant"].tolist(), axis=None),
            text="translation:N",
        )
    )
    return alt.hconcat(bars.properties(width=260, **size), texts.properties(width=460, title="translation", **size))


def difference(
    before: AttentionTrace, after: AttentionTrace, kind: str, layer: int, head: int, square: float = 18
) -> alt.HConcatChart:
    """One head of two traces over the same tokens, and the second less the first on a scale from -1 to 1."""
    if (before.src_tokens, before.tgt_tokens) != (after.src_tokens, after.tgt_tokens):
        raise ValueError(
            "the two traces are of different tokens; trace the variant with the baseline's translation as target"
        )
    less = after.weights[kind] - before.weights[kind]
    both = AttentionTrace(**{**vars(after), "weights": {**after.weights, kind: less}})
    diverging = alt.Color("weight:Q", scale=alt.Scale(domain=[-1, 1], clamp=True, scheme="redblue"), title="difference")
    drawn = []
    for trace, title in ((before, "before"), (after, "after"), (both, "after less before")):
        packed = packed_table(trace, kind, layer, head)
        chart = sized(heat_map(named(unpack(alt.Chart(packed))), kind), trace, kind, square)
        drawn.append((chart.encode(color=diverging) if trace is both else chart).properties(title=title))
    joined = alt.hconcat(*drawn).resolve_scale(color="independent").add_params(*tokens_as_params(before))
    return joined.properties(title=f"{caption(kind)}, layer {layer}, head {head}")


def importance_chart(importance: pd.DataFrame, value: str = "bleu_drop") -> alt.FacetChart:
    """What is lost with each head off."""
    return heads_heat_map(
        importance, value, f"{value.replace('_', ' ')} with one head off", alt.Scale(scheme="oranges")
    )


# ---------------------------------------------------------------------------- saving and showing


def save_png(chart: alt.TopLevelMixin, path: str | Path, scale: float = 2.0) -> None:
    Path(path).write_bytes(vl_convert.vegalite_to_png(chart.to_dict(), scale=scale))


def show_in_notebooks() -> None:
    """Charts in a notebook: interactive in JupyterLab without a network, and a PNG for every other reader.

    Altair's own mimetype renderer is refused by nbclient. In Colab, which knows no Vega, its html one is used.
    """
    try:
        import google.colab  # noqa: F401
    except ImportError:
        alt.renderers.register("both", render_both)
        alt.renderers.enable("both")
    else:
        alt.renderers.enable("html", embed_options={"renderer": "canvas"})


def render_both(spec: dict, **_) -> dict:
    png = vl_convert.vegalite_to_png(spec, ppi=96)
    return {
        "application/vnd.vegalite.v5+json": spec,
        "image/png": base64.b64encode(png).decode(),
        "text/plain": f"<{spec.get('title', 'chart')}>",
    }
