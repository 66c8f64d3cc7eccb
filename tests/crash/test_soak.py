"""The soak of `benchmarks/faults` runs: it finds no harm, and notices harm that is done."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from vembed_async_ckpt._disk.catalog import scan

from .faults import missing
from .nursery import Nursery

_FAULTS = Path(__file__).parents[2] / "benchmarks" / "faults"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    """The script, imported by its path."""
    found = sys.modules.get("soak")
    if found is None:
        spec = importlib.util.spec_from_file_location("soak", _FAULTS / "soak.py")
        assert spec is not None
        assert spec.loader is not None
        found = sys.modules["soak"] = importlib.util.module_from_spec(spec)
        sys.path.append(str(_FAULTS))  # for the modules beside it
        spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def nursery(soak: ModuleType) -> Iterator[Nursery]:
    """Forks the soak's trainers."""
    found = Nursery("soak_trainer", str(_FAULTS))
    yield found
    found.close()


def test_kills(soak: ModuleType, nursery: Nursery, tmp_path: Path) -> None:
    """A few kills of each kind leave everything that was promised."""
    figures = soak.soak(tmp_path, kills=9, cuts=0, seed=1, roots=1, nursery=nursery)
    assert figures["violations"] == []
    assert figures["faults_in_all"] >= 9
    assert figures["saves"]["committed, acknowledged"] > 9
    assert [
        kind for kind in ("trainer", "writer", "both") if not any(k.startswith(kind) for k in figures["faults"])
    ] == []


@pytest.mark.root
@pytest.mark.skipif(bool(missing("xfs") or missing("ext4")), reason=missing("xfs") or missing("ext4"))
def test_power_cuts(soak: ModuleType, nursery: Nursery, tmp_path: Path) -> None:
    """A few power cuts on each file system leave everything that was committed."""
    figures = soak.soak(tmp_path, kills=0, cuts=4, seed=1, nursery=nursery)
    assert figures["violations"] == []
    assert figures["faults_in_all"] == 4


@pytest.mark.parametrize("harm", ["lost", "altered", "back again", "file of nobody"])
def test_harm_is_noticed(
    soak: ModuleType, nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    """What somebody does to a checkpoint between a fault and the look at it is a violation."""
    real = soak.latest
    done: list[str] = []

    def latest(root: str) -> Path | None:
        found = real(root)
        entries = scan(root)
        if done or len(entries) < 1 or found is None:
            return found
        if harm == "lost":
            shutil.rmtree(found)
        elif harm == "altered":
            with (found / "model.safetensors").open("r+b") as file:
                file.seek(-4, 2)
                file.write(b"\0\0\0\0")
        elif harm == "back again":
            shutil.copytree(found, found.with_name("checkpoint-987654"))
        else:
            (found / "notes-7.txt").write_text("of nobody known")
        done.append(harm)
        return found

    monkeypatch.setattr(soak, "latest", latest)
    figures = soak.soak(tmp_path, kills=6, cuts=0, seed=3, roots=1, nursery=nursery)
    assert done
    assert figures["violations"]
