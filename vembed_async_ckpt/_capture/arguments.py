"""Converts arguments in their various forms to one type, or refuses them."""

from __future__ import annotations

import operator
import re
from typing import Any

from ..errors import PlanError


def step_number(step: Any) -> int:
    """Return a step as an int. Accepts an int, a numpy integer, or a tensor of one integer without dimensions.

    Raises `PlanError` for anything else, including a bool and a negative number.
    """
    dtype = str(getattr(step, "dtype", ""))
    try:
        if isinstance(step, bool) or dtype.endswith("bool") or getattr(step, "ndim", None):
            raise TypeError
        number = operator.index(step)
    except TypeError:
        number = -1
    if number < 0:
        raise PlanError(f"step is {step!r}; use a whole number of at least 0")
    return number


def size_in_bytes(option: str, value: Any) -> int:
    """Return a size in bytes, from a whole number or a text such as "8GB" or "512MiB".

    Raises ValueError naming the option.
    """
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", value.lower())
        if found is not None and (found[2] or not found[3]):
            base = 1024 if found[3] else 1000
            return int(float(found[1]) * base ** (" kmgt".index(found[2] or " ")))
    elif not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise ValueError(f"{option} is {value!r}; use a number of bytes, or a text like '8GB' or '512MiB'")
