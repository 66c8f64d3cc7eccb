"""Every engine that is installed saves what it is given, and the catalog says the truth about what is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from vembed_async_ckpt.bench import catalog
from vembed_async_ckpt.bench.catalog import ENGINES, Listed, choose
from vembed_async_ckpt.bench.engines import create
from vembed_async_ckpt.bench.options import MIB, Refused
from vembed_async_ckpt.bench.state import StateSpec

# Peers warn of what the benchmark does on purpose (no process group), and of their own calls.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:UserWarning", "ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning"
)
SPEC = StateSpec(size=MIB, tensors=12, model=None, device="cpu")
# What starts a process with a torch of its own is used by tests/bench/test_session.py once, or takes seconds each time.
QUICK = [
    name for name, listed in ENGINES.items() if listed.installed and name not in ("dcp-process", "torch_checkpointing")
]


@pytest.mark.parametrize("name", QUICK)
def test_what_an_engine_saves_is_what_it_loads(tmp_path: Path, name: str):
    """Weights and moments changed after the save come back as they were; `remove` leaves nothing."""
    state = SPEC.build()
    engine = create(name, os.fspath(tmp_path / name), state)
    try:
        handle = engine.save(1)
        handle.barrier()
        state.step()
        handle.wait()
        assert handle.done()
        expected = {key: value.clone() for key, value in state.flat().items()}
        assert len(expected) == 4 + 3 * 4  # weights; two moments and a count of steps for each
        with torch.no_grad():
            for value in state.flat().values():
                value.zero_()
        engine.load(1)
        loaded = state.flat()
        assert [key for key in expected if not torch.equal(expected[key], loaded[key])] == []
        engine.remove(1)
        assert not os.path.exists(engine.path(1))
    finally:
        engine.close()


def test_an_engine_that_waits_is_done_when_save_returns(tmp_path: Path):
    """`Listed.waits` is what the handle says."""
    state = SPEC.build()
    for name in ("original", "torch-save", "safetensors", "dcp-save"):
        assert ENGINES[name].waits
        engine = create(name, os.fspath(tmp_path / name), state)
        assert engine.save(0).done()
        engine.close()


def test_the_original_sequence_writes_the_weights_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As vembed's own function does: by accelerate's save_state and by save_pretrained."""
    from vembed_async_ckpt.bench import engines

    written = []
    save = engines.save_file
    monkeypatch.setattr(engines, "save_file", lambda tensors, path: (written.append(path), save(tensors, path)))
    engine = create("original", os.fspath(tmp_path), SPEC.build())
    engine.save(0)
    assert written == [os.path.join(engine.path(0), "model.safetensors")] * 2
    assert sorted(os.listdir(engine.path(0))) == ["model.safetensors", "optimizer.bin"]


def test_a_missing_engine_is_an_error_only_where_it_was_named(monkeypatch: pytest.MonkeyPatch):
    """With `all`, or by default, it is listed as missing."""
    absent = Listed("absent", "Absent", "", "", package="no_such_package_anywhere", pip="no-such-package")
    monkeypatch.setattr(catalog, "ENGINES", {"ours": ENGINES["ours"], "absent": absent})
    assert choose(["all"], []) == (["ours"], ["absent"])
    assert choose([], ["absent", "ours"]) == (["ours"], ["absent"])
    with pytest.raises(Refused, match="'absent' is not installed: pip install no-such-package"):
        choose(["ours", "absent"], [])
    with pytest.raises(Refused, match="no engine 'theirs'; there are ours, absent, and all"):
        choose(["theirs"], [])


def test_every_peer_says_what_its_checkpoints_lack():
    """And how it is configured; ours lacks nothing in a process."""
    assert [name for name, listed in ENGINES.items() if not listed.configuration] == []
    assert {name for name, listed in ENGINES.items() if not listed.lacks} == {"ours", "ours-blocking"}


@pytest.mark.parametrize(("size", "tensors"), [(MIB, 3), (MIB, 300), (64 * MIB, 99)])
def test_the_made_up_state_has_the_size_asked_for(size: int, tensors: int):
    """Within a tenth, and as many tensors, AdamW's counts of steps aside."""
    state = StateSpec(size, tensors, None, "cpu").build()
    assert state.nbytes == pytest.approx(size, rel=0.1)
    assert len([tensor for tensor in state.distinct() if tensor.dim()]) == tensors
