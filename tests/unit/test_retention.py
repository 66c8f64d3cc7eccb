"""What retention and `prune` delete, and that they delete nothing that they cannot judge."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from vembed_async_ckpt import AsyncCheckpointer, KeepBest, KeepEvery, KeepLast
from vembed_async_ckpt._format.manifest import Manifest
from vembed_async_ckpt.cli import app
from vembed_async_ckpt.retention import Policy, from_spec

NAN, INF = math.nan, math.inf
runner = CliRunner()


def kept(policy: Policy, values: Sequence[float | None]) -> list[int]:
    """The steps that `policy` keeps of checkpoints 1, 2, ... with these values of the metric `loss`, if any."""
    manifests = [
        Manifest(f"{step:032x}", step, step, metrics={} if value is None else {"loss": value})
        for step, value in enumerate(values, 1)
    ]
    ids = from_spec(policy.spec()).keep(manifests[::-1])
    return [manifest.step for manifest in manifests if manifest.save_id in ids]


@pytest.mark.parametrize(
    ("policy", "values", "expected"),
    [
        (KeepBest("loss"), [0.5, 0.2, 0.9], [2]),
        (KeepBest("loss", mode="max", n=2), [0.5, 0.2, 0.9], [1, 3]),
        (KeepBest("loss"), [0.5, None, 0.2, NAN, 0.9], [2, 3, 4]),
        (KeepBest("loss", unrated="drop"), [0.5, None, 0.2, NAN, 0.9], [3]),
        (KeepBest("loss", mode="max", unrated="drop"), [0.5, NAN, 0.2], [1]),
        (KeepBest("loss"), [None, NAN, None], [1, 2, 3]),
        (KeepBest("loss", unrated="drop"), [None, NAN, None], [1, 2, 3]),
        (KeepBest("acc", unrated="drop"), [0.1, 0.2], [1, 2]),
        (KeepBest("loss"), [0.2, 0.2, 0.2], [3]),
        (KeepBest("loss", mode="max"), [0.2, 0.2, 0.1], [2]),
        (KeepBest("loss"), [INF, 0.5, -INF], [3]),
        (KeepBest("loss", mode="max"), [INF, 0.5, -INF], [1]),
        (KeepLast(1) | KeepBest("loss"), [0.5, None, 0.2, 0.9], [2, 3, 4]),
        (KeepLast(1) | KeepBest("loss", unrated="drop"), [0.5, None, 0.2, 0.9], [3, 4]),
        (KeepLast(2) | KeepEvery(3), [None] * 7, [3, 6, 7]),
        (KeepLast(np.int64(2)), [None] * 3, [2, 3]),
        (KeepEvery(torch.tensor(2)), [None] * 4, [2, 4]),
    ],
)
def test_what_a_policy_keeps(policy: Policy, values: Sequence[float | None], expected: list[int]) -> None:
    """Also after its way to the writer. What has no value of the metric stays unless asked otherwise; of equals the newest."""
    assert kept(policy, values) == expected


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: KeepLast(0), "KeepLast: n is 0; use a whole number of at least 1"),
        (lambda: KeepLast(True), "KeepLast: n is True"),
        (lambda: KeepLast(2.0), "KeepLast: n is 2.0"),
        (lambda: KeepLast("3"), "KeepLast: n is '3'"),
        (lambda: KeepEvery(0), "KeepEvery: steps is 0"),
        (lambda: KeepEvery(-5), "KeepEvery: steps is -5"),
        (lambda: KeepBest("loss", n=0), "KeepBest: n is 0"),
        (lambda: KeepBest("loss", n=math.inf), "KeepBest: n is inf"),
        (lambda: KeepBest("loss", mode="Max"), "KeepBest: mode is 'Max'; use 'min' or 'max'"),
        (lambda: KeepBest("loss", mode="median"), "KeepBest: mode is 'median'"),
        (lambda: KeepBest("loss", mode=["min"]), r"KeepBest: mode is \['min'\]"),
        (lambda: KeepBest("loss", unrated="ignore"), "KeepBest: unrated is 'ignore'; use 'keep' or 'drop'"),
        (lambda: KeepBest(""), "KeepBest: metric is ''; use the name of a metric"),
        (lambda: KeepBest(None), "KeepBest: metric is None"),
    ],
)
def test_a_policy_that_makes_no_sense(make: Any, said: str) -> None:
    """Refused where it is made, by what is wrong with it."""
    with pytest.raises(ValueError, match=said):
        make()


def test_a_policy_is_combined_with_policies_only() -> None:
    """`KeepLast(3) | 2` is an error at once."""
    with pytest.raises(TypeError, match="unsupported operand"):
        KeepLast(3) | 2  # type: ignore[operator]


def save(root: Path, metrics: dict[int, dict[str, float]], **options: Any) -> list[int]:
    """Save a model at each step with its metrics; returns the steps that are there at the end."""
    model = torch.nn.Linear(2, 2)
    with AsyncCheckpointer(root, writer="thread", **options) as checkpointer:
        for step, values in metrics.items():
            checkpointer.save(step, model=model, metrics=values).result(60)
    return steps(root)


def steps(root: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in root.glob("checkpoint-*"))


def test_a_metric_that_no_checkpoint_has_deletes_nothing(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A misspelt metric keeps all, and one warning says which metrics there are."""
    with caplog.at_level(logging.WARNING, "vembed_async_ckpt"):
        found = save(root, {n: {"loss": 1 / n} for n in (1, 2, 3, 4)}, retention=KeepBest("acc", unrated="drop"))
    assert found == [1, 2, 3, 4]
    assert caplog.text.count("no checkpoint has the metric 'acc'; they have 'loss'") == 1


