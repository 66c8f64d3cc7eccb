"""Strides are part of what is saved: in optimizer state, in `extra`, in every other tensor of the training state."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vembed_async_ckpt import AsyncCheckpointer, CorruptCheckpoint, load
from vembed_async_ckpt._capture import memory_format
from vembed_async_ckpt._disk import manifests

BOUND = 30


def tensors() -> dict[str, torch.Tensor]:
    """One of each memory format, with other values in each place."""
    torch.manual_seed(0)
    image = torch.randn(4, 3, 5, 6)
    return {
        "contiguous": image,
        "channels_last": image.to(memory_format=torch.channels_last),
        "channels_last_3d": torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
        "one_by_one": torch.randn(8, 3, 1, 1).to(memory_format=torch.channels_last),
        "one_channel": torch.randn(8, 1, 3, 3).to(memory_format=torch.channels_last),
        "one_image": torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last),
        "transposed": torch.randn(7, 5).T,
        "permuted": torch.randn(2, 3, 4, 5).permute(2, 0, 3, 1),
        "part_of_a_buffer": torch.randn(64)[8:32].view(4, 6),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(2, 0, 3).permute(2, 1, 0),
        "bfloat16": torch.randn(7, 5, dtype=torch.bfloat16).T,
        "complex": torch.randn(7, 5, dtype=torch.complex64).T,
        "bool": (torch.randn(7, 5) > 0).T,
        "float64": torch.randn(3, 2, 5, dtype=torch.float64).permute(1, 2, 0),
    }


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    assert torch.equal(found, expected)


class Holder(torch.optim.SGD):
    """An optimizer whose state is given."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.parameter = torch.nn.Parameter(torch.ones(2))
        super().__init__([self.parameter], lr=0.1)
        nested = [state["transposed"].clone(), {"deep": state["channels_last"].clone()}]
        self.state[self.parameter] = {**state, "nested": nested}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict["state"][0]


@pytest.mark.parametrize("host_bytes", [None, 16 << 20], ids=["at once", "in waves"])
def test_state_of_an_optimizer_comes_back_with_its_strides(root: Path, host_bytes: int | None):
    """For our reader, and for torch.load of the same file, whether the arena holds all of it or a part at a time."""
    state = tensors()
    if host_bytes is not None:
        state["large"] = torch.randn(2000, 2600).T  # more than the arena holds
    warned = contextlib.nullcontext() if host_bytes is None else pytest.warns(UserWarning, match="in parts")
    with AsyncCheckpointer(root, max_host_bytes=host_bytes) as checkpointer, warned:
        path = checkpointer.save(1, optimizer=Holder(state)).result(BOUND).path
    fresh = Holder(tensors())
    load(path, optimizer=fresh, verify="full")
    for read in (fresh.loaded, torch.load(path / "optimizer.bin")["state"][0]):
        for key, value in state.items():
            assert_same(read[key], value)
        assert_same(read["nested"][0], state["transposed"])
        assert_same(read["nested"][1]["deep"], state["channels_last"])
    listed = manifests.read(str(path)).tensors["optimizer.bin"]
    assert {key for key, entry in listed.items() if len(entry) == 4} == {
        f"0.{key}" for key, value in state.items() if value.stride() != memory_format.contiguous(value.shape)
    } | {"state.0.nested.0", "state.0.nested.1.deep"}


def test_a_tensor_that_is_not_dense_comes_back_as_a_clone_of_it(root: Path):
    """Of slices and expanded tensors the values are kept, without the gaps; each element in a place of its own."""
    state = tensors()
    odd = {
        "gaps": torch.randn(6, 8)[::2, ::2],
        "columns": torch.randn(6, 8)[:, ::2].T,
        "expanded": torch.arange(3.0).expand(4, 3),
        "overlapping": torch.arange(5.0).as_strided((3, 3), (1, 1)),
    }
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, optimizer=Holder({**state, **odd}), extra=odd).result(BOUND).path
    fresh = Holder(state)
    restored = load(path, optimizer=fresh)
    for read in (fresh.loaded, torch.load(path / "optimizer.bin")["state"][0], restored.extra):
        for key, value in odd.items():
            assert_same(read[key], value.clone())


def test_extra_comes_back_with_its_strides(root: Path):
    """Tensors and arrays, in whatever order their elements lie."""
    arrays = {"rows": np.arange(6.0).reshape(2, 3), "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3))}
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, extra={"tensors": tensors(), "arrays": arrays}).result(BOUND).path
    extra = load(path).extra
    for key, value in tensors().items():
        assert_same(extra["tensors"][key], value)
    for key, array in arrays.items():
        assert extra["arrays"][key].strides == array.strides
        assert np.array_equal(extra["arrays"][key], array)


