"""Interactive views of an AttentionTrace, each a chart of one view: for the offline page and for the live explorer.

    L  layers    H  heads    Q  query positions (rows)    K  key positions (columns)

The views share Vega parameters, whose values `view_state` gives. A page or an app sets them to move all views at once:

    kind      encoder, decoder or cross
    picked    the selected heads, such as ["1.3", "0.mean"]: layer and head; views show the mean of several
    t         the row in focus. Between two rows, as in 2.4, views show a mixture, so that a film has no jumps
    key       the key in focus, or -1
    film      whether tokens that are not written yet are hidden

The other parameters describe the sentence: `src`, `tgt` and `out` are the tokens of the source, those that the decoder
reads and those that it writes; `rows` are labels such as "una → mela"; `place` holds positions of tokens in pixels.
The marks that can be clicked have `layer` and `head`, or `row`, or `column` in their data.
"""

import unicodedata

import altair as alt
import pandas as pd

from interpret.measures import candidates_table, gallery_table
from interpret.trace import KINDS, AttentionTrace

WEIGHT_SCALE = alt.Scale(domain=[0, 1], clamp=True, range="heatmap")  # the colors are those of the theme
HEADS, CANDIDATES = alt.NamedData("heads"), alt.NamedData("candidates")
KEYS, ROWS = "(kind == 'decoder' ? tgt : src)", "rows[kind]"  # Vega expressions: lists of labels
GAP = 12  # pixels between two tokens

# ---------------------------------------------------------------------------- data and parameters


def view_data(trace: AttentionTrace) -> dict[str, pd.DataFrame]:
    """The named data of the views."""
    return {"heads": gallery_table(trace), "candidates": candidates_table(trace)}


def view_state(trace: AttentionTrace) -> dict:
    """The value of every parameter: at first, cross-attention of the last layer, averaged over heads."""
    last = len(trace.weights["cross"]) - 1
    return {
        "kind": "cross", "picked": [f"{last}.mean"], "t": 0, "key": -1, "film": False,
        "src": trace.src_tokens, "tgt": trace.tgt_tokens, "out": trace.next_tokens,
        "rows": {kind: trace.row_labels(kind) for kind in KINDS},
        "layers": {kind: len(trace.weights[kind]) for kind in KINDS},
        "heads": list(gallery_table(trace)["head"].unique()),
        "place": {kind: token_places(trace, kind) for kind in KINDS},
    }  # fmt: skip


def view_params(state: dict) -> list[alt.Parameter]:
    """The parameters of a view with these values."""
    return [alt.param(name=name, value=value) for name, value in state.items()]


def token_places(trace: AttentionTrace, kind: str) -> dict:
    """Centers and widths in pixels of the tokens in two rows: above the keys, below the queries; and their width."""
    above = trace.labels(kind)[1]
    below = trace.src_tokens if kind == "encoder" else trace.next_tokens
    widths = {"above": [text_width(token) for token in above], "below": [text_width(token) for token in below]}
    total = max(sum(row) + GAP * (len(row) + 1) for row in widths.values())
    places = {"width": total}
    for name, row in widths.items():
        gap = (total - sum(row)) / (len(row) + 1)  # the shorter row is spread to the same width
        starts = [sum(row[:i]) + gap * (i + 1) for i in range(len(row))]
        places[name] = [round(start + width / 2) for start, width in zip(starts, row, strict=True)]
        places[f"{name}_width"] = row
    return places


