"""What the parts share: the setting, a state with everything that is awkward, and the comparison byte for byte."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vembed_async_ckpt import load

Say = Callable[..., None]
State = tuple[Any, torch.optim.Optimizer]
WAIT = 60.0  # seconds for a save


@dataclass(frozen=True)
class Setting:
    """`deadline`: on time.monotonic()."""

    device: str
    tiny: bool
    deadline: float
    directory: Path

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def busy(self, milliseconds: float) -> None:
        """Give the device so much to do; the CPU goes on."""
        if self.cuda:
            torch.cuda._sleep(int(milliseconds * 1.6e6))


def quantiles(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(seconds)
    marks = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: round(ordered[min(len(ordered) - 1, int(q * len(ordered)))] * 1e3, 4) for name, q in marks.items()}


def build(setting: Setting, kind: str, dtype: torch.dtype = torch.float32) -> State:
    """Tied, transposed, channels_last, scalar, empty, frozen, fp8 and (`conj`) conjugate tensors, and an optimizer that has
    stepped."""
    layers, width = (4, 64) if setting.tiny else (12, 1536)
    model: Any = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(width, width, dtype=dtype) for _ in range(layers)])
    model.embedding = torch.nn.Embedding(257, width, dtype=dtype)
    model.head = torch.nn.Linear(width, 257, bias=False, dtype=dtype)
    model.head.weight = model.embedding.weight
    model.norm = torch.nn.BatchNorm1d(width)
    model.conv = torch.nn.Conv2d(16, 32, 3, dtype=dtype).to(memory_format=torch.channels_last)
    model.turned = torch.nn.Parameter(torch.randn(96, 160, dtype=dtype).t())
    model.scalar = torch.nn.Parameter(torch.ones((), dtype=dtype))
    model.empty = torch.nn.Parameter(torch.ones(0, 5, dtype=dtype))
    model.register_buffer("scaled8", torch.randn(300, 70).to(torch.float8_e4m3fn))
    model.frozen = torch.nn.Parameter(torch.randn(513, 77, dtype=torch.bfloat16), requires_grad=False)
    if kind == "conj":
        model.register_buffer("turning", torch.randn(1 << (10 if setting.tiny else 20), dtype=torch.complex64))
    model = model.to(setting.device)
    if kind == "conj":
        model.turning = model.turning.conj()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if kind == "sgd":
        optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    else:
        lr: Any = torch.tensor(0.01, device=setting.device) if kind == "tensor_lr" else 0.01
        ways: dict[str, dict[str, bool]] = {"fused": {"fused": True}, "capturable": {"capturable": True}}
        ways |= {"foreach": {"foreach": True}, "tensor_lr": {"fused": True}}
        optimizer = torch.optim.AdamW(trained, lr=lr, **ways.get(kind, {}))
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    change((model, optimizer), 1)
    return model, optimizer


def change(state: State, number: int, step: Callable[[], Any] | None = None) -> None:
    """A training step as the saved state sees it: everything is different afterwards."""
    model, optimizer = state
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.fill_(0.01 * number)
    with torch.no_grad():
        model.norm.running_mean.add_(number)
        model.norm.num_batches_tracked.add_(1)
        model.scaled8.copy_(torch.full_like(model.scaled8, 1.5, dtype=torch.float32))
    (step or optimizer.step)()


def reference(state: State) -> dict[str, torch.Tensor]:
    """What must come back: clones, in the order of the current stream."""
    model, optimizer = state
    kept = {f"model.{name}": value.detach().clone() for name, value in model.state_dict().items()}
    for number, entry in optimizer.state_dict()["state"].items():
        kept |= {f"optimizer.{number}.{k}": v.detach().clone() for k, v in entry.items() if isinstance(v, torch.Tensor)}
    return kept


def differing(path: Path | str, expected: dict[str, torch.Tensor], into: State) -> list[str]:
    """Names whose bytes are not those of `expected`: as our load restores them `into`, and as stock readers see the files."""
    load(path, model=into[0], optimizer=into[1])
    found = reference(into)
    wrong = [f"load: {name}" for name, value in expected.items() if not _same(value, found.get(name))]
    for name, value in load_file(f"{path}/model.safetensors").items():
        if not _same(value, expected[f"model.{name}"]):
            wrong.append(f"model.safetensors: {name}")
    stock = torch.load(f"{path}/optimizer.bin", weights_only=True, map_location="cpu")["state"]
    for name, value in expected.items():
        what, _, rest = name.partition(".")
        number, _, key = rest.partition(".")
        if what == "optimizer" and not _same(value, stock[int(number)][key]):
            wrong.append(f"optimizer.bin: {rest}")
    return wrong


def _same(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    if other is None or one.dtype is not other.dtype or one.shape != other.shape:
        return False
    pair = (
        t.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)
    )
    return bool(torch.equal(*pair))
