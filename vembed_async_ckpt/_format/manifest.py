"""The manifest: the file in which a checkpoint describes itself.

The file is one JSON object. Its last key, `self`, is the xxh3_128 (hex) of all bytes of the file before the opening
quote of that key. A manifest that was cut short or altered does not match this hash.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash

from ..errors import CorruptCheckpoint
from . import bounded_json, names
from .plan import is_safe_relative

FORMAT = "vembed_async_ckpt"
VERSION = 1

_LARGEST = 1 << 63
MAX_BYTES = 1 << 28  # a manifest with a million tensors is half this size


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and xxh3_128 (hex) of one file."""

    size: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """The manifest of one checkpoint.

    `sequence`: orders the checkpoints of a root.
    `ranks`: the ranks whose random states and data positions were saved; None if they are all `world_size` ranks.
    `metrics`: as given to `save()`. In the file, NaN and infinity stand as {"$float": "nan"}, "inf" or "-inf".
    `names`: for each weights file, the place of its tensors in the model: {file name: {tensor: place}}.
    `tensors`: the tensors of each file that is not safetensors (optimizer.bin), as {key: [dtype, shape, offset]}. A
        tensor that is not contiguous has its strides as a fourth entry; its bytes then lie in the order of the strides.
    `files`: size and hash of every file of the checkpoint except the manifest.
    """

    save_id: str
    step: int | None
    sequence: int
    world_size: int = 1
    ranks: tuple[int, ...] | None = None
    time: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    names: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)

    @property
    def order(self) -> tuple[int, int]:
        """The sort key (sequence, step). The newest checkpoint has the largest one."""
        return (self.sequence, -1 if self.step is None else self.step)

    def to_bytes(self) -> bytes:
        """Return the content of the manifest file."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "save_id": self.save_id,
            "step": self.step,
            "sequence": self.sequence,
            "world_size": self.world_size,
            "time": self.time,
            "versions": self.versions,
            "metrics": {name: _to_json(value) for name, value in self.metrics.items()},
            "files": {name: {"size": file.size, "xxh3_128": file.xxh3_128} for name, file in self.files.items()},
            "names": self.names,
            "tensors": self.tensors,
        }
        if self.ranks is not None:
            body["ranks"] = self.ranks
        before = json.dumps(body, ensure_ascii=False, separators=(",", ":"))[:-1].encode() + b","
        return before + b'"self":"' + xxhash.xxh3_128_hexdigest(before).encode() + b'"}'


def too_large(content: bytes) -> str | None:
    """Return why `parse` would refuse a manifest of this size, or None if it would accept it."""
    if len(content) > MAX_BYTES:
        return f"{len(content)} bytes; at most {MAX_BYTES} can be read back"
    return bounded_json.excess(content)


def parse(content: bytes, *, file: str) -> Manifest:
    """Parse a manifest file. `file` is its name in errors.

    Raises `CorruptCheckpoint` if the content is incomplete, altered or malformed.
    """
    cut = content.rfind(b'"self"')
    try:
        if excess := too_large(content):
            raise ValueError(f"it has {excess}")
        body = json.loads(content)  # `too_large` has looked at it
        if body["format"] != FORMAT:
            raise ValueError(f"format is {body['format']!r}, not {FORMAT!r}")
        if body["version"] != VERSION:
            raise ValueError(f"format version {body['version']!r} is not the one this release reads ({VERSION})")
        if body["self"] != xxhash.xxh3_128_hexdigest(content[:cut]):
            raise ValueError("its own hash does not match")
        if not names.is_save_id(body["save_id"]):
            raise ValueError(f"save_id is {body['save_id']!r}")
        for key in ("versions", "metrics", "names", "tensors", "files"):
            if not isinstance(body[key], dict):
                raise TypeError(f"{key} is {str(body[key])[:60]!r}")
        metrics = {name: _from_json(value) for name, value in body["metrics"].items()}
        return Manifest(
            save_id=body["save_id"],
            step=None if body["step"] is None else _whole("step", body["step"], least=-_LARGEST),
            sequence=_whole("sequence", body["sequence"], least=0),
            world_size=_whole("world_size", body["world_size"], least=1),
            ranks=None if body.get("ranks") is None else _ranks(body["ranks"]),
            time=_seconds(body["time"]),
            versions=body["versions"],
            metrics=metrics,
            names=body["names"],
            tensors=body["tensors"],
            files={_safe(name): _record(value) for name, value in body["files"].items()},
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise CorruptCheckpoint(f"{file}: unusable manifest: {reason}") from error


def _to_json(metric: float) -> Any:
    """Encode a metric as in the training state (see `_capture.tree`), because JSON has no NaN and no infinity."""
    return metric if math.isfinite(metric) else {"$float": repr(float(metric))}


def _from_json(value: Any) -> float:
    if isinstance(value, dict) and list(value) == ["$float"] and value["$float"] in ("nan", "inf", "-inf"):
        return float(value["$float"])
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"a metric is {str(value)[:60]!r}")
    float(value)  # raises OverflowError for an integer too large for a float
    return value


def _whole(key: str, value: Any, *, least: int) -> int:
    if type(value) is not int or not least <= value < _LARGEST:
        raise ValueError(f"{key} is {str(value)[:60]!r}")
    return value


def _ranks(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise TypeError(f"ranks is {str(value)[:60]!r}")
    return tuple(_whole("a rank", rank, least=0) for rank in value)


def _seconds(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"time is {str(value)[:60]!r}")
    return float(value)


def _safe(name: str) -> str:
    if not is_safe_relative(name):
        raise ValueError(f"the file name {name!r} leaves the directory")
    return name


def _record(value: Mapping[str, Any]) -> FileRecord:
    size, digest = value["size"], value["xxh3_128"]
    if type(size) is not int or not 0 <= size < _LARGEST or not isinstance(digest, str):
        raise ValueError(f"unusable file record {value!r}")
    return FileRecord(size, digest)
