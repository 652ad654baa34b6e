"""Charts of the live explorer: ribbons between tokens, the gallery of heads, candidates, the tree of a beam search.

The explorer replaces only the data of a chart, so that the browser keeps the marks and moves them. A chart therefore
depends on nothing but its tables: positions, labels and highlights are columns. Tables are data frames, or
`alt.NamedData` for data that comes later. Positions are fractions of the width (x) and pixels (y); `key` names a mark
across tables; `click` is what a click on the mark reports.
"""

import altair as alt
import pandas as pd

Table = pd.DataFrame | alt.NamedData

HEIGHT, KEY_HEIGHT, QUERY_HEIGHT, WIDEST = 330, 34, 52, 30  # of the ribbons, in pixels

# ---------------------------------------------------------------------------- building blocks


def x_of(name: str) -> alt.X:
    """A fraction of the width."""
    return alt.X(f"{name}:Q", axis=None, scale=alt.Scale(domain=[0, 1], nice=False))


def y_of(name: str) -> alt.Y:
    """Pixels from the top."""
    return alt.Y(f"{name}:Q", axis=None, scale=None)


def as_is(channel: type, name: str) -> alt.SchemaBase:
    """A channel whose values are used as they are, without a scale."""
    return channel(f"{name}:Q", scale=None, legend=None)


def clickable() -> alt.Parameter:
    """Reports the `click` of the mark under the pointer."""
    return alt.selection_point(name="click", fields=["click"], on="click", toggle=False, empty=False)


# ---------------------------------------------------------------------------- ribbons