def text_width(text: str) -> int:
    """Approximate width in pixels of a token with its margins."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    narrow = sum(c in "iljtfrI.,;:'!|[]() " for c in text)
    return round(18 + 14 * wide + 4.6 * narrow + 8.2 * (len(text) - wide - narrow))


# ---------------------------------------------------------------------------- parts


def unpack(chart: alt.Chart) -> alt.Chart:
    """Turns each packed row into one row per weight: kind, layer, head, row, column, weight; drops masked cells."""
    return (
        chart.transform_calculate(w="split(datum.w, ',')")
        .transform_calculate(i="sequence(length(datum.w))", rows="length(datum.w) / datum.columns")
        .transform_flatten(["w", "i"])
        .transform_calculate(
            weight="datum.w / 10000", row="floor(datum.i / datum.columns)", column="datum.i % datum.columns"
        )
        .transform_filter("datum.kind != 'decoder' || datum.column <= datum.row")
    )


def token_axis(tokens: str, **options) -> alt.Axis:
    """An axis over positions; `tokens` is a Vega expression for the list of labels, such as "src"."""
    options = {"labelLimit": 110, "labelOverlap": False, "ticks": False, "domain": False, **options}
    return alt.Axis(labelExpr=f"({tokens})[datum.value]", **options)


def selected(heads: alt.Data) -> alt.Chart:
    """The weights of the picked heads, averaged: row, column, weight."""
    chart = alt.Chart(heads).transform_filter(
        "datum.kind == kind && indexof(picked, datum.layer + '.' + datum.head) >= 0"
    )
    return unpack(chart).transform_aggregate(weight="mean(weight)", groupby=["row", "column"])


def in_focus(chart: alt.Chart) -> alt.Chart:
    """The weights of the row in focus: column, weight. Between two rows, their mixture."""
    return (
        chart.transform_filter("abs(datum.row - t) < 1")
        .transform_calculate(part="datum.weight * (1 - abs(datum.row - t))")  # a new field: Vega runs this at every t
        .transform_aggregate(weight="sum(part)", groupby=["column"])
        .transform_calculate(token=f"{KEYS}[datum.column]")
    )


def tooltip(chart: alt.Chart) -> alt.Chart:
    """Adds a tooltip to marks with row, column and weight."""
    named = chart.transform_calculate(row_token=f"{ROWS}[datum.row]", column_token=f"{KEYS}[datum.column]")
    return named.encode(
        tooltip=[
            alt.Tooltip("row_token:N", title="row (query)"),
            alt.Tooltip("column_token:N", title="column (key)"),
            alt.Tooltip("weight:Q", format=".4f"),
        ]
    )


# ---------------------------------------------------------------------------- views


def gallery(heads: alt.Data = HEADS) -> alt.LayerChart:
    """A thumbnail of each head of the kind, of each layer's mean and rollout; the picked ones are framed."""
    filled = 0.92  # of a square; the rest is the gap to the next one
    kind = alt.Chart(heads).transform_filter("datum.kind == kind")

    def axis(labels: str, count: str, **options) -> alt.Axis:
        ticks = alt.ExprRef(f"sequence({filled / 2}, {count})")
        plain = {"grid": False, "ticks": False, "domain": False, "labelOverlap": False}
        return alt.Axis(values=ticks, labelExpr=labels, **plain, **options)

    def scale(count: str, **options) -> alt.Scale:
        return alt.Scale(domain=[0, alt.ExprRef(count)], nice=False, **options)

    x = {"scale": scale("length(heads)"), "axis": axis("heads[floor(datum.value)]", "length(heads)", orient="top")}
    y = {"scale": scale("layers[kind]", reverse=True), "axis": axis("'layer ' + floor(datum.value)", "layers[kind]")}
    place = {"x": alt.X("x0:Q", title=None, **x), "x2": "x1:Q", "y": alt.Y("y0:Q", title=None, **y), "y2": "y1:Q"}
    cells = (
        unpack(kind)
        .transform_filter("datum.weight > 0.004")  # the outline has the color of 0
        .transform_calculate(
            x0=f"datum.slot + datum.column / datum.columns * {filled}",
            x1=f"datum.slot + (datum.column + 1) / datum.columns * {filled}",
            y0=f"datum.layer + datum.row / datum.rows * {filled}",
            y1=f"datum.layer + (datum.row + 1) / datum.rows * {filled}",
        )
        .mark_rect(cursor="pointer")
        .encode(**place, color=alt.Color("weight:Q", scale=WEIGHT_SCALE, legend=None))
    )
    squares = kind.transform_calculate(
        x0="datum.slot", x1=f"datum.slot + {filled}", y0="datum.layer", y1=f"datum.layer + {filled}"
    )
    outlines = squares.mark_rect(style="empty", cursor="pointer").encode(**place)
    picked = squares.transform_filter("indexof(picked, datum.layer + '.' + datum.head) >= 0")
    return outlines + cells + picked.mark_rect(style="frame", cursor="pointer").encode(**place)


