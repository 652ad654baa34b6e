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
