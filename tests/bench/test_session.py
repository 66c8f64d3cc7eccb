"""A real run at the smallest size, from visits to tables and pictures; and what a run leaves behind when it fails."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vembed_async_ckpt.bench import checks, plots, report, results, samples, session, summary
from vembed_async_ckpt.bench.options import GIB, MEASURES, MIB, Options, Refused, parse_size
from vembed_async_ckpt.bench.visits import Failed, Visits

TINY = Options(
    measures=tuple(MEASURES),
    engines=("ours", "safetensors"),
    size=MIB,
    tensors=12,
    rounds=1,
    saves=1,
    warm_up=1,
    stretch=0.0,
    width=64,
    quiet=0.0,
    least=1,
    patience=0.0,
    sizes=(MIB, 2 * MIB),
    tensor_counts=(6, 30),
    intervals=(1, 2),
    interval_steps=2,
)
QUIET = {"file": io.StringIO()}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, Path]:
    """(result, its file, the directory that was written to) of one run of every measure."""
    directory, out = tmp_path_factory.mktemp("disk"), tmp_path_factory.mktemp("out")
    (directory / "somebody.txt").write_text("not of the benchmark")
    result, file = session.run(TINY, directory, out, Console(**QUIET))
    return result, file, directory


def test_a_run_measures_everything_and_cleans_up(ran: tuple[dict[str, Any], Path, Path]):
    """Every measure has samples of every engine, without errors; of the directory only what others put there is left."""
    result, file, directory = ran
    assert results.read(file) == json.loads(json.dumps(result))
    assert result["complete"]
    assert set(result["measures"]) == set(result["summary"]) == set(MEASURES)
    for name, measured in result["measures"].items():
        disk = {"raw-disk"} if name == "cost" else set()
        assert {sample["engine"] for sample in measured["samples"]} == {"ours", "safetensors"} | disk, name
        assert [sample["error"] for sample in measured["samples"] if "error" in sample] == []
    assert os.listdir(directory) == ["somebody.txt"]
    assert os.listdir(file.parent) == [file.name]


def test_the_result_says_on_what_and_with_what(ran: tuple[dict[str, Any], Path, Path]):
    """Machine, versions, load, options, and what each engine leaves out."""
    result, _, _ = ran
    assert {"cpu", "cpus", "kernel", "file_system", "load", "versions", "date", "gpu"} <= set(result["machine"])
    assert result["options"]["size"] == MIB
    assert result["state"]["bytes"] == pytest.approx(MIB, rel=0.1)
    assert "no fsync" in result["engines"]["safetensors"]["lacks"]


def test_samples_are_raw_and_consistent(ran: tuple[dict[str, Any], Path, Path]):
    """Parts add up, what comes later is not earlier, and every engine and the raw disk had steps beside them."""
    result, _, _ = ran
    for visit in result["measures"]["stall"]["samples"]:
        for save in visit["blocked"]:
            assert save["blocked"] == pytest.approx(save["save"] + save["step"])
            assert 0 < save["save"] <= save["written"] <= save["durable"]
        for steps in visit["steps"]:
            saves = result["options"]["saves"]
            assert len(steps["lost"]) == len(steps["floor"]) == saves
            assert visit["engine"] != "ours" or len(steps["beside"]) >= saves
    for visit in result["measures"]["durable"]["samples"]:
        assert all(save["raw"] > 0 and save["bytes"] >= visit["bytes"] for save in visit["saves"])
    for visit in result["measures"]["cost"]["samples"]:
        if visit["engine"] == "raw-disk":
            assert len(visit["writes"]) == len(visit["floor"]) == result["options"]["saves"]
            assert all(seconds > 0 for seconds in visit["writes"] + visit["reads"])
            continue
        for save in [visit["first"], *visit["saves"]]:
            assert save["blocked"] == pytest.approx(save["save"] + save["step"])
        for save in [visit["first"], *visit["saves"], *visit["alone"]]:
            assert 0 < save["save"] <= save["written"] <= save["durable"]
            assert save["bytes"] > 0.9 * visit["bytes"]
        assert len(visit["saves"]) == len(visit["steps"]) == len(visit["alone"]) == result["options"]["saves"]
        assert all(load["warm"] > 0 and load["cold"] > 0 for load in visit["loads"])
    points = {(s["kind"], s["value"]) for s in result["measures"]["scaling"]["samples"] if s["engine"] == "ours"}
    assert points == {("interval", 0), ("size", MIB), ("size", 2 * MIB), ("tensors", 6), ("tensors", 30)}
    runs = result["measures"]["scaling"]["samples"]
    intervals = [
        (r["interval"], r["steps"], r["saves"]) for s in runs if s["engine"] == "ours" for r in s.get("runs", ())
    ]
    assert sorted(intervals) == [(1, 2, 2), (2, 2, 1)]


def test_tables_show_every_engine_and_number(ran: tuple[dict[str, Any], Path, Path]):
    """A table for each measure, with its note; an engine that was not there is named with the way to get it."""
    result, _, _ = ran
    result = json.loads(json.dumps(result))
    result["engines"]["absent"] = {"title": "Absent", "lacks": "", "installed": False, "pip": "no-such-package"}
    text = io.StringIO()
    report.show(result, Console(file=text, width=130))
    shown = text.getvalue()
    for heading in (
        "Cost:",
        "Stall:",
        "What a save costs the steps",
        "Durable:",
        "Memory at",
        "by size",
        "by number of tensors",
        "Restore:",
        "interval",
    ):
        assert heading in shown
    assert shown.count("vembed-async-ckpt") > 7
    blocked = result["summary"]["stall"]["engines"]["ours"]["blocked"]
    assert report.milliseconds(blocked) in shown
    assert "not installed: Absent (pip install no-such-package)" in shown
    assert "fsync" in shown


def test_plots_are_drawn_of_what_is_there(ran: tuple[dict[str, Any], Path, Path], tmp_path: Path):
    """PNG and SVG of stall, scaling and intervals; a result without a measure has no picture of it."""
    result, _, _ = ran
    files = plots.draw(result, tmp_path / "bench")
    assert sorted(path.name for path in files) == sorted(
        f"bench-{kind}.{suffix}" for kind in ("stall", "scaling", "intervals") for suffix in ("png", "svg")
    )
    assert all(path.stat().st_size > 5000 for path in files)
    partial = {**result, "summary": {"durable": result["summary"]["durable"]}}
    assert plots.draw(partial, tmp_path / "none") == []


def test_an_engine_has_one_colour_in_every_panel():
    """Whichever of them is ahead there."""
    assert plots._colours(dict.fromkeys(["b", "ours", "a"])) == plots._colours(dict.fromkeys(["a", "b", "ours"]))


def test_an_engine_that_fails_is_told_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its error is in the result and in the table; nothing of it is left on disk."""
    monkeypatch.setattr(session, "MEASURE", {"durable": _measure_with_a_failure})
    options = replace(TINY, measures=("durable",))
    disk = tmp_path / "disk"
    disk.mkdir()
    result, _ = session.run(options, disk, tmp_path / "out", Console(**QUIET))
    assert list(result["summary"]["durable"]["engines"]) == ["safetensors"]
    assert result["summary"]["durable"]["errors"] == {"ours": "OSError: the disk is on fire"}
    text = io.StringIO()
    report.show(result, Console(file=text, width=130))
    assert "failed: ours: OSError: the disk is on fire" in text.getvalue()
    assert os.listdir(disk) == []


