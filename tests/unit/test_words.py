"""Names that strangers could not place are gone, and stay gone."""

from __future__ import annotations

import io
import tokenize
from pathlib import Path

import pytest

import vembed_async_ckpt

PACKAGE = Path(vembed_async_ckpt.__file__).parent
COINED = {
    *("Alone", "Meeting", "Meetings", "Truth", "Book", "Earned", "Division", "Late", "Tails"),
    *("GATE", "SINK", "INSTEAD", "_Doomed", "_be_quiet", "hurry", "let_go"),
}


def names_in(source: str) -> set[str]:
    """Every identifier in a program."""
    return {t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.NAME}


def test_no_coined_name_is_in_the_package() -> None:
    found = {str(path): COINED & names_in(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    assert len(found) > 100
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize("source", ["class Truth: ...", "x.let_go()", "from a import GATE as b"])
def test_a_coined_name_is_found(source: str) -> None:
    """Wherever it stands in the code."""
    assert COINED & names_in(source)
