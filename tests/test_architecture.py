"""Imports run one way, from what a user calls down to what knows nothing of recommendation; no circle anywhere.

Every import statement counts: at the top of a module, inside a function, below TYPE_CHECKING and in ``__init__``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "recbole_llm"
FLOORS = (
    ("cli", "quick_start", "demo"),
    ("serving",),
    ("comparison",),
    ("experiment",),
    ("model",),
    ("data", "lens"),
    ("config",),
    ("trainer", "backbone", "registry"),
    ("evaluation", "adapter", "utils"),
)
"""Rooms from the top to the ground. A room imports from its own floor and those below."""
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# The classes of models are loaded by name; repairs load modules of RecBole.
LOADS_BY_NAME = {"recbole_llm.registry", "recbole_llm.utils.recbole_repairs"}


def modules_below(package: Path) -> dict[str, Path]:
    """The files of a package by module name; a room itself stands for its ``__init__``."""
    files = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imports_of(name: str, files: Mapping[str, Path]) -> set[str]:
    """The modules of the package that a module imports."""
    top = name.partition(".")[0]
    package = name if files[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(files[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            # Either a module of the package or a name inside it.
            found |= {full if (full := f"{base}.{alias.name}") in files else base for alias in node.names}
    found = {module for module in found if module.partition(".")[0] == top}
    assert found <= files.keys(), f"{name} imports modules that do not exist: {sorted(found - files.keys())}"
    return found - {name}


def room_of(module: str) -> str:
    """The room of a module; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def upward(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Imports from a lower floor to a higher one. The package itself may import the ground floor only."""
    ground = len(FLOORS) - 1
    return [
        f"upward: {module} -> {imported}"
        for module, found in sorted(graph.items())
        for imported in sorted(found)
        if imported != "recbole_llm" and FLOOR_OF.get(room_of(module), ground) > FLOOR_OF[room_of(imported)]
    ]


def circles(graph: Mapping[str, Iterable[str]], what: str) -> list[str]:
    """One line for each group of nodes that reach each other."""

    def reached(start: str) -> set[str]:
        seen, waiting = set(), list(graph[start])
        while waiting:
            if (node := waiting.pop()) not in seen:
                seen.add(node)
                waiting += graph[node]
        return seen

    reach = {node: reached(node) for node in graph}
    groups = {
        frozenset(other for other in reach[node] if node in reach[other])
        for node in graph
        if node in reach[node]
    }
    return [f"circle of {what}: {' <-> '.join(sorted(group))}" for group in sorted(groups, key=sorted)]


def violations(package: Path) -> list[str]:
    """All that is wrong with a package's imports."""
    files = modules_below(package)
    unknown = sorted({room_of(module) for module in files} - FLOOR_OF.keys() - {""})
    if unknown:
        return [f"on no floor: {room}" for room in unknown]
    graph = {module: imports_of(module, files) for module in files}
    rooms: dict[str, set[str]] = {room_of(module): set() for module in files}
    for module, found in graph.items():
        rooms[room_of(module)] |= {room_of(imported) for imported in found} - {room_of(module), ""}
    level = {room: {other for other in found if _same_floor(room, other)} for room, found in rooms.items()}
    by_name = [
        f"loads modules by name: {module}"
        for module, path in files.items()
        if module not in LOADS_BY_NAME and "import_module(" in path.read_text(encoding="utf-8")
    ]
    return upward(graph) + circles(graph, "modules") + circles(level, "rooms") + by_name


def _same_floor(room: str, other: str) -> bool:
    return FLOOR_OF.get(room) == FLOOR_OF.get(other)


def test_imports_run_one_way():
    found = violations(PACKAGE)
    assert not found, f"{len(found)} violations:\n" + "\n".join(found)


def test_violations_are_found(tmp_path):
    package = tmp_path / "recbole_llm"
    sources = {
        "__init__.py": "",
        "config/__init__.py": "",
        "config/checks.py": "def late():\n    from recbole_llm.lens import fit\n",
        "lens/__init__.py": "from recbole_llm.utils import files\n",
        "lens/fit.py": "import typing\nif typing.TYPE_CHECKING:\n    from ..data.rows import Rows\n",
        "data/__init__.py": "",
        "data/rows.py": "from recbole_llm.lens.fit import fit\nfrom .more import x\n",
        "data/more.py": "from recbole_llm import data\nimport recbole_llm.config.checks\n",
        "utils/__init__.py": "",
        "utils/files.py": "from recbole_llm import __version__\nimport importlib\nimportlib.import_module('x')\n",
    }
    for name, source in sources.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source, encoding="utf-8")
    assert violations(package) == [
        "upward: recbole_llm.config.checks -> recbole_llm.lens.fit",
        "circle of modules: recbole_llm.config.checks <-> recbole_llm.data.more <-> recbole_llm.data.rows <-> "
        "recbole_llm.lens.fit",
        "circle of rooms: data <-> lens",
        "loads modules by name: recbole_llm.utils.files",
    ]
    (package / "lens" / "fit.py").write_text("", encoding="utf-8")
    assert violations(package) == [
        "upward: recbole_llm.config.checks -> recbole_llm.lens.fit",
        "loads modules by name: recbole_llm.utils.files",
    ]
