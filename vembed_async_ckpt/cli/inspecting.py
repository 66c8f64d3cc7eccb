"""Commands that look inside a checkpoint, by headers and bytes only: no torch, nothing is unpickled."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from .._store import manifest as manifests
from .._store import names
from .._store.fs import open_regular, read_regular
from .._store.tensors import StoredTensor, digests, stored_tensors
from ..errors import CheckpointError, CorruptCheckpoint
from .reading import AsJson

_MAX_CONFIG = 64 << 20  # bytes

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
    console.print(
        f"{directory}: step {manifest.step}, sequence {manifest.sequence} {metrics}", highlight=False, markup=False
    )
    versions = " ".join(f"{name} {version}" for name, version in manifest.versions.items())
    console.print(versions, highlight=False, markup=False)
    console.print(_files_table(manifest, found))
    if tensors:
        console.print(_tensors_table(found))


def _summary(directory: str, manifest: manifests.Manifest, found: list[StoredTensor]) -> dict[str, Any]:
    return {
        "path": directory,
        "step": manifest.step,
        "sequence": manifest.sequence,
        "metrics": dict(manifest.metrics),
        "versions": dict(manifest.versions),
        "files": {name: record.size for name, record in manifest.files.items()},
        "tensors": [{"file": t.file, "name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in found],
        "config": _config(directory) if names.CONFIG in manifest.files else None,
    }


def _config(directory: str) -> Any:
    path = os.path.join(directory, names.CONFIG)
    try:
        content = read_regular(path, _MAX_CONFIG + 1)
        if len(content) > _MAX_CONFIG:
            raise ValueError(f"larger than {_MAX_CONFIG} bytes")
        return json.loads(content)
    except (ValueError, RecursionError, OSError) as error:
        raise CorruptCheckpoint(f"{path}: cannot be read: {error}") from error


def _files_table(manifest: manifests.Manifest, found: list[StoredTensor]) -> Table:
    table = Table("file", "size", "tensors", "dtypes", "hash")
    for name, record in sorted(manifest.files.items()):
        inside = [tensor for tensor in found if tensor.file == name]
        dtypes = " ".join(sorted({tensor.dtype for tensor in inside}))
        row = (name, decimal(record.size), str(len(inside) or ""), dtypes, record.xxh3_128[:8])
        table.add_row(*map(escape, row))
    return table


def _tensors_table(found: list[StoredTensor]) -> Table:
    table = Table("file", "tensor", "dtype", "shape", "size")
    for t in found:
        table.add_row(
            escape(t.file), escape(t.name), escape(t.dtype), "x".join(map(str, t.shape)) or "scalar", decimal(t.nbytes)
        )
    return table


def diff(
    a: Checkpoint,
    b: Checkpoint,
    norms: Annotated[
        bool, typer.Option("--norms", help="How far the changed tensors are apart (loads torch).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say which tensors of two checkpoints differ, by the hash of their bytes. Exit code 1 if any does."""
    sides = [(os.fspath(path), manifests.read(os.fspath(path))) for path in (a, b)]
    for side in sides:
        manifests.check(*side, "size")
    one, other = (digests(directory, manifest) for directory, manifest in sides)
    common = one.keys() & other.keys()
    changed = sorted(key for key in common if one[key] != other[key])
    result: dict[str, Any] = {
        "changed": [f"{file}: {name}" for file, name in changed],
        "only_in_a": sorted(f"{file}: {name}" for file, name in one.keys() - other.keys()),
        "only_in_b": sorted(f"{file}: {name}" for file, name in other.keys() - one.keys()),
        "equal": len(common) - len(changed),
    }
    if norms:
        result["norms"] = _norms(sides, changed)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        for what in ("changed", "only_in_a", "only_in_b"):
            for line in result[what]:
                print(f"{what.replace('_', ' ')}: {line}{_in_words(result.get('norms', {}).get(line))}")
        print(f"{result['equal']} tensors are equal")
    raise typer.Exit(1 if len(common) != result["equal"] or result["only_in_a"] or result["only_in_b"] else 0)


def _norms(
    sides: list[tuple[str, manifests.Manifest]], changed: list[tuple[str, str]]
) -> dict[str, dict[str, float | None]]:
    """2-norms of each changed tensor in A, in B and of their difference (None where the shapes differ)."""
    found = [{(t.file, t.name): t for t in stored_tensors(*side)} for side in sides]
    result = {}
    for key in changed:
        one, other = (_read(directory, tensors[key]) for (directory, _), tensors in zip(sides, found, strict=True))
        result[f"{key[0]}: {key[1]}"] = {
            "a": one.norm().item(),
            "b": other.norm().item(),
            "difference": (other - one).norm().item() if one.shape == other.shape else None,
        }
    return result


def _read(directory: str, stored: StoredTensor) -> Any:
    import torch

    from .._request.dtypes import TO_TORCH

    with os.fdopen(open_regular(os.path.join(directory, *stored.file.split("/"))), "rb") as file:
        file.seek(stored.offset)
        data = bytearray(file.read(stored.nbytes))
    try:
        dtype = TO_TORCH.get(stored.dtype) or getattr(torch, stored.dtype)
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(stored.shape).to(torch.float64)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{directory}: {stored.name!r} of {stored.file} cannot be measured: {error}") from error


def _in_words(norms: dict[str, float | None] | None) -> str:
    if norms is None:
        return ""
    difference = norms["difference"]
    apart = "of another shape" if difference is None else f"apart by {difference:.4g}"
    return f" ({apart}, norm {norms['a']:.4g} and {norms['b']:.4g})"
