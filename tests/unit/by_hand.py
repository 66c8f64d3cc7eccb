"""Checkpoints and jobs made by hand: of a few bytes, without torch and without a writer process."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from vembed_async_ckpt._format import names
from vembed_async_ckpt._format.manifest import FileRecord, Manifest
from vembed_async_ckpt._format.plan import pages
from vembed_async_ckpt._shared.protocol import DATA_START, Checksums, Job

FILES = {"model.safetensors": b"\x02\0\0\0\0\0\0\0{}", "optimizer.bin": b"state" * 100, "inner/config.json": b"{}"}


def save_id(number: int) -> str:
    return f"{number:032x}"


def record(data: bytes) -> FileRecord:
    return FileRecord(len(data), xxhash.xxh3_128_hexdigest(data))


def manifest(number: int, files: Mapping[str, bytes] = FILES, **values: Any) -> Manifest:
    """The manifest of save `number`, whose step and sequence are that number unless `values` say otherwise."""
    described = {name: record(data) for name, data in files.items()}
    return Manifest(**{"save_id": save_id(number), "step": number, "sequence": number, "files": described, **values})


def write_files(directory: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return directory


def checkpoint(directory: Path, number: int, files: Mapping[str, bytes] = FILES, **values: Any) -> Path:
    """A committed checkpoint at `directory`."""
    write_files(directory, files)
    (directory / names.MANIFEST).write_bytes(manifest(number, files, **values).to_bytes())
    return directory


def safetensors(tensors: Mapping[str, tuple[str, list[int], bytes]]) -> bytes:
    """A safetensors file of {name: (dtype, shape, bytes)}."""
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


def job(number: int, files: Mapping[str, bytes] = FILES, **values: Any) -> tuple[Job, bytearray]:
    """The job of save `number` and its arena, with everything in its place but the job's own JSON."""
    start, slots, arena = DATA_START, [], bytearray(DATA_START)
    for name, data in files.items():
        slots.append({"name": name, "start": start, "size": len(data)})
        arena += data.ljust(pages(len(data)), b"\0")
        start += pages(len(data))
    checksums: dict[str, Checksums] = {}
    described: Job = {
        "save_id": save_id(number),
        "step": number,
        "name": f"checkpoint-{number}",
        "files": slots,  # type: ignore[typeddict-item]
        "checksums": checksums,
        "links": [],
        "manifest": {},
        "retention": None,
        "latest_link": False,
        "ship": [],
        "max_unshipped": None,
        "waves": 0,
    }
    described.update(values)  # type: ignore[typeddict-item]
    return described, arena


def contents(directory: Path) -> dict[str, bytes]:
    """What lies in a directory, by relative name; of links the text."""
    return {
        str(path.relative_to(directory)): str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection between trainer and writer. A read that waits for more than 20 s fails."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.settimeout(20)
    return ours, theirs
