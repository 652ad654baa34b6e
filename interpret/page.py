"""HTML pages that work offline: the attention page of visualize.py and the report of experiments.py.

A page is one file: the style of interpret/theme.py and page.css, Vega, the charts and their data as JSON, and page.js.
The data is in the element with the id "data"; a script can read it with any JSON parser. `traces` holds, for each
sentence, its tokens (`state`), the weights x 10,000 and row sums of every head (`heads`, see
`measures.packed_table`) and the most probable next tokens of every step (`candidates`).

Tokens, sentences and names come from the user and from files, so none of them becomes HTML or script: "<" is an escape
in all JSON, texts are escaped, and the browser runs no script other than the two of the page (Content-Security-Policy).
"""

import base64
import hashlib
import html
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import altair as alt
import pandas as pd
import vl_convert

from interpret.charts import EscapedJSON, difference, importance_heat_map, step_heat_map, variant_bars
from interpret.interventions import Variant
from interpret.theme import PALETTES, css, vega_config
from interpret.trace import KIND_NAMES, KINDS, AttentionTrace
from interpret.views import VIEWS, view_data, view_state
from runs.files import output_file

CAUTION = "Attention shows where a head reads. It does not explain the output, and only some heads align words."
LEGEND = '<span class="legend">weight 0 <i></i> 1</span>'
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Card:
    """A chart with a title and a note. `columns` of 12 are its width on a large screen."""

    view: str  # name of the chart
    title: str
    note: str = ""
    columns: int = 12
    note_id: str = ""
    legend: bool = False
    below: str = ""  # HTML

    def html(self) -> str:
        title, note = html.escape(self.title), html.escape(self.note)
        note_id = f' id="{self.note_id}"' if self.note_id else ""
        return (
            f'<section class="card c{self.columns}"><div class="top"><h2>{title}</h2>{LEGEND * self.legend}</div>'
            f'<p{note_id}>{note}</p><div class="scroll"><div class="view" id="{self.view}" data-view="{self.view}">'
            f"</div></div>{self.below}</section>"
        )


def write_page(
    path: str | Path, title: str, run: str, cards: list[Card | list[Card]], data: dict, controls: str = ""
) -> None:
    """Writes a page. `data` is embedded as JSON and holds at least `specs`, the Vega-Lite charts of the cards."""
    themes = {name: vega_config(palette) for name, palette in PALETTES.items()}
    embedded = json.dumps({"themes": themes, **data}, cls=EscapedJSON, ensure_ascii=False)
    scripts = [vl_convert.javascript_bundle(), (HERE / "page.js").read_text(encoding="utf8")]
    page = PAGE.format(
        title=html.escape(title),
        about=CAUTION,
        run=html.escape(run),
        policy=content_security_policy(scripts),
        style=css() + (HERE / "page.css").read_text(encoding="utf8"),
        controls=controls,
        cards=cards_html(cards),
        data=embedded,
        vega=scripts[0],
        script=scripts[1],
    )
    with output_file(path) as file:
        file.write_text(page, encoding="utf8")


def cards_html(cards: list[Card | list[Card]]) -> str:
    """The cards as HTML; those of a list are stacked in one column."""
    return "\n".join(
        card.html() if isinstance(card, Card) else f'<div class="stack">{cards_html(card)}</div>' for card in cards
    )


def content_security_policy(scripts: list[str]) -> str:
    """Only these scripts run, and nothing is loaded. Vega compiles expressions, which needs 'unsafe-eval'."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return f"default-src 'none'; script-src {allowed} 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:"


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<div><h1 id="title">{title}</h1><p class="about">run <b>{run}</b> · {about}</p></div>
<button id="theme" aria-label="switch between light and dark">◐</button>
</header>
{controls}
<main class="grid">
{cards}
</main>
<script type="application/json" id="data">{data}</script>
<script>{vega}</script>
<script>{script}</script>
</body>
</html>
"""

# ---------------------------------------------------------------------------- the attention page

CONTROLS = """<nav class="bar">
<span class="switch" id="kind" role="group" aria-label="kind of attention">{kinds}</span>
<select id="sentence" aria-label="sentence"{hidden}>{sentences}</select>
</nav>"""

PLAYER = """<div class="bar">
<button id="play">Play</button>
<button id="back" aria-label="previous row">←</button>
<button id="next" aria-label="next row">→</button>
<input id="step" type="range" min="0" value="0" aria-label="row">
<span id="where"></span>
</div>"""