def head_heat_map(heads: alt.Data = HEADS) -> alt.LayerChart:
    """The picked heads as a heat map, with numbers in the cells where they fit; the row in focus is framed."""
    base = selected(heads).encode(
        x=alt.X("column:O", title=None, axis=token_axis(KEYS, labelAngle=-50, labelPadding=7, orient="top")),
        y=alt.Y("row:O", title=None, axis=token_axis(ROWS, labelLimit=170)),
    )
    cells = tooltip(
        base.mark_rect(cursor="pointer").encode(color=alt.Color("weight:Q", scale=WEIGHT_SCALE, legend=None))
    )
    numbers = base.transform_filter(f"datum.weight >= 0.005 && width / length({KEYS}) >= 26").encode(
        text=alt.Text("weight:Q", format=".2f")
    )
    low = numbers.transform_filter("datum.weight < 0.5").mark_text(style="low", fontSize=11)
    high = numbers.transform_filter("datum.weight >= 0.5").mark_text(style="high", fontSize=11)
    row = f"height / length({ROWS})"
    frame = (
        alt.Chart(alt.Data(values=[{}]))
        .mark_rect(style="frame")
        .encode(
            x=alt.value(0),
            x2=alt.value("width"),
            y=alt.value(alt.ExprRef(f"t * {row}")),
            y2=alt.value(alt.ExprRef(f"(t + 1) * {row}")),
        )
    )
    return alt.layer(cells, low, high, frame)


def row_bars(heads: alt.Data = HEADS) -> alt.LayerChart:
    """The weights of the row in focus as bars, with four decimals."""
    y = alt.Y("column:O", title=None, axis=token_axis(KEYS))
    x = alt.X("weight:Q", title=None, scale=alt.Scale(domain=[0, 1.18], nice=False), axis=None)  # room for the numbers
    base = in_focus(selected(heads)).encode(x=x, y=y)
    bars = base.mark_bar(style="read", cornerRadiusEnd=3).encode(
        tooltip=[alt.Tooltip("token:N"), alt.Tooltip("weight:Q", format=".4f")]
    )
    return bars + base.mark_text(style="muted", align="left", dx=4).encode(text=alt.Text("weight:Q", format=".4f"))


def top_keys(heads: alt.Data = HEADS, top_k: int = 3) -> alt.LayerChart:
    """The `top_k` keys with the largest weights of the row in focus, for every head of the kind: one line per head."""
    chart = alt.Chart(heads).transform_filter("datum.kind == kind && isValid(toNumber(datum.head))")
    head = ["layer", "head"]
    largest = (
        unpack(chart)
        .transform_filter("datum.row == floor(t + 0.5)")
        .transform_window(rank="row_number()", sort=[alt.SortField("weight", "descending")], groupby=head)
        .transform_filter(f"datum.rank <= {top_k}")
        .transform_calculate(
            name="'layer ' + datum.layer + ', head ' + datum.head",
            order="1000 * datum.layer + toNumber(datum.head)",
            token=f"{KEYS}[datum.column]",
        )
    )
    y = alt.Y(
        "name:N", title=None, sort=alt.SortField("order"), axis=alt.Axis(ticks=False, domain=False, labelPadding=8)
    )

    def placed(x0: str, x1: str = "0") -> alt.Chart:
        """Each rank has a column of width 1; x0 and x1 are places in it."""
        x = alt.X("x0:Q", title=None, scale=alt.Scale(domain=[1, top_k + 1], nice=False), axis=None)
        moved = largest.transform_calculate(x0=f"datum.rank + {x0}", x1=f"datum.rank + {x1}")
        return moved.encode(x=x, y=y, tooltip=["name:N", "token:N", alt.Tooltip("weight:Q", format=".4f")])

    line = {"height": 4, "yOffset": 9, "cornerRadius": 2}
    return alt.layer(
        placed("0", "0.94").mark_bar(style="token", **line).encode(x2="x1:Q"),
        placed("0", "0.94 * datum.weight").mark_bar(style="read", **line).encode(x2="x1:Q"),
        placed("0").mark_text(style="label", align="left", dy=-1).encode(text="token:N"),
        placed("0.94").mark_text(style="muted", align="right", dy=-1).encode(text=alt.Text("weight:Q", format=".4f")),
    )


