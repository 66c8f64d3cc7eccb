"""A training that signals stop: at a step boundary, with its last step saved, whoever else handles signals."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vembed_async_ckpt
from vembed_async_ckpt import AsyncCheckpointer, SaveState, latest
from vembed_async_ckpt._disk.filesystem import LocalFilesystem
from vembed_async_ckpt._engine import stop as stops
from vembed_async_ckpt.testing import use_filesystem

BOUND = 30.0
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults" / "stops.py"
PACKAGE = str(Path(vembed_async_ckpt.__file__).parents[1])


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """After a stop the handlers stay until the process ends: here they are set back."""
    yield
    for left in list(reversed(stops._INSTALLED)):
        left._remove()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1


def until(condition: Any) -> None:
    deadline = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_step_of_the_signal_is_saved(root: Path) -> None:
    """`should_stop` says so at the next boundary and from then on; the exit code is that of the signal."""
    with AsyncCheckpointer(root) as checkpointer:
        checkpointer.stop_on(signal.SIGTERM, signal.SIGUSR1)
        assert not checkpointer.should_stop(1)
        assert checkpointer.exit_code == 0
        signal.raise_signal(signal.SIGUSR1)
        assert checkpointer.should_stop(2)
        assert checkpointer.should_stop(3)
        checkpointer.save(2, extra={"a": 1})
    assert checkpointer.exit_code == 128 + signal.SIGUSR1
    found = latest(root)
    assert found is not None
    assert found.name == "checkpoint-2"


def test_without_a_signal_all_is_set_back(root: Path) -> None:
    """Handlers of others, which were called meanwhile, and somebody's wakeup descriptor, which got its bytes."""
    called: list[int] = []

    def other(number: int, frame: Any) -> None:
        called.append(number)

    read, write = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    before = signal.signal(signal.SIGUSR1, other)
    try:
        with AsyncCheckpointer(root, writer="thread") as checkpointer:
            checkpointer.stop_on(signal.SIGTERM)
            signal.raise_signal(signal.SIGUSR1)
            assert not checkpointer.should_stop(1)
            assert select.select([read], [], [], BOUND)[0]
            assert os.read(read, 10) == bytes([signal.SIGUSR1])
        with AsyncCheckpointer(root, writer="thread") as checkpointer:
            checkpointer.stop_on(signal.SIGUSR1)
        assert signal.getsignal(signal.SIGUSR1) is other
        assert signal.set_wakeup_fd(write, warn_on_full_buffer=False) == write
        with AsyncCheckpointer(root, writer="thread") as checkpointer:
            checkpointer.stop_on(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR1)
            assert checkpointer.should_stop(1)
            assert select.select([read], [], [], BOUND)[0]
        assert called == [signal.SIGUSR1, signal.SIGUSR1]
    finally:
        signal.set_wakeup_fd(-1)
        for left in list(reversed(stops._INSTALLED)):
            left._remove()
        signal.signal(signal.SIGUSR1, before)
        os.close(read)
        os.close(write)


def test_two_checkpointers_stop_for_one_signal(root: Path, tmp_path: Path) -> None:
    """Closed in whichever order, neither breaks the other, and a later one in the process hears of no earlier signal."""
    first = AsyncCheckpointer(root, writer="thread")
    second = AsyncCheckpointer(tmp_path / "other", writer="thread")
    first.stop_on(signal.SIGTERM)
    second.stop_on(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert first.should_stop(1)
    assert second.should_stop(1)
    first.close()
    second.close()
    with AsyncCheckpointer(root, writer="thread") as third:
        third.stop_on(signal.SIGTERM)
        assert not third.should_stop(1)


def test_a_request_is_known_while_c_code_runs(root: Path) -> None:
    """The handler waits for the call's end, the request does not: so the grace time begins with the signal."""
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        checkpointer.stop_on(signal.SIGTERM)
        known: list[float] = []
        begun = time.monotonic()
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 100_000)
        rounds = int(100_000 * 1.5 / (time.monotonic() - begun))  # about a second and a half in one call

        def watch() -> None:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: checkpointer.exit_code)
            known.append(time.monotonic())

        watcher = threading.Thread(target=watch)
        watcher.start()
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", rounds)
        ended = time.monotonic()
        watcher.join(BOUND)
        assert known[0] < ended - 0.3
        assert checkpointer.should_stop(1)


def test_forked_processes_are_left_alone(root: Path) -> None:
    """They inherit neither handler nor wakeup descriptor: a signal ends them, and the training hears nothing."""
    with AsyncCheckpointer(root) as checkpointer:
        checkpointer.stop_on(signal.SIGTERM)
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(BOUND)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        time.sleep(0.1)
        assert checkpointer.exit_code == 0
        assert not checkpointer.should_stop(1)