def _measure_with_a_failure(bench: Any) -> list[dict[str, Any]]:
    from vembed_async_ckpt.bench.measures import durable

    bench.begin_round(0, 2)
    return [{"round": 0, **bench.visit(f, name)} for f, name in ((_fail, "ours"), (durable.visit, "safetensors"))]


def _fail(say: Any, setting: Any, name: str, directory: str) -> None:
    Path(directory, "half-written").write_text("x")
    raise OSError("the disk is on fire")


def test_a_visit_that_dies_or_raises_is_an_error(tmp_path: Path):
    """With what it printed, but not where; the process is gone."""
    visits = Visits(os.fspath(tmp_path / "log"))
    with pytest.raises(Failed, match=r"(?s)its process ended with -9.*last words"):
        visits.call(_die)
    with pytest.raises(Failed, match=r'(?s)File "bench/test_session.py", line .*ZeroDivisionError') as failed:
        visits.call(_divide, 0)
    assert os.path.dirname(__file__) not in str(failed.value), "results are published"
    assert visits.call(_divide, 4)[0] == 0.25


def _die(say: Any) -> None:
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def _divide(say: Any, by: int) -> float:
    return 1 / by


def test_memory_of_a_visit_is_watched_in_its_phases(tmp_path: Path):
    """What a phase allocated is seen in it, and the phase before is not charged."""
    _, peaks = Visits(os.fspath(tmp_path / "log")).call(_allocate, 64 * MIB)
    assert peaks["large"] - peaks["small"] > 60 * MIB


