"""The notebooks run from top to bottom, define no functions, and contain every picture as PNG or GIF."""

import ast
import shutil
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, put_project_beside
from nbclient import NotebookClient

COLAB = "Colab_Train.ipynb"  # runs on Colab; tested by test_colab.py
COURSE = "Build_It_Yourself.ipynb"  # has empty functions to write and no outputs; tested by test_course.py
NOTEBOOKS = sorted(path.name for path in ROOT.glob("*.ipynb") if path.name not in (COLAB, COURSE))


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def has_png(cell) -> bool:
    return any(
        "image/png" in output.get("data", {}) or "image/gif" in output.get("data", {}) for output in cell.outputs
    )


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


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_run_from_top_to_bottom(name, trained_run, german_run, tmp_path, monkeypatch):
    """Quick runs replace those that the first cells would train, and fewer sentences are evaluated."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    put_project_beside(tmp_path)
    (tmp_path / "weights").mkdir()
    for run, language in ((trained_run, "it"), (german_run, "de")):
        shutil.copytree(run, tmp_path / "weights" / f"toy.en-{language}")
    notebook = nbformat.read(ROOT / name, as_version=4)
    for cell in code_cells(notebook):
        cell.source = cell.source.replace("range(200)", "range(20)").replace("[:200]", "[:20]")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for cell in code_cells(notebook):
        if draws(cell):
            assert has_png(cell), cell.source
