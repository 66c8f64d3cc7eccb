"""The commands that train. They load torch and transformers only when they run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .. import demo as demos


def demo(
    out: Annotated[Path, typer.Option(help="Root of the checkpoints: OUT/checkpoint-N.")] = Path("vembed-ckpt-demo"),
    steps: Annotated[int, typer.Option(min=1, help="Train until this step.")] = demos.DEFAULT_STEPS,
    save_every: Annotated[int, typer.Option(min=1, help="Save in the background every so many steps.")] = (
        demos.DEFAULT_SAVE_EVERY
    ),
    size: Annotated[str, typer.Option(help=f"{', '.join(demos.SIZE_NAMES)}; base has a state above 1 GB.")] = (
        demos.DEFAULT_SIZE
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest complete checkpoint in OUT.")] = False,
    crash_at: Annotated[
        int | None,
        typer.Option(min=1, help="Kill this process with SIGKILL while the checkpoint of that step is written."),
    ] = None,
) -> None:
    """Train a text embedder on the standard library's docstrings, save it in the background, show what that cost."""
    try:
        demos.run(out, steps=steps, save_every=save_every, size=size, resume=resume, crash_at=crash_at)
    except demos.Refused as error:
        print(f"vembed-ckpt demo: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
