"""Trainer and Lightning stop for a signal, and save by policy: after the step, resumable, with the right exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

import vembed_async_ckpt
from vembed_async_ckpt import PlanError, latest
from vembed_async_ckpt._engine import stop as stops
from vembed_async_ckpt.integrations.lightning import VembedCheckpointIO, read_checkpoint
from vembed_async_ckpt.integrations.lightning_callback import VembedCheckpoint
from vembed_async_ckpt.integrations.transformers import AsyncCheckpointMixin
from vembed_async_ckpt.policies import every, on_best, on_request

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
]
PACKAGE = str(Path(vembed_async_ckpt.__file__).parents[1])
SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """After a stop the handlers stay until the process ends: here they are set back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for left in list(reversed(stops._INSTALLED)):
        left._remove()
    for number, handler in before.items():
        signal.signal(number, handler)


class Ones(Dataset):  # type: ignore[type-arg]
    """`at`: the index at which the fetch raises the signal."""

    def __init__(self, at: int = -1, signum: int = signal.SIGTERM) -> None:
        self.at, self.signum = at, signum

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        if index == self.at:
            signal.raise_signal(self.signum)
        return {"x": torch.ones(4), "labels": torch.ones(1)}


# -- Trainer


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x: Any, labels: Any) -> dict[str, Any]:
        return {"loss": (self.layer(torch.nn.functional.dropout(x, 0.5)) - labels).square().mean()}


class Stopping(AsyncCheckpointMixin, Trainer):
    async_checkpoint_options = {"writer": "thread"}  # noqa: RUF012
    async_checkpoint_stop_on = (signal.SIGTERM,)


def arguments(root: Path, **given: Any) -> TrainingArguments:
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    usual = {"per_device_train_batch_size": 2, "learning_rate": 0.01, "save_strategy": "no", "max_steps": 12}
    return TrainingArguments(str(root), **{**quiet, **usual, **given})


class At(Dataset):  # type: ignore[type-arg]
    """Raises the signal when a number of items was fetched, whatever their order."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGTERM)
        return {"x": torch.full((4,), float(index)), "labels": torch.ones(1)}


def test_trainer_stops_after_its_step(root: Path) -> None:
    """It saves, though no save was due, evaluates no more, and the next training goes on bit for bit."""
    whole = Stopping(model=Linear(), args=arguments(root / "whole"), train_dataset=At(0))
    whole.train()
    assert whole.async_checkpoint_exit_code == 0
    stopped = Stopping(
        model=Linear(),
        args=arguments(root, eval_strategy="epoch", load_best_model_at_end=False),
        train_dataset=At(9),
        eval_dataset=At(0),
    )
    evaluated: list[int] = []
    stopped.evaluate = lambda *a, **k: evaluated.append(1) or {}  # type: ignore[method-assign,func-returns-value]
    stopped.train()
    assert stopped.async_checkpoint_exit_code == 143
    assert evaluated == []
    found = latest(root)
    assert found is not None
    assert found.name == f"checkpoint-{stopped.state.global_step}"
    assert 4 <= stopped.state.global_step <= 6  # Trainer fetches a batch ahead
    for left in list(reversed(stops._INSTALLED)):
        left._remove()
    resumed = Stopping(model=Linear(), args=arguments(root), train_dataset=At(0))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))
    for path in (root / "whole").glob("*"):
        raise AssertionError(f"nothing was to be saved: {path}")
    (root / "whole").rmdir()


def test_trainer_refuses_two_answers_to_a_signal(root: Path) -> None:
    """By the name of the other, before its handler is set."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="enable_jit_checkpoint and async_checkpoint_stop_on both answer a signal"):
        Stopping(model=Linear(), args=arguments(root, enable_jit_checkpoint=True), train_dataset=At(0))
    assert signal.getsignal(signal.SIGTERM) == before


# -- Lightning