SECOND = """
import hashlib, os, signal, sys, time
from vembed_async_ckpt import AsyncCheckpointer

checkpointer = AsyncCheckpointer(sys.argv[1])
checkpointer.stop_on(signal.SIGTERM)
if sys.argv[2] == "saved":
    checkpointer.save(7, extra={"a": 1}).result(60)
print("ready", flush=True)
while True:  # a loop that asks nothing, mostly in C
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 3_000_000)
"""


@pytest.mark.parametrize("what", ["saved", "nothing"])
def test_a_second_signal_ends_the_process_at_once(tmp_path: Path, what: str) -> None:
    """And says which checkpoint there is. One that comes with the first, as launchers forward it, does not."""
    root = tmp_path / "root"
    process = subprocess.Popen(
        [sys.executable, "-c", SECOND, str(root), what], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.3)
    assert process.poll() is None
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=BOUND)[1]
    assert process.returncode == 143
    assert time.monotonic() - begun < 5.0
    newest = {
        "saved": f"the newest durable checkpoint is {root}/checkpoint-7",
        "nothing": "no checkpoint of this run is durable",
    }[what]
    assert f"a second SIGTERM: leaving at once; {newest}" in said


def test_asking_costs_less_than_a_microsecond(root: Path) -> None:
    """In the median; the machine may be busy, so the best of several rounds counts."""
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        checkpointer.stop_on(signal.SIGTERM)
        medians = []
        for turn in range(10):
            took = []
            for step in range(turn * 1000 + 1, turn * 1000 + 1001):
                begun = time.perf_counter_ns()
                checkpointer.should_stop(step)
                took.append(time.perf_counter_ns() - begun)
            medians.append(sorted(took)[500])
    assert min(medians) < 1000


class Held(LocalFilesystem):
    """A disk that writes when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def write(self, fd: int, data: Any, offset: int) -> int:
        assert self.go.wait(BOUND)
        return super().write(fd, data, offset)


def test_the_last_save_is_not_skipped(root: Path) -> None:
    """With `when_busy="skip"` the save of a stop waits for the one before it."""
    disk = Held()
    with use_filesystem(disk), AsyncCheckpointer(root, writer="thread", when_busy="skip") as checkpointer:
        checkpointer.stop_on(signal.SIGTERM)
        checkpointer.save(1, extra={"a": 1}).wait_staged(BOUND)
        assert checkpointer.save(2, extra={"a": 1}).state is SaveState.SKIPPED
        signal.raise_signal(signal.SIGTERM)
        assert checkpointer.should_stop(3)
        threading.Timer(0.3, disk.go.set).start()
        assert checkpointer.save(3, extra={"a": 1}).result(BOUND).step == 3


def test_close_keeps_to_the_grace_time(root: Path) -> None:
    """What a thread of this process has not written then is lost, and that is an error."""
    disk = Held()
    with use_filesystem(disk):
        checkpointer = AsyncCheckpointer(root, writer="thread")
        checkpointer.stop_on(signal.SIGTERM, grace=1.0)
        signal.raise_signal(signal.SIGTERM)
        checkpointer.save(1, extra={"a": 1}).wait_staged(BOUND)
        begun = time.monotonic()
        with pytest.raises(TimeoutError, match="checkpoint-1 is not on disk; the writer is a thread of this process"):
            checkpointer.close()
        assert time.monotonic() - begun < 5.0
        disk.go.set()
        AsyncCheckpointer(root, writer="thread").close()


@pytest.mark.parametrize(("drain", "grace"), [("staged", 30.0), ("committed", 0.2)])
def test_what_is_staged_is_left_to_the_writer(
    root: Path, caplog: pytest.LogCaptureFixture, drain: Any, grace: float
) -> None:
    """By choice, or as the last resort, which is said. `close()` returns at once, and again; the checkpoint comes."""
    model = torch.nn.Linear(3000, 3000)
    checkpointer = AsyncCheckpointer(root)
    checkpointer.stop_on(signal.SIGTERM, drain=drain, grace=grace)
    checkpointer.prewarm(model=model)
    checkpointer.wait(BOUND)
    pid = checkpointer.statistics()["writer_pid"]
    os.kill(pid, signal.SIGSTOP)  # it cannot accept anything yet
    signal.raise_signal(signal.SIGTERM)
    assert checkpointer.should_stop(5)
    handle = checkpointer.save(5, model=model)
    if drain == "staged":
        threading.Timer(0.3, os.kill, (pid, signal.SIGCONT)).start()
    else:
        os.kill(pid, signal.SIGCONT)
        handle.wait_staged(BOUND)
        os.kill(pid, signal.SIGSTOP)
        assert handle.state in (SaveState.STAGED, SaveState.WRITING)
        until(lambda: checkpointer._stop.left() < 0)  # type: ignore[union-attr]
    begun = time.monotonic()
    checkpointer.close()
    checkpointer.close()
    assert time.monotonic() - begun < 2.0
    assert ("the grace time is over" in caplog.text) == (drain == "committed")
    os.kill(pid, signal.SIGCONT)
    AsyncCheckpointer(root).close()  # waits for the writer that was left behind
    found = latest(root)
    assert found is not None
    assert found.name == "checkpoint-5"


@pytest.mark.parametrize("drain", ["committed", "staged"])
def test_random_signals(tmp_path: Path, drain: str) -> None:
    """A plain loop: each time 143, and the next one resumes from the step at which the signal was answered."""
    assert play("plain", "--rounds", "10", "--drain", drain) == 10


def test_random_signals_to_the_whole_group(tmp_path: Path) -> None:
    """They kill the DataLoader's workers too, and the step under way is not lost."""
    assert play("group", "--rounds", "5") == 5


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_process_one_of_a_pid_namespace(tmp_path: Path) -> None:
    """The writer ends with it; what was committed is there."""
    assert play("pid1", "--rounds", "2") == 2


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "arguments",
    [["plain", "--rounds", "300"], ["plain", "--rounds", "100", "--drain", "staged"], ["pid1", "--rounds", "20"]],
)
def test_many_random_signals(arguments: list[str]) -> None:
    assert play(*arguments) == int(arguments[2])


