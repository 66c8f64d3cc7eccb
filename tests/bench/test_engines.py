"""Every engine that is installed saves what it is given, and the catalog says the truth about what is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from vembed_async_ckpt.bench import catalog
from vembed_async_ckpt.bench.catalog import ENGINES, Listed, choose
from vembed_async_ckpt.bench.engine import Engine, create
from vembed_async_ckpt.bench.machine import NewBytes
from vembed_async_ckpt.bench.options import MIB, Refused
from vembed_async_ckpt.bench.state import StateSpec

# Peers warn of what the benchmark does on purpose (no process group), and of their own calls.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:UserWarning", "ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning"
)
SPEC = StateSpec("cpu", "clip", "1/8", size=MIB, tensors=12)
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
        expected = {key: value.clone() for key, value in state.flat().items()}
        assert len(expected) == 4 + 3 * 4  # weights; two moments and a count of steps for each
        with torch.no_grad():
            for value in state.flat().values():
                value.zero_()
        engine.load(1)
        loaded = state.flat()
        assert [key for key in expected if not torch.equal(expected[key], loaded[key])] == []
        engine.remove(1)
        if engine.path(1) != engine.directory:  # a store that all checkpoints share
            assert not os.path.exists(engine.path(1))
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["original", "torch-save", "safetensors", "accelerate", "trainer", "dcp-save"])
def test_an_engine_that_waits_has_written_when_save_returns(tmp_path: Path, name: str):
    """`Listed.waits` is true of it: a checkpoint can be loaded without its handle."""
    assert ENGINES[name].waits
    state = SPEC.build()
    engine = create(name, os.fspath(tmp_path / name), state)
    engine.save(0)
    engine.load(0)
    engine.close()


def test_the_original_sequence_writes_the_weights_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As vembed's own function does: by accelerate's save_state and by save_pretrained."""
    from vembed_async_ckpt.bench.engines import waiting

    written = []
    save = waiting.save_file
    monkeypatch.setattr(waiting, "save_file", lambda tensors, path: (written.append(path), save(tensors, path)))
    engine = create("original", os.fspath(tmp_path), SPEC.build())
    engine.save(0)
    assert written == [os.path.join(engine.path(0), "model.safetensors")] * 2
    assert sorted(os.listdir(engine.path(0))) == ["model.safetensors", "optimizer.bin"]


def test_a_missing_engine_is_an_error_only_where_it_was_named(monkeypatch: pytest.MonkeyPatch):
    """With `all`, or by default, it is listed as missing."""
    absent = Listed("absent", "Absent", "", "", "", package="no_such_package_anywhere", pip="no-such-package")
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
    state = StateSpec("cpu", "clip", "1/8", size, tensors).build()
    assert state.nbytes == pytest.approx(size, rel=0.1)
    assert len([tensor for tensor in state.distinct() if tensor.dim()]) == tensors


def test_every_engine_of_the_catalog_is_a_class():
    """Its target names a subclass of `Engine`; what it needs beyond torch is imported only when it is made."""
    from vembed_async_ckpt.bench.engine import kind_of

    assert [name for name in ENGINES if not issubclass(kind_of(name), Engine)] == []


@pytest.mark.parametrize("name", QUICK)
def test_every_save_writes_what_has_changed(tmp_path: Path, name: str):
    """An engine that compresses or takes differences finds little to leave out: half of the state at least is written each time."""
    state = SPEC.build()
    engine = create(name, os.fspath(tmp_path / name), state)
    try:
        for number in range(3):
            state.drift()
            new = NewBytes(engine.directory)
            handle = engine.save(number)
            handle.barrier()
            handle.wait()
            assert new.count() > state.nbytes / 2
            engine.remove(number)
    finally:
        engine.close()


def test_the_state_is_random_and_changes_before_each_save():
    """No tensor of weights or moments is constant, and every one has changed, in each of its values."""
    state = SPEC.build()
    before = {name: tensor.clone() for name, tensor in state.flat().items()}
    for name, tensor in before.items():
        if tensor.dim():
            assert tensor.unique().numel() > tensor.numel() // 2, name
    state.drift()
    for name, tensor in state.flat().items():
        assert (tensor != before[name]).float().mean() > 0.95, name
    again = {name: tensor.clone() for name, tensor in state.flat().items()}
    state.step()
    assert [name for name, tensor in state.flat().items() if not torch.equal(tensor, again[name])] == []


def test_new_bytes_are_those_of_new_and_of_rewritten_files(tmp_path: Path):
    """A file that grew counts by what it grew, one with two names once, one that stayed not at all."""
    (tmp_path / "kept").write_bytes(b"x" * 1000)
    (tmp_path / "log").write_bytes(b"x" * 100)
    (tmp_path / "again").write_bytes(b"x" * 50)
    for name in ("log", "again"):
        os.utime(tmp_path / name, (1, 1))
    new = NewBytes(os.fspath(tmp_path))
    assert new.count() == 0
    (tmp_path / "new").write_bytes(b"x" * 10)
    os.link(tmp_path / "new", tmp_path / "link")
    with open(tmp_path / "log", "ab") as file:
        file.write(b"x" * 7)
    (tmp_path / "again").write_bytes(b"y" * 50)
    assert new.count() == 10 + 7 + 50
