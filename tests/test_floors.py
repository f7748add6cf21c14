"""The floors of the house: imports go down only, and `import mxdit` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mxdit

SOURCE = Path(mxdit.__file__).parent

# Lowest first; a module imports from its own package and from floors before it, and names on one floor do not import
# each other.
FLOORS = (
    {"errors", "version"},
    {"numerics"},
    {"config"},
    {"models"},
    {"ops"},
    {"backends"},
    {"weights", "shards", "packed"},
    {"layers", "embedding"},
    {"quantize"},
    {"conformance", "checkpoint"},
    {"integrations"},
    {"generation", "client"},
    {"evals", "bench"},
    {"calibrate", "serve"},
    {"cli"},
)
FLOOR = {("formats", "errors")}  # formats raise errors
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}
LIGHT = {"mxdit", "torch", "numpy"}  # what `import mxdit` may load, beside the standard library
HEAVY = ("diffusers", "transformers", "accelerate", "safetensors", "av", "typer", "fastapi", "triton", "torch_npu")

FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def room(module: str) -> str:
    """``mxdit.models.wan`` is in room ``models``."""
    return module.split(".")[1]


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, package: str) -> set[str]:
    """Absolute names of every module that is imported anywhere in the tree, functions included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
                base = f"{parent}.{base}".rstrip(".")
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "mxdit" else {base}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down_only(path):
    name = name_of(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    own = room(name)
    assert own in FLOOR, f"{path.name}: room {own!r} has no floor; give it one here and in docs/architecture.md"
    for other in imports(ast.parse(path.read_text()), package):
        if other == "mxdit":
            raise AssertionError(f"{name} imports mxdit itself: import the module that defines the name")
        if other.startswith("mxdit.") and room(other) != own:
            lower = FLOOR.get(room(other), len(FLOORS)) < FLOOR[own]
            assert lower, f"{name} imports {other}, which is not on a floor below"


def test_no_module_imports_itself_by_way_of_others():
    """Inside a room, too: what two modules need of each other is one thing, or belongs in a third."""
    trees = {name_of(path): ast.parse(path.read_text()) for path in FILES}
    graph = {}
    for name, tree in trees.items():
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mxdit."):
                # `from package import module` imports the module.
                whole = {f"{node.module}.{alias.name}" for alias in node.names} & trees.keys()
                found |= whole or {node.module}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[name] = (found & trees.keys()) - {name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"modules import each other: {' -> '.join(error.args[1])}") from None


def test_the_floor_test_sees_through_functions_and_relative_imports():
    tree = ast.parse(
        "import mxdit.cli\ndef f():\n    from ..ops import linear\n    from mxdit import layers\n    from . import x"
    )
    assert imports(tree, "mxdit.models") == {"mxdit.cli", "mxdit.ops", "mxdit.layers", "mxdit.models"}


def test_import_mxdit_loads_torch_numpy_and_the_standard_library():
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import mxdit; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split()) - set(sys.stdlib_module_names)
    assert {name for name in loaded if not name.startswith("_")} <= LIGHT
    assert not loaded & set(HEAVY)


def test_sources_do_not_print_or_patch():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                assert room(name_of(path)) == "cli", f"{path}:{node.lineno} prints"
            if isinstance(node, ast.ExceptHandler) and isinstance(node.type, ast.Name):
                assert node.type.id not in ("Exception", "BaseException"), f"{path}:{node.lineno} catches everything"
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno} catches everything"
