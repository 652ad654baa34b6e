"""What the live explorer shows of a stage: the run with the roles of its heads, tables for the charts, files to save.

L  layers    H  heads    Q  query positions (rows)    K  key positions (columns)
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import altair as alt
import numpy as np
import pandas as pd
import vl_convert

from config import InputError
from corpora.sources import gold_pairs, load_split
from interpret import stage_charts
from interpret.live import Comparison, Scene, changed, changed_tokens, gradient_times_input, inside_head, mixed_heads
from interpret.measures import scorecard, weights_table
from interpret.page import save_page
from interpret.stage import EXAMPLE, Stage
from interpret.theme import Palette, vega_config
from interpret.trace import KIND_NAMES, KINDS, AttentionTrace
from translate import Translator

SCORECARD_PAIRS = 40
EXAMPLES = 12

# ---------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class LoadedRun:
    """A run, what its heads do, and sentences to try."""

    translator: Translator
    heads: pd.DataFrame  # see `scorecard`
    examples: list[str]

    @classmethod
    def load(cls, path: str, weights: str) -> "LoadedRun":
        """Loads a run. The roles of heads are those on the first pairs of its test or validation data.

        Raises InputError for a run that cannot be loaded.
        """
        translator = Translator.load(path, "cpu", weights)
        gold = [p for p in gold_pairs(translator.config) if translator.fits(p.src_text, p.tgt_text)][:SCORECARD_PAIRS]
        pairs = [(pair.src_text, pair.tgt_text) for pair in gold] or first_pairs(translator)
        return cls(translator, scorecard(translator, pairs, gold), list(dict.fromkeys(s for s, _ in pairs))[:EXAMPLES])

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(layers, heads) of each kind."""
        return {k: (len(blocks), blocks[0].h) for k, blocks in self.translator.model.attention_blocks().items()}

    def best_head(self) -> str:
        """The cross-attention head with the lowest alignment error, or else with the largest weights."""
        cross = self.heads[self.heads["kind"] == "cross"]
        best = cross.loc[cross["error"].idxmin() if cross["error"].notna().any() else cross["max_weight"].idxmax()]
        return f"{best['layer']}.{best['head']}"

    def roles(self, kind: str) -> dict[tuple[int, int], tuple[str, str]]:
        """The role of each head (layer, head) of a kind, and figures about it."""
        return {
            (row.layer, row.head): (
                row.role,
                f"{row.role}, entropy {row.entropy:.1f} bits"
                + (f", alignment error {row.error:.2f}" if row.error == row.error else ""),
            )
            for row in self.heads[self.heads["kind"] == kind].itertuples()
        }


def first_pairs(translator: Translator) -> list[tuple[str, str]]:
    """The first validation pairs that are short enough.

    An example if there are none, or the corpus is not on this machine.
    """
    try:
        split = load_split(translator.config, "validation")[: 4 * SCORECARD_PAIRS]
    except (InputError, OSError):
        split = {"src": [], "tgt": []}
    pairs = [pair for pair in zip(split["src"], split["tgt"], strict=True) if is_short(translator, *pair)]
    return pairs[:SCORECARD_PAIRS] or [(EXAMPLE, translator.translate([EXAMPLE])[0])]


def is_short(translator: Translator, source: str, target: str) -> bool:
    """Whether both sides have 1 to 20 words, and no more tokens than the model can read."""
    return translator.fits(source, target) and all(0 < len(text.split()) <= 20 for text in (source, target))


# ---------------------------------------------------------------------------- the view


def queries_of(trace: AttentionTrace, kind: str) -> list[tuple[str, str]]:
    """The tokens (read, written) of the rows; in the encoder nothing is written."""
    if kind == "encoder":
        return [(token, "") for token in trace.src_tokens]
    return list(zip(trace.tgt_tokens, trace.next_tokens, strict=True))


