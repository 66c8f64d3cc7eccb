"""Saves and loads of a training on the second device type. Run by tests/gpu/test_second_device.py."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer, StageError, load
from vembed_async_ckpt._memory import devices
from vembed_async_ckpt._memory.barrier import STEP_BARRIER
from vembed_async_ckpt._memory.devices import DeviceCopies

from .device import Control

Step = Callable[[], None]
WAYS: list[dict[str, Any]] = [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": True, "amsgrad": True}]


def trained(
    steps: int, device: str = "second", **options: Any
) -> tuple[torch.nn.Sequential, torch.optim.Optimizer, Step]:
    """With weights that are contiguous, channels_last and transposed, BatchNorm statistics, and a frozen one."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 16), torch.nn.BatchNorm1d(16), torch.nn.Conv2d(4, 8, 3), torch.nn.Linear(16, 16)
    ).to(device, memory_format=torch.channels_last)
    model.turned = torch.nn.Parameter(torch.randn(40, 60).to(device).t())
    model.frozen = torch.nn.Parameter(torch.randn(30).to(device), requires_grad=False)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, **options)

    def step() -> None:
        optimizer.zero_grad()
        model[1](model[0](torch.randn(4, 16).to(device))).pow(2).mean().backward()
        sum(p.pow(2).mean() for p in (*model[2:].parameters(), model.turned)).backward()
        optimizer.step()

    for _ in range(steps):
        step()
    return model, optimizer, step


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    for number, entry in optimizer.state_dict()["state"].items():
        found |= {f"{number}.{key}": value.cpu().clone() for key, value in entry.items()}
    return found


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [
        name
        for name, value in one.items()
        if not torch.equal(value, other[name]) or value.stride() != other[name].stride()
    ]


@pytest.mark.parametrize("staging", ["overlap", "blocking"])
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_saves_beside_a_training(root: Path, device: Control, staging: Any, options: dict[str, Any]) -> None:
    """Weights, statistics and moments are those of the call, though training goes on at once and the device copies only when
    somebody waits. They come back on the device, with their strides, into an optimizer that has stepped and into a fresh one."""
    model, optimizer, step = trained(2, **options)
    with AsyncCheckpointer(root, staging=staging) as checkpointer:
        step()
        for number in range(1, 4):
            expected = state_of(model, optimizer)
            handle = checkpointer.save(
                number, model=model, optimizer=optimizer, extra={"ema": torch.arange(9.0, device="second")}
            )
            step()
            handle.result(60)
            assert checkpointer.statistics()["overlap"] is (staging == "overlap")
            for steps in (1, 0):
                restored, restored_optimizer, _ = trained(steps, **options)
                found = load(handle.path, model=restored, optimizer=restored_optimizer)
                assert differing(expected, state_of(restored, restored_optimizer)) == []
                assert found.extra["ema"].tolist() == list(range(9))
                on = {key: value.device for key, value in next(iter(restored_optimizer.state.values())).items()}
                assert on == {k: v.device for k, v in next(iter(optimizer.state.values())).items()}
    assert STEP_BARRIER.pending == ()


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_all_of_an_optimizer_is_late(root: Path, device: Control, options: dict[str, Any]) -> None:
    """Steps of four bytes, channels_last and transposed tensors too: the call issues copies of the rest only."""
    model, optimizer, step = trained(2, **options)
    with AsyncCheckpointer(root) as checkpointer:
        step()
        issued: list[tuple[int, int]] = []  # (thread, copies)
        issue = DeviceCopies.issue

        def note(self: DeviceCopies, to: Any, of: Any) -> None:
            issued.append((threading.get_ident(), len(of)))
            issue(self, to, of)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DeviceCopies, "issue", note)
            checkpointer.save(1, model=model, optimizer=optimizer).result(60)
    ours = sum(count for thread, count in issued if thread == threading.get_ident())
    assert ours == len(list(model.buffers())) + 1  # and what is frozen
    on_device = [v for v in [*model.state_dict().values(), *state_of_device(optimizer)] if not v.is_cpu]
    assert sum(count for _, count in issued) == len(on_device)


def state_of_device(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for entry in optimizer.state.values() for value in entry.values()]


