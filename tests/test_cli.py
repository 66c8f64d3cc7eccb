"""`vembed-ckpt` as a person and as a program use it: output, JSON, exit codes, and no torch where it only reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vembed_async_ckpt import AsyncCheckpointer, CorruptCheckpoint
from vembed_async_ckpt.cli import app

runner = CliRunner()


@pytest.fixture
def saved(root: Path) -> Path:
    """Three checkpoints of a model that changes in one place."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    with AsyncCheckpointer(root) as checkpointer:
        for step in (1, 2, 3):
            with torch.no_grad():
                model[1].bias.add_(1)
            checkpointer.save(step, model=model, metrics={"loss": 1 / step}, config={"lr": 0.1}).result(60)
    return root


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_ls_lists_what_is_there(saved: Path) -> None:
    """Every checkpoint with step, metrics and state; JSON carries the same."""
    result = runner.invoke(app, ["ls", str(saved)])
    assert result.exit_code == 0
    assert all(f"checkpoint-{step}" in result.output for step in (1, 2, 3))
    rows = json.loads(runner.invoke(app, ["ls", str(saved), "--json"]).output)
    assert [(row["step"], row["complete"], row["metrics"]) for row in rows] == [
        (step, True, {"loss": 1 / step}) for step in (1, 2, 3)
    ]


def test_ls_and_latest_say_what_is_broken(saved: Path, recwarn: pytest.WarningsRecorder) -> None:
    """A truncated file makes ls fail with the reason; latest gives the one before it."""
    with (saved / "checkpoint-3" / "model.safetensors").open("r+b") as file:
        file.truncate(10)
    rows = json.loads(runner.invoke(app, ["ls", str(saved), "--json"]).output)
    assert runner.invoke(app, ["ls", str(saved)]).exit_code == 1
    assert "has 10 bytes" in rows[-1]["reason"]
    result = runner.invoke(app, ["latest", str(saved)])
    assert result.output.strip() == str(saved / "checkpoint-2")
    assert any("has 10 bytes" in str(warning.message) for warning in recwarn)
    (saved / "checkpoint-3" / "model.safetensors").unlink()
    for path in sorted((saved / "checkpoint-3").iterdir()):
        path.unlink()
    (saved / "checkpoint-3").rmdir()


def test_latest_of_nothing_fails(tmp_path: Path) -> None:
    """No checkpoint: exit code 1, nothing on standard output."""
    result = runner.invoke(app, ["latest", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (1, "")


def test_verify_finds_one_flipped_bit(saved: Path) -> None:
    """Whole root or one checkpoint: hashes are compared, the file is named."""
    assert runner.invoke(app, ["verify", str(saved)]).exit_code == 0
    target = saved / "checkpoint-2" / "model.safetensors"
    flip_a_bit(target)
    result = runner.invoke(app, ["verify", str(saved)])
    assert result.exit_code == 1
    assert result.output.count(": ok") == 2
    assert "content differs" in result.output
    assert runner.invoke(app, ["verify", str(saved / "checkpoint-1")]).exit_code == 0
    flip_a_bit(target)


def test_inspect_shows_tensors_and_config(saved: Path) -> None:
    """Names, dtypes and shapes come from headers, the config from its file."""
    found = json.loads(runner.invoke(app, ["inspect", str(saved / "checkpoint-1"), "--json"]).output)
    assert {"file": "model.safetensors", "name": "1.bias", "dtype": "F32", "shape": [2]} in found["tensors"]
    assert (found["step"], found["config"]) == (1, {"lr": 0.1})
    assert "1.bias" in runner.invoke(app, ["inspect", str(saved / "checkpoint-1"), "--tensors"]).output


def test_diff_names_what_changed(saved: Path) -> None:
    """One bias changed between two saves; a checkpoint equals itself."""
    result = runner.invoke(app, ["diff", str(saved / "checkpoint-1"), str(saved / "checkpoint-2"), "--json"])
    assert result.exit_code == 1
    assert json.loads(result.output)["changed"] == ["model.safetensors: 1.bias"]
    assert runner.invoke(app, ["diff", str(saved / "checkpoint-1"), str(saved / "checkpoint-1")]).exit_code == 0


def test_diff_says_how_far_they_are_apart(saved: Path) -> None:
    """Each of the two numbers of the bias grew by one."""
    arguments = ["diff", str(saved / "checkpoint-1"), str(saved / "checkpoint-2"), "--norms"]
    assert "apart by 1.414" in runner.invoke(app, arguments).output
    norms = json.loads(runner.invoke(app, [*arguments, "--json"]).output)["norms"]["model.safetensors: 1.bias"]
    assert norms["difference"] == pytest.approx(2**0.5)


def test_prune_keeps_what_it_is_told(saved: Path) -> None:
    """A dry run only says what would go; the real one deletes just that."""
    dry = runner.invoke(app, ["prune", str(saved), "--keep-last", "1", "--keep-best", "max:loss", "--dry-run"])
    assert dry.output.strip() == f"would delete {saved / 'checkpoint-2'}"
    assert (saved / "checkpoint-2").exists()
    assert runner.invoke(app, ["prune", str(saved), "--keep-last", "1", "--keep-best", "max:loss"]).exit_code == 0
    assert sorted(path.name for path in saved.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    assert runner.invoke(app, ["prune", str(saved)]).exit_code == 2, "what to keep must be said"


def test_sweep_shows_first_and_removes_only_what_is_ours(saved: Path) -> None:
    """A leftover work directory goes with --yes; a stranger's directory beside it stays."""
    work = saved / "_vembed_async_ckpt"
    leftover = work / f"work-{'a' * 32}.0"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    stranger = work / "notes"
    stranger.mkdir()
    assert leftover.name in runner.invoke(app, ["sweep", str(saved)]).output
    assert json.loads(runner.invoke(app, ["sweep", str(saved), "--json"]).output)["leftovers"] == [leftover.name]
    assert leftover.exists()
    assert runner.invoke(app, ["sweep", str(saved), "--yes"]).exit_code == 0
    assert not leftover.exists()
    assert stranger.exists()
    stranger.rmdir()


@pytest.mark.parametrize("command", ["ls", "latest", "verify", "sweep"])
def test_reading_loads_no_torch(saved: Path, command: str) -> None:
    """The commands that only read start in a fraction of the time torch needs."""
    code = (
        f"import sys; sys.argv = ['vembed-ckpt', {command!r}, {str(saved)!r}]\n"
        "from vembed_async_ckpt.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code in (0, None), end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_an_error_is_one_line(tmp_path: Path) -> None:
    """What the library refuses ends in a line on standard error, not in a traceback."""
    code = "import sys; sys.argv = ['x', 'inspect', sys.argv[1]]; from vembed_async_ckpt.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(CorruptCheckpoint.__name__)
    assert len(done.stderr.splitlines()) == 1
