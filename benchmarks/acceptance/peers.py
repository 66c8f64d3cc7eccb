"""The same training with other libraries, by `vembed-ckpt bench`."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

from .common import Say, Setting


def run(setting: Setting, say: Say) -> None:
    engines = "ours,torch_checkpointing,dcp" if setting.cuda else "ours"
    command = [
        sys.executable,
        "-m",
        "vembed_async_ckpt",
        "bench",
        "run",
        "cost",
        "--device",
        setting.device,
        "--engines",
        engines,
    ]
    command += [
        "--size",
        "8MiB" if setting.tiny else "1GiB",
        "--tensors",
        "400",
        "--dir",
        str(setting.directory / "bench"),
    ]
    command += ["--out", str(setting.directory / "result"), "--budget", f"{max(int(setting.left()) - 15, 5)}s"]
    if setting.tiny:
        command += ["--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(setting.left(), 5))
    say(code=done.returncode, said=(done.stdout + done.stderr)[-6000:])
    results = sorted((setting.directory / "result").glob("*.json"))
    if done.returncode == 0 and results:
        result = json.loads(results[-1].read_text())
        say(result=result, blocked_ms=_blocked(result))


def _blocked(result: Any) -> dict[str, float]:
    """By engine, the median of what a save took from the training thread."""
    seconds: dict[str, list[float]] = {}
    for sample in result["measures"]["cost"]["samples"]:
        seconds.setdefault(sample["engine"], []).extend(save["blocked_s"] for save in sample["saves"])
    return {engine: round(statistics.median(values) * 1e3, 4) for engine, values in seconds.items() if values}