@pytest.mark.parametrize("where", ["buffer", "extra"])
@pytest.mark.parametrize("view", ["conj", "neg"])
def test_views_that_conjugate_or_negate(root: Path, where: str, view: str) -> None:
    """What is saved is what a look at them shows (pytorch#146286 would have copied other bytes)."""
    complex_values = torch.tensor([1 + 2j, 3 - 4j] * 50).to("second")
    value = complex_values.conj() if view == "conj" else torch._neg_view(complex_values)
    assert (value.is_conj(), value.is_neg()) == (view == "conj", view == "neg")
    expected = value.cpu()
    model, optimizer, step = trained(2)
    with AsyncCheckpointer(root) as checkpointer:
        step()
        if where == "buffer":
            model.register_buffer("seen", value)
        handle = checkpointer.save(
            1, model=model, optimizer=optimizer, extra={"seen": value} if where == "extra" else None
        )
        handle.result(60)
        if where == "buffer":
            model.seen = torch.zeros_like(expected.resolve_conj().resolve_neg(), device="second")
            load(handle.path, model=model)
            assert torch.equal(model.seen.cpu(), expected)
        else:
            assert torch.equal(load(handle.path).extra["seen"], expected)


@pytest.mark.parametrize("held_back", [True, False])
def test_a_step_that_comes_before_the_copies_arrive(
    root: Path, monkeypatch: pytest.MonkeyPatch, held_back: bool
) -> None:
    """It is held back behind them; without `hold_back` its weights would get into the checkpoint."""
    stepped, wait = threading.Event(), DeviceCopies.wait

    def wait_after_the_step(self: DeviceCopies) -> None:
        assert stepped.wait(20)
        wait(self)

    model, optimizer, step = trained(2)
    with AsyncCheckpointer(root) as checkpointer:
        step()
        expected = state_of(model, optimizer)
        monkeypatch.setattr(DeviceCopies, "wait", wait_after_the_step)
        if not held_back:
            monkeypatch.setattr(DeviceCopies, "hold_back", lambda self: None)
        handle = checkpointer.save(1, model=model, optimizer=optimizer)
        step()
        stepped.set()
        handle.result(60)
    restored, restored_optimizer, _ = trained(1)
    load(handle.path, model=restored, optimizer=restored_optimizer)
    assert (differing(expected, state_of(restored, restored_optimizer)) == []) is held_back


