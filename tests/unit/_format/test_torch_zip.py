"""`optimizer.bin` is a zip as torch writes it: torch, zipfile and unzip read it, and what comes out is the state at the call."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import shutil
import struct
import subprocess
import zipfile
import zlib
from dataclasses import dataclass
from operator import is_
from pathlib import Path
from typing import Any

import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer, PlanError, load
from vembed_async_ckpt._capture import optimizer as optimizers
from vembed_async_ckpt._capture import optimizer_pickle
from vembed_async_ckpt._capture.optimizer import OptimizerReader
from vembed_async_ckpt._capture.optimizer_pickle import Kind
from vembed_async_ckpt._capture.tree import Ref
from vembed_async_ckpt._disk.direct_io import _Crc
from vembed_async_ckpt._format import torch_zip


def model() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3, dtype=torch.float32))


def two_groups(parameters: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    # Each with betas of its own: of a tuple that two groups share we write two copies, torch one and a reference.
    first = {"params": parameters[:1], "lr": 1e-3, "name": "first", "betas": (0.5, 0.99)}
    return [first, {"params": parameters[1:], "weight_decay": 0.0}]


def adafactor(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=1e-3, relative_step=False)


MAKERS = {
    "AdamW": torch.optim.AdamW,
    "AdamW fused amsgrad": lambda p: torch.optim.AdamW(p, fused=True, amsgrad=True),
    "AdamW tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False),
    "AdamW two groups": lambda p: torch.optim.AdamW(two_groups(p)),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Rprop": torch.optim.Rprop,
    "LBFGS": torch.optim.LBFGS,
    "torch Adafactor": torch.optim.Adafactor,
    "transformers Adafactor": adafactor,  # scalars in the state
}


def make(name: str, steps: int = 2) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    module = model()
    optimizer = MAKERS[name](list(module.parameters()))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = module(torch.ones(4, 5)).pow(2).sum()
        loss.backward()
        return loss

    for _ in range(steps):
        closure()
        optimizer.step(closure if name == "LBFGS" else None)
    return module, optimizer


def same(one: Any, other: Any) -> bool:
    """Equal in every bit, dtype and type."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype is other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return type(other) is dict and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def save(root: Path, optimizer: Any) -> Path:
    with AsyncCheckpointer(root, writer="thread", staging="blocking") as checkpointer:
        return checkpointer.save(1, optimizer=optimizer).result(60).path / "optimizer.bin"


@pytest.mark.parametrize("name", MAKERS)
def test_torch_zipfile_and_unzip_read_it(root: Path, name: str):
    """torch.load in every mode gives the state_dict in all its bits; every CRC is right."""
    _, optimizer = make(name)
    path = save(root, optimizer)
    expected = optimizer.state_dict()
    for options in ({"weights_only": True}, {"weights_only": False}, {"weights_only": True, "mmap": True}):
        assert same(torch.load(path, **options), expected), options
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    if shutil.which("unzip"):
        subprocess.run(["unzip", "-tqq", path], check=True)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_fresh_optimizer_loads_it_as_accelerate_does(root: Path, name: str, steps: int):
    """`optimizer.load_state_dict(torch.load(...))`, the whole of accelerate's way back, restores the state exactly."""
    _, optimizer = make(name, steps)
    path = save(root, optimizer)
    _, fresh = make(name, 0)
    fresh.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    assert same(fresh.state_dict(), optimizer.state_dict())


def test_transformers_adafactor_has_scalars_in_its_state():
    """The case it stands for: state whose pickle changes with every step."""
    _, optimizer = make("transformers Adafactor")
    assert {type(value) for entry in optimizer.state.values() for value in entry.values()} > {torch.Tensor}
    assert OptimizerReader("optimizer.bin").read(optimizer).state_pickle is None


