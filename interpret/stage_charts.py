"""Charts of the live explorer: ribbons between tokens, the gallery of heads, candidates, the tree of a beam search.

The explorer replaces only the data of a chart, so that the browser keeps the marks and moves them. A chart therefore
depends on nothing but its tables: positions, labels and highlights are columns. Tables are data frames, or
`alt.NamedData` for data that comes later. Positions are fractions of the width (x) and pixels (y); `key` names a mark
across tables; `command` is what a click on the mark asks for (see interpret/stage.py), or empty.
"""

import base64
import io
import math

import altair as alt
import numpy as np
import pandas as pd
from PIL import Image

from interpret.views import text_width

Table = pd.DataFrame | alt.NamedData

HEIGHT, KEY_HEIGHT, QUERY_HEIGHT, WIDEST = 330, 34, 52, 30  # of the ribbons, in pixels
LEAST = 0.004  # smaller weights have no ribbon
NARROWEST, GAP = 44, 12  # width of a token at least, and the space between two, in pixels

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
    last = len(queries) - 1 if last is None else last
    above, below = slots(key_widths(keys)), slots(query_widths(queries))
    links = [
        {"key": f"{q}-{k}", "row": q, "column": k, "side": "query", "i": q, "x0": above[k]["x"], "x1": below[q]["x"],
         "weight": float(weights[q, k]), "opacity": 0.0 if q > last else 0.85 if q == row else 0.12,
         "query": row_name(queries[q]), "token": keys[k], "command": f"row {q}"}
        for q in range(len(queries)) for k in range(len(keys)) if weights[q, k] >= LEAST
    ]  # fmt: skip
    tokens = [
        {"key": f"k{k}", "side": "key", "i": k, "label": token, "note": number_text(weights[row, k]), "on": False,
         "opacity": 1.0, "command": "", "about": f"key {k}: {token}", **above[k]}
        for k, token in enumerate(keys)
    ] + [
        {"key": f"q{q}", "side": "query", "i": q, "label": written or read, "note": f"{read} →" if written else "",
         "on": q == row, "opacity": 1.0 if q <= last else 0.0, "command": f"row {q}",
         "about": f"row {q}: {row_name((read, written))}", **below[q]}
        for q, (read, written) in enumerate(queries)
    ]  # fmt: skip
    return pd.DataFrame(links, columns=LINK_COLUMNS), pd.DataFrame(tokens)


LINK_COLUMNS = ["key", "row", "column", "side", "i", "x0", "x1", "weight", "opacity", "query", "token", "command"]


def slots(widths: list[float]) -> list[dict[str, float]]:
    """The boxes of tokens side by side, as fractions of the whole width: x0, x1 and the center x."""
    total, ends = sum(widths), np.cumsum(widths)
    return [
        {"x0": (end - w + GAP / 2) / total, "x1": (end - GAP / 2) / total, "x": (end - w / 2) / total}
        for w, end in zip(widths, ends.tolist(), strict=True)
    ]


def key_widths(keys: list[str]) -> list[float]:
    """The pixels that each key needs."""
    return [max(NARROWEST, text_width(key) + GAP) for key in keys]


def query_widths(queries: list[tuple[str, str]]) -> list[float]:
    """The pixels that each query needs, with the token read in small and the token written in large letters."""
    return [max(NARROWEST, text_width(written), 0.85 * text_width(f"{read} →")) + GAP for read, written in queries]


def ribbon_width(keys: list[str], queries: list[tuple[str, str]]) -> int:
    """The pixels that the ribbons need, so that no token is cut."""
    return round(max(sum(key_widths(keys)), sum(query_widths(queries))))


def row_name(query: tuple[str, str]) -> str:
    """A row's tokens read and written: "una → mela"."""
    return " → ".join(filter(None, query))


def number_text(weight: float) -> str:
    return f"{weight:.2f}" if weight >= 0.005 else ""


