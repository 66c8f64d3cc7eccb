"""Memory pinned for devices, the graphs that this leaves alone, and its NUMA node; on doubles of the CUDA runtime."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import platform
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer
from vembed_async_ckpt._engine.supervisor import Supervisor
from vembed_async_ckpt._memory import captures, devices, numa, pinning
from vembed_async_ckpt._memory.arena import Arena, ArenaPool, available_memory
from vembed_async_ckpt._memory.barrier import STEP_BARRIER

CUDA = torch.device("cuda", 3)


class Runtime:
    """Stands for the CUDA runtime: what was called, on which thread, with which device current and which mode of capture."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.calls: list[tuple[str, int | None, str]] = []
        self.threads: set[int] = set()
        self._of_thread = threading.local()

    def set_device(self, device: torch.device) -> None:
        self._of_thread.device = device.index

    def relax(self, mode: Any) -> int:
        self._of_thread.mode = {2: "relaxed"}[mode._obj.value]
        return 0

    def note(self, name: str) -> int:
        self.threads.add(threading.get_ident())
        local = self._of_thread
        self.calls.append((name, getattr(local, "device", None), getattr(local, "mode", "global")))
        return self.codes.pop(0) if self.codes else 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        return self.note("register")

    def cudaHostUnregister(self, address: int) -> int:
        return self.note("unregister")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """The training is on the fourth CUDA device."""
    runtime = Runtime()
    monkeypatch.setattr(devices, "_device", CUDA)
    monkeypatch.setattr(torch.cuda, "set_device", runtime.set_device)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(captures, "_exchange_capture_mode", lambda: runtime.relax)
    return runtime


EXPECTED = ("register", 3, "relaxed")


def test_a_closed_arena_is_not_pinned(runtime: Runtime) -> None:
    """Prewarming may still be at work on an arena that was given up: pinned then, it would stay so when its pages are gone."""
    arena = Arena(1, 1 << 20)
    arena.pin()
    arena.pin()
    arena.close()
    arena.pin()
    assert runtime.calls == [EXPECTED, ("unregister", 3, "relaxed")]


def test_the_runtime_is_called_on_threads_of_its_own(runtime: Runtime) -> None:
    """An error would stay on the training thread as CUDA's last one: so it is for pinning and for unpinning."""
    arena = Arena(1, 1 << 20)
    arena.pin()
    runtime.codes = [1]
    arena.close()
    assert len(runtime.calls) == 2
    assert threading.get_ident() not in runtime.threads


def test_what_could_not_be_pinned_is_tried_again(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    """Not for ever: the third failure is the last."""
    arena = Arena(1, 1 << 20)
    runtime.codes = [900]  # cudaErrorStreamCaptureUnsupported
    arena.pin()
    assert "could not be pinned" in caplog.text
    arena.pin()
    assert runtime.calls == [EXPECTED] * 2
    arena.close()
    other = Arena(2, 1 << 20)
    runtime.calls.clear()
    runtime.codes = [2] * 9
    for _ in range(9):
        other.pin()
    assert runtime.calls == [EXPECTED] * 3
    other.close()


def test_no_other_device_is_pinned_for(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_device", torch.device("xpu", 0))
    arena = Arena(1, 1 << 20)
    arena.pin()
    arena.close()
    assert runtime.calls == []


def test_the_runtime_that_torch_loaded_is_found_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among the mappings of the process, whatever the version at the end of its name."""
    asked: list[str] = []

    def load(path: str) -> Any:
        asked.append(path)
        return SimpleNamespace(cudaThreadExchangeStreamCaptureMode=lambda mode: 0)

    lines = ["7f00-7f01 r-xp 00000000 08:01 12 /opt/lib dir/libcudart.so.12\n", "7f01-7f02 rw-p 00000000 00:00 0 \n"]
    monkeypatch.setattr("builtins.open", lambda path: _Lines(lines))
    monkeypatch.setattr(ctypes, "CDLL", load)
    found = captures._exchange_capture_mode()
    monkeypatch.undo()
    assert found is not None
    assert asked == ["/opt/lib dir/libcudart.so.12"]


class _Lines(list[str]):
    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None: ...


def test_arenas_that_are_pinned_take_less_of_the_machine() -> None:
    """What is pinned cannot be swapped out, so more is left to others."""
    pool = ArenaPool(1, None, lambda arena: None, lambda arena: None)
    pageable = pool.limit()
    pool.pinned = True
    assert pool.limit() < 0.75 * pageable
    assert pool.limit() <= 0.62 * available_memory() + (64 << 20)


def test_an_optimizer_inside_a_cuda_graph_earns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step is repeated without the hook, so nothing of it is ever copied late."""
    STEP_BARRIER.install()
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()

    step()
    assert optimizer in STEP_BARRIER.optimizers()
    monkeypatch.setattr("vembed_async_ckpt._memory.barrier.is_capturing", lambda: True)
    step()
    assert optimizer not in STEP_BARRIER.optimizers()


def node_of(directory: Path, monkeypatch: pytest.MonkeyPatch, **properties: int) -> int | None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
    return numa.node_of(CUDA, str(directory))


def test_the_node_of_a_device_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its PCI address; None on a machine with one node, and where torch or the kernel does not tell."""
    device = tmp_path / "0001:0a:1f.0"
    device.mkdir()
    where = {"pci_domain_id": 1, "pci_bus_id": 10, "pci_device_id": 31}
    assert node_of(tmp_path, monkeypatch, **where) is None
    (device / "numa_node").write_text("1\n")
    assert node_of(tmp_path, monkeypatch, **where) == 1
    (device / "numa_node").write_text("-1\n")
    assert node_of(tmp_path, monkeypatch, **where) is None
    assert node_of(tmp_path, monkeypatch, name=0) is None
    assert numa.node_of(torch.device("xpu", 0)) is None


def test_memory_is_asked_of_a_node() -> None:
    """The kernel keeps what it was told: node 0 is preferred for these pages, and a node that is not there is refused."""
    memory = mmap.mmap(-1, 1 << 20)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert numa.prefer(address, 1 << 20, 0)
    assert policy_at(address) == 1  # MPOL_PREFERRED
    assert not numa.prefer(address, 1 << 20, 1000)


def policy_at(address: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    mode = ctypes.c_int(-1)
    get_mempolicy, of_address = {"x86_64": 239, "aarch64": 236}[platform.machine()], 2
    code = libc.syscall(
        ctypes.c_long(get_mempolicy), ctypes.byref(mode), None, ctypes.c_ulong(0), ctypes.c_void_p(address), of_address
    )
    assert code == 0, ctypes.get_errno()
    return mode.value & 0xFF


def test_a_checkpointer_asks_for_the_node_before_anybody_touches_the_arena(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the writer faults its pages in."""
    order: list[str] = []
    monkeypatch.setattr(devices, "_device", CUDA)
    monkeypatch.setattr(devices, "notice", lambda tensors: None)
    monkeypatch.setattr(numa, "node_of", lambda device: 0)
    monkeypatch.setattr(numa, "prefer", lambda address, size, node: order.append("prefer") or True)
    monkeypatch.setattr(pinning, "can_pin", lambda: False)
    add = Supervisor.add_arena
    monkeypatch.setattr(Supervisor, "add_arena", lambda self, arena: (order.append("populate"), add(self, arena))[1])
    with AsyncCheckpointer(root) as checkpointer:
        checkpointer.save(1, model=torch.nn.Linear(4, 4)).result(60)
    assert order == ["prefer", "populate"]
