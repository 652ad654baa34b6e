"""The notebooks on Colab, with a substitute for google.colab: first cells, packages, Colab_Train.ipynb."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from packaging.requirements import Requirement

from config import InputError, get_config
from runs import colab

NOTEBOOKS = sorted(path.name for path in ROOT.glob("*.ipynb"))
# What train.py prints when it restores a run from its mirror, and when it resumes.
RESTORED, RESUMED = "restored from", "resuming"

DRIVE_MODULE = """
import json
from pathlib import Path

from simulated_drive import SimulatedDrive

def mount(folder):
    Path(folder, "MyDrive").mkdir(parents=True, exist_ok=True)
    drive = SimulatedDrive(Path(folder), delay=0.002).mount()
    mount.report = lambda: Path(folder + ".json").write_text(json.dumps([drive.trash, drive.written]))
"""
REPORT = "from google.colab import drive; drive.mount.report()"


def cells_of(name: str) -> list[nbformat.NotebookNode]:
    return nbformat.read(ROOT / name, as_version=4).cells


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> Path:
    """A repository that git can clone, with the present files of the project."""
    folder = tmp_path_factory.mktemp("repository")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt")]:
        shutil.copy(path, folder)
    for package in {path.parent for path in ROOT.glob("*/__init__.py")}:
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    author = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    for command in (("init", "-q"), ("add", "."), (*author, "commit", "-qm", "project")):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.fixture
def machine(tmp_path, monkeypatch, repository, tiny_config):
    """Runs the notebook in an empty folder, a new machine at each call, with the form changed and the same Drive.

    The model and the corpus are those of `tiny_config`.
    """
    fields = [
        "datasource",
        "d_model",
        "encoder_layers",
        "decoder_layers",
        "num_heads",
        "d_ff",
        "batch_tokens",
        "validation_sentences",
    ]
    tiny = {"validation_source": tiny_config.datasource} | {name: getattr(tiny_config, name) for name in fields}
    package = tmp_path / "substitute" / "google" / "colab"
    package.mkdir(parents=True)
    (package / "drive.py").write_text(DRIVE_MODULE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (tmp_path / "substitute", ROOT / "tests"))))
    monkeypatch.setenv("REPOSITORY", str(repository))

    def run(name: str, **form: object) -> tuple[str, nbformat.NotebookNode]:
        (tmp_path / name).mkdir()
        notebook = nbformat.read(ROOT / "Colab_Train.ipynb", as_version=4)
        for cell in notebook.cells:
            cell.source = cell.source.replace("/content/drive", (tmp_path / "drive").as_posix())
            cell.source = cell.source.replace("**form)", f"**form, **{tiny!r})")
            for field, value in form.items():
                cell.source = re.sub(rf"^{field} = .*", f"{field} = {value!r}", cell.source, flags=re.MULTILINE)
        notebook.cells.append(nbformat.v4.new_code_cell(REPORT))
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path / name)}}).execute()
        del notebook.cells[-1]
        return "\n".join(map(str, (cell.get("outputs") for cell in notebook.cells))), notebook

    return run


# ---------------------------------------------------------------------------- Colab_Train.ipynb


@pytest.mark.slow
def test_a_new_machine_resumes_from_the_drive_and_its_trash_stays_empty(machine, tmp_path):
    form = {"PRESET": "toy", "SAVE_EVERY_STEPS": 4}
    first, _ = machine("first", **form, NUM_EPOCHS=1)
    run = tmp_path / "drive" / "MyDrive" / "transformer" / "toy.en-it"
    assert (run / "tmodel_00.pt").is_file()
    assert RESTORED not in first
    assert RESUMED not in first
    assert "all packages are already installed" in first
    assert "MB for checkpoints" in first
    second, notebook = machine("second", **form, NUM_EPOCHS=2)
    assert RESTORED in second
    assert RESUMED in second
    assert "from tmodel_00.pt, at the start of epoch 1" in second
    assert (run / "tmodel_01.pt").is_file()
    assert "BLEU" in second
    assert "vega-lite" in notebook.cells[-1].outputs[0].data["text/html"]  # what Colab shows
    trash, written = json.loads((tmp_path / "drive.json").read_text())
    assert "tmodel_01.pt" in dict(written)
    assert trash == 0


def test_the_form_follows_the_preset_unless_it_is_filled_in():
    empty = {"lang_src": "", "lang_tgt": "", "num_epochs": 0, "save_every_steps": 0}
    config = colab.configure("multi30k", Path("drive"), **empty)
    assert config == get_config("multi30k", run_dir="weights/multi30k.en-de", mirror_dir=config.mirror_dir)
    assert Path(config.mirror_dir) == Path("drive/multi30k.en-de")
    config = colab.configure("toy", Path("drive"), **{**empty, "lang_tgt": "de", "num_epochs": 9})
    assert (config.run_dir, config.lang_tgt, config.num_epochs) == ("weights/toy.en-de", "de", 9)
    with pytest.raises(InputError, match="num_epochs is -1"):
        colab.configure("toy", Path("drive"), num_epochs=-1)


def test_the_drive_is_mounted_before_anything_else():
    first = next(cell for cell in cells_of("Colab_Train.ipynb") if cell.cell_type == "code")
    assert 'drive.mount("/content/drive")' in first.source


def test_a_drive_that_is_not_mounted_stops_the_notebook(machine, tmp_path):
    (tmp_path / "substitute" / "google" / "colab" / "drive.py").write_text("def mount(folder): pass")
    with pytest.raises(CellExecutionError, match="FileNotFoundError"):
        machine("first")


def test_cells_are_short_and_define_no_functions_or_classes():
    for cell in cells_of("Colab_Train.ipynb"):
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 12
            assert not any(isinstance(n, ast.FunctionDef | ast.ClassDef) for n in ast.walk(ast.parse(cell.source)))


# ---------------------------------------------------------------------------- the first cells of all notebooks


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_notebook_has_the_badge_and_the_cell_that_gets_the_project(name):
    cells = cells_of(name)
    assert colab.badge(name) in cells[0].source
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    assert code.index(colab.FIRST_CELL) == (name == "Colab_Train.ipynb")  # there, the Drive is mounted before


def test_the_address_is_the_same_everywhere():
    assert colab.badge("Colab_Train.ipynb") in (ROOT / "README.md").read_text(encoding="utf8")
    for path in [ROOT / "README.md", *map(ROOT.joinpath, NOTEBOOKS)]:
        text = path.read_text(encoding="utf8")
        assert set(re.findall(r"research\.google\.com/github/([^/]+/[^/]+)/blob", text)) == {colab.GITHUB}


def run_first_cell(folder: Path, code: str = "") -> subprocess.CompletedProcess:
    """Runs the cell as a kernel does, with the present folder on the path, and then `code`."""
    script = f"import sys; sys.path.insert(0, '')\n{colab.FIRST_CELL}\n{code}"
    return subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)


def test_the_first_cell_clones_the_project_only_where_it_is_not_present(tmp_path, monkeypatch, repository):
    monkeypatch.setenv("REPOSITORY", str(repository))
    for _ in range(2):  # the second time as after a restart of the kernel
        done = run_first_cell(tmp_path, "import config; print(config.__file__)")
        assert "all packages are already installed" in done.stdout, done.stderr
        assert Path(done.stdout.splitlines()[-1]).resolve() == tmp_path / "transformer" / "config.py"
    monkeypatch.setenv("REPOSITORY", "nowhere")
    beside = run_first_cell(repository, "print('done')")
    assert (beside.stdout, beside.stderr) == ("done\n", "")


def test_a_missing_address_is_a_plain_error(tmp_path, monkeypatch):
    monkeypatch.setenv("REPOSITORY", "https://github.com/OWNER/REPOSITORY")
    done = run_first_cell(tmp_path)
    assert done.stderr.splitlines()[-1] == "AssertionError: no address of the project: fill in REPOSITORY"
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- packages


def test_setting_up_needs_only_the_standard_library_and_packaging():
    tree = ast.parse((ROOT / "runs" / "colab.py").read_text(encoding="utf8"))
    imported = {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert imported - set(sys.stdlib_module_names) == {"packaging"}


def test_only_missing_packages_are_installed_and_never_torch(tmp_path):
    lines = [
        "torch>=99  # never installed",
        f"numpy=={version('numpy')}",
        "numpy<0.1",
        "-r more.txt",
        "",
        "# a comment",
    ]
    (tmp_path / "requirements.txt").write_text("\n".join(lines))
    (tmp_path / "more.txt").write_text("no-such-package>=1")
    assert colab.missing(tmp_path / "requirements.txt") == ["numpy<0.1", "no-such-package>=1"]
    assert colab.missing(ROOT / "requirements.txt") == []


def test_what_is_useless_on_colab_is_not_installed_there(monkeypatch):
    monkeypatch.setattr(colab, "is_met", lambda requirement: False)
    names = {Requirement(line).name for line in colab.missing(ROOT / "requirements.txt")}
    assert {"tyro", "sacrebleu", "altair"} <= names
    assert not names & {"jupyter", "jupyterlab", "ipykernel", "ctranslate2", "selenium", "streamlit"}


def test_a_kernel_that_has_imported_a_replaced_package_must_be_restarted(monkeypatch, capsys):
    installed = {"numpy": "1.0"}

    def pip(command):
        assert command[-1] == "numpy>=2"
        installed["numpy"] = "2.0"
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(colab, "missing", lambda requirements: ["numpy>=2"])
    monkeypatch.setattr(colab, "version", installed.get)
    monkeypatch.setattr(colab, "packages_distributions", lambda: {"numpy": ["numpy"]})
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(RuntimeError, match=r"restart the session .* imported numpy 1\.0"):
        colab.install_missing()
    colab.install_missing()  # nothing is replaced
    assert "installed numpy>=2" in capsys.readouterr().out
    monkeypatch.setattr(subprocess, "run", lambda command: subprocess.CompletedProcess(command, 1))
    with pytest.raises(RuntimeError, match="pip cannot install numpy>=2"):
        colab.install_missing()
