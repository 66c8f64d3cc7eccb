"""`vembed-ckpt bench` as a person uses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

from vembed_async_ckpt.bench.catalog import ENGINES
from vembed_async_ckpt.cli import app

runner = CliRunner()


def test_a_run_with_a_model_of_ones_own_as_a_process(tmp_path: Path):
    """A config.json is enough: tables, JSON and pictures come out, and the model itself was trained beside its saves."""
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=100
    )
    config.save_pretrained(tmp_path / "model")
    arguments = [
        "bench",
        "durable",
        "--model",
        "model",
        "--engines",
        "ours,safetensors",
        "--rounds",
        "1",
        "--saves",
        "1",
    ]
    program = "from vembed_async_ckpt.cli import main\nif __name__ == '__main__':\n    main()"
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--patience", "0", "--out", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "BertModel" in result.stdout
    assert "vembed-async-ckpt" in result.stdout
    (file,) = (tmp_path / "out").glob("*.json")
    found = json.loads(file.read_text())
    assert found["state"]["model"] == "BertModel"
    assert found["state"]["trained"]
    assert set(found["summary"]["durable"]["engines"]) == {"ours", "safetensors"}
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]
    shown = runner.invoke(app, ["bench", "--show", str(file)])
    assert shown.exit_code == 0
    assert "Durable:" in shown.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "no measure 'speed'"),
        (["--engines", "ours,theirs"], "no engine 'theirs'"),
        (["--size", "much"], "size 'much' is none"),
        (["--dir", "/no/such/directory"], "is no directory"),
        (["--size", "100TiB"], "are needed"),
        (["--show", "/no/such/file.json"], "is no result of this command"),
        (["--rounds", "0"], "rounds is 0"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
):
    """Exit code 2 and one line."""
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("vembed-ckpt bench: ")
    assert message in result.stderr
    assert os.listdir(tmp_path) == []


def test_the_engines_are_listed():
    """With how each is configured and what it leaves out."""
    result = runner.invoke(app, ["bench", "--list"])
    assert result.exit_code == 0
    assert [name for name in ENGINES if name not in result.output] == []


def test_no_plots_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It says so, and the tables are there all the same."""
    file = tmp_path / "result.json"
    machine = {
        "date": "2026-01-01",
        "cpus": 2,
        "cpu": "x",
        "gpu": None,
        "kernel": "6",
        "file_system": "ext4",
        "load": 0.0,
    }
    file.write_text(
        json.dumps(
            {
                "complete": False,
                "machine": {**machine, "versions": {"torch": "2"}},
                "state": {"model": "synthetic", "bytes": 1, "tensors": 1},
                "options": {"rounds": 1, "saves": 1},
                "engines": {},
                "summary": {},
            }
        )
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "vembed_async_ckpt.bench.plots", raising=False)
    monkeypatch.delattr("vembed_async_ckpt.bench.plots", raising=False)
    result = runner.invoke(app, ["bench", "--show", str(file)])
    assert result.exit_code == 0, result.output
    assert "no plots: matplotlib is not installed" in result.output
    assert "ended before everything was measured" in result.output
