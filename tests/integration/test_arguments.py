"""Arguments as people have them: made what is meant, or refused by what they are."""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
import warnings
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


@pytest.mark.parametrize("given", [{}, {"model": {}}, {"extra": {}, "optimizer": {}}])
def test_nothing_to_save_is_refused(root: Path, given: dict[str, Any]) -> None:
    """`save(9)` forgot the model; so did a mapping that nobody filled."""
    said = pytest.raises(PlanError, match="step 9: nothing was given to save")
    with AsyncCheckpointer(root, writer="thread") as checkpointer, said:
        checkpointer.save(9, **given)
    assert list(root.iterdir()) == []


def wrong_kinds() -> dict[str, tuple[dict[str, Any], str]]:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler("cpu")
    return {
        "state_dict as model": ({"model": model.state_dict()}, "model: a state_dict is given; pass the object itself"),
        "named state_dict": ({"model": {"a": model.state_dict()}}, "model: a state_dict is given"),
        "optimizer's": ({"model": model, "optimizer": optimizer.state_dict()}, "optimizer: a state_dict is given"),
        "scheduler's": ({"model": model, "scheduler": scheduler.state_dict()}, "scheduler: a state_dict is given"),
        "optimizer as model": ({"model": optimizer}, "model: got the optimizer torch.optim.adamw.AdamW; pass it as optimizer="),
        "model as optimizer": ({"optimizer": model}, "optimizer: got the model torch.nn.modules.linear.Linear"),
        "among others": ({"optimizer": {"a": optimizer, "b": model}}, "optimizer: got the model"),
        "scheduler as optimizer": ({"optimizer": scheduler}, "optimizer: got the scheduler"),
        "optimizer as scheduler": ({"scheduler": optimizer}, "scheduler: got the optimizer"),
        "model as scheduler": ({"scheduler": model}, "scheduler: got the model"),
        "scaler as scheduler": ({"scheduler": scaler}, "scheduler: got the scaler"),
        "optimizer as scaler": ({"scaler": optimizer}, "scaler: got the optimizer"),
        "optimizer as dataloader": ({"dataloader": optimizer}, "dataloader: got the optimizer"),
        "a list": ({"model": [model, model]}, "model: a list is given; use a mapping of names to objects"),
        "no module": ({"model": 3}, "model: a builtins.int is not a torch.nn.Module"),
        "a generator": ({"optimizer": model.parameters()}, "optimizer: a builtins.generator has no state_dict()"),
    }  # fmt: skip


@pytest.mark.parametrize("what", wrong_kinds())
def test_objects_under_the_wrong_name_are_refused(root: Path, what: str) -> None:
    """By what they are, with the name that is theirs, before anything is written."""
    given, said = wrong_kinds()[what]
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        with pytest.raises(PlanError) as refused:
            checkpointer.save(1, **given)
        assert str(refused.value).startswith(said)
    assert list(root.iterdir()) == []


def net(width: int) -> torch.nn.Linear:
    return torch.nn.Linear(width, width)


def adam(*models: torch.nn.Module, dtype: torch.dtype | None = None) -> torch.optim.Optimizer:
    """One that steps these models, or copies of their weights in a `dtype`."""
    parameters = [parameter for model in models for parameter in model.parameters()]
    if dtype is not None:
        parameters = [torch.nn.Parameter(parameter.detach().to(dtype)) for parameter in parameters]
    return torch.optim.AdamW(parameters)


def test_an_optimizer_of_another_model_is_refused(root: Path) -> None:
    """Nothing that it trains would be in the checkpoint. What was mended is saved."""
    one, other = net(2), net(3)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        checkpointer.prewarm(model=one, optimizer=adam(other))
        for optimizer in (adam(other), {"a": adam(other), "b": adam(net(2))}):
            for _ in range(2):
                with pytest.raises(PlanError, match=r"optimizer.*: its parameters belong to another model"):
                    checkpointer.save(1, model=one, optimizer=optimizer)
        assert list(root.glob("checkpoint-*")) == []
        checkpointer.save(1, model=other, optimizer=adam(other)).result(60)


def test_optimizers_whose_parameters_are_elsewhere_on_purpose(root: Path) -> None:
    """Saved, with one warning: nobody but the user knows."""
    model, other = net(2), net(3)
    flat = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(sum(p.numel() for p in model.parameters())))])
    latent = torch.nn.Parameter(torch.zeros(7, 7))
    cases: dict[str, dict[str, Any]] = {
        "an average of the weights": {"model": net(2), "optimizer": adam(model)},
        "master copies": {"model": net(2).bfloat16(), "optimizer": adam(net(2), dtype=torch.float32)},
        "master copies laid flat": {"model": model, "optimizer": flat},
        "no discriminator": {"model": model, "optimizer": {"g": adam(model), "d": adam(other)}},
        "in extra": {"model": model, "optimizer": torch.optim.AdamW([latent]), "extra": {"latent": latent}},
    }
    for what, given in cases.items():
        with AsyncCheckpointer(root, writer="thread") as checkpointer, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                checkpointer.save(1, **given).result(60)
        assert len([w for w in said if "none of its parameters belongs" in str(w.message)]) == 1, what


def test_optimizers_that_belong_to_the_models(root: Path) -> None:
    """Nothing is said where a part of them does, whatever is around it, frozen or shared."""
    model, other = torch.nn.Sequential(net(2), net(3)), net(3)
    model[0].requires_grad_(False)
    cases: list[dict[str, Any]] = [
        {"model": model, "optimizer": adam(model[1])},
        {"model": model[0], "optimizer": adam(model)},
        {"model": torch.compile(model), "optimizer": adam(model)},
        {"model": torch.nn.DataParallel(model), "optimizer": adam(model)},
        {"model": {"a": model, "b": other}, "optimizer": {"x": adam(other), "y": adam(model)}},
        {"optimizer": adam(model)},
    ]
    with AsyncCheckpointer(root, writer="thread") as checkpointer, warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in cases:
            checkpointer.save(1, **given).result(60)


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
        *(("root", value, "a URL; use the path of a directory on this machine") for value in ("s3://b/run", "file:///run")),
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