def ribbons(links: Table, tokens: Table, width: str = "width") -> alt.LayerChart:
    """Keys above, queries below, and a ribbon from each query to each key, as wide as the weight.

    The pointer on a token or ribbon makes the ribbons of the token or row stand out; otherwise those of the selected
    row do. Needs the tables of `ribbon_tables`. `width` is the width in pixels, or the Vega signal that holds it.
    """
    hover = alt.selection_point(
        name="hover", fields=["side", "i"], on="pointerover", clear="pointerout", toggle=False, empty=False
    )
    hovered, its_token = "isArray(hover.i)", "(hover.side[0] == 'key' ? datum.column : datum.row) == hover.i[0]"
    bands = (
        alt.Chart(links)
        .transform_calculate(a=f"datum.x0 * {width}", b=f"datum.x1 * {width}", w=f"datum.weight * {WIDEST / 2}")
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
    limit = alt.ExprRef(f"(datum.x1 - datum.x0) * {width} - 4")
    boxes = placed.mark_rect(cornerRadius=9, style="token", cursor="pointer")
    boxes = boxes.encode(**box, description=alt.Description("about:N")).add_params(hover)
    chosen = placed.transform_filter("datum.on").mark_rect(cornerRadius=9, style="chosen", cursor="pointer")
    labels = placed.mark_text(fontSize=14, fontWeight=600, limit=limit, style="label", tooltip=None)
    notes = placed.mark_text(fontSize=11, limit=limit, style="muted", tooltip=None)
    on_chosen = {"fontSize": 14, "fontWeight": 600, "limit": limit, "style": "high"}
    chosen_texts = [
        placed.transform_filter("datum.on")
        .mark_text(**on_chosen)
        .encode(x=x_of("x"), y=y_of("middle"), text="label:N"),
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


# ---------------------------------------------------------------------------- candidates

CANDIDATE_HEIGHT = 40


def candidate_rows(candidates: list[tuple[str, float]], written: str, commands: list[str]) -> pd.DataFrame:
    """The table of `candidate_bars` for the (token, ln p) of one step, most probable first."""
    return pd.DataFrame([
        {"key": rank, "token": token, "probability": math.exp(log_p), "log_p": log_p, "on": token == written,
         "share": f"{math.exp(log_p):.1%}", "left": 0.0, "right": 1.0, "y": CANDIDATE_HEIGHT * rank,
         "command": commands[rank], "about": f"candidate {token}: {math.exp(log_p):.4f}"}
        for rank, (token, log_p) in enumerate(candidates)
    ])  # fmt: skip


def candidate_bars(rows: Table) -> alt.LayerChart:
    """The most probable next tokens of a step as bars; the one written has the accent color."""
    base = alt.Chart(rows).transform_calculate(
        text="datum.y + 13", top="datum.y + 24", bottom="datum.y + 31", above="datum.y", below="datum.y + 38"
    )
    bar = {"x2": "left:Q", "y": y_of("top"), "y2": "bottom:Q", "key": "key:N"}
    areas = base.mark_rect(opacity=0, cursor="pointer").encode(
        x=x_of("left"), x2="right:Q", y=y_of("above"), y2="below:Q", key="key:N",
        tooltip=[alt.Tooltip("token:N"), alt.Tooltip("log_p:Q", title="ln p", format=".4f")],
        description=alt.Description("about:N"),
    )  # fmt: skip
    return alt.layer(
        base.mark_rect(cornerRadius=3, style="token").encode(**{**bar, "x": x_of("right")}),
        base.mark_rect(cornerRadius=3, style="bar").encode(**bar, x=x_of("probability")),
        base.transform_filter("datum.on")
        .mark_rect(cornerRadius=3, style="chosen")
        .encode(**bar, x=x_of("probability")),
        base.mark_text(align="left", fontSize=14, fontWeight=600, style="label").encode(
            x=x_of("left"), y=y_of("text"), text="token:N", key="key:N"
        ),
        base.mark_text(align="right", fontSize=12, style="muted").encode(
            x=x_of("right"), y=y_of("text"), text="share:N", key="key:N"
        ),
        areas,
    ).properties(height=HEIGHT)


# ---------------------------------------------------------------------------- all heads

THUMBNAIL, HEAD_HEIGHT = 84, 164  # height of a thumbnail, and with its texts


def gallery_rows(
    weights: np.ndarray, keys: list[str], row: int, roles: dict[tuple[int, int], tuple[str, str]],
    colors: tuple[str, ...], picked: list[tuple[int, int]], off: set[tuple[int, int]],
) -> pd.DataFrame:  # fmt: skip
    """The table of `gallery` for weights (L, H, Q, K): one row per head, with the three largest weights of a row.

    `keys` are those that the row can attend to; `roles` are pairs (role, more about it) by layer and head; `colors` is
    the color scale of weights.
    """
    L, H = weights.shape[:2]
    images = thumbnails(weights, colors)
    rows = []
    for layer, head in np.ndindex(L, H):
        top = np.argsort(-weights[layer, head, row, : len(keys)], kind="stable")[:3]
        texts = [] if (layer, head) in off else [f"{weights[layer, head, row, k]:.2f} {keys[k]}" for k in top]
        role, about = roles.get((layer, head), ("", ""))
        rows.append({
            "key": f"{layer}.{head}", "image": images[layer, head], "name": f"{layer}.{head}", "role": role,
            "about": about, **dict(zip(("a", "b", "c"), [*texts, "", "", ""], strict=False)),
            "x0": (head + 0.05) / H, "x1": (head + 0.95) / H, "x": (head + 0.5) / H, "y": HEAD_HEIGHT * layer,
            "on": (layer, head) in picked, "off": (layer, head) in off, "command": f"head {layer}.{head}",
        })  # fmt: skip
    return pd.DataFrame(rows)


def thumbnails(weights: np.ndarray, colors: tuple[str, ...]) -> dict[tuple[int, int], str]:
    """Each head (Q, K) as a data address of a picture with one pixel per weight."""
    stops = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in colors])  # (colors, 3)
    at = np.linspace(0, 1, len(stops))
    pixels = np.stack([np.interp(weights, at, stops[:, c]) for c in range(3)], axis=-1).astype(np.uint8)
    addresses = {}
    for layer, head in np.ndindex(weights.shape[:2]):
        file = io.BytesIO()
        Image.fromarray(pixels[layer, head]).save(file, "PNG")
        addresses[layer, head] = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return addresses


