"""What the figures were measured on."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import version

_PACKAGES = ("vembed-async-ckpt", "torch", "accelerate", "safetensors", "transformers")


def facts(directory: str) -> dict[str, object]:
    """Machine and versions, for a result file."""
    with open("/proc/cpuinfo") as file:
        cpu = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    best, kind = "", ""
    with open("/proc/self/mounts") as file:
        for line in file:
            _, point, its_kind = line.split()[:3]
            inside = os.path.realpath(directory).rstrip("/") + "/"
            if inside.startswith(point.rstrip("/") + "/") and len(point) >= len(best):
                best, kind = point, its_kind
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "file_system": kind,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
    }