def ribbon_tables(
    weights, keys: list[str], queries: list[tuple[str, str]], row: int, last: int | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The links and the tokens of `ribbons` for weights (Q, K), with one row selected.

    `queries` are pairs (token read, token written); the second is empty where nothing is written. Rows after `last`
    are hidden.
    """
    Q, K = len(queries), len(keys)
    last = Q - 1 if last is None else last
    links = [
        {"key": f"{q}-{k}", "row": q, "column": k, "x0": (k + 0.5) / K, "x1": (q + 0.5) / Q,
         "weight": float(weights[q, k]), "opacity": 0.0 if q > last else 0.85 if q == row else 0.12,
         "query": " → ".join(filter(None, queries[q])), "token": keys[k]}
        for q in range(Q) for k in range(K)
    ]  # fmt: skip
    tokens = [
        {"key": f"k{k}", "side": "key", "i": k, "label": token, "note": number_text(weights[row, k]),
         "x0": (k + 0.06) / K, "x1": (k + 0.94) / K, "x": (k + 0.5) / K, "on": False, "opacity": 1.0}
        for k, token in enumerate(keys)
    ] + [
        {"key": f"q{q}", "side": "query", "i": q, "label": written or read, "note": f"{read} →" if written else "",
         "x0": (q + 0.06) / Q, "x1": (q + 0.94) / Q, "x": (q + 0.5) / Q, "on": q == row,
         "opacity": 1.0 if q <= last else 0.0}
        for q, (read, written) in enumerate(queries)
    ]  # fmt: skip
    return pd.DataFrame(links), pd.DataFrame(tokens)


def number_text(weight: float) -> str:
    return f"{weight:.2f}" if weight >= 0.005 else ""


def ribbons(links: Table, tokens: Table) -> alt.LayerChart:
    """Keys above, queries below, and a ribbon from each query to each key, as wide as the weight.

    The pointer on a token makes its ribbons stand out; otherwise those of the selected row do. Needs the tables of
    `ribbon_tables`; tokens may have a column `click`.
    """
    hover = alt.selection_point(
        name="hover", fields=["side", "i"], on="pointerover", clear="pointerout", toggle=False, empty=False
    )
    hovered, its_token = "isValid(hover.i)", "(hover.side[0] == 'key' ? datum.column : datum.row) == hover.i[0]"
    bands = (
        alt.Chart(links)
        .transform_calculate(a="datum.x0 * width", b="datum.x1 * width", w=f"datum.weight * {WIDEST / 2}")
        .transform_calculate(path=ribbon_path(KEY_HEIGHT + 18, HEIGHT - QUERY_HEIGHT - 4))
        .mark_point(size=4, filled=True, stroke=None, style="ribbon")  # with this size, path units are pixels
        .encode(
            x=alt.value(0),
            y=alt.value(0),
            shape=alt.Shape("path:N", scale=None),
            opacity=alt.when(f"{hovered} && {its_token}")
            .then(alt.value(0.9))
            .when(hovered)
            .then(alt.value(0.05))
            .otherwise(alt.value(alt.ExprRef("datum.opacity"))),
            key="key:N",
            tooltip=[
                alt.Tooltip("query:N", title="query (row)"),
                alt.Tooltip("token:N", title="key (column)"),
                alt.Tooltip("weight:Q", format=".4f"),
            ],
        )
    )
    placed = alt.Chart(tokens).transform_calculate(
        top=f"datum.side == 'key' ? 0 : {HEIGHT - QUERY_HEIGHT}",
        bottom=f"datum.side == 'key' ? {KEY_HEIGHT} : {HEIGHT}",
        middle=f"datum.side == 'key' ? {KEY_HEIGHT / 2} : datum.note ? {HEIGHT - 18} : {HEIGHT - QUERY_HEIGHT / 2}",
        noted=f"datum.side == 'key' ? {KEY_HEIGHT + 10} : {HEIGHT - QUERY_HEIGHT + 14}",
    )
    seen = {"opacity": as_is(alt.Opacity, "opacity"), "key": "key:N"}
    box = {"x": x_of("x0"), "x2": "x1:Q", "y": y_of("top"), "y2": "bottom:Q", **seen}
    limit = alt.ExprRef("(datum.x1 - datum.x0) * width - 4")
    boxes = placed.mark_rect(cornerRadius=9, style="token", cursor="pointer").encode(**box).add_params(hover)
    chosen = placed.transform_filter("datum.on").mark_rect(cornerRadius=9, style="chosen", cursor="pointer")
    labels = placed.mark_text(fontSize=14, fontWeight=600, limit=limit, style="label", tooltip=None)
    notes = placed.mark_text(fontSize=11, limit=limit, style="muted", tooltip=None)
    on_chosen = {"fontSize": 14, "fontWeight": 600, "limit": limit, "style": "high"}
    chosen_texts = [
        placed.transform_filter("datum.on").mark_text(**on_chosen).encode(x=x_of("x"), y=y_of("middle"), text="label:N"),
        placed.transform_filter("datum.on")
        .mark_text(**{**on_chosen, "fontSize": 11, "fontWeight": 400})
        .encode(x=x_of("x"), y=y_of("noted"), text="note:N"),
    ]
    return alt.layer(
        bands,
        boxes,
        labels.encode(x=x_of("x"), y=y_of("middle"), text="label:N", **seen),
        notes.encode(x=x_of("x"), y=y_of("noted"), text="note:N", **seen),
        chosen.encode(**box),
        *chosen_texts,
    ).properties(height=HEIGHT)


def ribbon_path(top: float, bottom: float) -> str:
    """A Vega expression for the SVG path of a ribbon from (a, top) to (b, bottom), w to each side."""
    middle = (top + bottom) / 2

    def point(x: str, y: float) -> str:
        return f"({x}) + ',{y:g}'"

    def curve(x: str, x2: str, y2: float) -> str:
        return f"'C' + {point(x, middle)} + ' ' + {point(x2, middle)} + ' ' + {point(x2, y2)}"

    a0, a1, b0, b1 = "datum.a - datum.w", "datum.a + datum.w", "datum.b - datum.w", "datum.b + datum.w"
    there = f"'M' + {point(a0, top)} + {curve(a0, b0, bottom)}"
    back = f"'L' + {point(b1, bottom)} + {curve(b1, a1, top)} + 'Z'"
    return f"{there} + {back}"
