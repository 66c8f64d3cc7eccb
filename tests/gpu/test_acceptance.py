"""benchmarks/gpu_acceptance.py without a GPU: it runs, finds what can be found, and claims nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_acceptance.py"


def dry_run(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    out = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert json.loads(done.stdout) == json.loads(out.read_text()), done.stderr
    return done.returncode, json.loads(out.read_text())


def test_parts_are_reported_with_a_verdict_for_each_claim(tmp_path: Path) -> None:
    """A part that needs a GPU is left out; what a part found is there."""
    code, report = dry_run(tmp_path, "--parts", "held,capture")
    assert code == 0
    assert report["parts"]["held"]["outcome"] == "ended", report
    assert len(report["parts"]["held"]["found"]["told_ms"]) == 4
    assert report["parts"]["capture"]["outcome"] == "skipped: it needs a GPU"
    assert set(report["verdicts"].values()) == {None}


def test_a_part_that_hangs_is_killed_and_counts_for_nothing(tmp_path: Path) -> None:
    code, report = dry_run(tmp_path, "--parts", "machine,big", "--budget", "9")
    assert code == 0
    assert report["parts"]["machine"]["outcome"] in ("killed after 9 s", "died with code 1", "ended")
    assert report["parts"]["big"]["outcome"].startswith(("skipped", "killed"))
    assert set(report["verdicts"].values()) == {None}


@pytest.mark.slow
def test_every_part_that_can_run_here(tmp_path: Path) -> None:
    code, report = dry_run(tmp_path)
    assert code == 0, report["verdicts"]
    outcomes = {name: part["outcome"] for name, part in report["parts"].items()}
    assert {name for name, outcome in outcomes.items() if outcome != "ended"} == {"capture", "device_error"}
    assert report["verdicts"]["every case restores byte for byte"] is True
