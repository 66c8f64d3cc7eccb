"""Reads JSON with bounded memory: at most 16 times the input and 64 MiB.

Python objects take up to 36 times the bytes of their JSON text. So the objects are counted before any is made. What
would take too much is refused, when it is written as well as when it is read.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ..errors import PlanError

TIMES, ALLOWANCE = 16, 64 << 20  # the bound in bytes: TIMES * input + ALLOWANCE
HARMLESS = 2 << 20  # bytes: no JSON takes more than 40 times its size

# Bytes of CPython's objects (3.10 to 3.14), with the tables of lists and dicts just after they have grown.
_ARRAY, _OBJECT, _ENTRY, _KEY, _TEXT, _NUMBER = 96, 240, 76, 256, 73, 41
_SHORT_KEY = re.compile(rb'"((?:[^"\\]|\\.){0,64})"[ \t\r\n]*:', re.DOTALL)  # longer ones are no matter


def excess(content: bytes) -> str | None:
    """Return why `loads` would refuse this content for its size, or None."""
    budget = TIMES * len(content) + ALLOWANCE
    if len(content) <= HARMLESS:
        return None
    objects, arrays, colons = content.count(b"{"), content.count(b"["), content.count(b":")
    text = 1 if content.isascii() and b"\\u" not in content else 4  # bytes per character
    texts = max(content.count(b'"') // 2 - colons, 0)
    numbers = max(content.count(b",") - texts, 0)
    need = (1 + text) * len(content) + text * max(len(content) - 2 * numbers, 0)
    need += _OBJECT * objects + _ENTRY * max(colons - objects, 0) + _ARRAY * arrays + _TEXT * texts
    need += min(
        _NUMBER * numbers, _NUMBER * len(content) // 3
    )  # 0 to 9 cost less, others have two characters and a comma
    keys: set[int] = set()
    if need <= budget < need + _KEY * colons:  # a key that is used again costs nothing: count the different ones
        for match in _SHORT_KEY.finditer(content):
            keys.add(hash(match[1]))
            if need + _KEY * len(keys) > budget:
                break
    if need + _KEY * len(keys) > budget:
        return f"{objects + arrays} lists and objects in {len(content)} bytes, which would take too much memory"
    return None


def dumps(value: Any, *, file: str) -> bytes:
    """Return a value as JSON. Raises `PlanError` that names `file` if `loads` would refuse it."""
    return checked(json.dumps(value, separators=(",", ":")), file=file)


def checked(text: str, *, file: str) -> bytes:
    """Return a JSON text as bytes. Raises as `dumps` does."""
    content = text.encode()
    if reason := excess(content):
        raise PlanError(f"{file} would have {reason} when it is read; save large data as tensors or arrays")
    return content


def loads(content: bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError or RecursionError if it is malformed or too large to read."""
    if reason := excess(content):
        raise ValueError(f"it has {reason}")
    return json.loads(content)
