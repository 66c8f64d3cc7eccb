"""Exports the model of a checkpoint: the files that others load, without the training state."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from .._disk import latest_link, manifests
from .._disk.filesystem import open_regular, read_regular
from .._disk.reader import held, manifest_of
from .._disk.stored_tensors import StoredTensor, stored_tensors
from .._format import bounded_json, names, safetensors
from .._format.manifest import Manifest
from .._format.safetensors import TensorSpec
from ..errors import CheckpointError, CorruptCheckpoint
from .inspecting import Checkpoint

_CHUNK = 16 << 20  # bytes
_DTYPES = {"fp32": ("F32", "float32"), "fp16": ("F16", "float16"), "bf16": ("BF16", "bfloat16")}
_CAST = ("F64", "F32", "F16", "BF16")


def export(
    path: Checkpoint,
    out: Annotated[Path, typer.Argument(help="Directory to make; it must not exist.")],
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Only the weights files, without config and processor.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Convert floating-point weights: fp32, fp16 or bf16 (loads torch).")
    ] = None,
) -> None:
    """Copy the model of a checkpoint to OUT, for from_pretrained and for other people: weights, config, processor.

    The optimizer, the random states and the rest of the training state are left out. Every hash is checked first. OUT
    appears only when it is complete.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise typer.BadParameter(f"{dtype!r}; use {', '.join(_DTYPES)}", param_hint="--dtype")
    directory = latest_link.resolve(path)
    with held(directory):  # retention does not delete it meanwhile
        _export(directory, os.path.abspath(out), weights_only, dtype)


def _export(directory: str, target: str, weights_only: bool, dtype: str | None) -> None:
    manifest = manifest_of(directory)
    manifests.check(directory, manifest, "full")
    chosen = [name for name in _model_files(directory, manifest) if not weights_only or _is_weights(name)]
    if not any(name.endswith(".safetensors") for name in chosen):
        raise CheckpointError(f"{directory}: holds no weights to export")
    if os.path.lexists(target):
        raise CheckpointError(f"{target}: exists already; name a new directory")
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        building = tempfile.mkdtemp(prefix=f".{os.path.basename(target)}.", dir=os.path.dirname(target))
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be made ({error.strerror})") from error
    try:
        _fill(building, directory, manifest, chosen, dtype)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(building, 0o777 & ~umask)  # mkdtemp makes it private
        os.rename(building, target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    print(target)


def _model_files(directory: str, manifest: Manifest) -> list[str]:
    """Return the files of the model and its processor.

    A file with several names is listed once, with the name that `save_pretrained` gives it.
    """
    seen: set[tuple[int, int]] = set()
    chosen = []
    for name in sorted(manifest.files, key=lambda name: (names.is_second_name(name), name)):
        status = os.lstat(os.path.join(directory, *name.split("/")))
        if not names.is_training_state(name) and (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            chosen.append(name)
    return sorted(chosen)


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))


def _fill(building: str, directory: str, manifest: Manifest, chosen: list[str], dtype: str | None) -> None:
    tensors: dict[str, list[StoredTensor]] = {}
    if dtype is not None:
        for tensor in stored_tensors(directory, manifest):
            tensors.setdefault(tensor.file, []).append(tensor)
    for name in chosen:
        source, copy = (os.path.join(top, *name.split("/")) for top in (directory, building))
        os.makedirs(os.path.dirname(copy), exist_ok=True)
        if dtype is not None and name.endswith(".safetensors"):
            _convert(source, copy, tensors.get(name, []), dtype)
        elif dtype is not None and name.endswith(".json"):
            _write(copy, _in_dtype(read_regular(source), name, chosen, tensors, dtype))
        else:
            with open(open_regular(source), "rb") as reading, open(copy, "xb") as writing:
                shutil.copyfileobj(reading, writing, _CHUNK)


def _write(path: str, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)


def _convert(source: str, copy: str, tensors: list[StoredTensor], dtype: str) -> None:
    """Write a weights file with another dtype, one tensor at a time.

    Tensors that are not in `_CAST` keep their dtype.
    """
    import torch

    from .._capture.dtypes import TO_TORCH

    name, _ = _DTYPES[dtype]
    by_name = {tensor.name: tensor for tensor in tensors}
    specs = [TensorSpec(t.name, name if t.dtype in _CAST else t.dtype, t.shape) for t in tensors]
    with open(open_regular(source), "rb") as reading, open(copy, "xb") as writing:
        size = os.fstat(reading.fileno()).st_size
        head = reading.read(8)
        head += reading.read(safetensors.header_length(head, size, file=source))
        layout = safetensors.layout(specs, safetensors.parse(head, size, file=source)[1], file=copy)
        writing.write(layout.prefix)
        for tensor in (by_name[name] for name in sorted(layout.offsets, key=lambda key: layout.offsets[key])):
            reading.seek(tensor.offset)
            data = bytearray(tensor.nbytes)
            if reading.readinto(data) != tensor.nbytes:
                raise CorruptCheckpoint(f"{source}: ends before {tensor.name!r} does")
            if tensor.dtype in _CAST and tensor.nbytes:
                values = torch.frombuffer(data, dtype=TO_TORCH[tensor.dtype]).to(TO_TORCH[name])
                writing.write(values.view(torch.uint8).numpy().data)
            else:
                writing.write(data)


def _in_dtype(
    content: bytes, name: str, chosen: list[str], tensors: dict[str, list[StoredTensor]], dtype: str
) -> bytes:
    """Update the dtype in a config, or the total size in an index of weights. Any other file is returned unchanged."""
    base = name.rpartition("/")[2]
    if base != "config.json" and not base.endswith(".safetensors.index.json"):
        return content
    try:
        body = bounded_json.loads(content)
    except (ValueError, RecursionError):
        return content
    if base == "config.json":
        _rename_dtype(body, _DTYPES[dtype][1])
    elif isinstance(body, dict) and isinstance(body.get("metadata"), dict) and "total_size" in body["metadata"]:
        places = body.get("weight_map")
        shards = set(map(str, places.values())) if isinstance(places, dict) else set()
        folder = name.rpartition("/")[0]
        files = [file for file in chosen if file.rpartition("/")[0] == folder and file.rpartition("/")[2] in shards]
        body["metadata"]["total_size"] = sum(_size(t, dtype) for file in files for t in tensors.get(file, []))
    try:
        return (json.dumps(body, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can write
        return (json.dumps(body, indent=2) + "\n").encode()


def _size(tensor: StoredTensor, dtype: str) -> int:
    kind = _DTYPES[dtype][0] if tensor.dtype in _CAST else tensor.dtype
    return TensorSpec(tensor.name, kind, tensor.shape).nbytes


def _rename_dtype(body: Any, dtype: str) -> None:
    """Set `dtype` (transformers 4: `torch_dtype`) wherever a config, or a config nested in it, has that key."""
    if isinstance(body, dict):
        for key, value in body.items():
            if key in ("dtype", "torch_dtype") and isinstance(value, str):
                body[key] = dtype
            else:
                _rename_dtype(value, dtype)
