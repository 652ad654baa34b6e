"""The interactive explorer of an AttentionTrace, and HTML pages that work offline.

    L  layers    H  heads

The parts of the explorer share Vega parameters: `kind`, the kind of attention; `pick`, the selected layer and head;
`hover`, the row under the pointer; `least`, the smallest weight shown; `src` and `tgt`, the tokens.
"""

from pathlib import Path

import altair as alt
import pandas as pd

from interpret.charts import (
    HIGHLIGHT,
    TOOLTIP,
    WEIGHT_COLOR,
    WEIGHT_SCALE,
    decode_stepper,
    difference,
    importance_heat_map,
    step_heat_map,
    token_axis,
    token_params,
    unpack,
    variant_bars,
    with_tokens,
)
from interpret.measures import packed_table
from interpret.trace import KINDS, AttentionTrace

CAUTION = "Attention shows where a head reads. It does not explain the output, and only some heads align words."
ROW_LABELS = "A row is labeled with the token that the decoder reads; the token that it predicts labels the next row."
QUERY_TOKENS, KEY_TOKENS = "kind == 'encoder' ? src : tgt", "kind == 'decoder' ? tgt : src"  # Vega expressions

# ---------------------------------------------------------------------------- the explorer


def explorer(trace: AttentionTrace) -> alt.VConcatChart:
    """All heads as thumbnails; the selected head as a heat map and as lines; one row of it as bars.

    A click, the slider or the menu selects a head. The pointer on the heat map selects a row.
    """
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
    selected = with_tokens(unpack(heads.transform_filter(pick)))
    longest = max(len(trace.src_tokens), len(trace.tgt_tokens))
    top = alt.hconcat(thumbnails(heads, L, H, pick), selected_heat_map(selected, longest, hover), spacing=30)
    bottom = alt.hconcat(selected_lines(selected, longest, hover), row_bars(selected, longest, hover), spacing=30)
    return alt.vconcat(top, bottom, spacing=20).add_params(*token_params(trace), kind, least)


def thumbnails(heads: alt.Chart, L: int, H: int, pick: alt.Parameter) -> alt.LayerChart:
    """Each head as a unit square at (head, layer); the selected one is framed."""
    filled = 0.94  # of a square; the rest is the gap to the next one
    side = min(120.0, 520 / H)
    weights = with_tokens(unpack(heads)).transform_calculate(
        x0=f"datum.head + datum.column / datum.columns * {filled}",
        x1=f"datum.head + (datum.column + 1) / datum.columns * {filled}",
        y0=f"datum.layer + datum.row / datum.rows * {filled}",
        y1=f"datum.layer + (datum.row + 1) / datum.rows * {filled}",
    )

    def axis(count: int) -> alt.Axis:
        centers = [i + filled / 2 for i in range(count)]
        return alt.Axis(values=centers, labelExpr="floor(datum.value)", grid=False, ticks=False, domain=False)

    cells = weights.mark_rect().encode(
        x=alt.X("x0:Q", scale=alt.Scale(domain=[0, H], nice=False), axis=axis(H), title="head"),
        x2="x1:Q",
        y=alt.Y("y0:Q", scale=alt.Scale(domain=[0, L], nice=False, reverse=True), axis=axis(L), title="layer"),
        y2="y1:Q",
        color=alt.Color("weight:Q", scale=WEIGHT_SCALE, legend=None),
        stroke=alt.Stroke("weight:Q", scale=WEIGHT_SCALE, legend=None),  # hides the hairlines between cells
        strokeWidth=alt.value(0.6),
    )
    frames = (
        heads.transform_calculate(
            x0="datum.head", x1=f"datum.head + {filled}", y0="datum.layer", y1=f"datum.layer + {filled}"
        )
        .mark_rect(fillOpacity=0, strokeWidth=3, cursor="pointer")
        .encode(
            x="x0:Q",
            x2="x1:Q",
            y="y0:Q",
            y2="y1:Q",
            stroke=alt.condition(pick, alt.value(HIGHLIGHT), alt.value("#dddddd")),
            tooltip=[alt.Tooltip("layer:O"), alt.Tooltip("head:O")],
        )
        .add_params(pick)
    )
    return (cells + frames).properties(width=side * H, height=side * L, title="All heads; click to select one")


def selected_heat_map(selected: alt.Chart, longest: int, hover: alt.Parameter) -> alt.Chart:
    """The heat map of the selected head; the pointer selects a row."""
    side = min(24 * longest, 460)
    return (
        selected.mark_rect()
        .encode(
            x=alt.X("column:O", title="key (attended to)", axis=token_axis(KEY_TOKENS, labelAngle=-60)),
            y=alt.Y("row:O", title="query (attends)", axis=token_axis(QUERY_TOKENS)),
            color=WEIGHT_COLOR,
            opacity=alt.condition("datum.weight >= least", alt.value(1), alt.value(0.05)),
            stroke=alt.condition(hover, alt.value(HIGHLIGHT), alt.value(None)),
            tooltip=TOOLTIP,
        )
        .add_params(hover)
        .properties(width=side, height=side, title="Selected head")
    )


