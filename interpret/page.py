"""The explorer, the offline page, and how charts are saved and shown."""

from pathlib import Path

import altair as alt
import pandas as pd

from interpret.charts import (
    NOTE,
    TOOLTIP,
    WEIGHT,
    decode_stepper,
    difference,
    importance_chart,
    named,
    step_heat_map,
    token_axis,
    tokens_as_params,
    unpack,
    variants_chart,
)
from interpret.measures import packed_table
from interpret.trace import KINDS, AttentionTrace

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
