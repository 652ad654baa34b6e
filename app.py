"""The live explorer: type a sentence, watch every step, change the model by clicking, in the browser.

    streamlit run app.py

This file lays out the page. Its state is a `Stage` (interpret/stage.py), what it shows is computed in interpret/live.py
and interpret/measures.py, and drawn by interpret/stage_charts.py. Streamlit runs the file again after every click;
results are cached, and a chart whose data alone change is kept by the browser.
"""
# ruff: noqa: E402

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the imports: no request leaves the machine

import html
import json
import re
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import altair as alt
import numpy as np
import pandas as pd
import streamlit as st
import vl_convert
from streamlit.runtime.scriptrunner import get_script_run_ctx

from config import InputError
from corpora.sources import load_split
from corpora.toy import toy_pairs
from interpret import live, stage_charts
from interpret.interventions import VARIANTS
from interpret.measures import scorecard, weights_table
from interpret.page import CAUTION, save_page
from interpret.stage import BEAM_SIZES, EXAMPLE, MODES, PANELS, Stage, toggled
from interpret.theme import PALETTES, Palette, vega_config
from interpret.trace import KIND_NAMES, KINDS, AttentionTrace
from runs.folder import RunFolder
from translate import Translator

SCORECARD_PAIRS = 40
SECONDS_PER_STEP = 1.1  # of the film
TRANSLATING = threading.Lock()  # a change of the model must not meet another browser tab's translation

