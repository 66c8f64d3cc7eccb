"""Commands that look inside a checkpoint, by headers and bytes only: no torch, nothing is unpickled."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from .._store import manifest as manifests
from .._store import names
from .._store.fs import read_regular
from .._store.tensors import StoredTensor, digests, stored_tensors
from .reading import AsJson

Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint's directory.")]


def inspect(
    path: Checkpoint,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor, not only the files.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what is in a checkpoint: step, metrics, versions, files, tensors, config."""
    directory = os.fspath(path)
    manifest = manifests.read(directory)
    manifests.check(directory, manifest, "size")
    found = list(stored_tensors(directory, manifest))
    if as_json:
        print(json.dumps(_summary(directory, manifest, found), indent=2))
        return
    console = Console()
    metrics = " ".join(f"{name}={value:.4g}" for name, value in manifest.metrics.items())
    console.print(f"{directory}: step {manifest.step}, sequence {manifest.sequence} {metrics}", highlight=False)
    console.print(" ".join(f"{name} {version}" for name, version in manifest.versions.items()), highlight=False)
    console.print(_files_table(manifest, found))
    if tensors:
        console.print(_tensors_table(found))


def _summary(directory: str, manifest: manifests.Manifest, found: list[StoredTensor]) -> dict[str, Any]:
    config = names.CONFIG
    return {
        "path": directory,
        "step": manifest.step,
        "sequence": manifest.sequence,
        "metrics": dict(manifest.metrics),
        "versions": dict(manifest.versions),
        "files": {name: record.size for name, record in manifest.files.items()},
        "tensors": [{"file": t.file, "name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in found],
        "config": json.loads(read_regular(os.path.join(directory, config))) if config in manifest.files else None,
    }


def _files_table(manifest: manifests.Manifest, found: list[StoredTensor]) -> Table:
    table = Table("file", "size", "tensors", "dtypes", "hash")
    for name, record in sorted(manifest.files.items()):
        inside = [tensor for tensor in found if tensor.file == name]
        dtypes = " ".join(sorted({tensor.dtype for tensor in inside}))
        table.add_row(name, decimal(record.size), str(len(inside) or ""), dtypes, record.xxh3_128[:8])
    return table


def _tensors_table(found: list[StoredTensor]) -> Table:
    table = Table("file", "tensor", "dtype", "shape", "size")
    for t in found:
        table.add_row(t.file, t.name, t.dtype, "x".join(map(str, t.shape)) or "scalar", decimal(t.nbytes))
    return table


def diff(
    a: Checkpoint,
    b: Checkpoint,
    as_json: AsJson = False,
) -> None:
    """Say which tensors of two checkpoints differ, by the hash of their bytes. Exit code 1 if any does."""
    manifest_a, manifest_b = manifests.read(os.fspath(a)), manifests.read(os.fspath(b))
    one, other = digests(os.fspath(a), manifest_a), digests(os.fspath(b), manifest_b)
    result = {
        "changed": sorted(
            f"{file}: {name}" for file, name in one.keys() & other.keys() if one[file, name] != other[file, name]
        ),
        "only_in_a": sorted(f"{file}: {name}" for file, name in one.keys() - other.keys()),
        "only_in_b": sorted(f"{file}: {name}" for file, name in other.keys() - one.keys()),
        "equal": sum(one[key] == other[key] for key in one.keys() & other.keys()),
    }
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        for what, lines in result.items():
            if isinstance(lines, list):
                for line in lines:
                    print(f"{what.replace('_', ' ')}: {line}")
        print(f"{result['equal']} tensors are equal")
    raise typer.Exit(1 if result["changed"] or result["only_in_a"] or result["only_in_b"] else 0)
