"""The text box of the notebooks shows a result for what is typed, and nothing that is typed becomes HTML."""

import io

import ipywidgets
import pytest
from conftest import ROOT
from PIL import Image

from interpret import charts
from interpret.trace import record_trace
from interpret.widgets import sentence_box
from translate import Translator

HOSTILE = "</script><img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture(scope="module")
def translator() -> Translator:
    return Translator.load(ROOT / "pretrained" / "toy.en-it", "cpu")


def type_into(box: ipywidgets.VBox, sentence: str) -> tuple[str, bytes]:
    """The text and the PNG that the box shows."""
    text, answer, picture = box.children
    text.value = sentence
    assert [part.layout.display for part in (answer, picture)] == [
        None if part.value else "none" for part in (answer, picture)
    ]
    return answer.value, picture.value


def test_the_box_translates_what_is_typed_and_lists_unknown_words(translator):
    box = sentence_box(translator, "She sleeps.", lambda sentence: translator.translate([sentence])[0])
    assert box.children[1].value == "Dorme."
    text, png = type_into(box, "The zebra sleeps.")
    assert text == f"not in the vocabulary of this run: zebra\n{translator.translate(['The zebra sleeps.'])[0]}"
    assert png == b""


def test_the_box_draws_the_chart_of_what_is_typed(translator):
    box = sentence_box(translator, "", lambda sentence: charts.mean_heads(record_trace(translator, sentence), "cross"))
    assert box.children[1].value == "the sentence is empty; give at least one word"
    (_, first), (text, second) = type_into(box, "She sleeps."), type_into(box, "We sleep.")
    assert text == ""
    assert first != second
    assert Image.open(io.BytesIO(second)).format == "PNG"


def test_a_sentence_that_is_too_long_is_answered_with_one_line(translator):
    box = sentence_box(translator, "", lambda sentence: translator.translate([sentence])[0])
    text, _ = type_into(box, "we sleep " * 100)
    assert "exceeds the limit of 64 (seq_len)" in text
    assert len(text.splitlines()) == 1


def test_what_is_typed_is_in_widgets_that_show_plain_text(translator):
    box = sentence_box(translator, "", lambda sentence: sentence)
    text, _ = type_into(box, HOSTILE)
    assert text.endswith(HOSTILE)
    assert [type(part) for part in box.children] == [ipywidgets.Text, ipywidgets.Textarea, ipywidgets.Image]
