"""Trainings in children of a nursery: one saves, trains on and is killed; others go on from what it saved."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from typing import TYPE_CHECKING, Any

import anyio._backends._asyncio  # noqa: F401  (so that no child has to)
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from trainings import Retriever, Training

import vembed_async_ckpt.checkpointer  # noqa: F401
from vembed_async_ckpt import SaveState
from vembed_async_ckpt.integrations.accelerate import save_state
from vembed_async_ckpt.integrations.shared import open_at

if TYPE_CHECKING:
    from ...crash.nursery import Talk


def save_and_die(
    talk: Talk,
    paths: dict[str, str],
    at: int,
    set_epoch: bool = True,
    between: bool = False,
    drop: bool = False,
    **options: Any,
) -> None:
    """Save after `at` micro-batches, by each of the ways that `paths` names, say so once all are staged, train to the end, tell
    the digest, and die without a farewell.

    `drop`: forget the gradients accumulated so far after the save, which no checkpoint holds."""
    training = Training(1, **options)
    for done in training.steps(set_epoch=set_epoch, between=between):
        if done == at:
            for kind, path in paths.items():
                training.save(kind, path).wait_staged(60)
            talk.say("STAGED")
            if drop:
                training.optimizer.optimizer.zero_grad()
    talk.say(f"DIGEST {training.digest()}, gradients applied after {[n for n in training.synced if n >= at]}")
    os.kill(os.getpid(), signal.SIGKILL)


def train(talk: Talk, at: int, set_epoch: bool = True, **options: Any) -> None:
    """Train from beginning to end."""
    training = Training(1, **options)
    digest = training.finish(set_epoch=set_epoch)
    talk.say(f"DIGEST {digest}, gradients applied after {[n for n in training.synced if n >= at]}")
    os._exit(0)


def go_on(talk: Talk, readings: list[list[str]], at: int, set_epoch: bool = True, **options: Any) -> None:
    """For each (reader, path): everything made anew, from another seed, and trained on from what was saved."""
    for reader, path in readings:
        training = Training(99, **options)
        training.resume(reader, path, at)
        talk.say(f"NOTE {training.note}")
        digest = training.finish(set_epoch=set_epoch)
        talk.say(f"DIGEST {digest}, gradients applied after {training.synced}")
    os._exit(0)  # a farewell takes the interpreter seconds


def _wide(project: str, iteration: int = 0) -> Accelerator:
    """A prepared model of 32 MiB whose checkpoints have automatic names."""
    configuration = ProjectConfiguration(project, automatic_checkpoint_naming=True, iteration=iteration)
    accelerator = Accelerator(cpu=True, project_config=configuration)
    accelerator.prepare(torch.nn.Linear(1 << 10, 1 << 13, bias=False))
    torch.nn.init.constant_(accelerator._models[0].weight, iteration)
    return accelerator


def die_while_saving(talk: Talk, project: str) -> None:
    """Save once; die together with the writer while it writes the second checkpoint."""
    accelerator = _wide(project)
    save_state(accelerator).result(60)
    checkpointer = open_at(os.path.realpath(os.path.join(project, "checkpoints")))
    assert checkpointer is not None
    writer = checkpointer.statistics()["writer_pid"]
    handle = save_state(accelerator)
    while handle.state in (SaveState.STAGING, SaveState.STAGED):
        time.sleep(0)
    os.kill(writer, signal.SIGKILL)
    talk.say(f"STATE {handle.state.name}")
    os.kill(os.getpid(), signal.SIGKILL)


def restart(talk: Talk, project: str) -> None:
    """Load the newest, and save under the next number."""
    accelerator = _wide(project, iteration=1)
    accelerator.load_state()
    talk.say(f"LOADED {int(accelerator._models[0].weight.unique())}")
    talk.say(f"SAVED {save_state(accelerator).result(60).path.name}")
    accelerator.end_training()
    os._exit(0)


def _warm_up() -> None:
    """What is computed once per process and kept, so that no child has to. No thread may come of it."""
    transformers.utils.logging.disable_progress_bar()  # tqdm starts one
    with tempfile.TemporaryDirectory() as directory:
        for lora in (False, True):
            model = Retriever(lora)
            model(torch.ones(1, 5, dtype=torch.int64)).backward()
            model.save_pretrained(directory)


_warm_up()
