"""How many inputs each parser is given: a few in every run, many with `-m slow`."""

from __future__ import annotations

import pytest

from .strategies import FEW, MANY


@pytest.fixture(params=[pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)])
def examples(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    return count
