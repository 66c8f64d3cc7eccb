"""The writer keeps a shipper running as long as there is something to ship. The shipper here is a script of two lines."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vembed_async_ckpt._writer import shipping
from vembed_async_ckpt._writer.shipping import Shippers, are_waiting

HELLO = (
    "import os, sys; root, control, report = sys.argv[1], *map(int, sys.argv[2:4]); "
    'os.write(report, b\'{"event": "hello"}\\n\'); '
)


class Heard(queue.Queue[dict[str, Any]]):
    def next(self) -> dict[str, Any]:
        return self.get(timeout=20)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def shippers(root: Path, heard: Heard) -> Iterator[Shippers]:
    made = Shippers(str(root), heard.put)
    yield made
    made.close()
    assert made._thread is None or (made._thread.join(20), not made._thread.is_alive())[1]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


def script(monkeypatch: pytest.MonkeyPatch, rest: str) -> None:
    monkeypatch.setattr(shipping, "_BOOTSTRAP", HELLO + rest)


def test_it_is_started_once_and_woken_later(shippers: Shippers, heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    script(
        monkeypatch, "[os.write(report, b'{\"event\": \"woken\"}\\n') for _ in iter(lambda: os.read(control, 1), b'')]"
    )
    shippers.wake()
    assert heard.next() == {"event": "hello"}
    for _ in range(2):
        shippers.wake()
        assert heard.next() == {"event": "woken"}


def test_one_that_dies_is_replaced_and_its_last_words_are_told(
    shippers: Shippers, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, "os.write(2, b'no network'); os.write(report, b'{\"event\": cut'); os._exit(3)")
    shippers.wake()
    assert heard.next() == {"event": "hello"}
    died = heard.next()
    assert (died["event"], died["phase"]) == ("after_commit", "failed")
    assert died["detail"].endswith("ended with 3: no network")
    assert heard.next() == {"event": "unshipped", "save_ids": [], "failures": 1, "first": False}
    assert heard.next() == {"event": "hello"}, "the next one"


def test_one_that_cannot_be_started_is_said_and_tried_again(
    shippers: Shippers, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, "os.read(control, 1)")
    with monkeypatch.context() as patch:
        patch.setattr(shipping.sys, "executable", "/no/such/python")
        shippers.wake()
        assert "no shipper could be started" in heard.next()["detail"]
        assert heard.next()["failures"] == 1
    assert heard.next() == {"event": "hello"}


def test_one_with_nothing_to_do_is_waited_for(root: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, 'os.write(report, b\'{"event": "unshipped", "save_ids": []}\\n\'); os.read(control, 1)')
    made = Shippers(str(root), heard.put)
    made.wake()
    assert [heard.next()["event"], heard.next()["event"]] == ["hello", "unshipped"]
    thread = made._thread
    assert thread is not None
    made.close()
    assert not thread.is_alive()
    made.wake()
    made.close()
    assert heard.empty()


def test_one_that_still_ships_is_left_alone(root: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer may end; the shipper goes on until all is shipped, and nothing it says reaches anybody."""
    script(
        monkeypatch,
        "os.read(control, 1); open(root + '/shipped', 'w').close(); os.write(report, b'{\"event\": \"late\"}\\n')",
    )
    made = Shippers(str(root), heard.put)
    made.wake()
    heard.next()
    thread = made._thread
    assert thread is not None
    made.close()
    thread.join(20)
    assert (root / "shipped").exists()
    assert heard.empty()


def test_closing_ends_the_pause_before_the_next_one(root: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "_LONGEST_PAUSE", 1000.0)
    script(monkeypatch, "os._exit(1)")
    made = Shippers(str(root), heard.put)
    with threading.Lock():
        made.wake()
        while heard.next()["event"] != "unshipped":
            pass
    made.close()
    assert made._thread is not None
    made._thread.join(20)
    assert not made._thread.is_alive()


def test_an_earlier_run_left_nothing(root: Path) -> None:
    assert not are_waiting(str(root))
    assert not are_waiting(str(root / "nothing"))
