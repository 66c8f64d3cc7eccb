"""Arguments as people have them: made what is meant, or refused by what they are."""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer, PlanError


@pytest.mark.parametrize("step", [5, np.int64(5), np.int32(5), torch.tensor(5), np.array(5)], ids=repr)
def test_integers_of_every_kind_are_steps(root: Path, step: Any) -> None:
    """The directory and the record have the number."""
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        info = checkpointer.save(step, model=torch.nn.Linear(2, 2)).result(60)
    assert (info.path.name, info.step, type(info.step)) == ("checkpoint-5", 5, int)


def test_what_is_no_step_is_refused(root: Path) -> None:
    """Before anything is written."""
    wrong = [
        True,
        np.True_,
        torch.tensor(True),
        torch.tensor([5]),
        5.0,
        np.float64(5),
        "5",
        None,
        -1,
        torch.tensor(5.0),
    ]
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        for step in wrong:
            with pytest.raises(PlanError, match="use a whole number of at least 0"):
                checkpointer.save(step, model=torch.nn.Linear(2, 2))
    assert list(root.iterdir()) == []


def test_nothing_to_save_is_refused(root: Path) -> None:
    """`save(9)` forgot the model."""
    said = pytest.raises(PlanError, match="step 9: nothing was given to save")
    with AsyncCheckpointer(root, writer="thread") as checkpointer, said:
        checkpointer.save(9)
    assert list(root.iterdir()) == []


@dataclasses.dataclass
class Config:
    lr: float = 0.1


@pytest.mark.parametrize("config", [argparse.Namespace(lr=0.1), types.SimpleNamespace(lr=0.1), Config(), {"lr": 0.1}])
def test_configs(root: Path, config: Any) -> None:
    """Namespaces and dataclasses are kept as the mapping that they are."""
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, model=torch.nn.Linear(2, 2), config=config).result(60).path
    assert json.loads((path / "vembed_config.json").read_text()) == {"lr": 0.1}


def test_sizes(root: Path) -> None:
    """A size may be a text; what is none is refused by the constructor, which names the option."""
    with AsyncCheckpointer(root, writer="thread", max_host_bytes="1GB") as checkpointer:  # type: ignore[arg-type]
        assert checkpointer._options.max_host_bytes == 10**9
    for option in ("max_host_bytes", "max_shard_size"):
        for value in ("many", 1.5, True, [], ""):
            with pytest.raises(ValueError, match=f"{option} is "):
                AsyncCheckpointer(root, **{option: value})


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        *((name, value, "use one of '") for name in ("when_busy", "on_error", "staging", "writer") for value in ("no", 1, [])),
        *(("sinks", value, "use a list of functions") for value in (print, None, 3, [print, "events.jsonl"], "events")),
        *(("retention", value, "use KeepLast") for value in (3, "KeepLast(3)")),
        *(("policy", value, "vembed_async_ckpt.policies") for value in (500, "every")),
        *((name, "yes", "use True or False") for name in ("save_original_format", "latest_link", "progress")),
        *(("max_in_flight", value, "use a whole number from 1 to 16") for value in (0, 17, True, "2", 1.0)),
        *(("max_shard_size", value, "use at least one byte") for value in (0, -1, "0GB")),
        *(("max_host_bytes", value, "at least 16777216 are needed") for value in (0, -1, "1MB")),
        *(("root", value, "use the path of a directory") for value in (None, 5, "", b"", "a\0b", ["runs"])),
    ],
)  # fmt: skip
def test_wrong_options(tmp_path: Path, option: str, value: Any, said: str) -> None:
    """Refused by the constructor before it makes anything, with the option, its value and what it may be."""
    options = {"root": tmp_path / "root", option: value}
    with pytest.raises((TypeError, ValueError)) as refused:
        AsyncCheckpointer(**options)  # type: ignore[arg-type]
    message = str(refused.value)
    assert message.startswith(f"{option} is ")
    assert repr(value) in message
    assert said in message
    assert list(tmp_path.iterdir()) == []


def test_roots_of_every_kind_of_path(root: Path) -> None:
    """Bytes are a path too."""
    for path in (root, str(root), bytes(root)):
        with AsyncCheckpointer(path, writer="thread") as checkpointer:  # type: ignore[arg-type]
            assert checkpointer.root == root


def test_a_shard_size_as_people_write_it(root: Path) -> None:
    """Saved by it, though transformers itself does not know the spelling."""
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    with AsyncCheckpointer(root, writer="thread", max_shard_size="8 kib") as checkpointer:
        path = checkpointer.save(1, model=BertModel(config)).result(60).path
    assert len(list(path.glob("model-*.safetensors"))) > 1


def test_a_message_says_the_path_once(root: Path) -> None:
    """A file has the name of the checkpoint."""
    with AsyncCheckpointer(root, writer="thread", on_error="warn") as checkpointer:
        (root / "checkpoint-1").write_text("mine")
        error = str(checkpointer.save(1, model=torch.nn.Linear(2, 2)).exception(60))
    assert error.count(str(root / "checkpoint-1")) == 1
    assert "Error" not in error
