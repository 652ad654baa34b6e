"""The state of the live explorer: one frozen value, which clicks and widgets replace and a link restores.

A click on a chart reports a command, such as "row 3" or "head 1.0". Heads are named layer.head, those of one kind
kind.layer.head.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from interpret.interventions import VARIANTS, Variant, head_off
from interpret.trace import KINDS

MODES = ("show", "combine", "switch off")  # what a click on a head does
PANELS = ("Change the model", "Beam search", "Inside the head")
BEAM_SIZES = (1, 2, 3, 4, 5, 8)
EXAMPLE = "I can eat an apple."


@dataclass(frozen=True)
class Stage:
    """What the explorer shows. Rows are counted from 0, as in traces."""

    run: str = ""  # folder of the run; empty: the most recently trained one
    weights: str = "best"  # best, latest or an epoch
    sentence: str = EXAMPLE
    beam: int = 1  # beam size; 1 is greedy search
    prefix: tuple[int, ...] = ()  # ids that the translation starts with
    kind: str = "cross"
    heads: tuple[str, ...] | None = None  # the picked heads, whose mean is shown; (): all; None: not chosen yet
    row: int = 1
    off: tuple[str, ...] = ()  # heads switched off
    changes: tuple[str, ...] = ()  # names of variants
    mode: str = MODES[0]
    panel: str = PANELS[0]

    def with_sentence(self, sentence: str) -> "Stage":
        """Another sentence: the choices of tokens, which belong to the old one, are dropped."""
        return self if sentence == self.sentence else replace(self, sentence=sentence, prefix=(), row=1)

    def clicked(self, command: str) -> "Stage":
        """The state after a click. An unknown command changes nothing."""
        action, _, value = command.partition(" ")
        if action == "row" and value.isdigit():
            return replace(self, row=int(value))
        if action == "head" and is_head(value):
            return self.with_head(value)
        if action == "prefix":
            return replace(self, prefix=parse_ids(value))
        return self

    def with_head(self, head: str) -> "Stage":
        """A click on a head of the present kind shows it, adds it to those combined, or switches it on or off."""
        if self.mode == "switch off":
            return replace(self, off=toggled(self.off, f"{self.kind}.{head}"))
        if self.mode == "combine":
            return replace(self, heads=toggled(self.heads or (), head))
        return replace(self, heads=(head,))

    def picked(self, shape: tuple[int, int]) -> list[tuple[int, int]]:
        """The picked heads as (layer, head), without those that a model of `shape` (layers, heads) lacks."""
        pairs = [tuple(map(int, head.split("."))) for head in self.heads or ()]
        return [(layer, head) for layer, head in pairs if layer < shape[0] and head < shape[1]]

    def variants(self, shapes: dict[str, tuple[int, int]]) -> list[Variant]:
        """The changes of the model, for one with these (layers, heads) of each kind."""
        off = [name.split(".") for name in self.off]
        known = [(kind, int(i), int(j)) for kind, i, j in off if int(i) < shapes[kind][0] and int(j) < shapes[kind][1]]
        return [head_off(*head) for head in known] + [v for v in VARIANTS if v.name in self.changes]

    def to_query(self) -> dict[str, str]:
        """The parameters of a link: every field that differs from its default."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        texts = {name: SEPARATOR.join(map(str, v)) if isinstance(v, tuple) else str(v) for name, v in changed.items()}
        return texts

    @classmethod
    def from_query(cls, query: dict[str, str]) -> "Stage":
        """The state of a link. What cannot be read is left at its default."""
        values = {name: READERS[name](text) for name, text in query.items() if name in READERS}
        return cls(**{name: value for name, value in values.items() if value is not None})


# ---------------------------------------------------------------------------- reading links

SEPARATOR = "~"  # no name of a variant contains it, and addresses need not escape it


def toggled(items: tuple[str, ...], item: str) -> tuple[str, ...]:
    """The items without the item, or with it if it was not among them."""
    return tuple(i for i in items if i != item) if item in items else (*items, item)


def is_head(text: str) -> bool:
    return re.fullmatch(r"\d{1,3}\.\d{1,3}", text) is not None


def parse_ids(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.split(r"[ ~]", text) if re.fullmatch(r"\d{1,9}", part))


def one_of(*choices: object) -> Callable[[str], object]:
    """A reader that accepts these values only."""
    return lambda text: next((choice for choice in choices if str(choice) == text), None)


def all_of(is_valid: Callable[[str], bool]) -> Callable[[str], tuple[str, ...]]:
    """A reader of a list, without the items that are not valid."""
    return lambda text: tuple(item for item in text.split(SEPARATOR) if is_valid(item))


VARIANT_NAMES = {variant.name for variant in VARIANTS}
READERS: dict[str, Callable] = {
    "run": str,
    "weights": str,
    "sentence": str,
    "beam": lambda text: one_of(*BEAM_SIZES)(text),
    "prefix": parse_ids,
    "kind": one_of(*KINDS),
    "heads": all_of(is_head),
    "row": lambda text: int(text) if re.fullmatch(r"\d{1,4}", text) else None,
    "off": all_of(lambda item: item.partition(".")[0] in KINDS and is_head(item.partition(".")[2])),
    "changes": all_of(VARIANT_NAMES.__contains__),
    "mode": one_of(*MODES),
    "panel": one_of(*PANELS),
}
