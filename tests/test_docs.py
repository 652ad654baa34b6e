"""The documentation agrees with the project: links, commands, make targets, files, line counts, quoted messages."""

import ast
import contextlib
import io
import re
import runpy
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

import train
from config import InputError

ROOMS = ("corpora", "runs", "training", "compute", "interpret", "course")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
PAGES_WITH_COMMANDS = [page for page in PAGES if page.parent.name != "benchmarks"]
PICTURES = sorted(path for path in ROOT.glob("docs/*") if path.suffix in (".png", ".gif"))

FENCE = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`([^`\n]+)`")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf8")


# ---------------------------------------------------------------------------- links


def links_of(page: Path) -> list[str]:
    """Targets of the links and pictures of a page, outside of code."""
    prose = INLINE_CODE.sub("", FENCE.sub("", text_of(page)))
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    anchors: list[str] = []
    for heading in re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text_of(page)), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        anchors.append(f"{anchor}-{anchors.count(anchor)}" if anchor in anchors else anchor)
    return set(anchors)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_and_their_anchors_exist(page):
    for link in links_of(page):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors_of(target), link


def test_every_picture_is_shown_somewhere():
    shown = {(page.parent / link).resolve() for page in PAGES for link in links_of(page)}
    assert [name_of(picture) for picture in PICTURES if picture not in shown] == []


# ---------------------------------------------------------------------------- commands


def commands_of(page: Path) -> list[list[str]]:
    """The words of each `python …` and `torchrun …` line of the fenced blocks, without redirections."""
    commands = []
    for block in FENCE.findall(text_of(page)):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(\.venv/bin/)?(python|torchrun) ", line):
                words = shlex.split(line, comments=True)
                end = next((i for i, word in enumerate(words) if word in ("<", ">", "|", "&&")), len(words))
                commands.append(words[:end])
    return commands


@cache
def help_of(script: Path) -> str:
    """What `python script --help` prints; the script runs in this process, which has imported most of it already."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", [str(script), "--help"])
        patch.syspath_prepend(str(script.parent))
        with contextlib.suppress(SystemExit):
            runpy.run_path(str(script), run_name="__main__")
    return printed.getvalue()


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS, ids=name_of)
def test_commands_name_scripts_and_flags_that_exist(page):
    for command in commands_of(page):
        if command[1:3] == ["-m", "pytest"]:
            assert all((ROOT / word).is_file() for word in command[3:] if word.endswith(".py")), command
            continue
        script = next((word for word in command if word.endswith(".py")), "")
        assert script, command
        assert (ROOT / script).is_file(), command
        arguments = command[command.index(script) + 1 :]
        if script == "train.py" and "--help" not in arguments:
            with contextlib.suppress(InputError) if "--init-from" in arguments else contextlib.nullcontext():
                train.parse_config(arguments)  # also checks the values; that run does not exist
        if "--" in arguments:  # benchmarks pass what follows to train.py
            end = arguments.index("--")
            train.parse_config(arguments[end + 1 :])
            arguments = arguments[:end]
        for flag in (word.partition("=")[0] for word in arguments if word.startswith("--")):
            assert flag == "--help" or re.search(rf"(?<![\w-]){flag}(?![\w-])", help_of(ROOT / script)), command


def test_the_pages_have_commands():
    assert len(commands_of(ROOT / "README.md")) >= 8


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = [*FENCE.findall(text_of(page)), *INLINE_CODE.findall(FENCE.sub("", text_of(page)))]
    named = {target for block in code for target in re.findall(r"^ *make ([a-z]+)", block, re.MULTILINE)}
    assert named <= targets


def test_the_makefile_has_at_most_six_targets():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(targets) == len(set(targets)) <= 6


# ---------------------------------------------------------------------------- README


def section(heading: str) -> str:
    """The text of a section of README.md."""
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text_of(ROOT / "README.md"), re.MULTILINE | re.DOTALL)[1]


def test_readme_has_at_most_150_lines():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150


def test_code_blocks_of_readme_fit_on_github():
    """98 characters fit on a page 900 pixels wide."""
    assert [
        line for block in FENCE.findall(text_of(ROOT / "README.md")) for line in block.splitlines() if len(line) > 98
    ] == []


def test_the_layout_names_every_file():
    modules = {path.name for path in ROOT.glob("*.py")} | {path.name for path in ROOT.glob("*.ipynb")}
    modules |= {path.name for room in ROOMS for path in (ROOT / room).glob("*.py") if path.name != "__init__.py"}
    (tree,) = FENCE.findall(section("Layout"))
    assert set(re.findall(r"\w+\.(?:py|ipynb)\b", tree)) == modules


def test_line_counts_of_the_reading_order_are_right_within_a_tenth():
    rows = re.findall(r"^\| \d+ \| \[.*?\]\((.*?)\) \| (\d+) \| (\d+) \|", section("Reading order"), re.MULTILINE)
    assert rows
    for name, lines, minutes in rows:
        count = len((ROOT / name).read_text(encoding="utf8").splitlines())
        assert 0.9 * count <= int(lines) <= 1.1 * count, f"{name} has {count} lines: {round(count / 15)} minutes"
        assert int(minutes) == round(int(lines) / 15), name


# ---------------------------------------------------------------------------- error messages


def pattern(node: ast.expr) -> str:
    """A regular expression for the text of a string or f-string, in which any value may be formatted."""
    if isinstance(node, ast.JoinedStr):
        return "".join(pattern(part) for part in node.values)
    return re.escape(node.value) if isinstance(node, ast.Constant) else ".+?"


@cache
def messages() -> list[str]:
    """Patterns of the texts that the code passes to functions and exceptions, whole and up to the first semicolon."""
    found = set()
    for path in [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))]:
        for node in ast.walk(ast.parse(text_of(path))):
            for argument in node.args if isinstance(node, ast.Call) else ():
                if isinstance(argument, ast.JoinedStr) or isinstance(getattr(argument, "value", None), str):
                    found |= {pattern(argument), pattern(argument).partition(";")[0]}
    return [message for message in found if len(re.sub(r"\.\+\?|\W", "", message)) >= 10]  # not only values


def quoted_messages() -> list[str]:
    rows = re.findall(r"^\| `(.+?)` \|", text_of(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
    return [row.removesuffix("; …") for row in rows]


@pytest.mark.parametrize("message", quoted_messages())
def test_messages_of_the_troubleshooting_page_are_those_of_the_code(message):
    setting = r"(\w+ is .+?; )?"  # check_values of config.py puts this before the remedy
    assert any(re.fullmatch(setting + found, message) for found in messages())
