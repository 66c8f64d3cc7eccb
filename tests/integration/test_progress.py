"""`progress=True`: the line of a save beside the training's own bars, on a terminal that is emulated; nothing without one."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import pyte
import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer

SCRIPT = """
import logging, sys, time
import torch
from tqdm import tqdm
from vembed_async_ckpt import AsyncCheckpointer
from vembed_async_ckpt._disk.filesystem import LocalFilesystem
from vembed_async_ckpt.testing import use_filesystem

class Slow(LocalFilesystem):
    def write(self, fd, data, offset):
        time.sleep(0.3)
        return super().write(fd, data, offset)

model = torch.nn.Linear(4096, 5120)
fail = sys.argv[2] == "failing"
logging.getLogger("vembed_async_ckpt").disabled = True

class Failing(Slow):
    def sync(self, fd):
        raise OSError(5, "broken")

for number in range(int(sys.argv[3])):
    print("before", number)
with use_filesystem(Failing() if fail else Slow()):
    with AsyncCheckpointer(sys.argv[1], writer="thread", progress=True, on_error="warn") as checkpointer:
        for epoch in ("hello", "hello again"):
            for step in tqdm(range(1, 61), desc="train", disable=sys.argv[2] == "alone", ncols=70):
                time.sleep(0.01)
                if (step in (10, 40) and epoch == "hello") or (step == 60 and epoch != "hello"):
                    checkpointer.save(step, model=model)
            print(epoch)
print("done")
"""


def on_a_terminal(root: Path, kind: str, before: int = 0, **environment: str) -> list[list[str]]:
    """Run the script; returns what the screen showed each time that something was written to it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    screen = pyte.Screen(100, 24)
    stream = pyte.ByteStream(screen)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(root), kind, str(before)], stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "COLUMNS": "100", "LINES": "24", "TERM": "xterm", **environment},
    )  # fmt: skip
    os.close(theirs)
    seen: list[list[str]] = []
    deadline = time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            if not select.select([ours], [], [], 1.0)[0]:
                continue
            try:
                data = os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                break
            stream.feed(data)
            seen.append([line.rstrip() for line in screen.display])
        assert process.wait(30) == 0, seen[-1]
    finally:
        process.kill()
        os.close(ours)
    return seen


OURS = re.compile(r"checkpoint-(\d+)  [█░]{20} +(\d+)%  [\d.]+ (?:MB|bytes) of [\d.]+ MB(?:  [\d.]+ MB/s  \d+ s left)?")
TRAIN = re.compile(r"train: +\d+%\|.*\| \d+/60 \[.*\]")


def check(seen: list[list[str]]) -> dict[str, set[int]]:
    """At every moment the last line is ours or empty while a save is written, and all else is the training's. Returns the
    percents seen of each save."""
    shown: dict[str, set[int]] = {}
    for lines in seen:
        for number, line in enumerate(lines):
            if number == len(lines) - 1 and (match := OURS.fullmatch(line)):
                shown.setdefault(match[1], set()).add(int(match[2]))
            else:
                assert not line or TRAIN.fullmatch(line) or line in ("done", "hello", "hello again"), lines
    return shown


@pytest.mark.parametrize("before", [0, 23])
def test_it_has_the_last_line_and_garbles_nothing(root: Path, before: int):
    """Beside bars of the training that end and begin while a save is written, and prints, wherever on the screen they are."""
    seen = on_a_terminal(root, "beside", before)
    shown = check([["" if line.startswith("before") else line for line in lines] for lines in seen])
    assert shown.keys() == {"10", "40", "60"}
    assert all(len(percents) > 2 for percents in shown.values())
    final = [line for line in seen[-1] if line]
    ours = final[-5:]
    assert [bool(TRAIN.fullmatch(line)) and "60/60" in line for line in ours] == [True, False, True, False, False]
    assert (ours[1], ours[3:]) == ("hello", ["hello again", "done"])
    numbers = [int(line.removeprefix("before ")) for line in final[:-5]]
    assert numbers == list(range(before))[before - len(numbers) :]


def test_it_stands_alone_where_the_training_has_no_bar(root: Path):
    """And is gone at the end."""
    seen = on_a_terminal(root, "alone")
    assert check(seen).keys() == {"10", "40", "60"}
    assert [line for line in seen[-1] if line] == ["hello", "hello again", "done"]


def test_the_line_of_a_save_that_fails_goes_too(root: Path):
    """As of one that does not."""
    seen = on_a_terminal(root, "failing")
    assert check(seen).keys() == {"10", "40", "60"}
    assert not seen[-1][-1]


def test_without_a_terminal_nothing_is_shown(root: Path):
    """Not a byte, in a log file or a pipe; nor on a terminal that cannot move its cursor."""
    command = [sys.executable, "-c", SCRIPT, str(root), "alone", "0"]
    result = subprocess.run(command, capture_output=True, timeout=120, check=True)
    assert (result.stdout, result.stderr) == (b"hello\nhello again\ndone\n", b"")
    assert not any(
        "checkpoint" in line for lines in on_a_terminal(root / "again", "alone", TERM="dumb") for line in lines
    )


def test_without_a_terminal_there_is_no_thread(root: Path, monkeypatch: pytest.MonkeyPatch):
    """Standard error may also be closed, or None."""
    for stream in (sys.stderr, None, open(os.devnull, "w")):  # noqa: SIM115 - closed at once
        if stream is not None and stream is not sys.stderr:
            stream.close()
        monkeypatch.setattr(sys, "stderr", stream)
        with AsyncCheckpointer(root, writer="thread", progress=True) as checkpointer:
            checkpointer.save(1, model=torch.nn.Linear(2, 2)).result(60)
            assert "vembed-ckpt-progress" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("value", [1, "yes", None])
def test_other_values_are_refused(tmp_path: Path, value: Any):
    """By name."""
    with pytest.raises(TypeError, match="progress"):
        AsyncCheckpointer(tmp_path / "root", progress=value)
