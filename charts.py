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

from tracing import KINDS, AttentionTrace, mean_over_heads, packed_table, rollout, steps_table

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


# ---------------------------------------------------------------------------- the explorer


def explorer(trace: AttentionTrace) -> alt.VConcatChart:
    """All heads as thumbnails; a click, the slider or the menu picks one, drawn as heat map, lines and bars in step."""
    packed = packed_table(trace)
    L, H = int(packed["layer"].max()) + 1, int(packed["head"].max()) + 1
    kind = alt.param(name="kind", value="cross", bind=alt.binding_radio(options=list(KINDS), name="attention "))
    least = alt.param(
        name="least", value=0.0, bind=alt.binding_range(min=0, max=0.5, step=0.01, name="hide weights below ")
    )
    pick = alt.selection_point(
        name="pick",
        fields=["layer", "head"],
        on="click",
        toggle=False,
        empty=False,
        value=[{"layer": len(trace.weights["cross"]) - 1, "head": 0}],
        bind={
            "layer": alt.binding_range(min=0, max=L - 1, step=1, name="layer "),
            "head": alt.binding_select(options=list(range(H)), name="head "),
        },
    )
    hover = alt.selection_point(
        name="hover", fields=["row"], on="pointerover", clear=False, toggle=False, empty=False, value=[{"row": 1}]
    )
    heads = alt.Chart(packed).transform_filter("datum.kind == kind")
    picked = named(unpack(heads.transform_filter(pick)))
    top = alt.hconcat(thumbnails(heads, L, H, pick), large(picked, trace, hover), spacing=30)
    bottom = alt.hconcat(lines(picked, trace, hover), row_bars(picked, trace, hover), spacing=30)
    return alt.vconcat(top, bottom, spacing=20).add_params(*tokens_as_params(trace), kind, least)


def thumbnails(heads: alt.Chart, L: int, H: int, pick: alt.Parameter) -> alt.LayerChart:
    """Each head squeezed into a unit square at (head, layer), the picked one framed."""
    gap = 0.94
    side = min(120.0, 520 / H)
    cells = named(unpack(heads)).transform_calculate(
        x0=f"datum.head + datum.column / datum.columns * {gap}",
        x1=f"datum.head + (datum.column + 1) / datum.columns * {gap}",
        y0=f"datum.layer + datum.row / datum.rows * {gap}",
        y1=f"datum.layer + (datum.row + 1) / datum.rows * {gap}",
    )
    x_axis = alt.Axis(
        values=[h + gap / 2 for h in range(H)], labelExpr="floor(datum.value)", grid=False, ticks=False, domain=False
    )
    y_axis = alt.Axis(
        values=[i + gap / 2 for i in range(L)], labelExpr="floor(datum.value)", grid=False, ticks=False, domain=False
    )
    squares = cells.mark_rect().encode(
        x=alt.X("x0:Q", scale=alt.Scale(domain=[0, H], nice=False), axis=x_axis, title="head"),
        x2="x1:Q",
        y=alt.Y("y0:Q", scale=alt.Scale(domain=[0, L], nice=False, reverse=True), axis=y_axis, title="layer"),
        y2="y1:Q",
        color=alt.Color("weight:Q", scale=WEIGHT, legend=None),
        stroke=alt.Stroke("weight:Q", scale=WEIGHT, legend=None),  # covers the hairlines between squares
        strokeWidth=alt.value(0.6),
    )
    frame = (
        heads.transform_calculate(
            x0="datum.head", x1=f"datum.head + {gap}", y0="datum.layer", y1=f"datum.layer + {gap}"
        )
        .mark_rect(fillOpacity=0, strokeWidth=3, cursor="pointer")
        .encode(
            x="x0:Q",
            x2="x1:Q",
            y="y0:Q",
            y2="y1:Q",
            stroke=alt.condition(pick, alt.value("#e45756"), alt.value("#dddddd")),
            tooltip=[alt.Tooltip("layer:O"), alt.Tooltip("head:O")],
        )
        .add_params(pick)
    )
    return (squares + frame).properties(width=side * H, height=side * L, title="click a head")


def large(picked: alt.Chart, trace: AttentionTrace, hover: alt.Parameter) -> alt.Chart:
    """The picked head's heat map; the pointer picks a row."""
    longest = max(len(trace.src_tokens), len(trace.tgt_tokens))
    side = min(24 * longest, 460)
    return (
        picked.mark_rect()
        .encode(
            x=alt.X(
                "column:O",
                title="key: what is looked at",
                axis=token_axis("kind == 'decoder' ? tgt : src", labelAngle=-60),
            ),
            y=alt.Y("row:O", title="query: what is computed", axis=token_axis("kind == 'encoder' ? src : tgt")),
            color=alt.Color("weight:Q", scale=WEIGHT, title="weight"),
            opacity=alt.condition("datum.weight >= least", alt.value(1), alt.value(0.05)),
            stroke=alt.condition(hover, alt.value("#e45756"), alt.value(None)),
            tooltip=TOOLTIP,
        )
        .add_params(hover)
        .properties(width=side, height=side, title="the picked head")
    )