class Net(LightningModule):
    def __init__(self, at: int = -1) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.at = at

    def training_step(self, batch: Any, index: int) -> Any:
        if self.trainer.global_step == self.at:
            signal.raise_signal(signal.SIGTERM)
        return self.layer(batch["x"]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def lightning(root: Path, *callbacks: Any, **further: Any) -> LightningTrainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    usual = {"max_steps": 12, "enable_checkpointing": False, "default_root_dir": root}
    return LightningTrainer(
        **{**quiet, **usual, **further}, callbacks=list(callbacks), plugins=[VembedCheckpointIO(writer="thread")]
    )


def loader() -> Any:
    return DataLoader(Ones(), batch_size=2)


def test_lightning_stops_after_its_step(root: Path) -> None:
    """`fit` ends as Lightning ends for a SIGTERM, with the exit code; its own handlers are set back, and it resumes."""
    before = signal.getsignal(signal.SIGTERM)
    callback = VembedCheckpoint(root, stop_on=[signal.SIGTERM])
    assert callback.newest() is None
    with pytest.raises(SystemExit) as ended:
        lightning(root, callback).fit(Net(at=4), loader())
    assert ended.value.code == 143
    assert callback.newest() == str(root / "step=5.ckpt")
    assert read_checkpoint(root / "step=5.ckpt")["global_step"] == 5
    for left in list(reversed(stops._INSTALLED)):
        left._remove()
    signal.signal(signal.SIGTERM, before)
    trainer = lightning(root, callback)
    trainer.fit(Net(), loader(), ckpt_path=callback.newest())
    assert trainer.global_step == 12
    assert callback.exit_code == 0
    assert signal.getsignal(signal.SIGTERM) == before


def test_lightning_keeps_its_requeueing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our handlers come after its own: on Slurm both answer the signal."""
    from lightning.fabric.plugins.environments import SLURMEnvironment
    from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

    requeued: list[int] = []
    monkeypatch.setattr(_SignalConnector, "_slurm_sigusr_handler_fn", lambda self, number, _: requeued.append(number))

    class Requeued(Net):
        def training_step(self, batch: Any, index: int) -> Any:
            if self.trainer.global_step == 2:
                signal.raise_signal(signal.SIGUSR1)
            return super().training_step(batch, index)

    class Slurm(SLURMEnvironment):
        def world_size(self) -> int:
            return 1

        def global_rank(self) -> int:
            return 0

        def local_rank(self) -> int:
            return 0

        def node_rank(self) -> int:
            return 0

        def validate_settings(self, *arguments: Any) -> None:
            pass

    callback = VembedCheckpoint(root, stop_on=[signal.SIGUSR1])
    trainer = lightning(root, callback)
    trainer._accelerator_connector.cluster_environment = Slurm(requeue_signal=signal.SIGUSR1)
    with pytest.raises(SystemExit) as ended:
        trainer.fit(Requeued(), loader())
    assert ended.value.code == 138
    assert requeued == [signal.SIGUSR1]
    assert callback.newest() == str(root / "step=3.ckpt")


def test_lightning_saves_by_policy(root: Path) -> None:
    """In the background, and only where an optimizer stepped."""
    callback = VembedCheckpoint(root, policy=every(steps=2) | on_request(None))
    (root).mkdir()
    (root / "save-now").touch()
    lightning(root, callback, accumulate_grad_batches=2, max_steps=8).fit(Net(), loader())
    found = {int(path.name[5:-5]) for path in root.glob("step=*.ckpt")}
    assert found >= {2, 4, 6, 8}
    assert callback.newest() == str(root / "step=8.ckpt")


def test_what_lightning_cannot_do_is_refused(root: Path) -> None:
    """By name, when it is made or when the training begins."""
    with pytest.raises(ValueError, match="neither policy= nor stop_on="):
        VembedCheckpoint(root)
    with pytest.raises(ValueError, match=r"the best is saved by ModelCheckpoint\(monitor=...\)"):
        VembedCheckpoint(root, policy=on_best("loss"))
    with pytest.raises(TypeError, match="policy is 5"):
        VembedCheckpoint(root, policy=5)  # type: ignore[arg-type]
    trainer = LightningTrainer(
        max_steps=2, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        enable_checkpointing=False, callbacks=[VembedCheckpoint(root, policy=every(steps=1))],
    )  # fmt: skip
    with pytest.raises(PlanError, match="needs the plugin"):
        trainer.fit(Net(), loader())


# -- processes, which a signal hits with the workers of their DataLoader


def run(framework: str, root: Path, seed: int, whom: str, rounds: int) -> list[dict[str, Any]]:
    """Trainings by a framework, each stopped at a random moment; what each reports, oldest first."""
    result = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            str(SCRIPTS / "stopped.py"),
            framework,
            str(root),
            str(seed),
            whom,
            str(rounds),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"resumed"')]


def check(rounds: list[dict[str, Any]]) -> None:
    begun = 0
    for each in rounds:
        assert each["code"] == 143, each
        assert each["resumed"] == begun, each
        assert each["saved"] == each["stopped"], each
        begun = each["saved"]
    assert begun > 0


@pytest.mark.parametrize("framework", ["trainer", "lightning"])
def test_random_signals_to_the_group(root: Path, framework: str) -> None:
    """They kill the DataLoader's workers too: no step is lost, and each training resumes where the last one stopped."""
    check(run(framework, root, 1, "group", 3))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("framework", ["trainer", "lightning"])
@pytest.mark.parametrize("whom", ["group", "main"])
def test_thirty_random_signals(root: Path, framework: str, whom: str) -> None:
    check(run(framework, root, 2, whom, 30))
