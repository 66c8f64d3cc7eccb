#!/usr/bin/env python3
"""One run on one GPU that proves or refutes what is claimed of GPUs. Prints one JSON and writes it to --out.

    python benchmarks/gpu_acceptance.py                        # on the GPU, at most eight minutes
    python benchmarks/gpu_acceptance.py --device cpu --tiny    # tries everything but the GPU itself

Each part is a process with its own limit; what it had found counts even if it dies or hangs. A verdict is true, false, or null
where it could not be found out. The exit code is 1 if one is false.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Part:
    """`module`: in the package beside this file, with a function `run(setting, say)`. `limit`: seconds at most."""

    module: str
    limit: float
    needs_gpu: bool = False


PARTS = {
    "machine": Part("machine", 45),
    "correctness": Part("correctness", 110),
    "held": Part("held", 25),
    "cost": Part("cost", 60),
    "peers": Part("peers", 90),
    "kill": Part("kill", 40),
    "capture": Part("capture", 30, needs_gpu=True),
    "device_error": Part("device_error", 25, needs_gpu=True),
    "big": Part("big", 120),
    "compile": Part("compiled", 45),
}

Findings = dict[str, Any]  # by part


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes: tries the script, proves nothing of speed")
    parser.add_argument("--budget", type=float, default=470.0, help="seconds in all")
    parser.add_argument("--directory", type=Path, help="where checkpoints go; default: a temporary directory")
    parser.add_argument("--out", type=Path, default=Path("gpu_acceptance.json"))
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; default: all")
    options = parser.parse_args()
    begun = time.monotonic()
    work = options.directory or Path(tempfile.mkdtemp(prefix="gpu-acceptance-"))
    report: dict[str, Any] = {"device": options.device, "tiny": options.tiny, "parts": {}}
    try:
        for name in options.parts.split(","):
            left = options.budget - (time.monotonic() - begun)
            report["parts"][name] = _outcome(name, options, work / name, left)
            report["verdicts"] = _verdicts(report["parts"], tiny=options.tiny)
            report["seconds"] = round(time.monotonic() - begun, 1)
            options.out.write_text(json.dumps(report, indent=1) + "\n")
            print(f"{name}: {report['parts'][name]['outcome']}", file=sys.stderr, flush=True)
    finally:
        if options.directory is None:
            shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(report, indent=1))
    return 1 if False in report["verdicts"].values() else 0


def _outcome(name: str, options: argparse.Namespace, work: Path, left: float) -> dict[str, Any]:
    part = PARTS[name]
    if part.needs_gpu and options.device == "cpu":
        return {"outcome": "skipped: it needs a GPU", "found": {}}
    if left < 8:
        return {"outcome": "skipped: no time is left", "found": {}}
    work.mkdir(parents=True, exist_ok=True)
    result = work / "found.json"
    limit = min(part.limit, left)
    command = [sys.executable, "-m", "acceptance", part.module, options.device, str(int(options.tiny)), str(limit)]
    with open(work / "output", "wb") as output:
        process = subprocess.Popen(
            [*command, str(work), str(result)],
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd=HERE,
            env=_environment(),
        )
        try:
            outcome = "ended" if process.wait(limit) == 0 else f"died with code {process.returncode}"
        except subprocess.TimeoutExpired:
            outcome = f"killed after {limit:.0f} s"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)  # a process stuck in the driver cannot be reaped: go on without it
    found = json.loads(result.read_text()) if result.exists() else {}
    told = {} if outcome == "ended" else {"output": (work / "output").read_text(errors="replace")[-1500:]}
    shutil.rmtree(work, ignore_errors=True)
    return {"outcome": outcome, "found": found, **told}


def _environment() -> dict[str, str]:
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _verdicts(parts: Findings, *, tiny: bool) -> dict[str, bool | None]:
    def get(part: str, *path: str) -> Any:
        value: Any = parts.get(part, {}).get("found", {})
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def measured(value: Any, holds: Callable[[Any], bool]) -> bool | None:
        return None if tiny or value is None else holds(value)

    cases = [case["ok"] for case in (get("correctness", "cases") or {}).values()]
    call = "save() of 400 tensors takes the thread at most {} ms (p50)"
    peer = get("peers", "blocked_ms", "torch_checkpointing")
    return {
        "every case restores byte for byte": all(cases)
        if cases and None not in cases
        else False
        if False in cases
        else None,
        "a torn copy is noticed": get("correctness", "torn_copy_noticed"),
        "host memory was pinned": get("machine", "pinned"),
        "a blocking copy reaches 85 % of pinned memcpy": measured(
            get("machine", "share_of_pinned_copy"), lambda v: v >= 0.85
        ),
        "held tells how long the device was held, within 30 %": get("held", "truthful"),
        call.format(3): measured(get("cost", "foreach", "call_ms", "p50"), lambda v: v <= 3.0),
        call.replace("tensors", "tensors, fused,").format(3): measured(
            get("cost", "fused", "call_ms", "p50"), lambda v: v <= 3.0
        ),
        "save() is shorter than torch_checkpointing's": measured(
            peer, lambda v: get("peers", "blocked_ms", "ours") < v
        ),
        "the median step is at most 2 % slower, saving every 10": measured(
            get("cost", "foreach", "median_step_inflation"), lambda v: v <= 0.02
        ),
        "a killed trainer's staged checkpoint is whole": get("kill", "whole"),
        "a capture beside saves and pinning survives": get("capture", "ok"),
        "a device error fails the save and spares the staged one": get("device_error", "ok"),
        "a compiled step is seen": get("compile", "ok"),
        "big state: save() takes the thread at most 10 ms": measured(get("big", "call_ms", "p50"), lambda v: v <= 10.0),
        "big state: what was loaded is what was saved": get("big", "right"),
    }


if __name__ == "__main__":
    sys.exit(main())
