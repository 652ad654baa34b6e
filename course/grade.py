"""Grades solution files: which steps pass, and what is wrong with the others.

Of a file only imports, functions, classes and constants are executed. Each file is checked in a process of its own,
with a time limit, so that an endless loop in one does not stop the others.
"""

import ast
import contextlib
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nbformat

from course.checks import STEPS, CheckFailed, run_step

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 120  # per file


def code_of(path: Path) -> list[str]:
    """The code of a script, or of each cell of a notebook without magic and shell commands."""
    if path.suffix != ".ipynb":
        return [path.read_text(encoding="utf-8-sig")]  # Windows editors may write a byte order mark
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return ["\n".join(line for line in cell.splitlines() if not line.lstrip().startswith(("%", "!"))) for cell in cells]


def is_definition(node: ast.stmt) -> bool:
    """Whether a statement is an import, a function, a class, or a constant."""
    if isinstance(node, ast.Assign):
        with contextlib.suppress(ValueError):
            ast.literal_eval(node.value)
            return True
    return isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)


def load_functions(path: Path) -> dict:
    """The variables that the definitions of a solution file make. What cannot be executed is left out."""
    namespace: dict = {"__name__": path.stem}
    for code in code_of(path):
        with contextlib.suppress(SyntaxError):  # its functions are then missing
            for node in filter(is_definition, ast.parse(code).body):
                with contextlib.suppress(Exception):
                    exec(compile(ast.Module([node], []), str(path), "exec"), namespace)
    return namespace


def grade_file(path: Path) -> list[str]:
    """The message of each step; it is empty where the step passes."""
    namespace, messages = load_functions(path), []
    for step in STEPS:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                run_step(step, namespace)
            messages.append("")
        except CheckFailed as error:
            messages.append(str(error))
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # a result that the check did not expect
            messages.append(f"Step {step.number}: the check stopped with {type(error).__name__}: {error}")
    return messages


def grade_in_process(path: Path) -> list[str]:
    """`grade_file` in another process; one message if that fails."""
    command = [sys.executable, "-m", "course.grade", str(path.resolve())]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return [f"not finished after {SECONDS} seconds: is there an endless loop?"]
    if done.returncode:
        return [f"cannot be read: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"]
    try:
        messages = json.loads(done.stdout.splitlines()[-1])
    except (LookupError, ValueError):
        return ["cannot be graded: a function ended the process"]
    return [printable(message) for message in messages]


def printable(text: object) -> str:
    """The text without control characters, which could change what the terminal shows."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(text))


def table(paths: list[Path]) -> str:
    """A line per file with the steps that pass, and its mistakes below. Functions not yet written are not listed."""
    names = Counter(path.name for path in paths)
    labels = [printable(path.name if names[path.name] == 1 else path) for path in paths]
    width = max(map(len, labels))
    header = f"{'':{width}}  passed   {' '.join(f'{step.number:2}' for step in STEPS)}"
    lines = [header]
    for path, label in zip(paths, labels, strict=True):
        messages = grade_in_process(path)
        passed = [not message for message in messages] if len(messages) == len(STEPS) else [False] * len(STEPS)
        marks = " ".join(" +" if ok else " -" for ok in passed)
        lines.append(f"{label:{width}}  {sum(passed):2} of {len(STEPS)} {marks}")
        lines += [f"    {message}" for message in messages if message and "not written yet" not in message]
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(grade_file(Path(sys.argv[1]))))
