"""What people install: a wheel, used without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel was installed, without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(CHECKOUT)], folder)
    (wheel,) = folder.glob("*.whl")
    run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], folder)
    return folder / "site"


def run(command: list[str], folder: Path, **environment: str) -> str:
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=250, cwd=folder, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_wheel_holds_the_package_and_nothing_else(installed: Path) -> None:
    """Every module and py.typed; no tests, no benchmarks."""
    (wheel,) = installed.parent.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = CHECKOUT / "vembed_async_ckpt"
    expected = {str(p.relative_to(CHECKOUT)) for p in package.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert inside == expected
    assert "vembed_async_ckpt/py.typed" in inside


def test_the_demo_runs_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    """It trains, saves with a writer process, and loads back, all from the installed package."""
    where = [sys.executable, "-c", "import vembed_async_ckpt; print(vembed_async_ckpt.__file__)"]
    assert run(where, tmp_path, PYTHONPATH=str(installed)).startswith(str(installed))
    demo = [sys.executable, "-m", "vembed_async_ckpt", "demo", "--size", "tiny", "--steps", "8"]
    demo += ["--save-every", "4", "--out", str(tmp_path / "run")]
    run(demo, tmp_path, PYTHONPATH=str(installed))
    listed = [sys.executable, "-m", "vembed_async_ckpt", "ls", str(tmp_path / "run")]
    assert "complete" in run(listed, tmp_path, PYTHONPATH=str(installed))
