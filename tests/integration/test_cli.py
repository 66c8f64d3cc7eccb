"""`vembed-ckpt` as a person and as a program use it: output, JSON, exit codes, and no torch where it only reads."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vembed_async_ckpt import AsyncCheckpointer, CheckpointError, CorruptCheckpoint, KeepLast
from vembed_async_ckpt._capture.dtypes import TO_TORCH
from vembed_async_ckpt._disk.stored_tensors import StoredTensor
from vembed_async_ckpt._format import names
from vembed_async_ckpt._format.manifest import FileRecord, Manifest
from vembed_async_ckpt._format.safetensors import TensorSpec, layout
from vembed_async_ckpt.cli import app, inspecting, watching

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


def test_latest_by_a_metric(saved: Path) -> None:
    """`--best` takes the smallest value, with `--mode max` the largest; a metric that none has is no answer."""

    def path_of(*arguments: str) -> tuple[int, str]:
        result = runner.invoke(app, ["latest", str(saved), *arguments])
        return result.exit_code, result.stdout.strip()

    assert path_of("--best", "loss") == (0, str(saved / "checkpoint-3"))
    assert path_of("--best", "loss", "--mode", "max") == (0, str(saved / "checkpoint-1"))
    assert path_of("--best", "accuracy") == (1, "")
    assert path_of("--best", "loss", "--mode", "median")[0] == 2


def test_watch_tells_what_appears_breaks_and_goes(saved: Path) -> None:
    """A line for each that is there, then one for each change; Ctrl-C ends it with exit code 0."""
    watch = [sys.executable, "-m", "vembed_async_ckpt", "watch", str(saved), "--interval", "0.1", "--json"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # whoever started the tests may ignore Ctrl-C
    process = subprocess.Popen(watch, stdout=subprocess.PIPE, text=True, preexec_fn=heard)
    try:

        def told() -> tuple[str, str]:
            assert process.stdout is not None
            change = json.loads(process.stdout.readline())
            return Path(change["path"]).name, change["change"]

        assert [told() for _ in range(3)] == [(f"checkpoint-{step}", "complete") for step in (1, 2, 3)]
        with AsyncCheckpointer(saved, retention=KeepLast(3)) as checkpointer:
            checkpointer.save(4, model=torch.nn.Linear(2, 2), metrics={"loss": float("nan")}).result(60)
        assert {told(), told()} == {("checkpoint-4", "complete"), ("checkpoint-1", "gone")}
        with (saved / "checkpoint-2" / "model.safetensors").open("r+b") as file:
            file.truncate(10)
        assert told() == ("checkpoint-2", "broken")
        shutil.rmtree(saved / "checkpoint-2")
        assert told() == ("checkpoint-2", "gone")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_watch_in_words(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name, size, metrics and age of each."""

    def interrupted(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watching.time, "sleep", interrupted)
    result = runner.invoke(app, ["watch", str(saved)])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert [line.split()[1:3] for line in lines] == [[f"checkpoint-{step}", "complete"] for step in (1, 2, 3)]
    assert "loss=0.3333" in lines[2]
    assert lines[2].endswith("s ago)")


def test_watch_of_nothing_is_refused(tmp_path: Path) -> None:
    """A root that is misspelt is not waited for."""
    assert isinstance(runner.invoke(app, ["watch", str(tmp_path / "no")]).exception, CheckpointError)


def test_the_version_is_that_of_the_package() -> None:
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"vembed-ckpt {version('vembed-async-ckpt')}\n")


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
    shown = runner.invoke(app, ["inspect", str(saved / "checkpoint-1"), "--tensors"]).output
    assert "1.bias" in shown
    assert '"lr": 0.1' in shown


def test_diff_names_what_changed(saved: Path) -> None:
    """One bias changed between two saves; a checkpoint equals itself."""
    result = runner.invoke(app, ["diff", str(saved / "checkpoint-1"), str(saved / "checkpoint-2"), "--json"])
    assert result.exit_code == 1
    assert json.loads(result.output)["changed"] == ["model.safetensors: 1.bias"]
    result = runner.invoke(app, ["diff", str(saved / "checkpoint-1"), str(saved / "checkpoint-2")])
    summary, *lines = result.output.splitlines()
    assert summary.startswith(f"{len(lines)} changed, 0 only in a, 0 only in b, ")
    assert "changed: model.safetensors: 1.bias" in lines
    assert runner.invoke(app, ["diff", str(saved / "checkpoint-1"), str(saved / "checkpoint-1")]).exit_code == 0