def torchs_own(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return next(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("steps", [0, 2])
def test_data_pkl_is_torchs_own_byte_for_byte(name: str, steps: int):
    """The canary for new versions of torch: our pickle of a state_dict is what torch.save writes."""
    _, optimizer = make(name, steps)
    state = OptimizerReader("optimizer.bin").read(optimizer)
    refs = dict(zip(state.keys, enumerate(state.kinds), strict=True))
    ours, theirs = optimizer_pickle.dumps(state.tree, refs), torchs_own(optimizer.state_dict())
    assert ours == theirs, first_difference(ours, theirs)


def first_difference(ours: bytes, theirs: bytes) -> str:
    def lines(data: bytes) -> list[str]:
        return [f"{opcode.name} {argument!r}" for opcode, argument, _ in pickletools.genops(data)]

    return next(
        (f"{n}: {a} | {b}" for n, (a, b) in enumerate(zip(lines(ours), lines(theirs), strict=False)) if a != b), ""
    )


EXOTIC = [
    torch.uint16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.bfloat16,
]


@pytest.mark.parametrize("dtype", EXOTIC, ids=str)
def test_state_of_any_dtype_is_torchs_own_too(root: Path, dtype: torch.dtype):
    """Dtypes younger than torch's typed storages are pickled another way; both are torch's."""
    _, optimizer = make("SGD momentum")
    first = next(iter(optimizer.state.values()))
    first["more"] = torch.zeros(2, 3).to(dtype)
    first["scalar"] = torch.ones(()).to(dtype)
    first["none"] = torch.empty(0, 2, dtype=dtype)
    state = OptimizerReader("optimizer.bin").read(optimizer)
    refs = dict(zip(state.keys, enumerate(state.kinds), strict=True))
    assert optimizer_pickle.dumps(state.tree, refs) == torchs_own(optimizer.state_dict())
    loaded = torch.load(save(root, optimizer), weights_only=True)["state"][0]
    for key in ("more", "scalar", "none"):
        assert loaded[key].dtype is dtype
        assert loaded[key].shape == first[key].shape
        assert bytes(loaded[key].reshape(-1).view(torch.uint8)) == bytes(first[key].reshape(-1).view(torch.uint8))


def test_replayed_saves_follow_what_changes(root: Path):
    """A kept plan: another lr, a longer number, an entry emptied and a tensor of another shape are all in the next file."""
    module, optimizer = make("AdamW two groups")
    with AsyncCheckpointer(root, writer="thread", staging="blocking") as checkpointer:

        def saved(step: int) -> Any:
            return torch.load(checkpointer.save(step, optimizer=optimizer).result(60).path / "optimizer.bin")

        assert same(saved(1), optimizer.state_dict())
        optimizer.param_groups[0]["lr"] = 1 / 3
        optimizer.param_groups[1]["name"] = "x" * 3000
        optimizer.param_groups[1]["betas"] = (0.5, 0.75)
        assert same(saved(2), optimizer.state_dict())
        first = module[0].weight
        optimizer.state[first]["exp_avg"] = torch.full((2, 2), 7.0)
        assert same(saved(3), optimizer.state_dict())
        optimizer.state[first] = {}
        assert same(saved(4), optimizer.state_dict())
        del optimizer.state[first]  # the tensors are those of the last save: only the empty entry is gone
        assert same(saved(5), optimizer.state_dict())
        optimizer.state[first] = {"a": {"b": [torch.ones(2), (1, None, "s")]}, "step": 3}
        assert same(saved(6), optimizer.state_dict())


def test_param_groups_that_grow_beyond_their_room_are_saved_all_the_same(root: Path):
    """What stands in param_groups may grow by any amount between two saves."""
    _, optimizer = make("AdamW")
    with AsyncCheckpointer(root, writer="thread", staging="blocking") as checkpointer:
        checkpointer.save(1, optimizer=optimizer).result(60)
        optimizer.param_groups[0]["note"] = "x" * 300_000
        path = checkpointer.save(2, optimizer=optimizer).result(60).path
    assert torch.load(path / "optimizer.bin")["param_groups"][0]["note"] == "x" * 300_000


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (object(), "object"),
        (torch.empty(2, device="meta"), "meta"),
        (torch.eye(2).to_sparse(), "sparse"),
        ({1: {2: {3: lambda: None}}}, "function"),
    ],
)
def test_state_that_cannot_be_saved_is_refused_by_name(root: Path, value: Any, reason: str):
    """The PlanError names the key, in the caller's stack."""
    module, optimizer = make("AdamW")
    optimizer.state[module[1].weight]["odd"] = value
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        with pytest.raises(PlanError, match=rf"2\.odd.*{reason}"):
            checkpointer.save(1, optimizer=optimizer)
        assert checkpointer.statistics()["arenas_busy"] == 0


# -- the layout itself


def fill(layout: torch_zip.ZipLayout, tail: bytes, storages: list[bytes]) -> bytearray:
    """The whole file in memory, its CRCs filled in as the writer does it."""
    content = bytearray(layout.end + len(tail))
    for at, data in (*layout.pieces, (layout.end, tail), *zip(layout.data, storages, strict=True)):
        content[at : at + len(data)] = data
    return content


