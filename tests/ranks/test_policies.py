"""Several ranks get the same answer from `should_save()`, whatever decides it."""

from __future__ import annotations

from pathlib import Path

from vembed_async_ckpt._disk.catalog import scan

from .launch import run_ranks


def test_all_ranks_save_at_the_same_steps(tmp_path: Path) -> None:
    """Each policy saves, at the same steps on all ranks, and each checkpoint has the part of every rank."""
    world_size = 3
    ranks = run_ranks("policies.py", world_size, str(tmp_path))
    for name, steps in ranks[0]["saved"].items():
        assert [rank["saved"][name] for rank in ranks] == [steps] * world_size, name
        entries = scan(str(tmp_path / name))
        assert [entry.manifest.step for entry in entries if entry.manifest] == steps, name
        for entry in entries:
            states = list(Path(entry.path).glob("vembed_rank_state-*")) or list(
                Path(entry.path).glob("random_states_*")
            )
            assert len(states) == (1 if name == "request" else world_size), (
                entry.path,
                sorted(p.name for p in Path(entry.path).iterdir()),
            )
    saved = ranks[0]["saved"]
    assert len(saved["minutes"]) >= 3
    assert set(range(100, max(saved["minutes"]), 100)) <= set(saved["minutes"]), "every(steps=100) is exact"
    assert len(saved["apart"]) >= 3
    assert len(saved["budget"]) >= 2
    assert len(saved["limit"]) == 1
    assert len(saved["request"]) == 1
    assert saved["best"] == list(range(1, 21)), "the loss of the first rank falls until step 20"
    assert ranks[0]["said"] == ""
    assert all("step 1: rank 0 did not say whether to save" in rank["said"] for rank in ranks[1:])