def _allocate(say: Any, size: int) -> None:
    say("small")
    time.sleep(0.1)  # for the watcher: it looks every hundredth of a second
    say(None)
    say("large")
    held = bytearray(os.urandom(1024)) * (size // 1024)
    time.sleep(0.2)
    say(None)
    del held


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, signal_: int):
    """Ctrl-C or SIGTERM in the middle of a visit: exit code 130, the folder is gone, no process lives, no empty result."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["bench", "durable", "--engines", "ours", "--size", "8MiB", "--saves", "100000", "--patience", "0"]
    process = subprocess.Popen(
        [*_PROGRAM, *command, "--dir", os.fspath(disk), "--out", os.fspath(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not list(disk.glob("vembed-bench-*/visit-*/engine/checkpoint-1*")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal_)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "interrupted; nothing was measured" in printed
    assert os.listdir(disk) == []
    assert not (tmp_path / "out").exists()
    assert [line for line in _command_lines() if os.fspath(disk) in line] == []


def test_an_interrupted_run_keeps_what_was_measured(tmp_path: Path):
    """Every visit that had ended is in the file, with a summary, and its name is printed."""
    command = ["bench", "--engines", "ours", "--size", "1MiB", "--tensors", "12", "--rounds", "1000", "--saves", "1"]
    process = subprocess.Popen(
        [
            *_PROGRAM,
            *command,
            "--patience",
            "0",
            "--dir",
            os.fspath(tmp_path / "disk"),
            "--out",
            os.fspath(tmp_path / "out"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not any(file.stat().st_size for file in tmp_path.glob("out/*.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    (file,) = (tmp_path / "out").glob("*.json")
    result = results.read(file)
    visits = len(result["measures"]["cost"]["samples"])
    assert f"interrupted; {visits} visits are in {file}" in printed
    assert visits >= 1
    assert not result["complete"]
    assert result["summary"]["cost"]["rounds"] >= 1
    assert not (tmp_path / "disk").exists()


# A shell that runs the suite in the background has its children ignore SIGINT; a terminal does not.
_MAIN = """
import signal
from vembed_async_ckpt.cli import main
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
"""
_PROGRAM = [sys.executable, "-c", _MAIN]


def _command_lines() -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:
                continue  # it ended meanwhile
    return found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (replace(TINY, measures=("durable",), size=1 << 50), r"has .* left; .* are needed"),
        (replace(TINY, measures=("scaling",), sizes=(1 << 50,)), r"has .* left; .* are needed"),
    ],
)
def test_too_little_disk_is_said_with_numbers_before_anything_is_written(
    tmp_path: Path, options: Options, message: str
):
    """Also for the largest size that `scaling` would come to."""
    with pytest.raises(Refused, match=message):
        session.run(options, tmp_path, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_too_little_memory_is_said_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The state itself would fit, but not what engines stage beside it."""
    monkeypatch.setattr(checks, "available_memory", lambda: 2 * GIB)
    with pytest.raises(Refused, match=r"2\.1 GB of memory are available; engines need up to .* for a state of 1\.1 GB"):
        session.run(replace(TINY, measures=("stall",), size=GIB), tmp_path, tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measures": ("speed",)}, "no measure 'speed'; there are cost, stall"),
        ({"rounds": 0}, "rounds is 0; at least 1"),
        ({"tensors": 2}, "tensors is 2; at least 3"),
    ],
)
def test_options_that_make_no_sense_are_refused(change: dict[str, Any], message: str):
    """By name and value."""
    with pytest.raises(Refused, match=message):
        replace(TINY, **change)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GiB", GIB),
        ("256 MiB", 256 * MIB),
        ("64M", 64 * MIB),
        ("300MB", 300_000_000),
        ("1.5g", 3 * GIB // 2),
        ("4096", 4096),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int):
    """Binary unless it says MB or GB."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "1 XiB", "1ib"])
def test_what_is_no_size_is_refused(text: str):
    """With the text."""
    with pytest.raises(Refused, match="is none; write it as"):
        parse_size(text)


def test_a_round_that_others_disturbed_counts_for_no_engine():
    """If half of the rounds were quiet; else all count, and it says how many."""
    found = [
        {"engine": engine, "round": number, "saves": [{"others": others}]}
        for number, others in enumerate((0.0, 0.5, 0.05))
        for engine in ("ours", "dcp")
    ]
    used, said = samples.quiet_rounds(found, "saves")
    assert {sample["round"] for sample in used} == {0, 2}
    assert (said["rounds"], said["used"]) == (3, 2)
    for sample in found:
        sample["saves"][0]["others"] = 0.5
    assert samples.quiet_rounds(found, "saves")[1]["used"] == 3


def test_ratios_are_against_ours_and_against_the_best_peer():
    """Of the engines of the same run."""
    engines = {"ours": {"t": 1.0}, "ours-thread": {"t": 3.0}, "dcp": {"t": 4.0}, "safetensors": {"t": 2.0}}
    summary.compare(engines, "t")
    assert engines["dcp"]["times_ours"] == 4
    assert engines["ours"]["of_best_peer"] == 0.5
    assert engines["ours"]["best_peer"] == "safetensors"
    assert engines["ours-thread"]["of_best_peer"] == 1.5