def candidate_bars(candidates: alt.Data = CANDIDATES) -> alt.LayerChart:
    """The most probable next tokens of the step in focus; that of the translation is highlighted."""
    near = alt.Chart(candidates).transform_filter("abs(datum.step - t) < 1")
    shared = near.transform_calculate(share="1 - abs(datum.step - t)")
    x = alt.X("probability:Q", title=None, scale=alt.Scale(domain=[0, 1]), axis=None)
    y = alt.Y("rank:O", title=None, axis=None, scale=alt.Scale(paddingInner=0.62, paddingOuter=0.5))
    bars = (
        shared.transform_calculate(p="datum.probability * datum.share", on="datum.chosen * datum.share")
        .transform_aggregate(probability="sum(p)", on="sum(on)", groupby=["rank"])
        .encode(x=x, y=y)
    )
    opacity = alt.Opacity("on:Q", scale=alt.Scale(domain=[0, 1], range=[0, 1]), legend=None)
    visible = alt.Opacity("visible:Q", scale=alt.Scale(domain=[0, 1], range=[0, 1]), legend=None)
    labels = shared.transform_calculate(
        visible="max(0, 2 * datum.share - 1)", p="format(datum.probability, '.1%')"
    ).encode(y=y, opacity=visible, tooltip=["token:N", alt.Tooltip("log_probability:Q", format=".4f")])
    return alt.layer(
        bars.mark_bar(style="bar", cornerRadiusEnd=3),
        bars.mark_bar(style="chosen", cornerRadiusEnd=3).encode(opacity=opacity),
        labels.mark_text(style="label", align="left", dy=-17, limit=200).encode(x=alt.value(0), text="token:N"),
        labels.mark_text(style="muted", align="right", dy=-17).encode(x=alt.value("width"), text="p:N"),
    )


def ribbons(heads: alt.Data = HEADS) -> alt.LayerChart:
    """Two rows of tokens, above the keys that are read, below the queries; a ribbon is as wide as its weight.

    The ribbons of the row in focus, or of the key in focus, stand out.
    """
    weights = selected(heads)
    row = weights.transform_filter("datum.weight > 0.02 && (!film || datum.row <= t)")
    row = row.transform_calculate(x0="place[kind].above[datum.column]", x1="place[kind].below[datum.row]")
    cursor = "place[kind].below[floor(t)] * (1 - t + floor(t)) + place[kind].below[ceil(t)] * (t - floor(t))"
    focus = in_focus(weights).transform_filter("key < 0 && datum.weight > 0.004")
    focus = focus.transform_calculate(x0="place[kind].above[datum.column]", x1=cursor, row="t")
    chips = token_chips()
    written = chips.transform_filter("datum.side == 'below'").transform_calculate(on="max(0, 1 - abs(datum.i - t))")
    read = in_focus(weights).transform_calculate(
        side="'above'", i="datum.column", center="place[kind].above[datum.column]",
        half="place[kind].above_width[datum.column] / 2", on="key < 0 ? datum.weight : 0",
    )  # fmt: skip
    held = chips.transform_filter("datum.side == 'above' && datum.i == key").transform_calculate(on="1")
    return alt.layer(
        ribbon_lines(row, "0.16"),
        ribbon_lines(row.transform_filter("datum.column == key"), "0.85"),
        ribbon_lines(focus, "0.85"),
        chip_marks(chips, "token", "1"),
        *(
            chip_marks(chart, style, "datum.on")
            for chart, style in ((written, "written"), (read, "read"), (held, "read"))
        ),
        chip_texts(chips, "label", "!film || datum.side == 'above' || datum.i < t + 0.5 ? 1 : 0"),
        *(chip_texts(chart, "on_accent", "datum.on > 0.5 ? 1 : 0") for chart in (written, read, held)),
    )