ATTENTION_CARDS = [
    Card("ribbons", "Attention, row by row", columns=9, note_id="head", below=PLAYER),
    Card("candidates", "Next token", "The most probable tokens of the step", columns=3),
    [
        Card("gallery", "Heads", "Click to select; with Shift or Ctrl, several", legend=True),
        Card("top_keys", "Every head", "The three keys with the largest weights of the row in focus"),
    ],
    [
        Card("heat_map", "Selected", "Rows: queries (decoder: read → written). Columns: keys.", legend=True),
        Card("bars", "Row in focus", note_id="row"),
    ],
]


def save_page(traces: AttentionTrace | list[AttentionTrace], path: str | Path) -> None:
    """Writes the attention page of one or several sentences."""
    traces = [traces] if isinstance(traces, AttentionTrace) else traces
    options = [f'<option value="{i}">{html.escape(trace.source)}</option>' for i, trace in enumerate(traces)]
    kinds = [f'<button value="{kind}">{kind}</button>' for kind in KINDS]
    controls = CONTROLS.format(hidden=" hidden" * (len(traces) == 1), sentences="".join(options), kinds="".join(kinds))
    data = {
        "kinds": {kind: name.capitalize() for kind, name in KIND_NAMES.items()},
        "specs": {name: page_spec(view(), height="container") for name, view in VIEWS.items()},
        "traces": [trace_data(trace) for trace in traces],
    }
    title = f"{traces[0].source} → {traces[0].translation}"
    write_page(path, title, traces[0].run, ATTENTION_CARDS, data, controls)


def trace_data(trace: AttentionTrace) -> dict:
    """Everything that the page shows of a trace, ready for JSON."""
    tables = {name: table.to_dict("records") for name, table in view_data(trace).items()}
    return {"title": [trace.source, " → ", trace.translation], "run": trace.run, "state": view_state(trace), **tables}


def page_spec(chart: alt.TopLevelMixin, **size) -> dict:
    """The Vega-Lite specification of a chart without the theme, which the page adds; `size` fills the card."""
    if size:
        chart = chart.properties(width="container", autosize={"type": "fit", "contains": "padding"}, **size)
    spec = chart.to_dict()
    return {name: value for name, value in spec.items() if name != "config"}


# ---------------------------------------------------------------------------- the report of experiments.py


def save_report(
    path: str | Path,
    sentence: str,
    trace: AttentionTrace,
    corrupted: AttentionTrace,
    steps: pd.DataFrame,
    table: pd.DataFrame,
    importance: pd.DataFrame | None,
) -> None:
    """Writes the results of experiments.py: step table, variants, one corrupted head, and head importance if measured.

    `corrupted` is the trace of the same translation with uniform cross-attention.
    """
    last = len(trace.weights["cross"]) - 1
    charts = {
        "steps": step_heat_map(steps, trace),
        "variants": variant_bars(table),
        "difference": difference(trace, corrupted, "cross", last, 0),
    }
    cards = [
        Card("steps", "Decoding steps", "The logit of each word at each step, beside the attention of the step"),
        Card("variants", "Variants", "Attention corrupted, or a part switched off"),
        Card("difference", "Uniform cross-attention", "One head before and after, on the same translation"),
    ]
    if importance is not None:
        charts["importance"] = importance_heat_map(importance)
        cards.append(Card("importance", "Head importance", "One head switched off at a time"))
    specs = {name: page_spec(chart) for name, chart in charts.items()}
    write_page(path, f"{sentence} → {trace.translation}", trace.run, cards, {"specs": specs})


# ---------------------------------------------------------------------------- the logits study


def save_study(path: str | Path, studied: Iterable[tuple[Variant, pd.DataFrame, AttentionTrace]]) -> None:
    """Writes the figure of the logits study: for each variant of `study`, logits and attention of every step."""
    cards, specs = [], {}
    for i, (variant, steps, trace) in enumerate(studied):
        specs[f"variant{i}"] = page_spec(step_heat_map(steps, trace))
        title = f"{variant.name}: {' '.join(trace.next_tokens)}"
        cards.append(Card(f"variant{i}", title, variant.description, columns=6))
        if i == 0:
            source, run = trace.source, trace.run
    write_page(path, f"Logits study: {source}", run, cards, {"specs": specs})
