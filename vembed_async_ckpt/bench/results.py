"""Result files. In memory every time is in seconds and every size in bytes; the file says so in its keys: `blocked_s`,
`size_bytes`.

Files of format 1 had no units in their keys; they are read all the same. `result.schema.json` describes format 2.
"""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from .options import Refused

FORMAT = 2
SCHEMA = Path(__file__).with_name("result.schema.json")
_SECONDS = (
    *(
        "save",
        "step",
        "blocked",
        "work",
        "work_alone",
        "written",
        "durable",
        "raw",
        "warm",
        "cold",
        "lost",
        "floor",
        "call",
    ),
    *("quiet", "bare", "beside", "copy", "writes", "reads", "stretch", "patience", "budget", "limit"),
    *("blocked_p99", "durable_p99", "warm_p99", "cold_p99"),
    *("our_stall", "our_staging", "our_queued", "our_write", "our_commit", "our_durable", "our_barrier", "our_held"),
)
_BYTES = ("size", "sizes", "proportional", "resident", "gpu", "allowed", "training", "saving")
UNITS = {name: f"{name}_s" for name in _SECONDS} | {name: f"{name}_bytes" for name in _BYTES}
UNITS["throughput"] = "throughput_bytes_per_s"
NAMES = {unit: name for name, unit in UNITS.items()}


def with_units(value: Any) -> Any:
    """The same with a unit in the key of every number, and of every list of numbers, that has one."""
    if isinstance(value, dict):
        return {UNITS.get(key, key) if _numbers(part) else key: with_units(part) for key, part in value.items()}
    return [with_units(part) for part in value] if isinstance(value, list | tuple) else value


def without_units(value: Any) -> Any:
    """What `with_units` was given."""
    if isinstance(value, dict):
        return {NAMES.get(key, key) if _numbers(part) else key: without_units(part) for key, part in value.items()}
    return [without_units(part) for part in value] if isinstance(value, list) else value


def _numbers(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(part, int | float) for part in value)
    return isinstance(value, int | float) and not isinstance(value, bool)


def read(path: Path) -> dict[str, Any]:
    """The result in a file of this or an earlier format. Raises `Refused` if it is none."""
    try:
        found = json.loads(path.read_text())
        form = found["format"]
        found["machine"], found["options"], found["state"], found["measures"]
    except OSError as error:
        raise Refused(f"{path} is no result of this command: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} is no result of this command: {error!r}") from error
    if not isinstance(form, int) or form > FORMAT:
        raise Refused(f"{path} has format {form}; this version reads up to {FORMAT}")
    return dict(found if form == 1 else without_units(found))


def write(path: Path, result: dict[str, Any]) -> None:
    """Replace the file at once."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(with_units(result), indent=1) + "\n")
    os.replace(partial, path)


def new_file(folder: Path) -> Path:
    """A name in `folder` that nobody has."""
    stem = f"bench-{datetime.now():%Y-%m-%d-%H%M%S}"
    number = 0
    while True:
        path = folder / (f"{stem}-{number}.json" if number else f"{stem}.json")
        try:
            path.open("x").close()
            return path
        except FileExistsError:
            number += 1
