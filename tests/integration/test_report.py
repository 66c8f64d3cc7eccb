"""`vembed-ckpt report`: what it computes from events, that its page stands alone, and how it looks in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer, Event, KeepLast
from vembed_async_ckpt.policies import every
from vembed_async_ckpt.report import drawing, history, page
from vembed_async_ckpt.sinks import JsonLines

START = 1.7e9


def run(
    *,
    steps: int = 200,
    every: int = 50,
    took: float = 0.1,
    slower: float = 0.02,
    start: float = START,
    failing: int = 0,
) -> list[Event]:
    """A training: a save every so often blocks 30 ms, and the next four steps are slower. Retention keeps two."""
    events = [Event("writer", "started", detail="pid 1", time=start)]
    now, laps, beside = start + 1.0, [], 0  # it takes a second to begin
    saves = 0
    for step in range(1, steps + 1):
        lap = took + (slower if beside else 0.0)
        beside = max(beside - 1, 0)
        now += lap
        if laps and laps[-1] < 0:
            lap += -laps.pop()
        laps.append(lap)
        if step % 10 == 0:
            events.append(Event("step", "complete", step=step, seconds=sum(laps), time=now, parts=tuple(laps)))
            laps = []
        if step % every == 0:
            saves += 1
            save_id = f"{step:032x}"
            at = now + 0.03
            events.append(Event("call", "complete", save_id, step, 10**9, 0.03, time=at))
            if saves == failing:
                events.append(Event("save", "failed", save_id, step, 0, 0.4, "no <space> left & more", time=at + 0.37))
            else:
                events += [
                    Event("stage", "complete", save_id, step, 0, 0.1, time=at + 0.1),
                    Event("write", "started", save_id, step, time=at + 0.1),
                    Event("write", "complete", save_id, step, 10**9, 0.35, time=at + 0.45, parts=(0.3, 0.05)),
                    Event("save", "complete", save_id, step, 10**9, 0.48, time=at + 0.45),
                ]
                if saves > 2:
                    events.append(
                        Event("retention", "complete", save_id, step, 10**9, 0.02, "deleted one", time=at + 0.5)
                    )
            now, beside = at, 4
            laps = [-0.03]  # part of the next step
    return events


# -- what it computes


def test_saves_are_put_together_from_their_events():
    """Whenever each part was, what it blocked, and what the steps beside it took longer than their neighbours."""
    found = history.read(run())
    assert (len(found.steps), len(found.saves), len(found.deletions)) == (200, 4, 2)
    for save in found.saves[:3]:
        assert None not in (save.call, save.copy, save.write, save.commit)
        assert save.blocked == pytest.approx(0.03)
        assert save.durable == pytest.approx(0.48)
        assert save.rate == pytest.approx(10**9 / 0.35)
        assert save.slowed == pytest.approx(4 * 0.02, abs=1e-6)
        assert save.begin <= save.call[0] < save.copy[1] <= save.write[1] == save.commit[0] < save.commit[1] <= save.end
    assert found.saves[3].slowed is None or found.saves[3].slowed == 0  # no step came after it


def test_events_may_come_in_any_order():
    """Steps are told up to a second late; several processes may share a file."""
    events = run()
    one, other = history.read(events), history.read(sorted(events, key=lambda event: (event.stage, -event.time)))
    assert one.steps == other.steps
    assert [(s.step, s.blocked, s.slowed, s.size) for s in one.saves] == [
        (s.step, s.blocked, s.slowed, s.size) for s in other.saves
    ]


def test_the_wall_time_is_shared_out():
    """Every second belongs to one kind, and goodput is what training without saves would have taken."""
    found = history.read(run(steps=220))
    shares = history.shares(found)
    assert shares.training + shares.blocked + shares.slowed + shares.other == pytest.approx(found.wall)
    assert shares.training == pytest.approx(220 * 0.1, abs=1e-3)
    assert shares.blocked == pytest.approx(4 * 0.03)
    assert shares.slowed == pytest.approx(4 * 4 * 0.02, abs=1e-3)
    assert shares.other == pytest.approx(1.0, abs=1e-3)


def test_the_time_between_two_runs_is_no_training():
    """A run that was killed, and one that went on with the same file a minute later."""
    first, second = run(), run(start=START + 90)
    found = history.read([*first, *second])
    shares = history.shares(found)
    assert len(found.starts) == 2
    assert shares.other == pytest.approx(90 - (history.read(first).wall) + 2.0, abs=1.1)
    assert shares.training < 2 * 200 * 0.1 + 1e-6


def test_a_save_whose_end_never_came_counts_what_it_blocked():
    """The run was killed with it under way."""
    events = [event for event in run() if not (event.step == 200 and event.stage in ("write", "save", "retention"))]
    found = history.read(events)
    assert [save.end is None for save in found.saves] == [False, False, False, True]
    assert found.saves[3].blocked == pytest.approx(0.03)
    page.render(found, "events.jsonl")


def test_percentiles():
    """The smallest value that so many do not exceed."""
    assert history.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert history.percentile(list(map(float, range(1, 101))), 0.99) == 99.0
    assert history.percentile([5.0], 0.99) == 5.0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 s"), (0.0031, "3.1 ms"), (2.5e-5, "25 µs"), (1.5, "1.5 s"), (200, "3.33 min"), (9000, "2.5 h")],
)
def test_durations_are_written_as_people_do(value: float, text: str):
    """With the unit that suits them."""
    assert drawing.duration(value) == text


def test_ticks_are_round():
    """And lie within."""
    assert drawing.ticks(0, 45.6, 8) == [0, 10, 20, 30, 40]
    assert drawing.ticks(0, 0.13, 8) == [0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12]
    assert drawing.ticks(0, 0, 8) == [0]


# -- the page


def charts(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def check_drawing(chart: ElementTree.Element) -> None:
    """Everything lies within the drawing, and no two texts of a line overlap."""
    width, height = map(float, chart.attrib["viewBox"].split()[2:])
    for box in chart.iter("rect"):
        x, y, w, h = (float(box.attrib[name]) for name in ("x", "y", "width", "height"))
        assert -0.1 <= x <= x + w <= width + 1.5
        assert -0.1 <= y <= y + h <= height + 0.1
    for text in chart.iter("text"):
        assert -0.1 <= float(text.attrib["x"]) <= width
        assert 0 < float(text.attrib["y"]) <= height
    for line in chart.iter("polyline"):
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= width
            assert 0 <= y <= height


@pytest.mark.parametrize("options", [{}, {"steps": 12}, {"steps": 5000}, {"every": 1000}, {"every": 2}, {"failing": 2}])
def test_the_page_stands_alone(options: dict[str, int]):
    """No script, no address, nothing to load; every drawing is well formed; names and reasons are escaped."""
    html = page.render(history.read(run(**options)), "<script>alert(1)</script>.jsonl")
    assert not re.search(r"https?:|//[a-z]|src=|href=|@import|url\(|<script|<link|<iframe", html)
    for chart in charts(html):
        check_drawing(chart)
    assert len(charts(html)) >= 2
    if options.get("failing"):
        assert "no &lt;space&gt; left &amp; more" in html


def test_the_numbers_are_on_it():
    """Goodput, stalls, rate, and what retention left on the disk."""
    html = page.render(history.read(run(steps=220)), "events.jsonl", disk=3e9)
    stalls, disk = (
        ("blocked, p99 30 ms", "until durable, p99 480 ms", "p50 30 ms"),
        ("2.86 GB/s", "4 GB", "the disk: 3 GB/s"),
    )
    for text in (*stalls, *disk, "committed, 0 failed"):
        assert text in html, text
    assert re.search(r"<b>9[0-9]\.[0-9]%</b><span>goodput", html)


def test_two_hours_make_a_page_of_modest_size():
    """Seventy thousand steps and a hundred saves, within a minute on a busy machine."""
    found = history.read(run(steps=72_000, every=720))
    begun = time.thread_time()
    html = page.render(found, "events.jsonl")
    assert time.thread_time() - begun < 30
    assert len(html) < 1_000_000


# -- the command


def report(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vembed_async_ckpt", "report", *map(str, arguments)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_report_of_a_real_training(root: Path, tmp_path: Path):
    """Beside the events, unless it is told where."""
    events = tmp_path / "events.jsonl"
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
    optimizer = torch.optim.AdamW(model.parameters())
    with AsyncCheckpointer(
        root, sinks=[JsonLines(events)], policy=every(steps=20), retention=KeepLast(2)
    ) as checkpointer:
        for step in range(1, 101):
            model(torch.ones(2, 64)).sum().backward()
            optimizer.step()
            if checkpointer.should_save(step):
                checkpointer.save(step, model=model, optimizer=optimizer)
    result = report(events)
    assert (result.returncode, result.stdout.strip()) == (0, str(tmp_path / "events.html"))
    html = (tmp_path / "events.html").read_text()
    assert "99 steps, 5 saves" in html
    assert len(charts(html)) == 6
    assert report(events, "--out", tmp_path / "x.html", "--disk-gbps", "2.5").returncode == 0
    assert "the disk: 2.5 GB/s" in (tmp_path / "x.html").read_text()


def test_what_is_no_run_is_said(tmp_path: Path):
    """Exit code 1, one line, no page."""
    (tmp_path / "empty.jsonl").write_text("not json\n")
    for name, said in (("missing.jsonl", "cannot be read"), ("empty.jsonl", "holds no events of a training")):
        result = report(tmp_path / name)
        assert result.returncode == 1
        assert said in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("*.html"))


def test_it_loads_no_torch(tmp_path: Path):
    """As every command that only reads."""
    path = tmp_path / "events.jsonl"
    sink = JsonLines(path)
    for event in run():
        sink(event)
    script = (
        "import sys; from vembed_async_ckpt.cli import app\n"
        f"try: app(['report', {str(path)!r}])\nexcept SystemExit as end: assert not end.code\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.slow
def test_a_browser_shows_it_without_a_network(tmp_path: Path):
    """Headless Chromium, in which no name resolves: every kind of bar has its colour in the picture."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser is not None, "this test needs Chromium"
    path, picture = tmp_path / "report.html", tmp_path / "report.png"
    path.write_text(page.render(history.read(run(steps=400, failing=3)), "events.jsonl"))
    subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--host-resolver-rules=MAP * 0.0.0.0"),
            *(f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", "--window-size=1060,2100", path.as_uri()),
        ],
        check=True, capture_output=True, timeout=200,
    )  # fmt: skip
    import matplotlib.image

    pixels = (matplotlib.image.imread(picture)[:, :, :3] * 255).round().astype(int)
    for colour in ("8fa3bf", "d1362f", "e0952b", "2f74c0", "173f73", "8a55b5", "e58d85"):
        wanted = [int(colour[n : n + 2], 16) for n in (0, 2, 4)]
        assert int((abs(pixels - wanted).max(axis=2) <= 2).sum()) > 20, colour
