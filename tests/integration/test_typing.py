"""The surface as mypy and pyright see it from a program that uses it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "typing"
CHECKERS = {
    "mypy": ["mypy", "--strict", "--follow-imports=silent", "--config-file=", "--cache-dir=/dev/null"],
    "pyright": ["pyright", "--pythonpath", sys.executable],
}


@pytest.fixture(scope="module", params=CHECKERS)
def errors(request: pytest.FixtureRequest) -> set[tuple[str, int]]:
    """(file, line) of each error that a type checker finds in the programs here."""
    command = [sys.executable, "-m", *CHECKERS[request.param], "consumer.py", "wrong.py"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=HERE)
    found = {(file, int(line)) for file, line in re.findall(r"(\w+\.py):(\d+):.*error", result.stdout)}
    assert found, result.stdout + result.stderr  # it ran: wrong.py has errors
    return found


def test_a_program_that_is_right_has_no_errors(errors: set[tuple[str, int]]) -> None:
    """Every public name has the type that the program expects."""
    assert sorted(line for file, line in errors if file == "consumer.py") == []


def test_mistakes_are_found(errors: set[tuple[str, int]]) -> None:
    """Options and modes are literals: each mistake is reported in its line, and nothing else is."""
    lines = (HERE / "wrong.py").read_text().splitlines()
    expected = [number for number, line in enumerate(lines, 1) if line.endswith("# wrong")]
    assert sorted(line for file, line in errors if file == "wrong.py") == expected