@pytest.mark.parametrize("chunk", [1 << 30, 64, 61, 1])
def test_crcs_are_filled_in_whatever_the_chunks(chunk: int):
    """The writer sees the file in pieces that may split a record, a descriptor or a CRC's own four bytes."""
    storages = [b"", b"a", os.urandom(63), os.urandom(64), os.urandom(65), os.urandom(1000)]
    layout = torch_zip.layout([len(data) for data in storages])
    tail, central = torch_zip.tail(layout, b"\x80\x02N.")
    content = fill(layout, tail, storages)
    crc = _Crc({"central_start": central, "records": layout.records()})
    for at in range(0, len(content), chunk):
        piece = bytearray(content[at : at + chunk])
        crc.pass_by(memoryview(piece), at)
        content[at : at + chunk] = piece
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        assert [archive.read(f"archive/data/{n}") for n in range(len(storages))] == storages
        assert archive.read("archive/data.pkl") == b"\x80\x02N."
    for start, data in zip(layout.data, storages, strict=True):
        assert start % 64 == 0
        at = start + len(data)
        assert struct.unpack_from("<4sI", content, at) == (b"PK\x07\x08", zlib.crc32(data))


def test_seventy_thousand_records():
    """More records than a plain zip can count: the zip64 end of central directory has them."""
    count = 70_000
    storages = [n.to_bytes(4, "little") for n in range(count)]
    layout = torch_zip.layout([4] * count)
    tail, central = torch_zip.tail(layout, b"\x80\x02N.")
    content = fill(layout, tail, storages)
    _Crc({"central_start": central, "records": layout.records()}).pass_by(memoryview(content), 0)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert len(archive.namelist()) == count + 3
        for n in (0, 1, 65_534, 65_535, 65_536, count - 1):
            assert archive.read(f"archive/data/{n}") == storages[n]
    assert torch.load(io.BytesIO(content), weights_only=True) is None


GIB = 1 << 30


def test_records_and_offsets_beyond_4_gib(tmp_path: Path):
    """zip64: a sparse file of 14 GiB, of which a few bytes are real, is read by zipfile and by torch's mmap."""
    sizes = [5 * GIB, 16, 3 * GIB, 0xFFFFFFFF, 0xFFFFFFFE, 64]
    kinds = {str(n): (n, Kind(torch.uint8, (size,), size)) for n, size in enumerate(sizes)}
    tree = {key: optimizers.Ref(key) for key in kinds}
    layout = torch_zip.layout(sizes)
    tail, central = torch_zip.tail(layout, optimizer_pickle.dumps(tree, kinds))
    path = tmp_path / "sparse.bin"
    with open(path, "wb") as file:
        for at, data in (*layout.pieces, (layout.end, tail)):
            file.seek(at)
            file.write(data)
        for number, (start, size) in enumerate(zip(layout.data, sizes, strict=True)):
            file.seek(start + size - 1)
            file.write(bytes([number + 1]))
    assert path.stat().st_blocks * 512 < 1 << 20, "a sparse file"
    with zipfile.ZipFile(path) as archive:
        infos = [archive.getinfo(f"archive/data/{n}") for n in range(len(sizes))]
        assert [(info.file_size, info.compress_size) for info in infos] == [(size, size) for size in sizes]
        assert infos[-1].header_offset > 14 * GIB
        with open(path, "rb") as file:
            for info, (data, size, local, position) in zip(infos, layout.records(), strict=True):
                file.seek(info.header_offset)
                header = struct.unpack("<4s5H3I2H", file.read(30))
                assert (header[0], header[7] == 0xFFFFFFFF) == (b"PK\x03\x04", size >= 0xFFFFFFFF)
                assert info.header_offset + 30 + header[9] + header[10] == data
                file.seek(local - 4)
                assert file.read(4) == b"PK\x07\x08"
                file.seek(central + position - 16)
                assert file.read(4) == b"PK\x01\x02"
        assert archive.read("archive/version") == b"3\n"
    loaded = torch.load(path, mmap=True, weights_only=True)
    for number, (key, tensor) in enumerate(loaded.items()):
        assert tensor.numel() == sizes[int(key)]
        assert tensor[-1] == number + 1


def _replaced(optimizer: Any) -> None:
    parameter = optimizer.param_groups[0]["params"][0]
    new = torch.nn.Parameter(parameter.detach().clone())
    optimizer.param_groups[0]["params"][0] = new
    optimizer.state[new] = optimizer.state.pop(parameter)


def _regrouped(optimizer: Any) -> None:
    optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"].pop()], "lr": 0.5})


def _reloaded(optimizer: Any) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def _reordered(optimizer: Any) -> None:
    optimizer.state[first] = optimizer.state.pop(first := next(iter(optimizer.state)))


def _renamed(optimizer: Any) -> None:
    entry = next(iter(optimizer.state.values()))
    entry["other"] = entry.pop("exp_avg")


def _half(optimizer: Any) -> None:
    entry = next(iter(optimizer.state.values()))
    entry["exp_avg"] = entry["exp_avg"].half()


def _reshaped(optimizer: Any) -> None:
    next(iter(optimizer.state.values()))["exp_avg"].data = torch.zeros(1, 1)


