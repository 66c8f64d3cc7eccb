"""The files that all ranks write together are those of one process: byte for byte, every byte copied once."""

from __future__ import annotations

from pathlib import Path

from .launch import run_ranks

MODELS = ("llama", "bert", "clip", "adapter", "plain")
WAYS = ("fsdp1", "hybrid1", "fsdp2", "tp", "hsdp")


def test_four_ranks_write_the_files_of_one_process(tmp_path: Path) -> None:
    """Models with bf16, int64 buffers, tied weights, scalars and a PEFT adapter, divided in five ways, and their optimizers.

    The script compares every file with what `save_pretrained` and `save_file` write of the gathered values.
    """
    report = run_ranks("pieces.py", 4, str(tmp_path), *WAYS)[0]
    assert report.keys() == {f"{model}-{way}" for model in MODELS for way in WAYS}
    for name, seen in report.items():
        weights = "adapter_model.safetensors" if name.startswith("adapter") else "model.safetensors"
        assert {weights, "optimizer.safetensors"} <= set(seen["files"])
        assert seen["tensors"] > 25