def play(*arguments: str) -> int:
    """How many rounds of `benchmarks/faults/stops.py` were right."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": PACKAGE},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return int(json.loads(result.stdout.splitlines()[-1])["right"])


@pytest.mark.parametrize(
    ("variable", "why"), [("SLURM_JOB_ID", "Slurm ends all"), ("KUBERNETES_SERVICE_HOST", "a pod ends as a whole")]
)
def test_where_the_platform_ends_the_writer_too_staged_is_warned_of(
    root: Path, monkeypatch: pytest.MonkeyPatch, variable: str, why: str
) -> None:
    """When it is asked for; "committed" is not."""
    monkeypatch.setenv(variable, "1")
    with AsyncCheckpointer(root) as checkpointer, pytest.warns(UserWarning, match=why):
        checkpointer.stop_on(signal.SIGTERM, drain="staged")
    with AsyncCheckpointer(root) as checkpointer:
        checkpointer.stop_on(signal.SIGTERM)


@pytest.mark.parametrize(
    ("signals", "further", "said"),
    [
        ((), {}, "without a signal"),
        (("SIGTERM",), {}, "'SIGTERM' is no signal"),
        ((True,), {}, "True is no signal"),
        ((99,), {}, "99 is no signal"),
        ((signal.SIGKILL,), {}, "SIGKILL cannot ask for a stop"),
        ((signal.SIGTERM,), {"drain": "never"}, "drain is 'never'; use 'committed' or 'staged'"),
        ((signal.SIGTERM,), {"drain": "staged"}, "writer='thread' ends with the trainer"),
        ((signal.SIGTERM,), {"grace": 0}, "grace is 0"),
        ((signal.SIGTERM,), {"grace": float("inf")}, "grace is inf"),
        ((signal.SIGTERM,), {"grace": "30"}, "grace is '30'"),
    ],
)
def test_what_makes_no_sense_is_refused(root: Path, signals: Any, further: dict[str, Any], said: str) -> None:
    """By name, and no handler is set."""
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        with pytest.raises(ValueError, match=said):
            checkpointer.stop_on(*signals, **further)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with pytest.raises(ValueError, match=r"should_stop\(\) needs stop_on\(\)"):
            checkpointer.should_stop(1)
        checkpointer.stop_on(signal.SIGTERM)
        with pytest.raises(ValueError, match="was called before"):
            checkpointer.stop_on(signal.SIGUSR1)


def test_only_the_main_thread_can_take_signals(root: Path) -> None:
    """As Python has it; said where it is asked for."""
    errors: list[Exception] = []

    def ask() -> None:
        try:
            checkpointer.stop_on(signal.SIGTERM)
        except ValueError as error:
            errors.append(error)

    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert "outside of the main thread" in str(errors[0])
    logging.getLogger("vembed_async_ckpt").debug("done")
