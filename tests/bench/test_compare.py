"""Two results against each other, and one against what it takes to be trusted."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vembed_async_ckpt.bench import results
from vembed_async_ckpt.bench.compare import compare, doubts
from vembed_async_ckpt.cli import app

from .made_up import FAST, SLOW, noisy, result

runner = CliRunner()


def made(chance: random.Random, visits: int, factor: float = 1.0) -> dict[str, Any]:
    """A run of three engines whose figures are noise around their values, of the first one times `factor`."""
    values = {"ours": (0.003, 0.14, 0.28), "dcp": (0.05, 0.5, 0.6), "original": (0.24, 0.28, 0.41)}
    return result(
        {
            name: tuple(noisy(chance, part * (factor if name == "ours" else 1.0), visits) for part in parts)  # type: ignore[misc]
            for name, parts in values.items()
        }
    )


def halves(whole: dict[str, Any], chance: random.Random) -> list[dict[str, Any]]:
    """The rounds of a run, split at random."""
    samples = whole["measures"]["cost"]["samples"]
    rounds = sorted({sample["round"] for sample in samples})
    chosen = set(chance.sample(rounds, len(rounds) // 2))
    return [
        {
            **whole,
            "measures": {"cost": {"seconds": 1.0, "samples": [s for s in samples if (s["round"] in chosen) is half]}},
        }
        for half in (True, False)
    ]


def test_halves_of_one_run_do_not_differ():
    """At least 95 of 100 random splits of a run of 12 rounds find no difference in any quantity of any engine."""
    chance = random.Random(3)
    whole = made(chance, 12)
    same = 0
    for _ in range(100):
        one, other = halves(whole, chance)
        same += all(each.verdict == "no difference" for each in compare(one, other))
    assert same >= 95


def test_a_planted_difference_is_found():
    """Every quantity of ours 1.5 times as long is worse, and better the other way round; those of the others are not."""
    chance = random.Random(4)
    before, after = made(chance, 6), made(chance, 6, factor=1.5)
    found = compare(before, after)
    assert {(each.engine, each.verdict) for each in found} == {
        ("ours", "worse"),
        ("dcp", "no difference"),
        ("original", "no difference"),
    }
    assert [each.change for each in found if each.engine == "ours"] == [pytest.approx(0.5, abs=0.2)] * 4
    assert {each.verdict for each in compare(after, before) if each.engine == "ours"} == {"better"}


def written(folder: Path, name: str, found: dict[str, Any]) -> str:
    results.write(folder / f"{name}.json", found)
    return str(folder / f"{name}.json")


def test_compare_prints_what_is_worse_first_and_can_fail(tmp_path: Path):
    """Exit code 1 only with --fail-above and only for what is worse by more than that."""
    before = written(tmp_path, "before", result({"ours": FAST, "dcp": SLOW}))
    after = written(tmp_path, "after", result({"ours": SLOW, "dcp": SLOW}))
    shown = runner.invoke(app, ["bench", "compare", before, after])
    assert shown.exit_code == 0
    lines = shown.output.splitlines()
    assert lines[0] == "worse:"
    assert "  vembed-async-ckpt stops training 3.3 -> 230 ms (+6976%)" in lines or lines[1].startswith(
        "  vembed-async-ckpt stops training 3.3 -> 230 ms (+"
    )
    assert "no difference:" in lines
    assert max(map(len, lines)) <= 80
    assert runner.invoke(app, ["bench", "compare", before, after, "--fail-above", "25%"]).exit_code == 1
    assert runner.invoke(app, ["bench", "compare", before, after, "--fail-above", "100000%"]).exit_code == 0
    assert runner.invoke(app, ["bench", "compare", after, before, "--fail-above", "25%"]).exit_code == 0


def test_compare_says_that_two_runs_are_unlike(tmp_path: Path):
    """Another state, another machine."""
    one, other = result({"ours": FAST}), result({"ours": FAST})
    other["state"] = {**other["state"], "tensors": 7}
    other["machine"] = {**other["machine"], "cpus": 64}
    shown = runner.invoke(app, ["bench", "compare", written(tmp_path, "a", one), written(tmp_path, "b", other)])
    assert "They did not save the same: 200 MiB in 400 tensors, and 200 MiB in 7 tensors." in shown.output
    assert "They ran on different machines: 2 x Some, no GPU, and 64 x Some, no GPU." in shown.output.replace("\n", " ")


def test_compare_says_that_a_machine_was_busy(tmp_path: Path):
    """What differs may be what other programs took."""
    one, other = result({"ours": FAST}, others=0.5), result({"ours": FAST})
    shown = runner.invoke(app, ["bench", "compare", written(tmp_path, "a", one), written(tmp_path, "b", other)])
    assert "The machine was not quiet: other programs used 50% and 1% of it. Differences may be theirs." in (
        shown.output.replace("\n", " ")
    )


@pytest.mark.parametrize("command", [["compare", "FILE", "FILE"], ["check", "FILE"]])
def test_what_is_no_result_is_refused(tmp_path: Path, command: list[str]):
    """In one line, exit code 2."""
    for content in ("", "[]", "{}", '{"format": 99, "machine": 1, "options": 1, "state": 1, "measures": 1}'):
        (tmp_path / "file.json").write_text(content)
        arguments = [str(tmp_path / "file.json") if part == "FILE" else part for part in command]
        shown = runner.invoke(app, ["bench", *arguments])
        assert shown.exit_code == 2
        assert len(shown.stderr.splitlines()) == 1


def test_a_steady_result_can_be_trusted(tmp_path: Path):
    """Exit code 0; else 1 and why."""
    shown = runner.invoke(app, ["bench", "check", written(tmp_path, "steady", result({"ours": FAST, "dcp": SLOW}))])
    assert (shown.exit_code, shown.output) == (0, "This result can be trusted.\n")
    unsteady = ([[0.2, 0.25], [0.4, 0.5]], *SLOW[1:])
    shown = runner.invoke(app, ["bench", "check", written(tmp_path, "unsteady", result({"dcp": unsteady}, others=0.3))])
    assert shown.exit_code == 1
    assert shown.output.splitlines() == [
        "Other programs used 30% of the machine; less than 10% is quiet.",
        "DCP async_save stops training 225 to 450 ms, from visit to visit.",
        "Do not trust it: measure again, longer or on a quiet machine.",
    ]


def test_one_visit_says_nothing_about_the_noise():
    """Two are needed."""
    once = tuple(part[:1] for part in FAST)
    assert doubts(result({"ours": once})) == ["Each engine was visited once; two visits are needed to see the noise."]  # type: ignore[dict-item]
