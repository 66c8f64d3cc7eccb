"""`vembed-ckpt bench`. The measuring processes load torch; this process loads it only after checking its options."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from ..bench import options as given_options
from ..bench.catalog import ENGINES, choose
from ..bench.options import BUDGET, DEFAULT_ENGINES, MEASURES, MIB, Options, Refused, names
from ..bench.workloads import WORKLOADS
from ..ettr import GPUS

OUT = Path("vembed-ckpt-bench")


class _RunByDefault(TyperGroup):
    """Runs `bench run ...` if the first word is not a command: `bench`, `bench stall --model m`, `bench --show f`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    help="Measure what saving costs a training, with this library and with others. The options are those of `bench run`.",
)


@app.command()
def run(
    measures: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MEASURE]...", help=f"{', '.join(MEASURES)}, or all; default: cost.", show_default=False
        ),
    ] = None,
    engines: Annotated[
        list[str] | None,
        typer.Option(help=f"Comma-separated, or all; default: {', '.join(DEFAULT_ENGINES)}.", show_default=False),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE:CLASS", help="Another engine, of your own: see benchmarks/README.md."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="How long it may take: 30s, 2m, 10m, 1h; decides on rounds and engines; default: 2m."),
    ] = None,
    workload: Annotated[
        str | None, typer.Option(help=f"What is saved: {', '.join(WORKLOADS)}; default: clip.", show_default=False)
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="Of the workload: 1/8, 1/64, 1; default: about 200 MiB.", show_default=False)
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Equal tensors instead: 256MiB, 1GiB; a third weights, the rest AdamW's.")
    ] = None,
    tensors: Annotated[int | None, typer.Option(help="So many equal tensors.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Your model instead: a config.json, a directory or a hub id of transformers.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1; default: cuda if there is one.", show_default=False)
    ] = None,
    directory: Annotated[
        Path, typer.Option("--dir", help="Where to write: made if it does not exist; checkpoints are removed.")
    ] = Path("."),
    out: Annotated[Path, typer.Option(help="Folder for the result, a JSON file.")] = OUT,
    gpus: Annotated[int, typer.Option(help="GPUs of the run that you have in mind: how often it will crash.")] = GPUS,
    mtbf: Annotated[str | None, typer.Option(help="Or the time between two crashes: 8h, 30d.")] = None,
    restart: Annotated[str, typer.Option(help="From a crash until the checkpoint is loaded.")] = "60s",
    interval: Annotated[str, typer.Option(help="How often you save today.")] = "30m",
    overhead: Annotated[str | None, typer.Option(help="What saving may cost, as 1%: how often is that?")] = None,
    price: Annotated[float | None, typer.Option(help="US dollars per GPU and hour.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Visits to each engine, whatever time that takes.")] = None,
    saves: Annotated[int | None, typer.Option(help="Saves that count in each visit.")] = None,
    patience: Annotated[
        float | None, typer.Option(help="Seconds to wait for a quiet machine, before each visit or save.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Everything, at 1 GiB and up to 4: hours.")] = False,
    details: Annotated[bool, typer.Option("--details", help="All tables, versions, and what each leaves out.")] = False,
    export_markdown: Annotated[Path | None, typer.Option(help="Write the answers there, to be pasted.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page that needs nothing else.")] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for PNG and SVG of the measures stall and scaling, with matplotlib.")
    ] = None,
    show: Annotated[Path | None, typer.Option(help="Say what a result file says; measure nothing.")] = None,
    list_engines: Annotated[bool, typer.Option("--list", help="List the engines and what each leaves out.")] = False,
) -> None:
    """Measure what one save costs a training on this machine: two minutes, ten sentences, one table.

    A save is timed in a training, beside small steps and alone, for this library and for others. Then it is loaded
    back.
    """
    begun = time.monotonic()
    try:
        if list_engines:
            from ..bench import report

            report.list_engines()
            return
        assumptions = _assumptions(gpus, mtbf, restart, interval, overhead, price)
        if show is not None:
            _say(show, assumptions, details, export_markdown, html, plots)
            return
        options = Options().full() if full else Options()
        if not full:
            options = _timed(options, measures, budget, rounds)
        given: dict[str, Any] = {
            "rounds": rounds,
            "saves": saves,
            "tensors": tensors,
            "patience": patience,
            "model": model,
            "workload": workload,
            "size": given_options.parse_size(size) if size else 256 * MIB if tensors else None,
        }
        chosen = tuple(MEASURES) if measures == ["all"] else tuple(dict.fromkeys(measures or options.measures))
        options = replace(
            options,
            measures=chosen,
            engines=names(engines or options.engines),
            scale=scale or "",
            **{name: value for name, value in given.items() if value is not None},
        )
        file = _measure(options, names(engine or ()), device, directory, out, begun)
        _say(file, assumptions, details, export_markdown, html, plots)
    except Refused as error:
        print(f"vembed-ckpt bench: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


def _timed(options: Options, measures: list[str] | None, budget: str | None, rounds: int | None) -> Options:
    """Return the options with a time budget or a number of rounds.

    `rounds` comes first, then `budget`. Without both, the default measure gets two minutes, and named measures keep
    their number of rounds.
    """
    if rounds is not None:
        return options
    if budget is not None:
        return replace(options, budget=given_options.parse_time(budget, "--budget"), rounds=None)
    return options if measures else replace(options, budget=BUDGET, rounds=None)


def _assumptions(
    gpus: int, mtbf: str | None, restart: str, interval: str, overhead: str | None, price: float | None
) -> Any:
    from ..bench.advice import Assumptions

    if gpus < 1:
        raise Refused(f"--gpus is {gpus}; at least 1 is needed")
    return Assumptions(
        gpus,
        None if mtbf is None else given_options.parse_time(mtbf, "--mtbf"),
        given_options.parse_time(restart, "--restart"),
        given_options.parse_time(interval, "--interval"),
        None if overhead is None else given_options.parse_share(overhead, "--overhead"),
        price,
    )


def _measure(
    options: Options, own: tuple[str, ...], device: str | None, directory: Path, out: Path, begun: float
) -> Path:
    """Check everything that can be checked without torch, then run. Returns the result file."""
    from ..bench import checks

    wanted, missing = _engines(options, own)
    options = replace(options, device=checks.device_for(device), engines=tuple(wanted))
    with checks.folders(options, directory, out):
        for name in missing:
            print(f"not installed, left out: {ENGINES[name].title} (pip install {ENGINES[name].pip})", file=sys.stderr)
        if checks.on_memory(directory):
            print(f"warning: {directory} is in memory, not on a disk: what is durable means nothing", file=sys.stderr)

        try:
            from ..bench.session import run

            return run(options, directory, out, begun=begun, missing=missing)[1]
        except KeyboardInterrupt as error:  # an `Interrupted`, or an interrupt while torch was loaded
            file = getattr(error, "file", None)
            kept = f"{error.visits} visits are in {file}" if file else "nothing was measured"  # type: ignore[attr-defined]
            print(f"\ninterrupted; {kept}", file=sys.stderr)
            raise typer.Exit(130) from None


def _engines(options: Options, own: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return (engines to run, engines of the default that are not installed).

    Raises `Refused` if a named engine is not installed.
    """
    if own:
        sys.path.insert(0, os.getcwd())  # look for the user's own engines there, as `python -m` does
    wanted, missing = choose(options.engines, given_options.default_engines(options.budget))
    return list(dict.fromkeys(wanted + choose(own, ())[0])), missing


def _say(
    file: Path, assumptions: Any, details: bool, export_markdown: Path | None, html: Path | None, plots: Path | None
) -> None:
    """Print the answers and what else was asked for."""
    from ..bench import answers, report, results, text

    result = results.read(file)
    try:
        said = answers.answer(result, assumptions)
        print(text.plain(said))
        if details:
            report.show(result, Console(soft_wrap=True))
    except (KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{file} is no result of this command: {error!r}") from error
    if export_markdown is not None:
        _write(export_markdown, text.markdown(said), "--export-markdown")
    if html is not None:
        from ..bench import page

        _write(html, page.page(result, said), "--html")
    if plots is not None:
        _plot(result, plots, file.stem)
    if not details:
        print("All numbers: --details    What the others leave out: --list")
    print(f"{file}")


def _plot(result: dict[str, Any], folder: Path, stem: str) -> None:
    from ..bench import summary

    try:
        from ..bench import plots
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise Refused("--plots: matplotlib is not installed: pip install matplotlib") from error
    folder.mkdir(parents=True, exist_ok=True)
    for path in plots.draw({**result, "summary": summary.of(result)}, folder / stem):
        print(path)


def _write(file: Path, content: str, option: str) -> None:
    try:
        file.write_text(content)
    except OSError as error:
        raise Refused(f"{option} {file}: {(error.strerror or str(error)).lower()}") from error


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="A result file.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    fail_above: Annotated[
        str | None, typer.Option(help="Exit with 1 if anything is worse by more than that: 25%.")
    ] = None,
) -> None:
    """Show what is better and worse in B than in A: by a factor of at least 1.25, and beyond the noise of both runs."""
    from ..bench import compare as comparing
    from ..bench import results

    try:
        limit = None if fail_above is None else given_options.parse_share(fail_above, "--fail-above")
        one, other = results.read(before), results.read(after)
        differences = comparing.compare(one, other)
        if not differences:
            raise Refused(f"{before} and {after} have nothing in common that could be compared")
    except Refused as error:
        print(f"vembed-ckpt bench compare: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    for line in comparing.unlike(one, other):
        print(textwrap.fill(line, 80))
    for verdict in ("worse", "better", "no difference"):
        found = [difference for difference in differences if difference.verdict == verdict]
        if found:
            print(f"{verdict}:")
        for difference in found:
            print(textwrap.fill(str(difference), 80, initial_indent="  ", subsequent_indent="    "))
    if limit is not None and any(each.verdict == "worse" and each.change > limit for each in differences):
        raise typer.Exit(1)


@app.command()
def check(file: Annotated[Path, typer.Argument(metavar="FILE", help="A result file.")]) -> None:
    """Tell whether a result is too noisy to be trusted. Exit code 1 if it is."""
    from ..bench import compare as comparing
    from ..bench import results

    try:
        doubts = comparing.doubts(results.read(file))
    except Refused as error:
        print(f"vembed-ckpt bench check: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    for doubt in doubts:
        print(textwrap.fill(doubt, 80, subsequent_indent="  "))
    print("Do not trust it: measure again, longer or on a quiet machine." if doubts else "This result can be trusted.")
    raise typer.Exit(1 if doubts else 0)
