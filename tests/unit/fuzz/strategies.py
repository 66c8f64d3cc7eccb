"""Input that nobody would write: texts and values near good ones, and how a parser is held to its promises."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TIMES, ALLOWANCE = 16, 64 << 20  # bytes of memory: at most TIMES * input + ALLOWANCE
SECONDS = 5.0  # of CPU, for one input of some kilobytes

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 255, 1 << 31, 1 << 63, -(1 << 63), 1 << 64, 10**400, 0.5, -0.0, float("inf"), float("nan"),
    "", "a", "\0", "/", "..", "../x", "/etc/passwd", "\ud800", "\U0001f600", "x" * 300, "F32", "self", "$tensor", "__metadata__",
    [], [[]], {}, {"": None}, {"$tensor": 1}, {"$raw_array": [["<f8", False, 1 << 40], None]}, {"$fraction": [["1e9999", 1], None]},
    {"$enum": [["os", "system", "x"], None]}, {"$dataclass": [["subprocess", "Popen"], {}]}, {"$range": [[0, 1 << 70], None]},
]  # fmt: skip

values = st.recursive(
    st.sampled_from(NASTY) | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def near(draw: st.DrawFn, good: Any) -> Any:
    """A JSON value like `good`, with one to three of its parts changed, removed, added or exchanged."""
    result = good
    for _ in range(draw(st.integers(1, 3))):
        result = _changed(draw, result)
    return result


def _changed(draw: st.DrawFn, value: Any) -> Any:
    if isinstance(value, dict) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(value)))
        match draw(st.integers(0, 7)):
            case 0:
                return {name: item for name, item in value.items() if name != key}
            case 1:
                return {**value, draw(st.text(max_size=8)): draw(values)}
            case _:
                return {**value, key: _changed(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 5)):
        at = draw(st.integers(0, len(value) - 1))
        match draw(st.integers(0, 5)):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return [*value, draw(values)]
            case 2:
                return [*value[at:], *value[:at]]
            case _:
                return [*value[:at], _changed(draw, value[at]), *value[at + 1 :]]
    return draw(values)


@st.composite
def bytes_near(draw: st.DrawFn, good: bytes) -> bytes:
    """Bytes like `good`: with flips, cuts, insertions and repetitions."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 4)):
            case 0:
                del data[at:]
            case 1:
                data[at:at] = draw(st.binary(max_size=16))
            case 2 if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 3:
                data[at : at + draw(st.integers(0, 40))] = b""
            case _:
                data += data[at : at + 50]
    return bytes(data)


def fuzz(
    strategy: st.SearchStrategy[Any],
    parse: Callable[[Any], object],
    *allowed: type[BaseException],
    examples: int,
    size: Callable[[Any], int] = len,
) -> None:
    """Let `parse` read many inputs.

    It must return or raise one of the `allowed` errors, in time, and take no more memory than it may. Few examples are
    always the same ones; many are others each time, and hypothesis prints how to repeat the one that fails.
    """

    @settings(
        max_examples=examples, derandomize=examples <= FEW, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def check(content: Any) -> None:
        begun = time.process_time()
        tracemalloc.start()
        try:
            parse(content)
        except allowed:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak <= TIMES * size(content) + ALLOWANCE
        assert time.process_time() - begun < SECONDS

    check()


FEW, MANY = 40, 5000
