"""`vembed-ckpt bench` as a person uses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

from vembed_async_ckpt.bench.catalog import ENGINES
from vembed_async_ckpt.bench.options import Options, Refused
from vembed_async_ckpt.cli import app, bench

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
    assert max(map(len, result.stdout.splitlines())) <= 80
    (file,) = (tmp_path / "out").glob("*.json")
    found = json.loads(file.read_text())
    assert found["state"]["model"] == "BertModel"
    assert found["state"]["trained"]
    assert set(found["summary"]["durable"]["engines"]) == {"ours", "safetensors"}
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]
    shown = runner.invoke(app, ["bench", "--show", str(file), "--details"])
    assert shown.exit_code == 0
    assert "Durable:" in shown.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "no measure 'speed'"),
        (["--engines", "ours,theirs"], "no engine 'theirs'"),
        (["--size", "much"], "size 'much' is none"),
        (["--dir", "/proc/no/such/directory"], "--dir /proc/no/such/directory: no such file or directory"),
        (["--dir", "/dev/null"], "--dir /dev/null: "),
        (["--out", "/proc/out"], "--out /proc/out: "),
        (["--device", "cuda"], "--device cuda: this torch is built without CUDA"),
        (["--device", "tpu"], "--device tpu: write it as cpu, cuda or cuda:1"),
        (["--workload", "gpt"], "no workload 'gpt'; there are clip, siglip"),
        (["--workload", "mlperf-70b", "--scale", "1"], "Use "),
        (["--scale", "2"], "--scale '2' is none"),
        (["--budget", "soon"], "--budget 'soon' is no time"),
        (["--mtbf", "-1h"], "--mtbf '-1h' is no time"),
        (["--overhead", "much"], "--overhead 'much' is no share"),
        (["--gpus", "0"], "--gpus is 0"),
        (["--engine", "theirs:"], "--engine theirs:: write it as module:Class"),
        (["--engine", "no_such_module:Engine"], "--engine no_such_module:Engine: no module 'no_such_module'"),
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


def test_refusals_come_before_torch_is_loaded(tmp_path: Path):
    """In a fraction of a second, from a process that has no torch in it."""
    program = (
        "import sys\nfrom vembed_async_ckpt.cli import main\ntry:\n    main()\n"
        "finally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    for arguments in (["--device", "cuda"], ["--size", "100TiB"], ["--dir", "/dev/null"], ["--engines", "theirs"]):
        result = subprocess.run(
            [sys.executable, "-c", program, "bench", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 2, result.stderr
        message, loaded = result.stderr.splitlines()
        assert message.startswith("vembed-ckpt bench: ")
        assert loaded == "False"
    assert os.listdir(tmp_path) == []


def test_plots_without_matplotlib_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In one line, after the answers."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "vembed_async_ckpt.bench.plots", raising=False)
    monkeypatch.delattr("vembed_async_ckpt.bench.plots", raising=False)
    file = Path(__file__).parents[2] / "benchmarks" / "results" / "bench-2026-11-28.json"
    result = runner.invoke(app, ["bench", "--show", str(file), "--plots", str(tmp_path)])
    assert result.exit_code == 2
    assert "torch_checkpointing" in result.stdout
    assert result.stderr == "vembed-ckpt bench: --plots: matplotlib is not installed: pip install matplotlib\n"


def test_an_engine_of_the_default_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch):
    """The run goes on without it; only one that was named is refused. One of one's own is added to the default."""
    absent = replace(ENGINES["torch_checkpointing"], package="no_such_package_anywhere")
    monkeypatch.setitem(ENGINES, "torch_checkpointing", absent)
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2] / "benchmarks")])
    wanted, missing = bench._engines(Options(), ("own_engine:CopyThenSave", "accelerate"))
    assert wanted == ["ours", "original", "dcp", "dcp-overlap", "own_engine:CopyThenSave", "accelerate"]
    assert missing == ["torch_checkpointing"]
    with pytest.raises(Refused, match="'torch_checkpointing' is not installed: pip install torch-checkpointing"):
        bench._engines(Options(engines=("torch_checkpointing",)), ())


def test_help_is_not_cut():
    """At 80 columns no name and no sentence of it ends in an ellipsis; the commands are listed."""
    for arguments in (["--help"], ["run", "--help"], ["compare", "--help"], ["check", "--help"]):
        shown = runner.invoke(app, ["bench", *arguments], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
        assert shown.exit_code == 0
        assert "…" not in shown.output
    assert all(name in runner.invoke(app, ["bench", "--help"]).output for name in ("run", "compare", "check"))