def test_a_change_past_the_barrier_fails_the_save(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that is changed by hand while its copy is under way: the version counter tells."""
    changed, wait = threading.Event(), DeviceCopies.wait

    def wait_after_the_change(self: DeviceCopies) -> None:
        assert changed.wait(20)
        wait(self)

    model, optimizer, step = trained(2)
    with AsyncCheckpointer(root) as checkpointer:
        step()
        monkeypatch.setattr(DeviceCopies, "wait", wait_after_the_change)
        handle = checkpointer.save(1, model=model, optimizer=optimizer)
        with torch.no_grad():
            model.turned.add_(1)  # type: ignore[operator]
        changed.set()
        assert isinstance(handle.exception(60), StageError)
        assert checkpointer.statistics()["overlap"] is False


def test_a_copy_that_fails_midway_keeps_the_arena(root: Path, device: Control) -> None:
    """What was issued before it failed still arrives: the arena is not another save's until then, and the sources are held."""
    model, optimizer, step = trained(2)
    with AsyncCheckpointer(root) as checkpointer:
        step()
        checkpointer.save(1, model=model, optimizer=optimizer).result(60)
        for copies in (1, 4, 8):  # among those of the call, and among the late ones
            with device.failing_after(copies), pytest.raises(StageError, match="out of memory"):
                checkpointer.save(2, model=model, optimizer=optimizer).result(60)
            assert device.pending() == 0
        expected = state_of(model, optimizer)
        path = checkpointer.save(3, model=model, optimizer=optimizer).result(60).path
    restored, restored_optimizer, _ = trained(1)
    load(path, model=restored, optimizer=restored_optimizer)
    assert differing(expected, state_of(restored, restored_optimizer)) == []


def test_a_device_that_does_not_answer(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save fails at the deadline. Its arena is never used again, as the device may still write to it."""
    model, optimizer, step = trained(2)
    with AsyncCheckpointer(root) as checkpointer:
        step()
        with monkeypatch.context() as patch:
            patch.setattr(devices, "DEADLINE", 0.05)
            patch.setattr(devices, "_happens", lambda event, timeout: False)
            handle = checkpointer.save(1, model=model, optimizer=optimizer)
            error = handle.exception(60)
        assert isinstance(error, StageError)
        assert "did not end a part of the copy" in str(error)
        assert checkpointer.statistics()["arenas_free"] == checkpointer.statistics()["arenas_busy"] == 0
        expected = state_of(model, optimizer)
        path = checkpointer.save(2, model=model, optimizer=optimizer).result(60).path
    restored, restored_optimizer, _ = trained(1)
    load(path, model=restored, optimizer=restored_optimizer)
    assert differing(expected, state_of(restored, restored_optimizer)) == []
    devices._STUCK.clear()


def test_many_copies_are_issued_in_chunks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with an event of its own, and all arrive."""
    monkeypatch.setattr(devices, "CHUNK", 3)
    model, optimizer, step = trained(2)
    with AsyncCheckpointer(root) as checkpointer:
        step()
        expected = state_of(model, optimizer)
        path = checkpointer.save(1, model=model, optimizer=optimizer).result(60).path
    restored, restored_optimizer, _ = trained(1)
    load(path, model=restored, optimizer=restored_optimizer)
    assert differing(expected, state_of(restored, restored_optimizer)) == []


def test_the_time_the_device_is_held_is_reported(root: Path, device: Control) -> None:
    """The training thread goes on at once; the device waits for the copies, and `held` says how long."""
    model, optimizer, step = trained(2)
    events = []
    with AsyncCheckpointer(root, sinks=[events.append]) as checkpointer:
        step()
        quick = checkpointer.save(1, model=model, optimizer=optimizer).result(60)
        with device.slow_copies(0.02):
            handle = checkpointer.save(2, model=model, optimizer=optimizer)
            step()
            timings = handle.result(60).timings
    assert timings.held >= 0.02 * len(list(model.parameters()))
    assert quick.timings.held < timings.held / 4
    assert [event.seconds for event in events if event.stage == "held" and event.step == 2] == [timings.held]


def test_a_loaded_state_does_not_pass_through_host_memory_as_a_whole(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh optimizer's state is read piece by piece straight to where its parameters are."""
    model, optimizer, _ = trained(2)
    with AsyncCheckpointer(root) as checkpointer:
        path = checkpointer.save(1, model=model, optimizer=optimizer).result(60).path
    restored, restored_optimizer, _ = trained(0)
    made: list[torch.Tensor] = []
    load_state_dict = torch.optim.Optimizer.load_state_dict

    def note(self: torch.optim.Optimizer, state: Any) -> None:
        made.extend(value for entry in state["state"].values() for value in entry.values())
        load_state_dict(self, state)

    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", note, raising=False)
    monkeypatch.setattr(torch.optim.Optimizer, "load_state_dict", note)
    load(path, model=restored, optimizer=restored_optimizer)
    assert {value.device.type for value in made if value.numel() > 1} == {"second"}
    assert {value.device.type for value in made if value.numel() == 1} >= {"cpu"}


def test_the_generators_of_every_device_come_back(root: Path) -> None:
    """Those of this type of device too, one for each device."""
    module = torch.second  # type: ignore[attr-defined]
    model, optimizer, _ = trained(1)
    module.set_rng_state_all([torch.full((16,), value, dtype=torch.uint8) for value in (7, 8)])
    with AsyncCheckpointer(root) as checkpointer:
        path = checkpointer.save(1, model=model, optimizer=optimizer).result(60).path
    module.set_rng_state_all([torch.zeros(16, dtype=torch.uint8)] * 2)
    load(path, model=model, optimizer=optimizer)
    assert [state.unique().tolist() for state in module.get_rng_state_all()] == [[7], [8]]


def test_devices_whose_generators_are_not_here_are_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer devices than were saved the first ones come back, and a warning says so."""
    module = torch.second  # type: ignore[attr-defined]
    model, optimizer, _ = trained(1)
    module.set_rng_state_all([torch.full((16,), value, dtype=torch.uint8) for value in (7, 8)])
    with AsyncCheckpointer(root) as checkpointer:
        path = checkpointer.save(1, model=model, optimizer=optimizer).result(60).path
    module.set_rng_state_all([torch.zeros(16, dtype=torch.uint8)] * 2)
    monkeypatch.setattr(module, "device_count", lambda: 1)
    with pytest.warns(UserWarning, match="of 2 second devices were saved, this process has 1"):
        load(path, model=model, optimizer=optimizer)
    assert [state.unique().tolist() for state in module.get_rng_state_all()] == [[7], [0]]


def test_a_scaler_is_read_without_waiting_for_the_device(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers are copied as tensors are; the files say what they said before."""
    model, optimizer, step = trained(2)
    scaler = torch.amp.GradScaler("second", init_scale=64.0, growth_interval=3)
    scaler.scale(torch.ones((), device="second"))
    scaler._growth_tracker.fill_(2)  # type: ignore[union-attr]
    expected = scaler.state_dict()
    fetched: list[int] = []
    item = torch.Tensor.item
    with AsyncCheckpointer(root) as checkpointer:
        step()
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "item", lambda self: fetched.append(threading.get_ident()) or item(self))
            handle = checkpointer.save(1, model=model, optimizer=optimizer, scaler=scaler)
        assert threading.get_ident() not in fetched
        scaler._scale.fill_(1.0)  # type: ignore[union-attr]
        path = handle.result(60).path
    fresh = torch.amp.GradScaler("second", init_scale=2.0)
    load(path, scaler=fresh)
    assert fresh.state_dict() == expected
    assert torch.load(path / "scaler.pt", weights_only=True) == expected


def test_a_scaler_in_a_save_that_passes_through_a_small_arena(root: Path) -> None:
    model, optimizer, _ = trained(1)
    model.large = torch.nn.Parameter(torch.rand(5 << 20, device="second"))
    scaler = torch.amp.GradScaler("second", init_scale=64.0)
    scaler.scale(torch.ones((), device="second"))
    with pytest.warns(UserWarning, match="needs an arena"), AsyncCheckpointer(root, max_host_bytes=16 << 20) as saving:
        path = saving.save(1, model=model, optimizer=optimizer, scaler=scaler).result(60).path
    expected = model.large.detach().cpu()
    model.large.data.zero_()
    fresh = torch.amp.GradScaler("second", init_scale=2.0)
    load(path, model=model, scaler=fresh)
    assert torch.equal(model.large.detach().cpu(), expected)
    assert fresh.state_dict() == scaler.state_dict()


def test_a_device_without_streams_is_copied_while_the_call_waits(
    root: Path, device: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it is right, and the statistics do not claim an overlap."""
    monkeypatch.setattr(devices, "_usable", {"second": False})
    model, optimizer, step = trained(2)
    with AsyncCheckpointer(root) as checkpointer:
        step()
        queued, expected = device.queued(), state_of(model, optimizer)
        handle = checkpointer.save(1, model=model, optimizer=optimizer)
        step()
        path = handle.result(60).path
        assert device.queued() == queued
        assert checkpointer.statistics()["overlap"] is False
    restored, restored_optimizer, _ = trained(1)
    load(path, model=restored, optimizer=restored_optimizer)
    assert differing(expected, state_of(restored, restored_optimizer)) == []


def test_a_default_device_changes_nothing(root: Path) -> None:
    """Saves and loads in a process whose new tensors are on the device by default."""
    model, optimizer, step = trained(2)
    torch.set_default_device("second")
    try:
        with AsyncCheckpointer(root) as checkpointer:
            step()
            expected = state_of(model, optimizer)
            path = checkpointer.save(1, model=model, optimizer=optimizer, extra={"e": torch.ones(3)}).result(60).path
        restored, restored_optimizer, _ = trained(0)
        assert load(path, model=restored, optimizer=restored_optimizer).extra["e"].tolist() == [1, 1, 1]
        assert differing(expected, state_of(restored, restored_optimizer)) == []
    finally:
        torch.set_default_device("cpu")


@pytest.mark.parametrize("rows", [1 << 20, 100])
def test_columns_of_a_larger_tensor(device: Control, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Strided host memory is not what a device copies to while the host goes on: the columns pass through the two buffers,
    many times where these are small. What lies beside them stays, and the state is that of the call."""
    monkeypatch.setattr(devices, "ROWS_BUFFER", rows)
    monkeypatch.setattr(devices, "_ROWS", {})
    source = torch.arange(60.0).reshape(10, 6).to("second")
    bytes_of_it = torch.arange(40, dtype=torch.uint8).reshape(10, 4).to("second")
    whole, other = torch.full((10, 20), -1.0), torch.zeros(10, 9, dtype=torch.uint8)
    issued: list[tuple[bool, int]] = []
    real = DeviceCopies._issue_chunk

    def note(self: DeviceCopies, where: Any, side: Any, places: Any, aliases: Any) -> None:
        issued.extend((place.is_contiguous(), place.nbytes) for place in places)
        real(self, where, side, places, aliases)

    monkeypatch.setattr(DeviceCopies, "_issue_chunk", note)
    copies = DeviceCopies.of([source])
    assert copies is not None
    copies.issue([whole[:, 7:13], other[:, 2:6]], [source, bytes_of_it])
    copies.hold_back()
    source.fill_(0)
    copies.wait()
    assert all(contiguous and size <= rows for contiguous, size in issued), issued
    assert len(issued) == (2 if rows > 1000 else 4)
    assert torch.equal(whole[:, 7:13], torch.arange(60.0).reshape(10, 6))
    assert whole[:, :7].eq(-1).all()
    assert whole[:, 13:].eq(-1).all()
    assert torch.equal(other[:, 2:6], torch.arange(40, dtype=torch.uint8).reshape(10, 4))
    assert other[:, :2].eq(0).all()
    assert other[:, 6:].eq(0).all()