@dataclass(frozen=True)
class View:
    """A stage with what has been computed for it."""

    stage: Stage
    run: LoadedRun
    baseline: Scene
    compared: Comparison | None  # None: the model is not changed
    palette: Palette

    @property
    def scene(self) -> Scene:
        """The translation of the model as it is, changed or not."""
        return self.compared.variant if self.compared else self.baseline

    @property
    def trace(self) -> AttentionTrace:
        return self.scene.trace

    @property
    def keys(self) -> list[str]:
        return self.trace.labels(self.stage.kind)[1]

    @property
    def queries(self) -> list[tuple[str, str]]:
        return queries_of(self.trace, self.stage.kind)

    @property
    def row(self) -> int:
        return min(self.stage.row, len(self.queries) - 1)

    @property
    def row_name(self) -> str:
        return stage_charts.row_name(self.queries[self.row])

    @property
    def step(self) -> int:
        """The decoding step in focus, counted from 0."""
        return min(self.stage.row, len(self.trace.tgt_tokens) - 1)

    @property
    def picked(self) -> list[tuple[int, int]]:
        """The picked heads (layer, head); none: all."""
        return self.stage.picked(self.run.shapes[self.stage.kind])

    @property
    def off(self) -> set[tuple[int, int]]:
        """The heads of this kind that are switched off."""
        names = (name.split(".") for name in self.stage.off)
        return {(int(layer), int(head)) for kind, layer, head in names if kind == self.stage.kind}

    @property
    def heads_name(self) -> str:
        if not self.picked:
            return "Mean of all heads"
        names = ", ".join(f"{layer}.{head}" + " (off)" * ((layer, head) in self.off) for layer, head in self.picked)
        return f"Head {names}" if len(self.picked) == 1 else f"Mean of heads {names}"

    def weights(self, trace: AttentionTrace | None = None) -> np.ndarray:
        """The mean of the picked heads in a trace: (Q, K)."""
        return mixed_heads((trace or self.trace).weights[self.stage.kind], self.picked)

    def marks(self) -> list[bool]:
        """Which of the tokens written differ from the baseline."""
        tokens = self.trace.next_tokens
        return changed_tokens(self.baseline.trace.next_tokens, tokens) if self.compared else [False] * len(tokens)

    # ------------------------------------------------------------------------ tables for the charts

    def ribbon_tables(self, last: int | None = None) -> dict[str, pd.DataFrame]:
        tables = stage_charts.ribbon_tables(self.weights(), self.keys, self.queries, self.row, last)
        return dict(zip(("links", "tokens"), tables, strict=True))

    def candidate_tables(self) -> dict[str, pd.DataFrame]:
        """The candidates of the step; a click makes the translation start with what is written before, and it."""
        candidates = self.trace.candidates[self.step]
        start = self.scene.ids[: self.scene.last_piece("cross", self.step)]
        ids = [self.run.translator.tokenizer_tgt.token_to_id(token) for token, _ in candidates]
        commands = [f"prefix {' '.join(map(str, [*start, i]))}" for i in ids]
        return {"rows": stage_charts.candidate_rows(candidates, self.trace.next_pieces[self.step], commands)}

    def gallery_tables(self) -> dict[str, pd.DataFrame]:
        kind, colors = self.stage.kind, self.palette.weights
        weights, roles = self.trace.weights[kind], self.run.roles(kind)
        keys = self.keys[: self.row + 1] if kind == "decoder" else self.keys  # the others are masked
        return {"heads": stage_charts.gallery_rows(weights, keys, self.row, roles, colors, self.picked, self.off)}

    def map_tables(self, weights: np.ndarray, trace: AttentionTrace) -> dict[str, pd.DataFrame]:
        kind = self.stage.kind
        keys, queries = trace.labels(kind)[1], queries_of(trace, kind)
        row = min(self.stage.row, len(queries) - 1)  # the trace may be that of the baseline
        tables = stage_charts.cell_rows(weights, keys, queries, row, causal=kind == "decoder")
        return dict(zip(("cells", "labels"), tables, strict=True))

    def bar_tables(self) -> dict[str, pd.DataFrame]:
        seen = self.row + 1 if self.stage.kind == "decoder" else len(self.keys)
        return {"rows": stage_charts.bar_rows(self.weights()[self.row, :seen], self.keys[:seen])}

    def inside_tables(self) -> dict[str, pd.DataFrame]:
        """The parts of the row in the first picked head, and gradient x input of the token written at the step."""
        kind, translator = self.stage.kind, self.run.translator
        layer, head = self.inside
        place = kind, layer, head, self.scene.last_piece(kind, self.row)
        with changed(translator.model, self.stage.variants(self.run.shapes)):
            table = inside_head(translator, self.scene, self.stage.sentence, *place)
            step = self.scene.last_piece("cross", self.step)
            source, target = gradient_times_input(translator, self.scene, self.stage.sentence, step)
        gradient = target if kind == "decoder" else source
        tables = stage_charts.inside_rows(table.assign(gradient=gradient[: len(table)]))
        return dict(zip(("bars", "names"), tables, strict=True))

    @property
    def inside(self) -> tuple[int, int]:
        """The head (layer, head) that is looked into: the first picked one."""
        return self.picked[0] if self.picked else (self.run.shapes[self.stage.kind][0] - 1, 0)

    # ------------------------------------------------------------------------ files

    def to_html(self) -> str:
        """The offline page of the translation."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "page.html"
            save_page(self.trace, path)
            return path.read_text(encoding="utf8")

    def picture(self, width: int = 860) -> dict:
        """Ribbons and heat map as one Vega-Lite specification."""
        ribbons = stage_charts.ribbons(**self.ribbon_tables(), width=str(width)).properties(width=width)
        heat_map = stage_charts.heat_map(**self.map_tables(self.weights(), self.trace), width=str(width))
        chart = alt.vconcat(ribbons, heat_map.properties(width=width), spacing=30)
        title = f"{KIND_NAMES[self.stage.kind].capitalize()}: {self.heads_name.lower()}"
        subtitle = [self.stage.sentence, self.scene.text]
        spec = chart.properties(title=alt.TitleParams(title, subtitle=subtitle)).to_dict()
        return {**spec, "config": vega_config(self.palette), "padding": 20}

    def to_png(self) -> bytes:
        return vl_convert.vegalite_to_png(self.picture(), scale=2)

    def to_svg(self) -> str:
        return vl_convert.vegalite_to_svg(self.picture())

    def to_csv(self) -> str:
        """The weights of all heads, one per line."""
        return pd.concat([weights_table(self.trace, kind) for kind in KINDS]).to_csv(index=False)

    def to_json(self) -> str:
        """The stage, the translation, and the weights of the picked heads with their row sums."""
        weights, scene = self.weights(), self.scene
        shown = {
            "stage": asdict(self.stage), "translation": scene.text, "log_probability": float(scene.log_p.sum()),
            "keys": self.keys, "queries": self.queries, "weights": weights.round(6).tolist(),
            "row_sums": weights.sum(1).round(6).tolist(), "candidates": scene.trace.candidates,
        }  # fmt: skip
        return json.dumps(shown, ensure_ascii=False, indent=1)
