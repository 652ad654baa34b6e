"""The text box of the notebooks shows a result for what is typed, and nothing that is typed becomes HTML."""

import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

from interpret.widgets import sentence_box
from translate import Translator

HOSTILE = "</script><img src=x onerror=alert(1)><script>alert(2)</script>"
RUN = ROOT / "pretrained" / "toy.en-it"


@pytest.fixture(scope="module")
def translator() -> Translator:
    return Translator.load(RUN, "cpu")


def lines_of(capsys) -> list[str]:
    """What was printed, without the codes that clear what was there before."""
    return re.sub(r"\x1b\[2K|\r", "", capsys.readouterr().out).splitlines()


def test_the_box_translates_what_is_typed_and_lists_unknown_words(translator, capsys):
    box = sentence_box(translator, "She sleeps.", lambda sentence: translator.translate([sentence])[0])
    assert lines_of(capsys) == ["Dorme."]
    box.children[0].value = "The zebra sleeps."
    warning, translation = lines_of(capsys)
    assert warning == "not in the vocabulary of this run: zebra"
    assert translation.endswith("dorme.")


def test_a_sentence_that_is_too_long_is_answered_with_one_line(translator, capsys):
    box = sentence_box(translator, "", lambda sentence: translator.translate([sentence])[0])
    lines_of(capsys)
    box.children[0].value = "we sleep " * 100
    (line,) = lines_of(capsys)
    assert "exceeds the limit of 64 (seq_len)" in line


@pytest.mark.slow
def test_what_is_typed_is_plain_text_or_a_chart(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code = f"""
from interpret import charts
from interpret.trace import record_trace
from interpret.widgets import sentence_box
from translate import Translator

charts.show_in_notebooks()
translator = Translator.load({str(RUN)!r}, "cpu")
boxes = [
    sentence_box(translator, "", lambda sentence: translator.translate([sentence])[0]),
    sentence_box(translator, "", lambda sentence: charts.mean_heads(record_trace(translator, sentence), "cross")),
    sentence_box(translator, "", lambda sentence: sentence),
]
for box in boxes:
    box.children[0].value = {HOSTILE!r}
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=120).execute()
    models = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    outputs = [output for model in models for output in model["state"].get("outputs", [])]
    assert sum(HOSTILE in output.get("text", "") for output in outputs) == 1  # the third box shows it as text
    shown = {kind for output in outputs for kind in output.get("data", {"stream": ""})}
    assert shown == {"stream", "application/vnd.vegalite.v5+json", "image/png", "text/plain"}