def gallery(heads: Table, layers: int) -> alt.LayerChart:
    """A thumbnail of every head, its name and role, and its three largest weights of the selected row."""
    base = alt.Chart(heads).transform_calculate(
        top="datum.y + 20", bottom=f"datum.y + {20 + THUMBNAIL}", title="datum.y + 8",
        middle=f"datum.y + {20 + THUMBNAIL / 2}", end=f"datum.y + {HEAD_HEIGHT - 6}", start="datum.y",
        **{name: f"datum.y + {34 + THUMBNAIL + 14 * i}" for i, name in enumerate(("y1", "y2", "y3"))},
    )  # fmt: skip
    place = {"x": x_of("x0"), "x2": "x1:Q", "y": y_of("top"), "y2": "bottom:Q", "key": "key:N"}
    limit = alt.ExprRef("(datum.x1 - datum.x0) * width")
    width = alt.ExprRef("(datum.x1 - datum.x0) * width")
    texts = [
        base.mark_text(fontSize=11, limit=limit, style="muted").encode(
            x=x_of("x"), y=y_of(y), text=f"{name}:N", key="key:N"
        )
        for name, y in (("a", "y1"), ("b", "y2"), ("c", "y3"))
    ]
    whole = {**place, "y": y_of("start"), "y2": "end:Q"}
    off = base.transform_filter("datum.off")
    return alt.layer(
        base.mark_image(aspect=False, smooth=False, height=THUMBNAIL, width=width).encode(
            x=x_of("x"), y=y_of("middle"), url="image:N", key="key:N"
        ),
        base.mark_text(fontSize=11.5, fontWeight=600, align="left", style="label").encode(
            x=x_of("x0"), y=y_of("title"), text="name:N", key="key:N"
        ),
        base.mark_text(fontSize=11.5, align="right", limit=60, style="muted").encode(
            x=x_of("x1"), y=y_of("title"), text="role:N", key="key:N"
        ),
        *texts,
        off.mark_rect(style="token", opacity=0.86).encode(**place),
        off.mark_text(fontSize=13, fontWeight=600, style="written").encode(
            x=x_of("x"), y=y_of("middle"), text=alt.value("off")
        ),
        base.transform_filter("datum.on").mark_rect(style="frame", cornerRadius=4).encode(**place),
        base.mark_rect(opacity=0, cursor="pointer").encode(
            **whole,
            tooltip=[alt.Tooltip("name:N", title="layer.head"), alt.Tooltip("about:N", title="role")],
            description=alt.Description("command:N"),
        ),
    ).properties(height=HEAD_HEIGHT * layers)