def test_unrated_checkpoints_between_rated_ones_stay(root: Path) -> None:
    """Saves without an evaluation are not judged by it."""
    metrics: dict[int, dict[str, float]] = {1: {"loss": 0.5}, 2: {}, 3: {"loss": 0.3}, 4: {}, 5: {"loss": 0.9}, 6: {}}
    assert save(root, metrics, retention=KeepBest("loss")) == [2, 3, 4, 6]


def test_a_checkpoint_that_is_not_whole_is_not_counted(root: Path) -> None:
    """Neither do the last two count it when they are kept, nor is it deleted: the whole ones before it stay."""
    save(root, {1: {}, 2: {}, 3: {}})
    broken = root / "checkpoint-3" / "model.safetensors"
    content = broken.read_bytes()
    broken.write_bytes(content[:-1])
    dry = runner.invoke(app, ["prune", str(root), "--keep-last", "2", "--dry-run"])
    assert (dry.exit_code, dry.output) == (0, "")
    assert save(root, {4: {}}, retention=KeepLast(2)) == [2, 3, 4]
    broken.write_bytes(content)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("acc", "no checkpoint has the metric 'acc'; they have 'loss'. Nothing was deleted"),
        ("max:acc", "no checkpoint has the metric 'acc'"),
        ("Max:loss", "'Max:loss'; write NAME, min:NAME or max:NAME"),
        ("loss:max", "'loss:max'; write"),
        ("median:loss", "'median:loss'; write"),
        ("max:", "'max:'; write"),
        (":loss", "':loss'; write"),
        ("", "''; write"),
    ],
)
@pytest.mark.parametrize("further", [[], ["--dry-run"]])
def test_prune_refuses_what_it_does_not_understand(root: Path, given: str, said: str, further: list[str]) -> None:
    """Before anything is deleted, with the right form or the metrics that there are."""
    save(root, {n: {"loss": 1 / n} for n in (1, 2, 3)})
    done = runner.invoke(app, ["prune", str(root), "--keep-best", given, *further], env={"COLUMNS": "500"})
    assert done.exit_code == 2
    assert said in done.output
    assert steps(root) == [1, 2, 3]


def test_prune_keeps_the_unrated_unless_told_otherwise(root: Path) -> None:
    """`--unrated drop` takes them, but never the newest."""
    save(root, {1: {"loss": 0.1}, 2: {}, 3: {"loss": 0.3}, 4: {}})
    assert runner.invoke(app, ["prune", str(root), "--keep-best", "loss"]).output == "deleted checkpoint-3\n"
    assert runner.invoke(app, ["prune", str(root), "--keep-best", "loss", "--unrated", "maybe"]).exit_code == 2
    done = runner.invoke(app, ["prune", str(root), "--keep-best", "max:loss", "--unrated", "drop"])
    assert done.output == "deleted checkpoint-2\n"
    assert steps(root) == [1, 4]


def test_prune_accepts_a_metric_with_a_colon(root: Path) -> None:
    """Its mode must be written then."""
    save(root, {1: {"eval:loss": 0.1}, 2: {"eval:loss": 0.2}, 3: {"eval:loss": 0.3}})
    assert runner.invoke(app, ["prune", str(root), "--keep-best", "eval:loss"]).exit_code == 2
    assert runner.invoke(app, ["prune", str(root), "--keep-best", "min:eval:loss"]).exit_code == 0
    assert steps(root) == [1, 3]
