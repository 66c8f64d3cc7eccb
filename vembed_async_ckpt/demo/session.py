"""One run of the demo: refuse or resume, train, save in the background, report."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from vembed_async_ckpt import AsyncCheckpointer, KeepLast, SaveHandle, SaveState, latest, load

from .corpus import Batches, digest, standard_library_pairs, train_tokenizer
from .display import Display, Progress, display
from .errors import Refused
from .report import DemoReport, StepTime, measure_synchronous_saves, print_report
from .training import SEED, SIZES, Trainer

_PATIENCE = 60.0  # seconds until a write that shall be interrupted must have begun


def run(
    out: Path,
    *,
    steps: int,
    save_every: int,
    size: str,
    resume: bool,
    crash_at: int | None,
    console: Console | None = None,
) -> DemoReport:
    """Train until `steps`, with `out/checkpoint-N` every `save_every` steps and at the end, and print what it cost.

    With `resume` it continues the newest checkpoint; with the same other options it ends with the weights of an
    uninterrupted run, bit for bit.
    With `crash_at` it does not return: the process kills itself while the checkpoint of that step is being written.
    Refused, before anything is touched, for options that make no sense and for an `out` that holds checkpoints which
    are not to be resumed.
    """
    _check(steps, save_every, size, crash_at)
    _refuse_unwritable(out)
    console = console or Console()
    newest = _newest(out, resume)
    if resume and newest is None:
        console.print(f"{out} holds no checkpoint to resume: starting from scratch", soft_wrap=True, highlight=False)
    start = 0 if newest is None else _step_of(newest)
    if newest is not None and start >= steps:
        console.print(f"nothing left to train: {newest.name} is at or past step {steps}", highlight=False)
        return DemoReport(out, newest, start)
    if crash_at is not None and crash_at <= start:
        raise Refused(f"cannot crash at step {crash_at}: training continues after step {start}")
    with _quiet_transformers():
        setup = _prepare(size, steps, newest, start)
        _introduce(console, setup, newest)
        report = _train(console, setup, out, save_every, crash_at)
    print_report(console, report)
    return report


@dataclass(frozen=True, slots=True)
class _Setup:
    """A training ready to continue after step `start`; `recipe` is what its checkpoints say of it."""

    trainer: Trainer
    tokenizer: Any
    batches: Batches
    recipe: dict[str, Any]
    start: int
    steps: int


def _check(steps: int, save_every: int, size: str, crash_at: int | None) -> None:
    if size not in SIZES:
        raise Refused(f"size must be one of {', '.join(SIZES)}, not {size!r}")
    if steps < 1 or save_every < 1:
        raise Refused(f"steps and save-every must be at least 1, not {steps} and {save_every}")
    if crash_at is not None and not 1 <= crash_at <= steps:
        raise Refused(f"crash-at must be a step of the training, 1 to {steps}, not {crash_at}")


def _refuse_unwritable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise Refused(f"--out {out}: cannot be written ({error.strerror or error}); choose another one") from error


def _newest(out: Path, resume: bool) -> Path | None:
    taken = any(out.glob("checkpoint-*"))
    # Also where no checkpoint is to be seen: `latest` waits for the writer of a run that was killed a moment ago.
    newest = None if taken and not resume else latest(out)
    if not resume and (taken or newest is not None):
        raise Refused(f"{out} already holds checkpoints: continue them with --resume, or choose another --out")
    return newest


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars of `save_pretrained` within the demo's own display."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _step_of(checkpoint: Path) -> int:
    step = load(checkpoint).step
    if step is None:
        raise Refused(f"{checkpoint} names no step: it was not made by this demo")
    return step


def _prepare(name: str, steps: int, newest: Path | None, start: int) -> _Setup:
    size = SIZES[name]
    pairs = standard_library_pairs()
    recipe = {"size": name, "seed": SEED, "corpus": digest(pairs), "pairs": len(pairs), "steps": steps}
    if newest is not None:
        _check_recipe(newest, recipe)
    tokenizer = train_tokenizer(pairs, size.vocabulary) if newest is None else AutoTokenizer.from_pretrained(newest)
    batches = Batches(pairs, tokenizer, batch_size=size.batch_size, length=size.length, seed=SEED)
    trainer = Trainer(size, vocabulary=len(tokenizer), padding=tokenizer.pad_token_id, steps=steps)
    if newest is not None:
        load(newest, **trainer.objects)
    return _Setup(trainer, tokenizer, batches, recipe, start, steps)


def _check_recipe(checkpoint: Path, recipe: dict[str, Any]) -> None:
    """Refused unless `checkpoint` comes from this demo with the same model and data."""
    saved = load(checkpoint).config or {}
    for name in ("size", "seed", "corpus"):
        if saved.get(name) != recipe[name]:
            raise Refused(f"{checkpoint} was made with {name} {saved.get(name)!r}, this run has {recipe[name]!r}")


def _introduce(console: Console, setup: _Setup, newest: Path | None) -> None:
    parameters = setup.trainer.parameter_count()
    console.print(
        f"{setup.recipe['pairs']:,} pairs of signature and docstring from the standard library of Python "
        f"{platform.python_version()}; BERT with {parameters / 1e6:.1f} M parameters, "
        f"about {decimal(12 * parameters)} with AdamW, on {setup.trainer.accelerator.device}",
        soft_wrap=True,
        highlight=False,
    )
    if newest is not None:
        console.print(f"resuming {newest} after step {setup.start}", soft_wrap=True, highlight=False)


def _train(console: Console, setup: _Setup, out: Path, save_every: int, crash_at: int | None) -> DemoReport:
    trainer = setup.trainer
    progress = Progress(setup.start, setup.steps)
    times: list[StepTime] = []
    with AsyncCheckpointer(out, retention=KeepLast(3)) as checkpointer:
        checkpointer.prewarm(model=trainer.model, optimizer=trainer.optimizer)
        with contextlib.closing(display(console, progress)) as shown:
            for step in range(setup.start + 1, setup.steps + 1):
                times.append(_step(setup, progress, step))
                if step == crash_at:
                    _crash(console, shown, checkpointer, setup, progress)
                if step % save_every == 0 or step == setup.steps:
                    progress.saves.append(_save(checkpointer, setup, progress))
                shown.update()
            saves = tuple(handle.result() for handle in progress.saves)
    synchronous = measure_synchronous_saves(trainer, setup.tokenizer, out)
    return DemoReport(out, saves[-1].path, setup.steps, saves, tuple(times), synchronous)


def _step(setup: _Setup, progress: Progress, step: int) -> StepTime:
    beside_save = bool(progress.saves) and not progress.saves[-1].done()
    began = time.perf_counter()
    progress.loss = setup.trainer.step(*setup.batches[step - 1])
    progress.step = step
    return StepTime(time.perf_counter() - began, beside_save)


def _save(checkpointer: AsyncCheckpointer, setup: _Setup, progress: Progress) -> SaveHandle:
    return checkpointer.save(
        progress.step,
        **setup.trainer.objects,
        processor=setup.tokenizer,
        config=setup.recipe,
        metrics={"loss": progress.loss},
    )


def _crash(
    console: Console, shown: Display, checkpointer: AsyncCheckpointer, setup: _Setup, progress: Progress
) -> None:
    """Save and die by SIGKILL while that save is being written. RuntimeError if the write could not be caught."""
    shown.close()  # it hides the cursor, which a killed process cannot bring back
    console.print(
        f"step {progress.step}: this process kills itself (SIGKILL) while checkpoint-{progress.step} is being written; "
        "continue with the same command and --resume instead of --crash-at",
        soft_wrap=True,
        highlight=False,
    )
    handle = _save(checkpointer, setup, progress)
    deadline = time.monotonic() + _PATIENCE
    while not handle.done() and time.monotonic() < deadline:
        written, total = handle.progress
        if handle.state is SaveState.WRITING or 0 < written < total:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.0002)
    raise RuntimeError(f"{handle!r} was not caught while being written")