def lines(picked: alt.Chart, trace: AttentionTrace, hover: alt.Parameter) -> alt.LayerChart:
    """Queries on the left, keys on the right, a line for each weight; the row under the pointer stands out."""
    longest = max(len(trace.src_tokens), len(trace.tgt_tokens))
    y = alt.Y("row:Q", scale=alt.Scale(domain=[-0.5, longest - 0.5], reverse=True, nice=False), axis=None)
    x = alt.X("x0:Q", scale=alt.Scale(domain=[-0.6, 1.6], nice=False), axis=None)
    rules = (
        picked.transform_filter("datum.weight >= max(least, 0.01)")
        .transform_calculate(x0="0", x1="1")
        .mark_rule()
        .encode(
            x=x,
            x2="x1:Q",
            y=y,
            y2="column:Q",
            opacity=alt.Opacity("weight:Q", scale=alt.Scale(domain=[0, 1], range=[0.05, 1]), legend=None),
            strokeWidth=alt.StrokeWidth("weight:Q", scale=alt.Scale(domain=[0, 1], range=[0.5, 5]), legend=None),
            color=alt.condition(hover, alt.value("#e45756"), alt.value("#4c78a8")),
            tooltip=TOOLTIP,
        )
    )
    sides = alt.Chart(pd.DataFrame({"side": ["query", "key"], "x0": [-0.03, 1.03]}))
    texts = [
        sides.transform_filter(f"datum.side == '{side}'")
        .transform_calculate(token=tokens, row=f"sequence(length({tokens}))")
        .transform_flatten(["token", "row"])
        .mark_text(align=align, fontSize=12)
        .encode(x=x, y=y, text="token:N")
        for side, align, tokens in (
            ("query", "right", "kind == 'encoder' ? src : tgt"),
            ("key", "left", "kind == 'decoder' ? tgt : src"),
        )
    ]
    return alt.layer(rules, *texts).properties(width=420, height=18 * longest, title="from query to key")


def row_bars(picked: alt.Chart, trace: AttentionTrace, hover: alt.Parameter) -> alt.Chart:
    """The row under the pointer as bars."""
    longest = max(len(trace.src_tokens), len(trace.tgt_tokens))
    return (
        picked.transform_filter(hover)
        .mark_bar(color="#e45756")
        .encode(
            x=alt.X("weight:Q", scale=alt.Scale(domain=[0, 1])),
            y=alt.Y("column:O", title=None, axis=token_axis("kind == 'decoder' ? tgt : src")),
            tooltip=TOOLTIP,
        )
        .properties(width=300, height=18 * longest, title="the row under the pointer")
    )


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


def report_page(
    sentence: str,
    trace: AttentionTrace,
    corrupted: AttentionTrace,
    steps: pd.DataFrame,
    table: pd.DataFrame,
    importance: pd.DataFrame | None,
) -> alt.VConcatChart:
    """Everything that experiments.py found; `corrupted` is the trace with uniform cross-attention."""
    uniform = difference(trace, corrupted, "cross", len(trace.weights["cross"]) - 1, 0)
    parts = [step_heat_map(steps, trace), variants_chart(table), uniform]
    if importance is not None:
        parts.append(importance_chart(importance))
    title = alt.TitleParams(sentence, subtitle=[f"run {trace.run}", NOTE], anchor="start", fontSize=16)
    return alt.vconcat(*parts, spacing=40).resolve_scale(color="independent").properties(title=title)


# ---------------------------------------------------------------------------- saving and showing


def page(trace: AttentionTrace) -> alt.VConcatChart:
    """Explorer and decode stepper in one chart."""
    sentence = " ".join(trace.src_tokens[1:-1]) + "  →  " + " ".join(trace.tgt_tokens[1:])
    title = alt.TitleParams(sentence, subtitle=[f"run {trace.run}", NOTE], anchor="start", fontSize=16)
    return alt.vconcat(explorer(trace), decode_stepper(trace), spacing=40).properties(title=title)


STYLE = """<style>
  body { font-family: sans-serif; margin: 16px; }
  body #vis.vega-embed { display: flex; flex-direction: column-reverse; align-items: flex-start; }
  form.vega-bindings { margin: 0 0 12px 0; display: flex; flex-wrap: wrap; gap: 4px 28px; }
  form.vega-bindings .vega-bind-radio label { margin-right: 8px; }
</style>
"""


def save_page(trace: AttentionTrace, path: str | Path) -> None:
    """Explorer and decode stepper as one .html file."""
    save_html(page(trace), path)


def save_html(chart: alt.TopLevelMixin, path: str | Path) -> None:
    """A file that needs nothing but a browser, not even a network; the controls stand above the chart."""
    html = chart.to_html(inline=True, embed_options={"renderer": "canvas", "actions": False})
    Path(path).write_text(html.replace("<head>", f"<head>\n<title>Attention</title>\n{STYLE}", 1), encoding="utf8")


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
