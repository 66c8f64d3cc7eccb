"""The commands that look inside a checkpoint. They read headers and bytes only: no torch, nothing is unpickled."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from operator import sub
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from .._disk import latest_link, manifests
from .._disk.filesystem import open_regular, read_regular
from .._disk.reader import reading
from .._disk.stored_tensors import StoredTensor, digests, stored_tensors
from .._format import names
from .._format.manifest import Manifest
from ..errors import CorruptCheckpoint
from .reading import AsJson, print_json, shown

_MAX_CONFIG = 64 << 20  # bytes
_WIDEST = 80  # characters of a column; longer cells are not padded
_BLOCK = 1 << 20  # elements
_BY_NAME = ("float64", "complex128", "int64")  # dtypes of optimizer.bin for which safetensors has no name

Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint's directory.")]


def inspect(
    path: Checkpoint,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor, not only the files.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the content of a checkpoint: step, metrics, versions, files, tensors, config."""
    directory = latest_link.resolve(path)
    manifest, found, config = reading(directory, lambda manifest: _contents(directory, manifest))
    if as_json:
        print_json(_summary(directory, manifest, found, config))
        return
    console = Console()
    metrics = " ".join(f"{name}={value:.4g}" for name, value in manifest.metrics.items())
    console.print(
        f"{directory}: step {manifest.step}, sequence {manifest.sequence} {metrics}", highlight=False, markup=False
    )
    versions = " ".join(f"{name} {version}" for name, version in manifest.versions.items())
    console.print(versions, highlight=False, markup=False)
    console.print(_files_table(manifest, found))
    if names.CONFIG in manifest.files:
        print(f"{names.CONFIG}:")
        for line in json.dumps(config, indent=2, ensure_ascii=False).splitlines():
            print(shown(line))
    if tensors:
        _list_tensors(found)


def _contents(directory: str, manifest: Manifest) -> tuple[Manifest, list[StoredTensor], Any]:
    """Return the manifest, tensors and config of a checkpoint, after checking the sizes of its files."""
    manifests.check(directory, manifest, "size")
    config = _config(directory) if names.CONFIG in manifest.files else None
    return manifest, list(stored_tensors(directory, manifest)), config


def _summary(directory: str, manifest: Manifest, found: list[StoredTensor], config: Any) -> dict[str, Any]:
    return {
        "path": directory,
        "step": manifest.step,
        "sequence": manifest.sequence,
        "metrics": dict(manifest.metrics),
        "versions": dict(manifest.versions),
        "files": {name: record.size for name, record in manifest.files.items()},
        "tensors": [{"file": t.file, "name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in found],
        "config": config,
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


def _files_table(manifest: Manifest, found: list[StoredTensor]) -> Table:
    counts = Counter(tensor.file for tensor in found)
    dtypes: dict[str, set[str]] = {}
    for tensor in found:
        dtypes.setdefault(tensor.file, set()).add(tensor.dtype)
    table = Table("file", "size", "tensors", "dtypes", "hash")
    for name, record in sorted(manifest.files.items()):
        inside = " ".join(sorted(dtypes.get(name, ())))
        row = (name, decimal(record.size), str(counts[name] or ""), inside, record.xxh3_128[:8])
        table.add_row(*map(escape, row))
    return table


def _list_tensors(found: list[StoredTensor]) -> None:
    """Print one line for each tensor, in columns. A table of rich would take minutes for a large model."""
    rows = [("file", "tensor", "dtype", "shape", "size")]
    rows += [
        (shown(t.file), shown(t.name), shown(t.dtype), "x".join(map(str, t.shape)) or "scalar", decimal(t.nbytes))
        for t in found
    ]
    widths = [min(max(map(len, column)), _WIDEST) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def diff(
    a: Checkpoint,
    b: Checkpoint,
    norms: Annotated[
        bool, typer.Option("--norms", help="How far the changed tensors are apart (loads torch).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show which tensors of two checkpoints differ, by the hash of their bytes. Exit code 1 if any differs."""
    left, right = map(latest_link.resolve, (a, b))
    result = reading(left, lambda one: reading(right, lambda other: _compared([(left, one), (right, other)], norms)))
    if as_json:
        print_json(result)
    else:
        kinds = ("changed", "only_in_a", "only_in_b")
        print(
            ", ".join(f"{len(result[what])} {what.replace('_', ' ')}" for what in kinds) + f", {result['equal']} equal"
        )
        for what in kinds:
            for line in result[what]:
                print(f"{what.replace('_', ' ')}: {shown(line)}{_in_words(result.get('norms', {}).get(line))}")
    raise typer.Exit(1 if any(result[what] for what in ("changed", "only_in_a", "only_in_b")) else 0)


def _compared(sides: list[tuple[str, Manifest]], norms: bool) -> dict[str, Any]:
    """Return the names of the tensors that differ, and the number of equal ones."""
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
    return result


def _norms(sides: list[tuple[str, Manifest]], changed: list[tuple[str, str]]) -> dict[str, dict[str, float | None]]:
    """Return the 2-norms of each changed tensor in A, in B, and of their difference.

    A norm is None if torch cannot compute in the dtype. The difference is also None if shapes or strides differ.
    """
    found = [{(t.file, t.name): t for t in stored_tensors(*side)} for side in sides]
    result = {}
    for key in changed:
        a, b = ((directory, tensors[key]) for (directory, _), tensors in zip(sides, found, strict=True))
        measured = [_dtype(stored.dtype) is not None for _, stored in (a, b)]
        comparable = all(measured) and (a[1].shape, a[1].strides) == (b[1].shape, b[1].strides)
        result[f"{key[0]}: {key[1]}"] = {
            "a": _norm(_blocks(*a)) if measured[0] else None,
            "b": _norm(_blocks(*b)) if measured[1] else None,
            "difference": _norm(map(sub, _blocks(*b), _blocks(*a))) if comparable else None,
        }
    return result


def _norm(blocks: Iterable[Any]) -> float:
    """Return the 2-norm of all blocks together."""
    total = 0.0
    for block in blocks:
        total = math.hypot(total, block.norm().item())
    return total


def _dtype(name: str) -> Any:
    """Return the torch.dtype of that name, or None if torch cannot compute in it."""
    import torch

    from .._capture.dtypes import TO_TORCH

    if name in _BY_NAME:
        return getattr(torch, name)
    return None if name == "F4" else TO_TORCH.get(name)


def _blocks(directory: str, stored: StoredTensor) -> Iterator[Any]:
    """Yield the elements of a tensor in float64 or complex128, block by block, so that little memory is used."""
    import torch

    dtype = _dtype(stored.dtype)
    path = os.path.join(directory, *stored.file.split("/"))
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            file.seek(stored.offset)
            for start in range(0, stored.nbytes, size := _BLOCK * dtype.itemsize):
                data = bytearray(min(size, stored.nbytes - start))
                if file.readinto(data) != len(data):
                    raise CorruptCheckpoint(f"{path}: ends before {stored.name!r} does")
                block = torch.frombuffer(data, dtype=dtype)
                yield block.to(torch.complex128 if dtype.is_complex else torch.float64)
    except OSError as error:
        raise CorruptCheckpoint(f"{path}: cannot be read: {error.strerror}") from error


def _in_words(norms: dict[str, float | None] | None) -> str:
    if norms is None:
        return ""
    a, b, difference = ("unknown" if norms[what] is None else f"{norms[what]:.4g}" for what in ("a", "b", "difference"))
    return f" (apart by {difference}, norm {a} and {b})"
