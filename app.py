"""The live explorer: type a sentence, watch every step, change the model by clicking, in the browser.

    streamlit run app.py

This file lays out the page. Its state is a `Stage` (interpret/stage.py); what it shows is computed in
interpret/live.py, prepared in interpret/stage_view.py and drawn by interpret/stage_charts.py. Streamlit runs the file
again after every click. Results are cached, and the browser keeps a chart of which only the data change.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the imports: no request leaves the machine

import contextlib
import html
import re
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import altair as alt
import numpy as np
import pandas as pd
import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

from config import InputError
from interpret import stage_charts
from interpret.interventions import VARIANTS
from interpret.live import Comparison, Scene, compare_scenes, translate_scene
from interpret.page import CAUTION
from interpret.stage import BEAM_SIZES, MODES, PANELS, Stage
from interpret.stage_view import LoadedRun, View
from interpret.theme import PALETTES, Palette, vega_config
from interpret.trace import KIND_NAMES, KINDS, AttentionTrace
from runs.folder import RunFolder, whole

SECONDS_PER_STEP = 1.1  # of the film
PAUSE = "200ms"  # in typing, after which the sentence is translated
MARGIN = 3  # of charts, in pixels
CSS = (Path(__file__).parent / "interpret" / "stage.css").read_text(encoding="utf8")
COMPUTING = threading.Lock()  # the change of a model must not meet the translation of another browser tab

# ---------------------------------------------------------------------------- computing, once per state


@st.cache_resource(max_entries=4, show_spinner="Loading the run …")
def load_run(path: str, weights: str, files: tuple) -> LoadedRun:
    """A run. `files`, see `version_of`, make a run load again after it has changed."""
    return LoadedRun.load(path, weights)


def version_of(folder: RunFolder) -> tuple:
    """Name, time and size of the files that change when a run is trained on, trained anew or exported again."""
    version = []
    for path in [*folder.checkpoints(), folder.exported_weights, folder.scores_file, folder.config_file]:
        with contextlib.suppress(FileNotFoundError):  # pruned by now, or a file that this run does not have
            version.append((path.name, path.stat().st_mtime_ns, path.stat().st_size))
    return tuple(version)


@st.cache_resource(max_entries=64, show_spinner=False)
def baseline_of(_run: LoadedRun, run_key: tuple, sentence: str, beam: int, prefix: tuple[int, ...]) -> Scene:
    with COMPUTING:
        return translate_scene(_run.translator, sentence, beam, prefix)


@st.cache_resource(max_entries=64, show_spinner=False)
def comparison_of(_run: LoadedRun, _stage: Stage, _baseline: Scene, key: tuple) -> Comparison:
    with COMPUTING:
        variants = _stage.variants(_run.shapes)
        return compare_scenes(_run.translator, _stage.sentence, _baseline, variants, _stage.beam, _stage.prefix)


def view_of(run: LoadedRun, run_key: tuple, stage: Stage) -> View:
    baseline = baseline_of(run, run_key, stage.sentence, stage.beam, stage.prefix)
    key = (run_key, stage.sentence, stage.beam, stage.prefix, stage.off, stage.changes)
    compared = comparison_of(run, stage, baseline, key) if stage.off or stage.changes else None
    return View(stage, run, baseline, compared, palette())


# ---------------------------------------------------------------------------- state


def update(**changes: object) -> None:
    """Replaces fields of the stage."""
    st.session_state.stage = replace(st.session_state.stage, **changes)


def bound(field: str) -> dict:
    """Arguments of a widget that shows and sets a field of the stage."""
    key, value = f"w_{field}", getattr(st.session_state.stage, field)
    if st.session_state.get(key) != value:  # setting it unasked would overwrite what is being typed
        st.session_state[key] = value
    return {"key": key, "on_change": store, "args": (field,)}


def store(field: str) -> None:
    value, stage = st.session_state[f"w_{field}"], st.session_state.stage
    if field == "sentence":
        st.session_state.stage = stage.with_sentence(value)
    elif field == "run":  # heads, tokens and epochs are those of a run
        st.session_state.stage = Stage(run=value, sentence=stage.sentence, panel=stage.panel)
    else:
        update(**{field: value})


def store_changes(group: str, names: list[str]) -> None:
    others = tuple(name for name in st.session_state.stage.changes if name not in names)
    update(changes=(*others, *st.session_state[f"w_changes_{group}"]))


def step_to(row: int) -> None:
    st.session_state.playing = False
    update(row=row)


def play(last: int) -> None:
    """Starts the film, from the beginning if it is at its end, or pauses it."""
    state = st.session_state
    state.playing, state.ticked = not state.playing, time.monotonic()
    if state.playing:
        state.film = True
        if state.stage.row >= last:
            update(row=0)


@st.fragment(run_every=SECONDS_PER_STEP / 3)
def tick(last: int) -> None:
    """Shows the next step of the film when it is due."""
    state = st.session_state
    if state.playing and time.monotonic() - state.ticked >= SECONDS_PER_STEP:
        update(row=min(state.stage.row + 1, last))
        state.ticked = time.monotonic()
        state.playing = state.film = state.stage.row < last
        st.rerun()


# ---------------------------------------------------------------------------- showing


def is_dark() -> bool:
    return st.context.theme.type == "dark"


def palette() -> Palette:
    return PALETTES["dark" if is_dark() else "light"]


def plain(text: str) -> str:
    """Text in which Streamlit finds no Markdown."""
    return re.sub(r"([^\w\s])", r"\\\1", text)


def heading(title: str, note: str = "") -> None:
    st.html(f"<div class=head>{html.escape(title)}</div><div class=note>{html.escape(note)}</div>")


def show(chart: str, key: str, tables: dict[str, pd.DataFrame], width: int = 0, **options: object) -> None:
    """Draws a chart of interpret/stage_charts.py. `width` is the least in pixels; `options` are those of the chart."""
    count = st.session_state.counts.setdefault(key, 0)
    clickable = {name: table for name, table in tables.items() if "command" in table}
    for name, table in clickable.items():
        tables[name] = table.assign(click=[command and f"{count}:{command}" for command in table["command"]])
    spec = specification(chart, tuple(tables), is_dark(), bool(clickable), **options)
    events = {"on_select": lambda: clicked(key), "selection_mode": ["click"]} if clickable else {}
    with st.container(key=f"chart_{key}"):
        if width:
            st.html(f"<style>.st-key-chart_{key} [data-testid=stVegaLiteChart]{{min-width:{width}px}}</style>")
        st.vega_lite_chart(spec={**spec, "datasets": tables}, key=key, theme=None, width="stretch", **events)


@st.cache_resource(max_entries=64, show_spinner=False)
def specification(chart: str, tables: tuple[str, ...], dark: bool, clickable: bool, **options: object) -> dict:
    """The Vega-Lite specification of a chart, without its data."""
    drawn = getattr(stage_charts, chart)(*map(alt.NamedData, tables), **options)
    if clickable:
        drawn.layer[-1] = drawn.layer[-1].add_params(stage_charts.clickable())
    spec = drawn.to_dict()
    margins = dict.fromkeys(("left", "right", "top", "bottom"), MARGIN)
    look = {"config": vega_config(PALETTES["dark" if dark else "light"]), "padding": margins}
    size = {"height": spec["height"] + 2 * MARGIN}  # Streamlit fits the chart with its margins into the height
    return {**spec, **look, **size, "usermeta": {"embedOptions": {"renderer": "svg"}}}


def clicked(key: str) -> None:
    """Carries out the command of a click. The count tells a new click from one that is reported again."""
    state = st.session_state
    selection = state[key].selection.get("click", [])
    count, _, command = str(selection[0].get("click") if selection else "").partition(":")
    if count == str(state.counts[key]):
        state.counts[key] += 1
        state.playing = False
        state.stage = state.stage.clicked(command)


# ---------------------------------------------------------------------------- parts of the page


def choose_run() -> tuple[LoadedRun, tuple, st.delta_generator.DeltaGenerator]:
    """The widgets that choose run, weights and search. Returns the run, a key of it, and the place of `share`.

    Raises InputError if there is no run, or it cannot be loaded.
    """
    runs = {str(run): run for run in [*RunFolder.trained(), *RunFolder.pretrained()]}
    if not runs:
        raise InputError("no trained run in weights/; train one first: python train.py --preset toy")
    if st.session_state.stage.run not in runs:
        update(run=next(iter(runs)))
    folder = runs[st.session_state.stage.run]
    epochs = list(dict.fromkeys(str(int(whole(path).stem.rpartition("_")[2])) for path in folder.epoch_checkpoints()))
    weights = ["best"] if folder.exported_weights.is_file() else ["best", "latest", *epochs]
    if st.session_state.stage.weights not in weights:
        update(weights="best")
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        st.html("<div class=name>Explorer</div>", width="stretch")
        st.selectbox("Run", list(runs), width=230, **bound("run"))
        name = {"best": "best", "latest": "latest"}
        st.selectbox("Weights", weights, width=120, format_func=lambda w: name.get(w, f"epoch {w}"), **bound("weights"))
        name_of = {size: f"beam of {size}" for size in BEAM_SIZES} | {1: "greedy"}
        st.selectbox("Search", BEAM_SIZES, width=120, format_func=name_of.get, **bound("beam"))
        place = st.container(width="content")
    key = (str(folder), st.session_state.stage.weights, version_of(folder))
    run = load_run(*key)
    if st.session_state.stage.heads is None:
        update(heads=(run.best_head(),))
    return run, key, place


def choose_sentence(run: LoadedRun) -> None:
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        quiet = {"label_visibility": "collapsed", "autocomplete": "off", "placeholder": "Type a sentence"}
        st.text_input("Sentence", live=PAUSE, **quiet, **bound("sentence"))
        if picked := st.menu_button("Examples", run.examples, format_func=plain, key="examples"):
            st.session_state.stage = st.session_state.stage.with_sentence(picked)
            st.rerun()


def show_translation(view: View) -> None:
    """The translation; of a changed model with its differences from the baseline."""
    scene, compared, lines = view.scene, view.compared, []
    about = [f"ln p {scene.log_p.sum():.3f}", f"{len(scene.trace.next_tokens)} steps"]
    if compared:
        before = f"baseline, ln p {view.baseline.log_p.sum():.3f}"
        lines.append(
            f"<div class='said before'>{html.escape(view.baseline.text)} <span class=note>{before}</span></div>"
        )
        about.append(f"ln p of the baseline's translation: {compared.change:+.3f} nats")
    if view.stage.prefix:
        about.append(f"starts with your {len(view.stage.prefix)} tokens")
    lines.append(f"<div class=said>{translation_html(view)}</div><div class=note>{' · '.join(about)}</div>")
    if unknown := view.run.translator.unknown_words(view.stage.sentence):
        chips = "".join(f"<span class=chip>{html.escape(word)}</span>" for word in unknown)
        lines.append(f"<div class=note>Not in the vocabulary: {chips}</div>")
    st.html("".join(lines))


def translation_html(view: View) -> str:
    marks = view.marks()
    if not any(marks):
        return html.escape(view.scene.text) or "<span class=note>(empty)</span>"
    tokens, parts = view.trace.next_tokens, []
    has_subwords = any(token.startswith("▁") for token in tokens)
    for token, mark in zip(tokens, marks, strict=True):
        if mark or token != "[EOS]":
            space = "" if has_subwords and not token.startswith(("▁", "[EOS]")) else " "
            text = html.escape(token.replace("▁", " ").strip())
            parts.append(space + (f"<mark>{text}</mark>" if mark else text))
    return "".join(parts).strip()


def show_stage(view: View) -> None:
    """Ribbons with the film, and the candidates of the step."""
    left, right = st.columns([2.3, 1], gap="small")
    with left.container(key="card_ribbons"):
        short = {kind: KIND_NAMES[kind].removesuffix(" self-attention").capitalize() for kind in KINDS}
        with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
            st.segmented_control(
                "Attention", KINDS, format_func=short.get, required=True, label_visibility="collapsed", **bound("kind")
            )
            st.html(f"<div class=note>{html.escape(view.heads_name)}</div>", width="content")
        tables = view.ribbon_tables(view.row if st.session_state.film else None)
        show("ribbons", "ribbons", tables, stage_charts.ribbon_width(view.keys, view.queries))
        show_film(view)
    with right.container(key="card_candidates", height="stretch"):
        read, written = view.trace.tgt_tokens[view.step], view.trace.next_tokens[view.step]
        heading(f"Step {view.step + 1}: {read} → {written}", "The next token; click another to continue from there")
        show("candidate_bars", "candidates", view.candidate_tables())
        if view.stage.prefix:
            st.button("Let the model choose", on_click=update, kwargs={"prefix": ()}, width="stretch")


def show_film(view: View) -> None:
    playing, last = st.session_state.playing, len(view.queries) - 1
    reads = "the decoder reads the small token and writes the large one"
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        back = {"on_click": step_to, "args": (view.row - 1,), "disabled": view.row == 0}
        st.button("", key="back", icon=":material/skip_previous:", shortcut="Left", **back)
        icon = ":material/pause:" if playing else ":material/play_arrow:"
        name = "Pause" if playing else "Play"
        st.button(name, key="play", icon=icon, type="primary", shortcut="Space", on_click=play, args=(last,))
        forward = {"on_click": step_to, "args": (view.row + 1,), "disabled": view.row >= last}
        st.button("", key="next", icon=":material/skip_next:", shortcut="Right", **forward)
        note = f"{view.row + 1} / {last + 1}" + (f" · below, {reads}" if view.stage.kind != "encoder" else "")
        st.html(f"<div class=note>{note}</div>", width="content")
    if playing:
        tick(last)


def show_heads(view: View) -> None:
    """The gallery, the large heat map and the bars of the row."""
    left, middle, right = st.columns([1.35, 1, 0.72], gap="small")
    with left.container(key="card_gallery", height="stretch"):
        heading("All heads", f"with the three largest weights of row {view.row}: {view.row_name}")
        with st.container(horizontal=True, vertical_alignment="center"):
            st.segmented_control(
                "A click on a head", MODES, format_func=str.capitalize, required=True, label_visibility="collapsed",
                **bound("mode"),
            )  # fmt: skip
            st.button("Mean of all", on_click=update, kwargs={"heads": ()}, type="tertiary", disabled=not view.picked)
            if view.stage.off:
                st.button("All on", on_click=update, kwargs={"off": ()}, type="tertiary")
        show("gallery", "gallery", view.gallery_tables(), layers=view.run.shapes[view.stage.kind][0])
    with middle.container(key="card_map", height="stretch"):
        heading(view.heads_name, "rows: queries, read → written · columns: keys")
        show_map(view, "map", view.weights(), view.trace)
    with right.container(key="card_row", height="stretch"):
        heading(f"Row {view.row}: {view.row_name}", view.heads_name)
        show("row_bars", "bars", view.bar_tables())


def show_map(view: View, key: str, weights: np.ndarray, trace: AttentionTrace, diverging: bool = False) -> None:
    show("heat_map", key, view.map_tables(weights, trace), diverging=diverging)


# ---------------------------------------------------------------------------- panels


def show_panel(view: View) -> None:
    with st.container(key="card_panel"):
        st.segmented_control("Panel", PANELS, required=True, label_visibility="collapsed", **bound("panel"))
        dict(zip(PANELS, (show_changes, show_beam, show_inside), strict=True))[view.stage.panel](view)


def show_changes(view: View) -> None:
    """Attention to corrupt and parts to take away; baseline and variant side by side."""
    left, right = st.columns([1, 2], gap="large")
    with left:
        choose_changes(view.stage)
    with right:
        if not view.compared:
            heading("The model is unchanged", "Choose a change, and baseline and variant appear here.")
            return
        kind = KIND_NAMES[view.stage.kind].capitalize()
        heading(
            f"{kind}: {view.heads_name.lower()}", "both on the baseline's translation, so that the rows are the same"
        )
        before, after = (view.weights(trace) for trace in (view.compared.baseline.trace, view.compared.forced))
        maps = {"Baseline": before, "Variant": after, "Variant - baseline": after - before}
        for i, (column, name) in enumerate(zip(st.columns(3, gap="small"), maps, strict=True)):
            with column:
                st.html(f"<div class=note>{name}</div>")
                show_map(view, f"map_{i}", maps[name], view.compared.baseline.trace, diverging=i == 2)


def choose_changes(stage: Stage) -> None:
    heading("Corrupt attention, take parts away", "To switch off heads, use the gallery above.")
    groups: dict[str, list[str]] = {}
    for variant in VARIANTS:
        groups.setdefault(variant.name.partition(": ")[0] if ": " in variant.name else "both", []).append(variant.name)
    for group, names in groups.items():
        key, chosen = f"w_changes_{group}", [name for name in stage.changes if name in names]
        if st.session_state.get(key) != chosen:
            st.session_state[key] = chosen
        st.pills(
            group.capitalize(), names, selection_mode="multi", wrap=True, key=key, on_change=store_changes,
            args=(group, names), format_func=lambda name: name.partition(": ")[2] or name,
        )  # fmt: skip
    for variant in VARIANTS:
        if variant.name in stage.changes:
            heading(variant.name, variant.description)
    if stage.changes or stage.off:
        st.button("Restore the model", on_click=update, kwargs={"changes": (), "off": ()}, type="primary")


def show_beam(view: View) -> None:
    tree = view.scene.tree
    if tree is None:
        heading("Greedy search keeps one hypothesis", "Choose a beam under Search to see what it keeps and prunes.")
        return
    numbers = ", ".join(f"{(tree['state'] == state).sum()} {state}" for state in ("kept", "finished", "pruned"))
    heading(
        f"Beam of {view.stage.beam}: {numbers}",
        "Below a token: the score, ln p divided by the length normalizer. Outlined: finished. Pale: pruned."
        + " ln p counts from your tokens on, which are given." * bool(view.stage.prefix),
    )
    nodes, edges = stage_charts.beam_rows(tree)
    width = 84 * (int(tree["step"].max()) + 2)
    show("beam_chart", "beam", {"nodes": nodes, "edges": edges}, width, beam_size=view.stage.beam)


def show_inside(view: View) -> None:
    """Query·key, value norms and gradient x input of the row."""
    with COMPUTING:
        tables = view.inside_tables()
    name = KIND_NAMES[view.stage.kind].capitalize()
    layer, head = view.inside
    written = view.trace.next_tokens[view.step]
    heading(
        f"{name}, head {layer}.{head}, row {view.row}: {view.row_name}",
        f"Gradient × input is of ln p of “{written}”, which is written at step {view.step + 1}.",
    )
    keys = len(tables["bars"]["token"]) // tables["bars"]["measure"].nunique()
    show("inside_chart", "inside", tables, keys=keys)
    st.html(f"<div class=note>{html.escape(CAUTION)}</div>")


def share(view: View, place: st.delta_generator.DeltaGenerator) -> None:
    """The link of the view, and files."""
    name = re.sub(r"\W+", "-", view.stage.sentence).strip("-")[:40] or "view"
    with place.popover("Share", icon=":material/share:"):
        st.html("<div class=note>The address of this page restores the view.</div>")
        for label, suffix, make in (
            ("Offline page (HTML)", "html", view.to_html),
            ("Picture (PNG)", "png", view.to_png),
            ("Picture (SVG)", "svg", view.to_svg),
            ("Weights of all heads (CSV)", "csv", view.to_csv),
            ("What is shown (JSON)", "json", view.to_json),
        ):
            st.download_button(label, make, f"{name}.{suffix}", key=suffix, on_click="ignore", width="stretch")


# ---------------------------------------------------------------------------- the page


def main() -> None:
    st.set_page_config(page_title="Explorer", layout="wide")
    state = st.session_state
    if "stage" not in state:
        state.stage, state.counts = Stage.from_query(st.query_params.to_dict()), {}
        state.playing = state.film = False
    colors = "".join(f"--{name}:{value};" for name, value in asdict(palette()).items() if isinstance(value, str))
    st.html(f"<style>:root{{{colors}}}{CSS}</style>")
    try:
        run, key, place = choose_run()
        choose_sentence(run)
        view = view_of(run, key, state.stage)
    except InputError as error:
        st.error(plain(str(error)))
        return
    show_translation(view)
    show_stage(view)
    show_heads(view)
    show_panel(view)
    share(view, place)
    if st.query_params.to_dict() != (query := state.stage.to_query()):
        st.query_params.from_dict(query)


if __name__ == "__main__":
    if get_script_run_ctx(suppress_warning=True) is None:
        print("The explorer runs in the browser. Start it with: streamlit run app.py")
    else:
        main()
