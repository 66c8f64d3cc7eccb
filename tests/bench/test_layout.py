"""No module of the benchmark imports one that imports it, and what is checked before torch is loaded loads no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import vembed_async_ckpt.bench

PACKAGE = Path(vembed_async_ckpt.bench.__file__).parent
NAME = vembed_async_ckpt.bench.__name__


def imports() -> dict[str, set[str]]:
    """Every module of the benchmark, and those of it that it imports, inside functions too."""
    files = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        files[".".join([NAME, *(part for part in parts if part != "__init__")])] = path
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        base = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
        graph[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                source = [*base[: len(base) + 1 - node.level], *(node.module or "").split(".")]
                for alias in node.names:
                    named = ".".join(part for part in [*source, alias.name] if part)
                    graph[module].add(named if named in files else ".".join(part for part in source if part))
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(NAME):
                graph[module].add(node.module or "")
    return {
        module: {target for target in found if target in files and target != module} for module, found in graph.items()
    }


def test_there_is_no_circle():
    """Modules can be put in an order in which each imports only those before it; the package's own face comes last."""
    left = imports()
    assert len(left) > 30
    assert f"{NAME}.engine" in left[f"{NAME}.engines.dcp"]
    while left:
        free = [module for module, needed in left.items() if not needed & set(left)]
        assert free, f"a circle among {sorted(left)}"
        left = {module: needed for module, needed in left.items() if module not in free}


def test_files_are_short():
    """Below 400 lines each."""
    assert [path.name for path in PACKAGE.rglob("*.py") if len(path.read_text().splitlines()) >= 400] == []


def test_what_reads_and_checks_loads_no_torch():
    """Sentences, tables, pages and comparisons of a result, the catalog, the workloads and the checks."""
    names = (
        "answers",
        "catalog",
        "checks",
        "compare",
        "drawing",
        "options",
        "page",
        "report",
        "results",
        "summary",
        "text",
        "workloads",
    )
    script = f"import sys; {'; '.join(f'import {NAME}.{name}' for name in names)}; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "False\n"
