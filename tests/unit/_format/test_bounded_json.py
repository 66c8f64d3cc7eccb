"""JSON is read with at most 16 times its bytes and 64 MiB, and data that people save is never refused for it."""

from __future__ import annotations

import itertools
import json
import string
import tracemalloc
from collections.abc import Iterator

import pytest

from vembed_async_ckpt import PlanError
from vembed_async_ckpt._format import bounded_json

SIZE = 3 << 20


@pytest.fixture(autouse=True)
def small_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that texts of a few megabytes show what takes gigabytes with the real one."""
    monkeypatch.setattr(bounded_json, "ALLOWANCE", 1 << 20)
    monkeypatch.setattr(bounded_json, "HARMLESS", 0)


def repeated(item: str) -> bytes:
    return f"[{item * (SIZE // len(item.encode()))}0]".encode()


def different(item: str) -> Iterator[str]:
    """`item` with another key of four characters each time."""
    size = 0
    for letters in itertools.product(string.ascii_letters, repeat=4):
        size += len(item)
        if size > SIZE:
            return
        yield item.replace("KEY!", "".join(letters))


HOSTILE = {
    "empty lists": repeated("[],"),
    "empty objects": repeated("{},"),
    "objects with a space": repeated("{ },"),
    "lists of one": repeated("[0],"),
    "lists of one number": repeated("[-6],"),
    "objects of one": repeated('{"":0},'),
    "objects of lists": repeated('{"a":[0]},'),
    "objects of five": repeated('{"a":0,"b":0,"c":0,"d":0,"e":0},'),
    "objects of six": repeated('{"a":0,"b":0,"c":0,"d":0,"e":0,"f":0},'),
    "different keys": ("{" + "".join(different('"KEY!":0,')) + '"z":0}').encode(),
    "different keys of numbers": ("{" + "".join(different('"KEY!":-6,')) + '"z":0}').encode(),
    "objects of different keys": ("[" + "".join(different('{"KEY!":0},')) + "0]").encode(),
    "escaped keys": ("[" + "".join(different('{"\\u0101KEY!":0},')) + "0]").encode(),
    "small numbers": repeated("-6,"),
    "numbers": repeated("300,"),
    "wide text of numbers": b'["\xf0\x9f\x98\x80",' + b"-6," * (SIZE // 3) + b"0]",
    "short texts": repeated('"ab",'),
    "short wide texts": repeated('"\u0101",'),
    "widened texts": repeated('"\U0001f600aaaaaaaaaaaaaaaa",'),
    "escaped texts": repeated('"\\ud83d\\ude00aaaaaaaaaaaa",'),
    "one wide text": f'["\U0001f600{"a" * SIZE}"]'.encode(),
    "deep": b"[" * SIZE,
    "deep objects": b'{"a":' * (SIZE // 5),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_no_text_takes_more_memory_than_the_bound(content: bytes) -> None:
    """Refused or read: both within the bound, whose input counts too."""
    tracemalloc.start()
    try:
        bounded_json.loads(content)
    except (ValueError, RecursionError):
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak + len(content) <= 16 * len(content) + bounded_json.ALLOWANCE


SAVED = {
    "numbers": repeated("12345,"),
    "fractions": repeated("0.123456,"),
    "digits": repeated("1,0,"),
    "log entries": repeated('{"epoch":1.25,"grad_norm":0.5123456,"learning_rate":1e-05,"loss":1.2345,"step":12300},'),
    "texts": repeated('"a sentence of a few words",'),
    "texts in another script": repeated('"\u0434\u043b\u0438\u043d\u043d\u044b\u0439 \u0442\u0435\u043a\u0441\u0442",'),
    "a long text": f'["{"words, and more: {words} " * (SIZE // 24)}"]'.encode(),
    "tensors": ("{" + "".join(different('"KEY!.exp_avg_sq":["float32",[2304,768],1234567890],')) + '"z":0}').encode(),
    "names of a model": ("{" + "".join(different('"model.layers.KEY!.mlp.weight":"layers.KEY!.mlp.weight",')) + '"z":0}').encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
def test_what_people_save_is_not_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the allowance in proportion: 3 MiB here stand for files of 64 MiB."""
    monkeypatch.setattr(bounded_json, "ALLOWANCE", 12 << 20 if name == "tensors" else 3 << 20)
    assert bounded_json.loads(SAVED[name]) == json.loads(SAVED[name])


def test_what_could_not_be_read_back_is_refused_when_it_is_written() -> None:
    with pytest.raises(
        PlanError, match=r"^state\.json would have .* lists and objects in .* save large data as tensors"
    ):
        bounded_json.dumps([[]] * SIZE, file="state.json")
    assert bounded_json.loads(bounded_json.dumps({"a": [1, None, "\u00e9"]}, file="x")) == {"a": [1, None, "\u00e9"]}


def test_small_texts_are_not_even_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert bounded_json.excess(b"[" * 1000) is None
    with pytest.raises((ValueError, RecursionError)):
        bounded_json.loads(b"[" * 100_000)
