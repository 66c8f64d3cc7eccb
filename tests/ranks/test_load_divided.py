"""What one process saved is loaded into models that are divided among ranks (gloo, on the CPU)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer, load

from . import networks
from .launch import run_ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Checkpoints of two steps by one process, the state that was saved first, and how its training goes on.

    The convolution is channels_last, so its optimizer state does not lie in row-major order in optimizer.bin.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks compute
    directory = tmp_path_factory.mktemp("saved")
    training = networks.Training(0, lambda net: net.to(memory_format=torch.channels_last))
    training.steps(range(10, 13))
    state = networks.whole_state(training)
    with AsyncCheckpointer(directory, writer="thread") as checkpointer:
        checkpointer.save(7, **training.parts()).result(30)
        draw = float(torch.rand(()))
        training.step(13)
        checkpointer.save(8, **training.parts()).result(30)
    large = networks.Large()
    optimizer = torch.optim.AdamW(large.parameters())
    large(torch.ones(1, 1448)).sum().backward()
    optimizer.step()
    with AsyncCheckpointer(directory / "large", writer="thread") as checkpointer:
        checkpointer.save(1, model=large, optimizer=optimizer).result(30)
    del large, optimizer
    model, rows = networks.rows()
    networks.row_steps(model, rows, 2)
    with AsyncCheckpointer(directory / "rows", writer="thread") as checkpointer:
        checkpointer.save(1, model=model, optimizer=rows).result(30)
    resumed = networks.Training(9)
    load(directory / "checkpoint-7", **resumed.parts())
    losses = resumed.steps(range(3))
    further = networks.row_steps(model, rows, 2)
    expected = {
        "rows": further,
        "state": state,
        "losses": losses,
        "rates": resumed.scheduler.get_last_lr(),
        "draw": draw,
    }
    torch.save(expected, directory / "expected.pt")
    yield directory
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("world_size", "ways"), [(2, ["fsdp2", "fsdp1", "tp", "ddp"]), (4, ["fsdp2", "fsdp1", "hsdp", "fsdp2_tp"])]
)
def test_each_rank_gets_what_it_holds(saved: Path, world_size: int, ways: list[str]):
    """Model, optimizer and scheduler, into objects that have stepped and, on two ranks, into new ones.

    The state, gathered by torch itself, is what was saved, and the training goes on with the same losses. A rank reads
    what it holds, and takes little more memory.
    """
    expected = torch.load(saved / "expected.pt", weights_only=True)
    reports = run_ranks("restoring.py", world_size, str(saved), *ways)
    for rank, report in enumerate(reports):
        assert list(report["ways"]) == ways
        if world_size == 2:
            assert report["rows"]["losses"] == pytest.approx(expected["rows"], rel=1e-6, abs=0.0)
            assert "0.rows of the optimizer has shape (9,), its parameter (9, 6)" in report["rows"]["refused"]
        for way, size in report["measured"].items():
            own = size["weights"] + size["state"]
            assert own < 96 << 20, way
            assert size["read"] < own + (1 << 20), way
            assert size["grown"] < size["state"] + (16 << 20), way
        for way, found in report["ways"].items():
            for objects, seen in found.items():
                assert seen["differing"] == [], (way, objects)
                # tensor parallelism adds in another order
                tolerance = 1e-5 if way in ("tp", "fsdp2_tp") else 0.0
                assert seen["losses"] == pytest.approx(expected["losses"], rel=tolerance, abs=0.0), (way, objects)
                assert seen["rates"] == expected["rates"]
                assert (seen["draw"] == expected["draw"]) == (rank == 0), "derived from the state of rank 0"
            assert found["stepped"]["in place"], "the state of an optimizer that has stepped is overwritten"
            assert len({seen["draw"] for seen in found.values()}) == 1
    assert len({report["ways"][ways[0]]["stepped"]["draw"] for report in reports}) == world_size


def test_ranks_load_together_or_not_at_all(saved: Path, tmp_path: Path):
    """Whatever is wrong on one rank is refused on both, before anything is changed, with the reason."""
    shutil.copytree(saved, tmp_path / "copy")
    first, second = run_ranks("refusing.py", 2, str(tmp_path / "copy"))
    for case in ("one refuses", "one is late", "other directories", "another model", "changed bytes"):
        assert first[case]["unchanged"], case
        assert second[case]["unchanged"], case
    assert "not loaded, and nothing was changed, because rank 1: " in first["one refuses"]["raised"]
    assert "nothing is named 'no.such.name'" in first["one refuses"]["raised"]
    assert "not loaded" not in second["one refuses"]["raised"]
    for report in (first, second):
        assert "rank 1 did not call load() within 1 s" in report["one is late"]["raised"]
        assert "rank 1 loads" in report["other directories"]["raised"]
        assert "blocks.0.up.weight has shape (17, 10), saved was (16, 10)" in report["another model"]["raised"]
        assert report["another model"]["what fits"]
        assert report["whole"]["raised"] == "nothing"
        assert report["changed bytes"]["raised"].startswith("CorruptCheckpoint: ")
        assert "optimizer.bin: content differs" in report["changed bytes"]["raised"]
        assert report["a failing disk"]["raised"].startswith("CorruptCheckpoint: ")
        assert report["another save"] == {"raised": "nothing", "unchanged": False, "step": 8}
        assert report["goes on"]
    hashed = first["changed bytes"]["hashed"], second["changed bytes"]["hashed"]
    files = {path.name for path in (saved / "checkpoint-7").iterdir()} - {"vembed_manifest.json"}
    assert set(hashed[0]) | set(hashed[1]) == files
    assert len(hashed[0]) + len(hashed[1]) == len(files)
    assert "some objects are changed already, so load another checkpoint" in first["a failing disk"]["raised"]
