"""The notebooks run from top to bottom, define no functions, and contain every picture as PNG or GIF."""

import ast
import base64
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, put_project_beside
from nbclient import NotebookClient
from PIL import Image

COLAB = "Colab_Train.ipynb"  # runs on Colab; tested by test_colab.py
COURSE = "Build_It_Yourself.ipynb"  # has empty functions to write and no outputs; tested by test_course.py
NOTEBOOKS = sorted(path.name for path in ROOT.glob("*.ipynb") if path.name not in (COLAB, COURSE))


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def has_png(cell) -> bool:
    return any(
        "image/png" in output.get("data", {}) or "image/gif" in output.get("data", {}) for output in cell.outputs
    )


def shown(notebook) -> Iterator[tuple[str, object]]:
    """The kind and content of everything that the cells and the widgets of a notebook show."""
    widgets = notebook.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {"state": {}})
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    outputs += [output for model in widgets["state"].values() for output in model["state"].get("outputs", [])]
    return (item for output in outputs for item in output.get("data", {}).items())


def draws(cell) -> bool:
    """Whether the last line of the cell is a chart."""
    last = ast.parse(cell.source).body[-1]
    return isinstance(last, ast.Expr) and ast.unparse(last).startswith("charts.") and "show_in" not in ast.unparse(last)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_notebooks_have_short_cells_outputs_and_pictures(name):
    notebook = nbformat.read(ROOT / name, as_version=4)
    for cell in code_cells(notebook):
        assert cell.execution_count, f"not executed: {cell.source}"
        assert len(cell.source.splitlines()) <= 12
        assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(ast.parse(cell.source)))
        assert not [output for output in cell.outputs if output.output_type == "error"]
        if draws(cell):
            assert has_png(cell), cell.source
    text = (ROOT / name).read_text(encoding="utf8")
    assert str(Path.home()) not in text
    assert str(ROOT) not in text


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_small_and_their_pictures_have_a_palette(name):
    assert (ROOT / name).stat().st_size < 1_000_000
    for kind, content in shown(nbformat.read(ROOT / name, as_version=4)):
        if kind == "image/png":
            assert Image.open(io.BytesIO(base64.b64decode(content))).mode == "P"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_tables_have_at_most_ten_rows(name):
    for kind, content in shown(nbformat.read(ROOT / name, as_version=4)):
        if kind == "text/html":
            assert content.partition("<tbody>")[2].count("<tr>") <= 10


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_charts_have_the_version_of_vega_lite_that_their_mime_type_names(name):
    """JupyterLab warns at each chart otherwise."""
    for kind, content in shown(nbformat.read(ROOT / name, as_version=4)):
        if "vega" in kind:
            version = re.fullmatch(r"application/vnd\.vegalite\.v(\d)\+json", kind)[1]
            assert content["$schema"].endswith(f"/vega-lite/v{version}.json")  # v5.20 is later than JupyterLab's 5.6


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_use_the_pretrained_runs_and_do_not_train(name):
    code = "\n".join(cell.source for cell in code_cells(nbformat.read(ROOT / name, as_version=4)))
    assert 'RUN = "pretrained/' in code
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names} | {getattr(node, "module", "") for node in imports}
    assert not names & {"train", "train_model"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_run_from_top_to_bottom_without_a_trained_run(name, tmp_path, monkeypatch):
    """With fewer sentences."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    put_project_beside(tmp_path)
    shutil.copytree(ROOT / "pretrained", tmp_path / "pretrained")
    notebook = nbformat.read(ROOT / name, as_version=4)
    for cell in code_cells(notebook):
        cell.source = re.sub(r"(range\(|\[:)[12]00", r"\g<1>20", cell.source)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for cell in code_cells(notebook):
        if draws(cell):
            assert has_png(cell), cell.source