def token_chips() -> alt.Chart:
    """One row per token of the two rows: side, i, token, center, half (of its width), row or column."""
    sides = alt.Chart(alt.Data(values=[{"side": "above"}, {"side": "below"}]))
    below = "(kind == 'encoder' ? src : out)"
    return (
        sides.transform_calculate(
            token=f"datum.side == 'above' ? {KEYS} : {below}",
            center="place[kind][datum.side]",
            wide="place[kind][datum.side + '_width']",
        )
        .transform_calculate(i="sequence(length(datum.token))")
        .transform_flatten(["token", "center", "wide", "i"])
        .transform_calculate(half="datum.wide / 2")
    )


X = alt.Scale(domain=[0, alt.ExprRef("place[kind].width")], nice=False)
Y = alt.Scale(domain=[1, 0], nice=False)
CHIP = {"above": (0.0, 0.15), "below": (0.85, 1.0)}  # top and bottom of the two rows of tokens


def chip_marks(chart: alt.Chart, style: str, opacity: str) -> alt.Chart:
    placed = chart.transform_calculate(
        x0="datum.center - datum.half", x1="datum.center + datum.half", opacity=opacity,
        y0=f"datum.side == 'above' ? {CHIP['above'][0]} : {CHIP['below'][0]}",
        y1=f"datum.side == 'above' ? {CHIP['above'][1]} : {CHIP['below'][1]}",
    )  # fmt: skip
    return placed.mark_rect(style=style, cornerRadius=8, cursor="pointer").encode(
        x=alt.X("x0:Q", scale=X, axis=None), x2="x1:Q", y=alt.Y("y0:Q", scale=Y, axis=None), y2="y1:Q",
        opacity=alt.Opacity("opacity:Q", scale=None),
    )  # fmt: skip


def chip_texts(chart: alt.Chart, style: str, opacity: str) -> alt.Chart:
    placed = chart.transform_calculate(
        y0=f"datum.side == 'above' ? {sum(CHIP['above']) / 2} : {sum(CHIP['below']) / 2}", opacity=opacity
    )
    return placed.mark_text(style=style, fontSize=13.5, cursor="pointer").encode(
        x=alt.X("center:Q", scale=X, axis=None), y=alt.Y("y0:Q", scale=Y, axis=None), text="token:N",
        opacity=alt.Opacity("opacity:Q", scale=None),
    )  # fmt: skip


def ribbon_lines(chart: alt.Chart, opacity: str) -> alt.Chart:
    """An S-shaped line from (x0, above) to (x1, below) for each weight."""
    top, bottom = CHIP["above"][1] + 0.01, CHIP["below"][0] - 0.01
    points = chart.transform_calculate(
        x="[datum.x0, datum.x0, datum.x1, datum.x1]",
        y=f"[{top}, {(top + bottom) / 2}, {(top + bottom) / 2}, {bottom}]",
        i="[0, 1, 2, 3]",
        opacity=opacity,
    ).transform_flatten(["x", "y", "i"])
    lines = points.mark_line(style="line", interpolate="basis", strokeCap="butt").encode(
        x=alt.X("x:Q", scale=X, axis=None), y=alt.Y("y:Q", scale=Y, axis=None), order="i:Q",
        detail=["row:Q", "column:Q"], opacity=alt.Opacity("opacity:Q", scale=None),
        strokeWidth=alt.StrokeWidth("weight:Q", scale=alt.Scale(domain=[0, 1], range=[0.5, 16]), legend=None),
    )  # fmt: skip
    return lines


VIEWS = {
    "ribbons": ribbons, "candidates": candidate_bars, "gallery": gallery, "heat_map": head_heat_map, "bars": row_bars,
    "top_keys": top_keys,
}  # fmt: skip
