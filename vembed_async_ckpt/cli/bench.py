"""`vembed-ckpt bench`: torch is loaded by the processes that measure, not by this one until it has checked its options."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..bench.catalog import ENGINES
from ..bench.options import DEFAULT_ENGINES, DEFAULT_MEASURES, MEASURES, Options, Refused, names, parse_size


def bench(
    measures: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MEASURE]...",
            help=f"{', '.join(MEASURES)}, or all; default: {' and '.join(DEFAULT_MEASURES)}.",
            show_default=False,
        ),
    ] = None,
    engines: Annotated[
        list[str] | None,
        typer.Option(help=f"Comma-separated, or all; default: {','.join(DEFAULT_ENGINES)}.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Measure with your model: a config.json, a directory or a hub id that transformers reads."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1; default: cuda if there is one.", show_default=False)
    ] = None,
    directory: Annotated[
        Path, typer.Option("--dir", help="Disk to write to; a folder of its own is made there, and removed.")
    ] = Path("."),
    out: Annotated[Path, typer.Option(help="Folder for the result: JSON, and PNG and SVG with matplotlib.")] = Path(
        "vembed-ckpt-bench"
    ),
    size: Annotated[
        str | None, typer.Option(help="Of the made-up state: 256MiB, 1GiB; a third weights, the rest AdamW's.")
    ] = None,
    tensors: Annotated[int | None, typer.Option(help="So many tensors in the made-up state.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Visits to each engine, in random order.")] = None,
    saves: Annotated[int | None, typer.Option(help="Saves that count in each visit.")] = None,
    patience: Annotated[
        float | None, typer.Option(help="Seconds to wait before each save for a quiet machine.", show_default=False)
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Everything, at 1 GiB and up to 4: hours.")] = False,
    show: Annotated[
        Path | None, typer.Option(help="Print tables and draw plots of a result file; measure nothing.")
    ] = None,
    list_engines: Annotated[bool, typer.Option("--list", help="List the engines and what each leaves out.")] = False,
) -> None:
    """Measure what saving costs a training on this machine, with this library and with its peers.

    Without arguments: about two minutes for stall and durable with a made-up state and a few engines.
    """
    console = Console()
    console.width = max(console.width, 110)  # the tables do not fit into less, and a log file has no width
    try:
        if list_engines:
            from ..bench import report

            console.print(report.engines())
            return
        if show is not None:
            _show(console, show, out if out != Path("vembed-ckpt-bench") else show.parent)
            return
        options = Options()
        if full:
            options = options.full()
        chosen = tuple(MEASURES) if measures == ["all"] else tuple(dict.fromkeys(measures or options.measures))
        given: dict[str, Any] = {
            "rounds": rounds,
            "saves": saves,
            "tensors": tensors,
            "patience": patience,
            "model": model,
        }
        options = replace(
            options,
            measures=chosen,
            engines=names(engines or options.engines),
            size=options.size if size is None else parse_size(size),
            **{name: value for name, value in given.items() if value is not None},
        )
        _measure(console, options, device, directory, out)
    except Refused as error:
        print(f"vembed-ckpt bench: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was measured until then is in {out}", file=sys.stderr)
        raise typer.Exit(130) from None


def _measure(console: Console, options: Options, device: str | None, directory: Path, out: Path) -> None:
    from ..bench.catalog import choose

    _, missing = choose(options.engines, DEFAULT_ENGINES)  # before torch is loaded
    for name in missing:
        console.print(f"not installed, left out: {name} (pip install {ENGINES[name].pip})", highlight=False)

    import torch

    from ..bench.session import on_memory, run

    options = replace(options, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if on_memory(directory):
        print(
            f"warning: {directory} is in memory, not on a disk: `durable` and `restore` mean nothing there",
            file=sys.stderr,
        )
    _, file = run(options, directory, out)
    _show(console, file, out)


def _show(console: Console, file: Path, out: Path) -> None:
    """Tables on the console, plots beside the result."""
    from ..bench import report

    try:
        result = json.loads(file.read_text())
        report.show(result, console)
    except (OSError, ValueError, KeyError) as error:
        raise Refused(f"{file} is no result of this command: {error!r}") from error
    try:
        from ..bench import plots
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        console.print("no plots: matplotlib is not installed (pip install matplotlib)", highlight=False)
    else:
        for path in plots.draw(result, out / file.stem):
            console.print(f"plot: {path}", soft_wrap=True, highlight=False)
    console.print(f"every sample: {file}", soft_wrap=True, highlight=False)
