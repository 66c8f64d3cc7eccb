"""`vembed-ckpt export`: the model of a checkpoint, as other people load it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from vembed_async_ckpt import AsyncCheckpointer
from vembed_async_ckpt._format import names
from vembed_async_ckpt.cli import app

runner = CliRunner()


def tiny_bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, dtype="float32"
    )
    return BertModel(config)


@pytest.fixture
def model() -> BertModel:
    return tiny_bert()


@pytest.fixture(params=["50GB", "20KB"], ids=["one file", "shards"])
def saved(request: pytest.FixtureRequest, root: Path, model: BertModel) -> Path:
    """A checkpoint with an optimizer, a config of the training and a buffer of integers."""
    model.register_buffer("counts", torch.arange(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1, 2]])).last_hidden_state.sum().backward()
    optimizer.step()
    with AsyncCheckpointer(root, max_shard_size=request.param) as checkpointer:
        checkpointer.save(1, model=model, optimizer=optimizer, config={"lr": 0.1}).result(60)
    return root / "checkpoint-1"


def run(*arguments: object) -> tuple[int, str]:
    result = runner.invoke(app, ["export", *map(str, arguments)])
    return result.exit_code, result.output + (
        f"{type(result.exception).__name__}: {result.exception}" if result.exception else ""
    )


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("model*.safetensors")):
        found |= load_file(file)
    return found


def test_the_model_and_nothing_of_the_training(saved: Path, model: BertModel, tmp_path: Path) -> None:
    """Byte for byte what is in the checkpoint; from_pretrained opens it; optimizer and random states stay behind."""
    out = tmp_path / "out"
    assert run(saved, out) == (0, f"{out}\n")
    exported = {file.name for file in out.iterdir()}
    assert exported >= {"config.json", names.CONFIG}
    assert not exported & {names.MANIFEST, names.TRAINING_STATE, names.TRAINING_TENSORS, "optimizer.bin"}
    assert not [name for name in exported if name.startswith(("random_states", "scheduler", "optimizer"))]
    for name in exported:
        assert (out / name).read_bytes() == (saved / name).read_bytes()
    loaded = BertModel.from_pretrained(out)
    for name, value in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), value)


def test_only_the_weights(saved: Path, tmp_path: Path) -> None:
    assert run(saved, tmp_path / "out", "--weights-only")[0] == 0
    exported = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert exported == sorted(n for n in os.listdir(saved) if n.startswith("model") and "safetensors" in n)


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_another_dtype(saved: Path, model: BertModel, tmp_path: Path, dtype: str, expected: torch.dtype) -> None:
    """Floating-point weights are converted as torch does it, integers are not; config and index say so; the files are what
    safetensors writes."""
    out = tmp_path / "out"
    assert run(saved, out, "--dtype", dtype)[0] == 0
    before, after = tensors(saved), tensors(out)
    assert before.keys() == after.keys()
    for name, value in before.items():
        wanted = value.to(expected) if value.is_floating_point() else value
        assert after[name].dtype is wanted.dtype
        assert torch.equal(after[name], wanted)
    assert json.loads((out / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")
    index = out / "model.safetensors.index.json"
    if index.exists():
        assert json.loads(index.read_text())["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    loaded = BertModel.from_pretrained(out)
    assert loaded.dtype is expected


def test_a_weights_file_is_not_copied_twice(root: Path, tmp_path: Path) -> None:
    """The second name that `save_checkpoint` gives it stays behind."""
    from accelerate import Accelerator

    from vembed_async_ckpt import save_checkpoint
    from vembed_async_ckpt.integrations.vembed import close_shared

    save_checkpoint(root / "checkpoint-1", tiny_bert(), Accelerator(cpu=True)).result(60)
    close_shared()
    assert (root / "checkpoint-1" / "model_state_dict.safetensors").exists()
    assert run(root / "checkpoint-1", tmp_path / "out")[0] == 0
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_what_is_damaged_is_not_exported(tmp_path: Path) -> None:
    with AsyncCheckpointer(tmp_path) as checkpointer:
        checkpointer.save(1, model=tiny_bert()).result(60)
    weights = tmp_path / "checkpoint-1" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    code, said = run(tmp_path / "checkpoint-1", tmp_path / "out")
    assert code == 1
    assert "CorruptCheckpoint" in said
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    code, said = run(saved, out)
    assert code == 1
    assert f"{out}: exists already" in said
    assert list(out.iterdir()) == []


def test_an_unknown_dtype_is_refused(saved: Path, tmp_path: Path) -> None:
    code, said = run(saved, tmp_path / "out", "--dtype", "int3")
    assert code == 2
    assert "fp32, fp16, bf16" in said
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_nothing_behind(saved: Path, tmp_path: Path) -> None:
    """A disk that is too small: one line, no directory. The limit on the size of a file stands for it."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); sys.argv[0] = 'vembed-ckpt'\n"
        "from vembed_async_ckpt.cli import main; main()"
    )
    folder = tmp_path / "folder"
    command = [sys.executable, "-c", code, "export", saved, folder / "out"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "File too large" in result.stderr
    assert list(folder.iterdir()) == []
