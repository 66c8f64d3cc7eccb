"""Staging, guard and restore on a second device type that runs on the CPU: in processes of their own, with nothing skipped."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(config: pytest.Config, tmp_path: Path, file: str, *options: str) -> tuple[int, dict[str, int], str]:
    """(return code, how many tests ended in which way, output) of one file of tests."""
    cache = config.cache.mkdir("second_device")  # type: ignore[union-attr]
    command = [sys.executable, "-X", "faulthandler", "-m", "pytest", "-p", "tests.gpu.second_device.plugin", "-q"]
    command += ["-p", "no:cacheprovider", f"--second-device-cache={cache}", f"--basetemp={tmp_path / 'inner'}"]
    done = subprocess.run(
        [*command, *options, str(HERE / file)],
        cwd=HERE.parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    last = done.stdout.rstrip().rpartition("\n")[2]
    counts = {how: int(number) for number, how in re.findall(r"(\d+) (passed|failed|skipped|errors?|deselected)", last)}
    return done.returncode, counts, done.stdout


@pytest.mark.parametrize(
    "file", ["second_device/cases_copies.py", "second_device/cases_current.py", "second_device/cases_mutants.py"]
)
def test_cases_of_the_device(pytestconfig: pytest.Config, tmp_path: Path, file: str) -> None:
    code, counts, output = run(pytestconfig, tmp_path, file)
    assert (code, set(counts)) == (0, {"passed"}), output


# What is read into there is memory of the host that is mapped read-only.
_OF_THE_HOST = "test_memory_that_cannot_be_written_is_not_blamed_on_the_file"


def test_the_restore_suite_on_the_device(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """All of its tests, with every new tensor on the device, but the one that is about memory of the host."""
    code, counts, output = run(
        pytestconfig,
        tmp_path,
        "../integration/test_restore.py",
        "--on-device",
        f"--deselect=tests/integration/test_restore.py::{_OF_THE_HOST}",
    )
    assert (code, set(counts), counts.get("deselected")) == (0, {"passed", "deselected"}, 1), output
    assert counts["passed"] > 100