def selected_lines(selected: alt.Chart, longest: int, hover: alt.Parameter) -> alt.LayerChart:
    """Queries on the left, keys on the right, one line per weight; the row under the pointer is highlighted."""
    y = alt.Y("row:Q", scale=alt.Scale(domain=[-0.5, longest - 0.5], reverse=True, nice=False), axis=None)
    x = alt.X("x0:Q", scale=alt.Scale(domain=[-0.6, 1.6], nice=False), axis=None)
    lines = (
        selected.transform_filter("datum.weight >= max(least, 0.01)")
        .transform_calculate(x0="0", x1="1")
        .mark_rule()
        .encode(
            x=x,
            x2="x1:Q",
            y=y,
            y2="column:Q",
            opacity=alt.Opacity("weight:Q", scale=alt.Scale(domain=[0, 1], range=[0.05, 1]), legend=None),
            strokeWidth=alt.StrokeWidth("weight:Q", scale=alt.Scale(domain=[0, 1], range=[0.5, 5]), legend=None),
            color=alt.condition(hover, alt.value(HIGHLIGHT), alt.value("#4c78a8")),
            tooltip=TOOLTIP,
        )
    )
    sides = alt.Chart(pd.DataFrame({"side": ["query", "key"], "x0": [-0.03, 1.03]}))
    tokens = [
        sides.transform_filter(f"datum.side == '{side}'")
        .transform_calculate(token=tokens, row=f"sequence(length({tokens}))")
        .transform_flatten(["token", "row"])
        .mark_text(align=align, fontSize=12)
        .encode(x=x, y=y, text="token:N")
        for side, align, tokens in (("query", "right", QUERY_TOKENS), ("key", "left", KEY_TOKENS))
    ]
    return alt.layer(lines, *tokens).properties(width=420, height=18 * longest, title="Queries (left) and keys (right)")


def row_bars(selected: alt.Chart, longest: int, hover: alt.Parameter) -> alt.Chart:
    """The weights of the row under the pointer as bars."""
    return (
        selected.transform_filter(hover)
        .mark_bar(color=HIGHLIGHT)
        .encode(
            x=alt.X("weight:Q", scale=alt.Scale(domain=[0, 1])),
            y=alt.Y("column:O", title=None, axis=token_axis(KEY_TOKENS)),
            tooltip=TOOLTIP,
        )
        .properties(width=300, height=18 * longest, title="Weights of the row under the pointer")
    )


# ---------------------------------------------------------------------------- pages

STYLE = """<style>
  body { font-family: sans-serif; margin: 16px; }
  body #vis.vega-embed { display: flex; flex-direction: column-reverse; align-items: flex-start; }
  form.vega-bindings { margin: 0 0 12px 0; display: flex; flex-wrap: wrap; gap: 4px 28px; }
  form.vega-bindings .vega-bind-radio label { margin-right: 8px; }
</style>
"""  # the controls above the chart


def trace_page(trace: AttentionTrace) -> alt.VConcatChart:
    """The explorer, with the decode stepper below."""
    sentences = " ".join(trace.src_tokens[1:-1]) + "  →  " + " ".join(trace.tgt_tokens[1:])
    return alt.vconcat(explorer(trace), decode_stepper(trace), spacing=40).properties(
        title=page_title(sentences, trace)
    )


def report_page(
    sentence: str,
    trace: AttentionTrace,
    corrupted: AttentionTrace,
    steps: pd.DataFrame,
    table: pd.DataFrame,
    importance: pd.DataFrame | None,
) -> alt.VConcatChart:
    """The results of experiments.py: step table, variants, one corrupted head, and head importance where measured.

    `corrupted` is the trace of the same translation with uniform cross-attention.
    """
    uniform = difference(trace, corrupted, "cross", len(trace.weights["cross"]) - 1, 0)
    parts = [step_heat_map(steps, trace), variant_bars(table), uniform]
    if importance is not None:
        parts.append(importance_heat_map(importance))
    report = alt.vconcat(*parts, spacing=40).resolve_scale(color="independent")
    return report.properties(title=page_title(sentence, trace))


def page_title(text: str, trace: AttentionTrace) -> alt.TitleParams:
    return alt.TitleParams(text, subtitle=[f"run {trace.run}", CAUTION, ROW_LABELS], anchor="start", fontSize=16)


def save_page(trace: AttentionTrace, path: str | Path) -> None:
    """Writes the explorer and the decode stepper as one .html file."""
    save_html(trace_page(trace), path)


def save_html(chart: alt.TopLevelMixin, path: str | Path) -> None:
    """Writes a chart as one .html file that contains its scripts, so that it works offline."""
    html = chart.to_html(inline=True, embed_options={"renderer": "canvas", "actions": False})
    Path(path).write_text(html.replace("<head>", f"<head>\n<title>Attention</title>\n{STYLE}", 1), encoding="utf8")
