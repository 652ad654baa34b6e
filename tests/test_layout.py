"""The layout of the project: rooms, import directions, and what is at the root."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

# A module may import those of earlier lines; in a room, a folder, also its neighbors.
LAYERS = [
    ["config"],
    ["compute"],
    ["model"],
    ["corpora"],
    ["runs"],
    ["dataset"],
    ["search"],
    ["translate"],
    ["evaluate"],
    ["training"],
    ["train"],
    ["interpret"],
    ["course"],
    ["export", "experiments", "visualize"],
    ["build_it_yourself", "convert"],
    ["app"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ROOMS = ["compute", "corpora", "course", "interpret", "runs", "training"]


def modules() -> list[Path]:
    return [*sorted(ROOT.glob("*.py")), *(path for room in ROOMS for path in sorted((ROOT / room).glob("*.py")))]


def project_imports(path: Path) -> set[str]:
    """Modules and rooms of this project that a file imports, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            is_room = node.module in ROOMS
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if is_room else {node.module}
    return {name for name in found if name.split(".")[0] in LEVEL}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_every_module_is_at_a_known_place():
    assert {dotted(path).split(".")[0] for path in modules()} == set(LEVEL)
    assert len(list(ROOT.glob("*.py"))) <= 13
    assert sorted(path.parent.name for path in ROOT.glob("*/__init__.py")) == ROOMS


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_point_down(path):
    own = dotted(path).split(".")[0]
    for name in project_imports(path):
        other = name.split(".")[0]
        assert LEVEL[other] < LEVEL[own] or (other == own and own in ROOMS), f"{dotted(path)} imports {name}"


def test_no_import_is_circular_within_a_room():
    graph = {dotted(path): project_imports(path) for path in modules()}
    remaining = {name: {other for other in others if other in graph} for name, others in graph.items()}
    while free := [name for name, others in remaining.items() if not others & remaining.keys()]:
        for name in free:
            del remaining[name]
    assert not remaining


def names_encoding(call: ast.Call) -> bool:
    """Whether a call that may open a text file names the encoding, or opens a binary file."""
    arguments = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    constants = [str(node.value) for node in arguments if isinstance(node, ast.Constant)]
    return any(keyword.arg == "encoding" for keyword in call.keywords) or any(
        text in ("rb", "wb", "ab", "r+b", "utf8") for text in constants
    )


@pytest.mark.parametrize("path", [*modules(), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("docs/*.py")], ids=dotted)
def test_text_files_are_opened_as_utf8(path):
    """Elsewhere than on Linux, the default encoding depends on the machine."""
    opening = {"open", "read_text", "write_text"}
    for call in [node for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))) if isinstance(node, ast.Call)]:
        owner = getattr(getattr(call.func, "value", None), "id", "")
        if getattr(call.func, "attr", getattr(call.func, "id", "")) in opening and owner not in ("os", "gzip", "Image"):
            assert names_encoding(call), ast.unparse(call)
