"""`--engine module:Class`: the example of benchmarks/ is measured, and what is no engine is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAM = "from vembed_async_ckpt.cli import main\nif __name__ == '__main__':\n    main()"
SMALL = ["--size", "1MiB", "--tensors", "12", "--rounds", "1", "--saves", "1", "--patience", "0", "--engines", "ours"]


def bench(folder: Path, engine: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, "bench", *SMALL, "--engine", engine, "--dir", "disk/new", "--out", "out"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=250,
    )


def test_the_example_is_measured_beside_ours(tmp_path: Path):
    """Into folders that did not exist; it is in the table by its name, and in the result with what it leaves out."""
    shutil.copy(BENCHMARKS / "own_engine.py", tmp_path)
    ran = bench(tmp_path, "own_engine:CopyThenSave")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert any(line.startswith("CopyThenSave") for line in ran.stdout.splitlines())
    (file,) = (tmp_path / "out").glob("*.json")
    result = json.loads(file.read_text())
    assert result["engines"]["own_engine:CopyThenSave"]["lacks"] == "no fsync, no hash, files in place"
    samples = result["measures"]["cost"]["samples"]
    assert {sample["engine"] for sample in samples} == {"ours", "own_engine:CopyThenSave", "raw-disk"}
    assert [sample["error"] for sample in samples if "error" in sample] == []
    assert os.listdir(tmp_path / "disk" / "new") == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("class Mine: ...", "--engine mine:Mine: Mine is not a subclass of vembed_async_ckpt.bench.Engine"),
        ("Other = 1", "--engine mine:Mine: module 'mine' has no attribute 'Mine'"),
        ("import no_such_module_anywhere", "--engine mine:Mine: No module named 'no_such_module_anywhere'"),
    ],
)
def test_what_is_no_engine_is_refused(tmp_path: Path, source: str, message: str):
    """In one line, and nothing is left."""
    (tmp_path / "mine.py").write_text(source)
    ran = bench(tmp_path, "mine:Mine")
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert f"vembed-ckpt bench: {message}" in ran.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "disk").exists()