def _numbers(optimizer: Any) -> None:
    for entry in optimizer.state.values():
        entry["step"] = int(entry["step"])


def _foreign_key(optimizer: Any) -> None:
    optimizer.state["global"] = {"seen": torch.ones(2)}


def _number_as_key(optimizer: Any) -> None:
    optimizer.state[0] = {"seen": torch.ones(2)}


def _hooked(optimizer: Any) -> None:
    optimizer.register_state_dict_post_hook(lambda self, state: {**state, "more": 1})


def _on_the_instance(optimizer: Any) -> None:
    of_torch = optimizer.state_dict
    optimizer.state_dict = lambda: {**of_torch(), "more": 1}


@dataclass(frozen=True)
class Named:
    """What a pickle would call."""

    name: str

    def __call__(self, *arguments: Any) -> Any:
        return self.name, arguments


class AsItSays(pickle.Unpickler):
    """Makes of every call and storage a tuple that says which."""

    def persistent_load(self, pid: Any) -> Any:
        return pid

    def find_class(self, module: str, name: str) -> Any:
        return Named(f"{module}.{name}")


def as_it_says(pickled: bytes) -> Any:
    return AsItSays(io.BytesIO(pickled)).load()


CHANGES = (
    _replaced, _regrouped, _reloaded, _reordered, _renamed, _half, _reshaped, _numbers,
    _foreign_key, _number_as_key, _hooked, _on_the_instance,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_remembered_of_an_optimizer_is_given_up_when_it_changes(change: Any):
    """A reader that has read it twice reads what its state_dict says now, in the same order and with the very same tensors."""
    _, optimizer = make("AdamW")
    reader = OptimizerReader("optimizer.bin")
    for _ in range(2):
        reader.read(optimizer)
    change(optimizer)
    for _ in range(2):
        state, expected = reader.read(optimizer), optimizer.state_dict()
        assert as_it_says(state.pickled()) == as_it_says(torchs_own(expected))
        live = [value for entry in expected["state"].values() for value in entry.values()]
        live = [value for value in live if isinstance(value, torch.Tensor)]
        assert all(map(is_, state.tensors, live))
        assert len(state.tensors) == len(live)


def test_a_state_dict_that_was_replaced_for_all_optimizers_is_asked(monkeypatch: pytest.MonkeyPatch):
    """By a library that wraps it, say."""
    _, optimizer = make("AdamW")
    reader, of_torch = OptimizerReader("optimizer.bin"), torch.optim.Optimizer.state_dict
    monkeypatch.setattr(torch.optim.Optimizer, "state_dict", lambda self: {**of_torch(self), "more": 1})
    for _ in range(2):
        assert reader.read(optimizer).tree["more"] == 1


class InFourBits:
    """An optimizer that is not torch's, which has no way to put such state back."""

    def __init__(self) -> None:
        pairs = torch.arange(6, dtype=torch.uint8).reshape(2, 3)
        self.state = {"state": {0: {"four": pairs.view(torch.float4_e2m1fn_x2)}}, "param_groups": []}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def test_a_state_in_pairs_of_four_bits_comes_back(root: Path):
    """torch's shape of it counts pairs, safetensors' numbers."""
    saved, loaded = InFourBits(), InFourBits()
    path = save(root, saved).parent
    loaded.state = {}
    load(path, optimizer=loaded)
    four, back = (optimizer.state["state"][0]["four"] for optimizer in (saved, loaded))
    assert (back.dtype, back.shape) == (four.dtype, four.shape)
    assert torch.equal(back.view(torch.uint8), four.view(torch.uint8))


def test_small_values_are_written_as_torch_would_write_them():
    """A file of values with tensors and arrays in them: torch and zipfile read it, and a tensor in two places stays one."""
    tensors = {
        "a": torch.rand(3, 2),
        "b": torch.arange(5056, dtype=torch.uint8),
        "c": torch.rand(0),
        "n": torch.rand(4),
    }
    captured = {
        "many": (3, tuple(range(700)), None),
        "twice": [Ref("a"), {"again": Ref("a")}],
        "bytes": Ref("b"),
        "none": Ref("c"),
        "array": Ref("n", numpy=True),
    }
    file = optimizer_pickle.file(captured, tensors)
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        assert archive.testzip() is None
        assert len([name for name in archive.namelist() if "/data/" in name]) == 3
    found = torch.load(io.BytesIO(file), weights_only=False)
    assert found["many"] == captured["many"]
    assert torch.equal(found["twice"][0], tensors["a"])
    assert found["twice"][0].data_ptr() == found["twice"][1]["again"].data_ptr()
    assert torch.equal(found["bytes"], tensors["b"])
    assert found["none"].shape == (0,)
    assert found["array"].tolist() == tensors["n"].tolist()