# ---------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class LoadedRun:
    translator: Translator
    roles: pd.DataFrame  # see `scorecard`
    examples: list[str]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(layers, heads) of each kind."""
        return {k: (len(b), b[0].h) for k, b in self.translator.model.attention_blocks().items()}

    def best_head(self) -> str:
        """The cross-attention head with the lowest alignment error, or else with the largest weights."""
        cross = self.roles[self.roles["kind"] == "cross"]
        best = cross.loc[cross["error"].idxmin() if cross["error"].notna().any() else cross["max_weight"].idxmax()]
        return f"{best['layer']}.{best['head']}"


@st.cache_resource(max_entries=4, show_spinner="Loading the run …")
def load_run(path: str, weights: str, files: tuple[str, ...]) -> LoadedRun:
    """A run with the scorecard of its heads. `files`, its checkpoints, make a run that is still training load again."""
    translator = Translator.load(path, "cpu", weights)
    config, gold = translator.config, None
    if config.datasource == "toy":
        gold = toy_pairs(config.lang_src, config.lang_tgt, "test")[:SCORECARD_PAIRS]
        pairs = [(pair.src_text, pair.tgt_text) for pair in gold]
    else:
        try:
            split = load_split(config, "validation")
            pairs = [(pair["src"], pair["tgt"]) for pair in split.select(range(min(SCORECARD_PAIRS, len(split))))]
        except (InputError, OSError):  # a corpus that is not on this machine
            pairs = [(EXAMPLE, translator.translate([EXAMPLE])[0])]
    return LoadedRun(translator, scorecard(translator, pairs, gold), list(dict.fromkeys(s for s, _ in pairs))[:12])


# ---------------------------------------------------------------------------- computing, once per state


@st.cache_resource(max_entries=64, show_spinner=False)
def baseline_scene(_run: LoadedRun, key: tuple, sentence: str, beam: int, prefix: tuple[int, ...]) -> live.Scene:
    with TRANSLATING:
        return live.translate_scene(_run.translator, sentence, beam, prefix)


@st.cache_resource(max_entries=64, show_spinner=False)
def comparison(_run: LoadedRun, _stage: Stage, _baseline: live.Scene, key: tuple) -> live.Comparison:
    with TRANSLATING:
        variants = _stage.variants(_run.shapes())
        return live.compare_scenes(_run.translator, _stage.sentence, _baseline, variants, _stage.beam, _stage.prefix)


@dataclass(frozen=True)
class View:
    """A stage with everything that its charts need."""

    stage: Stage
    run: LoadedRun
    baseline: live.Scene
    compared: live.Comparison | None  # None: the model is not changed
    palette: Palette

    @property
    def scene(self) -> live.Scene:
        return self.compared.variant if self.compared else self.baseline

    @property
    def trace(self) -> AttentionTrace:
        return self.scene.trace

    @property
    def keys(self) -> list[str]:
        return self.trace.labels(self.stage.kind)[1]

    @property
    def queries(self) -> list[tuple[str, str]]:
        """The tokens (read, written) of the rows."""
        return queries_of(self.trace, self.stage.kind)

    @property
    def row(self) -> int:
        return min(self.stage.row, len(self.queries) - 1)

    @property
    def step(self) -> int:
        """The decoding step in focus."""
        return min(self.stage.row, len(self.trace.tgt_tokens) - 1)

    @property
    def picked(self) -> list[tuple[int, int]]:
        return self.stage.picked(self.run.shapes()[self.stage.kind])

    def weights(self, trace: AttentionTrace | None = None) -> np.ndarray:
        """The mean of the picked heads: (Q, K)."""
        return live.mixed_heads((trace or self.trace).weights[self.stage.kind], self.picked)

    @property
    def heads_text(self) -> str:
        if not self.picked:
            return "mean of all heads"
        names = ", ".join(f"{layer}.{head}" for layer, head in self.picked)
        return f"head {names}" if len(self.picked) == 1 else f"mean of heads {names}"


def queries_of(trace: AttentionTrace, kind: str) -> list[tuple[str, str]]:
    if kind == "encoder":
        return [(token, "") for token in trace.src_tokens]
    return list(zip(trace.tgt_tokens, trace.next_tokens, strict=True))


# ---------------------------------------------------------------------------- state


def update(**changes) -> None:
    st.session_state.stage = replace(st.session_state.stage, **changes)


def bound(field: str, value: object) -> dict:
    """Arguments of a widget that shows and sets a field of the stage."""
    key = f"w_{field}"
    if st.session_state.get(key) != value:
        st.session_state[key] = value
    return {"key": key, "on_change": store, "args": (field,)}


def store(field: str) -> None:
    value = st.session_state[f"w_{field}"]
    if field == "sentence":
        st.session_state.stage = st.session_state.stage.with_sentence(value)
    elif field == "run":
        query = st.session_state.stage
        st.session_state.stage = Stage(run=value, sentence=query.sentence)
    else:
        update(**{field: tuple(value) if isinstance(value, list) else value})


def step_to(row: int) -> None:
    st.session_state.playing = False
    update(row=row)


def play(last: int) -> None:
    """Starts the film, from the beginning if it is at its end, or pauses it."""
    st.session_state.playing = not st.session_state.playing
    if st.session_state.playing:
        st.session_state.film, st.session_state.ticked = True, time.monotonic()
        if st.session_state.stage.row >= last:
            update(row=0)


@st.fragment(run_every=SECONDS_PER_STEP / 2)
def tick(last: int) -> None:
    """Shows the next step of the film when it is due."""
    if st.session_state.playing and time.monotonic() - st.session_state.ticked >= SECONDS_PER_STEP:
        row = st.session_state.stage.row + 1
        update(row=min(row, last))
        st.session_state.ticked = time.monotonic()
        st.session_state.playing = row < last
        st.session_state.film = row < last
        st.rerun()


# ---------------------------------------------------------------------------- showing charts


@st.cache_resource(max_entries=64, show_spinner=False)
def specification(chart: str, tables: tuple[str, ...], dark: bool, clickable: bool, **options) -> dict:
    """The Vega-Lite specification of a chart of interpret/stage_charts.py, without its data."""
    drawn = getattr(stage_charts, chart)(*map(alt.NamedData, tables), **options)
    if clickable:
        drawn.layer[-1] = drawn.layer[-1].add_params(stage_charts.clickable())
    spec = drawn.to_dict()
    look = {"config": vega_config(PALETTES["dark" if dark else "light"]), "padding": {"left": 2, "right": 2, "top": 2, "bottom": 2}}
    return {**spec, **look, "usermeta": {"embedOptions": {"renderer": "svg"}}}


def show(
    chart: str, key: str, tables: dict[str, pd.DataFrame], commands: dict[str, list[str]] | None = None, **options
):
    """Draws a chart. `commands` holds what a click reports, for each row of a table."""
    count = st.session_state.setdefault("count", {}).setdefault(key, 0)
    for name, reported in (commands or {}).items():
        tables[name] = tables[name].assign(click=[command and f"{count}:{command}" for command in reported])
    spec = specification(chart, tuple(tables), is_dark(), bool(commands), **options)
    events = {"on_select": lambda: clicked(key), "selection_mode": ["click"]} if commands else {}
    with st.container(key=f"chart_{key}"):
        st.vega_lite_chart(spec={**spec, "datasets": tables}, key=key, theme=None, width="stretch", **events)


def clicked(key: str) -> None:
    """Carries out the command of a click. The count tells a new click from one that is reported again."""
    selection = st.session_state[key].selection.get("click", [])
    count, _, command = str(selection[0].get("click") if selection else "").partition(":")
    if count == str(st.session_state.count[key]):
        st.session_state.count[key] += 1
        if command.startswith("row "):
            st.session_state.playing = False
        st.session_state.stage = st.session_state.stage.clicked(command)


def is_dark() -> bool:
    return st.context.theme.type == "dark"


def plain(text: str) -> str:
    """Text in which Streamlit finds no Markdown."""
    return re.sub(r"([^\w\s])", r"\\\1", text)


# ---------------------------------------------------------------------------- parts of the page


def style() -> str:
    palette = PALETTES["dark" if is_dark() else "light"]
    return f"""<style>
    .block-container {{ padding: 1.4rem 2.2rem 4rem; max-width: 1500px; }}
    header[data-testid=stHeader] {{ background: transparent; }}
    [class*=st-key-card] {{ background: {palette.card}; border: 1px solid {palette.line}; border-radius: 16px; padding: 18px 20px; }}
    [class*=st-key-chart_] [data-testid=stVegaLiteChart] {{ background: transparent; }}
    [class*=st-key-chart_] {{ overflow-x: auto; }}
    [class*=st-key-chart_] [data-testid=stElementToolbar] {{ display: none; }}
    .stVegaLiteChart svg path {{ transition: d .5s ease, opacity .3s ease; }}
    .stVegaLiteChart svg text {{ transition: transform .5s ease, opacity .3s ease; }}
    .st-key-w_sentence [data-baseweb] {{ background: {palette.card}; }}
    .st-key-w_sentence input {{ font-size: 1.25rem; padding: .7rem 1rem; }}
    .head {{ font-size: 15px; font-weight: 600; margin: 0 0 2px; }}
    .note {{ color: {palette.muted}; font-size: 13px; line-height: 1.45; }}
    .said {{ font-size: 1.75rem; font-weight: 650; letter-spacing: -.01em; line-height: 1.3; overflow-wrap: anywhere; }}
    .said.small {{ font-size: 1.1rem; font-weight: 500; color: {palette.muted}; }}
    .said mark {{ background: none; color: {palette.written}; text-decoration: underline; text-underline-offset: 5px; text-decoration-thickness: 2px; }}
    .chip {{ display: inline-block; background: {palette.sunken}; border-radius: 8px; padding: 2px 9px; margin-right: 6px; font-size: 13px; }}
    .mono {{ font-variant-numeric: tabular-nums; }}
    @media (max-width: 640px) {{
      .block-container {{ padding: 1rem .8rem 3rem; }}
      [class*=st-key-card] {{ padding: 12px; }}
      .said {{ font-size: 1.35rem; }}
      .wide [data-testid=stVegaLiteChart], .st-key-chart_gallery [data-testid=stVegaLiteChart] {{ min-width: 640px; }}
    }}
    </style>"""


def heading(title: str, note: str = "") -> None:
    note = f"<div class=note>{html.escape(note)}</div>" if note else ""
    st.html(f"<div class=head>{html.escape(title)}</div>{note}")


def choose_run() -> tuple[Stage, LoadedRun | None]:
    """The widgets that choose run, weights and search; the loaded run, or None if there is an error to show."""
    stage: Stage = st.session_state.stage
    runs = {str(run): run for run in RunFolder.trained()}
    if not runs:
        raise InputError("no trained run in weights/; train one first: python train.py --preset toy")
    if stage.run not in runs:
        update(run=next(iter(runs)))
        stage = st.session_state.stage
    folder = runs[stage.run]
    epochs = [path.stem.rpartition("_")[2].lstrip("0") for path in folder.epoch_checkpoints()]
    choices = ["best", "latest", *epochs]
    if stage.weights not in choices:
        update(weights="best")
        stage = st.session_state.stage
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        st.html("<div class=said style='font-size:1.3rem'>Explorer</div>", width="stretch")
        st.selectbox("Run", list(runs), **bound("run", stage.run), width=230)
        st.selectbox(
            "Weights", choices, **bound("weights", stage.weights), width=120,
            format_func=lambda name: f"epoch {name}" if name.isdigit() else name,
        )  # fmt: skip
        st.selectbox(
            "Search", BEAM_SIZES, **bound("beam", stage.beam), width=120,
            format_func=lambda size: "greedy" if size == 1 else f"beam of {size}",
        )  # fmt: skip
        share = st.container(width="content", key="share")
    st.session_state.share = share
    run = load_run(stage.run, stage.weights, tuple(path.name for path in folder.checkpoints()))
    if stage.heads is None:
        update(heads=(run.best_head(),))
    return st.session_state.stage, run


def show_sentence(run: LoadedRun) -> None:
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        st.text_input(
            "Sentence", **bound("sentence", st.session_state.stage.sentence), live="200ms", label_visibility="collapsed",
            placeholder="Type a sentence", autocomplete="off", width="stretch",
        )  # fmt: skip
        picked = st.menu_button("Examples", run.examples, format_func=plain, key="examples", width="content")
    if picked:
        st.session_state.stage = st.session_state.stage.with_sentence(picked)
        st.rerun()


def show_translation(view: View) -> None:
    stage, scene, compared = view.stage, view.scene, view.compared
    tokens = scene.trace.next_tokens
    marks = live.changed_tokens(compared.baseline.trace.next_tokens, tokens) if compared else [False] * len(tokens)
    lines = []
    if compared:
        lines.append(
            f"<div class='said small'>{html.escape(compared.baseline.text)} "
            f"<span class='note mono'>baseline, ln p {compared.baseline.log_p.sum():.3f}</span></div>"
        )
    lines.append(f"<div class=said>{marked_text(view, marks)}</div>")
    about = [f"ln p {scene.log_p.sum():.3f}", f"{len(tokens)} steps"]
    if compared:
        about.append(f"log-probability of the baseline's translation {compared.change:+.3f} nats")
    if stage.prefix:
        about.append(f"the first {len(stage.prefix)} tokens are your choice")
    lines.append(f"<div class='note mono'>{' · '.join(map(html.escape, about))}</div>")
    if unknown := view.run.translator.unknown_words(stage.sentence):
        chips = "".join(f"<span class=chip>{html.escape(word)}</span>" for word in unknown)
        lines.append(f"<div class=note>not in the vocabulary: {chips}</div>")
    st.html("".join(lines))


def marked_text(view: View, marks: list[bool]) -> str:
    """The translation as HTML, with the tokens that differ from the baseline marked."""
    scene = view.scene
    if not any(marks):
        return html.escape(scene.text) or "<span class=note>(empty)</span>"
    pieces = [
        f"<mark>{html.escape(token)}</mark>" if mark else html.escape(token)
        for token, mark in zip(scene.trace.next_tokens, marks, strict=True)
        if token != "[EOS]" or mark
    ]
    return " ".join(pieces).replace("▁", "")


def show_stage(view: View) -> None:
    """Ribbons and candidates, and the film."""
    stage, row, last = view.stage, view.row, len(view.queries) - 1
    left, right = st.columns([2.3, 1], gap="medium")
    with left.container(key="card_ribbons"):
        show_kind(view)
        links, tokens = stage_charts.ribbon_tables(
            view.weights(), view.keys, view.queries, row, row if st.session_state.film else None
        )
        commands = [f"row {i}" if side == "query" else "" for side, i in zip(tokens["side"], tokens["i"], strict=True)]
        shown = {"links": links[(links["weight"] >= 0.004)], "tokens": tokens}
        wide = max(len(view.keys), len(view.queries)) * 62
        st.html(f"<style>.st-key-chart_ribbons [data-testid=stVegaLiteChart]{{min-width:{wide}px}}</style>")
        show("ribbons", "ribbons", shown, {"tokens": commands, "links": [f"row {i}" for i in shown["links"]["row"]]})
        show_film(view, last)
    with right.container(key="card_candidates", height="stretch"):
        read, written = view.trace.tgt_tokens[view.step], view.trace.next_tokens[view.step]
        heading(f"Step {view.step + 1}: {read} → {written}", "Next tokens; click one to continue from there")
        candidates = view.trace.candidates[view.step]
        rows = stage_charts.candidate_rows(candidates, view.trace.next_pieces[view.step])
        start = view.scene.ids[: view.scene.last_piece("cross", view.step)]
        ids = [view.run.translator.tokenizer_tgt.token_to_id(token) for token, _ in candidates]
        commands = [f"prefix {' '.join(map(str, [*start, i]))}" for i in ids]
        show("candidate_bars", "candidates", {"rows": rows}, {"rows": commands})
        if stage.prefix:
            st.button("Free choice again", on_click=update, kwargs={"prefix": ()}, width="stretch")


def show_kind(view: View) -> None:
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.segmented_control(
            "Attention", KINDS, **bound("kind", view.stage.kind), required=True, label_visibility="collapsed",
            format_func=lambda kind: KIND_NAMES[kind].capitalize(),
        )  # fmt: skip
        st.html(f"<div class=note>{html.escape(view.heads_text)}</div>", width="content")


def show_film(view: View, last: int) -> None:
    playing = st.session_state.playing
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="film"):
        st.button(
            "", key="back", icon=":material/skip_previous:", shortcut="Left", disabled=view.row == 0,
            on_click=step_to, args=(view.row - 1,),
        )  # fmt: skip
        icon = ":material/pause:" if playing else ":material/play_arrow:"
        label = "Pause" if playing else "Play"
        st.button(label, key="play", icon=icon, type="primary", shortcut="Space", on_click=play, args=(last,))
        st.button(
            "", key="next", icon=":material/skip_next:", shortcut="Right", disabled=view.row >= last,
            on_click=step_to, args=(view.row + 1,),
        )  # fmt: skip
        st.html(f"<div class='note mono'>{view.row + 1} / {last + 1}</div>", width="content")
    if playing:
        tick(last)


def show_heads(view: View) -> None:
    """The gallery, the large heat map and the bars of the row."""
    stage, row, kind = view.stage, view.row, view.stage.kind
    left, middle, right = st.columns([1.35, 1, 0.72], gap="medium")
    with left.container(key="card_gallery", height="stretch"):
        heading("All heads", f"with the top three of row {row}: {' → '.join(filter(None, view.queries[row]))}")
        with st.container(horizontal=True, vertical_alignment="center"):
            st.segmented_control(
                "A click on a head", MODES, **bound("mode", stage.mode), required=True, label_visibility="collapsed"
            )
            st.button("Mean of all", on_click=update, kwargs={"heads": ()}, type="tertiary", disabled=not stage.heads)
            if stage.off:
                st.button("All on", on_click=update, kwargs={"off": ()}, type="tertiary")
        of_kind = view.run.roles[view.run.roles["kind"] == kind]
        roles = {(r.layer, r.head): r.role for r in of_kind.itertuples()}
        off = {tuple(map(int, name.split(".")[1:])) for name in stage.off if name.startswith(kind + ".")}
        weights = view.trace.weights[kind]
        heads = stage_charts.gallery_rows(weights, view.keys, row, roles, view.palette.weights, view.picked, off)
        commands = [f"head {name}" for name in heads["name"]]
        show("gallery", "gallery", {"heads": heads}, {"heads": commands}, layers=len(weights))
    with middle.container(key="card_map", height="stretch"):
        heading(view.heads_text.capitalize(), "rows: queries, read → written · columns: keys")
        show_map(view, view.weights(), "map")
    with right.container(key="card_row", height="stretch"):
        heading(f"Row {row}: {' → '.join(filter(None, view.queries[row]))}", view.heads_text)
        weights = view.weights()[row][: row + 1] if kind == "decoder" else view.weights()[row]
        show("row_bars", "bars", {"rows": stage_charts.bar_rows(weights, view.keys[: len(weights)])})


def show_map(
    view: View, weights: np.ndarray, key: str, trace: AttentionTrace | None = None, diverging: bool = False
) -> None:
    kind, trace = view.stage.kind, trace or view.trace
    cells, labels = stage_charts.cell_rows(
        weights, trace.labels(kind)[1], queries_of(trace, kind), view.row, kind == "decoder"
    )
    commands = {"cells": [f"row {i}" for i in cells["row"]]}
    commands["labels"] = [f"row {i}" if i >= 0 else "" for i in labels["row"]]
    show("heat_map", key, {"cells": cells, "labels": labels}, commands, diverging=diverging)


# ---------------------------------------------------------------------------- panels


def show_panels(view: View) -> None:
    with st.container(key="card_panel"):
        st.segmented_control(
            "Panel", PANELS, **bound("panel", view.stage.panel), required=True, label_visibility="collapsed"
        )
        {PANELS[0]: show_changes, PANELS[1]: show_beam, PANELS[2]: show_inside}[view.stage.panel](view)


def show_changes(view: View) -> None:
    """Corrupt attention and take parts away; baseline and variant side by side."""
    stage, compared = view.stage, view.compared
    groups: dict[str, list[str]] = {}
    for variant in VARIANTS:
        group, _, _ = variant.name.partition(": ")
        groups.setdefault(group if ": " in variant.name else "both", []).append(variant.name)
    about = {variant.name: variant.description for variant in VARIANTS}
    left, right = st.columns([1, 2], gap="large")
    with left:
        heading("Corrupt attention, take parts away", "Heads are switched off in the gallery above.")
        for group, names in groups.items():
            chosen = [name for name in stage.changes if name in names]
            key = f"w_changes_{group}"
            if st.session_state.get(key) != chosen:
                st.session_state[key] = chosen
            st.pills(
                group, names, selection_mode="multi", key=key, on_change=store_changes, args=(group, names),
                wrap=True, format_func=lambda name: name.partition(": ")[2] or name,
            )  # fmt: skip
        for name in stage.changes:
            st.caption(plain(f"{name}: {about[name]}"))
        if stage.changes or stage.off:
            st.button("Restore the model", on_click=update, kwargs={"changes": (), "off": ()}, type="primary")
    with right:
        if not compared:
            heading("Nothing is changed", "Switch off a head or choose a change, and baseline and variant appear here.")
            return
        heading(
            f"{KIND_NAMES[stage.kind].capitalize()}, {view.heads_text}",
            "on the baseline's translation, so that both have the same rows",
        )
        before, after = (view.weights(trace) for trace in (compared.baseline.trace, compared.forced))
        columns = st.columns(3, gap="small")
        for column, title, weights, key in zip(
            columns, ("Baseline", "Variant", "Variant - baseline"), (before, after, after - before), ("map_a", "map_b", "map_d"),
            strict=True,
        ):  # fmt: skip
            with column:
                st.html(f"<div class=note>{title}</div>")
                show_map(view, weights, key, compared.baseline.trace, diverging=key == "map_d")


def store_changes(group: str, names: list[str]) -> None:
    others = tuple(name for name in st.session_state.stage.changes if name not in names)
    update(changes=(*others, *st.session_state[f"w_changes_{group}"]))


def show_beam(view: View) -> None:
    tree = view.scene.tree
    if tree is None:
        heading("Greedy search keeps one hypothesis", "Choose a beam under “Search” to see what it keeps and prunes.")
        return
    counts = tree["state"].value_counts()
    numbers = ", ".join(f"{counts.get(state, 0)} {state}" for state in ("kept", "finished", "pruned"))
    heading(
        f"Beam of {view.stage.beam}: {numbers}",
        "Below each token the score of the hypothesis: ln p divided by the length normalizer. Green outline: finished.",
    )
    nodes, edges = stage_charts.beam_rows(tree)
    wide = 84 * (int(tree["step"].max()) + 2)
    st.html(f"<style>.st-key-chart_beam [data-testid=stVegaLiteChart]{{min-width:{wide}px}}</style>")
    show("beam_chart", "beam", {"nodes": nodes, "edges": edges}, beam_size=view.stage.beam)


def show_inside(view: View) -> None:
    stage, scene = view.stage, view.scene
    shape = view.run.shapes()[stage.kind]
    layer, head = view.picked[0] if view.picked else (shape[0] - 1, 0)
    row = scene.last_piece(stage.kind, view.row)
    step = scene.last_piece("cross", view.step)
    with TRANSLATING, live.changed(view.run.translator.model, stage.variants(view.run.shapes())):
        table = live.inside_head(view.run.translator, scene, stage.sentence, stage.kind, layer, head, row)
        source, target = live.gradient_times_input(view.run.translator, scene, stage.sentence, step)
    gradient = target if stage.kind == "decoder" else source
    table = table.assign(gradient=gradient[: len(table)])
    label = " → ".join(filter(None, view.queries[view.row]))
    heading(
        f"{KIND_NAMES[stage.kind].capitalize()}, head {layer}.{head}, row {view.row}: {label}",
        f"Gradient × input is of ln p of “{scene.pieces.next_tokens[step]}”, written at step {step + 1}.",
    )
    bars, names = stage_charts.inside_rows(table)
    show("inside_chart", "inside", {"bars": bars, "names": names}, keys=len(table))
    st.html(f"<div class=note>{html.escape(CAUTION)}</div>")


# ---------------------------------------------------------------------------- sharing


def share(view: View) -> None:
    """The link of the view, and files."""
    name = re.sub(r"\W+", "-", view.stage.sentence).strip("-")[:40] or "view"
    with st.session_state.share.popover("Share", icon=":material/share:"):
        st.caption("This address restores the view:")
        st.code(st.context.url or "", language=None, wrap_lines=True)
        for label, suffix, make in (
            ("Offline page (HTML)", "html", export_html), ("Picture (PNG)", "png", export_png), ("Picture (SVG)", "svg", export_svg),
            ("Weights (CSV)", "csv", export_csv), ("Everything shown (JSON)", "json", export_json),
        ):  # fmt: skip
            st.download_button(
                label,
                lambda make=make: make(view),
                f"{name}.{suffix}",
                key=f"export_{suffix}",
                on_click="ignore",
                width="stretch",
            )


def export_html(view: View) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        save_page(view.trace, path)
        return path.read_text(encoding="utf8")


def picture(view: View) -> dict:
    """Ribbons and heat map as one Vega-Lite specification."""
    links, tokens = stage_charts.ribbon_tables(view.weights(), view.keys, view.queries, view.row)
    cells = stage_charts.cell_rows(view.weights(), view.keys, view.queries, view.row, view.stage.kind == "decoder")
    ribbons = stage_charts.ribbons(links[links["weight"] >= 0.004], tokens, "860").properties(width=860)
    chart = alt.vconcat(ribbons, stage_charts.heat_map(*cells).properties(width=860), spacing=30)
    title = f"{KIND_NAMES[view.stage.kind].capitalize()}, {view.heads_text}"
    spec = chart.properties(title=alt.TitleParams(title, subtitle=[view.stage.sentence, view.scene.text])).to_dict()
    return {**spec, "config": vega_config(view.palette), "padding": 20}


def export_png(view: View) -> bytes:
    return vl_convert.vegalite_to_png(picture(view), scale=2)


def export_svg(view: View) -> str:
    return vl_convert.vegalite_to_svg(picture(view))


def export_csv(view: View) -> str:
    return pd.concat([weights_table(view.trace, kind) for kind in KINDS]).to_csv(index=False)


def export_json(view: View) -> str:
    """The state, the translation and the weights of the picked heads, with their row sums."""
    weights, scene = view.weights(), view.scene
    shown = {
        "stage": asdict(view.stage), "translation": scene.text, "log_probability": float(scene.log_p.sum()),
        "keys": view.keys, "queries": view.queries, "weights": weights.round(6).tolist(),
        "row_sums": weights.sum(1).round(6).tolist(), "candidates": scene.trace.candidates,
    }  # fmt: skip
    return json.dumps(shown, ensure_ascii=False, indent=1)


# ---------------------------------------------------------------------------- the page


def main() -> None:
    st.set_page_config(page_title="Explorer", layout="wide")
    state = st.session_state
    if "stage" not in state:
        state.stage, state.playing, state.film = Stage.from_query(st.query_params.to_dict()), False, False
    st.html(style())
    try:
        _, run = choose_run()
        show_sentence(run)
        stage: Stage = state.stage
        key = (stage.run, stage.weights, tuple(path.name for path in RunFolder(stage.run).checkpoints()))
        baseline = baseline_scene(run, key, stage.sentence, stage.beam, stage.prefix)
        changes = (stage.off, stage.changes)
        compared = None
        if any(changes):
            compared = comparison(run, stage, baseline, (key, stage.sentence, stage.beam, stage.prefix, changes))
        view = View(stage, run, baseline, compared, PALETTES["dark" if is_dark() else "light"])
        show_translation(view)
        show_stage(view)
        show_heads(view)
        show_panels(view)
        if st.query_params.to_dict() != stage.to_query():
            st.query_params.from_dict(stage.to_query())
        share(view)
    except InputError as error:
        st.error(plain(str(error)))


if __name__ == "__main__":
    if get_script_run_ctx(suppress_warning=True) is None:
        print("The explorer runs in the browser: streamlit run app.py")
    else:
        main()
