"""Imports go one way, and what runs in the writer process never loads torch."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vembed_async_ckpt

PACKAGE = Path(vembed_async_ckpt.__file__).parent
# From the top: each may import those below it and itself, never one above it.
LAYERS = [
    *("__main__", "cli", "demo", "bench", "report", "testing", "integrations"),
    *("checkpointer", "loading", "listing"),
    *("_engine", "_restore", "_capture", "_memory", "_writer", "_ship"),
    *("handle", "policies", "_disk", "_shared", "retention", "shipping", "_format"),
    *("sinks", "stall", "ettr", "events", "errors"),
    *("_bell", "_frozen", "_signals", "_tensor_guard"),
]
LEVEL = {name: level for level, name in enumerate(LAYERS)}
TORCH_FREE = ["_writer", "_ship", "_disk", "_shared", "_format", "retention", "shipping"]
HEAVY = {"torch", "numpy", "transformers", "accelerate", "safetensors", "anyio", "rich", "typer"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    """(dotted path below the package, syntax tree) of every module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        dotted = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield dotted.removesuffix(".__init__"), ast.parse(path.read_text(), str(path))


def imports(dotted: str, tree: ast.Module, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import anywhere in a module; `from . import x` gives x, as it may be a module."""
    here = ["vembed_async_ckpt", *dotted.split(".")]
    parent = here if is_package else here[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parent[: len(parent) + 1 - node.level] if node.level else []
            target = [*base, *(node.module or "").split(".")] if node.module else base
            yield from ((node.lineno, ".".join([*target, alias.name])) for alias in node.names)


def wrong(dotted: str, tree: ast.Module, *, is_package: bool) -> list[str]:
    """The imports of a module that go upwards."""
    level = LEVEL[dotted.split(".")[0]]
    found = []
    for line, target in imports(dotted, tree, is_package=is_package):
        parts = target.split(".")
        if parts[0] == "vembed_async_ckpt" and len(parts) > 1 and LEVEL.get(parts[1], level) < level:
            found.append(f"{dotted}:{line} imports {target}")
    return found


def is_package(dotted: str) -> bool:
    return (PACKAGE.joinpath(*dotted.split(".")) / "__init__.py").exists()


def test_every_module_has_its_layer():
    """A new module or folder must be given its place in `LAYERS`."""
    unknown = {dotted for dotted, _ in modules() if dotted.split(".")[0] not in {*LEVEL, "__init__"}}
    assert unknown == set()


def test_imports_go_one_way():
    """Top to bottom as in `LAYERS`: of any two folders at most one imports the other."""
    checked = [(dotted, tree) for dotted, tree in modules() if dotted.split(".")[0] in LEVEL]
    assert len(checked) > 25
    assert [line for dotted, tree in checked for line in wrong(dotted, tree, is_package=is_package(dotted))] == []


@pytest.mark.parametrize(
    ("dotted", "source"),
    [
        ("_format.plan", "from ..errors import PlanError\nfrom .._capture import request"),
        ("_format.plan", "import vembed_async_ckpt._engine.saving"),
        ("_disk.filesystem", "def f():\n    from ..handle import SaveHandle"),
        ("errors", "from ._format import plan"),
        ("events", "from . import loading"),
    ],
)
def test_an_import_that_goes_up_is_found(dotted: str, source: str):
    """The check sees absolute and relative imports, at any depth and inside functions."""
    assert len(wrong(dotted, ast.parse(source), is_package=False)) == 1


def test_no_modules_import_each_other():
    """Directly or around corners, imports for type checkers left out."""
    known = {f"vembed_async_ckpt.{dotted}" for dotted, _ in modules()}
    graph = {}
    for dotted, tree in modules():
        if dotted == "__init__":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                node.body = []
        found = {target for _, target in imports(dotted, tree, is_package=is_package(dotted))}
        targets = {target if target in known else target.rpartition(".")[0] for target in found}
        own = f"vembed_async_ckpt.{dotted}"
        graph[own] = {target for target in targets if target in known and target != own}
    assert len(graph) > 100
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError naming them


def test_the_torch_free_layers_name_no_heavy_module():
    """Not even inside a function: the writer process has nothing but the standard library and xxhash."""
    found = [
        f"{dotted}:{line} imports {target}"
        for dotted, tree in modules()
        if dotted.split(".")[0] in TORCH_FREE
        for line, target in imports(dotted, tree, is_package=is_package(dotted))
        if target.split(".")[0] in HEAVY
    ]
    assert found == []


def test_the_torch_free_layers_load_no_torch():
    """Nor do they through others: all of them imported in a fresh interpreter."""
    names = [
        f"vembed_async_ckpt.{d}" for d, _ in modules() if d.split(".")[0] in TORCH_FREE and not d.endswith("__main__")
    ]
    assert len(names) > 12
    script = f"import sys, {', '.join([*names, 'vembed_async_ckpt._writer.__main__'])}\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert {name.partition(".")[0] for name in result.stdout.split()} & HEAVY == set()