def test_diff_says_how_far_they_are_apart(saved: Path) -> None:
    """Each of the two numbers of the bias grew by one."""
    arguments = ["diff", str(saved / "checkpoint-1"), str(saved / "checkpoint-2"), "--norms"]
    assert "apart by 1.414" in runner.invoke(app, arguments).output
    norms = json.loads(runner.invoke(app, [*arguments, "--json"]).output)["norms"]["model.safetensors: 1.bias"]
    assert norms["difference"] == pytest.approx(2**0.5)


def of_one_tensor(directory: Path, dtype: str, shape: tuple[int, ...], data: bytes, **manifest: Any) -> Path:
    """A checkpoint with a tensor `w` that has these bytes, and zeros behind them that take no space."""
    directory.mkdir()
    start = layout([TensorSpec("w", dtype, shape)], file="f")
    with (directory / "model.safetensors").open("wb") as file:
        file.write(start.prefix + data)
        file.truncate(start.size)
    files = {"model.safetensors": FileRecord(start.size, "0" * 32)}
    content = Manifest(save_id="f" * 32, step=1, sequence=1, files=files, **manifest).to_bytes()
    (directory / names.MANIFEST).write_bytes(content)
    return directory


def strictly(output: str) -> Any:
    """JSON as every parser reads it: it has no NaN and no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(output, parse_constant=refuse)


def norms(a: Path, b: Path, key: str = "model.safetensors: w") -> dict[str, float | None]:
    """What `diff --norms` says of one tensor, in words and to a program."""
    words = runner.invoke(app, ["diff", str(a), str(b), "--norms"])
    assert (words.exit_code, words.exception.__class__) == (1, SystemExit), words
    assert f"changed: {key} (apart by " in words.output
    return strictly(runner.invoke(app, ["diff", str(a), str(b), "--norms", "--json"]).output)["norms"][key]


@pytest.mark.parametrize("dtype", sorted(TO_TORCH))
def test_diff_measures_every_dtype(tmp_path: Path, dtype: str) -> None:
    """fp8, integers, bool, complex; only of float4, in which torch does not compute, nothing is known but that it changed."""
    kind = TO_TORCH[dtype]
    data = [bytes([n] * kind.itemsize * 2) for n in (0, 1)]
    shape = (4,) if dtype == "F4" else (2,)
    found = norms(*(of_one_tensor(tmp_path / name, dtype, shape, d) for name, d in zip("ab", data, strict=True)))
    if dtype == "F4":
        assert found == {"a": None, "b": None, "difference": None}
        return
    wide = torch.complex128 if kind.is_complex else torch.float64
    a, b = (torch.frombuffer(bytearray(d), dtype=kind).to(wide) for d in data)
    expected = {"a": a.norm().item(), "b": b.norm().item(), "difference": (b - a).norm().item()}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_diff_of_what_is_no_number(tmp_path: Path, number: str) -> None:
    """A model that diverged is measured too: a word for people, null for programs."""
    values = [torch.tensor([1.0, float(of)]) for of in ("2", number)]
    paths = [
        of_one_tensor(tmp_path / name, "F32", (2,), value.numpy().tobytes())
        for name, value in zip("ab", values, strict=True)
    ]
    assert norms(*paths) == {"a": pytest.approx(5**0.5), "b": None, "difference": None}
    assert f"apart by {number.strip('-')}" in runner.invoke(app, ["diff", *map(str, paths), "--norms"]).output


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (((0,), (0, 3)), {"a": 0, "b": 0, "difference": None}),
        (((2,), (3,)), {"a": 0, "b": 0, "difference": None}),
        (((2, 3), (3, 2)), {"a": 0, "b": 0, "difference": None}),
        (((), (1,)), {"a": 0, "b": 0, "difference": None}),
    ],
)
def test_diff_of_other_shapes(tmp_path: Path, shapes: Any, expected: dict[str, float | None]) -> None:
    """Each has its norm, of nothing too; apart they are by nothing that could be said."""
    paths = [of_one_tensor(tmp_path / name, "F32", shape, b"") for name, shape in zip("ab", shapes, strict=True)]
    assert norms(*paths) == expected


def test_diff_of_other_dtypes(tmp_path: Path) -> None:
    """The same shape in another dtype: compared by value, over the border of what is read at once too."""
    count = inspecting._BLOCK + 1
    a = of_one_tensor(tmp_path / "a", "F32", (count,), torch.full((count,), 2.0).numpy().tobytes())
    b = of_one_tensor(tmp_path / "b", "U8", (count,), b"\3" * count)
    assert norms(a, b) == pytest.approx({"a": 2 * count**0.5, "b": 3 * count**0.5, "difference": count**0.5})


@pytest.mark.parametrize("dtype", ["nn", "EVIL", "_dynamo"])
def test_diff_of_what_the_manifest_calls_a_dtype(tmp_path: Path, dtype: str) -> None:
    """A dtype that is none is not measured, and not looked up among what torch has."""
    a, b = (
        of_one_tensor(tmp_path / name, "F32", (2,), b"", tensors={"model.safetensors": {"x": [dtype, [n], 0]}})
        for n, name in enumerate("ab", 1)
    )
    assert norms(a, b, "model.safetensors: x") == {"a": None, "b": None, "difference": None}


def test_a_large_tensor_is_measured_piece_by_piece(tmp_path: Path) -> None:
    """However much a checkpoint says it holds: what can be said of it needs no memory of that size."""
    a, b = (of_one_tensor(tmp_path / name, "U8", (1 << 26,), name.encode()) for name in "ab")
    with Path("/proc/self/status").open() as file:
        taken = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData:"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (taken + (1 << 27), before[1]))
    try:
        done = runner.invoke(app, ["diff", str(a), str(b), "--norms", "--json"])
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    assert strictly(done.output)["norms"] == {"model.safetensors: w": {"a": 97, "b": 98, "difference": 1}}


def test_diff_of_a_file_that_is_cut_short(tmp_path: Path) -> None:
    """Before the comparison or in the middle of it: the file is named."""
    a, b = (of_one_tensor(tmp_path / name, "F32", (4,), name.encode()) for name in "ab")
    with (b / "model.safetensors").open("r+b") as file:
        file.truncate(72)
    done = runner.invoke(app, ["diff", str(a), str(b), "--norms"])
    assert isinstance(done.exception, CorruptCheckpoint)
    assert str(b / "model.safetensors") in str(done.exception)
    with pytest.raises(CorruptCheckpoint, match="ends before 'w' does"):
        list(inspecting._blocks(str(b), StoredTensor("model.safetensors", "w", "F32", (4,), 64, 16)))
    (b / "model.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint, match="cannot be read"):
        list(inspecting._blocks(str(b), StoredTensor("model.safetensors", "w", "F32", (4,), 64, 16)))


def test_names_do_nothing_to_a_terminal(tmp_path: Path) -> None:
    """Escape sequences in the name of a tensor are shown, not sent."""
    a, b = (
        of_one_tensor(tmp_path / n, "F32", (2,), b"", tensors={"model.safetensors": {"\x1b[2J\n": ["U8", [k], 0]}})
        for k, n in enumerate("ab", 1)
    )
    for arguments in (["inspect", "--tensors", str(a)], ["diff", "--norms", str(a), str(b)]):
        output = runner.invoke(app, arguments).output
        assert "\\x1b[2J\\n" in output
        assert "\x1b[2J" not in output


def test_metrics_that_are_no_numbers_are_json_all_the_same(tmp_path: Path) -> None:
    """A loss that became NaN is null."""
    (tmp_path / "root").mkdir()
    path = of_one_tensor(tmp_path / "root" / "checkpoint-1", "F32", (2,), b"", metrics={"loss": float("nan")})
    assert strictly(runner.invoke(app, ["ls", str(path.parent), "--json"]).output)[0]["metrics"] == {"loss": None}
    assert strictly(runner.invoke(app, ["inspect", str(path), "--json"]).output)["metrics"] == {"loss": None}


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
    leftover.mkdir(parents=True)
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
