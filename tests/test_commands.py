"""What all commands have in common: encoding of the output, errors in one line, Ctrl-C, optional packages."""

import errno
import ntpath
import os
import re
import signal
import subprocess
import sys
import time
import tomllib

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

import config
import experiments
import train
import visualize
from config import OPTIONAL_PACKAGES, InputError, parse, run_command, split_source

CONSOLES = {
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "C locale": {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"},
}

SLOW_PACKAGES = ["datasets", "huggingface_hub", "tensorboard", "altair", "pandas", "torchmetrics", "streamlit"]


def run_python(code: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a new process, in the folder of the project."""
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True)


def outcome(error: BaseException, capsys) -> tuple[int, str]:
    """Exit status and standard error of a command that raises this error."""

    def main(argv: list[str]) -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    return stop.value.code, capsys.readouterr().err


# ---------------------------------------------------------------------------- output


@pytest.mark.parametrize("console", CONSOLES)
def test_output_and_errors_are_utf8_whatever_the_console(console):
    text = "█ Posso mangiare una mela, però → 中文"
    code = f"""
from config import InputError, run_command
def main(argv):
    print({text!a})
    raise InputError({text!a})
run_command(main)
"""
    done = run_python(code, **CONSOLES[console])
    assert done.stdout.decode("utf8").strip() == text
    assert done.stderr.decode("utf8").strip() == f"error: {text}"
    assert done.returncode == 2


def test_file_names_that_are_not_utf8_can_be_printed():
    done = run_python("from config import run_command; run_command(lambda argv: print('wrote \\udcff.html'))")
    assert (done.returncode, done.stdout.strip()) == (0, rb"wrote \udcff.html")


@pytest.mark.skipif(sys.platform == "win32", reason="a redirection of Unix shells")
def test_a_command_runs_with_closed_output():
    code = "from config import run_command; run_command(lambda argv: print('text', flush=True))"
    done = subprocess.run(f'"{sys.executable}" -c "{code}" >&-', shell=True, cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_help_in_a_narrow_terminal_is_not_narrower_than_40_columns(monkeypatch, capsys):
    """In fewer columns, wrapping the help takes minutes and gigabytes."""
    monkeypatch.setenv("COLUMNS", "1")
    with pytest.raises(SystemExit):
        train.parse_config(["--help"])
    lines = capsys.readouterr().out.splitlines()
    title = next(i for i, line in enumerate(lines) if "options" in line.split())
    assert max(map(len, lines[title:])) == 40


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("d_model is 30;\n give 32"), "d_model is 30; give 32"),
        (PermissionError(errno.EACCES, "Permission denied", "a.en"), "Permission denied: 'a.en'; fix its permissions"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "Read-only file system: 'x'; choose a folder that can be"),
        (OSError(errno.EIO, "Input/output error", "run/config.json"), "'run/config.json'; check the file and its disk"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "aaa"), "'aaa'; choose a shorter name"),
        (MemoryError("Unable to allocate 9 GiB"), "out of memory (Unable to allocate 9 GiB); lower --batch-tokens"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory (DefaultCPUAllocator"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), "is not UTF-8 ('utf-8' codec"),
    ],
)
def test_errors_of_files_and_of_the_machine_are_one_line(error, line, capsys):
    status, message = outcome(error, capsys)
    assert status == 2
    assert message.startswith("error: ")
    assert line in message
    assert message.count("\n") == 1


def test_errors_of_the_project_keep_their_traceback():
    with pytest.raises(KeyError):
        run_command(lambda argv: {}["missing"])


def test_development_mode_shows_the_traceback_of_every_error():
    code = "from config import *; run_command(lambda argv: open('missing'))"
    assert b"Traceback" in run_python(code, "-X", "dev").stderr
    assert b"Traceback" not in run_python(code).stderr


def test_a_reader_that_closes_the_pipe_is_not_success():
    code = "from config import run_command; run_command(lambda argv: print('line\\n' * 100_000))"
    reader = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE)
    reader.wait()
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, stdout=reader.stdin, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, b"")


def test_ctrl_c_ends_a_command_with_status_130(capsys):
    assert outcome(KeyboardInterrupt(), capsys) == (130, "")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
@pytest.mark.parametrize("script", ["train", "translate", "evaluate", "visualize", "experiments", "export", "convert"])
def test_ctrl_c_during_the_imports_prints_no_traceback(script, tmp_path):
    slow = "import pathlib, time; pathlib.Path({!r}).touch(); time.sleep(60)"
    for package in ("numpy", "sacrebleu", "safetensors", "torch", "tyro"):  # whichever is imported first
        (tmp_path / f"{package}.py").write_text(slow.format(str(tmp_path / "importing")), encoding="utf8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen([sys.executable, f"{script}.py"], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    while not (tmp_path / "importing").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == b""
    assert process.returncode == -signal.SIGINT


# ---------------------------------------------------------------------------- packages that are slow to import


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train", "translate", "evaluate", "export", "convert"])
def test_help_imports_no_slow_package(script):
    code = f"""
import runpy, sys
sys.argv = ["{script}.py", "--help"]
try:
    runpy.run_path("{script}.py", run_name="__main__")
except SystemExit:
    print(*set({SLOW_PACKAGES}) & set(sys.modules), file=sys.stderr)
"""
    assert run_python(code).stderr.strip() == b""


def test_translating_imports_no_slow_package(trained_run):
    code = f"""
import sys, translate
translate.main("I can eat an apple.", run_dir=({str(trained_run)!r},))
print(*set({SLOW_PACKAGES}) & set(sys.modules), file=sys.stderr)
"""
    assert run_python(code).stderr.strip() == b""


# ---------------------------------------------------------------------------- optional packages


@pytest.mark.slow
def test_training_and_the_texts_of_all_commands_need_no_optional_package():
    code = f"import sys; sys.modules |= dict.fromkeys({set(OPTIONAL_PACKAGES)}); "
    code += "import train, translate, evaluate, visualize, experiments, export, convert, course.own_model"
    done = run_python(code)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (visualize.main, ["A sentence.", "--html", "page.html"]),
        (visualize.main, ["A sentence.", "--png", "page.png"]),
        (visualize.main, ["--architecture", "model.svg", "--preset", "toy"]),
        (experiments.main, ["A sentence.", "--html", "page.html"]),
    ],
)
def test_a_missing_optional_package_is_named_with_the_file_that_lists_it(command, arguments, monkeypatch, capsys):
    for module in [name for name in sys.modules if name.startswith("interpret.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "altair", None)
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_command(lambda argv: parse(command, argv))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: altair is not installed; pip install -r requirements-charts.txt\n"


@pytest.mark.parametrize("package", OPTIONAL_PACKAGES)
def test_the_files_named_for_optional_packages_list_them(package):
    distributions = {"vl_convert": "vl-convert-python", "PIL": "pillow"}
    text = (ROOT / OPTIONAL_PACKAGES[package]).read_text(encoding="utf8")
    assert re.search(rf"^{distributions.get(package, package)}>=", text, re.MULTILINE)


def test_pyproject_reads_lists_of_packages_without_references_to_other_files():
    dynamic = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["tool"]["setuptools"]["dynamic"]
    tables = [dynamic["dependencies"], *dynamic["optional-dependencies"].values()]
    files = [name for table in tables for name in table["file"]]
    assert {f"requirements-{name}.txt" for name in ("train", "charts", "notebooks", "app", "export")} == set(files)
    for name in files:
        lines = (ROOT / name).read_text(encoding="utf8").splitlines()
        for line in [line.partition("#") for line in lines if not line.startswith("#")]:
            assert Requirement(line[0]).specifier, name
            assert line[2].strip(), f"{name}: {line[0]} has no reason"


# ---------------------------------------------------------------------------- names of sources


def test_a_source_may_begin_with_a_drive_of_windows(monkeypatch):
    assert split_source("toy:test") == ("toy", "test")
    assert split_source("data/train") == ("data/train", "")
    monkeypatch.setattr(config.os.path, "splitdrive", ntpath.splitdrive)
    assert split_source(r"C:\data\train.tsv") == (r"C:\data\train.tsv", "")
    assert split_source("D:/hub:validation") == ("D:/hub", "validation")