# ---------------------------------------------------------------------------- heat maps

MAP_HEIGHT, HEADER = 400, 78  # of a heat map, and of the labels of its columns
LABELS = 0.42  # of the width at most, for the labels of rows
NARROW = 420  # pixels, a usual width of a heat map


def cell_rows(
    weights: np.ndarray, keys: list[str], queries: list[tuple[str, str]], row: int, causal: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells and labels of `heat_map` for weights (Q, K). With `causal`, masked cells are omitted."""
    Q, K = weights.shape
    names = [row_name(query) for query in queries]
    left = min(LABELS, max(map(text_width, names)) / NARROW)
    height, width = (MAP_HEIGHT - HEADER) / Q, (1 - left) / K
    cells = [
        {"key": f"{q}-{k}", "row": q, "column": k, "query": names[q], "token": keys[k], "weight": float(weights[q, k]),
         "number": f"{weights[q, k]:.2f}" if height >= 13 and abs(weights[q, k]) >= 0.005 else "",
         "x0": left + width * k, "x1": left + width * (k + 0.96), "x": left + width * (k + 0.48),
         "y0": HEADER + height * q, "y1": HEADER + height * (q + 0.95), "y": HEADER + height * (q + 0.475),
         "on": q == row, "command": f"row {q}", "about": f"cell {q} {k}: {weights[q, k]:.4f}"}
        for q in range(Q) for k in range(q + 1 if causal else K)
    ]  # fmt: skip
    size = min(12.5, 0.8 * height)
    labels = [
        {"key": f"q{q}", "side": "query", "label": name, "x": left - 0.015, "y": HEADER + height * (q + 0.475),
         "size": size, "on": q == row, "command": f"row {q}"}
        for q, name in enumerate(names)
    ] + [
        {"key": f"k{k}", "side": "key", "label": key, "x": left + width * (k + 0.4), "y": HEADER - 8.0, "size": 12.5,
         "on": False, "command": ""}
        for k, key in enumerate(keys)
    ]  # fmt: skip
    return pd.DataFrame(cells), pd.DataFrame(labels)


def heat_map(cells: Table, labels: Table, diverging: bool = False, width: str = "width") -> alt.LayerChart:
    """Rows are queries, columns are keys; the selected row is framed. `diverging` is for differences from -1 to 1.

    `width` is the width in pixels, or the Vega signal that holds it.
    """
    domain, colors = ([-1, 1], "diverging") if diverging else ([0, 1], "heatmap")
    color = alt.Color(
        "weight:Q", scale=alt.Scale(domain=domain, range=colors, clamp=True, interpolate="rgb"), legend=None
    )
    base = alt.Chart(cells)
    place = {"x": x_of("x0"), "x2": "x1:Q", "y": y_of("y0"), "y2": "y1:Q", "key": "key:N"}
    fits = base.transform_filter(f"(datum.x1 - datum.x0) * {width} >= 26 && datum.number")
    number = fits.encode(x=x_of("x"), y=y_of("y"), text="number:N", key="key:N")
    is_dark = "abs(datum.weight) >= 0.5"
    side = {"x": x_of("x"), "y": y_of("y"), "text": "label:N", "key": "key:N", "size": as_is(alt.Size, "size")}
    row_labels = alt.Chart(labels).transform_filter("datum.side == 'query'").encode(**side)
    column_labels = alt.Chart(labels).transform_filter("datum.side == 'key'").encode(**side)
    right = {"align": "right", "limit": alt.ExprRef(f"datum.x * {width}"), "cursor": "pointer"}
    frame = base.transform_filter("datum.on").transform_aggregate(
        x0="min(x0)", x1="max(x1)", y0="min(y0)", y1="max(y1)", groupby=["row"]
    )
    return alt.layer(
        base.mark_rect(cornerRadius=2, cursor="pointer").encode(
            **place,
            color=color,
            tooltip=[
                alt.Tooltip("query:N", title="query (row)"),
                alt.Tooltip("token:N", title="key (column)"),
                alt.Tooltip("weight:Q", format=".4f"),
            ],
            description=alt.Description("about:N"),
        ),
        number.transform_filter(f"!({is_dark})").mark_text(fontSize=10.5, style="low", tooltip=None),
        number.transform_filter(is_dark).mark_text(fontSize=10.5, style="high", tooltip=None),
        frame.mark_rect(style="frame", cornerRadius=3, tooltip=None).encode(
            x=place["x"], x2="x1:Q", y=place["y"], y2="y1:Q"
        ),
        row_labels.transform_filter("!datum.on").mark_text(style="muted", **right),
        row_labels.transform_filter("datum.on").mark_text(style="label", fontWeight=600, **right),
        column_labels.mark_text(align="left", angle=315, limit=96, style="muted"),
    ).properties(height=MAP_HEIGHT)


# ---------------------------------------------------------------------------- one row


def bar_rows(weights: np.ndarray, keys: list[str]) -> pd.DataFrame:
    """The table of `row_bars` for the weights (K,) of one row: a bar per key, and their sum."""
    height = MAP_HEIGHT / (len(weights) + 1)
    rows = [
        {"key": k, "position": str(k), "token": token, "weight": float(weight), "number": f"{weight:.4f}"}
        for k, (token, weight) in enumerate(zip(keys, weights, strict=True))
    ]
    rows.append({"key": -1, "position": "", "token": "sum", "weight": 0.0, "number": f"{weights.sum():.4f}"})
    return pd.DataFrame([
        {**row, "y": height * (i + 0.5), "y0": height * (i + 0.2), "y1": height * (i + 0.8), "x0": 0.42,
         "x1": 0.42 + 0.36 * row["weight"], "left": 0.07, "name": 0.1, "right": 1.0, "size": min(13.0, 0.75 * height),
         "about": f"{row['token']}: {row['number']}"}
        for i, row in enumerate(rows)
    ])  # fmt: skip


def row_bars(rows: Table) -> alt.LayerChart:
    """Position, token, weight with four decimals and a bar for each key of one row, and the sum of the weights."""
    base = alt.Chart(rows)
    place = {"y": y_of("y"), "key": "key:N", "size": as_is(alt.Size, "size")}
    limit = alt.ExprRef("0.3 * width")
    return alt.layer(
        base.mark_rect(cornerRadius=3, style="read").encode(
            x=x_of("x0"), x2="x1:Q", y=y_of("y0"), y2="y1:Q", key="key:N", tooltip=["token:N", "number:N"]
        ),
        base.mark_text(align="right", style="muted").encode(**place, x=x_of("left"), text="position:N"),
        base.mark_text(align="left", style="label", limit=limit).encode(**place, x=x_of("name"), text="token:N"),
        base.mark_text(align="right", style="label").encode(
            **place, x=x_of("right"), text="number:N", description=alt.Description("about:N")
        ),
    ).properties(height=MAP_HEIGHT)


# ---------------------------------------------------------------------------- beam search

NODE_HEIGHT = 42


def beam_rows(tree: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The nodes and edges of `beam_chart` for a `beam_tree`."""
    columns = tree["step"].max() + 2
    width = 1 / columns
    nodes = tree.assign(
        key=tree["node"],
        x=(tree["step"] + 1.5) * width,
        x0=(tree["step"] + 1.1) * width,
        x1=(tree["step"] + 1.9) * width,
        y=NODE_HEIGHT * (tree["rank"] + 0.5),
        note=[f"{score:.2f}" for score in tree["score"]],
    )
    root = {"key": "root", "node": "root", "token": "[SOS]", "state": "kept", "best": True, "note": "", "x": width / 2,
            "x0": 0.1 * width, "x1": 0.9 * width, "y": NODE_HEIGHT / 2}  # fmt: skip
    nodes = pd.concat([pd.DataFrame([root]), nodes], ignore_index=True)
    at = nodes.set_index("node")
    edges = tree.assign(
        key=tree["node"],
        a=at.loc[tree["parent"], "x1"].to_numpy(),
        b=at.loc[tree["node"], "x0"].to_numpy(),
        c=at.loc[tree["parent"], "y"].to_numpy(),
        d=at.loc[tree["node"], "y"].to_numpy(),
    )
    return nodes, edges


def beam_chart(nodes: Table, edges: Table, beam_size: int) -> alt.LayerChart:
    """The extensions of every step of a beam search: kept, finished (outlined) and pruned (pale), with their scores."""
    middle = "(datum.a + datum.b) / 2 * width"
    path = f"'M' + datum.a * width + ',' + datum.c + 'C' + {middle} + ',' + datum.c + ' ' + {middle} + ',' + datum.d"
    lines = alt.Chart(edges).transform_calculate(path=f"{path} + ' ' + datum.b * width + ',' + datum.d")
    line = {"x": alt.value(0), "y": alt.value(0), "shape": alt.Shape("path:N", scale=None)}
    base = alt.Chart(nodes).transform_calculate(
        top="datum.y - 16", bottom="datum.y + 16", text="datum.note ? datum.y - 6 : datum.y", noted="datum.y + 8"
    )
    place = {"x": x_of("x0"), "x2": "x1:Q", "y": y_of("top"), "y2": "bottom:Q"}
    tooltip = [alt.Tooltip("token:N"), alt.Tooltip("state:N"), alt.Tooltip("log_p:Q", title="ln p", format=".4f"),
               alt.Tooltip("score:Q", format=".4f")]  # fmt: skip
    limit = alt.ExprRef("(datum.x1 - datum.x0) * width - 4")
    layers = [
        lines.transform_filter(which)
        .mark_point(size=4, filled=False, style=style, strokeWidth=stroke, opacity=opacity)
        .encode(**line)
        for which, style, stroke, opacity in (
            ("datum.state == 'pruned'", "muted", 1, 0.25),
            ("datum.state != 'pruned' && !datum.best", "ribbon", 1.5, 0.6),
            ("datum.best", "written", 3, 1),
        )
    ]  # fmt: skip
    for which, box, text, opacity in (
        ("datum.state == 'pruned'", "token", "muted", 0.6),
        ("datum.state != 'pruned' && !datum.best", "token", "label", 1),
        ("datum.best", "chosen", "high", 1),
    ):
        some = base.transform_filter(which)
        layers += [
            some.mark_rect(cornerRadius=7, style=box, opacity=opacity).encode(**place, tooltip=tooltip),
            some.mark_text(fontSize=13, fontWeight=600, limit=limit, style=text, opacity=opacity, tooltip=None).encode(
                x=x_of("x"), y=y_of("text"), text="token:N"
            ),
            some.mark_text(fontSize=10.5, limit=limit, style=text, opacity=opacity, tooltip=None).encode(
                x=x_of("x"), y=y_of("noted"), text="note:N"
            ),
        ]
    done = base.transform_filter("datum.state == 'finished'")
    layers.append(
        done.mark_rect(cornerRadius=7, filled=False, style="good", strokeWidth=2.5, tooltip=None).encode(**place)
    )
    return alt.layer(*layers).properties(height=NODE_HEIGHT * 2 * beam_size)


# ---------------------------------------------------------------------------- inside a head

MEASURES = {
    "product": "query · key / √d_k",
    "weight": "weight",
    "value_norm": "‖value‖",
    "contribution": "‖weight × value × W_O‖",
    "gradient": "gradient × input",
}


def inside_rows(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The bars and names of `inside_chart` for the table of `inside_head`, with the column gradient if there is one."""
    measures = [name for name in MEASURES if name in table]
    left, height = 0.14, 30
    width = (1 - left) / len(measures)
    bars, names = [], []
    for m, name in enumerate(measures):
        values = table[name].to_numpy(dtype=float)
        signed = (values < 0).any()
        scale = (0.3 if signed else 0.6) / max(np.abs(values).max(), 1e-9)
        start = left + width * m
        zero = start + width * (0.02 + (0.3 if signed else 0))
        names.append({"label": MEASURES[name], "x": start + width * 0.02, "y": 12.0, "is_title": True})
        bars += [
            {"key": f"{name}{k}", "measure": MEASURES[name], "token": token, "value": value, "number": f"{value:.3f}",
             "x0": zero, "x1": zero + width * scale * value, "y": 26 + height * (k + 0.5),
             "y0": 26 + height * (k + 0.25), "y1": 26 + height * (k + 0.75), "right": start + width * 0.92}
            for k, (token, value) in enumerate(zip(table["token"], values, strict=True))
        ]  # fmt: skip
    names += [
        {"label": token, "x": 0.0, "y": 26 + height * (k + 0.5), "is_title": False}
        for k, token in enumerate(table["token"])
    ]
    return pd.DataFrame(bars), pd.DataFrame(names)


def inside_chart(bars: Table, names: Table, keys: int) -> alt.LayerChart:
    """The parts of one row of a head: a line per key, a column of bars per measure, each with its own scale."""
    base = alt.Chart(bars)
    text = alt.Chart(names).encode(x=x_of("x"), y=y_of("y"), text="label:N")
    place = {"x": x_of("x0"), "x2": "x1:Q", "y": y_of("y0"), "y2": "y1:Q", "key": "key:N"}
    tooltip = ["token:N", "measure:N", alt.Tooltip("value:Q", format=".4f")]
    return alt.layer(
        base.transform_filter("datum.value >= 0")
        .mark_rect(cornerRadius=2, style="read")
        .encode(**place, tooltip=tooltip),
        base.transform_filter("datum.value < 0")
        .mark_rect(cornerRadius=2, style="written")
        .encode(**place, tooltip=tooltip),
        base.mark_text(align="right", fontSize=11.5, style="muted", tooltip=None).encode(
            x=x_of("right"), y=y_of("y"), text="number:N", key="key:N"
        ),
        text.transform_filter("datum.is_title").mark_text(align="left", fontSize=12, fontWeight=600, style="label"),
        text.transform_filter("!datum.is_title").mark_text(align="left", fontSize=13, limit=110, style="label"),
    ).properties(height=30 * keys + 34)
