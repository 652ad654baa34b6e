"""Colab_Train.ipynb, run with a substitute for google.colab that mounts a temporary folder."""

import ast
import shutil
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

from runs import colab

# What train.py prints when it restores a run from its mirror, and when it resumes.
RESTORED, RESUMED = "restored from", "resuming"

DRIVE_MODULE = """
from pathlib import Path

def mount(folder):
    Path(folder, "MyDrive").mkdir(parents=True, exist_ok=True)
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Runs the notebook with some settings changed, on a new machine at each call, always with the same Drive."""
    package = tmp_path / "substitute" / "google" / "colab"
    package.mkdir(parents=True)
    (package / "drive.py").write_text(DRIVE_MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "substitute"))

    def run(name: str, **changes: object) -> tuple[str, nbformat.NotebookNode]:
        code = tmp_path / name
        code.mkdir()
        for path in [*ROOT.glob("*.py"), ROOT / "requirements.txt"]:
            shutil.copy(path, code)
        for package in {path.parent for path in ROOT.glob("*/__init__.py")}:
            shutil.copytree(package, code / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        notebook = nbformat.read(ROOT / "Colab_Train.ipynb", as_version=4)
        for cell in notebook.cells:
            cell.source = cell.source.replace("/content/drive", str(tmp_path / "drive"))
            cell.source = cell.source.replace("/content/transformer", str(code))
            lines = cell.source.splitlines()
            for i, line in enumerate(lines):
                field = line.partition(" = ")[0]
                if field in changes:
                    lines[i] = f"{field} = {changes[field]!r}"
            cell.source = "\n".join(lines)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
        return "\n".join(map(str, (cell.get("outputs") for cell in notebook.cells))), notebook

    return run


@pytest.mark.slow
def test_a_new_machine_resumes_from_the_drive(machine, tmp_path):
    form = {"PRESET": "toy", "SAVE_EVERY_STEPS": 100}
    first, _ = machine("first", **form, NUM_EPOCHS=1)
    run = tmp_path / "drive" / "MyDrive" / "transformer" / "toy.en-it"
    assert (run / "tmodel_00.pt").is_file()
    assert RESTORED not in first
    assert RESUMED not in first
    second, notebook = machine("second", **form, NUM_EPOCHS=2)
    assert RESTORED in second
    assert RESUMED in second
    assert "at the start of epoch 1, step 215" in second
    assert (run / "tmodel_01.pt").is_file()
    assert "BLEU" in second
    assert "vega-lite" in notebook.cells[-1].outputs[0].data["text/html"]  # what Colab shows


def test_cells_are_short_and_define_no_functions_or_classes():
    notebook = nbformat.read(ROOT / "Colab_Train.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 12
            assert not any(isinstance(n, ast.FunctionDef | ast.ClassDef) for n in ast.walk(ast.parse(cell.source)))


def test_only_missing_packages_are_installed_and_never_torch(tmp_path):
    lines = [
        "torch>=99  # never installed",
        f"numpy=={version('numpy')}",
        "numpy<0.1",
        "no-such-package>=1",
        "",
        "# a comment",
    ]
    (tmp_path / "requirements.txt").write_text("\n".join(lines))
    assert colab.missing(tmp_path / "requirements.txt") == ["numpy<0.1", "no-such-package>=1"]
    assert colab.missing() == []


def test_a_drive_that_is_not_mounted_raises_an_error(tmp_path, monkeypatch):
    package = tmp_path / "google" / "colab"
    package.mkdir(parents=True)
    (package / "drive.py").write_text("def mount(folder): pass")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match="the Drive is not mounted"):
        colab.mount_drive(str(Path(tmp_path, "drive")))