def test_a_state_that_changes_its_strides_is_followed(root: Path):
    """Saves of one optimizer whose state is put into another memory format between them."""
    state = tensors()
    optimizer = Holder(state)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        for step in range(3):
            if step == 2:
                entry = optimizer.state[optimizer.parameter]
                entry["channels_last"] = state["channels_last"].contiguous()
                entry["contiguous"] = state["contiguous"].to(memory_format=torch.channels_last)
            path = checkpointer.save(step, optimizer=optimizer).result(BOUND).path
            fresh = Holder(state)
            load(path, optimizer=fresh)
            for key in state:
                assert_same(fresh.loaded[key], optimizer.state[optimizer.parameter][key])


def stepped(memory: torch.memory_format, **options: Any) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 4, 3).to(memory_format=memory)
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format], ids=str)
def test_state_lies_in_memory_as_its_parameter_does(root: Path, memory: torch.memory_format):
    """A model keeps the memory format that it has, whatever it was saved in, and the moments follow it: in place where the
    optimizer has some, in new memory where it has none. A fused step needs that, and does not ask."""
    model, optimizer = stepped(torch.channels_last, fused=True)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, model=model, optimizer=optimizer).result(BOUND).path
    expected = optimizer.state[model.weight]
    model, used = stepped(memory, fused=True)
    place = used.state[model.weight]["exp_avg"].data_ptr()
    fresh = torch.optim.AdamW(model.parameters(), fused=True)
    for loaded in (used, fresh):
        load(path, model=model, optimizer=loaded)
        entry = loaded.state[model.weight]
        assert model.weight.is_contiguous(memory_format=memory)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(entry[key], expected[key])
            assert entry[key].stride() == model.weight.stride()
    assert used.state[model.weight]["exp_avg"].data_ptr() == place


def test_state_that_lay_otherwise_than_its_parameter_does_so_again(root: Path):
    """What an optimizer keeps in a memory format of its own (rotations, factors) comes back in that format."""
    model, optimizer = stepped(torch.channels_last)
    optimizer.state[model.weight]["exp_avg"] = (
        model.weight.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    )
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, model=model, optimizer=optimizer).result(BOUND).path
    saved = optimizer.state[model.weight]["exp_avg"]
    model, fresh = stepped(torch.channels_last)
    load(path, model=model, optimizer=fresh)
    assert_same(fresh.state[model.weight]["exp_avg"], saved)


@pytest.mark.parametrize("strides", [[1, 1], [2, 5], [7, 1], [-5, 1], [5.0, 1], [5], "51", [1, 5]])
def test_strides_in_a_manifest_that_cannot_be_are_corrupt(strides: Any):
    """A manifest is checked before a tensor is made of it."""
    with pytest.raises((ValueError, TypeError)):
        memory_format.checked((7, 5), strides)
    assert memory_format.checked((5, 7), [1, 5]) == (1, 5)


@given(
    st.lists(st.integers(0, 4), max_size=5).flatmap(
        lambda shape: st.tuples(st.just(shape), st.permutations(range(len(shape))))
    )
)
def test_permuted_tensors_are_dense_and_in_order(case: tuple[list[int], list[int]]):
    """For any shape and permutation: strides are kept exactly, and the order of the dimensions makes the tensor contiguous."""
    shape, permutation = case
    tensor = torch.empty(shape).permute(permutation)
    assert memory_format.is_dense(tensor.shape, tensor.stride())
    kept = memory_format.kept(tensor)
    assert (memory_format.contiguous(tensor.shape) if kept is None else kept) == tensor.stride()
    assert tensor.permute(memory_format.order(tensor.stride())).is_contiguous()
    assert pickle.loads(pickle.dumps(tensor)).stride() == tensor.stride()
    assert not memory_format.is_dense([2, 2], [1, 1])
    assert not memory_format.is_dense([2, 2], [3, 1])


def test_a_damaged_table_is_corrupt(root: Path):
    """Strides that do not fit the shape, in a manifest that is whole otherwise, are refused before anything is changed."""
    from dataclasses import replace

    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, optimizer=Holder(tensors())).result(BOUND).path
    manifest = manifests.read(str(path))
    whole = (path / "vembed_manifest.json").read_bytes()
    manifest.tensors["optimizer.bin"]["0.transposed"][3] = [5, 2]
    (path / "vembed_manifest.json").write_bytes(replace(manifest).to_bytes())
    with pytest.raises(CorruptCheckpoint, match=r"0\.transposed.*strides are \[5, 2\]"):
        load(path, optimizer=Holder(tensors()))
    (path / "vembed_manifest.json").write_bytes(whole)
