"""The surface: the names of the contract are there, nothing else is promised, and looking at checkpoints loads no torch."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import vembed_async_ckpt

CONTRACT = [
    "save_checkpoint",
    "AsyncCheckpointer",
    "SaveHandle",
    "SaveState",
    "CheckpointInfo",
    "Restored",
    "latest",
    "load",
    "verify",
    "KeepLast",
    "KeepEvery",
    "KeepBest",
    "CheckpointError",
    "PlanError",
    "StageError",
    "WriteError",
    "CommitError",
    "CorruptCheckpoint",
    "CheckpointerBusy",
    "CheckpointerClosed",
    "StallMeter",
    "StallReport",
    "CheckpointEntry",
    "checkpoints",
    "best",
    "delete",
]


@pytest.mark.parametrize("name", CONTRACT)
def test_a_name_of_the_contract_can_be_imported(name: str):
    """`from vembed_async_ckpt import name`, listed in __all__."""
    namespace: dict[str, object] = {}
    exec(f"from vembed_async_ckpt import {name}", namespace)
    assert namespace[name] is not None
    assert name in vembed_async_ckpt.__all__


def test_all_is_what_resolves():
    """Every name of __all__ resolves, none stands twice, and the lazy table has no others."""
    assert len(set(vembed_async_ckpt.__all__)) == len(vembed_async_ckpt.__all__)
    assert set(vembed_async_ckpt._HOME_OF) == set(vembed_async_ckpt.__all__)
    for name in vembed_async_ckpt.__all__:
        assert getattr(vembed_async_ckpt, name).__name__ == name
    assert sorted(dir(vembed_async_ckpt)) == sorted(vembed_async_ckpt.__all__)


def test_an_unknown_name_is_an_attribute_error():
    """As of any module; hasattr works."""
    assert not hasattr(vembed_async_ckpt, "SaveAll")
    with pytest.raises(AttributeError, match="SaveAll"):
        _ = vembed_async_ckpt.SaveAll


@pytest.mark.parametrize("name", CONTRACT)
def test_every_public_name_says_what_it_is(name: str):
    """A docstring of its own."""
    assert inspect.getdoc(getattr(vembed_async_ckpt, name))


def test_errors_have_one_root():
    """One `except CheckpointError` catches all of them."""
    kinds = [
        n
        for n in CONTRACT
        if n.endswith("Error") or n in ("CorruptCheckpoint", "CheckpointerBusy", "CheckpointerClosed")
    ]
    assert len(kinds) == 8
    for name in kinds:
        assert issubclass(getattr(vembed_async_ckpt, name), vembed_async_ckpt.CheckpointError)


SAVE = ["step", "model", "optimizer", "scheduler", "dataloader", "scaler", "processor", "config", "extra", "metrics"]
OPTIONS = [
    *("root", "retention", "when_busy", "on_error", "staging", "writer", "max_in_flight", "max_host_bytes"),
    *("max_shard_size", "save_original_format", "sinks", "policy", "latest_link", "progress"),
    *("after_commit", "max_unshipped"),
]
SIGNATURES = {
    "AsyncCheckpointer": OPTIONS,
    "AsyncCheckpointer.save": ["self", *SAVE],
    "AsyncCheckpointer.should_save": ["self", "step"],
    "AsyncCheckpointer.should_stop": ["self", "step"],
    "AsyncCheckpointer.stop_on": ["self", "signals", "drain", "grace"],
    "AsyncCheckpointer.prewarm": ["self", "model", "optimizer"],
    "AsyncCheckpointer.wait": ["self", "timeout"],
    "AsyncCheckpointer.close": ["self", "timeout"],
    "SaveHandle.result": ["self", "timeout"],
    "SaveHandle.exception": ["self", "timeout"],
    "SaveHandle.wait_staged": ["self", "timeout"],
    "latest": ["root", "verify"],
    "load": ["path", "model", "optimizer", "scheduler", "dataloader", "scaler", "accelerator", "verify"],
    "verify": ["path"],
    "checkpoints": ["root"],
    "best": ["root", "metric", "mode"],
    "delete": ["path"],
    "save_checkpoint": [
        "path", "model", "accelerator", "processor", "config", "prefix", "step", "training_state", "checkpointer",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_the_contract(name: str):
    """Checks and callers rely on the names of the arguments and on their order."""
    found = vembed_async_ckpt
    for part in name.split("."):
        found = getattr(found, part)
    assert list(inspect.signature(found).parameters)[: len(SIGNATURES[name])] == SIGNATURES[name]


@pytest.mark.parametrize(
    "option", ["when_busy", "on_error", "staging", "writer", "retention", "max_in_flight", "max_host_bytes", "policy"]
)
def test_an_option_that_makes_no_sense_is_refused_by_name(tmp_path: Path, option: str):
    """Before the root is made or locked."""
    with pytest.raises((ValueError, TypeError), match=option):
        vembed_async_ckpt.AsyncCheckpointer(tmp_path / "root", **{option: 0})
    assert not (tmp_path / "root").exists()


SCRIPT = """
import json, sys
import vembed_async_ckpt
from vembed_async_ckpt import KeepLast, CheckpointError, CorruptCheckpoint, StallMeter, latest, verify
assert latest(sys.argv[1]) is None
try:
    verify(sys.argv[1])
except CorruptCheckpoint:
    pass
print(json.dumps(sorted(name.partition(".")[0] for name in sys.modules)))
"""


def test_looking_at_checkpoints_loads_no_torch(tmp_path: Path):
    """`latest`, `verify`, policies and errors in a fresh interpreter: neither torch nor numpy nor transformers."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    loaded = set(json.loads(result.stdout))
    assert "vembed_async_ckpt" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "accelerate", "safetensors"}
